"""The verbs: attention by exp(tQ), the action of exp(tQ) on values, and exp(tQ) as a matrix."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liegroup_attn.checks import check_dropout, check_qkv, check_scale, check_scores, check_shape, check_time
from liegroup_attn.clocks import Clock, FixedClock
from liegroup_attn.deprecated import warn_of
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.expm import Automatic, MatrixExp, Method
from liegroup_attn.generators import Generator, HeadMixture, SoftmaxGenerator
from liegroup_attn.generators.dense import restricted
from liegroup_attn.masks import biased_mask, read_mask
from liegroup_attn.scores import check_bias
from liegroup_attn.tensors import differentiated, values_visible

__all__ = ["expm_multiply", "lie_attention", "transition_matrix"]


def expm_multiply(
    generator: Generator,
    value: Tensor,
    time: Tensor | float = 1.0,
    *,
    clock: Clock | None = None,
    first_hop: bool = False,
    method: Method | None = None,
) -> Tensor:
    """Let values flow along a generator: E[exp(τQ)]V, or S·E[exp(τQ)]V.

    Args:
        generator: Q on N tokens. What it drops (``dropout_p``) is dropped anew in each hop, independently (the mean over
            dropouts is exp(tQ)V); dense methods, and sweeps of an exponential or Erlang clock, drop entries of P(t) instead,
            which then is formed: N³ work and N² memory.
        value: (..., N, D).
        time: mean of τ, ≥ 0, a number or broadcastable to (..., N), one per query row; (heads, 1) is one per head.
            Further dimensions in front are several times, computed from one set of iterates where the method has any:
            (T, 1, 1, 1) for values (B, H, N, D) gives (T, B, H, N, D).
        clock: law of τ; None is the fixed clock τ = t, i.e. exp(tQ)V.
        first_hop: first jump once, then run: S·E[exp(τQ)]V; at time 0 softmax attention.
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
    if generator.past:
        raise GeneratorError(
            f"generator: expected one with the rows of all its tokens, got one with past={generator.past}; it is for Flow.extend"
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

    def finish(mixed: Tensor) -> Tensor:
        return generator.jump(mixed) if first_hop else mixed

    if _still(when):
        # Several times may be asked for, all 0.
        return finish(value.expand(torch.broadcast_shapes((*batch, *value.shape[-2:]), (*when.shape, 1))).clone())
    known = None  # without a look at any tensor
    if isinstance(time, numbers.Real) and isinstance(bound := generator.rate_bound(), float):
        known = float(time) * bound
    how = how.choose(generator, value, when, law, known)
    if generator.dropout_p and not (how.drops_hops and generator.drops_in_hops):
        eye = torch.eye(generator.num_states, dtype=value.dtype, device=value.device)
        mixing = how.act(generator, eye.expand(*value.shape[:-2], -1, -1), when, law)
        return finish(F.dropout(mixing, generator.dropout_p) @ value)
    return how.act(generator, value, when, law, first_hop)


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


_VERB = signature(expm_multiply).parameters
_MEANS = {
    "score_bias": "give it to the generator: expm_multiply(SoftmaxGenerator(q, k, score=bias, …), v, t, …)",
    "plus": "add it: expm_multiply(SoftmaxGenerator(q, k, …) + R, v, t, …)",
    "head_weights": "mix the heads: expm_multiply(HeadMixture(SoftmaxGenerator(q, k, …), w), v, t, …)",
    "allow_open_mask": "give it to the generator: expm_multiply(SoftmaxGenerator(q, k, visible=mask, allow_open_mask=True), v, t)",
}


def _with_old_keywords(verb: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For one release: keywords of what are generators, or arguments of generators, now."""
    known = signature(verb)

    @wraps(verb)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        old = {name: kwargs.pop(name) for name in _MEANS if name in kwargs}
        for name in old:
            warn_of(name, _MEANS[name])
        old = {name: value for name, value in old.items() if value is not None and value is not False}
        if not old:
            return verb(*args, **kwargs)
        bound = known.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        query, key, value = check_qkv(*(given[name] for name in ("query", "key", "value", "enable_gqa")))
        if query.size(-2) != key.size(-2) and (bias := old.pop("score_bias", None)) is not None and not old:
            bias = check_bias(bias, torch.Size([*query.shape[:-1], key.size(-2)]))
            return verb(**{**given, "attn_mask": biased_mask(bias, given["attn_mask"], False, query, key)})
        chain = SoftmaxGenerator(
            query,
            key,
            score=old.get("score_bias"),
            visible=given["attn_mask"],
            allow_open_mask=old.get("allow_open_mask", False)
            or _still(check_time(given["time"], query.shape[:-2], query.size(-2))),
            **{name: given[name] for name in ("is_causal", "jump_rates", "scale", "dropout_p")},
        )
        generator: Generator = chain if given["rate_fn"] is None else chain.with_rates(given["rate_fn"])
        if (weights := old.get("head_weights")) is not None:
            generator = HeadMixture(generator, weights)
        if (plus := old.get("plus")) is not None:
            generator = generator + restricted(plus, chain.visible)
        flow = {name: given[name] for name, p in _VERB.items() if p.kind is p.KEYWORD_ONLY}
        return expm_multiply(generator, value, given["time"], **flow)

    return wrapped


@_with_old_keywords
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
    method: Method | None = None,
) -> Tensor:
    """Attention that mixes values by exp(tQ), Q the generator made from the scores.

    The first eight arguments are those of ``torch.nn.functional.scaled_dot_product_attention``; with
    a first hop and time 0 so is the result. Without the hop, time 0 gives ``value``.

    It is ``expm_multiply(SoftmaxGenerator(query, key, …), value, time, …)``, written out for what that takes besides: biases
    and soft caps of scores, windows, documents, open masks, sums Q + R, mixtures over heads.

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
        method: how exp(tQ)V is computed; None chooses, see ``expm_multiply``.

    Returns:
        (..., H, N, D), dtype of ``value``.

    Raises:
        ShapeError: ranks, widths, tokens or times do not fit; queries ≠ keys with anything but a first hop at time 0.
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
    _check_law(clock, method)
    when = check_time(time, query.shape[:-2], query.size(-2))
    if query.size(-2) != key.size(-2):
        if not (first_hop and bool((when == 0).all()) and rate_fn is None):
            raise ShapeError(
                f"key: expected the query's {query.size(-2)} tokens, got {key.size(-2)}; across different tokens there is "
                "no generator, only softmax attention (first_hop=True with time=0 and rate_fn=None)"
            )
        return _softmax_across(query, key, value, attn_mask, dropout_p, is_causal, scale)
    open_mask = _still(when)  # without hops nothing leaks
    chain = SoftmaxGenerator(
        query,
        key,
        visible=attn_mask,
        is_causal=is_causal,
        jump_rates=jump_rates,
        scale=scale,
        dropout_p=dropout_p,
        allow_open_mask=open_mask,
    )
    generator = chain if rate_fn is None else chain.with_rates(rate_fn)
    return expm_multiply(generator, value, time, clock=clock, first_hop=first_hop, method=method)


def _still(time: Tensor) -> bool:
    """Whether no time passes and no derivative by it is wanted: one that starts at 0 still has a gradient."""
    return values_visible(time) and not differentiated(time) and bool((time == 0).all())


def _softmax_across(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Softmax attention to other tokens; a query without an allowed target has no value of its own and gets 0."""
    check_scores(query, key, query.size(-1) ** -0.5 if scale is None else scale)
    shape = torch.Size([*query.shape[:-1], key.size(-2)])
    check_dropout(dropout_p)
    check_scale(scale)
    bias = allowed = no_target = None
    if attn_mask is not None:
        visible, bias = read_mask(attn_mask, query.dtype)
        visible.check(shape)
        (allowed,) = visible.tensors
        if is_causal:
            allowed = allowed & torch.ones(shape[-2:], dtype=torch.bool, device=allowed.device).tril()
        no_target = ~allowed.any(-1, keepdim=True)
        allowed = allowed | no_target
    mask = biased_mask(bias, allowed, is_causal and allowed is None, query, key)
    mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal and mask is None, scale=scale)
    return mixed if no_target is None else mixed.masked_fill(no_target, 0)


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
