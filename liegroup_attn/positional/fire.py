"""FIRE: a learned function of distance over the distance to the beginning."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liegroup_attn import manifolds
from liegroup_attn.positional.base import check_sizes
from liegroup_attn.positional.bias import BiasEncoding

__all__ = ["FIRE"]

_MOST_HIDDEN = 2**22  # numbers of the hidden layer at a time, where no gradient needs them all


class FIRE(BiasEncoding):
    """f(ψ(i − j) / ψ(max(L, i))) is added to the scores, ψ(d) = log(cd + 1), f a small network with one output a head.

    Means something under a causal mask alone. However long the context, f sees numbers from 0 to 1, hence "functional interpolation". c > 0 and the threshold L > 0
    are learned, on the manifold of positive numbers. Not relative: the same distance counts less further on, once i > L.

    Args:
        num_heads: H.
        hidden: width of the one hidden layer of f.
        scale: c at the start.
        threshold: L at the start.

    Raises:
        ShapeError: sizes < 1.
        ValueError: ``scale`` or ``threshold`` not positive.

    Example:
        >>> FIRE(2).between(torch.tensor([[3.0]]), torch.tensor([[0.0, 3.0]])).shape
        torch.Size([2, 1, 2])

    Source: [Li2024]_.
    """

    causal_only = True
    relative = False
    scale: Tensor
    threshold: Tensor

    def __init__(self, num_heads: int, *, hidden: int = 32, scale: float = 0.1, threshold: float = 512.0) -> None:
        super().__init__(num_heads)
        check_sizes(hidden=hidden)
        for name, number in (("scale", scale), ("threshold", threshold)):
            if not 0 < number < float("inf"):
                raise ValueError(f"{name}: expected a positive number, got {number}; the paper has 0.1 and 512")
        self.hidden = hidden
        manifolds.hold(self, "scale", torch.tensor([float(scale)]), manifolds.PositiveVectors())
        manifolds.hold(self, "threshold", torch.tensor([float(threshold)]), manifolds.PositiveVectors())
        self.inner = nn.Linear(1, hidden)
        self.outer = nn.Linear(hidden, num_heads, bias=False)  # a constant per head would change nothing

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.num_heads}, hidden={self.hidden}"

    def leaves(self) -> tuple[Tensor, ...]:  # noqa: D102
        return self.scale, self.threshold, self.inner.weight, self.inner.bias, self.outer.weight

    def between(self, here: Tensor, there: Tensor, *leaves: Tensor) -> Tensor:  # noqa: D102
        here, there = (at.squeeze(-3) if at.dim() > 2 else at for at in (here, there))  # heads are f's outputs
        rows = here.size(-2)
        if not torch.is_grad_enabled():
            rows = max(1, _MOST_HIDDEN // max(1, there.size(-1) * self.hidden))
        wide = [leaf.to(here.dtype) for leaf in leaves or self.leaves()]
        return torch.cat([_rows(part, there, *wide) for part in here.split(max(1, rows), -2)], -2)


def _rows(here: Tensor, there: Tensor, c: Tensor, least: Tensor, inner: Tensor, bias: Tensor, outer: Tensor) -> Tensor:
    distance = (here - there).clamp_min(0)  # what lies ahead is hidden by the causal mask
    share = (c * distance).log1p() / (c * torch.maximum(here, least)).log1p()
    hidden = nn.functional.linear(share.unsqueeze(-1), inner, bias).relu()
    return nn.functional.linear(hidden, outer).movedim(-1, -3)  # (..., N, M, H)
