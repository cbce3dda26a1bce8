"""Who sees whom: masks through which exp(tQ) does not leak."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from liegroup_attn.checks import check_finite
from liegroup_attn.errors import DtypeError, MaskError
from liegroup_attn.tensors import autocast_dtype, fits

__all__ = ["Mask", "biased_mask", "check_bias", "check_closed", "prepare_mask", "taking_part"]


class Mask(NamedTuple):
    """A mask made safe for softmax: rows without a target are opened, and named so that they keep their value."""

    attn_mask: Tensor | None  # bool or float, broadcastable to (..., N, N); no row is empty
    no_target: Tensor | None  # (..., N or 1, 1) bool: rows that had no allowed target

    def masked(self) -> Tensor | None:
        """Bool, True = takes no part, as given (a row without a target is all True); None where all take part."""
        if self.attn_mask is None or self.no_target is None:
            return None
        hidden = ~self.attn_mask if self.attn_mask.dtype == torch.bool else self.attn_mask == -torch.inf
        return hidden | self.no_target


def prepare_mask(
    attn_mask: Tensor | None, is_causal: bool, scores_shape: torch.Size, dtype: torch.dtype, allow_open_mask: bool
) -> Mask:
    """Check a mask at the public door and make it safe.

    exp(tQ) reaches every token that can be reached by several allowed hops, so a mask must be transitively closed,
    and a token that others see and that sees others must see itself.

    Args:
        attn_mask: broadcastable to (..., N, N); bool (True = takes part) or float (added to the scores; −inf, or
            anything below half the dtype's least number, hides).
        is_causal: lower-triangular mask, beside ``attn_mask`` or alone.
        scores_shape: (..., N, N).
        dtype: of the scores; a float mask must have it.
        allow_open_mask: skip the closure check.

    Returns:
        The safe mask.

    Raises:
        MaskError: wrong shape, NaN or +inf, or not transitively closed.
        DtypeError: neither bool nor the scores' dtype.

    Example:
        >>> window = torch.ones(3, 3, dtype=torch.bool).tril().triu(-1)
        >>> prepare_mask(window, False, torch.Size([3, 3]), torch.float32, False)
        Traceback (most recent call last):
        ...
        liegroup_attn.errors.MaskError: attn_mask: expected a transitively closed mask, got one through which token 2 \
reaches token 0 by way of token 1; close it, or pass allow_open_mask=True to let exp(tQ) fill it
    """
    if attn_mask is None:
        return Mask(None, None)
    if not isinstance(attn_mask, Tensor):
        raise DtypeError(
            f"attn_mask: expected a tensor, got {type(attn_mask).__name__}; convert it with torch.as_tensor"
        )
    if attn_mask.is_floating_point() and autocast_dtype(attn_mask) is not None:
        attn_mask = attn_mask.to(dtype)
    if attn_mask.dtype != torch.bool and attn_mask.dtype != dtype:
        raise DtypeError(
            f"attn_mask: expected torch.bool (True = takes part) or {dtype} as the query, got {attn_mask.dtype}; convert it"
        )
    if attn_mask.dim() < 2 or not fits(attn_mask.shape, scores_shape):
        raise MaskError(
            f"attn_mask: expected a shape broadcastable to {tuple(scores_shape)} with at least 2 dimensions, "
            f"got {tuple(attn_mask.shape)}; index it as (batch, 1, query, key) or (query, key)"
        )
    one_row = attn_mask.size(-2) == 1  # key padding: closed, and so is what two closed masks allow
    if is_causal:
        attn_mask = causal_too(attn_mask, *scores_shape[-2:])
    allowed = taking_part(attn_mask)
    no_target = ~allowed.any(-1, keepdim=True)
    if attn_mask.dtype == torch.bool:
        safe = attn_mask | no_target
    else:
        check_finite("attn_mask (apart from what it hides)", attn_mask.detach().masked_fill(~allowed, 0.0))
        safe = attn_mask.masked_fill(~allowed, -torch.inf).masked_fill(no_target, 0.0)
    if not (allow_open_mask or one_row):
        check_closed(attn_mask)
    return Mask(safe, no_target)


def causal_too(attn_mask: Tensor, rows: int, columns: int) -> Tensor:
    """A mask, bool or float, that also hides what comes later, (..., rows, columns)."""
    ahead = torch.ones(rows, columns, dtype=torch.bool, device=attn_mask.device).triu(1)
    return attn_mask & ~ahead if attn_mask.dtype == torch.bool else torch.where(ahead, -torch.inf, attn_mask)


def check_bias(score_bias: Tensor, scores_shape: torch.Size) -> Tensor:
    """Check what is added to the scores.

    Args:
        score_bias: finite numbers, broadcastable to (..., N, M).
        scores_shape: (..., N, M).

    Returns:
        It.

    Raises:
        DtypeError: not a floating-point tensor.
        MaskError: another shape.
        GeneratorError: NaN or inf (looked at on CPU); a mask hides, a bias does not.
    """
    if not isinstance(score_bias, Tensor) or not score_bias.is_floating_point():
        got = score_bias.dtype if isinstance(score_bias, Tensor) else type(score_bias).__name__
        raise DtypeError(f"score_bias: expected a floating-point tensor, got {got}; what hides tokens is attn_mask")
    if score_bias.dim() < 2 or not fits(score_bias.shape, scores_shape):
        raise MaskError(
            f"score_bias: expected a shape broadcastable to {tuple(scores_shape)} with at least 2 dimensions, got "
            f"{tuple(score_bias.shape)}; one number per query and key"
        )
    check_finite("score_bias", score_bias)
    return score_bias


def biased_mask(
    score_bias: Tensor | None, attn_mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor
) -> Tensor | None:
    """One mask for a kernel that takes one: bias, mask and, beside one of them, the causal mask.

    Args:
        score_bias: broadcastable to (..., N, M), or None.
        attn_mask: broadcastable to it, bool (True = takes part) or float, or None.
        is_causal: lower-triangular mask.
        query: (..., N, E), whose dtype the kernel wants.
        key: (..., M, E).

    Returns:
        Float, −inf where hidden; bool without a bias if ``attn_mask`` is; None without either: the kernel has a causal mask.

    Raises:
        DtypeError: a mask that is neither bool nor float.

    Example:
        >>> biased_mask(torch.zeros(1, 1), None, True, torch.zeros(2, 4), torch.zeros(2, 4))
        tensor([[0., -inf],
                [0., 0.]])
    """
    sizes = query.size(-2), key.size(-2)
    if attn_mask is not None and attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise DtypeError(
            f"attn_mask: expected torch.bool (True = takes part) or {query.dtype} as the query, got {attn_mask.dtype}; convert it"
        )
    if score_bias is None:
        return causal_too(attn_mask, *sizes) if is_causal and attn_mask is not None else attn_mask
    bias = score_bias
    if query.dtype == torch.float16:  # the one dtype whose range a bias leaves; ±inf would be NaN or an empty row
        limit = torch.finfo(torch.float16).max / 2
        bias = bias.clamp(-limit, limit)
    bias = bias.to(query.dtype)
    if is_causal:  # of the tokens, not of the bias, which may have one row or column for all
        bias = causal_too(bias, *sizes)
    if attn_mask is None:
        return bias
    if attn_mask.dtype == torch.bool:
        return torch.where(attn_mask, bias, -torch.inf)
    return bias + attn_mask.to(query.dtype)


def check_closed(attn_mask: Tensor) -> None:
    """Raise MaskError unless a mask (True = takes part, or float) is transitively closed; torch.compile does not look."""
    if not torch.compiler.is_compiling():
        allowed = _reached(attn_mask)
        _check_closed(allowed, ~allowed.any(-1, keepdim=True))


def taking_part(attn_mask: Tensor) -> Tensor:
    """Which targets take part, bool; others hide by a large negative number, of which softmax makes 0, too."""
    return attn_mask if attn_mask.dtype == torch.bool else ~(attn_mask <= torch.finfo(attn_mask.dtype).min / 2)


_FAR = 5000.0  # below the largest score: nothing is left of such a weight in any dtype, as with masks of −1e4 or −1e9


def _reached(attn_mask: Tensor) -> Tensor:
    """Which targets a row can reach: those allowed, without those that a bias puts out of reach."""
    allowed = taking_part(attn_mask)
    if attn_mask.dtype == torch.bool or attn_mask.numel() == 0:
        return allowed
    bias = attn_mask.detach()
    return allowed & (bias > bias.masked_fill(~allowed, -torch.inf).amax(-1, keepdim=True) - _FAR)


def _check_closed(allowed: Tensor, no_target: Tensor) -> None:
    """Raise unless several allowed hops lead only where one allowed hop leads."""
    if allowed.size(-2) == 1:  # key padding: every row sees the same keys, hence closed
        return
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
