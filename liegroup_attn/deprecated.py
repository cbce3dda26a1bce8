"""Keywords of before: one warning, one release."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

__all__ = ["renamed", "warn_of"]

P = ParamSpec("P")
R = TypeVar("R")


def warn_of(old: str, new: str, stacklevel: int = 3) -> None:
    """A FutureWarning that names what to write instead."""
    warnings.warn(f"{old} will go in the next release; {new}", FutureWarning, stacklevel=stacklevel)


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Take keywords by their old names (old = new), too, and say the new ones; TypeError if one is given under both."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            given: dict[str, Any] = kwargs
            for old, new in names.items():
                if old in given:
                    value = given.pop(old)
                    if new in given:
                        raise TypeError(f"{old}: expected {new} alone, got both; {old} is its old name")
                    warn_of(old, f"write {new}=…")
                    given[new] = value
            return function(*args, **kwargs)

        return wrapped

    return decorate
