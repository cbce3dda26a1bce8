"""Three forms of one rotation: complex numbers, 2×2 blocks, an exponential; x (..., N, D), angles (..., N, D/2)."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.algebra import expm


def complex_form(x: Tensor, angles: Tensor, layout: str) -> Tensor:
    """Each pair is a complex number, multiplied by e^{i·angle}."""
    a, b = _columns(angles.size(-1), layout)
    turned = torch.complex(x[..., a], x[..., b]) * torch.polar(torch.ones_like(angles), angles)
    out = torch.empty_like(x)
    out[..., a], out[..., b] = turned.real, turned.imag
    return out


def rotation_form(x: Tensor, angles: Tensor, layout: str) -> Tensor:
    """Each pair is multiplied by a 2×2 rotation matrix."""
    a, b = _columns(angles.size(-1), layout)
    cos, sin = angles.cos(), angles.sin()
    blocks = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)  # (..., N, D/2, 2, 2)
    turned = (blocks @ torch.stack([x[..., a], x[..., b]], -1).unsqueeze(-1)).squeeze(-1)
    out = torch.empty_like(x)
    out[..., a], out[..., b] = turned[..., 0], turned[..., 1]
    return out


def exponential_form(x: Tensor, angles: Tensor, layout: str) -> Tensor:
    """exp(A)x; squaring multiplies rounding, to 2e-12 at 4096 radians in float64."""
    return (expm(skew_generator(angles, layout)) @ x.unsqueeze(-1)).squeeze(-1)


def skew_generator(frequencies: Tensor, layout: str) -> Tensor:
    """A = −Aᵀ (..., D, D) of turns at these frequencies (..., D/2)."""
    pairs = frequencies.size(-1)
    a, b = _columns(pairs, layout)
    lower = frequencies.new_zeros(*frequencies.shape[:-1], 2 * pairs, 2 * pairs)
    lower[..., b, a] = frequencies
    return lower - lower.mT


def _columns(pairs: int, layout: str) -> tuple[Tensor, Tensor]:
    i = torch.arange(pairs)
    return (i, i + pairs) if layout == "half_split" else (2 * i, 2 * i + 1)
