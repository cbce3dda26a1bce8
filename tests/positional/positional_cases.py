"""The table of encodings that the laws run over: a new encoding is one row here."""

from collections.abc import Callable
from typing import Any, NamedTuple

from liegroup_attn.positional import (
    ALiBi,
    LearnedEncoding,
    PositionalEncoding,
    RotaryEncoding,
    SinusoidalEncoding,
    T5Bias,
)

C, H, D, N = 16, 2, 8, 12  # model width, heads, head width, tokens


class Case(NamedTuple):
    build: Callable[[], PositionalEncoding]
    relative: bool = True  # whether the relative law is claimed
    orthogonal: bool = True  # of a rotation encoding: R Rᵀ = I
    recipe: dict[str, Any] | None = None  # of a Transformer of width C with H heads that builds the same


CASES = {
    "sinusoidal": Case(lambda: SinusoidalEncoding(C), relative=False, recipe={"module": "SinusoidalEncoding"}),
    "learned": Case(
        lambda: LearnedEncoding(C, 64),
        relative=False,
        recipe={"module": "LearnedEncoding", "num_positions": 64},
    ),
    "rotary": Case(
        lambda: RotaryEncoding(D, layout="half_split"),
        recipe={"module": "RotaryEncoding", "layout": "half_split"},
    ),
    "rotary interleaved": Case(
        lambda: RotaryEncoding(D, layout="interleaved", base=500.0),
        recipe={"module": "RotaryEncoding", "layout": "interleaved", "base": 500.0},
    ),
    "alibi": Case(lambda: ALiBi(H), recipe={"module": "ALiBi"}),
    "t5": Case(lambda: T5Bias(H, is_causal=False)),
    "t5 causal": Case(lambda: T5Bias(H, is_causal=True)),
}
