"""Reads logits, labels and loss from batches and outputs of other people's models; the loss against a teacher."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["counted", "distillation", "logits_of", "part_of", "shifted", "shifts", "takes", "targets_of"]


def takes(model: nn.Module, name: str) -> bool:
    """Whether a model's forward takes an argument of this name."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)


def shifts(model: nn.Module) -> bool:
    """Whether a model's own loss is that of a causal language model of Transformers, by the names of its classes."""
    return any(word in cls.__name__ for cls in type(model).__mro__ for word in ("ForCausalLM", "LMHeadModel"))


def shifted(targets: Tensor) -> Tensor:
    """What each token has to predict, the next one: (..., N) → (..., N), −100 for the last."""
    return F.pad(targets[..., 1:], (0, 1), value=-100)


def counted(logits: Tensor, targets: Tensor | None) -> Tensor | None:
    """Which items or tokens have a class as target, (...) bool; None where targets are none of (..., V)."""
    if targets is None or targets.shape != logits.shape[:-1] or targets.is_floating_point():
        return None
    return targets != -100


def part_of(output: Any, name: str) -> Any:
    """An entry or attribute of an output, None without."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def logits_of(output: Any) -> Tensor:
    """The tensor itself, or what the output calls its logits."""
    logits = output if isinstance(output, Tensor) else part_of(output, "logits")
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"model: expected a tensor, or an output with logits, got {type(output).__name__}; wrap the model in one that "
            "returns its logits"
        )
    return logits


def targets_of(batch: Any) -> Tensor | None:
    """A dict's labels, or the second of a pair."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    if isinstance(batch, tuple | list) and batch:
        return batch[1] if len(batch) > 1 else None
    raise ValueError(
        f"batch: expected a dict of keyword arguments or (inputs, targets), got {type(batch).__name__}; collate to one of them"
    )


def distillation(logits: Tensor, wanted: Tensor, temperature: float = 1.0, targets: Tensor | None = None) -> Tensor:
    """T²·KL(teacher ‖ student), mean over items or tokens; tokens whose target is −100 (padding) do not count.

    Args:
        logits: (..., V), the student's.
        wanted: (..., V), the teacher's.
        temperature: T > 0.
        targets: (...,) or None.

    Returns:
        A number ≥ 0, whose gradient has about the same size at every T.
    """
    log_student, log_teacher = ((x.float() / temperature).log_softmax(-1) for x in (logits, wanted))
    apart = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)  # (...)
    counts = counted(logits, targets)
    if counts is None:
        return temperature**2 * apart.mean()
    return temperature**2 * (apart * counts).sum() / counts.sum().clamp_min(1)
