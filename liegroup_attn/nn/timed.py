"""What layers with a flow share: a factor on their time that is saved, and numbers that torch.compile takes as constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liegroup_attn.resettable import Resettable

__all__ = ["Constant", "Timed"]


class Constant:
    """A number of a module that is a constant of a compiled graph: another value compiles anew.

    torch.compile makes a symbol of a float once it has seen two of its values, and the number of hops cannot be counted with
    a symbol. Text stays text.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.key = f"_{name}"

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            return self
        if (
            text := module.__dict__.get(self.key, module.__dict__.get(self.key[1:]))
        ) is None:  # pickled before it was text
            raise AttributeError(self.key[1:])
        return float(text)

    def __set__(self, module: Any, value: float) -> None:
        module.__dict__[self.key] = repr(float(value))


class Timed(Resettable):
    """A module whose time ``scale_time`` multiplies. The factor is saved with the parameters, unless it is 1."""

    time_scale: float = Constant()  # type: ignore[assignment]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.time_scale = 1.0

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.time_scale != 1:
            destination[f"{prefix}time_scale"] = torch.tensor(self.time_scale, dtype=torch.float64, device="cpu")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        factor = state_dict.pop(f"{prefix}time_scale", None)
        whole = {prefix + key for key in self.state_dict() if key != "time_scale"} <= state_dict.keys()
        if factor is not None or whole:  # a part, such as an adapter, says nothing of the time
            self.time_scale = 1.0 if factor is None else float(factor)
        for name in ("time", "position_rate"):
            stored = state_dict.get(f"{prefix}{name}")
            if isinstance(stored, Tensor) and stored.dim() == 2:
                state_dict[f"{prefix}{name}"] = stored.squeeze(-1)  # they were columns once
        super()._load_from_state_dict(state_dict, prefix, *args)
