"""The rule by which ``method=None`` chooses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from liegroup_attn.clocks import Clock, FixedClock
from liegroup_attn.expm.base import Method, default_tol, hops_for, mean_hops, per_row
from liegroup_attn.expm.base import longest as most_hops
from liegroup_attn.expm.dense import MatrixExp
from liegroup_attn.expm.low_rank import LowRank
from liegroup_attn.expm.polynomial import products
from liegroup_attn.expm.squaring import ScalingSquaring, squaring_plan
from liegroup_attn.expm.sweep import CausalSweep
from liegroup_attn.expm.triangular import TriangularSolve
from liegroup_attn.expm.uniformization import Uniformization, matrix_first
from liegroup_attn.generators import Generator

__all__ = ["Automatic"]

_MOST_FORMED = 2**26  # entries of all N×N matrices of a call; 256 MiB in float32
_MOST_HOPS = 64
_EXACT = torch.finfo(torch.float32).eps
SOLVE_OVER_HOP = 1.0  # multiply-adds of N hops of width D that one of a solve is worth, over N²; fitted as well


class Automatic(Method):
    """Chooses another method by the generator, the number of hops, the size, the device and the dtype, and lets it act.

    - Resolvents (exponential, Erlang clock): ``CausalSweep`` for causal softmax chains, ``TriangularSolve`` for
      other causal generators, else one dense solve (``MatrixExp``) where hops would cost more.
    - Fixed clock: ``CausalSweep`` for the same chains, else hops: on a formed P while all matrices of the call fit
      into 256 MiB, over fused attention kernels beyond, with dropout, and for half precision on a GPU. Past 64 hops
      ``ScalingSquaring``, while its matrices fit; past 1000 whether they fit or not.
    - Another clock: hops.
    - ``LowRankGenerator``: ``LowRank`` where the closed form holds, else hops.
    - One time per query row: hops.

    Hops, however they are ordered, compute one and the same polynomial of P; so the size at which one replaces another
    does not show in the result. Only solves and squarings are exact where hops leave a tail of ``tol``; at a ``tol`` of the
    rounding unit nothing shows, and squarings replace hops wherever they take fewer products.

    Args:
        tol: largest P(hops > K); default the rounding unit of the input.
        longest: largest mean number of hops that any time can ask for. Given, K is fixed by it and no time is looked at.
        streams: always sweep a causal fixed clock, so that decoding with a cache computes the same.

    Example:
        >>> from liegroup_attn import ExponentialClock, SoftmaxGenerator
        >>> q = torch.zeros(2, 4)
        >>> Q = SoftmaxGenerator(q, q, is_causal=True)
        >>> Automatic().choose(Q, q, torch.tensor(1.0), ExponentialClock())
        CausalSweep(block_size=128)
    """

    def __init__(self, tol: float | None = None, longest: float | None = None, *, streams: bool = False) -> None:
        self.tol = tol
        self.longest = longest
        self.streams = streams

    def act(  # noqa: D102
        self, generator: Generator, value: Tensor, time: Tensor, clock: Clock, first_hop: bool = False
    ) -> Tensor:
        return self.choose(generator, value, time, clock).act(generator, value, time, clock, first_hop)

    def choose(  # noqa: D102
        self, generator: Generator, value: Tensor, time: Tensor, clock: Clock, longest: float | None = None
    ) -> Method:
        if self.longest is None and longest is not None:
            return Automatic(self.tol, longest, streams=self.streams).choose(generator, value, time, clock)
        sweepable = CausalSweep.takes(generator)
        solvable = clock.resolvents is not None and not per_row(time)
        fixed = isinstance(clock, FixedClock) and not per_row(time)
        if generator.factored:
            closed = (solvable or fixed) and LowRank.takes(generator)
            return LowRank() if closed else Uniformization(**self._hops(clock, value))
        if solvable and generator.is_causal:
            return CausalSweep() if sweepable else TriangularSolve()
        sweepable = sweepable and clock.resolvents is None and not generator.dropout_p
        hops_at_most = most_hops(mean_hops(time, generator)) if self.longest is None else self.longest
        tol = default_tol(value.dtype) if self.tol is None else self.tol
        batch = torch.broadcast_shapes(generator.batch_shape, value.shape[:-2], time.shape[:-1])
        formed = generator.formed or (
            generator.num_states**2 * batch.numel() <= _MOST_FORMED
            and not generator.dropout_p
            and not (value.is_cuda and value.dtype.itemsize < 4)
        )
        hops = _count(clock, hops_at_most, tol)
        too_many = hops == math.inf and not generator.dropout_p  # then form N×N, whatever the size
        if (formed or too_many) and not (sweepable and self.streams):
            if solvable and hops * value.size(-1) > SOLVE_OVER_HOP * generator.num_states:
                return MatrixExp()
            if fixed and (hops > _MOST_HOPS or matrix_first(int(hops), *value.shape[-2:])):
                # Squarings are exact, so below the rounding unit they may replace hops unseen.
                if hops > _MOST_HOPS or (tol <= _EXACT and _squaring_cost(hops_at_most, tol) < products(int(hops))):
                    return ScalingSquaring(tol, max_theta=hops_at_most)
                sweepable = False
        knobs = self._hops(clock, value)
        return CausalSweep(**knobs) if sweepable else Uniformization(**knobs, formed=formed)

    def _hops(self, clock: Clock, value: Tensor) -> dict[str, Any]:
        """The knobs of hops: K, if the longest time fixes it, else the tolerance."""
        if self.longest is None:
            return {"tol": self.tol}
        return {"max_terms": hops_for(clock, self.longest, default_tol(value.dtype) if self.tol is None else self.tol)}


def _squaring_cost(theta: float, tol: float) -> int:
    degree, squarings = squaring_plan(theta, tol)
    return products(degree) + squarings


def _count(clock: Clock, longest: float, tol: float) -> float:
    return float(clock.terms(longest, tol)) if longest < 1000 else math.inf
