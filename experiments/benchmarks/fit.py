"""The factors of the choice rule, from the benchmark's own measurements of many small matrices."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from liegroup_attn.clocks import Clock, ExponentialClock, FixedClock
from liegroup_attn.expm.polynomial import products

__all__ = ["HOPS", "SOLVE", "Question", "best_factor", "regret"]

FACTORS = tuple(2 ** (k / 4) for k in range(-16, 33))


class Question(NamedTuple):
    """Two methods, and when the second is taken: if its count times the factor … is less than that of the first."""

    first: str
    second: str
    takes_second: Callable[[float, int, int, int], bool]  # (factor, hops, N, D)
    clock: Clock


HOPS = Question(
    "formed S, hop by hop",
    "formed S, polynomial",
    lambda factor, hops, n, d: (products(hops) + 1) * n < factor * hops * d,
    FixedClock(),
)
SOLVE = Question(
    "resolvent, formed S",
    "resolvent, solve",
    lambda factor, hops, n, d: hops * d > factor * n,
    ExponentialClock(),
)


def regret(cells: dict[str, Any], question: Question, factor: float) -> float:
    """How many times as long as the better of both the rule takes, geometric mean over the cells of the part ``small``."""
    return math.exp(statistics.mean(math.log(taken / better) for taken, better in _outcomes(cells, question, factor)))


def best_factor(cells: dict[str, Any], question: Question) -> float:
    """The factor of least regret; the middle one of those that share it."""
    least = min(regret(cells, question, factor) for factor in FACTORS)
    return statistics.median_low(f for f in FACTORS if regret(cells, question, f) <= least + 1e-9)


def _outcomes(cells: dict[str, Any], question: Question, factor: float) -> Iterator[tuple[float, float]]:
    for cell in cells.values():
        if cell["part"] != "small" or question.first not in cell["rows"]:
            continue
        first, second = (statistics.median(cell["rows"][name]["seconds"]) for name in question[:2])
        hops = question.clock.terms(cell["time"], torch.finfo(torch.float32).eps)
        taken = second if question.takes_second(factor, hops, cell["tokens"], cell["width"]) else first
        yield taken, min(first, second)
