"""exp from the algebra to the group, and its derivative."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.algebra._square import square, squares
from liegroup_attn.tensors import values_visible, without_autocast

__all__ = ["dexp", "expm"]

_LARGE = 1024.0  # a norm from which on it is worth two products to ask whether it tells the truth


def expm(X: Tensor) -> Tensor:
    """Exponential exp(X) = Σ_k Xᵏ/k!: ``torch.matrix_exp`` where it is exact.

    Never in half precision nor under autocast (garbage), never of a batch of one (torch's other coefficients are
    less exact), and of the transpose where that has the smaller norm: a sink column then costs no digits. A matrix whose
    powers are far smaller than its norm tells (strongly non-normal) is scaled by those powers instead, where values are
    visible; torch scales it by its norm, and no digit would be left. Where ‖X‖ · eps nears 1 (a norm of 1e5 in float32) no
    exponential of a general matrix has digits: for tQ of any size call ``transition_matrix``, which knows its row sums.
    Differentiable any number of times.

    Args:
        X: (..., N, N), any real matrices; for the transition matrix P(t) pass tQ.

    Returns:
        (..., N, N), in float32 for half-precision X. Of a rate matrix it is stochastic up to rounding. NaN or inf in
        one matrix of the batch makes NaN of that one.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square.

    Example:
        >>> expm(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
        tensor([[0.5677, 0.4323],
                [0.4323, 0.5677]])

    Source: [AlMohy2009]_ (powers instead of norms), [Moler2003]_.
    """
    X = square("X", X)
    if X.numel() == 0:
        return X.clone()
    with without_autocast(X):
        size = X.detach().abs()
        lighter = (size.sum(-1).amax(-1) < size.sum(-2).amax(-1))[..., None, None]  # ‖Xᵀ‖₁ < ‖X‖₁
        flat = torch.where(lighter, X.mT, X).reshape(-1, *X.shape[-2:])  # (b, N, N)
        if flat.size(0) == 1:  # torch.matrix_exp of a single matrix is less exact (pytorch #196592)
            flat = torch.cat([flat, flat.detach()])
        if (apart := _overscaled(flat.detach())) is None:
            result = torch.matrix_exp(flat.contiguous())
        else:  # each by its own way, and none through the other, whose gradient may be no number
            result = torch.where(apart, _by_powers(flat.where(apart, 0)), torch.matrix_exp(flat.where(~apart, 0)))
        result = result[: X.shape[:-2].numel()].reshape(X.shape)
        return torch.where(lighter, result.mT, result)


def _overscaled(X: Tensor) -> Tensor | None:
    """Which matrices torch would scale by far too much, (b, 1, 1); None if none, or where no value is visible."""
    if not values_visible(X) or not bool(((norm := _norm(X)) > _LARGE).any()):
        return None
    found = norm > 8 * _reach(X)
    return found[:, None, None] if bool(found.any()) else None


def _norm(X: Tensor) -> Tensor:
    """‖X‖₁, (b,)."""
    return X.abs().sum(-2).amax(-1)


def _reach(X: Tensor) -> Tensor:
    """How large X is as its powers show it, max(‖X⁴‖^(1/4), ‖X⁵‖^(1/5)), (b,)."""
    fourth = torch.linalg.matrix_power(X, 4)
    return torch.maximum(_norm(fourth) ** 0.25, _norm(fourth @ X) ** 0.2)


def _by_powers(X: Tensor) -> Tensor:
    """exp(X) = (Σ_{k ≤ 18} (X/2ˢ)ᵏ/k!)^(2ˢ), s from what powers of X reach: (b, N, N)."""
    squarings = (_reach(X.detach()) / 1.09).log2().ceil().clamp_min(0)[:, None, None]
    part = X * 2.0**-squarings
    eye = torch.eye(X.size(-1), dtype=X.dtype, device=X.device)
    found = eye.expand_as(X)
    for k in range(18, 0, -1):
        found = eye + part @ found / k
    for done in range(int(squarings.max())):
        found = torch.where(done < squarings, found @ found, found)
    return found


def dexp(X: Tensor, H: Tensor) -> Tensor:
    """Fréchet derivative of exp at X in the direction H, ∫₀¹ e^{(1−s)X} H e^{sX} ds = d/dε exp(X + εH) at ε = 0.

    The upper right block of exp([[X, H], [0, X]]). Linear in H; differentiable in both, any number of times.

    Args:
        X: (..., N, N).
        H: (..., N, N), broadcasts with X.

    Returns:
        (..., N, N).

    Raises:
        DtypeError: not floating point.
        ShapeError: not square, or the shapes do not go together.

    Example:
        >>> X = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
        >>> torch.allclose(dexp(X, X), X @ expm(X))  # they commute: d/dt exp(tX) at t = 1
        True

    Source: [Higham2008]_, chapters 3 and 10.
    """
    X, H = squares(("X", X), ("H", H))
    if X.numel() == 0:
        return X.clone()
    with without_autocast(X):
        block, scale = derivative_block(X, H)
        return scale * expm(block)[..., : X.size(-1), X.size(-1) :]


def derivative_block(A: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
    """[[A, E/c], [0, A]] and c, for f([[A, E], [0, A]]) = [[f(A), f'(A; E)], [0, f(A)]].

    f' is linear in E, so any c may be taken: here E is made as large as A, lest it cost scalings or digits.
    """
    size, weight = (torch.linalg.matrix_norm(M.detach())[..., None, None] for M in (A, E))
    scale = torch.where((size > 0) & (weight > 0), weight / size, 1)
    upper = torch.cat([A, E / scale], -1)  # (..., N, 2N)
    return torch.cat([upper, torch.cat([torch.zeros_like(A), A], -1)], -2), scale
