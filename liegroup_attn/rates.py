"""Rate functions: scores → rates ≥ 0."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["exponential", "softplus", "squared_relu"]


def exponential(scores: Tensor) -> Tensor:
    """Exponential rates r = eˢ, under which softmax is the jump chain: scores are log-rates.

    Unbounded: at ‖Q‖ near 2000 the rows of a float32 exponential are off by 3e-5. Prefer ``rate_fn=None``, the
    same chain with bounded jump rates, unless the size of the scores carries meaning.

    Args:
        scores: (...), any real.

    Returns:
        (...), rates > 0.

    Example:
        >>> import torch
        >>> exponential(torch.tensor([0.0]))
        tensor([1.])
    """
    return scores.exp()


def softplus(scores: Tensor) -> Tensor:
    """Softplus rates r = log(1 + eˢ): positive, linear for large scores.

    Args:
        scores: (...), any real.

    Returns:
        (...), rates > 0.

    Example:
        >>> import torch
        >>> softplus(torch.tensor([0.0]))
        tensor([0.6931])
    """
    return F.softplus(scores)


def squared_relu(scores: Tensor) -> Tensor:
    """Squared-ReLU rates r = max(s, 0)²: sparse, a negative score closes the edge.

    Args:
        scores: (...), any real.

    Returns:
        (...), rates ≥ 0.

    Example:
        >>> import torch
        >>> squared_relu(torch.tensor([-1.0, 3.0]))
        tensor([0., 9.])
    """
    return F.relu(scores).square()
