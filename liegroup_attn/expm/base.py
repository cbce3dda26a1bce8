"""The contract of a method, and the dtype in which iterates are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from liegroup_attn.clocks import Clock
from liegroup_attn.generators import Generator

__all__ = ["Method", "per_row", "working_dtype"]


class Method(ABC):
    """How E[exp(τQ)]V is computed; its knobs live in the object."""

    @abstractmethod
    def act(self, generator: Generator, value: Tensor, time: Tensor, clock: Clock) -> Tensor:
        """E[exp(τQ)] · value.

        Args:
            generator: Q on N tokens.
            value: (..., N, D).
            time: mean of τ, ≥ 0: 0-dimensional, or (..., 1), or (..., N) for one time per query row.
            clock: law of τ.

        Returns:
            (..., N, D), dtype of ``value``.
        """

    def __repr__(self) -> str:
        knobs = ", ".join(f"{k}={v!r}" for k, v in vars(self).items())
        return f"{type(self).__name__}({knobs})"


def working_dtype(value: Tensor) -> torch.dtype:
    """At least float32: half precision would round every hop."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def per_row(time: Tensor) -> bool:
    """Whether the time differs from query row to query row."""
    return time.dim() > 0 and time.size(-1) > 1
