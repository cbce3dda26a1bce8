"""A callback that keeps parameters on their manifolds, and refuses training that would leave them."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from liegroup_attn.errors import DtypeError, GeneratorError
from liegroup_attn.lightning.optim import is_riemannian
from liegroup_attn.manifolds import ManifoldParameter, ManifoldTensor, declared, off_manifold, restore

__all__ = ["ManifoldGuard"]


class ManifoldGuard(L.Callback):
    """Training that never leaves the manifold; does nothing for a model without manifold parameters.

    When a fit starts, every parameter on a manifold (those made by ``manifolds.hold`` and any other ManifoldParameter) has
    to be a ManifoldParameter in at least float32, and to be, that very object, in a Riemannian optimizer without weight
    decay. Otherwise the fit is refused with the name of the parameter and the remedy. A gradient with NaN or inf is
    refused before the step, except under a gradient scaler, which skips such steps by itself.

    Averages of weights (Lightning's ``StochasticWeightAveraging``, ``WeightAveraging``, ``EMAWeightAveraging``) are off the
    manifold; they are projected when they are put into the model.

    Cost: one look at the gradients of manifold parameters per step (on a GPU it waits for them).

    Args:
        every_n_steps: log ``manifold/<name>/distance`` (see ``manifolds.off_manifold``) to every logger, and project,
            every so many optimizer steps.

    Raises:
        ValueError: every_n_steps < 1.

    Example:
        >>> ManifoldGuard(every_n_steps=10).every_n_steps
        10
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps: expected at least 1, got {every_n_steps}; raise it to look less often")
        self.every_n_steps = every_n_steps
        self._parameters: dict[str, ManifoldParameter] = {}
        self._last_step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if mended := restore(pl_module):
            rank_zero_warn(
                f"{', '.join(mended)}: expected parameters on their manifolds, got plain ones; they were made "
                "ManifoldParameters again, look for what replaced them"
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._parameters = checked(pl_module, trainer.optimizers)
        self._last_step = trainer.global_step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_fit_start(trainer, pl_module)  # some strategies load the checkpoint after the first time

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        for name, parameter in self._parameters.items():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                raise GeneratorError(
                    f"{name}: expected a finite gradient, got NaN or inf; the step would lose the point on its manifold. "
                    "Lower the learning rate or look for the loss that diverged"
                )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 and _has(trainer, StochasticWeightAveraging):
            self._project()  # with batch norm it puts the averages in when an epoch starts

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not self._parameters or step == self._last_step or step % self.every_n_steps:
            return
        self._last_step = step
        if trainer.loggers:
            distances = {f"manifold/{name}/distance": float(_distance(p)) for name, p in self._parameters.items()}
            for logger in trainer.loggers:
                logger.log_metrics(distances, step=step - 1)  # where Lightning puts this step's loss
        self._project()

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # Here and not when the epoch starts: every callback has then had its turn to put its averages in.
        if batch_idx == dataloader_idx == 0 and _has(trainer, WeightAveraging):
            self._project()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._project()  # averages are put in when training ends
        self._parameters = {}

    @torch.no_grad()
    def _project(self) -> None:
        for parameter in self._parameters.values():
            parameter.proj_()


def checked(module: nn.Module, optimizers: list[Optimizer]) -> dict[str, ManifoldParameter]:
    """The parameters on manifolds by name, all of them fit for training.

    Args:
        module: holds them.
        optimizers: of the training.

    Returns:
        Full dotted name → parameter.

    Raises:
        GeneratorError: a declared parameter is no ManifoldParameter, is not in an optimizer, or in one that knows nothing
            of manifolds, or decays.
        DtypeError: half precision.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    wanted = declared(module) | {n: p.manifold for n, p in parameters.items() if isinstance(p, ManifoldTensor)}
    for name, manifold in wanted.items():
        parameter = parameters.get(name)
        if not isinstance(parameter, ManifoldParameter):
            raise GeneratorError(
                f"{name}: expected a ManifoldParameter on {manifold}, got {type(parameter).__name__}; call "
                "manifolds.restore(module) before the optimizer is built, and for fully_shard pass "
                "ignored_params=replicate(module)"
            )
        if parameter.dtype not in (torch.float32, torch.float64):
            raise DtypeError(
                f"{name}: expected float32 or float64 on {manifold}, got {parameter.dtype}; train with "
                'Trainer(plugins=ManifoldPrecision("bf16-true"))'
            )
        if parameter.requires_grad and optimizers:
            _check_optimizer(name, parameter, optimizers)
    return {name: parameters[name] for name in wanted}


def _check_optimizer(name: str, parameter: ManifoldParameter, optimizers: list[Optimizer]) -> None:
    homes = [(o, g) for o in optimizers for g in o.param_groups if any(parameter is p for p in g["params"])]
    if not homes:
        raise GeneratorError(
            f"{name}: expected in the optimizer, got none that holds this very parameter; build the optimizer after the "
            "model, with build_optimizer(module, …)"
        )
    for optimizer, group in homes:
        if not is_riemannian(optimizer):
            raise GeneratorError(
                f"{name}: expected a Riemannian optimizer, got {type(optimizer).__name__}; use build_optimizer(module, …)"
            )
        if decay := group.get("decay") or group.get("weight_decay"):
            raise GeneratorError(
                f"{name}: expected decay 0 on a manifold, got {decay}; put it in a group of its own, as build_optimizer does"
            )


def _distance(parameter: ManifoldParameter) -> Tensor:
    return off_manifold(parameter, parameter.manifold)


def _has(trainer: Any, kind: type[L.Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in trainer.callbacks)
