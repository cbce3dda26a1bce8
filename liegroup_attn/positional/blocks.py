"""exp of learned skew-symmetric blocks: what LieRE and ComRoPE have in common."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from liegroup_attn.algebra import expm
from liegroup_attn.errors import ShapeError
from liegroup_attn.positional.base import along_axes, check_sizes
from liegroup_attn.positional.heads import HeadRotation, nearest_orthonormal
from liegroup_attn.positional.one_parameter import one_parameter_rotations

__all__ = ["BlockExponential", "skew_blocks", "start_entries"]

# Of the largest frequency of a matrix: planes that turn slower are looked for among themselves, where they are large.
_SLOW = 1e-3
# Squaring loses digits with distance: float32 exponentials at position 100 000 are only 2e-2 near to orthogonal.
_STEPS = 2


class BlockExponential(HeadRotation):
    """R(x) = exp(Σ_p x_p A_p), A_p skew-symmetric and block-diagonal; a subclass says by which A_p.

    Rotations are made per key head, position and block, (H, N, D/b, b, b), once for queries and keys and without a batch
    where positions have none; O(b³) each. R(x)ᵀR(y) = R(y − x) holds iff the A_p commute. In every block they are then
    multiples of one A here, and one eigendecomposition of A serves all positions (differentiable once); if not, every
    position costs an exponential, far more.

    Args:
        head_width: D, even.
        num_heads: H, number of key heads.
        axes: P.
        block: b, divides D.

    Raises:
        ShapeError: odd width, sizes < 1, a block that does not divide the width.
    """

    def __init__(self, head_width: int, num_heads: int, axes: int, block: int) -> None:
        super().__init__(head_width, num_heads, axes)
        check_sizes(block=block)
        if block < 2 or head_width % block:
            raise ShapeError(
                f"block: expected a divisor of head_width={head_width} from 2, got {block}; head_width itself is one dense block"
            )
        self.block, self.num_blocks = block, head_width // block

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, block={self.block}"

    @abstractmethod
    def multiples(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Where the A_p commute: θ, (H, P, D/b), and A, (H, D/b, b, b), with A_p = θ_p A in every block.

        Computed in the given dtype: half precision would round products of parameters.
        """

    def generators(self, dtype: torch.dtype) -> Tensor:
        """A_p, (H, P, D/b, b, b)."""
        factors, common = self.multiples(dtype)
        return factors[..., None, None] * common.unsqueeze(1)

    def prepare(self, coordinates: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        if self.relative:
            factors, common = self.multiples(coordinates.dtype)
            times = along_axes(coordinates, factors.unsqueeze(1))  # (..., H, 1, N, D/b)
            return (one_parameter_rotations(common[:, None, None], times),)
        generators = self.generators(coordinates.dtype).unsqueeze(1)  # (H, 1, P, D/b, b, b)
        at = along_axes(coordinates, generators.flatten(-3)).unflatten(-1, generators.shape[-3:])
        # In float64: every squaring doubles an error, and products in TF32 would leave nothing of far positions.
        rotations = expm(at.double()).to(at.dtype)  # (..., H, 1, N, D/b, b, b)
        return (nearest_orthonormal(rotations, _STEPS),)

    def turn(self, x: Tensor, *prepared: Tensor) -> Tensor:  # noqa: D102
        (rotations,) = prepared  # (..., H, 1, N, D/b, b, b)
        # Not by matmul, which would copy the rotations for every item of the batch; einsum makes it a column.
        parts = x.unflatten(-1, (self.num_blocks, self.block))
        return torch.einsum("...nkij,...nkj->...nki", rotations, parts).flatten(-2)

    @torch.no_grad()
    def planes(self) -> tuple[Tensor, Tensor]:
        """See the base."""
        factors, common = self.multiples(torch.float64)
        pairs = self.head_width // 2
        basis = common.new_zeros(self.num_heads, self.head_width, self.head_width)
        for head in range(self.num_heads):
            first, second, still = [], [], []
            for k in range(self.num_blocks):
                rows = slice(k * self.block, (k + 1) * self.block)
                *plane, rest = (_embedded(c, rows, self.head_width) for c in _planes(common[head, k]))
                first.append(plane[0])
                second.append(plane[1])
                still.append(rest)
            left = torch.cat(still, -1)  # one direction of every block of odd size: two of them are a plane at rest
            basis[head] = torch.cat([*first, left[:, 0::2], *second, left[:, 1::2]], -1)
        parts = basis.unflatten(1, (self.num_blocks, self.block))  # (H, D/b, b, D)
        speeds = torch.einsum("hkir,hkij,hkjr->hkr", parts[..., pairs:], common, parts[..., :pairs])
        frequencies = torch.einsum("hkr,hpk->hrp", speeds, factors)  # a plane is in one block, and 0 in all others
        return basis, frequencies


def skew_blocks(entries: Tensor, block: int) -> Tensor:
    """Skew-symmetric matrices from their entries below the diagonal: (..., b(b − 1)/2) → (..., b, b)."""
    row, column = torch.tril_indices(block, block, -1, device=entries.device)
    lower = entries.new_zeros(*entries.shape[:-1], block, block)
    lower[..., row, column] = entries
    return lower - lower.mT


def start_entries(frequencies: Tensor, block: int) -> Tensor:
    """Entries of a block that turns at the given frequencies, in planes drawn at random: (..., b // 2) → (..., b(b − 1)/2)."""
    frame = torch.linalg.qr(torch.randn(*frequencies.shape[:-1], block, block)).Q
    first, second = frame[..., : block // 2], frame[..., block // 2 : 2 * (block // 2)]
    half = (second * frequencies.to(frame).unsqueeze(-2)) @ first.mT
    row, column = torch.tril_indices(block, block, -1)
    return (half - half.mT)[..., row, column]


def _embedded(columns: Tensor, rows: slice, width: int) -> Tensor:
    wide = columns.new_zeros(width, columns.size(-1))
    wide[rows] = columns
    return wide


def _planes(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal first and second directions of the planes of a skew-symmetric matrix, and one that is left if n is odd.

    −iA is Hermitian, and eigenvectors of frequencies f > 0 have orthonormal real and imaginary parts; but numerically
    only where f is not mistaken for −f, hence the slow planes are found in what the fast ones leave.
    """
    n = A.size(-1)
    eye = torch.eye(n, dtype=A.dtype, device=A.device)
    frequencies, vectors = torch.linalg.eigh(torch.complex(torch.zeros_like(A), -A))
    if n < 2 or float(frequencies[-1]) <= 0:
        return eye[:, : n // 2], eye[:, n // 2 : 2 * (n // 2)], eye[:, 2 * (n // 2) :]
    fast = vectors[:, frequencies > _SLOW * frequencies[-1]] * 2**0.5
    first, second = fast.imag, fast.real
    rest = torch.linalg.qr(torch.cat([first, second], -1), mode="complete").Q[:, 2 * first.size(-1) :]
    slow = _planes((rest.mT @ A @ rest - rest.mT @ A.mT @ rest) / 2)
    return torch.cat([first, rest @ slow[0]], -1), torch.cat([second, rest @ slow[1]], -1), rest @ slow[2]
