"""ALiBi: scores fall linearly with distance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liegroup_attn.positional.bias import BiasEncoding

__all__ = ["ALiBi"]


class ALiBi(BiasEncoding):
    """``−m_h |i − j|`` is added to the scores of head h; as log-rates, a jump over distance d is e^(−m_h d) times as likely.

    Slopes are a geometric sequence that starts at 2^(−8/H) and has that ratio; where H is no power of two, those of the
    next smaller power, then every other one of the next larger. Under a causal mask this is the published form, without a
    mask it is the symmetric one.

    Args:
        num_heads: H.

    Raises:
        ShapeError: H < 1.

    Example:
        >>> ALiBi(8).slopes().tolist()[:3]
        [0.5, 0.25, 0.125]

    Source: [Press2022]_.
    """

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.num_heads}"

    def slopes(self) -> Tensor:
        """m, (H,), float64."""
        whole = 2 ** math.floor(math.log2(self.num_heads))
        first = _geometric(whole)
        return torch.cat([first, _geometric(2 * whole)[::2][: self.num_heads - whole]])

    def between(self, here: Tensor, there: Tensor, *leaves: Tensor) -> Tensor:  # noqa: D102
        slopes = self.slopes().to(here).view(-1, 1, 1)
        return -slopes * (here - there).abs()


def _geometric(heads: int) -> Tensor:
    return 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1, dtype=torch.float64))
