"""Recipes: a class by its name and arguments of its constructor as plain values, so that YAML can say it and a checkpoint can hold it.

An option is written once, where the class takes it; what a recipe may say is read from there, for classes of others, too.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import warnings
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import liegroup_attn
from liegroup_attn import expm, manifolds, positional, rates
from liegroup_attn.clocks import clock_from
from liegroup_attn.errors import ShapeError
from liegroup_attn.nn.attention import SelfAttention
from liegroup_attn.positional import PositionalEncoding, RotationEncoding
from liegroup_attn.positional.pairs import LAYOUTS

__all__ = ["build_attention", "build_encoding"]

ROPE: dict[str, Any] = {"module": "RotaryEncoding", "layout": "half_split"}  # the default of language models
# Bases of the parts of a recipe; a manifold's is not looked at before one is asked for: geoopt takes its time.
_PARTS = ("FrequencyScaling", "BilinearScores", "LearnedGenerator", "RateMatrices", "Method")
_MADE = ("FoldedRotary", "LearnedSum", "SelfAttention")  # from other modules: no plain values give them


def build_attention(recipe: Mapping[str, Any], embed_dim: int, num_heads: int, **options: Any) -> SelfAttention:
    """Build an attention module.

    Args:
        recipe: ``module``, the name of a class of ``liegroup_attn.nn`` or the dotted path of another, and its own arguments
            but for ``embed_dim``, ``num_heads`` and ``options``, which the model knows. A clock goes by its name as in
            ``clock_from``, a ``rate_fn`` by that of a function; scores, a learned generator, its manifold and a method are
            recipes themselves, or a name alone: ``plus: {module: RelativeRates, max_distance: 32}``.
        embed_dim: C, model width.
        num_heads: H.
        **options: ``encoding``, ``is_causal``, ``dropout`` … of ``SelfAttention``.

    Returns:
        The module.

    Raises:
        ValueError: unknown name or argument, or one that is missing; ``encoding`` or ``is_causal`` that the module can't have.
        TypeError: no recipe; a path to what is no attention.

    Example:
        >>> build_attention({"module": "LieAttention", "clock": "ErlangClock(3)"}, 8, 2).flow.clock
        ErlangClock(3)
    """
    wanted = {"encoding": None, "is_causal": False} | options
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads} | wanted
    built: SelfAttention = _build("attention", in_parts(recipe), SelfAttention, sizes)
    for key in ("encoding", "is_causal"):  # a constructor need not take them
        if (own := getattr(built, key)) is not wanted[key]:
            raise ValueError(
                f"{key}: expected {own} with {type(built).__name__}, got {wanted[key]}; it takes no other, choose another "
                "module, or an encoding of tokens"
            )
    return built


def build_encoding(
    recipe: Mapping[str, Any] | None,
    embed_dim: int,
    num_heads: int,
    *,
    num_kv_heads: int | None = None,
    is_causal: bool = False,
) -> PositionalEncoding | None:
    """Build a positional encoding.

    Args:
        recipe: ``module``, the name of a class of ``liegroup_attn.positional`` or the dotted path of another, and its own
            arguments but for ``embed_dim``, ``num_heads``, ``head_width`` and ``is_causal``, which the model knows; None
            for no positions. A scaling is a recipe itself, e.g.
            ``scaling: {module: YaRN, factor: 4.0, original_length: 2048}``.
        embed_dim: C, model width.
        num_heads: H.
        num_kv_heads: key heads, for each of which a rotation has an R; default H.
        is_causal: lower-triangular mask.

    Returns:
        The encoding, or None.

    Raises:
        ValueError: unknown name or argument, or one that is missing; a path that leads nowhere.
        TypeError: no recipe; a path to what is no encoding.
        ShapeError: heads that do not divide the width.

    Example:
        >>> build_encoding({"module": "RotaryEncoding", "layout": "interleaved"}, 16, 2)
        RotaryEncoding(8, layout='interleaved', base=10000)
    """
    if recipe is None:
        return None
    if embed_dim % num_heads:
        raise ShapeError(f"num_heads: expected a divisor of {embed_dim}, got {num_heads}; change one of the two")
    rotates = issubclass(_kind("encoding", recipe, PositionalEncoding), RotationEncoding)
    heads = num_kv_heads if rotates and num_kv_heads is not None else num_heads
    sizes = {"embed_dim": embed_dim, "num_heads": heads, "head_width": embed_dim // num_heads, "is_causal": is_causal}
    built: PositionalEncoding = _build("encoding", recipe, PositionalEncoding, sizes)
    return built


def in_parts(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """An attention recipe in today's words: until 0.2, arguments of its parts may stand among its own, as they once did."""
    names = {"max_distance": "max_distance", "num_tokens": "num_tokens", "manifold": "manifold", "learned_rate": "rate"}
    old = {"clock_shape", *names}
    if not isinstance(recipe, Mapping) or "." in str(recipe.get("module")) or not old & recipe.keys():
        return recipe  # what is refused later, somebody else's class, or today's words
    new = {key: value for key, value in recipe.items() if key not in old}
    if (shape := recipe.get("clock_shape")) is not None:
        new["clock"] = f"{new.get('clock') or 'ErlangClock'}({shape})"
    if part := {names[key]: recipe[key] for key in names if recipe.get(key) is not None}:
        where = "generator" if "generator" in new else "plus"
        new[where] = {"module": new.get(where)} | part
    warnings.warn(f"attention: expected parts as recipes, got {dict(recipe)}; write {new}", FutureWarning, stacklevel=3)
    return new


def with_defaults(where: str, recipe: Mapping[str, Any], base: type) -> dict[str, Any]:
    """A recipe, and its class's defaults for what it does not say."""
    said = {key: value for key, value in recipe.items() if value is not None}
    return defaults_of(_kind(where, recipe, base)) | said


def defaults_of(kind: type) -> dict[str, Any]:
    """Arguments of a constructor that need not be given."""
    return {key: p.default for key, p in _parameters(kind)[0].items() if p.default is not p.empty}


def _build(where: str, recipe: Mapping[str, Any], base: type, sizes: Mapping[str, Any]) -> Any:
    """An object from its recipe; ``sizes`` fill those of its arguments that they name."""
    kind = _kind(where, recipe, base)
    given = {key: value for key, value in recipe.items() if value is not None and key != "module"}
    (wanted, any_key), name = _parameters(kind), recipe["module"]
    own = sorted(wanted.keys() - sizes.keys())
    if (unknown := sorted(given.keys() - set(own))) and not any_key:
        remedy = _nearest(unknown, own) or "remove them"
        raise ValueError(f"{where}: expected keys from {own} for {name}, got {unknown}; {remedy}")
    if missing := [key for key in own if wanted[key].default is inspect.Parameter.empty and key not in given]:
        layouts = f", {' or '.join(LAYOUTS)}" if "layout" in missing else ""
        raise ValueError(f"{where}: expected {missing} for {name}, got {sorted(given)}; add what is missing{layouts}")
    inner = {**sizes, "n": given.get("num_tokens")}  # of a manifold: states are tokens
    values = {key: _value(f"{where}.{key}", value, wanted.get(key), inner) for key, value in given.items()}
    return kind(**{key: size for key, size in sizes.items() if key in wanted}, **values)


def _value(where: str, value: Any, parameter: inspect.Parameter | None, sizes: Mapping[str, Any]) -> Any:
    """What a plain value stands for, by the words of the annotation: to evaluate it may need imports for types alone."""
    words = re.findall(r"\w+", str(parameter and parameter.annotation))
    if name := next((part for part in _PARTS if part in words), None):
        base = next(getattr(space, name) for space in _spaces() if name in space.__all__)
        return _build(where, {"module": value} if isinstance(value, str) else value, base, sizes)
    if "Callable" in words:
        return _named(
            where, value, {name: getattr(rates, name) for name in rates.__all__ if name in liegroup_attn.__all__}
        )
    return clock_from(str(value)) if "Clock" in words else value


def _kind(where: str, recipe: Mapping[str, Any], base: type) -> Any:
    """The class that a recipe names, derived from the base and complete."""

    def complete(kind: Any) -> bool:
        derived = isinstance(kind, type) and issubclass(kind, base) and kind is not PositionalEncoding
        return derived and not inspect.isabstract(kind)

    if not isinstance(recipe, Mapping):
        raise TypeError(
            f"{where}: expected a recipe such as {{'module': 'Name', …}} or None, got {recipe!r}; objects go into layers, "
            f"LieAttention(…, {where.rpartition('.')[2]}=…)"
        )
    space = next(space for space in _spaces() if base.__module__.startswith(space.__name__))
    known = {name: getattr(space, name) for name in space.__all__ if name not in _MADE}
    known = {name: known[name] for name in sorted(known) if complete(known[name])}
    if "module" not in recipe:
        raise ValueError(f"{where}: expected the key 'module', got {sorted(recipe)}; name a class, {list(known)}")
    kind = _named(f"{where}.module", recipe["module"], known)
    if not complete(kind):
        raise TypeError(
            f"{where}.module: expected a class derived from {base.__name__} and complete, got {recipe['module']}, {kind!r}"
        )
    return kind


def _spaces() -> tuple[ModuleType, ...]:
    return liegroup_attn.nn, positional, manifolds, expm


def _named(where: str, name: Any, known: Mapping[str, Any]) -> Any:
    """What a name stands for: one of those known, or what lies at a path, package.module.Name."""
    if isinstance(name, str) and name in known:
        return known[name]
    package, _, last = str(name).rpartition(".")
    if not package or not isinstance(name, str):
        remedy = _nearest([name], known) or "name one of them"
        raise ValueError(
            f"{where}: expected one of {list(known)}, or a path package.module.Name, got {name!r}; {remedy}"
        )
    try:
        return getattr(importlib.import_module(package), last)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: expected a path, package.module.Name, got {name!r} ({error}); is it installed, or on PYTHONPATH?"
        ) from error


def _nearest(names: Iterable[Any], known: Iterable[str]) -> str:
    """The question that mends a spelling, or nothing."""
    lower = {"rope": "RotaryEncoding"} if "RotaryEncoding" in known else {}
    lower |= {name.lower(): name for name in known}
    meant = [lower[near] for name in names for near in difflib.get_close_matches(str(name).lower(), lower, 1)]
    return f"did you mean {', '.join(meant)}?" if meant else ""


def _parameters(kind: type) -> tuple[dict[str, inspect.Parameter], bool]:
    """Arguments of a constructor, those too that ``**options`` hand to its bases'; and whether any other may be given."""
    found: dict[str, inspect.Parameter] = {}
    for init in (vars(cls)["__init__"] for cls in kind.__mro__ if "__init__" in vars(cls)):
        own = list(inspect.signature(init).parameters.values())[1:]
        found = {p.name: p for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} | found
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            return found, False
    return found, True
