"""Resolvents of a causal generator by triangular solves on its matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.clocks import Clock
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.expm.base import Method, per_row, working_dtype
from liegroup_attn.generators import Generator

__all__ = ["TriangularSolve"]


class TriangularSolve(Method):
    """(I − tQ/s)⁻ˢV for lower-triangular Q by forward substitution on the formed Q: exact, N²(s·D + E) work.

    For the exponential clock (s = 1) and the Erlang clock, and for any causal generator; ``CausalSweep`` does the same
    for a ``SoftmaxGenerator`` without forming Q.

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

    def act(  # noqa: D102
        self, generator: Generator, value: Tensor, time: Tensor, clock: Clock, first_hop: bool = False
    ) -> Tensor:
        if clock.resolvents is None:
            raise GeneratorError(
                f"clock: expected ExponentialClock() or ErlangClock(shape) for TriangularSolve, got {clock!r}; use CausalSweep()"
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
            time = time.to(dense) / clock.resolvents
            eye = torch.eye(generator.num_states, dtype=dense.dtype, device=dense.device)
            system = eye - (time.unsqueeze(-1) if time.dim() else time) * dense
            dtype = torch.promote_types(dense.dtype, working_dtype(value))
            wide = value.to(dtype)
            shape = torch.broadcast_shapes(system.shape[:-2], wide.shape[:-2])
            system = system.to(dtype).expand(*shape, *system.shape[-2:])
            wide = wide.expand(*shape, *wide.shape[-2:])
            for _ in range(clock.resolvents):
                wide = torch.linalg.solve_triangular(system, wide, upper=False)
        mixed = wide.to(value.dtype)
        return generator.jump(mixed) if first_hop else mixed
