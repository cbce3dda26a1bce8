"""Argument checks of the Riemannian optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liegroup_attn.errors import DtypeError
from liegroup_attn.manifolds import ManifoldTensor

__all__ = ["check_group", "check_step", "is_narrow", "refuse_compilation", "refuse_ignored", "too_narrow"]

_REMEDIES = {
    "weight_decay": "geoopt's is an L2 penalty inside the gradient; use decay, which is decoupled",
    "decoupled_weight_decay": "geoopt does not heed it; use decay, which is decoupled",
    "maximize": "geoopt does not heed it; negate the loss",
    "amsgrad": "it is not built; leave it out",
    **dict.fromkeys(("foreach", "fused", "capturable", "differentiable"), "geoopt does not heed it; leave it out"),
}


def check_group(group: dict[str, Any]) -> None:
    """Raise on a negative decay, decay of points, or projections every zeroth step."""
    decay, stabilize = group["decay"], group.get("stabilize")
    if not decay >= 0:
        raise ValueError(f"decay: expected a number ≥ 0, got {decay}; 0 is no decay")
    if decay and any(isinstance(p, ManifoldTensor) for p in group["params"]):
        raise ValueError(
            f"decay: expected 0 for parameters on a manifold, got {decay}; put them in a group of their own"
        )
    if stabilize is not None and not stabilize >= 1:
        raise ValueError(f"stabilize: expected a number of steps ≥ 1 or None, got {stabilize}; None never projects")


def check_step(parameter: Tensor, gradient: Tensor) -> None:
    """Raise on points that are complex or in half precision, and on gradients that are not dense."""
    if isinstance(parameter, ManifoldTensor):
        if parameter.is_complex():
            raise DtypeError(
                f"params: expected real points, got complex ones ({parameter.dtype}) on {parameter.manifold}; give them an "
                "optimizer of geoopt.optim, which takes them"
            )
        if is_narrow(parameter):
            raise DtypeError(too_narrow("params", parameter))
    if gradient.layout != torch.strided:
        raise ValueError(
            f"params: expected dense gradients, got one of layout {gradient.layout}; leave out sparse=True of the "
            "embedding, or give its parameter an optimizer for sparse gradients"
        )


def refuse_ignored(group: dict[str, Any]) -> None:
    """Raise on an option that would silently be ignored."""
    for option, remedy in _REMEDIES.items():
        if group.get(option):
            raise ValueError(f"{option}: expected it off, got {group[option]}; {remedy}")


@torch.compiler.disable
def refuse_compilation() -> None:
    """Raise: compiled, a step forgets the manifolds."""
    # Not compiled itself: an exception inside compiled code only sends the compiler to the functions within.
    raise RuntimeError(
        "optimizer: expected a step that is not compiled, got torch.compile(optimizer.step), which forgets the manifolds; "
        "compile the module alone"
    )


def is_narrow(point: ManifoldTensor) -> bool:
    """Whether a point is in half precision, where decompositions do not run and points drift."""
    return torch.finfo(point.dtype).bits < 32  # of a complex number, those of its real part


def too_narrow(name: str, point: ManifoldTensor) -> str:
    """What to say of a point in half precision."""
    precision = "16-true" if point.dtype == torch.float16 else "bf16-true"
    return (
        f"{name}: expected float32 or float64 on {point.manifold}, got {point.dtype}; train with "
        f'Trainer(plugins=ManifoldPrecision("{precision}"))'
    )
