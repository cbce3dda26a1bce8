"""What every function of a matrix starts with."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.checks import check_shape
from liegroup_attn.errors import ShapeError


def square(name: str, matrix: Tensor) -> Tensor:
    """A tensor (..., N, N), checked, in float32 at least: half precision would round every product."""
    check_shape(name, matrix, least_rank=2, remedy="give square matrices (..., N, N)")
    if matrix.size(-2) != matrix.size(-1):
        raise ShapeError(
            f"{name}: expected square matrices (..., N, N), got shape {tuple(matrix.shape)}; drop the extra rows or columns"
        )
    return matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix


def squares(left: tuple[str, Tensor], right: tuple[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Two tensors of square matrices of one size, broadcast to one batch, in one dtype."""
    one, other = square(*left), square(*right)
    if one.size(-1) != other.size(-1):
        raise ShapeError(
            f"{left[0]}, {right[0]}: expected matrices of one size, got {tuple(one.shape)} and {tuple(other.shape)}; "
            "use matrices on the same states"
        )
    dtype = torch.promote_types(one.dtype, other.dtype)
    try:
        pair = torch.broadcast_tensors(one.to(dtype), other.to(dtype))
    except RuntimeError:
        raise ShapeError(
            f"{left[0]}, {right[0]}: expected batches that broadcast, got {tuple(one.shape)} and {tuple(other.shape)}; "
            "add axes of size 1"
        ) from None
    return pair[0], pair[1]


def eye_like(matrix: Tensor) -> Tensor:
    """I, (N, N), with the dtype and device of a (..., N, N)."""
    return torch.eye(matrix.size(-1), dtype=matrix.dtype, device=matrix.device)
