"""What metrics of matrices share: the mean, or the worst, of one number per matrix or row over all updates."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["Mean", "Worst"]


class _Accumulated(Metric):
    """States under names of their own, and the plot.

    A ``MetricCollection`` keeps one set of states for metrics whose states agree in name and value after the first update,
    and from then on updates one of them alone. Two measures may well agree on a first batch (both 0, say), so the names
    here tell the class and its settings.
    """

    full_state_update = False

    def __init__(self, *settings: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        settled = f"{type(self).__name__}{settings or ''}".replace("-", "minus")
        self._owner = re.sub(r"\W+", "_", settled)

    def _name(self, state: str) -> str:
        return f"{state}_{self._owner}"

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or a sequence of them, torchmetrics' way: returns (fig, ax)."""
        return self._plot(val, ax)


class Mean(_Accumulated):
    """Mean of one number per matrix, or per row, over all updates; each weighs the same, whatever batch or process.

    NaN or an infinity in one of them is in the mean. States are float32; ``set_dtype(torch.float64)`` makes them wider.

    Args:
        settings: what sets this metric apart from others of its class.
        kwargs: torchmetrics' own, such as ``dist_sync_on_step``.
    """

    def __init__(self, *settings: Any, **kwargs: Any) -> None:
        super().__init__(*settings, **kwargs)
        self.add_state(self._name("total"), torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state(self._name("count"), torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, values: Tensor) -> None:
        total, count = getattr(self, self._name("total")), getattr(self, self._name("count"))
        setattr(self, self._name("total"), total + values.sum().to(total.dtype))
        setattr(self, self._name("count"), count + values.numel())

    def compute(self) -> Tensor:
        """The mean, a scalar; NaN if there was nothing."""
        return getattr(self, self._name("total")) / getattr(self, self._name("count"))


class Worst(_Accumulated):
    """Largest of one number ≥ 0 per matrix over all updates and processes; NaN if one of them was.

    Args:
        settings: what sets this metric apart from others of its class.
        kwargs: torchmetrics' own, such as ``dist_sync_on_step``.
    """

    def __init__(self, *settings: Any, **kwargs: Any) -> None:
        super().__init__(*settings, **kwargs)
        self.add_state(self._name("worst"), torch.tensor(-math.inf), dist_reduce_fx="max")

    def _add(self, values: Tensor) -> None:
        worst = getattr(self, self._name("worst"))
        setattr(self, self._name("worst"), torch.cat([values.flatten().to(worst.dtype), worst[None]]).amax())

    def compute(self) -> Tensor:
        """The largest, a scalar; NaN if there was nothing."""
        worst = getattr(self, self._name("worst"))
        return worst.masked_fill(worst == -math.inf, math.nan)
