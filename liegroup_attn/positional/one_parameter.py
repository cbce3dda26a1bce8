"""One-parameter groups of rotations: exp(tA) of one skew-symmetric A at many times, by one eigendecomposition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["one_parameter_rotations"]


def one_parameter_rotations(skew: Tensor, time: Tensor) -> Tensor:
    """exp(tA) for few skew-symmetric A and many t, as exact as the angles t·frequency are in the dtype of t.

    A = V i diag(f) V*, so that exp(tA) = V diag(e^{itf}) V*. The derivative does not go through that of V, which has no
    limit where frequencies meet; in the basis V it is a product, entry by entry, with the divided differences
    Φ_kl = t e^{it(f_k + f_l)/2} sinc(t(f_k − f_l)/2), which are smooth. Differentiable once.

    Args:
        skew: A, (..., b, b), skew-symmetric.
        time: t, (...); broadcasts with the leading dimensions of ``skew``.

    Returns:
        (..., b, b).

    Example:
        >>> A = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> one_parameter_rotations(A, torch.tensor([0.0, 1.0]))[1]
        tensor([[ 0.5403, -0.8415],
                [ 0.8415,  0.5403]])

    Source: [Higham2008]_, chapter 3.
    """
    rotations: Tensor = _OneParameter.apply(skew, time)[0]
    return rotations


class _OneParameter(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(skew: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = skew.double()
        frequencies, vectors = torch.linalg.eigh(torch.complex(torch.zeros_like(wide), -wide))
        frequencies, vectors = (
            frequencies.to(time.dtype),
            vectors.to(torch.complex128 if time.dtype == torch.float64 else torch.complex64),
        )
        angles = time.unsqueeze(-1) * frequencies  # (..., b)
        turned = vectors * torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)
        return torch.einsum("...ik,...jk->...ij", turned, vectors.conj()).real.contiguous(), frequencies, vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        rotations, frequencies, vectors = output
        ctx.mark_non_differentiable(frequencies, vectors)
        ctx.save_for_backward(*inputs, rotations, frequencies, vectors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None]:
        skew, time, rotations, frequencies, vectors = ctx.saved_tensors
        by_skew = by_time = None
        if ctx.needs_input_grad[0]:
            inside = torch.einsum("...ki,...kj->...ij", vectors.conj(), grad.to(vectors.dtype))
            inside = torch.einsum("...ik,...kj->...ij", inside, vectors)  # V* G V
            mean = (frequencies.unsqueeze(-1) + frequencies.unsqueeze(-2)) / 2
            apart = (frequencies.unsqueeze(-1) - frequencies.unsqueeze(-2)) / 2
            when = time[..., None, None]
            size = when * torch.sinc(when * apart / torch.pi)
            inside = inside * torch.complex(size * (when * mean).cos(), -size * (when * mean).sin())
            inside = inside.sum_to_size(vectors.shape)  # of all times
            by_skew = (vectors @ inside @ vectors.mH).real.to(skew.dtype)
        if ctx.needs_input_grad[1]:
            speed = torch.einsum("...ik,...kj->...ij", rotations, skew.to(rotations.dtype))  # exp(tA) A
            by_time = (grad * speed).sum((-2, -1)).sum_to_size(time.shape)
        return by_skew, by_time
