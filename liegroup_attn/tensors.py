"""What may be asked of a tensor: its values, a derivative by it, the dtype it is computed in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "at_least_float32",
    "autocast_dtype",
    "differentiated",
    "fits",
    "of_heads",
    "of_items",
    "pick",
    "product",
    "split_by",
    "values_visible",
    "without_autocast",
]


def values_visible(tensor: Tensor) -> bool:
    """Whether values may be looked at: a GPU would have to be waited for, torch.compile breaks its graph, vmap refuses."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or tensor.numel() == 0:
        return False
    try:
        tensor.detach()[(0,) * tensor.dim()].item()
    except RuntimeError:  # under vmap a tensor stands for many
        return False
    return True


def differentiated(tensor: Tensor) -> bool:
    """Whether a derivative by this tensor is wanted, in reverse or in forward mode."""
    if tensor.requires_grad or torch.compiler.is_compiling():
        return tensor.requires_grad
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def pick(reverse: Any, forward: Any) -> Any:
    """A Function without its forward-mode rule under torch.compile, which refuses it."""
    return reverse if torch.compiler.is_compiling() else forward


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Computes in the dtypes that tensors have, whatever autocast says; meta tensors know of no autocast."""
    device = tensor.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast would make of a tensor's products, None where it is off."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def fits(shape: torch.Size, into: torch.Size) -> bool:
    """Whether a shape broadcasts to another without enlarging it."""
    try:
        return shape == into or torch.broadcast_shapes(shape, into) == into
    except RuntimeError:
        return False


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision would round every hop."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def product(matrix: Tensor, value: Tensor) -> Tensor:
    """matrix · value in the wider of both dtypes, in the value's."""
    dtype = torch.promote_types(matrix.dtype, value.dtype)
    with without_autocast(value):
        return (matrix.to(dtype) @ value.to(dtype)).to(value.dtype)


def of_heads(x: Tensor, num_heads: int) -> Tensor:
    """Keys or values (..., H_kv, N, D) with one head for every query head: (..., H, N, D)."""
    groups = x.size(-3)
    return x if groups == num_heads else x.repeat_interleave(num_heads // groups, -3)


def of_items(tensors: tuple[Tensor, ...], items: int, rank: int) -> tuple[Tensor, ...]:
    """The first items of tensors that have a batch in front of ``rank`` dimensions; others as they are."""
    return tuple(x[:items] if x.dim() > rank and x.size(0) > 1 else x for x in tensors)


def split_by(counts: Iterable[int], items: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """So many each, one part after the other."""
    start = 0
    for count in counts:
        yield items[start : start + count]
        start += count
