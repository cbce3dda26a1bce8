"""One optimizer for every variant, its parameter groups, warm-up and cosine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from liegroup_attn.lightning.optim import RiemannianAdamW, RiemannianSGD
from liegroup_attn.manifolds import ManifoldTensor, restore
from liegroup_attn.nn import LieFlow
from liegroup_attn.positional import PositionalEncoding

__all__ = ["build_optimizer", "warmup_cosine"]


def build_optimizer(
    module: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    *,
    manifold_learning_rate: float | None = None,
    lie_learning_rate: float | None = None,
    optimizer: Callable[..., Optimizer] | None = None,
) -> Optimizer:
    """One optimizer for a module: AdamW without manifold parameters, else ``RiemannianAdamW``; or one of your choice.

    Groups: matrices decay; norms, biases and embeddings do not; parameters on a manifold, and those of flows that
    ``convert_attention`` has put in (a group of their own), never do. Declared parameters
    that have become plain ones are first made manifold parameters again, see ``manifolds.restore``.

    Args:
        module: holds the parameters.
        learning_rate: > 0.
        weight_decay: decoupled, ≥ 0, on matrices only.
        betas: of Adam.
        manifold_learning_rate: ≥ 0, of parameters on a manifold; None is ``learning_rate``, 0 keeps them as they are.
            Steps there are measured by the manifold's metric.
        lie_learning_rate: ≥ 0, of the flows (``nn.LieFlow``) in a converted model; None is ``learning_rate``. They start
            at 0 and have to move by about 1, while weights that are trained already move little.
        optimizer: ``RiemannianSGD`` or ``RiemannianAdamW``, or a ``functools.partial`` of one that sets its options;
            called with the groups and ``lr``. None chooses Adam as said above, with ``betas``.

    Returns:
        The optimizer; both kinds of Adam make the same steps on free parameters.

    Raises:
        ValueError: ``manifold_learning_rate`` or ``lie_learning_rate`` negative; another optimizer than those named.

    Example:
        >>> [len(g["params"]) for g in build_optimizer(nn.Linear(2, 2), 1e-3).param_groups]
        [1, 1]
        >>> from functools import partial
        >>> chosen = partial(RiemannianSGD, momentum=0.9, nesterov=True)
        >>> type(build_optimizer(nn.Linear(2, 2), 1e-1, optimizer=chosen)).__name__
        'RiemannianSGD'

    Source: [Loshchilov2019]_, [Kochurov2020]_.
    """
    for name, rate in (("manifold", manifold_learning_rate), ("lie", lie_learning_rate)):
        if rate is not None and not rate >= 0:
            raise ValueError(
                f"{name}_learning_rate: expected a number ≥ 0, got {rate}; None is learning_rate, 0 keeps points as they are"
            )
    restore(module)
    on_manifold, matrices, others, of_flows = _sort_parameters(module)
    key = "decay" if on_manifold or optimizer is not None else "weight_decay"
    groups: list[dict[str, Any]] = [
        {"params": params, key: decay} | ({} if rate is None else {"lr": rate})
        for params, decay, rate in (
            (matrices, weight_decay, None),
            (others, 0.0, None),
            (on_manifold, 0.0, manifold_learning_rate),
            (of_flows, 0.0, lie_learning_rate),
        )
        if params
    ]
    if optimizer is not None:
        built = optimizer(groups, lr=learning_rate)
        if not isinstance(built, RiemannianAdamW | RiemannianSGD):
            raise ValueError(
                f"optimizer: expected RiemannianSGD or RiemannianAdamW, got {type(built).__name__}; others know nothing "
                "of manifolds and of decay per group"
            )
        return built
    if on_manifold:
        return RiemannianAdamW(groups, lr=learning_rate, betas=betas)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)


def _sort_parameters(module: nn.Module) -> tuple[list[nn.Parameter], ...]:
    """Those on a manifold, matrices, the others, and those of flows in a converted model."""
    flowing = {id(p) for m in module.modules() if isinstance(m, LieFlow) for p in m.parameters()}
    kept = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    # Frequencies, tables and bases of rotations are no weights: 0 is no simpler than any other value.
    kept |= {id(p) for m in module.modules() if isinstance(m, PositionalEncoding) for p in m.parameters()}
    on_manifold: list[nn.Parameter] = []
    matrices, others, of_flows = on_manifold.copy(), on_manifold.copy(), on_manifold.copy()
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(parameter, ManifoldTensor):
            on_manifold.append(parameter)
        elif id(parameter) in flowing:
            of_flows.append(parameter)
        elif parameter.dim() >= 2 and id(parameter) not in kept:
            matrices.append(parameter)
        else:
            others.append(parameter)
    return on_manifold, matrices, others, of_flows


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
