"""Measures of generators and transition matrices; pure functions of dense tensors, any batch, torch only.

Half-precision inputs are computed, and returned, in float32.
"""

from __future__ import annotations

import math
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from liegroup_attn.algebra import expm
from liegroup_attn.errors import GeneratorError, ShapeError, check_shape

__all__ = ["attention_entropy", "bits_per_byte", "exit_rates", "expected_hops", "row_stochasticity_error"]


def exit_rates(generator: Tensor) -> Tensor:
    """Rate at which the chain leaves each token, −Q_ii = λ_i(1 − S_ii).

    Args:
        generator: (..., N, N), the dense Q.

    Returns:
        (..., N), moves per unit of time.

    Raises:
        ShapeError: ``generator`` is not square.

    Example:
        >>> exit_rates(torch.tensor([[-2.0, 2.0], [0.0, 0.0]]))
        tensor([2., 0.])
    """
    _check_square(generator)
    return 0 - _at_least_float32(generator).diagonal(dim1=-2, dim2=-1)  # (..., N); 0 − x: never −0


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
        ShapeError: ``generator`` is not square, or ``time`` does not broadcast to its batch.
        GeneratorError: ``time`` is negative or not finite (checked for Python numbers and CPU tensors).

    Example:
        >>> Q = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])  # leaves at rate 1 from everywhere
        >>> expected_hops(Q, 3.0)
        tensor([3., 3.])
    """
    _check_square(generator)
    batch, n = generator.shape[:-2], generator.shape[-1]
    tq = generator.double() * _check_time(time, batch, generator.device)[..., None, None]  # (..., N, N)
    finite = tq.isfinite().flatten(-2).all(-1)[..., None]  # (..., 1): one item's NaN stays its own
    tq = tq.masked_fill(~finite[..., None], 0.0)
    exits = -tq.diagonal(dim1=-2, dim2=-1)[..., None]  # (..., N, 1)
    if exponential:
        hops = torch.linalg.solve(torch.eye(n, dtype=tq.dtype, device=tq.device) - tq, exits)[..., 0]
    else:
        # exp([[tQ, tq], [0, 0]]) holds the integral in its last column.
        augmented = F.pad(torch.cat([tq, exits], -1), (0, 0, 0, 1))  # (..., N + 1, N + 1)
        hops = expm(augmented)[..., :n, n]
    return hops.masked_fill(~finite, math.nan).to(_at_least_float32(generator).dtype)


def attention_entropy(transition: Tensor) -> Tensor:
    """Shannon entropy of each row, −Σ_j P_ij ln P_ij with 0·ln 0 = 0.

    Args:
        transition: (..., N, M), rows of probabilities; a negative entry gives −inf.

    Returns:
        (..., N), nats, between 0 (one target) and ln M (all targets alike).

    Raises:
        ShapeError: fewer than two dimensions.

    Example:
        >>> attention_entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([0.0000, 0.6931])
    """
    check_shape("transition", transition, least_rank=2, remedy="pass whole rows, (..., N, N)")
    return torch.special.entr(_at_least_float32(transition)).sum(-1)


def row_stochasticity_error(transition: Tensor) -> Tensor:
    """How far a matrix is from being row-stochastic: ``max(|row sum − 1|, −least entry)``, 0 if it is.

    Args:
        transition: (..., N, M).

    Returns:
        (...,), the worst violation in each matrix; NaN if it holds NaN.

    Raises:
        ShapeError: fewer than two dimensions.

    Example:
        >>> row_stochasticity_error(torch.tensor([[1.25, -0.25], [0.5, 0.5]]))
        tensor(0.2500)
    """
    check_shape("transition", transition, least_rank=2, remedy="pass whole rows, (..., N, N)")
    transition = _at_least_float32(transition)
    sums = (transition.sum(-1) - 1).abs()  # (..., N)
    negative = (-transition).clamp_min(0).flatten(-2)  # (..., N·M)
    zero = transition.new_zeros(*transition.shape[:-2], 1)  # keeps amax defined when N = 0
    return torch.cat([sums, negative, zero], -1).amax(-1)


@overload
def bits_per_byte(nats: Tensor) -> Tensor: ...
@overload
def bits_per_byte(nats: float) -> float: ...
def bits_per_byte(nats: float | Tensor) -> float | Tensor:
    """Bits per byte from a mean cross-entropy per byte in nats: nats / ln 2.

    Args:
        nats: float or tensor of any shape, nats per byte.

    Returns:
        The same shape, bits per byte.

    Example:
        >>> round(bits_per_byte(1.589), 3)
        2.292
    """
    if isinstance(nats, Tensor):
        return (_at_least_float32(nats) if nats.is_floating_point() else nats) / math.log(2)
    return nats / math.log(2)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _check_square(generator: Tensor) -> None:
    check_shape("generator", generator, least_rank=2, remedy="pass the dense Q, generator.dense()")
    if generator.shape[-2] != generator.shape[-1]:
        raise ShapeError(
            f"generator: expected a square matrix (..., N, N), got shape {tuple(generator.shape)}; "
            "pass the dense Q of one set of tokens"
        )


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
