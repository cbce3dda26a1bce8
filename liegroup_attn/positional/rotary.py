"""RoPE: position m acts on each feature pair by a rotation through mθ_i."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.positional.pairs import PairRotation, check_base, check_rotary_width, cos_sin
from liegroup_attn.positional.scaling import FrequencyScaling

__all__ = ["RotaryEncoding"]


class RotaryEncoding(PairRotation):
    """Rotary position encoding; scores of rotated queries and keys depend on positions through m − n only.

    Angles mθ_i, θ_i = base^(−2i/D), are made anew from positions in at least float32 on every call: nothing
    is cached or cast by ``.to(torch.bfloat16)``, which would merge 4096 positions into 769.

    Args:
        head_width: D, even.
        layout: which features form a pair: "half_split" pairs i with i + D/2, "interleaved" 2i with 2i + 1. Both are
            in use; checkpoints do not say which.
        base: of the frequencies.
        rotary_width: r, even: the first r features of a head turn, paired among themselves, the others pass; default D.
        scaling: of the frequencies, for sequences longer than those trained on. Where it looks at the longest position
            of a call (``DynamicNTK``, ``LongRoPE``), keys in a cache stay turned as they were when written.

    Raises:
        ShapeError: odd width, or ``rotary_width`` beyond the head.
        ValueError: unknown layout, or a base not above 0.

    Example:
        >>> rotary = RotaryEncoding(4, layout="half_split")
        >>> rotary(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([1]))
        tensor([[0.5403, 0.9999, 0.8415, 0.0100]])

    Source: [Su2021]_.
    """

    def __init__(
        self,
        head_width: int,
        *,
        layout: str,
        base: float = 10_000.0,
        rotary_width: int | None = None,
        scaling: FrequencyScaling | None = None,
    ) -> None:
        super().__init__(head_width, layout=layout)
        check_base(base)
        self.base = base
        self.rotary_width = check_rotary_width(rotary_width, head_width)
        self.scaling = scaling
        self.relative = scaling is None or scaling.fixed

    def extra_repr(self) -> str:  # noqa: D102
        partial = "" if self.rotary_width == self.head_width else f", rotary_width={self.rotary_width}"
        scaled = "" if self.scaling is None else f", scaling={self.scaling}"
        return f"{self.head_width}, layout={self.layout!r}, base={self.base:g}{partial}{scaled}"

    def angles(self, coordinates: Tensor, x: Tensor) -> Tensor:  # noqa: D102
        return self._angles(coordinates)[0]

    def cos_sin(self, coordinates: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        angles, factor = self._angles(coordinates)
        cos, sin = cos_sin(angles)
        return (cos, sin) if factor == 1 else (cos * factor, sin * factor)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # noqa: D102
        r = self.rotary_width
        if r == self.head_width:
            return super().turn(x, cos, sin)
        return torch.cat([super().turn(x[..., :r], cos, sin), x[..., r:]], -1)

    def _angles(self, coordinates: Tensor) -> tuple[Tensor, float]:
        pair = torch.arange(0, self.rotary_width, 2, device=coordinates.device, dtype=coordinates.dtype)
        frequencies, factor = self.base ** (-pair / self.rotary_width), 1.0
        if self.scaling is not None:
            frequencies, factor = self.scaling.frequencies(frequencies, self.base, coordinates.amax(-2, keepdim=True))
        return coordinates * frequencies, factor  # (..., N, r/2)
