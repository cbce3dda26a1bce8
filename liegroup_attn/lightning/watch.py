"""Forward hooks that look at each attention of a model once, and leave no trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from liegroup_attn.errors import ShapeError
from liegroup_attn.lightning.diagnosis import Look, look_at_flow, look_at_layer
from liegroup_attn.lightning.numbers import numbers_of
from liegroup_attn.nn import LieFlow, SelfAttention

__all__ = ["Watch"]


class Watch:
    """Hooks on the attention of a model, from now until ``close``; each attention is looked at in its first call.

    Numbers are computed in the hook, where parameters are whole under any strategy and autocast is as executed.

    Args:
        model: any module.
        sequences: how many items to look at.
        max_tokens: how many tokens.
        names: of the numbers.
    """

    def __init__(self, model: nn.Module, sequences: int, max_tokens: int, names: Sequence[str]) -> None:
        self._sizes, self._names = (sequences, max_tokens), names
        self._found: dict[str, dict[str, Tensor]] = {}
        self.drawn: dict[str, dict[str, Tensor]] = {}  # path → matrices of the first sequence and head
        flows = {name: m for name, m in model.named_modules() if isinstance(m, LieFlow)}
        inside = {id(flow) for flow in flows.values()}
        self.flows = [name.rpartition(".")[0] or name for name in flows]
        layers = {
            name: m
            for name, m in model.named_modules()
            if isinstance(m, SelfAttention) and not any(id(part) in inside for part in m.modules())
        }
        self.modules = [*self.flows, *layers]
        watched = zip(self.modules, [*flows.values(), *layers.values()], strict=True)
        # Where time is frozen at 0 there is nothing to see, and softmax may be called without the flow.
        self.still = not layers and all(flow.is_still() for flow in flows.values())
        self._hooks = [
            module.register_forward_pre_hook(self._hook(name), with_kwargs=True, prepend=False)
            for name, module in watched
        ]

    def numbers(self) -> dict[str, float]:
        """``lie/<path>/<name>`` → number, with one wait for a GPU."""
        found = {f"lie/{path}/{name}": v for path, all_of in self._found.items() for name, v in all_of.items()}
        return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True)) if found else {}

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A graph that is being compiled must not hold the hook; recomputation calls it again.
            if torch.compiler.is_compiling() or name in self.drawn:
                return
            self._look(name, module, args, kwargs)

        return hook

    def _look(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        device = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).device.type
        on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        # Without its cache, where a cast of a weight that has no gradient must not wait for training (older torch keeps it).
        with torch.no_grad(), torch.autocast(device, dtype, on, cache_enabled=False):
            look = self._look_at(module, args, kwargs)
            self.drawn[name] = look.drawn()
            self._found[name] = numbers_of(look, self._names)

    def _look_at(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Look:
        sequences, max_tokens = self._sizes
        if isinstance(module, LieFlow):
            return look_at_flow(module, sequences, max_tokens, *args, **kwargs)
        layer: Any = module
        x = (args[0] if args else kwargs["x"])[:sequences].detach()
        positions = args[2] if len(args) > 2 else kwargs.get("positions")
        few = positions
        if positions is not None and layer.encoding is not None:
            tokens = -1 - (layer.encoding.axes > 1)
            positions = positions[:sequences] if positions.dim() + tokens > 0 else positions
            few = positions.narrow(tokens, 0, min(max_tokens, positions.size(tokens)))
        try:
            return look_at_layer(layer, x[:, :max_tokens], few)
        except ShapeError:  # made for so many tokens
            return look_at_layer(layer, x, positions)
