"""How a position acts: on tokens, on queries and keys, or on the scores. One encoding, one file."""

from liegroup_attn.positional.alibi import ALiBi
from liegroup_attn.positional.base import (
    AbsoluteEncoding,
    BiasEncoding,
    PositionalEncoding,
    RotationEncoding,
    grid_positions,
)
from liegroup_attn.positional.blocks import BlockExponential
from liegroup_attn.positional.comrope import AxialBlocks, DependentBlocks
from liegroup_attn.positional.heads import FoldedRotary, HeadRotation
from liegroup_attn.positional.laws import (
    commutator_norm,
    position_similarity,
    relative_law_residual,
    score_decay,
)
from liegroup_attn.positional.learned import LearnedEncoding
from liegroup_attn.positional.liere import LieRotary
from liegroup_attn.positional.pairs import PairRotation, turn_pairs
from liegroup_attn.positional.planes import PlaneRotary, rodrigues
from liegroup_attn.positional.rotary import RotaryEncoding
from liegroup_attn.positional.sinusoidal import SinusoidalEncoding
from liegroup_attn.positional.string_encoding import CayleyString, CirculantString

__all__ = [
    "ALiBi",
    "AbsoluteEncoding",
    "AxialBlocks",
    "BiasEncoding",
    "BlockExponential",
    "CayleyString",
    "CirculantString",
    "DependentBlocks",
    "FoldedRotary",
    "HeadRotation",
    "LearnedEncoding",
    "LieRotary",
    "PairRotation",
    "PlaneRotary",
    "PositionalEncoding",
    "RotaryEncoding",
    "RotationEncoding",
    "SinusoidalEncoding",
    "commutator_norm",
    "grid_positions",
    "position_similarity",
    "relative_law_residual",
    "rodrigues",
    "score_decay",
    "turn_pairs",
]
