"""Masks as tensors: read, given to kernels, looked at for leaks."""

from __future__ import annotations

from functools import reduce
from operator import and_

import torch
from torch import Tensor

from liegroup_attn.checks import check_finite
from liegroup_attn.errors import DtypeError, MaskError
from liegroup_attn.tensors import autocast_dtype
from liegroup_attn.visible import Allowed, Visible, Window

__all__ = ["biased_mask", "check_closed", "read_mask", "taking_part"]


def read_mask(attn_mask: Tensor, dtype: torch.dtype, first: int = 0) -> tuple[Visible, Tensor | None]:
    """Check a mask at the public door: what it shows, and of a float mask what it adds to the scores, finite, or None.

    Args:
        attn_mask: broadcastable to (..., N, M); bool (True = takes part) or float (added to the scores; −inf, or
            anything below half the dtype's least number, hides).
        dtype: of the scores; a float mask must have it.
        first: the token that its first row is of.

    Raises:
        MaskError: fewer than 2 dimensions.
        DtypeError: neither bool nor the scores' dtype.
        GeneratorError: NaN or +inf.
    """
    if not isinstance(attn_mask, Tensor):
        raise DtypeError(
            f"attn_mask: expected a tensor, got {type(attn_mask).__name__}; convert it with torch.as_tensor, or give an object such as Causal()"
        )
    if attn_mask.is_floating_point() and autocast_dtype(attn_mask) is not None:
        attn_mask = attn_mask.to(dtype)
    if attn_mask.dtype != torch.bool and attn_mask.dtype != dtype:
        raise DtypeError(
            f"attn_mask: expected torch.bool (True = takes part) or {dtype} as the query, got {attn_mask.dtype}; convert it"
        )
    if attn_mask.dim() < 2:
        raise MaskError(
            f"attn_mask: expected at least 2 dimensions, got shape {tuple(attn_mask.shape)}; index it as (batch, 1, query, "
            "key) or (query, key)"
        )
    if attn_mask.dtype == torch.bool:
        return Allowed(attn_mask, first=first), None
    allowed = taking_part(attn_mask)
    bias = attn_mask.masked_fill(~allowed, 0.0)
    check_finite("attn_mask (apart from what it hides)", bias)
    return Allowed(allowed, bias.detach(), first=first), bias


def biased_mask(
    score_bias: Tensor | None, attn_mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor
) -> Tensor | None:
    """One mask for a kernel that takes one: bias, mask (bool or float) and, beside one of them, the causal mask.

    Args:
        score_bias: broadcastable to (..., N, M), or None.
        attn_mask: the same, bool (True = takes part) or float, or None.
        is_causal: lower-triangular mask.
        query: (..., N, E), whose dtype the kernel wants.
        key: (..., M, E).

    Returns:
        Float, −inf where hidden; bool without a bias if ``attn_mask`` is; None without either: the kernel has a causal mask.
    """
    sizes = query.size(-2), key.size(-2)
    if attn_mask is not None and attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise DtypeError(
            f"attn_mask: expected torch.bool (True = takes part) or {query.dtype} as the query, got {attn_mask.dtype}; convert it"
        )
    if score_bias is None:
        return _causal_too(attn_mask, *sizes) if is_causal and attn_mask is not None else attn_mask
    bias = score_bias
    if query.dtype == torch.float16:  # the one dtype whose range a bias leaves; ±inf would be NaN or an empty row
        limit = torch.finfo(torch.float16).max / 2
        bias = bias.clamp(-limit, limit)
    bias = bias.to(query.dtype)
    if is_causal:  # of the tokens, not of the bias, which may have one row or column for all
        bias = _causal_too(bias, *sizes)
    if attn_mask is None:
        return bias
    if attn_mask.dtype == torch.bool:
        return torch.where(attn_mask, bias, -torch.inf)
    return bias + attn_mask.to(query.dtype)


def _causal_too(attn_mask: Tensor, rows: int, columns: int) -> Tensor:
    """A mask, bool or float, that also hides what comes later, (..., rows, columns)."""
    ahead = torch.ones(rows, columns, dtype=torch.bool, device=attn_mask.device).triu(1)
    return attn_mask & ~ahead if attn_mask.dtype == torch.bool else torch.where(ahead, -torch.inf, attn_mask)


def taking_part(attn_mask: Tensor) -> Tensor:
    """Which targets take part, bool; others hide by a large negative number, of which softmax makes 0, too."""
    return attn_mask if attn_mask.dtype == torch.bool else ~(attn_mask <= torch.finfo(attn_mask.dtype).min / 2)


_FAR = 5000.0  # below the largest score: nothing is left of such a weight in any dtype, as with masks of −1e4 or −1e9


def check_closed(visible: Visible | Tensor, num_tokens: int | None = None) -> None:
    """Raise MaskError unless what is visible, or a mask (True = takes part, or float), is transitively closed.

    exp(tQ) reaches every token that can be reached by several allowed hops, so a mask must be transitively closed,
    and a token that others see and that sees others must see itself. N³ work, unless it is known; torch.compile does not look.

    Args:
        visible: what is looked at.
        num_tokens: N; default the mask's.

    Raises:
        MaskError: not closed.

    Example:
        >>> check_closed(torch.ones(3, 3, dtype=torch.bool).tril().triu(-1))
        Traceback (most recent call last):
        ...
        liegroup_attn.errors.MaskError: attn_mask: expected a transitively closed mask, got one through which token 2 \
reaches token 0 by way of token 1; close it, or pass allow_open_mask=True to let exp(tQ) fill it
    """
    if isinstance(visible, Tensor):
        mask, shown = visible, taking_part(visible)
        visible = Allowed(shown, None if mask.dtype == torch.bool else mask.detach().masked_fill(~shown, 0.0))
    if visible.closed or torch.compiler.is_compiling():
        return
    # What lies beyond a window is meant, and is not charged to a mask beside it.
    visible = reduce(and_, [part for part in visible.parts if not isinstance(part, Window)])
    n = num_tokens or visible.tensors[0].size(-1)
    allowed = visible.rows(0, n, n, visible.tensors, visible.tensors[0].device)
    if allowed is None:
        return
    no_target = ~allowed.any(-1, keepdim=True)
    for part in visible.parts:
        if isinstance(part, Allowed) and part.reached is not None and part.reached.numel():
            # Without those that a bias puts out of reach.
            most = part.reached.masked_fill(~allowed, -torch.inf).amax(-1, keepdim=True)
            allowed = allowed & (part.reached > most - _FAR)
    _check_closed(allowed, no_target)


def _check_closed(allowed: Tensor, no_target: Tensor) -> None:
    """Raise unless several allowed hops lead only where one allowed hop leads."""
    n = max(allowed.shape[-2:])
    allowed = allowed.expand(*allowed.shape[:-2], n, n)
    eye = torch.eye(n, dtype=torch.bool, device=allowed.device)
    onward = allowed & ~eye
    seen = onward.any(-2)  # tokens that some other token sees
    self_hidden = seen & ~allowed.diagonal(dim1=-2, dim2=-1) & ~no_target.squeeze(-1)
    if bool(self_hidden.any()):
        token = int(self_hidden.nonzero()[0, -1])
        raise MaskError(
            f"attn_mask: expected every token that is seen to see itself, got token {token} hidden from itself; "
            "set the mask's diagonal to True, or pass allow_open_mask=True"
        )
    hops = onward.to(torch.float32)
    leak = (hops @ hops > 0) & ~allowed & ~eye
    if bool(leak.any()):
        where = leak.nonzero()[0]
        source, target = int(where[-2]), int(where[-1])
        batch = tuple(where[:-2].tolist())
        via = int((onward[batch][source] & onward[batch][:, target]).nonzero()[0, 0])
        raise MaskError(
            f"attn_mask: expected a transitively closed mask, got one through which token {source} reaches token "
            f"{target} by way of token {via}; close it, or pass allow_open_mask=True to let exp(tQ) fill it"
        )
