"""Residual streams: how a block's output joins its input, one stream or several that mix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liegroup_attn import manifolds
from liegroup_attn.errors import ShapeError
from liegroup_attn.functional import transition_matrix
from liegroup_attn.nn.learned import generator_of
from liegroup_attn.resettable import Resettable
from liegroup_attn.tensors import without_autocast

__all__ = ["Residual", "ResidualStreams"]


class Residual(Resettable):
    """One stream: the layer reads it and adds to it."""

    num_streams = 1

    def read(self, x: Tensor) -> Tensor:
        """What the layer sees, (B, N, C)."""
        return x

    def write(self, x: Tensor, y: Tensor) -> Tensor:
        """The stream after the layer has given y (B, N, C)."""
        return x + y


class ResidualStreams(Residual):
    """Several residual streams, mixed by a doubly stochastic exp(Q), Q a doubly balanced rate matrix.

    The layer reads a learned combination of the streams, Σ_s a_s x_s, and writes y: x_s ← Σ_r exp(Q)_sr x_r + b_s y. Rows
    and columns of exp(Q) sum to 1 exactly and in closed form, without Sinkhorn iterations in the forward pass: however
    many layers are stacked, the mean over streams is carried on unchanged.

    Args:
        num_streams: S ≥ 2.
        reads: which stream the layer reads at the start.
        rate: exit rate of Q at the start.

    Raises:
        ShapeError: S < 2.

    Example:
        >>> streams = ResidualStreams(3)
        >>> x = torch.randn(2, 5, 3, 8)  # (B, N, S, C)
        >>> streams.write(x, torch.zeros(2, 5, 8)).mean(-2).allclose(x.mean(-2), atol=1e-6)
        True

    Source: [Xie2025]_ (residual streams, doubly stochastic by Sinkhorn); docs/mathematics, "Families".
    """

    generator: Tensor

    def __init__(self, num_streams: int, *, reads: int = 0, rate: float = 0.1) -> None:
        super().__init__()
        if num_streams < 2:
            raise ShapeError(f"num_streams: expected at least 2, got {num_streams}; one stream is Residual()")
        self.num_streams = num_streams
        manifold = manifolds.DoublyBalancedRateMatrices(num_streams)
        equal = torch.full((num_streams, num_streams), rate / (num_streams - 1))
        manifolds.hold(self, "generator", manifold.projx(equal), manifold)
        # Layers that read alike would have alike gradients for ever.
        self.reading = nn.Parameter(torch.eye(num_streams)[reads % num_streams])
        self.writing = nn.Parameter(torch.ones(num_streams))

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.num_streams}"

    def mixing_matrix(self) -> Tensor:
        """exp(Q), (S, S), doubly stochastic."""
        return transition_matrix(generator_of(self.generator))

    def read(self, x: Tensor) -> Tensor:  # noqa: D102
        return torch.einsum("s,...sc->...c", self.reading.to(x.dtype), x)

    def write(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        with without_autocast(x):  # a residual stream is not rounded, as x + y is not
            mixed = self.mixing_matrix().to(x.dtype) @ x
        return mixed + self.writing.unsqueeze(-1) * y.unsqueeze(-2)
