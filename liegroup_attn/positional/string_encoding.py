"""STRING: commuting learned generators, diagonal in a learned basis or in that of the Fourier transform."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liegroup_attn.errors import ShapeError
from liegroup_attn.positional.base import along_axes
from liegroup_attn.positional.blocks import skew_blocks
from liegroup_attn.positional.heads import HeadRotation, start_frequencies
from liegroup_attn.positional.pairs import turn_pairs

__all__ = ["CayleyString", "CirculantString"]


class CayleyString(HeadRotation):
    """Cayley-STRING: R(x) = P RoPE(x·f) Pᵀ with learned frequencies f and P = (I + S)⁻¹(I − S), the Cayley transform of a learned skew S.

    R(x)ᵀR(y) = R(y − x) holds: all generators have the planes of P. S starts at 0, f at RoPE's frequencies (in random
    directions on several axes): on one axis it starts as RoPE in the layout "half_split". Turns of a plane in itself change
    nothing, so D/2 directions of S are idle. O(D²) a token, like a projection; ``fold`` leaves O(D).

    Args:
        head_width: D, even.
        num_heads: H, number of key heads.
        axes: P.
        base: of the frequencies at the start.

    Raises:
        ShapeError: odd width, or sizes < 1.
        ValueError: base ≤ 0.

    Example:
        >>> string = CayleyString(4, 1)
        >>> string(torch.tensor([[[1.0, 1.0, 0.0, 0.0]]]), torch.tensor([1]))
        tensor([[[0.5403, 0.9999, 0.8415, 0.0100]]], grad_fn=<ViewBackward0>)

    Source: [Schenck2025]_.
    """

    def __init__(self, head_width: int, num_heads: int, *, axes: int = 1, base: float = 10_000.0) -> None:
        super().__init__(head_width, num_heads, axes)
        self.frequencies = nn.Parameter(start_frequencies(num_heads, head_width // 2, axes, base))
        self.entries = nn.Parameter(
            torch.zeros(num_heads, head_width * (head_width - 1) // 2)
        )  # of S, below the diagonal

    def basis(self, dtype: torch.dtype) -> Tensor:
        """P, (H, D, D)."""
        skew = skew_blocks(self.entries.to(dtype), self.head_width)
        eye = torch.eye(self.head_width, dtype=dtype, device=skew.device)
        return torch.linalg.solve(eye + skew, eye - skew)

    def prepare(self, coordinates: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        angles = _angles(coordinates, self.frequencies.mT)
        return self.basis(coordinates.dtype).unsqueeze(1), angles.cos(), angles.sin()

    def turn(self, x: Tensor, *prepared: Tensor) -> Tensor:  # noqa: D102
        basis, cos, sin = prepared
        inside = _times(x, basis)  # Pᵀx, for rows
        return _times(turn_pairs(inside, cos, sin, "half_split"), basis.mT)

    @torch.no_grad()
    def planes(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self.basis(torch.float64), self.frequencies.double()


class CirculantString(HeadRotation):
    """Circulant-STRING: R(x) = exp(Σ_p x_p C_p) with learned skew-symmetric circulant C_p, diagonal in the Fourier basis: O(D log D) a token.

    R(x)ᵀR(y) = R(y − x) holds: circulant matrices commute. C_p is given by its first column c, c_{−j} = −c_j, and its
    eigenvalues are ±i f_k, f_k = −2 Σ_{j<D/2} c_j sin(2πjk/D); at the start these are RoPE's, of D/2 − 1 pairs (in random
    directions on several axes). Two features of the Fourier basis, the mean and the alternating one, never turn.

    Args:
        head_width: D, even, at least 4.
        num_heads: H, number of key heads.
        axes: P.
        base: of the frequencies at the start.

    Raises:
        ShapeError: odd width or one below 4, or sizes < 1.
        ValueError: base ≤ 0.

    Example:
        >>> CirculantString(8, 2).column.shape
        torch.Size([2, 1, 3])

    Source: [Schenck2025]_.
    """

    def __init__(self, head_width: int, num_heads: int, *, axes: int = 1, base: float = 10_000.0) -> None:
        super().__init__(head_width, num_heads, axes)
        if head_width < 4:
            raise ShapeError(f"head_width: expected at least 4, got {head_width}; a circulant of size 2 is not skew")
        pairs = head_width // 2 - 1
        spectrum = nn.functional.pad(start_frequencies(num_heads, pairs, axes, base).mT, (1, 1))  # (H, P, D/2 + 1)
        column = torch.fft.irfft(torch.complex(torch.zeros_like(spectrum), spectrum), n=head_width)
        self.column = nn.Parameter(column[..., 1 : pairs + 1].contiguous())  # c_1 … c_{D/2 − 1}, (H, P, D/2 − 1)

    def spectrum(self, dtype: torch.dtype) -> Tensor:
        """f_k for k = 0 … D/2, the eigenvalues of C_p over i: (H, P, D/2 + 1)."""
        half = self.column.to(dtype)
        none = torch.zeros_like(half[..., :1])
        return torch.fft.rfft(torch.cat([none, half, none, -half.flip(-1)], -1)).imag

    def prepare(self, coordinates: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        angles = _angles(coordinates, self.spectrum(coordinates.dtype))  # (..., H, 1, N, D/2 + 1)
        return (torch.polar(torch.ones_like(angles), angles),)

    def turn(self, x: Tensor, *prepared: Tensor) -> Tensor:  # noqa: D102
        (phases,) = prepared
        return torch.fft.irfft(torch.fft.rfft(x) * phases, n=self.head_width)

    @torch.no_grad()
    def planes(self) -> tuple[Tensor, Tensor]:
        """See the base: cosines and sines of the Fourier basis; what never turns comes last."""
        width = self.head_width
        spectrum = self.spectrum(torch.float64)
        place = torch.arange(width, dtype=torch.float64, device=spectrum.device)
        angle = 2 * torch.pi / width * torch.outer(place, place[1 : width // 2])  # (D, D/2 − 1)
        still = torch.stack([torch.ones_like(place), 1 - 2 * (place % 2)], -1) / width**0.5  # (D, 2)
        turning = (2 / width) ** 0.5
        basis = torch.cat([turning * angle.cos(), still[:, :1], -turning * angle.sin(), still[:, 1:]], -1)
        frequencies = nn.functional.pad(spectrum[..., 1:-1], (0, 1)).mT  # (H, D/2, P)
        return basis.expand(self.num_heads, -1, -1).contiguous(), frequencies.contiguous()


def _angles(coordinates: Tensor, frequencies: Tensor) -> Tensor:
    """(..., H or 1, G or 1, N, P), (H, P, F) → (..., H, G or 1, N, F)."""
    return along_axes(coordinates, frequencies.to(coordinates.dtype).unsqueeze(1))


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """Rows times one matrix a head, (..., H, G, N, D) × (H, 1, D, E); matmul would copy it for every item of the batch."""
    return torch.einsum("...hgnd,hde->...hgne", x, matrix.squeeze(1))
