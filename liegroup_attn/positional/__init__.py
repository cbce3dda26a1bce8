"""How a position acts: on tokens, on queries and keys, or on the scores. One encoding, one file."""

from liegroup_attn.positional.alibi import ALiBi
from liegroup_attn.positional.base import (
    AbsoluteEncoding,
    BiasEncoding,
    PositionalEncoding,
    RotationEncoding,
    grid_positions,
)
from liegroup_attn.positional.learned import LearnedEncoding
from liegroup_attn.positional.pairs import PairRotation, turn_pairs
from liegroup_attn.positional.rotary import RotaryEncoding
from liegroup_attn.positional.sinusoidal import SinusoidalEncoding
from liegroup_attn.positional.t5 import T5Bias

__all__ = [
    "ALiBi",
    "AbsoluteEncoding",
    "BiasEncoding",
    "LearnedEncoding",
    "PairRotation",
    "PositionalEncoding",
    "RotaryEncoding",
    "RotationEncoding",
    "SinusoidalEncoding",
    "T5Bias",
    "grid_positions",
    "turn_pairs",
]
