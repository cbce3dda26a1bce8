"""Modules: softmax and Lie attention that differ in nothing but how they mix, and a Transformer of either."""

from liegroup_attn.nn.attention import SelfAttention, SoftmaxAttention
from liegroup_attn.nn.cache import AttentionCache, TransformerCache
from liegroup_attn.nn.convert import convert_attention, restore_attention
from liegroup_attn.nn.flow import Flow, scale_time
from liegroup_attn.nn.fold import fold_encoding
from liegroup_attn.nn.generation import sample
from liegroup_attn.nn.learned import LearnedGenerator, LearnedSum, RateMatrix, RelativeRates
from liegroup_attn.nn.lie import LieAttention
from liegroup_attn.nn.lie_flow import LieFlow
from liegroup_attn.nn.mixer import LieMixer
from liegroup_attn.nn.multihead import LieMultiheadAttention
from liegroup_attn.nn.recipe import build_attention, build_encoding
from liegroup_attn.nn.report import ConversionReport, ConvertedLayer
from liegroup_attn.nn.scores import BilinearScores, RateScores, SkewScores, SpectralScores, SymmetricScores
from liegroup_attn.nn.streams import Residual, ResidualStreams
from liegroup_attn.nn.transformer import Transformer

__all__ = [
    "AttentionCache",
    "BilinearScores",
    "ConversionReport",
    "ConvertedLayer",
    "Flow",
    "LearnedGenerator",
    "LearnedSum",
    "LieAttention",
    "LieFlow",
    "LieMixer",
    "LieMultiheadAttention",
    "RateMatrix",
    "RateScores",
    "RelativeRates",
    "Residual",
    "ResidualStreams",
    "SelfAttention",
    "SkewScores",
    "SoftmaxAttention",
    "SpectralScores",
    "SymmetricScores",
    "Transformer",
    "TransformerCache",
    "build_attention",
    "build_encoding",
    "convert_attention",
    "fold_encoding",
    "restore_attention",
    "sample",
    "scale_time",
]
