"""The table of encodings that the laws run over: a new encoding is one row here."""

from collections.abc import Callable
from typing import Any, NamedTuple

from liegroup_attn.positional import (
    ALiBi,
    AxialBlocks,
    CayleyString,
    CirculantString,
    DependentBlocks,
    LearnedEncoding,
    LieRotary,
    PlaneRotary,
    PositionalEncoding,
    RotaryEncoding,
    SinusoidalEncoding,
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
}
