"""A callback that keeps parameters on their manifolds, and refuses training that would leave them."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from liegroup_attn.errors import DtypeError, GeneratorError
from liegroup_attn.lightning.optim import is_riemannian
from liegroup_attn.lightning.refusals import is_narrow, too_narrow
from liegroup_attn.lightning.stored_flows import warn_of_rounded_flows
from liegroup_attn.manifolds import ManifoldParameter, ManifoldTensor, declared, off_manifold, restore

__all__ = ["ManifoldGuard"]

_TOLERANCE = 1e-5  # geoopt's


class ManifoldGuard(L.Callback):
    """Training that never leaves the manifold; of a model without manifold parameters it only looks at flows.

    When a fit starts, every parameter on a manifold (those made by ``manifolds.hold`` and any other ManifoldParameter) has
    to be a ManifoldParameter in at least float32, and to be, that very object, in a Riemannian optimizer without weight
    decay. Otherwise the fit is refused with the name of the parameter and the remedy. One that starts off its manifold is
    projected with a warning; NaN is refused. A gradient with NaN or inf is refused before the step, except under a gradient
    scaler, which skips such steps by itself. Where gradients are clipped this goes for free parameters too: their NaN
    would reach all gradients by the norm. Flows (``nn.LieFlow``) that learn in half precision are warned of.

    Averages of weights (Lightning's ``StochasticWeightAveraging``, ``WeightAveraging``, ``EMAWeightAveraging``) are off the
    manifold; they are projected when they are put into the model. After a validation the averages go on unprojected.

    Cost: one look at the gradients of manifold parameters per step, of all when they are clipped (on a GPU it waits for
    them).

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
        self._averages: dict[str, Tensor] = {}  # unprojected, during a validation
        self._last_step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if mended := restore(pl_module):
            rank_zero_warn(
                f"{', '.join(mended)}: expected parameters on their manifolds, got plain ones; they were made "
                "ManifoldParameters again, look for what replaced them"
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._parameters = checked(pl_module, trainer.optimizers)
        for name, parameter in self._parameters.items():
            _settle(name, parameter)
        self._last_step = trainer.global_step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_fit_start(trainer, pl_module)  # some strategies load the checkpoint after the first time
        warn_of_rounded_flows(pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if not self._parameters or getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        # Lightning clips after this hook.
        clipped = trainer.gradient_clip_val or is_overridden("configure_gradient_clipping", pl_module)
        watched = dict(pl_module.named_parameters()) if clipped else self._parameters
        for name, parameter in watched.items():
            if not _is_finite(parameter.grad):
                raise GeneratorError(
                    f"{name}: expected a finite gradient, got NaN or inf; the step would lose the points on manifolds. "
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
        if not self._averages and _has(trainer, WeightAveraging):
            self._averages = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
            self._project()

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._averages:
            home = self._home_of_averages(trainer, pl_module)
            for name, average in self._averages.items():
                home.get_parameter(name).copy_(average)
            self._averages = {}

    def _home_of_averages(self, trainer: Any, pl_module: L.LightningModule) -> nn.Module:
        """Where the averages are when a validation ends: an averaging callback before this one has swapped them back."""
        before = trainer.callbacks[: trainer.callbacks.index(self)]
        swapped: Any = next((callback for callback in before if isinstance(callback, WeightAveraging)), None)
        return pl_module if swapped is None else swapped._average_model.module

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._project()  # averages are put in when training ends
        self._parameters, self._averages = {}, {}

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
        if is_narrow(parameter):
            raise DtypeError(too_narrow(name, parameter))
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


@torch.no_grad()
def _settle(name: str, parameter: ManifoldParameter) -> None:
    distance = float(_distance(parameter))
    if math.isnan(distance):
        raise GeneratorError(
            f"{name}: expected a point of {parameter.manifold}, got NaN or inf; start from a point of it"
        )
    # As in ``hold``: a rate of 0 is as near as can be, and yet no point.
    on, reason = parameter.manifold.check_point_on_manifold(parameter.detach(), explain=True)
    if distance > _TOLERANCE or not on:
        rank_zero_warn(
            f"{name}: expected a point of {parameter.manifold}, got one that is {distance:.2g} off; it was projected, "
            f"make it with manifolds.hold{'' if reason is None else f' ({reason})'}"
        )
        parameter.proj_()


def _is_finite(gradient: Any) -> bool:
    if gradient is None:
        return True
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient  # of a DTensor, this process's part
    return bool(torch.isfinite(local).all())


def _distance(parameter: ManifoldParameter) -> Tensor:
    return off_manifold(parameter, parameter.manifold)


def _has(trainer: Any, kind: type[L.Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in trainer.callbacks)
