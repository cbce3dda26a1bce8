"""How E[exp(τQ)]V is computed: dense references, hops, block sweeps, low rank, and the choice between them."""

from liegroup_attn.expm.base import HopMethod, Method
from liegroup_attn.expm.choice import Automatic
from liegroup_attn.expm.dense import MatrixExp
from liegroup_attn.expm.low_rank import LowRank
from liegroup_attn.expm.squaring import ScalingSquaring
from liegroup_attn.expm.sweep import CausalSweep
from liegroup_attn.expm.triangular import TriangularSolve
from liegroup_attn.expm.uniformization import Uniformization

__all__ = [
    "Automatic",
    "CausalSweep",
    "HopMethod",
    "LowRank",
    "MatrixExp",
    "Method",
    "ScalingSquaring",
    "TriangularSolve",
    "Uniformization",
]
