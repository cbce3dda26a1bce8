"""AccuracyByDepth: accuracy split by the number of steps an answer takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from liegroup_attn.errors import ShapeError

__all__ = ["AccuracyByDepth"]


class AccuracyByDepth(Metric):
    """Share of right answers among the tokens of each depth 0 … max_depth.

    ``update(preds, target, depth)`` takes class scores (B, N, C) or classes (B, N), integers (B, N) twice;
    ``compute()`` returns (max_depth + 1,), from 0 to 1, NaN at a depth without tokens; ``overall()`` is the
    scalar accuracy of all tokens. Draw several runs with :func:`liegroup_attn.plots.plot_accuracy_by_depth`.

    Args:
        max_depth: the deepest depth, ≥ 0.
        ignore_index: tokens whose target has this value do not count, whatever their depth.
        kwargs: torchmetrics' own, such as ``dist_sync_on_step``.

    Raises:
        ShapeError: from ``update``, if the shapes do not go together.
        ValueError: ``max_depth`` is negative; from ``update``, if a depth is outside 0 … max_depth.

    Example:
        >>> metric = AccuracyByDepth(max_depth=2)
        >>> metric.update(torch.tensor([[5, 5, 7]]), torch.tensor([[5, 6, 7]]), torch.tensor([[0, 2, 2]]))
        >>> metric.compute()
        tensor([1.0000,    nan, 0.5000])
        >>> metric.overall()
        tensor(0.6667)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    plot_legend_name = "Depth"
    correct: Tensor
    total: Tensor

    def __init__(self, max_depth: int, ignore_index: int = -100, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if max_depth < 0:
            raise ValueError(f"max_depth: expected an integer ≥ 0, got {max_depth}; give the deepest depth")
        self.max_depth, self.ignore_index = max_depth, ignore_index
        self.add_state("correct", torch.zeros(max_depth + 1, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(max_depth + 1, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, depth: Tensor) -> None:
        """Add a batch: preds (B, N, C) or (B, N), target (B, N), depth (B, N)."""
        if preds.dim() == target.dim() + 1:
            preds = preds.argmax(-1)  # (B, N)
        if not preds.shape == target.shape == depth.shape:
            raise ShapeError(
                f"expected preds (B, N, C) or (B, N), target (B, N), depth (B, N), got {tuple(preds.shape)}, "
                f"{tuple(target.shape)}, {tuple(depth.shape)} (classes taken); give every token one of each"
            )
        kept = target != self.ignore_index
        right, depth = (preds == target)[kept], depth[kept]  # (tokens,)
        if depth.numel() and not (depth.min() >= 0 and depth.max() <= self.max_depth):
            raise ValueError(
                f"depth: expected 0 … {self.max_depth}, got {int(depth.min())} … {int(depth.max())}; "
                "raise max_depth or clamp the depths"
            )
        self.correct = self.correct + torch.bincount(depth[right], minlength=self.max_depth + 1)
        self.total = self.total + torch.bincount(depth, minlength=self.max_depth + 1)

    def compute(self) -> Tensor:
        """Accuracy at each depth, (max_depth + 1,)."""
        return self.correct / self.total

    def overall(self) -> Tensor:
        """Accuracy of all tokens of all processes, a scalar; collective under DDP, as ``compute`` is."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=not self._is_synced):
            return self.correct.sum() / self.total.sum()

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or a sequence of them, torchmetrics' way: returns (fig, ax)."""
        return self._plot(val, ax)
