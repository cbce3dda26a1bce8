"""Rotations of feature pairs: what RoPE and its relatives do once the angles are known."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from liegroup_attn.errors import ShapeError
from liegroup_attn.positional.base import RotationEncoding

__all__ = ["LAYOUTS", "PairRotation", "turn_pairs"]

LAYOUTS = ("half_split", "interleaved")


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Turn every pair of features by its angle.

    Args:
        x: (..., N, D).
        cos: broadcastable to (..., N, D/2).
        sin: as ``cos``.
        layout: "half_split" pairs i with i + D/2, "interleaved" 2i with 2i + 1.

    Returns:
        (..., N, D).
    """
    if layout == "half_split":
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    if _are_complex(x, cos):
        # Compiled code cannot ask where x begins in memory: a copy begins at an even address.
        copied = x.clone(memory_format=torch.contiguous_format) if torch.compiler.is_compiling() else x
        numbers = torch.view_as_complex(copied.unflatten(-1, (-1, 2)))
        return torch.view_as_real(numbers * torch.complex(cos, sin)).flatten(-2)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def _are_complex(x: Tensor, cos: Tensor) -> bool:
    """Whether interleaved pairs can be read as complex numbers, whose one product is several times as fast.

    On CPU that holds of compiled code, too: the compiler calls the eager product, since it vectorizes no pairs of
    neighbours. Exported programs keep the plain formula, which other runtimes know. Memory must hold pairs at even
    addresses.
    """
    if x.dtype != cos.dtype or x.dtype not in (torch.float32, torch.float64):
        return False
    if torch.compiler.is_compiling():
        return _compiles_for_cpu(x)
    return x.stride(-1) == 1 and not any(stride % 2 for stride in (*x.stride()[:-1], x.storage_offset()))


def _compiles_for_cpu(x: Tensor) -> bool:
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and x.device.type == "cpu"


def _cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of angles, made once for all batches and heads.

    The compiler would fuse ``cos`` into the rotation and take it anew for every head; ``polar`` it calls as it is.
    """
    if _compiles_for_cpu(angles):
        cos, sin = torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).unbind(-1)
        return cos, sin
    return angles.cos(), angles.sin()


class PairRotation(RotationEncoding):
    """Rotations in D/2 fixed planes, one for each feature pair; a subclass says by which angles.

    Args:
        head_width: D, even.
        layout: which features form a pair: "half_split" pairs i with i + D/2, "interleaved" 2i with 2i + 1. Both are
            in use; checkpoints do not say which.
        num_heads: number of heads with angles of their own; None where heads share them.
        axes: P, numbers a position has.

    Raises:
        ShapeError: odd width.
        ValueError: unknown layout.
    """

    def __init__(self, head_width: int, *, layout: str, num_heads: int | None = None, axes: int = 1) -> None:
        if head_width < 2 or head_width % 2:
            raise ShapeError(
                f"head_width: expected an even number, got {head_width}; rotations act on pairs, choose another number of heads"
            )
        if layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}; it must match the checkpoint's")
        super().__init__(head_width, num_heads, axes)
        self.layout = layout

    @abstractmethod
    def angles(self, coordinates: Tensor, x: Tensor) -> Tensor:
        """Angles at coordinates (..., N, P): (..., N, D/2), or (..., H, N, D/2) for the heads of x."""

    def act(self, x: Tensor, coordinates: Tensor) -> Tensor:  # noqa: D102
        return turn_pairs(x, *_cos_sin(self.angles(coordinates, x)), self.layout)

    def act_both(self, query: Tensor, key: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        if self.num_heads is not None:  # other angles for query heads than for fewer key heads
            return super().act_both(query, key, coordinates)
        cos, sin = _cos_sin(self.angles(coordinates, query))
        first, second = (turn_pairs(x.to(cos.dtype), cos, sin, self.layout).to(x.dtype) for x in (query, key))
        return first, second
