"""The rule by which ``method=None`` chooses."""

from __future__ import annotations

from liegroup_attn.clocks import Clock, ExponentialClock
from liegroup_attn.expm.base import Method
from liegroup_attn.expm.dense import MatrixExp
from liegroup_attn.expm.triangular import TriangularSolve
from liegroup_attn.expm.uniformization import Uniformization

__all__ = ["choose_method"]

_MOST_HOPS = 64  # past this many hops N³ work is less
_SMALL, _SMALL_HOPS = 64, 12  # at N = 24 one matrix_exp takes the time of about 15 hops, forward and backward
_MOST_FORMED = 4096  # tokens; a formed float32 Q is then 64 MiB per head


def choose_method(
    clock: Clock,
    longest: float,
    tol: float,
    *,
    num_tokens: int,
    is_causal: bool,
    per_row: bool,
    fixed_terms: bool = False,
) -> Method:
    """Choose how to compute E[exp(τQ)]V.

    Args:
        clock: law of τ.
        longest: largest mean number of hops θ.
        tol: tail that the counted hops may leave.
        num_tokens: N.
        is_causal: whether the generator is known to be lower triangular.
        per_row: one time per query row; only hops take that without N matrices.
        fixed_terms: fix K by ``longest`` and ``tol``; else each call looks at its time and goes to the rounding unit.

    Returns:
        ``TriangularSolve`` for a causal exponential clock up to 4096 tokens; ``MatrixExp`` past 64 hops, or past 12
        hops on at most 64 tokens; else ``Uniformization``.

    Example:
        >>> choose_method(ExponentialClock(), 1.0, 1e-3, num_tokens=100, is_causal=True, per_row=False)
        TriangularSolve()
    """
    if not per_row:
        if isinstance(clock, ExponentialClock) and is_causal and num_tokens <= _MOST_FORMED:
            return TriangularSolve()
        hops = clock.terms(longest, tol) if longest < _MOST_HOPS else _MOST_HOPS + 1
        if hops > _MOST_HOPS or (num_tokens <= _SMALL and hops > _SMALL_HOPS):
            return MatrixExp()
    return Uniformization(max_terms=max(1, clock.terms(longest, tol))) if fixed_terms else Uniformization()
