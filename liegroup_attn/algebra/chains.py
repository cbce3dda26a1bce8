"""The chain that a rate matrix drives: how often it moves, where it rests, and whether its film runs backwards."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from liegroup_attn.algebra._square import eye_like, square
from liegroup_attn.algebra.exponential import expm
from liegroup_attn.algebra.membership import is_rate_matrix
from liegroup_attn.errors import ConvergenceError, GeneratorError, ShapeError, check_shape, fits, values_visible

__all__ = ["detailed_balance_residual", "exit_rates", "expected_hops", "is_reversible", "stationary_distribution"]


def exit_rates(generator: Tensor) -> Tensor:
    """Rate at which the chain leaves each token, −Q_ii = λ_i(1 − S_ii).

    Args:
        generator: (..., N, N), the dense Q.

    Returns:
        (..., N), moves per unit of time.

    Raises:
        DtypeError: not floating point.
        ShapeError: ``generator`` is not square.

    Example:
        >>> exit_rates(torch.tensor([[-2.0, 2.0], [0.0, 0.0]]))
        tensor([2., 0.])

    Source: [Norris1997]_, section 2.6.
    """
    return 0 - square("generator", generator).diagonal(dim1=-2, dim2=-1)  # (..., N); 0 − x: never −0


def expected_hops(generator: Tensor, time: float | Tensor = 1.0, *, exponential: bool = False) -> Tensor:
    """Expected number of moves of the chain until its clock stops, for every starting token.

    A move is a jump to *another* token: hops of the jump chain that stay (S_ii) are not counted. With exit
    rates q it is ∫₀ᵗ e^{sQ} q ds on the fixed clock, (I − tQ)⁻¹ t q on the exponential one; computed in float64.

    Args:
        generator: (..., N, N), the dense Q.
        time: float, or a tensor broadcastable to (...,); finite, ≥ 0; the clock's (mean) time.
        exponential: take the exponential clock instead of the fixed one.

    Returns:
        (..., N), number of moves; NaN for a generator of the batch that holds NaN or inf.

    Raises:
        DtypeError: not floating point.
        ShapeError: ``generator`` is not square, or ``time`` does not broadcast to its batch.
        GeneratorError: ``time`` is negative or not finite (checked for Python numbers and CPU tensors).

    Example:
        >>> Q = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])  # leaves at rate 1 from everywhere
        >>> expected_hops(Q, 3.0)
        tensor([3., 3.])

    Source: [Higham2008]_, chapter 10 (integrals from the exponential of a block matrix).
    """
    dtype = square("generator", generator).dtype
    batch, n = generator.shape[:-2], generator.shape[-1]
    tq = generator.double() * _check_time(time, batch, generator.device)[..., None, None]  # (..., N, N)
    finite = tq.isfinite().flatten(-2).all(-1)[..., None]  # (..., 1): one item's NaN stays its own
    tq = tq.masked_fill(~finite[..., None], 0.0)
    exits = -tq.diagonal(dim1=-2, dim2=-1)[..., None]  # (..., N, 1)
    if exponential:
        hops = torch.linalg.solve(eye_like(tq) - tq, exits)[..., 0]
    else:
        # exp([[tQ, tq], [0, 0]]) holds the integral in its last column.
        augmented = F.pad(torch.cat([tq, exits], -1), (0, 0, 0, 1))  # (..., N + 1, N + 1)
        hops = expm(augmented)[..., :n, n]
    return hops.masked_fill(~finite, math.nan).to(dtype)


def stationary_distribution(generator: Tensor) -> Tensor:
    """The distribution π at rest, πQ = 0: each row of P(t) tends to it.

    1ᵀ(11ᵀ − Q)⁻¹, in float64. Where two parts of the chain are joined by rates ε times the others, π is exact to
    about 1e-16/ε. Differentiable, by rates that are 0 too (one-sided).

    Args:
        generator: (..., N, N), the dense Q, with one closed class: some state can be reached from every state.

    Returns:
        (..., N), entries ≥ 0 with sum 1; 0 for states that are left for ever.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square, or without states.
        GeneratorError: not a rate matrix, or several closed classes (where values are visible).
        ConvergenceError: parts joined by rates under the rounding of the others (where values are visible).

    Example:
        >>> stationary_distribution(torch.tensor([[-1.0, 1.0], [3.0, -3.0]]))
        tensor([0.7500, 0.2500])

    Source: [Norris1997]_, sections 3.5 and 3.6.
    """
    return stationary(rate_matrix(generator)).to(square("generator", generator).dtype)


def detailed_balance_residual(generator: Tensor, distribution: Tensor | None = None) -> Tensor:
    """Largest net flow between two states at rest, ``max |π_i Q_ij − π_j Q_ji|``: 0 iff the chain is reversible.

    Args:
        generator: (..., N, N), the dense Q.
        distribution: (..., N), π; default ``stationary_distribution(generator)``.

    Returns:
        (...,), moves per unit of time. Differentiable almost everywhere.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square, or π of another shape.
        GeneratorError: not a rate matrix, or several closed classes and no π (where values are visible).

    Example:
        >>> turn = torch.tensor([[-1.0, 1.0, 0.0], [0.0, -1.0, 1.0], [1.0, 0.0, -1.0]])
        >>> detailed_balance_residual(turn)
        tensor(0.3333)

    Source: [Norris1997]_, section 3.7.
    """
    Q = rate_matrix(generator)
    pi = stationary(Q) if distribution is None else distribution
    check_shape("distribution", pi, least_rank=1, remedy="give one probability per state")
    if not fits(pi.shape, Q.shape[:-1]):
        raise ShapeError(
            f"distribution: expected a shape that broadcasts to {tuple(Q.shape[:-1])}, got {tuple(pi.shape)}; "
            "give one probability per state"
        )
    flow = pi.double()[..., None] * Q
    return (flow - flow.mT).abs().amax((-2, -1)).to(square("generator", generator).dtype)


def is_reversible(generator: Tensor, atol: float | None = None) -> tuple[bool, str | None]:
    """Say whether the chain at rest looks the same forwards and backwards: π_i Q_ij = π_j Q_ji.

    Args:
        generator: (..., N, N), every chain of the batch must pass; states that are left for ever have no say.
        atol: absolute tolerance on the flows; default 8 · N · eps · max|Q|.

    Returns:
        ``(True, None)`` or ``(False, reason)``.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square, or without states.
        GeneratorError: not a rate matrix, or several closed classes.

    Example:
        >>> is_reversible(torch.tensor([[-1.0, 1.0], [3.0, -3.0]]))
        (True, None)

    Source: [Norris1997]_, section 3.7.
    """
    Q = rate_matrix(generator).detach()
    if Q.numel() == 0:
        return True, None
    if atol is None:
        atol = 8 * Q.size(-1) * torch.finfo(generator.dtype).eps * float(Q.abs().max())
    flow = stationary(Q)[..., None] * Q
    net = (flow - flow.mT).abs().reshape(-1, *Q.shape[-2:])
    worst = float(net.max())
    if worst <= atol:
        return True, None
    i, j = divmod(int(net.amax(0).argmax()), Q.size(-1))
    return False, f"flows must balance within {atol:.1e}, got π_i Q_ij − π_j Q_ji = {worst:g} between {i} and {j}"


def rate_matrix(generator: Tensor) -> Tensor:
    """Q in float64, made from its rates alone, so that rows sum to 0 as exactly as can be.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square, or without states.
        GeneratorError: not a rate matrix, where values are visible.
    """
    wide = square("generator", generator).double()
    if wide.size(-1) == 0:
        raise ShapeError(f"generator: expected N ≥ 1 states, got shape {tuple(generator.shape)}; give it a state")
    if values_visible(wide):
        ok, reason = is_rate_matrix(generator)
        if not ok:
            raise GeneratorError(f"generator: expected a rate matrix, got one that fails: {reason}; use project_cone")
    rates = wide.masked_fill(eye_like(wide).bool(), 0).clamp_min(0)
    return rates - torch.diag_embed(rates.sum(-1))


def stationary(Q: Tensor) -> Tensor:
    """π of a Q from ``rate_matrix``.

    Rows are divided by their exit rates first, Q = DJ, which makes one scale of all: πQ = 0 is (πD)J = 0.
    """
    if values_visible(Q) and not bool(one_closed_class(Q).all()):
        raise GeneratorError(
            "generator: expected one closed class, got several (no state can be reached from every state), so π is not "
            "unique; take them apart, or ask absorption_probabilities where the chain ends"
        )
    exits = -Q.detach().diagonal(dim1=-2, dim2=-1)  # (..., N)
    exits = exits.where(exits > 0, 1)
    regular = 1 / Q.size(-1) - Q / exits[..., None]
    inverse = torch.linalg.inv_ex(regular).inverse
    size = torch.linalg.matrix_norm(inverse.detach(), 1) * torch.linalg.matrix_norm(regular.detach(), 1)
    if values_visible(size) and not bool((size < 0.1 / torch.finfo(Q.dtype).eps).all()):
        raise ConvergenceError(
            "generator: expected states joined by rates above rounding, got parts joined by less than 1e-15 of the "
            "other rates; drop those rates"
        )
    pi = inverse.sum(-2).clamp_min(0) / exits
    return pi / pi.sum(-1, keepdim=True)


def reachable(Q: Tensor) -> Tensor:
    """Which states can be reached from which: the reflexive, transitive closure of the positive rates, (..., N, N)."""
    paths = (Q.detach() > 0).float() + eye_like(Q).float()
    for _ in range(max(1, (Q.size(-1) - 1).bit_length())):
        paths = (paths @ paths > 0).float()
    return paths.bool()


def one_closed_class(Q: Tensor) -> Tensor:
    """Whether some state can be reached from every state, (...,)."""
    return reachable(Q).all(-2).any(-1)


def _check_time(time: float | Tensor, batch: torch.Size, device: torch.device) -> Tensor:
    """The time in float64 on ``device``, in a shape that broadcasts to ``batch``."""
    times = torch.as_tensor(time, dtype=torch.float64)
    if times.device.type == "cpu" and not ((times >= 0) & times.isfinite()).all():
        raise GeneratorError(f"time: expected finite numbers ≥ 0, got {time}; a chain does not run backwards")
    sizes = zip(reversed(times.shape), reversed(batch), strict=False)
    if times.dim() > len(batch) or any(size not in (1, wanted) for size, wanted in sizes):
        raise ShapeError(
            f"time: expected a shape that broadcasts to the generator's batch {tuple(batch)}, "
            f"got {tuple(times.shape)}; expand the generator for several times at once"
        )
    return times.to(device)
