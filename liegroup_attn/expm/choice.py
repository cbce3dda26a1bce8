"""The rule by which ``method=None`` chooses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liegroup_attn.clocks import Clock
from liegroup_attn.expm.base import Method, default_tol, per_row
from liegroup_attn.expm.dense import MatrixExp
from liegroup_attn.expm.low_rank import LowRank
from liegroup_attn.expm.squaring import ScalingSquaring
from liegroup_attn.expm.sweep import CausalSweep
from liegroup_attn.expm.triangular import TriangularSolve
from liegroup_attn.expm.uniformization import Uniformization, matrix_first
from liegroup_attn.generators import DenseGenerator, Generator, LowRankGenerator, SoftmaxGenerator

__all__ = ["Automatic"]

_MOST_FORMED = 2**26  # entries of all N×N matrices of a call; 256 MiB in float32
_MOST_HOPS = 64
SOLVE_OVER_HOP = 1.0  # multiply-adds of N hops of width D that one of a solve is worth, over N²; fitted as well


class Automatic(Method):
    """Chooses another method by the generator, the number of hops, the size, the device and the dtype, and lets it act.

    - Resolvents (exponential, Erlang clock): ``CausalSweep`` for causal softmax chains, ``TriangularSolve`` for other
      causal generators, else one dense solve (``MatrixExp``) where hops would cost more.
    - Fixed clock: ``CausalSweep`` for causal softmax chains, else hops: on a formed P while all matrices of the call fit
      into 256 MiB, over fused attention kernels beyond, with dropout, and for half precision on a GPU. Past 64 hops
      ``ScalingSquaring``, while its matrices fit.
    - ``LowRankGenerator``: ``LowRank`` where the closed form holds, else hops.
    - One time per query row: hops.

    Hops, however they are ordered, compute one and the same polynomial of P; so the size at which one replaces another
    does not show in the result. Only solves and squarings are exact where hops leave a tail of ``tol``.

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

    def choose(self, generator: Generator, value: Tensor, time: Tensor, clock: Clock) -> Method:
        """The method for this call.

        Args:
            generator: Q on N tokens.
            value: (..., N, D).
            time: as in ``act``.
            clock: law of τ.

        Returns:
            The method, its knobs set.
        """
        sweepable = isinstance(generator, SoftmaxGenerator) and generator.is_causal
        if isinstance(generator, LowRankGenerator):
            closed = not (generator.is_causal or per_row(time) or generator.has_rate_per_token)
            return LowRank() if closed else Uniformization(**self._hops(clock, value))
        if clock.resolvents is not None:
            if generator.is_causal and not per_row(time):
                return CausalSweep() if sweepable else TriangularSolve()
            sweepable = False
        sweepable = sweepable and not generator.dropout_p
        longest = self.longest
        if longest is None:
            theta = time.detach() * generator.rate_bound()
            longest = float(theta.max()) if theta.numel() else 0.0
        tol = default_tol(value.dtype) if self.tol is None else self.tol
        entries = generator.num_states**2 * torch.broadcast_shapes(generator.batch_shape, value.shape[:-2]).numel()
        formed = isinstance(generator, DenseGenerator) or (
            entries <= _MOST_FORMED and not generator.dropout_p and not (value.is_cuda and value.dtype.itemsize < 4)
        )
        if formed and not per_row(time) and not (sweepable and self.streams):
            hops = _count(clock, longest, tol)
            if clock.resolvents is not None and hops * value.size(-1) > SOLVE_OVER_HOP * generator.num_states:
                return MatrixExp()
            if clock.resolvents is None and hops > _MOST_HOPS:
                return ScalingSquaring(tol, max_theta=longest)
            sweepable = sweepable and not matrix_first(int(hops), *value.shape[-2:])
        knobs = self._hops(clock, value)
        return CausalSweep(**knobs) if sweepable else Uniformization(**knobs, formed=formed)

    def _hops(self, clock: Clock, value: Tensor) -> dict[str, Any]:
        """The knobs of hops: K, if the longest time fixes it, else the tolerance."""
        if self.longest is None:
            return {"tol": self.tol}
        return {
            "max_terms": max(1, clock.terms(self.longest, default_tol(value.dtype) if self.tol is None else self.tol))
        }


def _count(clock: Clock, longest: float, tol: float) -> float:
    return float(clock.terms(longest, tol)) if longest < 1000 else float("inf")
