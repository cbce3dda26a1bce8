"""K hops on a dense S; one N×N product in the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liegroup_attn.expm.jumps import Plan, Rows, jumped_from, pushes, reverse_block, run_block, step
from liegroup_attn.tensors import pick

__all__ = ["formed_jumps"]


def formed_jumps(chain: Tensor, a: Tensor | None, value: Tensor, plan: Plan) -> Tensor:
    """Jumps of a formed S, explicit recursion.

    Args:
        chain: S, (B, N, N).
        a: (B, N), in [0, 1]; None means 1.
        value: X_0, (B, N, D).
        plan: M.

    Returns:
        J_0 … J_{M−1}, (B, N, M·D).
    """
    return pick(_FormedJumps, _FormedJumpsForwardAD).apply(chain, a, value, plan)


class _FormedJumps(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(chain: Tensor, a: Tensor | None, value: Tensor, plan: Plan) -> Tensor:
        x, found = value, []
        for _ in range(plan.jumps):
            found.append(chain @ x)
            x = step(x, found[-1], a, implicit=False)
        return torch.cat(found, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        chain, a, value, ctx.plan = inputs
        ctx.save_for_backward(chain, a, value, output)
        ctx.save_for_forward(chain, a, value, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        chain, a, value, jumps = ctx.saved_tensors
        iterates = jumped_from(value, jumps, a, ctx.plan)
        whole = Rows(chain, chain[..., :0], chain)
        h, w, da = reverse_block(whole, None, a, iterates, jumps, grad, ctx.plan)
        return (h @ iterates.mT if ctx.needs_input_grad[0] else None), da, w, None


class _FormedJumpsForwardAD(_FormedJumps):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        chain, a, value, jumps = ctx.saved_tensors
        d_chain, d_a, d_value, _ = tangents
        plan = ctx.plan
        iterates = jumped_from(value, jumps, a, plan)
        push = pushes(iterates, jumps, d_a, plan.jumps)
        seen = torch.zeros_like(jumps) if d_chain is None else d_chain @ iterates
        start = torch.zeros_like(value) if d_value is None else d_value
        return run_block(Rows(chain, chain[..., :0], chain), seen, a, start, plan, push)[0]
