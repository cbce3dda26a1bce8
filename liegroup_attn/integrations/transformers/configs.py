"""Configurations of a model: its own, although others may have been made from the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["configs", "made_with_own_configs", "own_configs", "plain_implementation", "undo"]

Held: TypeAlias = tuple[nn.Module, str, PreTrainedConfig]  # a module, an attribute of it, and what that was

# Attribute -> (copy, what it is of), of modules of models that were made from a converted model's configuration.
_copied: WeakKeyDictionary[nn.Module, dict[str, tuple[PreTrainedConfig, PreTrainedConfig]]] = WeakKeyDictionary()


def configs(model: nn.Module) -> list[Held]:
    """Every configuration that a module of the model holds."""
    return [
        (module, key, value)
        for module in model.modules()
        for key, value in vars(module).items()
        if isinstance(value, PreTrainedConfig)
    ]


def own_configs(model: nn.Module) -> list[Held]:
    """Copies of all configurations for this model alone, one for each object; what they were, to undo it."""
    held = configs(model)
    copies: dict[int, Any] = {}  # deepcopy's memo: what was one object stays one
    for module, key, config in held:
        setattr(module, key, copy.deepcopy(config, copies))
    return held


def made_with_own_configs(model: PreTrainedModel) -> None:
    """``own_configs`` at the end of a constructor; parts, whose constructors have ended before, go on sharing with it."""
    mine = {id(config) for config in _with_subs(model.config)}
    for module, key, config in configs(model):
        copied, origin = _copied.get(module, {}).get(key, (None, None))
        if copied is config and id(origin) in mine:
            setattr(module, key, origin)
    for module, key, origin in own_configs(model):
        _copied.setdefault(module, {})[key] = getattr(module, key), origin


def _with_subs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for key in config.sub_configs:
        if isinstance(sub := getattr(config, key, None), PreTrainedConfig):
            yield from _with_subs(sub)


def undo(held: list[Held]) -> None:
    """Give modules back the configurations that they held."""
    for module, key, config in held:
        setattr(module, key, config)


def plain_implementation(model: PreTrainedModel) -> str | dict[str, Any]:
    """What ``set_attn_implementation`` has to be told to have it as it is now."""

    def of(config: PreTrainedConfig) -> str | dict[str, Any]:
        subs = {key: sub for key in config.sub_configs if (sub := getattr(config, key, None)) is not None}
        own = config._attn_implementation
        return {"": own, **{key: of(sub) for key, sub in subs.items()}} if subs else own

    return of(model.config)
