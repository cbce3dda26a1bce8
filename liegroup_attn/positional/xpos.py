"""xPos: RoPE whose pairs also shrink with distance."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.positional.rotary import RotaryEncoding

__all__ = ["XPos"]


class XPos(RotaryEncoding):
    """Queries are scaled by ζ^(n/scale_base), keys by its inverse: a pair's part in a score decays as ζ^((m−n)/scale_base).

    ζ_i = (2i/D + γ)/(1 + γ). Means something under a causal mask alone. Numbers stay finite and normal in float32 while
    ``|n|·ln(1 + 1/γ) < 87 scale_base``: up to ±35 000 with the defaults, in float16 (9.7 for 87) up to ±3 900.

    Args:
        head_width: D, even.
        layout: "half_split" or "interleaved".
        base: of the frequencies.
        scale_base: tokens in which ζ acts once.
        gamma: γ > 0.

    Raises:
        ShapeError: odd width.
        ValueError: unknown layout, or numbers not above 0.

    Example:
        >>> XPos(2, layout="half_split", gamma=1.0, scale_base=1)(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
        tensor([[1., 0.]])

    Source: [Sun2023]_.
    """

    causal_only = True  # scores of later tokens would grow without bound

    def __init__(
        self, head_width: int, *, layout: str, base: float = 10_000.0, scale_base: float = 512, gamma: float = 0.4
    ) -> None:
        super().__init__(head_width, layout=layout, base=base)
        for name, number in (("scale_base", scale_base), ("gamma", gamma)):
            if not number > 0:
                raise ValueError(f"{name}: expected a number > 0, got {number}; the paper has 512 and 0.4")
        self.scale_base, self.gamma = scale_base, gamma

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, scale_base={self.scale_base:g}, gamma={self.gamma:g}"

    def scale(self, coordinates: Tensor) -> Tensor:
        """What multiplies the pairs of a query at coordinates (..., N, 1): (..., N, D/2)."""
        pair = torch.arange(0, self.head_width, 2, device=coordinates.device, dtype=coordinates.dtype)
        zeta = (pair / self.head_width + self.gamma) / (1 + self.gamma)
        return zeta ** (coordinates / self.scale_base)

    def act(self, x: Tensor, coordinates: Tensor) -> Tensor:  # noqa: D102
        return self._scaled(x, coordinates, *self.cos_sin(coordinates, x))

    def act_on_keys(self, x: Tensor, coordinates: Tensor) -> Tensor:  # noqa: D102
        return self._scaled(x, -coordinates, *self.cos_sin(coordinates, x))

    def act_both(self, query: Tensor, key: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        cos, sin = self.cos_sin(coordinates, query)
        first = self._scaled(query.to(cos.dtype), coordinates, cos, sin)
        return first.to(query.dtype), self._scaled(key.to(cos.dtype), -coordinates, cos, sin).to(key.dtype)

    def _scaled(self, x: Tensor, coordinates: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        scale = self.scale(coordinates)
        return self.turn(x, cos * scale, sin * scale)
