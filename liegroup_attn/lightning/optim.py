"""One optimizer for every variant: AdamW on free parameters, Riemannian Adam on manifolds, warm-up and cosine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import geoopt
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from liegroup_attn.manifolds import ManifoldParameter

__all__ = ["RiemannianAdamW", "build_optimizer", "warmup_cosine"]


class RiemannianAdamW(geoopt.optim.RiemannianAdam):
    """geoopt's RiemannianAdam with decoupled weight decay; on free parameters it is ``torch.optim.AdamW``.

    geoopt's own ``weight_decay`` is an L2 penalty inside the gradient and it ignores ``decoupled_weight_decay``:
    comparing it with AdamW would compare two optimizers. It also reloads ``step`` as a float32 tensor.

    Args:
        params: parameters or groups; ``decay`` per group is the decoupled weight decay.
        lr: learning rate.
        betas: as in Adam.
        eps: as in Adam.
        decay: default decoupled weight decay; leave it 0 for parameters on a manifold.
        stabilize: project manifold parameters every so many steps.

    Raises:
        ValueError: decay on a parameter that lives on a manifold.

    Source: [Becigneul2019]_, [Loshchilov2019]_, [Kochurov2020]_.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decay: float = 0.0,
        stabilize: int = 10,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, stabilize=stabilize)
        for group in self.param_groups:
            group.setdefault("decay", decay)
            if group["decay"] and any(isinstance(p, ManifoldParameter) for p in group["params"]):
                raise ValueError(
                    f"decay: expected 0 for parameters on a manifold, got {group['decay']}; put them in a group of their own"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see ``torch.optim.Optimizer.step``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["decay"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.mul_(1 - group["lr"] * group["decay"])
        super().step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, keeping ``step`` an integer so that a resumed run is bitwise the uninterrupted one."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = int(state["step"])


def build_optimizer(
    module: nn.Module, learning_rate: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.95)
) -> Optimizer:
    """One optimizer for a module: AdamW without manifold parameters, else ``RiemannianAdamW``.

    Groups: matrices decay; norms, biases and embeddings do not; parameters on a manifold never do.

    Args:
        module: holds the parameters.
        learning_rate: > 0.
        weight_decay: decoupled, ≥ 0, on matrices only.
        betas: of Adam.

    Returns:
        The optimizer; both kinds make the same steps on free parameters.

    Example:
        >>> [len(g["params"]) for g in build_optimizer(nn.Linear(2, 2), 1e-3).param_groups]
        [1, 1]

    Source: [Loshchilov2019]_, [Kochurov2020]_.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    on_manifold, matrices, others = [], [], []
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(parameter, ManifoldParameter):
            on_manifold.append(parameter)
        elif parameter.dim() >= 2 and id(parameter) not in embeddings:
            matrices.append(parameter)
        else:
            others.append(parameter)
    key = "decay" if on_manifold else "weight_decay"
    groups = [
        {"params": params, key: decay}
        for params, decay in ((matrices, weight_decay), (others, 0.0), (on_manifold, 0.0))
        if params
    ]
    if on_manifold:
        return RiemannianAdamW(groups, lr=learning_rate, betas=betas)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, total_steps: int, floor: float = 0.1) -> LambdaLR:
    """Linear warm-up, then a cosine from 1 to ``floor`` times the learning rate.

    Args:
        optimizer: whose learning rates are scaled.
        warmup_steps: steps of the linear rise.
        total_steps: at which the cosine ends; past it the rate stays at the floor. −1 or inf: no decay.
        floor: last factor.

    Returns:
        The schedule, to be stepped after each optimizer step.

    Source: [Loshchilov2017]_.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if not 0 < total_steps < math.inf:
            return 1.0
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2

    return LambdaLR(optimizer, factor)
