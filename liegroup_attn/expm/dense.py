"""The dense reference: form Q, form the mixing matrix, multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.algebra import expm
from liegroup_attn.clocks import Clock, FixedClock
from liegroup_attn.errors import GeneratorError
from liegroup_attn.expm.base import Method, mix_by
from liegroup_attn.generators import Generator

__all__ = ["MatrixExp"]


class MatrixExp(Method):
    """Dense mixing: ``torch.matrix_exp`` for a fixed clock, ``torch.linalg.solve`` for resolvents.

    Costs N³ and N² memory (one time per query row: N times that), in float32 or float64 whatever the input. Both
    work on the transpose: there a sink column costs ``matrix_exp`` no accuracy, and the solve never needs to
    pivot (the transpose is column diagonally dominant), so causal stays exactly triangular.

    Example:
        >>> from liegroup_attn import DenseGenerator, expm_multiply
        >>> Q = DenseGenerator(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
        >>> expm_multiply(Q, torch.tensor([[1.0], [0.0]]), method=MatrixExp())
        tensor([[0.5677],
                [0.4323]])

    Source: [Moler2003]_, [AlMohy2009]_.
    """

    def act(  # noqa: D102
        self, generator: Generator, value: Tensor, time: Tensor, clock: Clock, first_hop: bool = False
    ) -> Tensor:
        return mix_by(self.matrix(generator, time, clock), generator, value, first_hop)

    def matrix(self, generator: Generator, time: Tensor, clock: Clock) -> Tensor:
        """E[exp(τQ)] as a matrix: entries ≥ 0, rows sum to 1.

        Args:
            generator: Q on N tokens.
            time: 0-dimensional, (..., 1) or (..., N).
            clock: law of τ.

        Returns:
            (..., N, N), float32 or float64.

        Raises:
            GeneratorError: a clock without a dense form.
        """
        dense = generator.dense()
        with torch.autocast(dense.device.type, enabled=False):
            time = time.to(dense)
            # (..., M, N, N), M = 1 or N: one matrix per query row that has a time of its own.
            flow = (time[..., None, None] if time.dim() else time) * dense.unsqueeze(-3)
            if clock.resolvents is not None:
                mixing = _resolvent(flow / clock.resolvents, clock.resolvents)
            elif isinstance(clock, FixedClock):
                mixing = expm(flow)
            else:
                raise GeneratorError(
                    f"clock: expected FixedClock, ExponentialClock or ErlangClock, got {clock!r}; use method=Uniformization()"
                )
            many = mixing.size(-3) > 1
            mixing = mixing.diagonal(dim1=-3, dim2=-2).mT if many else mixing.squeeze(-3)  # row i of matrix i
            # Squarings double the error of a row sum; rounding can leave −1e-9. Both are known exactly, so put back.
            mixing = mixing.clamp_min(0)
            return mixing / mixing.sum(-1, keepdim=True)


def _resolvent(flow: Tensor, power: int) -> Tensor:
    eye = torch.eye(flow.size(-1), dtype=flow.dtype, device=flow.device)
    return torch.linalg.matrix_power(torch.linalg.solve(eye - flow.mT, eye.expand_as(flow)), power).mT
