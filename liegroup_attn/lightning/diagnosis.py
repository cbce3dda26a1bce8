"""The matrices S, Q and P(t) of one attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from liegroup_attn.generators import SoftmaxGenerator
from liegroup_attn.manifolds import ManifoldTensor, off_manifold
from liegroup_attn.nn import Flow, LieFlow, SelfAttention

__all__ = ["Look", "layer_inputs", "look_at_flow", "look_at_layer", "matrices"]


@dataclass(frozen=True)
class Look:
    """One attention on a few sequences.

    Args:
        mixing: (B, H, N, N), what multiplies the values, as executed.
        chain: (B, H, N, N), S; None where there is none.
        flows: generators (…, H, N, N) by name, dense, along which values flow; none for softmax attention.
        time: (H, 1), t.
        flow: the law of the time, and whether a first hop comes before; None for softmax attention.
        outside: how far its parameters are from where they live.
        title: of the mixing matrix.
    """

    mixing: Tensor
    chain: Tensor | None
    flows: dict[str, Tensor]
    time: Tensor | None
    flow: Flow | None
    outside: Tensor | None
    title: str = "P(t)"

    @property
    def hops_first(self) -> bool:
        """Whether the query jumps before the chain runs."""
        return self.flow is not None and self.flow.first_hop

    def drawn(self, head: int = 0) -> dict[str, Tensor]:
        """S, Q and the mixing matrix of a head for the first sequence, copied; the last alone for softmax."""
        found = {} if self.chain is None else {"S": self.chain}
        shape = self.mixing.shape
        title = f"S·{self.title}" if self.hops_first and self.flows else self.title  # the mixing matrix itself
        parts = {**found, **self.flows, title: self.mixing}
        return {name: m.expand(shape)[0, head].to(torch.float32, copy=True) for name, m in parts.items()}


@torch.no_grad()
def look_at_flow(
    flow: LieFlow, sequences: int, max_tokens: int, generator: SoftmaxGenerator, value: Tensor, method: Any = None
) -> Look:
    """A converted attention, for a call of its flow with these arguments.

    The first ``sequences`` items and ``max_tokens`` tokens. Under a causal mask that is part of what is executed; without
    one it is the chain among these tokens.
    """
    few = generator.first(sequences, min(max_tokens, value.size(-2)))
    # Not flow(…): hooks are for the forward pass that is being looked at.
    eye = torch.eye(few.num_states, dtype=value.dtype, device=value.device)
    mixing = flow.forward(few, eye.expand(*few.batch_shape, -1, -1), method)
    outside = (flow.time - flow.time.clamp(0, flow.max_time)).abs().max()
    time = flow.flow_time().float()
    chain = few.jump_chain()
    return Look(mixing.float(), chain, {"Q": few.dense()}, time, flow, outside)


@torch.no_grad()
def look_at_layer(layer: SelfAttention, x: Tensor, positions: Tensor | None = None) -> Look:
    """An attention layer of this library, for an input (B, N, C) and positions as its ``forward`` takes them."""
    with evaluating(layer):
        mixing = layer.mixing_matrix(x, positions=positions).float()
        found = layer.flows(x, positions)
        eye = torch.eye(x.size(1), dtype=x.dtype, device=x.device).expand(len(x), layer.num_heads, -1, -1)
        chain = found["Q"][0].jump(eye) if "Q" in found else None
        flows = {name: generator.dense() for name, (generator, _) in found.items()}
        time = next((time.float() for _, time in found.values()), None)
    points = [off_manifold(p, p.manifold) for p in layer.parameters() if isinstance(p, ManifoldTensor)]
    outside = torch.stack([p.float().max() for p in points]).max() if points else None
    title = "softmax" if layer.flow is None else "P(t)"
    return Look(mixing, chain, flows, time, layer.flow, outside, title)


def matrices(layer: SelfAttention, x: Tensor, head: int = 0) -> dict[str, Tensor]:
    """S, Q and the mixing matrix of one head for the first sequence of x (B, N, C); the last alone for softmax.

    An ordered product has two generators, Q and Q₊.
    """
    return {name: matrix.cpu() for name, matrix in look_at_layer(layer, x[:1]).drawn(head).items()}


def layer_inputs(model: nn.Module, tokens: Tensor) -> list[tuple[SelfAttention, Tensor]]:
    """Every attention layer of a model with the input it gets for these tokens, in the order of their calls.

    Args:
        model: called as ``model(tokens)``, in eval mode and without gradients.
        tokens: its input.

    Returns:
        Pairs (layer, (B, N, C)).
    """
    seen: list[tuple[SelfAttention, Tensor]] = []
    hooks = [
        m.register_forward_pre_hook(lambda module, args: seen.append((module, args[0].detach())))
        for m in model.modules()
        if isinstance(m, SelfAttention)
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every part is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
