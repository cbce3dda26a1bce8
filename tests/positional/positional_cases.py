"""The table of encodings that the laws run over: a new encoding is one row here."""

from collections.abc import Callable
from typing import Any, NamedTuple

from liegroup_attn.positional import (
    FIRE,
    ALiBi,
    AxialBlocks,
    AxialRotary,
    CayleyString,
    CirculantString,
    CoPE,
    DependentBlocks,
    DynamicNTK,
    ForgettingGate,
    LearnedEncoding,
    LieRotary,
    LinearScaling,
    Llama3Scaling,
    LongRoPE,
    MixedRotary,
    PlaneRotary,
    PositionalEncoding,
    RotaryEncoding,
    SinusoidalEncoding,
    T5Bias,
    XPos,
    YaRN,
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
    "rotary partial": Case(
        lambda: RotaryEncoding(D, layout="half_split", rotary_width=4),
        recipe={"module": "RotaryEncoding", "layout": "half_split", "rotary_width": 4},
    ),
    "rotary linear": Case(
        lambda: RotaryEncoding(D, layout="half_split", scaling=LinearScaling(factor=4.0)),
        recipe={
            "module": "RotaryEncoding",
            "layout": "half_split",
            "scaling": {"module": "LinearScaling", "factor": 4.0},
        },
    ),
    "rotary dynamic": Case(
        lambda: RotaryEncoding(D, layout="half_split", scaling=DynamicNTK(factor=4.0, original_length=N)),
        relative=False,  # only within a call: beyond the original length, frequencies change
        recipe={
            "module": "RotaryEncoding",
            "layout": "half_split",
            "scaling": {"module": "DynamicNTK", "factor": 4.0, "original_length": N},
        },
    ),
    "rotary yarn": Case(
        lambda: RotaryEncoding(
            D, layout="half_split", scaling=YaRN(factor=4.0, original_length=2048, attention_factor=1.0)
        ),
        recipe={
            "module": "RotaryEncoding",
            "layout": "half_split",
            "scaling": {"module": "YaRN", "factor": 4.0, "original_length": 2048, "attention_factor": 1.0},
        },
    ),
    "rotary longrope": Case(
        lambda: RotaryEncoding(
            D,
            layout="half_split",
            scaling=LongRoPE(short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.0, 2.0, 3.0, 4.0], original_length=N),
        ),
        relative=False,  # only within a call: beyond the original length, frequencies change
        recipe={
            "module": "RotaryEncoding",
            "layout": "half_split",
            "scaling": {
                "module": "LongRoPE",
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 2.0, 3.0, 4.0],
                "original_length": N,
            },
        },
    ),
    "rotary llama3": Case(
        lambda: RotaryEncoding(
            D,
            layout="half_split",
            scaling=Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=64),
        ),
        recipe={
            "module": "RotaryEncoding",
            "layout": "half_split",
            "scaling": {
                "module": "Llama3Scaling",
                "factor": 8.0,
                "low_frequency_factor": 1.0,
                "high_frequency_factor": 4.0,
                "original_length": 64,
            },
        },
    ),
    "axial 1-D": Case(
        lambda: AxialRotary(D, layout="half_split", axes=1),
        recipe={"module": "AxialRotary", "layout": "half_split", "axes": 1},
    ),
    "axial 2-D": Case(
        lambda: AxialRotary(D, layout="half_split", axes=2),
        recipe={"module": "AxialRotary", "layout": "half_split", "axes": 2},
    ),
    "axial 4-D": Case(
        lambda: AxialRotary(D, layout="half_split", axes=4),
        recipe={"module": "AxialRotary", "layout": "half_split", "axes": 4},
    ),
    "mixed 1-D": Case(
        lambda: MixedRotary(D, H, layout="half_split", axes=1),
        recipe={"module": "MixedRotary", "layout": "half_split", "axes": 1},
    ),
    "mixed 2-D": Case(
        lambda: MixedRotary(D, H, layout="half_split", axes=2),
        recipe={"module": "MixedRotary", "layout": "half_split", "axes": 2},
    ),
    "mixed 3-D": Case(
        lambda: MixedRotary(D, H, layout="half_split", axes=3),
        recipe={"module": "MixedRotary", "layout": "half_split", "axes": 3},
    ),
    "xpos": Case(
        lambda: XPos(D, layout="half_split"),
        orthogonal=False,
        recipe={"module": "XPos", "layout": "half_split"},
    ),
    "alibi": Case(lambda: ALiBi(H), recipe={"module": "ALiBi"}),
    "fire": Case(lambda: FIRE(H, threshold=5.0), relative=False, recipe={"module": "FIRE", "threshold": 5.0}),
    "forgetting gate": Case(lambda: ForgettingGate(C, H), recipe={"module": "ForgettingGate"}),
    "cope": Case(lambda: CoPE(H, D, max_positions=6), recipe={"module": "CoPE", "max_positions": 6}),
    "lie, 1 axis": Case(
        lambda: LieRotary(D, H, block=4),
        recipe={"module": "LieRotary", "block": 4},
    ),
    "lie, dense, 1 axis": Case(
        lambda: LieRotary(D, H, block=8),
        recipe={"module": "LieRotary", "block": 8},
    ),
    "lie, planes, 2 axes": Case(
        lambda: LieRotary(D, H, axes=2, block=2),
        recipe={"module": "LieRotary", "axes": 2, "block": 2},
    ),
    "lie, blocks, 2 axes": Case(
        lambda: LieRotary(D, H, axes=2, block=4),
        relative=False,
        recipe={"module": "LieRotary", "axes": 2, "block": 4},
    ),
    "axial blocks, 1 axis": Case(
        lambda: AxialBlocks(D, H, block=4),
        recipe={"module": "AxialBlocks", "block": 4},
    ),
    "axial blocks, 2 axes": Case(
        lambda: AxialBlocks(D, H, axes=2, block=4),
        recipe={"module": "AxialBlocks", "axes": 2, "block": 4},
    ),
    "dependent blocks, 1 axis": Case(
        lambda: DependentBlocks(D, H, block=4),
        recipe={"module": "DependentBlocks", "block": 4},
    ),
    "dependent blocks, 2 axes": Case(
        lambda: DependentBlocks(D, H, axes=2, block=4),
        recipe={"module": "DependentBlocks", "axes": 2, "block": 4},
    ),
    "cayley string, 1 axis": Case(
        lambda: CayleyString(D, H),
        recipe={"module": "CayleyString"},
    ),
    "cayley string, 2 axes": Case(
        lambda: CayleyString(D, H, axes=2),
        recipe={"module": "CayleyString", "axes": 2},
    ),
    "circulant string, 1 axis": Case(
        lambda: CirculantString(D, H),
        recipe={"module": "CirculantString"},
    ),
    "circulant string, 2 axes": Case(
        lambda: CirculantString(D, H, axes=2),
        recipe={"module": "CirculantString", "axes": 2},
    ),
    "planes, 1 axis": Case(
        lambda: PlaneRotary(D, H),
        recipe={"module": "PlaneRotary"},
    ),
    "planes, 2 axes": Case(
        lambda: PlaneRotary(D, H, num_planes=3, axes=2),
        recipe={"module": "PlaneRotary", "num_planes": 3, "axes": 2},
    ),
    "t5": Case(
        lambda: T5Bias(H, is_causal=True, num_buckets=8, max_distance=16),
        recipe={"module": "T5Bias", "num_buckets": 8, "max_distance": 16},
    ),
}
