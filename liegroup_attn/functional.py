"""The verbs: attention by exp(tQ), the action of exp(tQ) on values, and exp(tQ) as a matrix."""

from __future__ import annotations

import numbers
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from liegroup_attn.checks import check_dropout, check_qkv, check_scale, check_scores, check_shape, check_time
from liegroup_attn.clocks import Clock, FixedClock
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.expm import Automatic, MatrixExp, Method, Uniformization
from liegroup_attn.generators import Generator, SoftmaxGenerator
from liegroup_attn.generators.joined import joined_generator
from liegroup_attn.masks import biased_mask, check_bias, prepare_mask
from liegroup_attn.tensors import differentiated, values_visible

__all__ = ["expm_multiply", "lie_attention", "transition_matrix"]


def expm_multiply(
    generator: Generator,
    value: Tensor,
    time: Tensor | float = 1.0,
    *,
    clock: Clock | None = None,
    method: Method | None = None,
) -> Tensor:
    """Let values flow along a generator: E[exp(τQ)]V.

    Args:
        generator: Q on N tokens.
        value: (..., N, D).
        time: mean of τ, ≥ 0, a number or broadcastable to (..., N), one per query row; (heads, 1) is one per head.
            Further dimensions in front are several times, computed from one set of iterates where the method has any:
            (T, 1, 1, 1) for values (B, H, N, D) gives (T, B, H, N, D).
        clock: law of τ; None is the fixed clock τ = t, i.e. exp(tQ)V.
        method: how. None chooses by generator, number of hops, size, device and dtype, see ``expm.Automatic``.

    Returns:
        (..., N, D), dtype of ``value``, several times in front; each output is a convex combination of values.

    Raises:
        ShapeError: wrong rank, tokens or time shape.
        DtypeError: not floating point.
        GeneratorError: time negative or not finite (looked at for numbers and on CPU).
        ConvergenceError: the method cannot reach its tolerance.

    Example:
        >>> from liegroup_attn import DenseGenerator
        >>> Q = DenseGenerator(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
        >>> expm_multiply(Q, torch.eye(2))
        tensor([[0.5677, 0.4323],
                [0.4323, 0.5677]])

    Source: [Moler2003]_; docs/mathematics.
    """
    if not isinstance(generator, Generator):
        raise GeneratorError(
            f"generator: expected a Generator, got {type(generator).__name__}; wrap a matrix in DenseGenerator(Q)"
        )
    check_shape("value", value, least_rank=2, remedy="give (..., tokens, width)")
    if value.size(-2) != generator.num_states:
        raise ShapeError(
            f"value: expected {generator.num_states} tokens as the generator, got shape {tuple(value.shape)}; "
            "queries, keys and values must be the same tokens"
        )
    if not _broadcast(generator.batch_shape, value.shape[:-2]):
        raise ShapeError(
            f"value: expected a batch that broadcasts with the generator's {tuple(generator.batch_shape)}, got shape "
            f"{tuple(value.shape)}; one matrix a batch item, or one for all"
        )
    batch = torch.broadcast_shapes(generator.batch_shape, value.shape[:-2])
    when = check_time(time, batch, generator.num_states)
    law, how = _check_law(clock, method)
    return how.act(generator, value, when, law)


def transition_matrix(generator: Generator, time: Tensor | float = 1.0, *, clock: Clock | None = None) -> Tensor:
    """P(t) = exp(tQ) as a matrix (or its mean under a clock): what attention weights are to softmax attention.

    Args:
        generator: Q on N tokens.
        time: mean of τ, ≥ 0, a number or broadcastable to (..., N).
        clock: law of τ; None is the fixed clock.

    Returns:
        (..., N, N), float32 or float64: entries ≥ 0, rows sum to 1.

    Raises:
        ShapeError: the time does not fit.
        GeneratorError: time negative or not finite.

    Example:
        >>> from liegroup_attn import DenseGenerator
        >>> Q = DenseGenerator(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
        >>> transition_matrix(Q, 1.0)
        tensor([[0.5677, 0.4323],
                [0.4323, 0.5677]])

    Source: [Norris1997]_, theorem 2.1.1.
    """
    if not isinstance(generator, Generator):
        raise GeneratorError(
            f"generator: expected a Generator, got {type(generator).__name__}; wrap a matrix in DenseGenerator(Q)"
        )
    law, _ = _check_law(clock, None)
    # Several times of one generator are fine: they add batch dimensions to it.
    shape = time.shape[:-1] if isinstance(time, Tensor) else torch.Size()
    if not _broadcast(shape, generator.batch_shape):
        raise ShapeError(
            f"time: expected a batch that broadcasts with the generator's {tuple(generator.batch_shape)}, "
            f"got {tuple(shape)}; for one time per matrix give (..., 1)"
        )
    when = check_time(time, torch.broadcast_shapes(shape, generator.batch_shape), generator.num_states)
    return MatrixExp().matrix(generator, when, law)


def lie_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    time: Tensor | float = 1.0,
    jump_rates: Tensor | float | None = None,
    first_hop: bool = False,
    clock: Clock | None = None,
    rate_fn: Callable[[Tensor], Tensor] | None = None,
    score_bias: Tensor | None = None,
    plus: Generator | None = None,
    head_weights: Tensor | None = None,
    method: Method | None = None,
    allow_open_mask: bool = False,
) -> Tensor:
    """Attention that mixes values by exp(tQ), Q the generator made from the scores.

    The first eight arguments are those of ``torch.nn.functional.scaled_dot_product_attention``; with
    ``first_hop=True, time=0`` so is the result. With ``first_hop=False, time=0`` the result is ``value``.

    Args:
        query: (..., H, N, E).
        key: (..., H, N, E); fewer heads with ``enable_gqa``.
        value: (..., H, N, D); fewer heads with ``enable_gqa``.
        attn_mask: broadcastable to (..., N, N): bool (True = takes part) or float (added to the scores). It must be
            transitively closed, since several allowed hops lead wherever they lead. A row without an allowed
            target keeps its own value (a softmax gives zeros or NaN there).
        dropout_p: probability of dropping an entry of S in each hop, independently (the mean over dropouts is
            exp(tQ)V). Dense methods, and sweeps of an exponential or Erlang clock, drop entries of P(t), which then is
            formed: N³ work and N² memory.
        is_causal: lower-triangular mask, beside ``attn_mask`` or alone; exp keeps it.
        scale: of the scores; default 1/√E.
        enable_gqa: let groups of query heads share a key and value head.
        time: t ≥ 0, mean of the clock; a number or broadcastable to (..., H, N), one per query row; (H, 1) is one per
            head. It carries the scale of Q, so the number of hops is known from it alone. Further dimensions in front
            are several times at once: (T, 1, 1, 1) gives (T, B, H, N, D).
        jump_rates: ρ per token in [0, 1], broadcastable to (..., H, N); default 1. Token j jumps at rate t·ρ_j.
        first_hop: mix by S·E[exp(τQ)] instead: the query first jumps to a token, then the chain runs.
        clock: law of τ; None is the fixed clock (Poisson hops), ``ExponentialClock()`` the resolvent (geometric hops).
        rate_fn: None is the jump chain, Q = diag(ρ)(softmax(scores) − I). A function from scores to rates ≥ 0 makes
            Q = diag(ρ)(R − diag(R1)), which forms N×N.
        score_bias: finite numbers added to the scores (log-rates), broadcastable to (..., H, N, N), e.g. of a
            ``positional.BiasEncoding``. It hides nothing.
        plus: a further generator on the same tokens, added to that of the scores: relative-position rates, a learned
            matrix. Masks act on it too (which forms N×N, unless it is causal itself); its rates count among the hops.
        head_weights: w ≥ 0, (H, H): head g flows along Σ_h w_gh Q_h, before ``plus`` is added.
        method: how exp(tQ)V is computed; None chooses, see ``expm_multiply``.
        allow_open_mask: accept a mask that is not transitively closed and let exp(tQ) fill it; also skips the check.

    Returns:
        (..., H, N, D), dtype of ``value``.

    Raises:
        ShapeError: ranks, widths, tokens or times do not fit; queries ≠ keys with anything but first_hop=True, time=0.
        DtypeError: mixed or non-floating dtypes.
        MaskError: a mask of wrong shape or dtype, or not transitively closed.
        GeneratorError: NaN or inf in query or key, time < 0 or inf, ρ outside [0, 1] (numbers and CPU tensors).

    Example:
        >>> q = k = v = torch.randn(1, 2, 5, 8)
        >>> lie_attention(q, k, v, is_causal=True).shape
        torch.Size([1, 2, 5, 8])
        >>> softmax = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.equal(lie_attention(q, k, v, is_causal=True, time=0.0, first_hop=True), softmax)
        True

    Source: docs/mathematics; relatives are [Fagnou2024]_ and [Chamberlain2021]_.
    """
    query, key, value = check_qkv(query, key, value, enable_gqa)
    check_dropout(dropout_p)
    check_scale(scale)
    clock, how = _check_law(clock, method)
    if rate_fn is not None and not callable(rate_fn):
        raise GeneratorError(
            f"rate_fn: expected a function of scores, got {rate_fn!r}; pass liegroup_attn.softplus itself"
        )
    when = check_time(time, query.shape[:-2], query.size(-2))
    across = query.size(-2) != key.size(-2)
    zero = (across or values_visible(when)) and bool((when == 0).all())
    if across:
        if not (first_hop and zero and rate_fn is plus is head_weights is None):
            raise ShapeError(
                f"key: expected the query's {query.size(-2)} tokens, got {key.size(-2)}; across different tokens there is "
                "no generator, only first_hop=True with time=0, rate_fn=None, plus=None, head_weights=None (softmax attention)"
            )
        return _softmax_across(query, key, value, attn_mask, score_bias, dropout_p, is_causal, scale)
    still = zero and not differentiated(when)  # a time that starts at 0 still has a gradient
    allow_open_mask = allow_open_mask or still  # without hops nothing leaks
    chain = SoftmaxGenerator(
        query,
        key,
        jump_rates=jump_rates,
        attn_mask=attn_mask,
        is_causal=is_causal,
        score_bias=score_bias,
        scale=scale,
        dropout_p=dropout_p,
        allow_open_mask=allow_open_mask,
    )
    generator = joined_generator(chain, rate_fn, head_weights, plus)
    if still:
        value = value.expand(torch.broadcast_shapes(value.shape, (*when.shape, 1)))  # several times, all 0
        return generator.jump(value) if first_hop else value.clone()
    if isinstance(how, Automatic):
        if how.longest is None and isinstance(time, numbers.Real) and generator is chain:
            how = Automatic(how.tol, float(time), streams=how.streams)  # a number is known without a look at any tensor
        how = how.choose(generator, value, when, clock)
    if dropout_p > 0 and not (isinstance(how, Uniformization) and rate_fn is None):
        eye = torch.eye(generator.num_states, dtype=value.dtype, device=value.device)
        mixing = how.act(generator, eye.expand(*value.shape[:-2], -1, -1), when, clock)
        value = F.dropout(mixing, dropout_p) @ value
        return generator.jump(value) if first_hop else value
    return how.act(generator, value, when, clock, first_hop)


def _softmax_across(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    score_bias: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Softmax attention to other tokens; a query without an allowed target has no value of its own and gets 0."""
    check_scores(query, key, query.size(-1) ** -0.5 if scale is None else scale)
    shape = torch.Size([*query.shape[:-1], key.size(-2)])
    mask = prepare_mask(attn_mask, is_causal, shape, query.dtype, allow_open_mask=True)
    if score_bias is not None:
        score_bias = check_bias(score_bias, shape)
    hidden = biased_mask(score_bias, mask.attn_mask, is_causal and mask.attn_mask is None, query, key)
    mixed = F.scaled_dot_product_attention(
        query, key, value, hidden, dropout_p, is_causal and hidden is None, scale=scale
    )
    return mixed if mask.no_target is None else mixed.masked_fill(mask.no_target, 0)


def _check_law(clock: Clock | None, method: Method | None) -> tuple[Clock, Method]:
    law = FixedClock() if clock is None else clock
    if not isinstance(law, Clock):
        raise GeneratorError(
            f"clock: expected a Clock such as ExponentialClock(), got {law!r}; None is the fixed clock"
        )
    if method is not None and not isinstance(method, Method):
        raise GeneratorError(f"method: expected a Method such as Uniformization(), got {method!r}; None chooses")
    return law, Automatic() if method is None else method


def _broadcast(first: torch.Size, second: torch.Size) -> bool:
    return all(a == b or 1 in (a, b) for a, b in zip(reversed(first), reversed(second), strict=False))
