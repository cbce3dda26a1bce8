"""What metrics of matrices share: the mean, or the worst, of one number per matrix or row over all updates."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["Mean", "MeanOfGenerators", "MeanOfTransitions", "Worst"]


class _Accumulated(Metric):
    """States under names of their own, and the plot.

    A ``MetricCollection`` keeps one set of states for metrics whose states agree in name and value after the first update,
    and from then on updates one of them alone. Two measures may well agree on a first batch (both 0, say), so the names
    here tell the class and its settings.

    Args:
        settings: what sets this metric apart from others of its class.
        kwargs: torchmetrics' own, such as ``dist_sync_on_step``.
    """

    is_differentiable = True
    higher_is_better: bool | None = None
    full_state_update = False
    plot_lower_bound = 0.0

    def __init__(self, *, settings: tuple[Any, ...] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._settings = settings
        self._owner = re.sub(r"\W+", "_", f"{type(self).__name__}{settings or ''}".replace("-", "minus"))

    def _name(self, state: str) -> str:
        return f"{state}_{self._owner}"

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or a sequence of them, torchmetrics' way: returns (fig, ax)."""
        return self._plot(val, ax)


class Mean(_Accumulated):
    """Mean of one number per matrix, or per row, over all updates; each weighs the same, whatever batch or process.

    NaN or an infinity in one of them is in the mean. States are float32; ``set_dtype(torch.float64)`` makes them wider.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state(self._name("total"), torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state(self._name("count"), torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, values: Tensor) -> None:
        total, count = getattr(self, self._name("total")), getattr(self, self._name("count"))
        setattr(self, self._name("total"), total + values.sum().to(total.dtype))
        setattr(self, self._name("count"), count + values.numel())

    def compute(self) -> Tensor:
        """The mean, a scalar; NaN if there was nothing."""
        return getattr(self, self._name("total")) / getattr(self, self._name("count"))


# Two, because torchmetrics reads from the signature of ``update`` which of a collection's arguments a metric takes.


class MeanOfTransitions(Mean):
    """Mean of ``measure``, a function of mixing matrices and the settings."""

    measure: ClassVar[Callable[..., Tensor]]

    def update(self, transition: Tensor) -> None:
        """Add the matrices of (..., N, M)."""
        self._add(self.measure(transition, *self._settings))


class MeanOfGenerators(Mean):
    """Mean of ``measure``, a function of generators and the settings."""

    measure: ClassVar[Callable[..., Tensor]]

    def update(self, generator: Tensor) -> None:
        """Add generators (..., N, N)."""
        self._add(self.measure(generator, *self._settings))


class Worst(_Accumulated):
    """Largest of one number ≥ 0 per matrix over all updates and processes; NaN if one of them was."""

    higher_is_better = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state(self._name("worst"), torch.tensor(-math.inf), dist_reduce_fx="max")

    def _add(self, values: Tensor) -> None:
        worst = getattr(self, self._name("worst"))
        setattr(self, self._name("worst"), torch.cat([values.flatten().to(worst.dtype), worst[None]]).amax())

    def compute(self) -> Tensor:
        """The largest, a scalar; NaN if there was nothing."""
        worst = getattr(self, self._name("worst"))
        return worst.masked_fill(worst == -math.inf, math.nan)
