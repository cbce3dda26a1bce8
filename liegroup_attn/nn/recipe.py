"""Recipes: attention and positions as plain strings and numbers, so that YAML can say it and a checkpoint can hold it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, Literal, TypedDict, get_args, get_type_hints

import liegroup_attn
from liegroup_attn import manifolds, positional
from liegroup_attn.errors import ShapeError
from liegroup_attn.nn import scores as score_modules
from liegroup_attn.nn.attention import SelfAttention, SoftmaxAttention
from liegroup_attn.nn.learned import LearnedGenerator, RateMatrix, RelativeRates
from liegroup_attn.nn.lie import LieAttention
from liegroup_attn.nn.mixer import LieMixer
from liegroup_attn.positional import FrequencyScaling, PositionalEncoding, RotationEncoding
from liegroup_attn.positional.pairs import LAYOUTS

__all__ = ["AttentionRecipe", "build_attention", "build_encoding"]

ROPE: dict[str, Any] = {"module": "RotaryEncoding", "layout": "half_split"}  # the default of language models


class AttentionRecipe(TypedDict, total=False):
    """What to build: the module's name and its own arguments; names are those of the library's classes.

    ``module``, ``num_kv_heads`` and ``scores`` belong to softmax attention too, all else to ``LieAttention`` or ``LieMixer``; see there.
    ``clock_shape`` is the s of ``ErlangClock``. A learned generator is named by ``plus`` (``LieAttention``) or
    ``generator`` (``LieMixer``); ``max_distance`` is that of ``RelativeRates``, ``num_tokens`` and ``manifold`` those of
    ``RateMatrix``, ``learned_rate`` the exit rate of either at the start.
    """

    module: Literal["SoftmaxAttention", "LieAttention", "LieMixer"]
    num_kv_heads: int
    scores: Literal["SpectralScores", "SkewScores", "RateScores", "SymmetricScores"]
    time: float
    max_time: float
    learn_time: bool
    learn_rates: bool
    rate: float
    first_hop: bool
    clock: Literal["FixedClock", "ExponentialClock", "ErlangClock"]
    clock_shape: int
    rate_fn: Literal["exponential", "softplus", "squared_relu"]
    plus: Literal["RelativeRates", "RateMatrix"]
    bias_as: Literal["scores", "rates"]
    position_rate: float
    ordered: bool
    mix_heads: bool
    generator: Literal["RelativeRates", "RateMatrix"]
    max_distance: int
    num_tokens: int
    manifold: Literal["RateMatrices", "ReversibleRateMatrices", "DoublyBalancedRateMatrices"]
    learned_rate: float
    tol: float
    allow_open_mask: bool


_LEARNED = {"max_distance", "num_tokens", "manifold", "learned_rate"}
_CLOCK = {"clock", "clock_shape"}
_KEYS: dict[str, set[str]] = {
    "SoftmaxAttention": {"num_kv_heads", "scores"},
    "LieMixer": {"generator", *_LEARNED, *_CLOCK},
    "LieAttention": set(AttentionRecipe.__annotations__) - {"module", "generator"},
}
_MODULES = {"SoftmaxAttention": SoftmaxAttention, "LieAttention": LieAttention}


def build_attention(
    recipe: AttentionRecipe | Mapping[str, Any], embed_dim: int, num_heads: int, **options: Any
) -> SelfAttention:
    """Build an attention module.

    Args:
        recipe: names and numbers, see ``AttentionRecipe``.
        embed_dim: C, model width.
        num_heads: H.
        **options: ``encoding``, ``is_causal``, ``dropout`` … of ``SelfAttention``.

    Returns:
        The module.

    Raises:
        ValueError: unknown key or name in the recipe.

    Example:
        >>> build_attention({"module": "LieAttention", "clock": "ExponentialClock"}, 8, 2).clock
        ExponentialClock()
    """
    given: dict[str, Any] = {key: value for key, value in recipe.items() if value is not None}
    name = given.pop("module", None)
    if name not in _KEYS:
        raise ValueError(f"attention.module: expected one of {sorted(_KEYS)}, got {name!r}; name a module")
    if unknown := sorted(set(given) - _KEYS[name]):
        raise ValueError(f"attention: expected keys from {sorted(_KEYS[name])} for {name}, got {unknown}; remove them")
    for key, kind in get_type_hints(AttentionRecipe).items():
        if key in given and (names := get_args(kind)) and given[key] not in names:
            raise ValueError(f"attention.{key}: expected one of {sorted(names)}, got {given[key]!r}; name one of them")
    if "position_rate" in given and given.get("bias_as") != "rates":
        raise ValueError(
            f"attention.position_rate: expected it with bias_as='rates' alone, got bias_as={given.get('bias_as')!r}; set both"
        )
    _build_clock(given)
    if "rate_fn" in given:
        given["rate_fn"] = getattr(liegroup_attn, given["rate_fn"])
    if "scores" in given:
        given["scores"] = getattr(score_modules, given["scores"])(embed_dim, num_heads)
    learned = _build_learned(given, num_heads, options.get("is_causal", False))
    if name != "LieMixer":
        return _MODULES[name](embed_dim, num_heads, **given, **options)
    if learned is None:
        raise ValueError("attention.generator: expected RelativeRates or RateMatrix with LieMixer, got none; name one")
    if options.get("encoding") is not None:
        raise ValueError(
            f"encoding: expected None with LieMixer, got {type(options['encoding']).__name__}; it has no queries, keys or "
            "scores, choose an encoding of tokens or RelativeRates"
        )
    kept = {key: value for key, value in options.items() if key in ("dropout", "bias")}
    return LieMixer(embed_dim, num_heads, learned, **{k: v for k, v in given.items() if k == "clock"}, **kept)


def _build_clock(given: dict[str, Any]) -> None:
    shape, erlang = given.pop("clock_shape", None), given.get("clock") == "ErlangClock"
    if erlang != (shape is not None):
        raise ValueError(
            f"attention.clock_shape: expected it with ErlangClock and only there, got clock={given.get('clock')}, "
            f"clock_shape={shape}; set both or neither"
        )
    if "clock" in given:
        given["clock"] = getattr(liegroup_attn, given["clock"])(*([shape] if erlang else []))


def _build_learned(given: dict[str, Any], num_heads: int, is_causal: bool) -> LearnedGenerator | None:
    """The learned generator, put in the place of its name in ``given``."""
    where = "generator" if "generator" in given else "plus"
    name, rate = given.get(where), given.pop("learned_rate", None)
    needs = {"RelativeRates": {"max_distance"}, "RateMatrix": {"num_tokens"}, None: set()}[name]
    may = needs | ({"manifold"} if name == "RateMatrix" else set())
    own = {key: given.pop(key) for key in ("max_distance", "num_tokens", "manifold") if key in given}
    if not needs <= set(own) <= may or (rate is not None and name is None):
        raise ValueError(
            f"attention.{where}: expected {sorted(needs) or 'no key of a learned generator'} with {name}, got {sorted(own)}; "
            "name the generator and give what it needs"
        )
    if name is None:
        return None
    more: dict[str, Any] = {"is_causal": is_causal} | ({} if rate is None else {"rate": rate})
    if "manifold" in own:
        more["manifold"] = getattr(manifolds, own["manifold"])(own["num_tokens"])
    kind = {"RelativeRates": RelativeRates, "RateMatrix": RateMatrix}[name]
    given[where] = built = kind(num_heads, own.get("max_distance", own.get("num_tokens")), **more)
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
    if not isinstance(recipe, Mapping):
        raise TypeError(
            f"encoding: expected a recipe such as {{'module': 'ALiBi'}} or None, got {recipe!r}; objects go into layers, "
            "LieAttention(…, encoding=…)"
        )
    if embed_dim % num_heads:
        raise ShapeError(f"num_heads: expected a divisor of {embed_dim}, got {num_heads}; change one of the two")
    kind = _named("encoding", recipe, PositionalEncoding)
    heads = num_kv_heads if issubclass(kind, RotationEncoding) and num_kv_heads is not None else num_heads
    sizes = {"embed_dim": embed_dim, "num_heads": heads, "head_width": embed_dim // num_heads, "is_causal": is_causal}
    built: PositionalEncoding = _build("encoding", recipe, kind, sizes)
    return built


def _named(where: str, recipe: Mapping[str, Any], base: type) -> Any:
    """The class that a recipe names: one of ``positional`` that a name and plain values can build, or one by its path."""
    name = recipe.get("module")
    if isinstance(name, str) and "." in name:
        return _at_path(where, name, base)
    known = {}
    for own in positional.__all__:
        kind = getattr(positional, own)
        if _complete(kind, base) and own != "FoldedRotary":  # which is made from another
            known[own] = kind
    if name is None:
        raise ValueError(f"{where}: expected the key 'module', got {sorted(recipe)}; name a class, {sorted(known)}")
    if not isinstance(name, str) or name not in known:
        lower = {own.lower(): own for own in known}
        if "RotaryEncoding" in known:
            lower["rope"] = "RotaryEncoding"
        meant = lower.get(str(name).lower(), "one of them")
        raise ValueError(
            f"{where}.module: expected one of {sorted(known)}, got {name!r}; name {meant}, or another by its path, "
            "package.module.Class"
        )
    return known[name]


def _complete(kind: object, base: type) -> bool:
    """Whether it is a class derived from the base that can be built."""
    derived = isinstance(kind, type) and issubclass(kind, base) and kind is not base
    return derived and not inspect.isabstract(kind)


def _at_path(where: str, path: str, base: type) -> Any:
    package, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}.module: expected the path of a class, package.module.Class, got {path!r} ({error}); is it installed, or "
            "on PYTHONPATH?"
        ) from error
    if not _complete(kind, base):
        raise TypeError(
            f"{where}.module: expected a class derived from {base.__name__} and complete, got {path}, {kind!r}"
        )
    return kind


def _build(where: str, recipe: Mapping[str, Any], kind: Any, sizes: Mapping[str, Any]) -> Any:
    """An object of a class from a recipe; ``sizes`` fill those of its arguments that they name."""
    given = {key: value for key, value in recipe.items() if value is not None and key != "module"}
    wanted, name = dict(inspect.signature(kind).parameters), recipe["module"]
    any_key = any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted.values())
    wanted = {key: p for key, p in wanted.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    own = sorted(set(wanted) - set(sizes))
    if (unknown := sorted(set(given) - set(own))) and not any_key:
        raise ValueError(f"{where}: expected keys from {own} for {name}, got {unknown}; remove them")
    if missing := [key for key in own if wanted[key].default is inspect.Parameter.empty and key not in given]:
        layouts = f", {' or '.join(LAYOUTS)}" if "layout" in missing else ""
        raise ValueError(f"{where}: expected {missing} for {name}, got {sorted(given)}; add what is missing{layouts}")
    if "scaling" in given:
        inner, scaling = f"{where}.scaling", given["scaling"]
        if not isinstance(scaling, Mapping):
            raise TypeError(
                f"{inner}: expected a recipe such as {{'module': 'YaRN', …}}, got {scaling!r}; give the class and its numbers"
            )
        given["scaling"] = _build(inner, scaling, _named(inner, scaling, FrequencyScaling), {})
    return kind(**{key: size for key, size in sizes.items() if key in wanted}, **given)
