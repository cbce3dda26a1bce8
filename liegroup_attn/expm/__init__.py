"""How E[exp(τQ)]V is computed: a dense reference, uniformization, a triangular solve, and a low-rank closed form."""

from liegroup_attn.expm.base import Method
from liegroup_attn.expm.choice import choose_method
from liegroup_attn.expm.dense import MatrixExp
from liegroup_attn.expm.low_rank import LowRank
from liegroup_attn.expm.triangular import TriangularSolve
from liegroup_attn.expm.uniformization import Uniformization

__all__ = ["LowRank", "MatrixExp", "Method", "TriangularSolve", "Uniformization", "choose_method"]
