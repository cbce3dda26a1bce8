"""GRAPE's multiplicative form: rotations in learned planes, in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from liegroup_attn import manifolds
from liegroup_attn.checks import check_shape
from liegroup_attn.errors import ShapeError
from liegroup_attn.positional.base import along_axes, check_sizes
from liegroup_attn.positional.heads import HeadRotation, nearest_orthonormal, start_frequencies
from liegroup_attn.positional.pairs import turn_pairs
from liegroup_attn.tensors import without_autocast

__all__ = ["PlaneRotary", "rodrigues"]

_TERMS = 10  # of the series up to s² = 1: the next is below 1e-19
_STEPS = 3  # for a frame in half precision, 1e-2 from orthonormal


class PlaneRotary(HeadRotation):
    """GRAPE's planes: rotations in K learned planes a head, orthogonal to one another; all else stays. O(DK) a token.

    With an orthonormal frame a_1 … a_K, b_1 … b_K and learned frequencies ω_k,
    R(x)q = q + Σ_k [(cos ω_k·x − 1)(a_k a_kᵀ + b_k b_kᵀ) + sin(ω_k·x)(b_k a_kᵀ − a_k b_kᵀ)] q. R(x)ᵀR(y) = R(y − x)
    holds, as orthogonal planes commute.

    The frame is a point of geoopt's Stiefel manifold, where the library's optimizers keep it. R is made from the
    orthonormal frame next to it, so that it is a rotation in half precision, too.

    Args:
        head_width: D, even.
        num_heads: H, number of key heads.
        num_planes: K, at most D/2; D/2 planes are a RoPE in a learned basis.
        axes: P.
        base: of the frequencies at the start, base^(−k/K), in random directions on several axes.

    Raises:
        ShapeError: odd width, sizes < 1, more planes than fit.
        ValueError: base ≤ 0.

    Example:
        >>> PlaneRotary(8, 2, num_planes=3).frame.shape
        torch.Size([2, 8, 6])

    Source: [Zhang2026]_.
    """

    frame: Tensor

    def __init__(
        self, head_width: int, num_heads: int, *, num_planes: int = 1, axes: int = 1, base: float = 10_000.0
    ) -> None:
        super().__init__(head_width, num_heads, axes)
        check_sizes(num_planes=num_planes)
        if 2 * num_planes > head_width:
            raise ShapeError(
                f"num_planes: expected at most head_width // 2 = {head_width // 2}, got {num_planes}; planes are orthogonal"
            )
        self.num_planes = num_planes
        self.frequencies = nn.Parameter(start_frequencies(num_heads, num_planes, axes, base))  # (H, K, P)
        start = torch.linalg.qr(torch.randn(num_heads, head_width, 2 * num_planes)).Q
        manifolds.hold(self, "frame", start, manifolds.Stiefel())

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, num_planes={self.num_planes}"

    def prepare(self, coordinates: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        angles = along_axes(coordinates, self.frequencies.to(coordinates.dtype).mT.unsqueeze(1))  # (..., H, 1, N, K)
        return nearest_orthonormal(self.frame.to(coordinates.dtype), _STEPS), angles.cos(), angles.sin()

    def turn(self, x: Tensor, *prepared: Tensor) -> Tensor:  # noqa: D102
        frame, cos, sin = prepared
        inside = torch.einsum("...hgnd,hde->...hgne", x, frame)
        change = turn_pairs(inside, cos, sin, "half_split") - inside
        return x + torch.einsum("...hgne,hde->...hgnd", change, frame)

    @torch.no_grad()
    def planes(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        frame = nearest_orthonormal(self.frame.as_subclass(Tensor).double(), _STEPS)
        left = torch.linalg.qr(frame, mode="complete").Q[..., 2 * self.num_planes :]
        (first, second), (third, fourth) = frame.chunk(2, -1), left.tensor_split(2, -1)
        rest = self.head_width // 2 - self.num_planes
        frequencies = nn.functional.pad(self.frequencies.double(), (0, 0, 0, rest))
        return torch.cat([first, third, second, fourth], -1), frequencies


def rodrigues(x: Tensor, a: Tensor, b: Tensor, position: Tensor | float = 1.0) -> Tensor:
    """exp(position (abᵀ − baᵀ)) x in closed form, Rodrigues' for a plane of any dimension; O(D).

    With L = abᵀ − baᵀ and s² = ‖a‖²‖b‖² − (a·b)²: exp(tL) = I + sin(st)/s L + (1 − cos(st))/s² L². Where s is small,
    as for a parallel to b, the fractions are summed as series: values and all derivatives are finite there.

    Args:
        x: (..., D).
        a: (..., D), free; broadcasts with ``x``, as all do.
        b: (..., D), free.
        position: (...) or a number.

    Returns:
        (..., D), float32 or float64.

    Raises:
        DtypeError, ShapeError: not floating-point vectors, or of different widths.

    Example:
        >>> e1, e2 = torch.eye(2)
        >>> rodrigues(e1, e2, e1, 1.0)
        tensor([0.5403, 0.8415])

    Source: [Zhang2026]_.
    """
    for name, vector in (("x", x), ("a", a), ("b", b)):
        check_shape(name, vector, least_rank=1, remedy="give (..., width)")
        if vector.size(-1) != x.size(-1):
            raise ShapeError(f"{name}: expected width {x.size(-1)}, got shape {tuple(vector.shape)}; match that of x")
    wide = torch.float64 if torch.float64 in (x.dtype, a.dtype, b.dtype) else torch.float32
    with without_autocast(x):
        x, a, b = (vector.to(wide) for vector in (x, a, b))
        time = torch.as_tensor(position, device=x.device).to(wide).unsqueeze(-1)
        area = _dot(a, a) * _dot(b, b) - _dot(a, b).square()  # s²
        once = a * _dot(b, x) - b * _dot(a, x)
        twice = a * _dot(b, once) - b * _dot(a, once)
        return (
            x
            + time * _sinc(area * time.square()) * once
            + time.square() / 2 * _sinc(area * time.square() / 4).square() * twice
        )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _sinc(square: Tensor) -> Tensor:
    """sin(s)/s as a function of s², which it is smooth in; rounding may have made s² negative."""
    near = square < 1
    root = torch.where(near, 1, square).sqrt()  # no derivative of √0 may come near a branch, taken or not
    small = torch.where(near, square, 0)
    series = torch.zeros_like(square)
    for k in reversed(range(_TERMS)):
        series = series * small + (-1) ** k / math.factorial(2 * k + 1)
    return torch.where(near, series, root.sin() / root)
