"""The verbs: attention by exp(tQ), the action of exp(tQ) on values, and exp(tQ) as a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from liegroup_attn.clocks import Clock, FixedClock
from liegroup_attn.errors import DtypeError, GeneratorError, ShapeError, check_shape
from liegroup_attn.expm import MatrixExp, Method, Uniformization, choose_method
from liegroup_attn.expm.base import per_row
from liegroup_attn.generators import DenseGenerator, Generator, SoftmaxGenerator, _at_least_float32
from liegroup_attn.rates import prepare_mask

__all__ = ["expm_multiply", "lie_attention", "transition_matrix"]

_TOL = 1e-7  # for choosing; the hops themselves go to the rounding unit of the input


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
        clock: law of τ; None is the fixed clock τ = t, i.e. exp(tQ)V.
        method: how. None chooses by N, the number of hops, clock and causality, see ``expm.choose_method``.

    Returns:
        (..., N, D), dtype of ``value``; each output is a convex combination of values.

    Raises:
        ShapeError: wrong rank, tokens or time shape.
        DtypeError: not floating point.
        GeneratorError: time negative or not finite (looked at for numbers and on CPU).
        ConvergenceError: the method cannot reach its tolerance.

    Example:
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
    when = _check_time(time, value.shape[:-1])
    law = FixedClock() if clock is None else clock
    if not isinstance(law, Clock):
        raise GeneratorError(
            f"clock: expected a Clock such as ExponentialClock(), got {law!r}; None is the fixed clock"
        )
    how = _choose(generator, when, law) if method is None else method
    if not isinstance(how, Method):
        raise GeneratorError(f"method: expected a Method such as Uniformization(), got {how!r}; None chooses")
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
    when = _check_time(time, None)
    return MatrixExp().matrix(generator, when, FixedClock() if clock is None else clock)


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
            exp(tQ)V); dense methods drop entries of P(t).
        is_causal: lower-triangular mask; exp keeps it.
        scale: of the scores; default 1/√E.
        enable_gqa: let groups of query heads share a key and value head.
        time: t ≥ 0, mean of the clock; a number or broadcastable to (..., H, N), one per query row; (H, 1) is one per
            head. It carries the scale of Q, so the number of hops is known from it alone.
        jump_rates: ρ per token in [0, 1], broadcastable to (..., H, N); default 1. Token j jumps at rate t·ρ_j.
        first_hop: mix by S·E[exp(τQ)] instead: the query first jumps to a token, then the chain runs.
        clock: law of τ; None is the fixed clock (Poisson hops), ``ExponentialClock()`` the resolvent (geometric hops).
        rate_fn: None is the jump chain, Q = diag(ρ)(softmax(scores) − I). A function from scores to rates ≥ 0 makes
            Q = diag(ρ)(R − diag(R1)), which forms N×N.
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
    query, key, value = _check_qkv(query, key, value, enable_gqa)
    when = _check_time(time, value.shape[:-2] + query.shape[-2:-1])
    still = bool((when == 0).all()) if when.device.type == "cpu" or query.size(-2) != key.size(-2) else False
    if query.size(-2) != key.size(-2):
        if not (first_hop and still):
            raise ShapeError(
                f"key: expected the query's {query.size(-2)} tokens, got {key.size(-2)}; across different tokens there is "
                "no generator, only first_hop=True with time=0 (softmax attention)"
            )
        prepare_mask(attn_mask, is_causal, torch.Size([*query.shape[:-1], key.size(-2)]), query.dtype, True)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale)

    generator: Generator
    if rate_fn is None:
        generator = SoftmaxGenerator(
            query,
            key,
            jump_rates=jump_rates,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            dropout_p=dropout_p,
            allow_open_mask=allow_open_mask or still,  # without hops nothing leaks
        )
    else:
        generator = _from_rate_fn(
            rate_fn, query, key, jump_rates, attn_mask, is_causal, scale, allow_open_mask or still
        )
    if not still:
        how = method or _choose(generator, when, clock or FixedClock())
        if dropout_p > 0 and not (isinstance(how, Uniformization) and rate_fn is None):
            mixing = MatrixExp().matrix(generator, when, clock or FixedClock())
            value = _at_least_float32(F.dropout(mixing, dropout_p)).matmul(value.to(mixing.dtype)).to(value.dtype)
        else:
            value = expm_multiply(generator, value, when, clock=clock, method=how)
    return generator.jump(value) if first_hop else value


def _from_rate_fn(
    rate_fn: Callable[[Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    jump_rates: Tensor | float | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    allow_open_mask: bool,
) -> DenseGenerator:
    """Q = diag(ρ)(R − diag(R1)), R = rate_fn(scores), 0 where masked."""
    # The checks, and ρ made broadcastable, are those of the jump chain of the same scores.
    chain = SoftmaxGenerator(
        query, key, jump_rates=jump_rates, attn_mask=attn_mask, is_causal=is_causal, allow_open_mask=allow_open_mask
    )
    rates = rate_fn(chain.scores(scale))  # (..., N, N)
    masked = chain.masked()
    if masked is not None:
        rates = rates.masked_fill(masked, 0)
    if chain.jump_rates is not None:
        rates = chain.jump_rates.unsqueeze(-1).to(rates.dtype) * rates
    return DenseGenerator.from_rates(rates)


def _check_qkv(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Check ranks, dtypes and sizes; give every query head a key and a value head."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_shape(name, tensor, least_rank=2, remedy="give (..., heads, tokens, width)")
        if tensor.size(-2) == 0:
            raise ShapeError(
                f"{name}: expected at least 1 token, got shape {tuple(tensor.shape)}; drop empty sequences from the batch"
            )
    if not query.dtype == key.dtype == value.dtype:
        if not torch.is_autocast_enabled(query.device.type):
            raise DtypeError(
                f"query, key, value: expected one dtype, got {query.dtype}, {key.dtype}, {value.dtype}; convert them, e.g. key.to(query.dtype)"
            )
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    if query.size(-1) != key.size(-1):
        raise ShapeError(
            f"key: expected the query's width {query.size(-1)}, got {key.size(-1)}; project both to one head width"
        )
    if key.size(-2) != value.size(-2):
        raise ShapeError(
            f"value: expected the key's {key.size(-2)} tokens, got {value.size(-2)}; values belong to keys, one each"
        )
    if enable_gqa:
        heads = query.size(-3) if query.dim() > 2 else 0
        for name, tensor in (("key", key), ("value", value)):
            if tensor.dim() < 3 or tensor.size(-3) == 0 or heads % tensor.size(-3):
                raise ShapeError(
                    f"{name}: expected a number of heads that divides the query's {heads}, got shape {tuple(tensor.shape)}; "
                    "set num_kv_heads to a divisor"
                )
        key = key.repeat_interleave(heads // key.size(-3), -3)
        value = value.repeat_interleave(heads // value.size(-3), -3)
    try:
        batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    except RuntimeError:
        raise ShapeError(
            f"query, key, value: expected equal batch and head sizes, got {tuple(query.shape)}, {tuple(key.shape)}, "
            f"{tuple(value.shape)}; set enable_gqa=True if key and value have fewer heads"
        ) from None
    query, key, value = (x.expand(*batch, *x.shape[-2:]) for x in (query, key, value))
    return query, key, value


def _check_time(time: Tensor | float, rows: torch.Size | None) -> Tensor:
    """Time as a tensor that broadcasts against (..., N); a number stays 0-dimensional (and on the CPU)."""
    given = isinstance(time, Tensor)
    when = time if isinstance(time, Tensor) else torch.tensor(float(time), dtype=torch.float64)
    if rows is not None and given:
        try:
            fits = torch.broadcast_shapes(when.shape, rows) == rows
        except RuntimeError:
            fits = False
        if not fits:
            raise ShapeError(
                f"time: expected a number or a shape broadcastable to {tuple(rows)} (one per query row), got {tuple(when.shape)}; "
                "for one time per head give (heads, 1)"
            )
    if when.device.type == "cpu" and not torch.compiler.is_compiling() and when.numel():
        low, high = float(when.detach().min()), float(when.detach().max())
        if not (low >= 0 and math.isfinite(high)):
            raise GeneratorError(
                f"time: expected 0 ≤ time < inf, got {low if not low >= 0 else high:g}; the flow runs forward only"
            )
    return when


def _choose(generator: Generator, time: Tensor, clock: Clock) -> Method:
    hops = time.detach() * generator.rate_bound()
    longest = float(hops.max()) if hops.numel() else 0.0
    return choose_method(
        clock,
        longest,
        _TOL,
        num_tokens=generator.num_states,
        is_causal=generator.is_causal,
        per_row=per_row(time),
    )
