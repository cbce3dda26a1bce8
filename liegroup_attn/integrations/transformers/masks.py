"""Masks as ``sdpa`` gets them, each with what is known about it: closed, causal."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask

from liegroup_attn.errors import MaskError
from liegroup_attn.masks import check_closed

__all__ = ["closed_mask", "is_causal_mask", "lie_mask"]

# Mask functions of transformers.masking_utils that are transitively closed, by the function that makes them.
_CLOSED = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "padding_mask_function",
    "packed_sequence_mask_function",
    "chunked_overlay",
}
_WINDOWS = {"sliding_window_overlay": 0, "sliding_window_bidirectional_overlay": 1}


class _Known(NamedTuple):
    closed: bool
    causal: bool
    version: int | None = None  # of the mask it is known of; None where torch counts none


def lie_mask(
    *, mask_function: Callable[..., Any] = causal_mask_function, q_length: int, q_offset: Any = 0, **kwargs: Any
) -> Tensor | None:
    """Mask function of the implementation "lie": ``sdpa``'s mask, and on it what its making tells about it.

    Looking whether a mask is closed takes N³ steps. Causal masks, padding, packed sequences and blocks are closed, and
    so is what several of them allow; a sliding window is while it hides nothing.

    Args:
        mask_function: which (query, key) take part.
        q_length: number of queries.
        q_offset: number of tokens before the first query.
        **kwargs: the others of ``sdpa_mask``.

    Returns:
        (B, 1, N, P + N), True = takes part, or None: causal, or everything, as the module says.
    """
    mask = sdpa_mask(mask_function=mask_function, q_length=q_length, q_offset=q_offset, **kwargs)
    if mask is not None and not torch.compiler.is_compiling():
        seen = q_offset + q_length if isinstance(q_offset, int) else None
        mask.lie_known = _known(mask_function, seen)._replace(version=_version(mask))
    return mask


def _version(mask: Tensor) -> int | None:
    return None if mask.is_inference() else mask._version


def _known_of(mask: Tensor | None) -> _Known | None:
    """What ``lie_mask`` knew of a mask that it made, unless its values have been changed since."""
    known: _Known | None = getattr(mask, "lie_known", None)
    return known if mask is not None and known is not None and known.version == _version(mask) else None


def _known(function: Callable[..., Any], seen: int | None) -> _Known:
    """What is known of a mask function over the first ``seen`` tokens; False = not known."""
    if not inspect.isfunction(function):
        return _Known(False, False)
    name = function.__qualname__.partition(".")[0] if function.__module__ == "transformers.masking_utils" else ""
    held = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if name == "and_masks":
        parts = [_known(part, seen) for part in held["mask_functions"].cell_contents]
        return _Known(all(part.closed for part in parts), any(part.causal for part in parts))
    if name == "remap_positions_for_packed_sequence":  # positions of one sequence: closed as before; order is looked at
        return _Known(_known(held["mask_function"].cell_contents, seen).closed, False)
    if name in _WINDOWS:
        reach = held["sliding_window"].cell_contents + _WINDOWS[name]
        return _Known(seen is not None and seen <= reach, False)
    return _Known(name in _CLOSED, name == "causal_mask_function")


def closed_mask(mask: Tensor | None, module: nn.Module) -> None:
    """Raise MaskError unless a mask is known to be closed, or is found to be: what a call finds is kept nowhere.

    Args:
        mask: broadcastable to (B, H, N, P + N), bool (True = takes part) or float.
        module: that uses it, for the message.
    """
    made = _known_of(mask)
    if mask is None or (made is not None and made.closed) or torch.compiler.is_compiling():
        return
    where = f"{type(module).__name__} of layer {getattr(module, 'layer_idx', '?')}"
    remedy = 'convert with exclude="…" for layers with a local mask, or with allow_open_mask=True'
    if mask.size(-2) not in (1, mask.size(-1)):
        raise MaskError(
            f"attention_mask: expected one of causality, padding and blocks while tokens are decoded, got a local or unknown one in "
            f"{where}, through which exp(tQ) may reach tokens that it hides; {remedy}"
        )
    if mask.size(-2) == 1 and mask.size(-1) > 1 and made is not None:
        raise MaskError(
            f"attention_mask: expected a transitively closed mask, got a sliding window shorter than the text in {where}, through "
            f"which exp(tQ) reaches tokens that it hides; {remedy}"
        )
    try:
        check_closed(mask)
    except MaskError as error:
        raise MaskError(f"{error}; in {where}: {remedy}") from None


def is_causal_mask(mask: Tensor | None, new: int, causal_without: bool, *, look: bool = True) -> bool:
    """Whether no query sees a later token.

    Args:
        mask: broadcastable to (B, H, N, P + N), or None.
        new: N.
        causal_without: whether None stands for a causal mask.
        look: at the values of a mask of which nothing is known, for which a GPU has to be waited.
    """
    if mask is None:
        return causal_without or new == 1
    if new == 1:
        return True
    made = _known_of(mask)
    if not look or (made is not None and made.causal):
        return made is not None and made.causal
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    ahead = torch.ones(new, mask.size(-1), dtype=torch.bool, device=mask.device).triu(mask.size(-1) - new + 1)
    return not bool((allowed & ahead).any())
