"""What is compared: encodings and ways of mixing, as recipes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ENCODINGS", "IMAGE_ENCODINGS", "MIXINGS", "RESCALED", "Choice", "Mixing", "combined", "recipes"]

LENGTH = "train length"  # stands in recipes for the number of tokens trained on
_HALVES = {"layout": "half_split"}
_BLOCK = {"axes": 2, "block": 4}


@dataclass(frozen=True)
class Choice:
    """A way for positions to act.

    Args:
        title: in tables.
        encoding: recipe of ``nn.build_encoding``; None for none.
        attention: what is added to the recipe of attention; then softmax attention, which has none of it, is left out.
    """

    title: str
    encoding: Mapping[str, Any] | None
    attention: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Mixing:
    """A way to mix tokens.

    Args:
        title: in tables.
        attention: recipe of ``nn.build_attention``.
        only: task → encodings that are run beside it, chosen for what they cost before anything was trained; without it all.
    """

    title: str
    attention: Mapping[str, Any]
    only: Mapping[str, Collection[str]] = field(default_factory=dict)


_FEW = ("none", "sinusoidal", "rope", "alibi", "cope", "relative_rates")
MIXINGS = {
    "softmax": Mixing("softmax", {"module": "SoftmaxAttention"}),
    "first_hop": Mixing(
        "first hop + exponential clock",
        {"module": "LieAttention", "first_hop": True, "clock": "ExponentialClock", "time": 1.0, "max_time": 4.0},
    ),
    # Its hops make it the slowest: where cells are long, one encoding of each kind.
    "exp": Mixing(
        "exp(tQ)",
        {"module": "LieAttention", "time": 2.0, "max_time": 4.0},
        {"text": _FEW, "recall": _FEW},
    ),
}
# of sequences, in the order of tables
ENCODINGS = {
    "none": Choice("none", None),
    "sinusoidal": Choice("sinusoidal", {"module": "SinusoidalEncoding"}),
    "learned": Choice("learned table", {"module": "LearnedEncoding", "num_positions": LENGTH}),
    "rope": Choice("RoPE", {"module": "RotaryEncoding", **_HALVES}),
    "xpos": Choice("XPos", {"module": "XPos", **_HALVES}),
    "alibi": Choice("ALiBi", {"module": "ALiBi"}),
    "t5": Choice("T5", {"module": "T5Bias"}),
    "fire": Choice("FIRE", {"module": "FIRE"}),
    "forgetting_gate": Choice("forgetting gate", {"module": "ForgettingGate"}),
    "cope": Choice("CoPE", {"module": "CoPE"}),
    "relative_rates": Choice("relative rates", None, {"plus": {"module": "RelativeRates", "max_distance": 64}}),
    "alibi_rates": Choice("ALiBi as rates", {"module": "ALiBi"}, {"bias_as": "rates"}),
}
# of images: positions on two axes, or in reading order
IMAGE_ENCODINGS = {
    "none": Choice("none", None),
    "sinusoidal": Choice("sinusoidal, reading order", {"module": "SinusoidalEncoding"}),
    "learned": Choice("learned table", {"module": "LearnedEncoding", "num_positions": LENGTH}),
    "rope": Choice("RoPE, reading order", {"module": "RotaryEncoding", **_HALVES}),
    "axial": Choice("axial RoPE", {"module": "AxialRotary", "axes": 2, "base": 100.0, **_HALVES}),
    "mixed": Choice("RoPE-Mixed", {"module": "MixedRotary", "axes": 2, "base": 100.0, **_HALVES}),
    "liere": Choice("LieRE", {"module": "LieRotary", "base": 100.0, **_BLOCK}),
    "string": Choice("Cayley-STRING", {"module": "CayleyString", "axes": 2, "base": 100.0}),
    "comrope_ap": Choice("ComRoPE-AP", {"module": "AxialBlocks", "base": 100.0, **_BLOCK}),
    "comrope_ld": Choice("ComRoPE-LD", {"module": "DependentBlocks", "base": 100.0, **_BLOCK}),
}
# The weights trained with RoPE, its frequencies scaled at a test length of "factor" times that of training.
FACTOR = "factor"
RESCALED: dict[str, Choice] = {
    name: Choice(title, {"module": "RotaryEncoding", **_HALVES, "scaling": scaling})
    for name, title, scaling in (
        ("linear", "RoPE, linear at test", {"module": "LinearScaling", "factor": FACTOR}),
        ("dynamic", "RoPE, dynamic NTK at test", {"module": "DynamicNTK", "factor": 1.0, "original_length": LENGTH}),
        ("yarn", "RoPE, YaRN at test", {"module": "YaRN", "factor": FACTOR, "original_length": LENGTH}),
    )
}


def combined(choice: Choice, mixing: Mixing) -> bool:
    """Whether the two can stand together: softmax attention has no generator for an encoding to be part of."""
    return not choice.attention or mixing.attention["module"] != "SoftmaxAttention"


def recipes(
    choice: Choice, mixing: Mixing, length: int, factor: float = 1.0
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Recipes of attention and encoding, with the numbers in place.

    Args:
        choice: how positions act.
        mixing: how tokens mix.
        length: tokens trained on.
        factor: of a test length over it.
    """
    encoding = None if choice.encoding is None else _filled(choice.encoding, {LENGTH: length, FACTOR: float(factor)})
    return {**mixing.attention, **choice.attention}, encoding


def _filled(recipe: Mapping[str, Any], values: Mapping[str, float]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            found[key] = _filled(value, values)
        else:
            found[key] = values[value] if isinstance(value, str) and value in values else value
    return found
