"""Modules that can be filled again: what is made on the meta device and moved by ``to_empty`` has no values."""

from __future__ import annotations

import inspect
import threading
from typing import Any, Self

import torch
from torch import Tensor, nn

__all__ = ["Resettable"]

_making = threading.local()


class Resettable(nn.Module):
    """A module whose ``reset_parameters`` gives its own parameters and buffers what its constructor gave them.

    It remembers what it was made of and makes another, so that no start value is written twice. Modules inside it have a
    ``reset_parameters`` of their own, as torch's have; ``model.apply`` reaches all:

    Example:
        >>> from liegroup_attn.nn import RelativeRates
        >>> with torch.device("meta"):
        ...     rates = RelativeRates(2, 4)
        >>> rates = rates.to_empty(device="cpu").apply(lambda module: module.reset_parameters())
        >>> torch.equal(rates.past, RelativeRates(2, 4).past)
        True
    """

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """A module that knows its constructor's arguments."""
        module = super().__new__(cls)
        module.__dict__["_made_of"] = args, options
        return module

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start values for parameters and buffers of this module, not of those inside it; random ones are drawn anew."""
        own = {**self._parameters, **self._buffers}
        there = [tensor for tensor in own.values() if tensor is not None]
        if not there or getattr(_making, "one", False):  # a constructor that ends with a reset has its values
            return
        args, options = self.__dict__["_made_of"]
        made_of = inspect.signature(type(self)).bind(*args, **options)
        for given in (made_of.arguments, *(x for x in made_of.arguments.values() if isinstance(x, dict))):
            if "device" in given:
                given["device"] = there[0].device
        _making.one = True
        try:
            with torch.device(there[0].device):
                fresh = type(self)(*made_of.args, **made_of.kwargs)
        finally:
            _making.one = False
        for name, start in {**fresh._parameters, **fresh._buffers}.items():
            if start is not None and (tensor := own.get(name)) is not None:
                tensor.copy_(_like(start, tensor))


def _like(start: Tensor, tensor: Tensor) -> Tensor:
    """Spread over processes as the other is."""
    if not hasattr(tensor, "device_mesh"):
        return start
    from torch.distributed.tensor import distribute_tensor

    spread: Any = tensor
    return distribute_tensor(start.to(tensor.dtype), spread.device_mesh, spread.placements)
