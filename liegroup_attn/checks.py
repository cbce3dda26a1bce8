"""Checks at the public door."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from liegroup_attn.errors import DtypeError, GeneratorError, ShapeError
from liegroup_attn.tensors import autocast_dtype, fits, of_heads, values_visible

__all__ = [
    "check_dropout",
    "check_finite",
    "check_jump_rates",
    "check_qkv",
    "check_scale",
    "check_scores",
    "check_shape",
    "check_time",
]


def check_shape(name: str, tensor: Tensor, *, least_rank: int, remedy: str) -> None:
    """Raise unless ``tensor`` is a floating-point tensor with at least ``least_rank`` dimensions.

    Args:
        name: the argument's name, for the message.
        tensor: any object; everything but a tensor is refused.
        least_rank: smallest number of dimensions.
        remedy: what the caller should do, as an imperative.

    Raises:
        DtypeError: not a floating-point tensor.
        ShapeError: too few dimensions.

    Example:
        >>> check_shape("value", torch.zeros(3), least_rank=2, remedy="add a token axis")
        Traceback (most recent call last):
        ...
        liegroup_attn.errors.ShapeError: value: expected at least 2 dimensions, got shape (3,); add a token axis
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise DtypeError(f"{name}: expected a floating-point tensor, got {got}; convert it with .to(torch.float32)")
    if tensor.dim() < least_rank:
        raise ShapeError(
            f"{name}: expected at least {least_rank} dimensions, got shape {tuple(tensor.shape)}; {remedy}"
        )


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise GeneratorError on NaN or inf, where values are visible."""
    # NaN and inf survive |·| and max, which read the tensor once; isfinite takes ten times as long.
    if values_visible(tensor) and not math.isfinite(float(tensor.detach().abs().amax())):
        raise GeneratorError(
            f"{name}: expected finite entries, got NaN or inf; look for a diverged layer (lower the learning rate, "
            "clip gradients) or an overflow in half precision"
        )


def check_scores(query: Tensor, key: Tensor, scale: float) -> None:
    """Raise GeneratorError unless scale · q kᵀ is finite: one look at each, where values are visible.

    Args:
        query: (..., N, E).
        key: (..., M, E).
        scale: of the scores.

    Raises:
        GeneratorError: NaN or inf in query or key, or products beyond the range of (at least) float32.
    """
    if not (values_visible(query) and values_visible(key)):
        return
    largest = [float(x.detach().abs().amax()) for x in (query, key)]
    for name, tensor, size in zip(("query", "key"), (query, key), largest, strict=True):
        if not math.isfinite(size):
            check_finite(name, tensor)
    most = torch.finfo(torch.promote_types(query.dtype, torch.float32)).max
    if abs(scale) * largest[0] * largest[1] * query.size(-1) < most:  # a bound on every score
        return
    scores = (scale * query.detach().double()) @ key.detach().double().mT
    if not float(scores.abs().amax()) < most:
        raise GeneratorError(
            f"query, key: expected scores scale · q·k under {most:.0e}, got larger ones (query up to {largest[0]:g}, key up to "
            f"{largest[1]:g}); normalize both, or choose a smaller scale"
        )


def check_dropout(dropout_p: float) -> None:
    """Raise GeneratorError unless 0 ≤ dropout_p < 1."""
    if not 0 <= dropout_p < 1:
        raise GeneratorError(f"dropout_p: expected 0 ≤ dropout_p < 1, got {dropout_p}; choose a probability")


def check_scale(scale: float | None) -> None:
    """Raise GeneratorError unless the scale is None or finite."""
    if scale is not None and not math.isfinite(scale):
        raise GeneratorError(f"scale: expected a finite number, got {scale}; None is 1/√width")


def check_time(time: Tensor | float, batch: torch.Size, num_tokens: int) -> Tensor:
    """Time as a tensor that broadcasts with (..., N); a number stays 0-dimensional, on the CPU.

    Args:
        time: a number, or a tensor whose last size is 1 or N; dimensions before those of the batch are several times.
        batch: of the values, or of the generator.
        num_tokens: N.

    Returns:
        The time.

    Raises:
        DtypeError: neither a number nor a real tensor.
        ShapeError: does not broadcast.
        GeneratorError: negative, infinite or NaN, where values are visible.
    """
    if isinstance(time, Tensor):
        when = time
    elif isinstance(time, numbers.Real):
        when = torch.tensor(float(time), dtype=torch.float64)
    else:
        raise DtypeError(f"time: expected a number or a tensor, got {type(time).__name__}; convert it with float")
    if when.is_complex():
        raise DtypeError(f"time: expected real numbers, got {when.dtype}; take the real part")
    own = when.shape[max(0, when.dim() - len(batch) - 1) :]
    if not fits(own, torch.Size([*batch, num_tokens])):
        raise ShapeError(
            f"time: expected a number or a shape broadcastable to {(*batch, num_tokens)} (one per query row), "
            f"got {tuple(when.shape)}; for one time per head give (heads, 1), for several times put them in front"
        )
    if values_visible(when):
        low, high = float(when.detach().min()), float(when.detach().max())
        if not (low >= 0 and math.isfinite(high)):
            got = low if not low >= 0 else high
            raise GeneratorError(f"time: expected 0 ≤ time < inf, got {got:g}; the flow runs forward only")
    return when


def check_jump_rates(jump_rates: Tensor | float | None, rows: torch.Size, like: Tensor, look: bool) -> Tensor | None:
    """ρ as a tensor broadcastable to ``rows`` = (..., N), with at least one dimension; None stays None.

    Raises:
        DtypeError: not floating point.
        ShapeError: does not broadcast.
        GeneratorError: outside [0, 1], where values are visible.
    """
    if jump_rates is None:
        return None
    rates = (
        jump_rates if isinstance(jump_rates, Tensor) else torch.tensor(jump_rates, dtype=like.dtype, device=like.device)
    )
    check_shape("jump_rates", rates, least_rank=0, remedy="give ρ per token")
    if not fits(rates.shape, rows):
        raise ShapeError(
            f"jump_rates: expected a shape broadcastable to {tuple(rows)}, got {tuple(rates.shape)}; "
            "give one rate per token, or (heads, 1) for one per head"
        )
    if look and values_visible(rates):
        low, high = float(rates.detach().min()), float(rates.detach().max())
        if not (low >= 0 and high <= 1):
            raise GeneratorError(
                f"jump_rates: expected ρ in [0, 1], got [{low:g}, {high:g}]; pass it through a sigmoid and let time "
                "carry the scale"
            )
    return rates if rates.dim() else rates.unsqueeze(0)


def check_qkv(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Check ranks, dtypes and sizes, no values; give every query head a key and a value head.

    Under autocast mixed dtypes become autocast's.

    Args:
        query: (..., H, N, E).
        key: (..., H or fewer, M, E).
        value: (..., H or fewer, M, D).
        enable_gqa: let groups of query heads share a key and value head.

    Returns:
        The three with equal batch sizes and heads.

    Raises:
        ShapeError: ranks, tokens, widths, heads or batches that do not fit; no token.
        DtypeError: not floating point, or mixed.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_shape(name, tensor, least_rank=2, remedy="give (..., heads, tokens, width)")
        if tensor.size(-2) == 0:
            raise ShapeError(
                f"{name}: expected at least 1 token, got shape {tuple(tensor.shape)}; drop empty sequences from the batch"
            )
    if not query.dtype == key.dtype == value.dtype:
        if (cast := autocast_dtype(query)) is None:
            raise DtypeError(
                f"query, key, value: expected one dtype, got {query.dtype}, {key.dtype}, {value.dtype}; convert them, e.g. key.to(query.dtype)"
            )
        query, key, value = (x.to(cast) for x in (query, key, value))
    if query.size(-1) == 0:
        raise ShapeError(f"query: expected a width of at least 1, got shape {tuple(query.shape)}; scores need features")
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
        key, value = of_heads(key, heads), of_heads(value, heads)
    try:
        batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    except RuntimeError:
        raise ShapeError(
            f"query, key, value: expected equal batch and head sizes, got {tuple(query.shape)}, {tuple(key.shape)}, "
            f"{tuple(value.shape)}; set enable_gqa=True if key and value have fewer heads"
        ) from None
    query, key, value = (x.expand(*batch, *x.shape[-2:]) for x in (query, key, value))
    return query, key, value
