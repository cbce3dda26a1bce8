"""Configurations of a model: its own, although others may have been made from the same."""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["configs", "own_configs", "plain_implementation", "undo"]

Held: TypeAlias = tuple[nn.Module, str, PreTrainedConfig]  # a module, an attribute of it, and what that was


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
