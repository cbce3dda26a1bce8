"""Training in half precision with parameters on manifolds in single precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import Tensor, nn

from liegroup_attn.manifolds import ManifoldParameter, restore
from liegroup_attn.nn import LieFlow

__all__ = ["ManifoldPrecision"]


class ManifoldPrecision(HalfPrecision):
    """Lightning's ``bf16-true`` and ``16-true``, but parameters on a manifold and those of flows stay in float32.

    In half precision decompositions do not run and points drift: one bfloat16 rounding leaves a unit vector 4e-3 away
    from the sphere; and times and rates of flows (``nn.LieFlow``, what ``convert_attention`` puts in) stay where they are, as
    steps of less than 1/256 of them round to nothing. The rest of the module, inputs and activations are in half precision; optimizer states have the dtype
    of their parameters.

    Modules made in ``configure_model`` or ``Trainer.init_module`` are made in float32 and converted after, so that initial
    values on manifolds are not rounded.

    Args:
        precision: "bf16-true" or "16-true".

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(accelerator="cpu", logger=False, plugins=ManifoldPrecision("bf16-true"))
        >>> trainer.precision
        'bf16-true'
    """

    def convert_module(self, module: nn.Module) -> nn.Module:
        restore(module)
        held = {n: p for n, p in module.named_parameters(remove_duplicate=False) if isinstance(p, ManifoldParameter)}
        kept = {name: (point.manifold, _unrounded(point)) for name, point in held.items()}
        flows = {id(p) for m in module.modules() if isinstance(m, LieFlow) for p in m.parameters()}
        of_flows = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in module.named_parameters(remove_duplicate=False)
            if id(p) in flows and name not in kept
        }
        half = super().convert_module(module)
        for name, value in of_flows.items():
            half.get_parameter(name).data = value
        for name, (manifold, value) in kept.items():
            # Where torch swaps or overwrites parameters when it converts them, a plain one stands there now.
            parameter: Any = half.get_parameter(name)
            parameter.__class__, parameter.manifold = ManifoldParameter, manifold
            parameter.data = value
        return half

    def tensor_init_context(self) -> AbstractContextManager:
        return nullcontext()


@torch.no_grad()
def _unrounded(point: ManifoldParameter) -> Tensor:
    """A copy in at least float32, on the manifold."""
    value = point.detach().to(torch.promote_types(point.dtype, torch.float32), copy=True).as_subclass(Tensor)
    if value.is_meta or point.manifold.check_point_on_manifold(value):
        return value
    return point.manifold.projx(value)
