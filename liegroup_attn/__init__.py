"""Lie-group attention: scores → rates → generator Q → exp(tQ)V."""

import importlib
from typing import Any

from liegroup_attn.clocks import ErlangClock, ExponentialClock, FixedClock
from liegroup_attn.expm import CausalSweep, LowRank, MatrixExp, ScalingSquaring, TriangularSolve, Uniformization
from liegroup_attn.feature_maps import RandomFeatures, elu_plus_one
from liegroup_attn.functional import expm_multiply, lie_attention, transition_matrix
from liegroup_attn.generators import DenseGenerator, LowRankGenerator, SoftmaxGenerator
from liegroup_attn.rates import exponential, softplus, squared_relu

__version__ = "0.1.0"

__all__ = [
    "CausalSweep",
    "DenseGenerator",
    "ErlangClock",
    "ExponentialClock",
    "FixedClock",
    "LowRank",
    "LowRankGenerator",
    "MatrixExp",
    "RandomFeatures",
    "ScalingSquaring",
    "SoftmaxGenerator",
    "TriangularSolve",
    "Uniformization",
    "elu_plus_one",
    "expm_multiply",
    "exponential",
    "lie_attention",
    "softplus",
    "squared_relu",
    "transition_matrix",
]

_LAZY = ("algebra", "integrations", "lightning", "manifolds", "metrics", "nn", "plots", "positional")


def __getattr__(name: str) -> Any:
    # Imported on first use: geoopt, lightning and matplotlib take seconds, and the verbs need torch only.
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_LAZY])
