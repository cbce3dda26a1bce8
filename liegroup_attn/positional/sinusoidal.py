"""Sinusoidal positions: sines and cosines of mθ_i are added to the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.errors import ShapeError
from liegroup_attn.positional.base import AbsoluteEncoding

__all__ = ["SinusoidalEncoding"]


class SinusoidalEncoding(AbsoluteEncoding):
    """Feature 2i of position m is sin(mθ_i), feature 2i + 1 is cos(mθ_i), θ_i = base^(−2i/C).

    A shift of the position turns every pair by a fixed angle, so inner products of two rows depend on their distance alone.

    Args:
        embed_dim: C, even.
        base: of the frequencies.

    Raises:
        ShapeError: odd width.

    Example:
        >>> SinusoidalEncoding(4)(torch.zeros(2, 4))
        tensor([[0.0000, 1.0000, 0.0000, 1.0000],
                [0.8415, 0.5403, 0.0100, 0.9999]])

    Source: [Vaswani2017]_, section 3.5.
    """

    def __init__(self, embed_dim: int, *, base: float = 10_000.0) -> None:
        super().__init__(embed_dim)
        if embed_dim % 2:
            raise ShapeError(f"embed_dim: expected an even number, got {embed_dim}; sines and cosines come in pairs")
        self.base = base

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.embed_dim}, base={self.base:g}"

    def table(self, coordinates: Tensor) -> Tensor:  # noqa: D102
        pair = torch.arange(0, self.embed_dim, 2, device=coordinates.device, dtype=coordinates.dtype)
        angles = coordinates * self.base ** (-pair / self.embed_dim)  # (..., N, C/2)
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)
