"""Constructors that hand options on: an option is written where it is used, and every signature shows it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, get_type_hints

__all__ = ["options_of", "takes_options_of"]

F = TypeVar("F", bound=Callable[..., None])


def options_of(kind: type) -> dict[str, inspect.Parameter]:
    """Keyword arguments of a constructor."""
    return {name: p for name, p in inspect.signature(kind).parameters.items() if p.kind is p.KEYWORD_ONLY}


def takes_options_of(*kinds: type, without: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Say in a constructor's signature that its ``**options`` are keyword arguments of these classes, ``without`` some."""

    def decorate(init: F) -> F:
        signature = inspect.signature(init)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = {p.name for p in own} | set(without)
        more: dict[str, inspect.Parameter] = {}
        for kind in kinds:
            its: Any = kind
            types = get_type_hints(its.__init__)  # texts that their own module knows how to read
            options = {name: p for name, p in options_of(kind).items() if name not in taken}
            more |= {name: p.replace(annotation=types.get(name, p.annotation)) for name, p in options.items()}
        shown = signature.replace(parameters=[*own, *more.values()])

        @wraps(init)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
            if unknown := sorted(kwargs.keys() - shown.parameters.keys()):
                near = difflib.get_close_matches(unknown[0], shown.parameters, 1)
                remedy = f"did you mean {near[0]}?" if near else "see inspect.signature"
                raise TypeError(f"{type(self).__name__}: expected options that it knows, got {unknown}; {remedy}")
            init(self, *args, **kwargs)

        made: Any = wrapped
        made.__signature__ = shown
        made.__annotations__ = init.__annotations__ | {name: p.annotation for name, p in more.items()}
        found: F = made
        return found

    return decorate
