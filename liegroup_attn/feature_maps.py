"""Positive feature maps φ: S ∝ φ(q) · φ(k)ᵀ is a jump chain of rank r, for ``LowRankGenerator``."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.checks import check_shape
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.tensors import at_least_float32, without_autocast

__all__ = ["RandomFeatures", "elu_plus_one"]


def elu_plus_one(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1: eˣ below 0, x + 1 above; r = E.

    Args:
        x: (...), queries or keys.

    Returns:
        (...), features > 0, dtype of ``x``.

    Example:
        >>> elu_plus_one(torch.tensor([-1.0, 2.0]))
        tensor([0.3679, 3.0000])

    Source: [Katharopoulos2020]_.
    """
    return torch.where(x > 0, x + 1, x.clamp_max(0).exp())  # F.elu(x) + 1 rounds small features away


class RandomFeatures:
    """φ(x) = exp(Ωx − ‖x‖²/2)/√r with random Ω: φ(q)·φ(k) estimates e^{q·k}, so S estimates softmax(q kᵀ).

    The error of S falls as 1/√r, but with independent rows the estimate's relative variance is (e^{‖q+k‖²} − 1)/r:
    keep q and k short. For softmax(scale · q kᵀ) feed √scale · q and
    √scale · k, with torch's default scale x · E^{−1/4}. A largest exponent is subtracted, per row of queries and per
    matrix of keys, which cancels in the normalization.

    Args:
        width: E.
        num_features: r.
        seed: of Ω; equal seeds give equal maps on every device.
        orthogonal: Ω from orthogonal blocks, less variance than independent rows.

    Raises:
        GeneratorError: width or num_features < 1.

    Example:
        >>> phi = RandomFeatures(width=4, num_features=8)
        >>> q = k = torch.randn(2, 5, 4) * 4**-0.25
        >>> phi(q, is_query=True).shape, phi(k).shape
        (torch.Size([2, 5, 8]), torch.Size([2, 5, 8]))

    Source: [Choromanski2021]_.
    """

    def __init__(self, width: int, num_features: int, seed: int = 0, orthogonal: bool = True) -> None:
        for name, size in (("width", width), ("num_features", num_features)):
            if size < 1:
                raise GeneratorError(f"{name}: expected at least 1, got {size}; give the size of the last dimension")
        self.width, self.num_features, self.seed, self.orthogonal = width, num_features, seed, orthogonal
        rng = torch.Generator().manual_seed(seed)
        directions = torch.randn(num_features, width, generator=rng, dtype=torch.float64)
        if orthogonal:
            blocks = torch.randn(-(-num_features // width), width, width, generator=rng, dtype=torch.float64)
            turned, upper = torch.linalg.qr(blocks)
            turned = turned * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # uniform over O(E)
            directions = turned.mT.flatten(0, 1)[:num_features] * directions.norm(dim=-1, keepdim=True)
        self._directions = directions  # (r, E)

    def __call__(self, x: Tensor, *, is_query: bool = False) -> Tensor:
        """φ(x).

        Args:
            x: (..., N, E), queries or keys.
            is_query: subtract the largest exponent of each row, which only queries may; else that of the matrix.

        Returns:
            (..., N, r), features in [0, 1], float32 or float64.

        Raises:
            ShapeError: wrong rank or width.
        """
        check_shape("x", x, least_rank=2, remedy="give (..., tokens, width)")
        if x.size(-1) != self.width:
            raise ShapeError(
                f"x: expected width {self.width}, got shape {tuple(x.shape)}; build RandomFeatures with the width of a head"
            )
        with without_autocast(x):
            x = at_least_float32(x)
            exponent = x @ self._directions.to(x).mT - x.square().sum(-1, keepdim=True) / 2  # (..., N, r)
            largest = exponent.detach().amax(-1 if is_query else (-2, -1), keepdim=True)
            return (exponent - largest).exp() / self.num_features**0.5

    def __repr__(self) -> str:
        knobs = f"{self.width}, {self.num_features}, seed={self.seed}, orthogonal={self.orthogonal}"
        return f"{type(self).__name__}({knobs})"
