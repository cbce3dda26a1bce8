"""The principal logarithm: from the group back to the algebra."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liegroup_attn.algebra._square import eye_like, square
from liegroup_attn.algebra.exponential import derivative_block
from liegroup_attn.checks import check_finite
from liegroup_attn.errors import ConvergenceError, GeneratorError
from liegroup_attn.tensors import values_visible

__all__ = ["logm"]

_NEAR = 0.25  # ‖A − I‖₁ from which eight nodes give the logarithm to double precision
_NODES = 8
_MOST_ROOTS = 64
_MOST_STEPS = 100


def logm(A: Tensor) -> Tensor:
    """Principal logarithm: the X with exp(X) = A whose eigenvalues have imaginary parts in (−π, π).

    Inverse scaling and squaring in float64: square roots by the Denman–Beavers iteration until
    A^{1/2^k} is near I, then log(I + E) by Gauss–Legendre quadrature of ∫₀¹ E(I + sE)⁻¹ ds (a Padé approximant).
    The derivative is the upper right block of log([[A, E], [0, A]]), hence exact; differentiable any number of times.
    It is as sensitive as the logarithm: the error grows with the condition number of A.

    Args:
        A: (..., N, N), nonsingular, without eigenvalues on the negative real axis.

    Returns:
        (..., N, N), real, in float32 for half-precision A.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square.
        GeneratorError: NaN or inf, singular to rounding, or an eigenvalue on the negative real axis (checked where
            values are visible; elsewhere the result is NaN or meaningless).
        ConvergenceError: an eigenvalue too near that axis.

    Example:
        >>> from liegroup_attn.algebra import expm
        >>> logm(expm(torch.tensor([[-1.0, 1.0], [3.0, -3.0]])))
        tensor([[-1.0000,  1.0000],
                [ 3.0000, -3.0000]])
        >>> logm(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        Traceback (most recent call last):
        ...
        liegroup_attn.errors.GeneratorError: A: expected a matrix with a real principal logarithm, got the eigenvalue -1 on the negative real axis; only exp(X) of a real X has one, so take a shorter time or project

    Source: [Cheng2001]_; [Higham2008]_, chapters 6 and 11.
    """
    wide = square("A", A).double()
    check_finite("A", wide)
    reason = no_logarithm(wide, torch.finfo(A.dtype).eps)
    if reason is not None:
        raise GeneratorError(
            f"A: expected a matrix with a real principal logarithm, got {reason}; only exp(X) of a real X has one, "
            "so take a shorter time or project"
        )
    result = _Logarithm.apply(wide)
    if values_visible(result) and not bool(result.isfinite().all()):
        raise ConvergenceError(
            f"A: expected square roots to converge within {_MOST_STEPS} steps, got none; an eigenvalue is too near the "
            "negative real axis, take a shorter time"
        )
    return result.to(square("A", A).dtype)


def no_logarithm(A: Tensor, eps: float) -> str | None:
    """Why some matrix of a batch has no real principal logarithm; None if all do, or where values are not visible."""
    if not values_visible(A):
        return None
    values = torch.linalg.eigvals(A.detach())  # (..., N)
    rounding = 4 * eps * torch.linalg.matrix_norm(A.detach())[..., None]
    singular = values.abs() <= rounding
    if bool(singular.any()):
        return f"a singular matrix (eigenvalue {float(values[singular][0].real):.1e})"
    negative = (values.real < 0) & (values.imag.abs() <= rounding)
    if bool(negative.any()):
        return f"the eigenvalue {float(values[negative][0].real):g} on the negative real axis"
    return None


class _Logarithm(torch.autograd.Function):
    """log of (..., N, N) in float64; its derivative is itself, of a block matrix."""

    @staticmethod
    def forward(A: Tensor) -> Tensor:
        return _log(A.reshape(-1, *A.shape[-2:])).reshape(A.shape) if A.numel() else A.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _dlog(ctx.saved_tensors[0].mT, gradient)  # the adjoint of the derivative is that at Aᵀ

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _dlog(ctx.saved_tensors[0], tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], A: Tensor) -> tuple[Tensor, int]:
        return _Logarithm.apply(A.movedim(in_dims[0], 0)), 0


def _dlog(A: Tensor, E: Tensor) -> Tensor:
    """Fréchet derivative of log at A in the direction E."""
    if A.numel() == 0:
        return E.clone()
    block, scale = derivative_block(A, E)
    return scale * _Logarithm.apply(block)[..., : A.size(-1), A.size(-1) :]


def _log(A: Tensor) -> Tensor:
    """Principal logarithm of (b, N, N), float64; each matrix takes as many square roots as it needs."""
    eye, root = eye_like(A), A.clone()
    doublings = torch.zeros(A.size(0), 1, 1, dtype=A.dtype, device=A.device)
    for _ in range(_MOST_ROOTS):
        far = _norm(root - eye) > _NEAR
        if not bool(far.any()):
            break
        root[far] = _square_root(root[far])
        doublings[far] += 1
    E = root - eye
    nodes, weights = (_[:, None, None, None].to(A.device) for _ in _gauss_legendre())
    terms = torch.linalg.solve_ex(eye + nodes * E, E.expand(_NODES, *E.shape)).result  # (nodes, b, N, N)
    return 2**doublings * (weights * terms).sum(0)


def _square_root(A: Tensor) -> Tensor:
    """Principal square root of (b, N, N): the Denman–Beavers iteration, X → A^{1/2} and Y → A^{−1/2}.

    Scaling by the determinants brings the eigenvalues near the unit circle first.
    """
    X, Y = A, eye_like(A).expand_as(A)
    for _ in range(_MOST_STEPS):
        both = torch.stack([X, Y])
        shrink = (-torch.linalg.slogdet(both).logabsdet.sum(0) / (2 * A.size(-1))).exp()[:, None, None]
        inverse = torch.linalg.inv_ex(both).inverse / shrink
        before, X, Y = X, (shrink * X + inverse[1]) / 2, (shrink * Y + inverse[0]) / 2
        if not bool((_norm(X - before) > 1e-8 * _norm(X)).any()):  # quadratic: this step squared the error
            break
    return X


def _gauss_legendre() -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1], by the eigenvalues of the Jacobi matrix (Golub and Welsch)."""
    k = torch.arange(1, _NODES, dtype=torch.float64)
    off = torch.diag_embed(k / (4 * k.square() - 1).sqrt(), 1)
    values, vectors = torch.linalg.eigh(off + off.mT)
    return (1 + values) / 2, vectors[0].square()


def _norm(matrix: Tensor) -> Tensor:
    """‖·‖₁ of each matrix."""
    return matrix.abs().sum(-2).amax(-1)
