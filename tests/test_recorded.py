"""Values and gradients of the public calls, as they were when they were known to be right: a redesign must keep them.

Rows are in recorded.json, each named by a call and its choices; every two choices that go together meet in some row. Of a
tensor one number is kept, a sum under weights in which any change shows. No random generator matters.
``python tests/test_recorded.py`` chooses the rows anew and writes what the code now computes: only from a state whose values
are known to be right.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import CLOCKS, RATE_FNS
from covering import cover
from recorded_calls import ALL_MASKS, ALL_METHODS, CALLS, ENCODINGS, GENERATORS, GUESTS, RECIPES, SCORES, Choice
from torch import Tensor

from liegroup_attn.errors import ConvergenceError

PATH = Path(__file__).with_name("recorded.json")
RECORDED: dict[str, dict[str, float]] = json.loads(PATH.read_text()) if PATH.exists() else {}
TOLERANCE = 1e-12

LAYER_MASKS = "causal", "none", "key padding", "block", "float bias", "causal, left padding", "open"
FEW_ENCODINGS = "none", "rotary", "alibi", "t5", "fire", "forgetting", "planes"
LIE_CLOCKS = {"clock": ("fixed", "exponential", "erlang"), "hop": ("no", "yes")}
# The first choice of an axis is what names leave out, and the one with which most others go: recorded rows depend on it.
AXES: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": {
        **LIE_CLOCKS,
        "method": tuple(ALL_METHODS),
        "mask": ALL_MASKS,
        "rates": tuple(RATE_FNS),
        "rho": ("none", "0.5", "per token"),
        "time": ("0.75", "per head", "per row", "several", "90", "0", "0, learned"),
        "bias": ("none", "per head"),
        "plus": ("none", "dense", "offsets", "low rank"),
        "weights": ("none", "per head"),
        "heads": ("all", "grouped"),
        "scale": ("default", "0.3"),
    },
    "across": {"mask": ("none", "bool", "empty row", "float"), "bias": ("none", "per head")},
    "flow": {
        "generator": tuple(GENERATORS),
        "clock": tuple(CLOCKS),
        "method": (*(name for name in ALL_METHODS if "recomputed" not in name), "matrix"),
        "time": ("0.75", "per head", "per row", "several", "90", "0"),
    },
    "generator": {"generator": tuple(GENERATORS)},
    "lie": {
        **LIE_CLOCKS,
        "rates": ("jump chain", "softplus"),
        "plus": ("none", "relative", "matrix", "sum", "relative, ordered", "matrix, ordered"),
        "weights": ("none", "per head"),
        "encoding": FEW_ENCODINGS,
        "bias_as": ("scores", "rates"),
        "scores": tuple(SCORES),
        "learn": ("time, ρ", "time", "ρ", "nothing"),
        "heads": ("all", "grouped"),
        "mask": LAYER_MASKS,
        "method": ("default", "matrix exp", "uniformization", "streams"),
        "longer": ("1", "1.7"),
    },
    "softmax": {"encoding": tuple(ENCODINGS), "heads": ("all", "grouped"), "mask": LAYER_MASKS[:2]},
    "converted": {
        "time": ("0.4", "0"),
        **LIE_CLOCKS,
        "learn": ("time, ρ", "time", "ρ", "nothing"),
        "encoding": FEW_ENCODINGS,
        "heads": ("all", "grouped"),
        "mask": LAYER_MASKS,
        "longer": ("1", "1.7"),
    },
    "mixer": {
        "plus": ("relative", "matrix", "sum"),
        "clock": tuple(CLOCKS),
        "method": ("default", "matrix exp", "formed hops", "triangular"),
        "mask": ("causal", "none"),
        "longer": ("1", "1.7"),
    },
    "multihead": {
        "time": ("0.4", "0"),
        **LIE_CLOCKS,
        "learn": ("time, ρ", "time"),
        "mask": ("none", "causal", "hint", "float", "per head"),
        "padding": ("none", "bool", "float"),
        "weights": ("none", "mean", "each"),
        "layout": ("batch first", "tokens first", "no batch"),
    },
    "decode": {
        "kind": ("lie", "softmax", "converted 0.4", "converted 0"),
        **LIE_CLOCKS,
        "encoding": ("none", "rotary", "alibi", "t5", "fire"),
        "heads": ("all", "grouped"),
        "method": ("default", "matrix exp", "uniformization", "sweep", "four terms"),
        "learn": ("time, ρ", "time"),
        "chunks": ("3+1+1+2", "7", "1+6"),
        "then": ("end", "crop", "reorder"),
    },
    "transformer": {"recipe": tuple(RECIPES), "mask": ("causal", "none"), "converts": ("no", "yes")},
    "torch layer": {"time": ("0.4", "0"), "mask": ("none", "causal")},
    "guest": {
        "guest": tuple(GUESTS),
        "time": ("0.4", "0"),
        "clock": ("FixedClock", "ExponentialClock", "ErlangClock(2)"),
        "padding": ("none", "left", "right"),
    },
    "guest decode": {
        "guest": ("llama", "gemma"),
        "time": ("0.4", "0"),
        "clock": ("FixedClock", "ExponentialClock", "ErlangClock(2)"),
        "chunks": ("3+1+3", "7"),
    },
}


def compute(name: str) -> dict[str, Tensor]:
    call, *given = name.split(" | ")
    default = {axis: choices[0] for axis, choices in AXES[call].items()}
    return CALLS[call](Choice(**default | dict(choice.split("=") for choice in given)))


def projection(tensor: Tensor) -> tuple[float, float]:
    """A number in which any change shows, and the size of what it is a sum of."""
    flat = tensor.detach().as_subclass(Tensor).double().flatten()
    k = torch.arange(len(flat), dtype=torch.float64)
    return float(flat @ ((0.9 * k + 0.9).cos() + (2.3 * k + 2.3).cos())), 2 * float(flat.abs().sum())


@pytest.mark.parametrize("name", RECORDED)
def test_values_and_gradients_are_those_recorded(name: str) -> None:
    found, recorded = compute(name), RECORDED[name]
    assert sorted(found) == sorted(recorded)
    # Other people's models rotate in float32, which instruction sets round differently.
    tolerance = 1e-9 if name.startswith("guest") else TOLERANCE
    for part, tensor in found.items():
        number, size = projection(tensor)
        assert abs(number - recorded[part]) <= tolerance * max(1.0, size), (part, number, recorded[part])


# --- choosing rows anew


def named(call: str, row: tuple[str, ...]) -> str:
    chosen = zip(AXES[call].items(), row, strict=True)
    return " | ".join([call, *(f"{axis}={choice}" for (axis, choices), choice in chosen if choice != choices[0])])


def runs(name: str) -> bool:
    """Whether these choices go together; the library says what does not."""
    try:
        found = compute(name)
    except (ValueError, ConvergenceError):
        return False
    return all(bool(tensor.isfinite().all()) for tensor in found.values())


def rows(call: str, tries: int = 120) -> Iterator[str]:
    """A covering table of what runs: of every pair of choices, the others are drawn until it does."""
    axes, draw = tuple(AXES[call].values()), random.Random(0)
    every = itertools.product(*axes) if math.prod(map(len, axes)) <= tries else ()
    found = {row: runs(named(call, row)) for row in every}
    for i, j in itertools.combinations(range(len(axes)), 2) if not found else ():
        for a, b in itertools.product(axes[i], axes[j]):
            for _ in range(tries):
                row = [axis[0] if draw.random() < 0.5 else draw.choice(axis) for axis in axes]
                row[i], row[j] = a, b
                if found.setdefault(tuple(row), None) is None:
                    found[tuple(row)] = runs(named(call, tuple(row)))
                if found[tuple(row)]:
                    break
    kept = [row for row, ran in found.items() if ran]
    yield from (named(call, kept[i]) for i in cover(kept))


def write() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines = []
    for call in CALLS:
        for name in rows(call):
            numbers = {part: round(projection(tensor)[0], 14) for part, tensor in compute(name).items()}
            row = json.dumps({name: numbers}, ensure_ascii=False, separators=(",", ":"))
            lines.append(row[1:-1])
        print(call, len(lines), "rows so far", flush=True)
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write()
