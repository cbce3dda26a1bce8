"""The exponential clock of a causal generator: one triangular solve."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.clocks import Clock, ExponentialClock
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.expm.base import Method, per_row, working_dtype
from liegroup_attn.generators import Generator

__all__ = ["TriangularSolve"]


class TriangularSolve(Method):
    """(I − tQ)⁻¹V for lower-triangular Q by forward substitution on the formed Q: exact, N²(D + E) work.

    Raises:
        GeneratorError: another clock, or a generator that is not causal.
        ShapeError: one time per query row.

    Example:
        >>> from liegroup_attn import ExponentialClock, SoftmaxGenerator, expm_multiply
        >>> q = torch.zeros(2, 4)
        >>> Q = SoftmaxGenerator(q, q, is_causal=True)
        >>> expm_multiply(Q, torch.tensor([[1.0], [0.0]]), clock=ExponentialClock(), method=TriangularSolve())
        tensor([[1.0000],
                [0.3333]])

    Source: [Fagnou2024]_.
    """

    def act(self, generator: Generator, value: Tensor, time: Tensor, clock: Clock) -> Tensor:  # noqa: D102
        if not isinstance(clock, ExponentialClock):
            raise GeneratorError(
                f"clock: expected ExponentialClock() for TriangularSolve, got {clock!r}; use Uniformization()"
            )
        if per_row(time):
            raise ShapeError(
                f"time: expected one time per head, (..., 1), for TriangularSolve, got {tuple(time.shape)}; "
                "put what varies by token into jump_rates, or use Uniformization()"
            )
        if not generator.is_causal:
            raise GeneratorError("generator: expected is_causal=True for TriangularSolve, got False; use MatrixExp()")
        dense = generator.dense()
        with torch.autocast(value.device.type, enabled=False):
            time = time.to(dense.dtype)
            system = (
                torch.eye(generator.num_states, dtype=dense.dtype, device=dense.device)
                - (time.unsqueeze(-1) if time.dim() else time) * dense
            )
            dtype = torch.promote_types(dense.dtype, working_dtype(value))
            wide = value.to(dtype)
            shape = torch.broadcast_shapes(system.shape[:-2], wide.shape[:-2])
            solution = torch.linalg.solve_triangular(
                system.to(dtype).expand(*shape, *system.shape[-2:]), wide.expand(*shape, *wide.shape[-2:]), upper=False
            )
            return solution.to(value.dtype)
