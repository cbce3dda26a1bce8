"""Sharded training (FSDP2) with parameters on manifolds: they are whole on every rank."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from liegroup_attn.manifolds import ManifoldParameter, restore

__all__ = ["replicate"]


@torch.no_grad()
def replicate(module: nn.Module, group: dist.ProcessGroup | None = None) -> set[nn.Parameter]:
    """Keep parameters on manifolds whole on every rank, in step with each other; the rest may be sharded.

    A shard of a point is no point: ``fully_shard`` would turn manifold parameters into plain DTensors and the optimizer
    would leave the manifold without a word. Call this once, before any ``fully_shard``, and hand it what is returned:

    .. code-block:: python

        whole = replicate(model)
        for block in model.blocks:
            fully_shard(block, ignored_params=whole)
        fully_shard(model, ignored_params=whole)

    Values become those of rank 0, and each gradient becomes its mean over the ranks as soon as it is there, as FSDP does
    for what it shards.

    Args:
        module: on its device, not sharded yet.
        group: over which data is parallel; None is all ranks.

    Returns:
        The parameters on manifolds, for ``ignored_params``.

    Raises:
        GeneratorError: a declared parameter is sharded already.
    """
    restore(module)
    whole = {parameter for parameter in module.parameters() if isinstance(parameter, ManifoldParameter)}
    for parameter in (p for p in module.parameters() if p in whole):  # in one order on all ranks
        dist.broadcast(parameter.data, group_src=0, group=group)
        parameter.register_post_accumulate_grad_hook(partial(_average, group=group))
    return whole


def _average(parameter: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    # A mean of means: accumulating gradients over several backwards gives the mean of the sum.
    if parameter.grad is not None:
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad.div_(dist.get_world_size(group))
