"""RoPE: position m acts on each feature pair by a rotation through mθ_i."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liegroup_attn.errors import DtypeError, ShapeError, check_shape, fits

__all__ = ["RotaryEncoding"]

_LAYOUTS = ("half_split", "interleaved")


class RotaryEncoding(nn.Module):
    """Rotary position encoding; scores of rotated queries and keys depend on positions through m − n only.

    Angles mθ_i, θ_i = base^(−2i/D), are made anew from integer positions in at least float32 on every call: nothing
    is cached or cast by ``.to(torch.bfloat16)``, which would merge 4096 positions into 769.

    Args:
        head_width: D, even.
        layout: which features form a pair: "half_split" pairs i with i + D/2, "interleaved" 2i with 2i + 1. Both are
            in use; checkpoints do not say which.
        base: of the frequencies.

    Raises:
        ShapeError: odd width.
        ValueError: unknown layout.

    Example:
        >>> rotary = RotaryEncoding(4, layout="half_split")
        >>> rotary(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([1]))
        tensor([[0.5403, 0.9999, 0.8415, 0.0100]])

    Source: [Su2021]_.
    """

    def __init__(self, head_width: int, *, layout: str, base: float = 10_000.0) -> None:
        super().__init__()
        if head_width < 2 or head_width % 2:
            raise ShapeError(
                f"head_width: expected an even number, got {head_width}; rotations act on pairs, choose another number of heads"
            )
        if layout not in _LAYOUTS:
            raise ValueError(f"layout: expected one of {_LAYOUTS}, got {layout!r}; it must match the checkpoint's")
        self.head_width = head_width
        self.layout = layout
        self.base = base

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.head_width}, layout={self.layout!r}, base={self.base:g}"

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rotate.

        Args:
            x: (..., N, D).
            positions: integers, broadcastable to (..., N); default 0 … N − 1.

        Returns:
            (..., N, D), dtype of ``x``.

        Raises:
            ShapeError: width other than D, or positions that do not fit.
            DtypeError: positions that are not integers.
        """
        check_shape("x", x, least_rank=2, remedy="give (..., tokens, width)")
        if x.size(-1) != self.head_width:
            raise ShapeError(f"x: expected width {self.head_width}, got shape {tuple(x.shape)}; match head_width")
        if positions is None:
            positions = torch.arange(x.size(-2), device=x.device)
        if positions.is_floating_point() or positions.dtype == torch.bool:
            raise DtypeError(f"positions: expected integers, got {positions.dtype}; count tokens with torch.arange")
        if not fits(positions.shape, x.shape[:-1]):
            raise ShapeError(
                f"positions: expected a shape broadcastable to {tuple(x.shape[:-1])}, got {tuple(positions.shape)}; one per token"
            )
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            pair = torch.arange(0, self.head_width, 2, device=x.device, dtype=wide)
            angles = positions.to(wide).unsqueeze(-1) * self.base ** (-pair / self.head_width)  # (..., N, D/2)
            cos, sin = angles.cos(), angles.sin()
            if self.layout == "half_split":
                a, b = x.to(wide).chunk(2, -1)
                return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
            a, b = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)
