"""The contract of a method, and what several methods need: hops to count, times, shapes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from liegroup_attn.clocks import Clock
from liegroup_attn.errors import ConvergenceError, GeneratorError
from liegroup_attn.generators import Generator
from liegroup_attn.tensors import differentiated, without_autocast

__all__ = ["HopMethod", "Method", "flatten_batch", "mixture", "per_row", "working_dtype"]


class Method(ABC):
    """How E[exp(τQ)]V is computed; its knobs live in the object."""

    drops_hops = False  # whether a generator's dropout acts in each hop; else it acts on what is mixed by

    def choose(
        self, generator: Generator, value: Tensor, time: Tensor, clock: Clock, longest: float | None = None
    ) -> Method:
        """The method for this call: itself, but for one that chooses.

        Args:
            generator: Q on N tokens.
            value: (..., N, D).
            time: as in ``act``.
            clock: law of τ.
            longest: the largest mean number of hops, where it is known without a look at any tensor.
        """
        return self

    @abstractmethod
    def act(self, generator: Generator, value: Tensor, time: Tensor, clock: Clock, first_hop: bool = False) -> Tensor:
        """E[exp(τQ)] · value, or S · E[exp(τQ)] · value.

        A generator's dropout acts in hops over attention kernels and in the first hop; other methods drop nothing.

        Args:
            generator: Q on N tokens.
            value: (..., N, D).
            time: mean of τ, ≥ 0: 0-dimensional, or (..., 1), or (..., N) for one time per query row; dimensions before
                those of generator and value are several times at once.
            clock: law of τ.
            first_hop: first jump, then run.

        Returns:
            (..., N, D), dtype of ``value``.
        """

    def __repr__(self) -> str:
        knobs = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if v not in (None, False))
        return f"{type(self).__name__}({knobs})"


class HopMethod(Method):
    """A method that counts hops, to a tolerance or to a number.

    Args:
        tol: largest P(hops > K); default the rounding unit of the input (1e-3 for half precision, whose attention is
            no more exact than that).
        max_terms: K. Alone, it is taken as it is: no look at the time, hence no wait for a GPU and no graph break.
            With ``tol``, the time must allow it.
        recompute: keep no iterate for the backward but compute all anew there: K·N·D numbers less between forward and
            backward, for one more forward. Not under ``torch.func``.

    Raises:
        GeneratorError: tol outside (0, 1), max_terms < 1.
    """

    def __init__(self, tol: float | None = None, max_terms: int | None = None, *, recompute: bool = False) -> None:
        if tol is not None and not 0 < tol < 1:
            raise GeneratorError(f"tol: expected a probability in (0, 1), got {tol}; choose 1e-3 or smaller")
        if max_terms is not None and max_terms < 1:
            raise GeneratorError(f"max_terms: expected at least 1, got {max_terms}; pass None to let tol choose")
        self.tol = tol
        self.max_terms = max_terms
        self.recompute = recompute

    def act(  # noqa: D102
        self, generator: Generator, value: Tensor, time: Tensor, clock: Clock, first_hop: bool = False
    ) -> Tensor:
        if not self.recompute:
            return self._act(generator, value, time, clock, first_hop)
        if self._jumps(time, first_hop):
            generator.prepare()  # what is kept between jumps is kept before: the recomputation has to find what the forward did
        found: Tensor = checkpoint(self._act, generator, value, time, clock, first_hop, use_reentrant=False)
        return found

    def _jumps(self, time: Tensor, first_hop: bool) -> bool:
        """Whether it asks the generator for jumps."""
        return True

    @abstractmethod
    def _act(self, generator: Generator, value: Tensor, time: Tensor, clock: Clock, first_hop: bool) -> Tensor:
        """``act``, keeping what the backward needs."""

    def count_hops(self, theta: Tensor, dtype: torch.dtype, clock: Clock) -> int:
        """K for mean numbers of hops θ.

        Raises:
            ConvergenceError: ``tol`` and ``max_terms`` are both given and K hops do not reach ``tol``.
            GeneratorError: the time is mapped by vmap, and ``max_terms`` is not given alone.
        """
        if self.tol is None and self.max_terms is not None:
            return self.max_terms
        tol = default_tol(dtype) if self.tol is None else self.tol
        terms = clock.terms(longest(theta), tol)
        if terms or differentiated(theta):  # a value near θ = 0 needs no second hop, a second derivative there does
            terms = max(terms, 2 if self.max_terms is None else min(2, self.max_terms))
        if self.max_terms is not None and terms > self.max_terms:
            raise ConvergenceError(
                f"max_terms: expected at least {terms} hops for tol={tol:g}, got {self.max_terms}; raise it, or leave tol=None"
            )
        return terms


def mean_hops(time: Tensor, generator: Generator) -> Tensor:
    """θ = Λt in float64, which holds what half precision and float32 do not."""
    bound = generator.rate_bound()
    return time.to(torch.float64) * (bound.to(torch.float64) if isinstance(bound, Tensor) else bound)


def longest(theta: Tensor) -> float:
    """The largest mean number of hops; waits for a GPU. On meta, where there are no values, 1.

    Raises:
        GeneratorError: not finite; or under vmap, where one tensor stands for many.
    """
    found = _largest(theta)
    if found is None:
        raise GeneratorError(
            "time: expected one that can be looked at to count hops, got one that vmap maps; fix their number with "
            "method=Uniformization(max_terms=K) or CausalSweep(max_terms=K), or give several times in front of the batch"
        )
    return found


def seen(theta: Tensor) -> float:
    """``longest``, or 0 where it cannot be looked at: under vmap and under torch.compile, whose graph would break."""
    return 0.0 if torch.compiler.is_compiling() else _largest(theta) or 0.0


def _largest(theta: Tensor) -> float | None:
    if theta.is_meta or not theta.numel():
        return float(theta.is_meta)
    try:
        found = float(theta.detach().max())
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        return None
    if not math.isfinite(found):
        raise GeneratorError(
            f"time: expected a finite mean number of hops, time × rates, got {found:g}; make the time or the rates smaller"
        )
    return found


def hops_for(clock: Clock, longest: float, tol: float) -> int:
    """K for the longest time that there can be, before any is looked at: two at least, for second derivatives at time 0."""
    return max(2, clock.terms(longest, tol))


def default_tol(dtype: torch.dtype) -> float:
    """The rounding unit, 1e-3 for half precision."""
    return min(torch.finfo(dtype).eps, 1e-3)


MANY = 64  # hops, each of which leaves rows of 1 a rounding unit off


def working_dtype(value: Tensor, hops: int = 0) -> torch.dtype:
    """At least float32, since half precision would round every hop; float64 where there are many."""
    return torch.float64 if value.dtype == torch.float64 or hops > MANY else torch.float32


def within(time: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean hops of a token (float64) in another dtype, with room for products: beyond it nothing changes any more."""
    return time.clamp_max(torch.finfo(dtype).max ** 0.8).to(dtype)


def per_row(time: Tensor) -> bool:
    """Whether the time differs from query row to query row."""
    return time.dim() > 0 and time.size(-1) > 1


def hop_matrix(chain: Tensor, a: Tensor | None) -> Tensor:
    """P = I + diag(a)(S − I), from what ``Generator.uniformized`` gives: (..., N, N)."""
    if a is None:
        return chain
    with without_autocast(chain):
        eye = torch.eye(chain.size(-1), dtype=chain.dtype, device=chain.device)
        return eye + a.unsqueeze(-1).to(chain.dtype) * (chain - eye)


def mix_by(mixing: Tensor, generator: Generator, value: Tensor, first_hop: bool) -> Tensor:
    """Multiply values by a mixing matrix (..., N, N), after a jump of the generator if one is wanted; in the values' dtype."""
    with without_autocast(value):
        dtype = torch.promote_types(mixing.dtype, working_dtype(value))
        mixed = mixing.to(dtype) @ value.to(dtype)
        if first_hop and generator.jumps_on_uniformized and not generator.dropout_p:  # S fits as the mixing matrix does
            return (generator.uniformized()[0].to(dtype) @ mixed).to(value.dtype)
    mixed = mixed.to(value.dtype)
    return generator.jump(mixed) if first_hop else mixed


def flatten_batch(batch: torch.Size, tensor: Tensor, dims: int = 2) -> Tensor:
    """(..., *last dims) → (B, *last dims), expanded to ``batch`` first."""
    return tensor.expand(*batch, *tensor.shape[-dims:]).reshape(batch.numel(), *tensor.shape[-dims:])


def mixture(weights: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """Σ_k p_k x_k.

    Args:
        weights: p, (K + 1, ...) with last size 1 or N, or (K + 1,).
        terms: K + 1 of (..., N, D).

    Returns:
        (..., N, D); leading dimensions of the weights that the terms lack come first.
    """
    weights = weights.to(terms[0].dtype)
    rows = weights.unsqueeze(-1) if weights.dim() > 1 else weights
    total = rows[0] * terms[0]
    for weight, term in zip(rows[1:], terms[1:], strict=True):
        total = torch.addcmul(total, weight, term)
    return total
