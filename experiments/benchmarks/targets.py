"""What the library set out to reach, beside what was measured."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from experiments.benchmarks.competitors import BASE
from experiments.benchmarks.conversion import FROZEN, STEPS, WATCHING
from experiments.benchmarks.conversion import PLAIN as UNCONVERTED
from experiments.benchmarks.measure import PHASES
from experiments.benchmarks.parts import ON_MANIFOLD, PLAIN
from experiments.benchmarks.positions import CHAIN, FOLDED, OTHERS, OURS, ROPE
from experiments.benchmarks.summary import Result, Spread, attention_cell, find, peak, ratio, seconds, spread

__all__ = ["Target", "targets"]

FIXED = ("exp, Uniformization", "exp, Uniformization, formed S")
FIXED_CAUSAL = ("exp causal, CausalSweep", "exp causal, Uniformization")
EXPONENTIAL = ("first hop + exponential, CausalSweep", "first hop + exponential, TriangularSolve")
SLOW = "torch.matrix_exp"
AT_1024 = "N = 1024, forward + backward"


class Target(NamedTuple):
    """One line: ``by`` names the row that was measured; no ``measured`` if there was none."""

    what: str
    sign: str  # "≥" or "≤"
    needed: float
    measured: Spread | None
    by: str = ""
    unit: str = "×"

    @property
    def reached(self) -> bool | None:
        """By the median; None if not measured."""
        compare: Callable[[float, float], bool] = operator.ge if self.sign == "≥" else operator.le
        return None if self.measured is None else compare(self.measured.median, self.needed)


def targets(result: Result) -> list[Target]:
    """Every target, whether measured or not."""
    return [
        *_fixed(result),
        *_causal(result),
        *_memory(result),
        *_low_rank(result),
        *_decode(result),
        *_small(result),
        *_step(result),
        *_conversion(result),
        *_positions(result),
    ]


def _fixed(result: Result) -> Iterator[Target]:
    cell = attention_cell(result, 1024, PHASES[1])
    what = f"fixed clock, θ = 1, tail 1e-3, {AT_1024}"
    for base, sign, needed, words in (
        ("exp, torch.matrix_exp", "≥", 60.0, "torch.matrix_exp takes as many times as long"),
        ("exp, dopri5 (GRAND-l)", "≥", 5.0, "dopri5, at no larger error, takes as many times as long"),
    ):
        yield Target(f"{what}: {words}", sign, needed, *_most(cell, FIXED, base))
    yield Target(f"{what}: time over SDPA", "≤", 4.0, *_least(cell, FIXED, BASE))


def _causal(result: Result) -> Iterator[Target]:
    cell, base = attention_cell(result, 1024, PHASES[1]), f"{BASE}, causal"
    what = "time over causal SDPA"
    yield Target(f"fixed clock, causal, θ = 1, {AT_1024}: {what}", "≤", 4.0, *_least(cell, FIXED_CAUSAL, base))
    yield Target(
        f"first hop + exponential clock, causal, {AT_1024}: {what}", "≤", 2.0, *_least(cell, EXPONENTIAL, base)
    )


def _memory(result: Result) -> Iterator[Target]:
    for words, rows in (
        ("fixed clock", FIXED[:1]),
        ("fixed clock, causal", FIXED_CAUSAL),
        ("first hop + exponential clock, causal", EXPONENTIAL[:1]),
    ):
        found = {row: peak(result, row, 32768, PHASES[0]) for row in rows}
        known = {row: value / 2**20 for row, value in found.items() if value is not None}
        by = min(known, key=lambda row: known[row]) if known else ""
        measured = spread([known[by]]) if known else None
        yield Target(f"{words}, N = 32768, one head, forward: peak beyond the inputs", "≤", 512.0, measured, by, " MiB")


def _low_rank(result: Result) -> Iterator[Target]:
    small, large = (attention_cell(result, tokens, PHASES[1]) for tokens in (16384, 32768))
    for row in ("exp low rank, closed form", "exp low rank, causal hops"):
        pairs = [a / b for a in seconds(large, row) for b in seconds(small, row)]
        measured = spread(pairs) if pairs else None
        yield Target("low rank, time at N = 32768 over N = 16384, forward + backward", "≤", 2.2, measured, row)


def _decode(result: Result) -> Iterator[Target]:
    cell: dict[str, Any] = next(iter(find(result, part="decode")), {})
    for row, needed in (("first hop + exponential clock", 0.8), ("exp, fixed clock, 5 hops", 0.5)):
        what = f"{row}: tokens a second over those of softmax, decoding at context {cell.get('context', 2048)}"
        yield Target(what, "≥", needed, ratio(cell, "softmax", row), row)


def _small(result: Result) -> Iterator[Target]:
    """Where ``method=None`` gains least: over d at θ = 1, and over d and θ."""
    what = "256 matrices of N = 64, forward + backward, {}: torch.matrix_exp takes as many times as long"
    gains = []
    for cell in find(result, part="small", tokens=64):
        measured, by = _most(cell, ["method=None"], SLOW)
        if measured is not None:
            gains.append((measured, f"{by}, d = {cell['width']}, θ = {cell['time']:g}", cell["time"]))
    for words, kept in (("θ = 1", [gain for gain in gains if gain[2] == 1.0]), ("least over θ", gains)):
        measured, by, _ = min(kept, key=lambda gain: gain[0].median, default=(None, "", 0.0))
        yield Target(what.format(words), "≥", 3.0, measured, by)


def _step(result: Result) -> Iterator[Target]:
    for cell in find(result, part="optimizer"):  # it may have been measured elsewhere, in a file of its own
        size = f"{cell['heads']} heads of {cell['tokens']}×{cell['tokens']} rate matrices"
        what = f"one Riemannian Adam step, {size}: time over AdamW on as many plain parameters"
        yield Target(what, "≤", 4.0, ratio(cell, ON_MANIFOLD, PLAIN), ON_MANIFOLD)


def _conversion(result: Result) -> Iterator[Target]:
    for cell in find(result, part="conversion"):
        what = f"{cell['model']}, time frozen at 0, training step: time over that of the model as it was"
        yield Target(what, "≤", 1.1, ratio(cell, FROZEN, UNCONVERTED), FROZEN)
    for cell in find(result, part="monitor"):
        what = f"GeneratorMonitor every {STEPS} steps: training time over that without it"
        over = ratio(cell, WATCHING[1], WATCHING[0])
        every = None if over is None else Spread(*(1 + (step - 1) / STEPS for step in over))
        yield Target(what, "≤", 1.02, every, "GeneratorMonitor, its cheap numbers")


def _positions(result: Result) -> Iterator[Target]:
    for cell in find(result, part="rope", kind="compiled"):
        what = "RoPE of query and key, compiled, forward + backward: time over a multiply-add of the same bytes"
        for row in OURS:
            yield Target(what, "≤", 1.3, ratio(cell, row, CHAIN), row)
    for cell in find(result, part="rope", kind="eager"):
        known = [name for name in OTHERS if seconds(cell, name)]
        rival = min(known, key=lambda name: spread(seconds(cell, name)).median, default="others' RoPE")
        what = f"RoPE of query and key, eager, forward + backward: time over {rival}, the faster of others'"
        for row in OURS:
            yield Target(what, "≤", 1.0, ratio(cell, row, rival), row)
    for cell in find(result, part="folded"):
        for row in FOLDED:
            if row != ROPE:
                yield Target("encoding folded, inference: time over RoPE", "≤", 1.5, ratio(cell, row, ROPE), row)


def _least(cell: dict[str, Any], rows: Sequence[str], base: str) -> tuple[Spread | None, str]:
    """The fastest of the rows: its time over the base's, and its name."""
    found = {row: over for row in rows if (over := ratio(cell, row, base)) is not None}
    by = min(found, key=lambda row: found[row].median) if found else ""
    return found.get(by), by


def _most(cell: dict[str, Any], rows: Sequence[str], base: str) -> tuple[Spread | None, str]:
    """The base's time over that of the fastest of the rows, and its name."""
    found = {row: over for row in rows if (over := ratio(cell, base, row)) is not None}
    by = max(found, key=lambda row: found[row].median) if found else ""
    return found.get(by), by
