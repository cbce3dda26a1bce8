"""The generator whose jump chain is linear attention."""

from __future__ import annotations

import math
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor

from liegroup_attn.checks import check_finite, check_shape
from liegroup_attn.errors import DtypeError, GeneratorError, ShapeError
from liegroup_attn.generators.base import Generator
from liegroup_attn.tensors import at_least_float32, fits, values_visible, without_autocast

__all__ = ["LowRankGenerator"]

_BLOCK = 128  # rows of a causal block; memory is about N · (_BLOCK + r · D / _BLOCK)


class LowRankGenerator(Generator):
    """Q = λ(S − I), S = left · rightᵀ with rows normalized: linear attention as a jump chain; acts in O(N r D).

    Every hop is exact and never forms N×N, causal or not. Not causal, ``LowRank`` sums all hops in closed form.
    A row whose normalizer is 0 (or underflows) jumps to itself: that row of Q is 0 and the token keeps its value.

    Args:
        left: (..., N, r), φ(query) ≥ 0; any scale per row, it cancels.
        right: (..., N, r), φ(key) ≥ 0, same tokens; any scale per matrix, it cancels.
        jump_rate: λ ≥ 0, a number or broadcastable to (..., N); (heads, 1) is one per head. One per token is for hops
            only.
        is_causal: S is lower triangular, normalized over j ≤ i.

    Raises:
        ShapeError: wrong rank, N = 0, r = 0, other tokens or features in ``right`` than in ``left``.
        DtypeError: mixed dtypes.
        GeneratorError: negative or non-finite features or rates (numbers and CPU tensors).

    Example:
        >>> Q = LowRankGenerator(torch.ones(2, 1), torch.tensor([[1.0], [3.0]]), jump_rate=2.0)
        >>> Q.dense()
        tensor([[-1.5000,  1.5000],
                [ 0.5000, -0.5000]])

    Source: [Katharopoulos2020]_ (S); docs/mathematics, "Low rank, linear time".
    """

    factored = True

    def __init__(
        self, left: Tensor, right: Tensor, *, jump_rate: Tensor | float = 1.0, is_causal: bool = False
    ) -> None:
        self.batch_shape = _check_features(left, right)
        self.num_states = left.size(-2)
        self.is_causal = is_causal
        self.jump_rate = _check_rate(jump_rate, torch.Size([*self.batch_shape, self.num_states]))
        with without_autocast(left):
            left = _scaled_down(at_least_float32(left), (-1,))
            right = _scaled_down(at_least_float32(right), (-2, -1))
            ones = torch.ones_like(right[..., :1])
            total = causal_product(left, right, ones) if is_causal else left @ (right.mT @ ones)  # (..., N, 1)
        # S = sources · targetsᵀ, but rows that are ``still`` have no source and jump to themselves.
        self.still = total < torch.finfo(total.dtype).tiny
        self.sources = (left / total.masked_fill(self.still, 1)).masked_fill(self.still, 0)
        self.targets = right

    @property
    def has_rate_per_token(self) -> bool:
        """Whether λ differs from token to token, where no closed form is known."""
        return isinstance(self.jump_rate, Tensor) and self.jump_rate.size(-1) > 1

    def apply(self, value: Tensor) -> Tensor:  # noqa: D102
        return self._scaled(self.jump(value) - value, self.jump_rate)

    def jump(self, value: Tensor) -> Tensor:  # noqa: D102
        dtype = torch.promote_types(self.sources.dtype, value.dtype)
        with without_autocast(value):
            left, right, wide = self.sources.to(dtype), self.targets.to(dtype), value.to(dtype)
            moved = causal_product(left, right, wide) if self.is_causal else left @ (right.mT @ wide)
            return torch.where(self.still, wide, moved).to(value.dtype)

    def jump_chain(self) -> Tensor:
        """S as a matrix (..., N, N), float32 or float64."""
        with without_autocast(self.sources):
            chain = self.sources @ self.targets.mT
        chain = chain.tril() if self.is_causal else chain
        return torch.where(self.still, torch.eye(self.num_states, dtype=chain.dtype, device=chain.device), chain)

    def dense(self) -> Tensor:  # noqa: D102
        return self._scaled(self._moved(), self.jump_rate)

    def unit(self) -> Tensor:  # noqa: D102
        return self._scaled(self._moved(), self._share())

    def hop(self, value: Tensor) -> Tensor:  # noqa: D102
        return value + self._scaled(self.jump(value) - value, self._share())

    def jump_intensities(self) -> Tensor:  # noqa: D102
        rate = torch.as_tensor(self.jump_rate, dtype=self.sources.dtype, device=self.sources.device)
        return rate if rate.dim() else rate.unsqueeze(0)

    def rate_bound(self) -> float | Tensor:
        """λ, the largest where tokens differ; 1 where it is 0, for any bound will do there, but its gradient needs hops."""
        if isinstance(self.jump_rate, float):
            return self.jump_rate or 1.0
        bound = self.jump_rate.detach().amax(-1, keepdim=True)
        return bound.where(bound > 0, 1)

    def _moved(self) -> Tensor:
        """S − I."""
        chain = self.jump_chain()
        return chain - torch.eye(self.num_states, dtype=chain.dtype, device=chain.device)

    def _share(self) -> Tensor | float:
        """λ/Λ, in [0, 1]."""
        if isinstance(self.jump_rate, float):
            return float(self.jump_rate > 0)
        return self.jump_rate / self.rate_bound()

    def _scaled(self, moved: Tensor, rate: Tensor | float) -> Tensor:
        return rate * moved if isinstance(rate, float) else rate.unsqueeze(-1).to(moved.dtype) * moved


def _scaled_down(features: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Largest entry near 1, by a power of two, which costs no digit: sums of products then stay in range."""
    most = features.detach().amax(dims, keepdim=True)
    return features * torch.exp2(-most.where(most > 0, 1).log2().floor().clamp_min(-120))  # 2¹²⁸ is none in float32


def causal_product(left: Tensor, right: Tensor, value: Tensor) -> Tensor:
    """tril(left · rightᵀ) · value, block of rows by block of rows: (..., N, r), (..., N, r), (..., N, D) → (..., N, D)."""
    n = value.size(-2)
    block = min(_BLOCK, n)
    left, right, value = (
        F.pad(x, (0, 0, 0, -n % block)).unflatten(-2, (-1, block)) for x in (left, right, value)
    )  # (..., N / block, block, ·)
    seen = right.mT @ value  # (..., N / block, r, D)
    before = F.pad(seen, (0, 0, 0, 0, 1, 0))[..., :-1, :, :].cumsum(-3)
    inside = (left @ right.mT).tril() @ value
    return (left @ before + inside).flatten(-3, -2)[..., :n, :]


def _check_features(left: Tensor, right: Tensor) -> torch.Size:
    """Raise unless both are features ≥ 0 of the same tokens; the batch of both."""
    for name, features in (("left", left), ("right", right)):
        check_shape(name, features, least_rank=2, remedy="give (..., tokens, features)")
        check_finite(name, features)
        if values_visible(features) and float(features.detach().min()) < 0:
            raise GeneratorError(
                f"{name}: expected nonnegative features, got {float(features.detach().min()):g}; use a positive feature "
                "map such as elu_plus_one"
            )
    if right.shape[-2:] != left.shape[-2:] or 0 in left.shape[-2:]:
        raise ShapeError(
            f"right: expected left's N ≥ 1 tokens and r ≥ 1 features {tuple(left.shape)}, got {tuple(right.shape)}; a "
            "generator needs queries and keys to be the same tokens, through the same feature map"
        )
    if left.dtype != right.dtype:
        raise DtypeError(f"right: expected {left.dtype} as left, got {right.dtype}; convert one of them")
    try:
        return torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    except RuntimeError:
        raise ShapeError(
            f"right: expected a batch that broadcasts with left's {tuple(left.shape)}, got {tuple(right.shape)}; "
            "give every query head a key head"
        ) from None


def _check_rate(rate: Tensor | float, rows: torch.Size) -> Tensor | float:
    """λ as a number, or as a tensor with at least one dimension, broadcastable to ``rows`` = (..., N)."""
    if isinstance(rate, Tensor):
        check_shape("jump_rate", rate, least_rank=0, remedy="give one rate per matrix")
        if not fits(rate.shape, rows):
            raise ShapeError(
                f"jump_rate: expected a number or a shape broadcastable to {tuple(rows)}, got {tuple(rate.shape)}; "
                "for one rate per head give (heads, 1)"
            )
        seen = (float(rate.detach().min()), float(rate.detach().max())) if values_visible(rate) else ()
    elif isinstance(rate, numbers.Real):
        seen = (float(rate),)
    else:
        raise DtypeError(f"jump_rate: expected a number or a tensor, got {type(rate).__name__}; convert it with float")
    for number in seen:
        if not 0 <= number < math.inf:
            raise GeneratorError(f"jump_rate: expected 0 ≤ rate < inf, got {number:g}; pass it through a softplus")
    return torch.atleast_1d(rate) if isinstance(rate, Tensor) else float(rate)
