"""Training in half precision with parameters on manifolds in single precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import nn

from liegroup_attn.manifolds import ManifoldParameter, restore

__all__ = ["ManifoldPrecision"]


class ManifoldPrecision(HalfPrecision):
    """Lightning's ``bf16-true`` and ``16-true``, but parameters on a manifold stay in float32.

    In half precision decompositions do not run and points drift: one bfloat16 rounding leaves a unit vector 4e-3 away
    from the sphere. The rest of the module, inputs and activations are in half precision; optimizer states have the dtype
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
        held = [parameter for parameter in module.parameters() if isinstance(parameter, ManifoldParameter)]
        values = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in held]
        half = super().convert_module(module)
        for parameter, value in zip(held, values, strict=True):
            manifold = parameter.manifold
            parameter.data = value if manifold.check_point_on_manifold(value) else manifold.projx(value)
        return half

    def tensor_init_context(self) -> AbstractContextManager:
        return nullcontext()
