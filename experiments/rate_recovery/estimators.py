"""The estimators that are compared; each makes Q̂ from counts and times, and says how it went."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.rate_recovery.counts import TransitionCounts
from experiments.rate_recovery.model import RateEstimator
from liegroup_attn.algebra import is_rate_matrix, logm, project_cone
from liegroup_attn.errors import ConvergenceError, GeneratorError
from liegroup_attn.generators import DenseGenerator

__all__ = ["ESTIMATORS", "Found", "SoftplusRates"]

MOST_STEPS = 3000  # beyond, the learning rate has vanished


class Found(NamedTuple):
    """Q̂ (n, n), or None where there is none, and plain facts about the way to it."""

    generator: Tensor | None
    facts: dict[str, Any]


class SoftplusRates(RateEstimator):
    """The control: rates softplus(θ), θ free, plain Adam; the same start, loss and rule to stop."""

    def start_at(self, generator: Tensor) -> None:
        off = ~torch.eye(len(generator), dtype=torch.bool)
        self.theta = nn.Parameter(torch.where(off, generator, 1).expm1().log())

    def generator(self) -> Tensor:
        return DenseGenerator.from_rates(F.softplus(self.theta)).dense()

    def measure_gradient(self) -> Tensor:
        if self.theta.grad is None:
            raise GeneratorError("theta: expected a gradient, got none; call backward first")
        return self.theta.grad.norm()


def fit(model: RateEstimator, data: TransitionCounts) -> Found:
    """Maximum likelihood: train until the gradient is small."""
    start = time.process_time()
    with _quiet():
        trainer = L.Trainer(
            max_steps=MOST_STEPS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, datamodule=data)
    facts = {
        "steps": trainer.global_step,
        "cpu_seconds": time.process_time() - start,
        "gradient": model.gradient_norm,
        "converged": model.gradient_norm <= model.hparams.tolerance,
    }
    return Found(model.generator().detach().clone(), facts)


def logarithms(data: TransitionCounts) -> Found:
    """Mean over the times of log(P̂(t)) / t, P̂(t) the frequencies; times without a real logarithm are left out."""
    batch = data.batch()
    found: list[Tensor] = []
    problems: list[str | None] = []
    for counts, when in zip(batch["counts"], batch["times"], strict=True):
        try:
            frequencies = counts / counts.sum(-1, keepdim=True)
            found.append(logm(frequencies[None])[0] / when)
            problems.append(None)
        except (GeneratorError, ConvergenceError) as problem:
            problems.append(str(problem).partition(";")[0])
    inside = [is_rate_matrix(matrix)[0] for matrix in found]
    mean = torch.stack(found).mean(0) if found else None
    facts = {
        "exists": [problem is None for problem in problems],
        "problems": problems,
        "times_in_cone": sum(inside),
        "in_cone": mean is not None and is_rate_matrix(mean)[0],
        "negative_rates": 0 if mean is None else int((mean - torch.diag(mean.diagonal()) < 0).sum()),
    }
    return Found(mean, facts)


def projected_logarithms(data: TransitionCounts) -> Found:
    """The same, then the nearest rate matrix."""
    found = logarithms(data)
    return Found(None if found.generator is None else project_cone(found.generator), found.facts)


def _states(data: TransitionCounts) -> int:
    return data.batch()["counts"].size(-1)


# In the order of tables and legends.
ESTIMATORS: dict[str, Callable[[TransitionCounts], Found]] = {
    "reversible": lambda data: fit(RateEstimator(_states(data), reversible=True), data),
    "likelihood": lambda data: fit(RateEstimator(_states(data)), data),
    "softplus": lambda data: fit(SoftplusRates(_states(data)), data),
    "projected": projected_logarithms,
    "logarithm": logarithms,
}


@contextmanager
def _quiet() -> Any:
    """Without Lightning's notes on devices, workers and loggers: there are hundreds of fits."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)
