"""Numbers of modules that torch.compile takes as constants."""

from __future__ import annotations

from typing import Any

__all__ = ["Constant"]


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
