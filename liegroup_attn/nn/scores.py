"""Bilinear scores s = E A Eᵀ/√D whose A of rank D lives on a manifold: instead of free W_Q and W_K, A = W_Q W_Kᵀ."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from liegroup_attn import manifolds
from liegroup_attn.errors import ShapeError
from liegroup_attn.resettable import Resettable

__all__ = ["BilinearScores", "RateScores", "SkewScores", "SpectralScores", "SymmetricScores"]

# With inputs of unit variance, scores then start as small as those of two nn.Linear (whose weights have variance 1/3C).
_SIZE = 1 / 3


class BilinearScores(Resettable, ABC):
    """Queries and keys of every head from one matrix A per head, factored so that no C×C matrix is formed.

    Args:
        embed_dim: C, model width.
        num_heads: H, divides C; the rank of A is D = C / H.

    Raises:
        ShapeError: heads that do not divide the width.
    """

    symmetric = False  # whether s_ij = s_ji, so that no mask and no rotation may come between

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ShapeError(f"num_heads: expected a divisor of embed_dim={embed_dim}, got {num_heads}; change one")
        self.embed_dim, self.num_heads, self.head_width = embed_dim, num_heads, embed_dim // num_heads

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.embed_dim}, num_heads={self.num_heads}"

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys.

        Args:
            x: (B, N, C).

        Returns:
            Two of (B, H, N, D), whose inner products are x A xᵀ.
        """

    def key_bias(self, x: Tensor) -> Tensor | None:
        """What is added to every score of a key, (B, H, N); None for nothing."""
        return None

    def _frame(self, name: str) -> None:
        """An orthonormal frame of D columns per head, (H, C, D), drawn at random."""
        start = torch.linalg.qr(torch.randn(self.num_heads, self.embed_dim, self.head_width)).Q
        manifolds.hold(self, name, start, manifolds.Stiefel())


def _in_frame(x: Tensor, frame: Tensor) -> Tensor:
    """(B, N, C), (H, C, D) → (B, H, N, D)."""
    return x.unsqueeze(1) @ frame.to(x.dtype)


class SpectralScores(BilinearScores):
    """A = U diag(σ) Vᵀ: frames U, V with orthonormal columns (geoopt's Stiefel), spectrum σ > 0.

    The singular values of A are parameters: they neither explode nor vanish by the product of two matrices.

    Args: those of ``BilinearScores``.

    Example:
        >>> query, key = SpectralScores(16, 2)(torch.zeros(1, 5, 16))
        >>> query.shape
        torch.Size([1, 2, 5, 8])

    Source: docs/mathematics; [Kochurov2020]_.
    """

    left: Tensor
    right: Tensor
    spectrum: Tensor

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__(embed_dim, num_heads)
        self._frame("left")
        self._frame("right")
        manifolds.hold(self, "spectrum", torch.full((num_heads, self.head_width), _SIZE), manifolds.PositiveVectors())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        scale = self.spectrum.sqrt().unsqueeze(-2).to(x.dtype)  # (H, 1, D)
        return _in_frame(x, self.left) * scale, _in_frame(x, self.right) * scale


class SkewScores(BilinearScores):
    """A = U K Uᵀ, K skew: s_ij = −s_ji, every pair of tokens has a direction and no token scores itself.

    K is the difference of a free matrix and its transpose (skew matrices are a linear space and need no manifold), U a
    frame with orthonormal columns. A rotary encoding of queries and keys breaks the antisymmetry.

    Args: those of ``BilinearScores``.

    Example:
        >>> query, key = SkewScores(16, 2)(torch.randn(1, 5, 16))
        >>> scores = query @ key.mT
        >>> torch.allclose(scores, -scores.mT, atol=1e-6)
        True
    """

    frame: Tensor

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__(embed_dim, num_heads)
        self._frame("frame")
        width = self.head_width
        self.core = nn.Parameter(torch.randn(num_heads, width, width) * _SIZE / math.sqrt(2 * width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        key = _in_frame(x, self.frame)
        return key @ (self.core - self.core.mT).to(x.dtype), key


class RateScores(BilinearScores):
    """A = U Q Uᵀ with Q a rate matrix on the D features of a frame: features exchange score along a Markov chain.

    Args: those of ``BilinearScores``.

    Example:
        >>> layer = RateScores(16, 2)
        >>> layer.rates.manifold.check_point_on_manifold(layer.rates)
        True
    """

    frame: Tensor
    rates: Tensor

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__(embed_dim, num_heads)
        self._frame("frame")
        width = self.head_width
        rates = _SIZE / width * torch.randn(num_heads, width, width).exp()
        rates = rates - torch.diag_embed(rates.diagonal(dim1=-2, dim2=-1))
        manifolds.hold(self, "rates", rates - torch.diag_embed(rates.sum(-1)), manifolds.RateMatrices(width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        key = _in_frame(x, self.frame)
        return key @ self.rates.to(x.dtype), key


class SymmetricScores(BilinearScores):
    """s_ij = s_ji plus a learned log π_j: the generator made from them is reversible.

    With S_ij ∝ e^{s_ij} π_j and jump rates λ_i the chain is in detailed balance with μ_i ∝ π_i Z_i / λ_i,
    Z_i = Σ_j e^{s_ij} π_j: its eigenvalues are real and its flow is a diffusion. A = W diag(w) Wᵀ with a free W and a free
    spectrum w of both signs; log π_j = p·x_j, 0 at the start. ``is_causal`` and an ``encoding`` break the symmetry and are
    refused by the layer; a mask that is not symmetric breaks it, too. Sums with other generators (``plus``,
    ``mix_heads``) are sums of chains with other stationary laws, hence in general not reversible.

    Args: those of ``BilinearScores``.

    Example:
        >>> query, key = SymmetricScores(16, 2)(torch.randn(1, 5, 16))
        >>> scores = query @ key.mT
        >>> torch.allclose(scores, scores.mT, atol=1e-5)
        True

    Source: docs/mathematics, "Families"; [Kelly1979]_.
    """

    symmetric = True

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__(embed_dim, num_heads)
        self.proj = nn.Linear(embed_dim, embed_dim, bias=False)
        signs = 1.0 - 2.0 * (torch.arange(self.head_width) % 2)  # trace 0: no head start for s_ii
        self.spectrum = nn.Parameter(signs.repeat(num_heads, 1))
        self.stationary = nn.Parameter(torch.zeros(num_heads, embed_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        key = self.proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N, D)
        return key * self.spectrum.unsqueeze(-2).to(key.dtype), key

    def key_bias(self, x: Tensor) -> Tensor:  # noqa: D102
        return (x @ self.stationary.to(x.dtype).mT).transpose(1, 2)


def with_bias(query: Tensor, key: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Fold a bias per key into one more feature: q·k/√(D + 1) is what q·k/√D + bias was; (B, H, N, D + 1)."""
    width = query.size(-1)
    one = torch.full_like(query[..., :1], math.sqrt(width + 1))
    return (
        torch.cat([query * math.sqrt((width + 1) / width), one], -1),
        torch.cat([key, bias.unsqueeze(-1).to(key.dtype)], -1),
    )
