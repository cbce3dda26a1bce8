"""Resolvents of a causal generator by triangular solves on its matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.clocks import Clock
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.expm.base import Method, mean_hops, per_row, within, working_dtype
from liegroup_attn.expm.jumps import Plan, Rows, columns, run_block
from liegroup_attn.generators import Generator
from liegroup_attn.tensors import without_autocast

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
        chain, a = generator.uniformized()
        with without_autocast(value):
            dtype = torch.promote_types(chain.dtype, working_dtype(value))
            theta = mean_hops(time, generator).to(value.device) / clock.resolvents
            a = within(theta if a is None else theta * a.to(torch.float64), dtype)
            batch = torch.broadcast_shapes(chain.shape[:-2], value.shape[:-2], a.shape[:-1])
            chain, wide = chain.to(dtype).expand(*batch, -1, -1), value.to(dtype).expand(*batch, -1, -1)
            a = a.expand(*batch, generator.num_states)
            # All rows are one block, before which nothing is known.
            seen = wide.new_zeros(*wide.shape[:-1], clock.resolvents * wide.size(-1))
            plan = Plan(clock.resolvents, implicit=True)
            wide = columns(run_block(Rows(chain, chain[..., :0], chain), seen, a, wide, plan)[1], plan.jumps)[-1]
        mixed = wide.to(value.dtype)
        return generator.jump(mixed) if first_hop else mixed
