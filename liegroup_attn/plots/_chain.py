"""What plots of a chain share: a generator from whatever was given, its mixing matrices in float64, checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liegroup_attn.clocks import Clock, FixedClock
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.expm import MatrixExp
from liegroup_attn.generators import DenseGenerator, Generator
from liegroup_attn.plots._style import to_array

__all__ = ["check_tokens", "jump_chain", "mixing", "rate_matrix", "some_times"]


def rate_matrix(generator: Any, name: str = "generator") -> np.ndarray:
    """Q as (N, N) float64; rounding of half precision is taken out of its diagonal."""
    array = to_array(generator.dense() if isinstance(generator, Generator) else generator)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size:
        raise ShapeError(f"{name}: expected shape (N, N), got {array.shape}; choose one, as in Q[batch, head]")
    if not np.isfinite(array).all():
        raise GeneratorError(f"{name}: expected finite entries, got NaN or inf; look for a diverged layer")
    rates = array - np.diag(np.diag(array))
    size = np.abs(array).max()
    if rates.min() < -1e-6 * size:
        raise GeneratorError(
            f"{name}: expected off-diagonal entries of at least 0, got {rates.min():g}; pass Q, not scores"
        )
    worst = np.abs(array.sum(-1)).max()
    if worst > 2e-2 * size:  # bfloat16's rounding passes
        raise GeneratorError(f"{name}: expected rows that sum to 0, got {worst:g}; pass Q = Λ(S − I), not S or P")
    rates = rates.clip(min=0)
    return rates - np.diag(rates.sum(-1))


def jump_chain(generator: Any) -> np.ndarray:
    """S with Q = Λ(S − I): the generator's own, of a matrix the one that always leaves; rows without rates stay."""
    Q = rate_matrix(generator)
    own = generator if isinstance(generator, Generator) else DenseGenerator(torch.from_numpy(Q))
    rates = np.broadcast_to(to_array(own.jump_intensities()), len(Q))[:, None]
    S = np.eye(len(Q)) + np.divide(Q, rates, out=np.zeros_like(Q), where=rates > 0)
    S = S.clip(min=0)  # rounding of float32
    return S / S.sum(-1, keepdims=True)


def mixing(Q: np.ndarray, times: np.ndarray, clock: Clock | None) -> Iterator[np.ndarray]:
    """E[exp(τQ)] at one time after the other, (N, N) each: all of them need not fit in memory."""
    if clock is not None and not isinstance(clock, Clock):
        raise GeneratorError(
            f"clock: expected a Clock such as ExponentialClock(), got {clock!r}; None is the fixed one"
        )
    generator, law = DenseGenerator(torch.from_numpy(Q)), clock or FixedClock()
    with torch.no_grad():
        for time in times:
            P: Tensor = MatrixExp().matrix(generator, torch.tensor(float(time), dtype=torch.float64), law)
            yield P.numpy()


def some_times(times: Any, *, points: int | None = None, log: bool = False) -> np.ndarray:
    """Times as (T,); a number is the end of ``points`` times from 0, or, on a logarithmic axis, three decades."""
    array = to_array(times)
    if array.ndim == 0 and points is not None:
        array = np.geomspace(1e-3, 1, points) * array if log else np.linspace(0, 1, points) * array
    array = np.atleast_1d(array)
    if array.ndim != 1 or not array.size:
        raise ShapeError(f"times: expected a number or shape (T,), T ≥ 1, got {array.shape}; pass a list of times")
    if not (np.isfinite(array).all() and (array > 0 if log else array >= 0).all()):
        least = "0 < time" if log else "0 ≤ time"
        raise GeneratorError(f"times: expected {least} < inf, got {array.min():g} … {array.max():g}; time runs forward")
    return array


def check_tokens(tokens: Sequence[str] | None, n: int) -> list[str]:
    """Names of the tokens, their numbers if there are none."""
    if tokens is not None and len(tokens) != n:
        raise ShapeError(f"tokens: expected {n} names, one a row of Q, got {len(tokens)}; name every row")
    return [str(i) for i in range(n)] if tokens is None else [str(token) for token in tokens]


def check_source(source: int, n: int) -> int:
    """A token's number, from the end if negative."""
    if not -n <= source < n:
        raise ShapeError(f"source: expected a token from 0 to {n - 1}, got {source}; choose a row of Q")
    return source % n
