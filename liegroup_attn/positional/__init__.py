"""How a position acts: on tokens, on queries and keys, or on the scores. One encoding, one file."""

from liegroup_attn.positional.alibi import ALiBi
from liegroup_attn.positional.axial import AxialRotary
from liegroup_attn.positional.base import AbsoluteEncoding, PositionalEncoding, RotationEncoding, grid_positions
from liegroup_attn.positional.bias import BiasEncoding
from liegroup_attn.positional.blocks import BlockExponential
from liegroup_attn.positional.comrope import AxialBlocks, DependentBlocks
from liegroup_attn.positional.cope import CoPE
from liegroup_attn.positional.fire import FIRE
from liegroup_attn.positional.forgetting import ForgettingGate
from liegroup_attn.positional.heads import FoldedRotary, HeadRotation
from liegroup_attn.positional.laws import (
    commutator_norm,
    position_similarity,
    relative_law_residual,
    score_decay,
)
from liegroup_attn.positional.learned import LearnedEncoding
from liegroup_attn.positional.liere import LieRotary
from liegroup_attn.positional.mixed import MixedRotary
from liegroup_attn.positional.pairs import PairRotation, convert_layout, turn_pairs
from liegroup_attn.positional.planes import PlaneRotary, rodrigues
from liegroup_attn.positional.rotary import RotaryEncoding
from liegroup_attn.positional.scaling import DynamicNTK, FrequencyScaling, LinearScaling, Llama3Scaling, LongRoPE, YaRN
from liegroup_attn.positional.sinusoidal import SinusoidalEncoding
from liegroup_attn.positional.string_encoding import CayleyString, CirculantString
from liegroup_attn.positional.t5 import T5Bias
from liegroup_attn.positional.unipotent import unipotent_generator, unipotent_scores
from liegroup_attn.positional.xpos import XPos

__all__ = [
    "FIRE",
    "ALiBi",
    "AbsoluteEncoding",
    "AxialBlocks",
    "AxialRotary",
    "BiasEncoding",
    "BlockExponential",
    "CayleyString",
    "CirculantString",
    "CoPE",
    "DependentBlocks",
    "DynamicNTK",
    "FoldedRotary",
    "ForgettingGate",
    "FrequencyScaling",
    "HeadRotation",
    "LearnedEncoding",
    "LieRotary",
    "LinearScaling",
    "Llama3Scaling",
    "LongRoPE",
    "MixedRotary",
    "PairRotation",
    "PlaneRotary",
    "PositionalEncoding",
    "RotaryEncoding",
    "RotationEncoding",
    "SinusoidalEncoding",
    "T5Bias",
    "XPos",
    "YaRN",
    "commutator_norm",
    "convert_layout",
    "grid_positions",
    "position_similarity",
    "relative_law_residual",
    "rodrigues",
    "score_decay",
    "turn_pairs",
    "unipotent_generator",
    "unipotent_scores",
]
