"""A tiny module with a parameter on each of several manifolds, and its training; run as a script it is one of the processes
of a distributed training: ``python manifold_training.py ddp|fsdp2 STEPS FOLDER``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Dataset, DistributedSampler

from liegroup_attn.lightning import ManifoldGuard, build_optimizer, replicate
from liegroup_attn.lightning.data import ResumableLoader
from liegroup_attn.manifolds import (
    DoublyBalancedRateMatrices,
    FlatRateMatrices,
    ManifoldParameter,
    OpenInterval,
    PositiveVectors,
    RateMatrices,
    ReversibleRateMatrices,
    SpecialOrthogonal,
    Sphere,
    Stiefel,
    StochasticMatrices,
    causal_support,
    hold,
    off_manifold,
)

MANIFOLDS = {
    "interval": (OpenInterval(4.0), (3, 2)),
    "sphere": (Sphere(), (3, 5)),
    "stiefel": (Stiefel(), (2, 5, 3)),
    "rates": (RateMatrices(4), (2, 4, 4)),
    "causal_rates": (RateMatrices(4, causal_support(4)), (4, 4)),
    "flat_rates": (FlatRateMatrices(4), (4, 4)),
    "reversible": (ReversibleRateMatrices(4), (2, 4, 4)),
    "balanced": (DoublyBalancedRateMatrices(4), (4, 4)),
    "stochastic": (StochasticMatrices(), (2, 3, 4)),
    "positive": (PositiveVectors(), (3, 5)),
    "rotations": (SpecialOrthogonal(4), (2, 4, 4)),
}
WIDTH, BATCHES, BATCH = 6, 64, 8  # an epoch is 64 steps
QUIET = {"enable_progress_bar": False, "enable_model_summary": False}


class Vectors(Dataset):
    """Made from their index."""

    def __len__(self) -> int:
        return BATCHES * BATCH

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))


class Places(L.LightningModule):
    """Points drawn to targets off their manifolds, harder or softer from batch to batch, and a free network."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.build()

    def build(self) -> None:
        self.points, self.targets = nn.Module(), nn.Module()
        torch.manual_seed(3)
        for name, (manifold, shape) in MANIFOLDS.items():
            hold(self.points, name, manifold.random(*shape), manifold)
            self.targets.register_buffer(name, 2 * torch.randn(shape))
        self.net = nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Dropout(0.1), nn.Linear(4, 1))

    def held(self) -> dict[str, ManifoldParameter]:
        return {name: getattr(self.points, name) for name in MANIFOLDS}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        pull = sum((point - getattr(self.targets, name)).square().mean() for name, point in self.held().items())
        return pull * (1 + batch.square()).mean() + self.net(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("validation/distance", float(self.distance()), on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self, 1e-2, 0.1, optimizer=self.optimizer)

    def train_dataloader(self) -> ResumableLoader:
        world, data = self.trainer.world_size, Vectors()
        sampler = DistributedSampler(data, world, self.trainer.global_rank, shuffle=False)
        return ResumableLoader(data, batch_size=BATCH // world, sampler=sampler)

    def distance(self) -> float:
        """The largest over all points, computed in float64 by each manifold's projection."""
        points = self.held().values()
        return max(float(off_manifold(point.double(), point.manifold)) for point in points)


class Sharded(Places):
    """The network is sharded, points are whole."""

    def configure_model(self) -> None:
        mesh, whole = self.device_mesh["data_parallel"], replicate(self)
        fully_shard(self.net, mesh=mesh, ignored_params=whole)
        fully_shard(self, mesh=mesh, ignored_params=whole)


def main(way: str, steps: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    strategy = "ddp" if way == "ddp" else ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    model = {"ddp": Places, "fsdp2": Sharded}[way]().eval()
    options = {"logger": False, "enable_checkpointing": False, "use_distributed_sampler": False} | QUIET
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=steps, callbacks=[ManifoldGuard()], **options
    )
    trainer.fit(model)
    values = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    kinds = {name: type(point).__name__ for name, point in model.held().items()}
    result = {"values": {name: v.detach().clone() for name, v in values.items()}, "kinds": kinds}
    torch.save(result | {"distance": model.distance()}, folder / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
