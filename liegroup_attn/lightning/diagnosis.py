"""What there is to see of one attention: its matrices S, Q and P(t), and numbers made from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from liegroup_attn.clocks import Clock, FixedClock
from liegroup_attn.lightning.numbers import CHEAP, NUMBERS
from liegroup_attn.manifolds import ManifoldTensor, off_manifold
from liegroup_attn.nn import LieFlow, SelfAttention, SoftmaxAttention

__all__ = ["Look", "diagnose", "layer_inputs", "look_at_flow", "look_at_layer", "matrices"]


@dataclass(frozen=True)
class Look:
    """One attention on a few sequences.

    Args:
        mixing: (B, H, N, N), what multiplies the values, as executed.
        chain: (B, H, N, N), S; None where there is none.
        flows: generators (…, H, N, N) by name, dense, along which values flow; none for softmax attention.
        time: (H, 1), t.
        clock: the law of the time.
        first_hop: whether a first hop comes before.
        outside: how far its parameters are from where they live.
        title: of the mixing matrix.
    """

    mixing: Tensor
    chain: Tensor | None
    flows: dict[str, Tensor]
    time: Tensor | None
    clock: Clock
    first_hop: bool
    outside: Tensor | None
    title: str = "P(t)"

    def numbers(self, names: Sequence[str] = CHEAP) -> dict[str, Tensor]:
        """Numbers of ``NUMBERS`` that this attention has, by name."""
        found = {name: NUMBERS[name](self) for name in names}
        return {name: value.float() for name, value in found.items() if value is not None}

    def drawn(self, head: int = 0) -> dict[str, Tensor]:
        """S, Q and the mixing matrix of a head for the first sequence, copied; the last alone for softmax."""
        found = {} if self.chain is None else {"S": self.chain}
        shape = self.mixing.shape
        title = f"S·{self.title}" if self.first_hop and self.flows else self.title  # the mixing matrix itself
        parts = {**found, **self.flows, title: self.mixing}
        return {name: m.expand(shape)[0, head].to(torch.float32, copy=True) for name, m in parts.items()}


@torch.no_grad()
def look_at_flow(
    flow: LieFlow,
    sequences: int,
    max_tokens: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
    **options: Any,
) -> Look:
    """A converted attention, for a call with these arguments; those of ``LieFlow.forward``.

    The first ``sequences`` items and ``max_tokens`` tokens. Under a causal mask that is part of what is executed; without
    one it is the chain among these tokens.
    """
    n = min(query.size(-2), max_tokens)
    q, k, v = (x.detach()[:sequences, :, :n] for x in (query, key, value))
    mask = rest[0] if rest else options.get("attn_mask")
    mask = None if mask is None else _cropped(mask.detach(), sequences, n)
    same: dict[str, Any] = {name: options[name] for name in ("is_causal", "scale") if name in options}
    if (bias := options.get("score_bias")) is not None:
        same["score_bias"] = _cropped(bias.detach(), sequences, n)
    # Not flow(…): hooks are for the forward pass that is being looked at.
    _, mixing = flow.forward(q, k, v, mask, need_weights=True, closed=True, **same)
    generator = flow.generator(q, k, v, mask, **same)
    outside = (flow.time - flow.time.clamp(0, flow.max_time)).abs().max()
    time = flow.flow_time().float()
    flows, clock = {"Q": generator.dense()}, flow.clock
    return Look(mixing.float(), generator.jump_chain(), flows, time, clock, flow.first_hop, outside)  # type: ignore[union-attr]


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
    inside = getattr(layer, "lie", layer)  # of a converted one
    clock = getattr(inside, "clock", None) or FixedClock()
    title = "softmax" if isinstance(layer, SoftmaxAttention) and not flows else "P(t)"
    return Look(mixing, chain, flows, time, clock, bool(getattr(inside, "first_hop", False)), outside, title)


def _cropped(mask: Tensor, sequences: int, n: int) -> Tensor:
    """Of a mask that broadcasts to (B, H, N, N), the first sequences and tokens; sizes of 1 stay."""
    if mask.dim() > 3:
        mask = mask[:sequences]
    if mask.dim() > 1:
        mask = mask[..., :n, :]
    return mask[..., :n]


def diagnose(layer: SelfAttention, x: Tensor, names: Sequence[str] = CHEAP) -> dict[str, float]:
    """The monitor's numbers for one layer and its input (B, N, C)."""
    return {name: float(value) for name, value in look_at_layer(layer, x).numbers(names).items()}


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
