"""Rotations of feature pairs: what RoPE and its relatives do once the angles are known."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from liegroup_attn.errors import ShapeError
from liegroup_attn.positional.base import RotationEncoding

__all__ = ["LAYOUTS", "PairRotation", "convert_layout", "turn_pairs"]

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


def cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of angles, made once for all batches and heads.

    The compiler would fuse ``cos`` into the rotation and take it anew for every head; ``polar`` it calls as it is.
    """
    if _compiles_for_cpu(angles):
        cos, sin = torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).unbind(-1)
        return cos, sin
    return angles.cos(), angles.sin()


def convert_layout(
    features: Tensor, *, head_width: int, source: str, target: str, rotary_width: int | None = None
) -> Tensor:
    """Reorder what makes queries or keys, so that a checkpoint of one layout gives the same scores under the other.

    Args:
        features: a projection's weight (H·D, C) or bias (H·D,).
        head_width: D.
        source: layout it was trained with.
        target: layout it will be used with.
        rotary_width: how many of a head's features turn; default all.

    Returns:
        The shape of ``features``, rows permuted within each head.

    Raises:
        ShapeError: rows that are not whole heads, or an odd or too large ``rotary_width``.
        ValueError: unknown layout.

    Example:
        >>> convert_layout(torch.arange(4), head_width=4, source="interleaved", target="half_split").tolist()
        [0, 2, 1, 3]
    """
    check_layout(source, "source")
    check_layout(target, "target")
    check_pairs(head_width)
    width = check_rotary_width(rotary_width, head_width)
    if features.dim() < 1 or features.size(0) % head_width:
        raise ShapeError(
            f"features: expected a multiple of {head_width} rows, got shape {tuple(features.shape)}; match head_width"
        )
    if source == target:
        return features.clone()
    order = torch.arange(width, device=features.device)
    shape = (2, width // 2) if source == "half_split" else (width // 2, 2)
    order = torch.cat([order.view(shape).mT.flatten(), torch.arange(width, head_width, device=features.device)])
    return features.unflatten(0, (-1, head_width))[:, order].flatten(0, 1)


def check_layout(layout: str, name: str = "layout") -> None:
    """Raise ValueError at an unknown layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"{name}: expected one of {LAYOUTS}, got {layout!r}; it must match the checkpoint's")


def check_rotary_width(rotary_width: int | None, head_width: int) -> int:
    """How many features turn; ShapeError unless even and from 2 to ``head_width``."""
    width = head_width if rotary_width is None else rotary_width
    if not isinstance(width, int) or width < 2 or width % 2 or width > head_width:
        raise ShapeError(
            f"rotary_width: expected an even number ≤ head_width = {head_width}, got {width}; rotations act on pairs"
        )
    return width


def check_pairs(head_width: int) -> None:
    """Raise ShapeError unless a head's features form pairs."""
    if head_width < 2 or head_width % 2:
        raise ShapeError(
            f"head_width: expected an even number, got {head_width}; rotations act on pairs, choose another number of heads"
        )


def check_base(base: float) -> None:
    """Raise ValueError unless frequencies base^(−i) are finite."""
    if not 0 < base < math.inf:
        raise ValueError(f"base: expected a number > 0, got {base}; RoPE's is 10000")


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
        check_pairs(head_width)
        check_layout(layout)
        super().__init__(head_width, num_heads, axes)
        self.layout = layout

    @abstractmethod
    def angles(self, coordinates: Tensor, x: Tensor) -> Tensor:
        """Angles at coordinates (..., N, P): (..., N, D/2), or (..., H, N, D/2) for the heads of x."""

    def act(self, x: Tensor, coordinates: Tensor) -> Tensor:  # noqa: D102
        return self.turn(x, *self.cos_sin(coordinates, x))

    def cos_sin(self, coordinates: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles; overridden where an amplitude multiplies both."""
        return cos_sin(self.angles(coordinates, x))

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn the pairs of x; overridden where some features pass."""
        return turn_pairs(x, cos, sin, self.layout)

    def act_both(self, query: Tensor, key: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        one = query  # of the heads whose angles are made
        if self.num_heads is not None:
            if coordinates.dim() > 2 and coordinates.size(-3) > 1:  # query heads that differ in their positions
                return super().act_both(query, key, coordinates)
            one = key[..., : self.num_heads, :, :]
        cos, sin = self.cos_sin(coordinates, one.to(coordinates.dtype))

        def turned(x: Tensor) -> Tensor:
            groups = 1 if self.num_heads is None else x.size(-3) // self.num_heads
            c, s = (t if groups == 1 else t.repeat_interleave(groups, -3) for t in (cos, sin))
            return self.turn(x.to(c.dtype), c, s).to(x.dtype)

        return turned(query), turned(key)
