"""The rate-matrix Lie algebra: exponential and logarithm."""

from liegroup_attn.algebra.exponential import dexp, expm
from liegroup_attn.algebra.logarithm import logm
from liegroup_attn.algebra.membership import is_rate_matrix

__all__ = ["dexp", "expm", "is_rate_matrix", "logm"]
