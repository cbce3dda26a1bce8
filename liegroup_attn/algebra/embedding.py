"""The embedding problem: is a stochastic matrix the exponential of a rate matrix?"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from liegroup_attn.algebra._square import square
from liegroup_attn.algebra.exponential import expm
from liegroup_attn.algebra.logarithm import logm, no_logarithm
from liegroup_attn.algebra.membership import is_stochastic, project_cone
from liegroup_attn.errors import ConvergenceError, GeneratorError, ShapeError

__all__ = ["Embedding", "embed"]

_MISS = 2  # times atol; well-conditioned exponentials of rate matrices, rounded to P's dtype, stay below 1


class Embedding(NamedTuple):
    """Answer of ``embed``.

    Args:
        ok: whether P = exp(tQ) for a rate matrix Q was found.
        condition: the first condition that fails, one of "stochastic", "determinant", "diagonal", "zero pattern",
            "eigenvalue", "logarithm"; None if ok.
        reason: that condition with its numbers; None if ok.
        generator: (N, N), Q = log P / t, put on the cone; None if not ok.
        conclusive: whether the answer is proven. A "no" that is not may be due to another logarithm than the
            principal one, or to rounding.

    Example:
        >>> Embedding(False, "determinant", "det P = -0.5 must be positive", None, True).condition
        'determinant'
    """

    ok: bool
    condition: str | None
    reason: str | None
    generator: Tensor | None
    conclusive: bool


def embed(P: Tensor, time: float = 1.0, atol: float | None = None) -> Embedding:
    """Find the rate matrix Q with P = exp(tQ), or the condition that P violates.

    Checked in this order. Necessary are: P is stochastic; det P > 0, as det exp(tQ) = e^{t tr Q}; P_ii > 0 and
    det P ≤ Π P_ii [Goodman1970]_; P_ij > 0 wherever P_ik > 0 and P_kj > 0. Then P must have a real principal logarithm
    (no eigenvalue on the negative real axis), and that must lie in the cone. With two states det P > 0 is enough. With
    more, another logarithm may be a rate matrix where the principal one is none, with two exceptions: there is no
    other real one (positive, distinct eigenvalues [Culver1966]_); or det P > e^{−π}, for the eigenvalues of tQ have
    imaginary parts of at most −tr(tQ) < π then (Gershgorin's discs), which makes tQ principal.

    The answer is checked: ok says that exp(tQ), of the Q returned, is within 2 · atol of P in every entry.

    Args:
        P: (N, N), one matrix.
        time: t > 0.
        atol: what counts as rounding in the entries of P; default 8 · N · eps, of P's dtype.

    Returns:
        The answer; it is not differentiable.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square, a batch, or no states.
        GeneratorError: time not positive and finite.

    Example:
        >>> embed(torch.tensor([[0.75, 0.25], [0.25, 0.75]])).generator
        tensor([[-0.3466,  0.3466],
                [ 0.3466, -0.3466]])
        >>> answer = embed(torch.tensor([[0.25, 0.75], [0.75, 0.25]]))
        >>> answer.condition, answer.conclusive
        ('determinant', True)

    Source: [Kingman1962]_ (two states, and Elfving's problem); [Goodman1970]_; [Israel2001]_; [Davies2010]_.
    """
    wide = square("P", P).detach().double().cpu()
    if P.dim() != 2 or P.size(-1) == 0:
        raise ShapeError(f"P: expected one matrix (N, N) with N ≥ 1, got shape {tuple(P.shape)}; loop over the batch")
    if not 0 < time < math.inf:
        raise GeneratorError(f"time: expected 0 < time < inf, got {time}; the flow runs forward only")
    atol = 8 * P.size(-1) * torch.finfo(P.dtype).eps if atol is None else atol
    ok, reason = is_stochastic(P, atol)
    if not ok:
        return _no("stochastic", reason, True)
    fault = _determinant(wide, atol) or _diagonal(wide, atol) or _zeros(wide, atol)
    if fault is not None:
        return fault
    values = torch.linalg.eigvals(wide)
    principal = _only_principal(wide)
    reason = no_logarithm(wide, atol / 8)
    if reason is not None:
        return _no("eigenvalue", f"P has {reason}", principal or _lone_negative(values, atol))
    try:
        log = logm(wide)
    except (ConvergenceError, GeneratorError):
        return _no("eigenvalue", "P is too near a matrix without real principal logarithm", False)
    # Rounding of P grows in its logarithm as its inverse is large.
    rounding = atol * max(1.0, float(torch.linalg.matrix_norm(torch.linalg.inv(wide), 1)))
    least = float(log.masked_fill(torch.eye(P.size(-1), dtype=torch.bool), math.inf).min())
    if least < -rounding:
        unique = principal or _distinct_and_positive(values, atol)
        return _no("logarithm", f"log P has the rate {least:g}, which must be at least 0", unique)
    generator = (project_cone(log) / time).to(square("P", P))
    miss = float((expm(time * generator.double()) - wide).abs().max())
    if not miss <= _MISS * atol:
        return _no("logarithm", f"the rate matrix nearest to log P has an exponential that is {miss:.2g} off P", False)
    return Embedding(True, None, None, generator, True)


def _no(condition: str, reason: str | None, conclusive: bool) -> Embedding:
    return Embedding(False, condition, reason, None, conclusive)


def _determinant(P: Tensor, atol: float) -> Embedding | None:
    """Det P > 0, decided by its sign only where P is clearly regular."""
    sign, log_size = torch.linalg.slogdet(P)
    if float(torch.linalg.matrix_norm(P, -2)) <= atol * math.sqrt(
        P.size(-1)
    ):  # the distance to the nearest singular matrix
        return _no("determinant", "det P is 0 to rounding: P is singular, or t too long for its digits", False)
    if float(sign) <= 0:
        return _no("determinant", f"det P = {-math.exp(float(log_size)):g} must be positive", True)
    return None


def _diagonal(P: Tensor, atol: float) -> Embedding | None:
    """P_ii > 0, as P_ii ≥ exp(−t q_i); det P ≤ Π P_ii."""
    stay = P.diagonal()
    if float(stay.min()) <= 0:
        return _no("diagonal", f"P_ii = {float(stay.min()):g} for i = {int(stay.argmin())} must be positive", True)
    log_det, log_stay = float(torch.linalg.slogdet(P).logabsdet), float(stay.log().sum())
    # First order: δ log det P = tr(P⁻¹ δP), δ log Π P_ii = Σ δP_ii / P_ii.
    rounding = atol * P.size(-1) * float(torch.linalg.matrix_norm(torch.linalg.inv(P), 1) + 1 / stay.min())
    if log_det > log_stay + rounding:
        return _no("diagonal", f"det P = {math.exp(log_det):g} must be at most Π P_ii = {math.exp(log_stay):g}", True)
    return None


def _zeros(P: Tensor, atol: float) -> Embedding | None:
    """P_ij > 0 where j is reached by way of k; products under rounding say nothing."""
    broken = (P <= 0) & (P.clamp_min(0) @ P.clamp_min(0) > atol)
    if not bool(broken.any()):
        return None
    i, j = broken.nonzero()[0].tolist()
    return _no("zero pattern", f"P_ij = 0 for i = {i}, j = {j}, yet j is reached from i in two steps", True)


def _only_principal(P: Tensor) -> bool:
    """Whether a rate matrix with P = exp(Q) has eigenvalues with |Im| < π: det P > e^{−π}, with a margin."""
    return float(torch.linalg.slogdet(P).logabsdet) > -0.999 * math.pi


def _apart(values: Tensor, atol: float) -> Tensor:
    """Whether each eigenvalue is simple; a double one splits by about the root of the rounding."""
    distance = (values[:, None] - values).abs() + torch.diag(torch.full((len(values),), math.inf, dtype=torch.float64))
    return distance.amin(-1) > 4 * math.sqrt(atol)


def _distinct_and_positive(values: Tensor, atol: float) -> bool:
    return bool(((values.imag == 0) & (values.real > 0) & _apart(values, atol)).all())


def _lone_negative(values: Tensor, atol: float) -> bool:
    """A simple negative eigenvalue: no real logarithm at all."""
    return bool(((values.imag == 0) & (values.real < 0) & _apart(values, atol)).any())
