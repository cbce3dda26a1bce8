"""Estimation of a generator from transition counts: maximum likelihood through exp(tQ), on a manifold of generators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR

from liegroup_attn.errors import DtypeError, ShapeError
from liegroup_attn.functional import transition_matrix
from liegroup_attn.generators import DenseGenerator
from liegroup_attn.lightning.build import build_optimizer
from liegroup_attn.manifolds import RateMatrices, ReversibleRateMatrices, hold

__all__ = ["RateEstimator", "first_order_rates", "negative_log_likelihood"]

_LAST_STEP = 1e-6  # of the first; smaller ones move nothing that matters


class RateEstimator(L.LightningModule):
    """The maximum-likelihood generator of a chain that is seen at some times only.

    The parameter Q is a point on ``RateMatrices``, or on ``ReversibleRateMatrices``; Riemannian Adam moves it, so that it
    never leaves the cone. Training starts from ``first_order_rates`` of a ``TransitionCounts`` data module (of other
    data: from equal rates) and stops by itself once the Riemannian gradient is small, or the steps are.
    The estimate is then written to ``generator.txt`` beside the logs, if there are any.

    Args:
        num_states: n, ≥ 2.
        reversible: whether to keep to generators in detailed balance, n(n + 1)/2 − 1 free numbers instead of n(n − 1).
        learning_rate: size of the first step, root mean square over the free numbers (log-rates).
        half_life: steps in which the learning rate halves.
        tolerance: of the gradient's norm (nats per transition, by log-rates) at which training stops.

    Batches are ``{"counts": (T, n, n), "times": (T,)}``. Logs ``train/loss`` (nats per transition) and
    ``train/gradient``; the test logs ``test/loss`` and, where the batch has the true ``generator``, ``test/error``,
    ‖Q̂ − Q‖ / ‖Q‖ (Frobenius).

    Raises:
        ShapeError: the data have another number of states.
        DtypeError: Q was cast to something else than float64, as by precision ``bf16-true``.

    Example:
        >>> RateEstimator(num_states=2).generator().tolist()
        [[-1.0, 1.0], [1.0, -1.0]]

    Source: Kalbfleisch and Lawless 1985, doi:10.1080/01621459.1985.10478195.
    """

    hparams: Any
    Q: Any

    def __init__(
        self,
        num_states: int = 20,
        reversible: bool = False,
        learning_rate: float = 0.1,
        half_life: int = 100,
        tolerance: float = 1e-6,
    ) -> None:
        super().__init__()
        if num_states < 2:
            raise ValueError(f"num_states: expected at least 2, got {num_states}; one state has no transitions")
        self.save_hyperparameters()
        self.gradient_norm = float("inf")
        rates = torch.full((num_states, num_states), 1 / (num_states - 1), dtype=torch.float64)
        self.start_at(DenseGenerator.from_rates(rates).dense())

    def start_at(self, generator: Tensor) -> None:
        """Make a generator (n, n) with positive rates the parameter; before the optimizer is made."""
        family = ReversibleRateMatrices if self.hparams.reversible else RateMatrices
        hold(self, "Q", generator, family(self.hparams.num_states))

    def generator(self) -> Tensor:
        """Q̂ (n, n)."""
        return self.Q

    def setup(self, stage: str) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "batch"):
            return
        batch, n = data.batch(), self.hparams.num_states
        if batch["counts"].shape[-1] != n:
            raise ShapeError(
                f"num_states: expected the data's {batch['counts'].shape[-1]}, got {n}; set it in the model's arguments"
            )
        if stage == "fit":
            self.start_at(first_order_rates(batch["counts"], batch["times"], reversible=self.hparams.reversible))

    def on_fit_start(self) -> None:
        if self.generator().dtype != torch.float64:
            raise DtypeError(
                f"Q: expected float64, got {self.generator().dtype}; train with the default precision or 64-true"
            )

    def configure_optimizers(self) -> Any:
        # On RateMatrices every rate has a step size of its own. In detailed balance the matrix has one, so the step is as
        # long as if all of its free numbers took a step of this size.
        n, rate = self.hparams.num_states, self.hparams.learning_rate
        free = n * (n + 1) // 2 - 1 if self.hparams.reversible else 1
        optimizer = build_optimizer(self, rate * free**0.5)
        schedule = ExponentialLR(optimizer, 0.5 ** (1 / self.hparams.half_life))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = negative_log_likelihood(self.generator(), batch["counts"], batch["times"])
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradient_norm = float(self.measure_gradient())
        self.log("train/gradient", self.gradient_norm, prog_bar=True, batch_size=1)

    def on_fit_end(self) -> None:
        log_dir = self.trainer.log_dir  # a collective: every process has to ask
        if log_dir is None or not self.trainer.loggers or not self.trainer.is_global_zero:
            return
        path = Path(log_dir) / "generator.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savetxt(path, self.generator().detach().cpu().numpy(), fmt="% .9e")
        rank_zero_info(f"wrote the estimate to {path}")

    def measure_gradient(self) -> Tensor:
        """Norm of the Riemannian gradient: of the loss by log-rates."""
        gradient = self.Q.manifold.egrad2rgrad(self.Q, self.Q.grad)
        return self.Q.manifold.norm(self.Q, gradient).detach()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        group = self.trainer.optimizers[0].param_groups[0]
        if self.gradient_norm <= self.hparams.tolerance or group["lr"] <= _LAST_STEP * group["initial_lr"]:
            self.trainer.should_stop = True

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = negative_log_likelihood(self.generator(), batch["counts"], batch["times"])
        self.log("test/loss", loss, batch_size=1)
        if "generator" in batch:
            truth = batch["generator"]
            error = torch.linalg.matrix_norm(self.generator() - truth) / torch.linalg.matrix_norm(truth)
            self.log("test/error", error, batch_size=1)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Q̂ (n, n)."""
        return self.generator().detach().clone()


def negative_log_likelihood(generator: Tensor, counts: Tensor, times: Tensor) -> Tensor:
    """−Σ n_ij(t) log P_ij(t) / Σ n_ij(t), P(t) = exp(tQ): nats per transition, given the states it starts from.

    Args:
        generator: Q (n, n).
        counts: n_ij(t), (T, n, n), ≥ 0, not all 0.
        times: (T,), > 0.

    Returns:
        0-dimensional; inf if a transition was seen that Q makes impossible.

    Raises:
        ShapeError: sizes that do not fit.
        GeneratorError: Q is no rate matrix, or a time is negative.

    Example:
        >>> Q = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
        >>> negative_log_likelihood(Q, torch.tensor([[[57.0, 43.0], [43.0, 57.0]]]), torch.tensor([1.0]))
        tensor(0.6833)

    Source: Kalbfleisch and Lawless 1985, doi:10.1080/01621459.1985.10478195.
    """
    if counts.shape != (*times.shape, *generator.shape):
        raise ShapeError(
            f"counts: expected (T, n, n) for T = {times.numel()} times and Q {tuple(generator.shape)}, got "
            f"{tuple(counts.shape)}; give one n×n block per time"
        )
    P = transition_matrix(DenseGenerator(generator), times[:, None])  # (T, n, n)
    seen = counts > 0
    return -(counts[seen] * P[seen].log()).sum() / counts.sum()


def first_order_rates(counts: Tensor, times: Tensor, *, reversible: bool = False) -> Tensor:
    """Rates as if a chain jumped at most once between two looks: Σ_t n_ij(t) over the time spent in i.

    Too low where chains jump more often, but positive (half a transition is added everywhere), in the cone whatever the
    counts, and a good start.

    Args:
        counts: (T, n, n).
        times: (T,).
        reversible: count n_ij and n_ji together, so that the time spent in i is the stationary distribution.

    Returns:
        Q (n, n).

    Example:
        >>> first_order_rates(torch.tensor([[[90.0, 10.0], [20.0, 80.0]]]), torch.tensor([0.5]))
        tensor([[-0.2079,  0.2079],
                [ 0.4059, -0.4059]])
    """
    if reversible:
        counts = (counts + counts.mT) / 2
    counts = counts + 0.5 / len(times)
    exposure = (times[:, None] * counts.sum(-1)).sum(0)  # (n,)
    return DenseGenerator.from_rates(counts.sum(0) / exposure[:, None]).dense()
