"""BitsPerByte: mean cross-entropy of a byte language model, in bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from liegroup_attn.errors import ShapeError
from liegroup_attn.metrics.functional import bits_per_byte

__all__ = ["BitsPerByte"]


class BitsPerByte(Metric):
    """Mean cross-entropy per target in bits: bits per byte where a token is a byte.

    ``update(preds, target)`` takes unnormalized log-probabilities (B, N, V) and integers (B, N);
    ``compute()`` returns a scalar. Every token weighs the same, whatever batch or process it came in.

    Args:
        ignore_index: targets with this value do not count.
        kwargs: torchmetrics' own, such as ``dist_sync_on_step``.

    Raises:
        ShapeError: from ``update``, if ``preds`` is not ``target`` with one more axis.

    Example:
        >>> metric = BitsPerByte()
        >>> metric.update(torch.zeros(2, 8, 256), torch.randint(256, (2, 8)))
        >>> metric.compute()  # knows nothing: log2(256)
        tensor(8.0000)
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    nats: Tensor
    count: Tensor

    def __init__(self, ignore_index: int = -100, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ignore_index = ignore_index
        self.add_state("nats", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: preds (B, N, V), target (B, N)."""
        if preds.shape[:-1] != target.shape or preds.dim() == 0:
            raise ShapeError(
                f"preds: expected the target's shape {tuple(target.shape)} and one more axis, "
                f"got {tuple(preds.shape)}; put the classes on the last axis"
            )
        scores, target = preds.flatten(0, -2).float(), target.flatten()  # (B·N, V), (B·N,)
        nats = F.cross_entropy(scores, target, reduction="sum", ignore_index=self.ignore_index)
        self.nats = self.nats + nats
        self.count = self.count + (target != self.ignore_index).sum()

    def compute(self) -> Tensor:
        """Bits per counted target; NaN if there was none."""
        return bits_per_byte(self.nats / self.count)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or a sequence of them, torchmetrics' way: returns (fig, ax)."""
        return self._plot(val, ax)
