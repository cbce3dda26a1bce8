"""T5's bias: a learned number per bucket of distances."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from liegroup_attn.errors import ShapeError
from liegroup_attn.positional.base import check_sizes
from liegroup_attn.positional.bias import BiasEncoding

__all__ = ["T5Bias"]


class T5Bias(BiasEncoding):
    """A learned number per head and bucket of i − j: short distances have a bucket each, longer ones share by logarithm.

    Args:
        num_heads: H.
        is_causal: whether all buckets look back; otherwise each direction has half of them.
        num_buckets: rows of the table; even where not causal.
        max_distance: from here on all distances share the last bucket.

    Raises:
        ShapeError: sizes that leave a direction fewer than 2 buckets, or ``max_distance`` within the exact ones.

    Example:
        >>> T5Bias(2, is_causal=True).buckets(torch.tensor([0, 1, 15, 16, 128])).tolist()
        [0, 1, 15, 16, 31]

    Source: [Raffel2020]_.
    """

    fractional = False

    def __init__(self, num_heads: int, *, is_causal: bool, num_buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__(num_heads)
        check_sizes(num_buckets=num_buckets, max_distance=max_distance)
        least = 2 if is_causal else 4
        if num_buckets < least or (not is_causal and num_buckets % 2):
            raise ShapeError(
                f"num_buckets: expected {'' if is_causal else 'an even number '}≥ {least}, got {num_buckets}; take 32"
            )
        self.is_causal, self.num_buckets, self.max_distance = is_causal, num_buckets, max_distance
        self.one_way = num_buckets if is_causal else num_buckets // 2
        if max_distance <= self.one_way // 2:
            raise ShapeError(f"max_distance: expected more than {self.one_way // 2}, got {max_distance}; take 128")
        self.table = nn.Parameter(0.02 * torch.randn(num_buckets, num_heads))

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.num_heads}, is_causal={self.is_causal}, num_buckets={self.num_buckets}, max_distance={self.max_distance}"

    def buckets(self, difference: Tensor) -> Tensor:
        """The bucket of i − j, any shape, whole numbers."""
        distance = difference.clamp_min(0) if self.is_causal else difference.abs()
        exact = self.one_way // 2
        scale = (self.one_way - exact) / math.log(self.max_distance / exact)
        # float64: in float32 a boundary such as 32 may fall on either side
        far = exact + torch.floor((distance.double().clamp_min(exact) / exact).log() * scale + 1e-9).long()
        bucket = torch.where(distance < exact, distance.long(), far.clamp_max(self.one_way - 1))
        return bucket if self.is_causal else bucket + self.one_way * (difference < 0)

    def leaves(self) -> tuple[Tensor, ...]:  # noqa: D102
        return (self.table,)

    def between(self, here: Tensor, there: Tensor, *leaves: Tensor) -> Tensor:  # noqa: D102
        (table,) = leaves or self.leaves()
        buckets = self.buckets(here - there)
        if buckets.dim() > 2:
            buckets = buckets.squeeze(-3)  # the axis of heads, which the table fills
        return table.to(here.dtype)[buckets].movedim(-1, -3)
