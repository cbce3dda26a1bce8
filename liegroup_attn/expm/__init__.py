"""How E[exp(τQ)]V is computed: a dense reference, uniformization, and a triangular solve."""

from liegroup_attn.expm.base import Method
from liegroup_attn.expm.choice import choose_method
from liegroup_attn.expm.dense import MatrixExp
from liegroup_attn.expm.triangular import TriangularSolve
from liegroup_attn.expm.uniformization import Uniformization

__all__ = ["MatrixExp", "Method", "TriangularSolve", "Uniformization", "choose_method"]
