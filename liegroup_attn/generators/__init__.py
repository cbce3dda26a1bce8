"""The generator Q as a linear operator: what it does to values, its matrix, and a bound on its rates."""

from liegroup_attn.generators.base import Generator
from liegroup_attn.generators.dense import DenseGenerator
from liegroup_attn.generators.low_rank import LowRankGenerator
from liegroup_attn.generators.softmax import SoftmaxGenerator
from liegroup_attn.generators.sums import HeadMixture, ScaledGenerator, SumGenerator

__all__ = [
    "DenseGenerator",
    "Generator",
    "HeadMixture",
    "LowRankGenerator",
    "ScaledGenerator",
    "SoftmaxGenerator",
    "SumGenerator",
]
