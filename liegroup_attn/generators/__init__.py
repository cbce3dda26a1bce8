"""The generator Q as a linear operator: what it does to values, its matrix, and a bound on its rates."""

from liegroup_attn.generators.base import Generator, ScaledGenerator, SumGenerator
from liegroup_attn.generators.dense import DenseGenerator
from liegroup_attn.generators.heads import HeadMixture
from liegroup_attn.generators.low_rank import LowRankGenerator
from liegroup_attn.generators.softmax import SoftmaxGenerator

__all__ = [
    "DenseGenerator",
    "Generator",
    "HeadMixture",
    "LowRankGenerator",
    "ScaledGenerator",
    "SoftmaxGenerator",
    "SumGenerator",
]
