"""A recipe: attention as plain strings and numbers, so that YAML can say it and a checkpoint can hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict, get_args, get_type_hints

import liegroup_attn
from liegroup_attn.nn.attention import SelfAttention, SoftmaxAttention
from liegroup_attn.nn.lie import LieAttention
from liegroup_attn.positional import RotaryEncoding

__all__ = ["AttentionRecipe", "build_attention"]

_MODULES = {"SoftmaxAttention": SoftmaxAttention, "LieAttention": LieAttention}


class AttentionRecipe(TypedDict, total=False):
    """What to build: the module's name and its own arguments; names are those of the library's classes.

    Everything but ``module`` belongs to ``LieAttention``; see there. ``clock_shape`` is the s of ``ErlangClock``.
    """

    module: Literal["SoftmaxAttention", "LieAttention"]
    time: float
    max_time: float
    learn_time: bool
    learn_rates: bool
    rate: float
    first_hop: bool
    clock: Literal["FixedClock", "ExponentialClock", "ErlangClock"]
    clock_shape: int
    rate_fn: Literal["exponential", "softplus", "squared_relu"]
    tol: float
    allow_open_mask: bool


def build_attention(
    recipe: AttentionRecipe | Mapping[str, Any], embed_dim: int, num_heads: int, **options: Any
) -> SelfAttention:
    """Build an attention module.

    Args:
        recipe: names and numbers, see ``AttentionRecipe``.
        embed_dim: C, model width.
        num_heads: H.
        **options: ``rotary``, ``is_causal``, ``dropout`` … of ``SelfAttention``.

    Returns:
        The module.

    Raises:
        ValueError: unknown key or name in the recipe.

    Example:
        >>> build_attention({"module": "LieAttention", "clock": "ExponentialClock"}, 8, 2).clock
        ExponentialClock()
    """
    known = set(AttentionRecipe.__annotations__)
    given: dict[str, Any] = {key: value for key, value in recipe.items() if value is not None}
    name = given.pop("module", None)
    if name not in _MODULES:
        raise ValueError(f"attention.module: expected one of {sorted(_MODULES)}, got {name!r}; name a module")
    unknown = sorted(set(given) - known)
    if unknown or (name == "SoftmaxAttention" and given):
        allowed = sorted(known) if name == "LieAttention" else ["module"]
        raise ValueError(
            f"attention: expected keys from {allowed} for {name}, got {unknown or sorted(given)}; remove them"
        )
    for key in ("clock", "rate_fn"):
        names = get_args(get_type_hints(AttentionRecipe)[key])
        if key in given and given[key] not in names:
            raise ValueError(f"attention.{key}: expected one of {sorted(names)}, got {given[key]!r}; name one of them")
    shape, erlang = given.pop("clock_shape", None), given.get("clock") == "ErlangClock"
    if erlang != (shape is not None):
        raise ValueError(
            f"attention.clock_shape: expected it with ErlangClock and only there, got clock={given.get('clock')}, "
            f"clock_shape={shape}; set both or neither"
        )
    if "clock" in given:
        given["clock"] = getattr(liegroup_attn, given["clock"])(*([shape] if erlang else []))
    if "rate_fn" in given:
        given["rate_fn"] = getattr(liegroup_attn, given["rate_fn"])
    return _MODULES[name](embed_dim, num_heads, **given, **options)


def build_rotary(head_width: int, layout: str | None, base: float) -> RotaryEncoding | None:
    """RoPE from plain settings; layout None means no positions."""
    return None if layout is None else RotaryEncoding(head_width, layout=layout, base=base)
