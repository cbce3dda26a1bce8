"""Flows on modules of a model, by what its configuration says; and ``from_pretrained`` that reads them."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from liegroup_attn.errors import ConversionError
from liegroup_attn.integrations.transformers.attention import lie_attention_forward
from liegroup_attn.integrations.transformers.cache import check_call, note_call
from liegroup_attn.integrations.transformers.configs import made_with_own_configs
from liegroup_attn.integrations.transformers.masks import lie_mask
from liegroup_attn.nn.lie_flow import LieFlow

__all__ = ["NAME", "attach", "detach", "flowing", "register", "ways", "written"]

NAME = "lie"
_state = threading.local()  # whether weights are loaded in this thread, of which a factor on a time is none


def register() -> None:
    """Make Transformers know the attention implementation "lie", and ``from_pretrained`` the models converted to it.

    Attention and mask function are registered together: without the second one padding would be seen. From then on a
    model whose ``config.lie_attention`` says so gets its flows when it is made, before weights are loaded. Importing
    ``liegroup_attn.integrations.transformers`` calls it; calling it again changes nothing.

    Example:
        >>> from transformers import AttentionInterface
        >>> register()
        >>> "lie" in AttentionInterface().valid_keys()
        True
    """
    AttentionInterface.register(NAME, lie_attention_forward)
    AttentionMaskInterface.register(NAME, lie_mask)
    if not hasattr(PreTrainedModel.post_init, "_lie"):
        PreTrainedModel.post_init = _with_flows(PreTrainedModel.post_init)
        PreTrainedModel.from_pretrained = classmethod(_with_check(PreTrainedModel.from_pretrained.__func__))
        PreTrainedModel.save_pretrained = _with_factors(PreTrainedModel.save_pretrained)


def attach(model: nn.Module, spec: dict[str, Any]) -> None:
    """Give modules of a model their flows.

    Args:
        model: of which the paths are.
        spec: ``layers`` path → (heads, head width), and ``options`` of the flows.
    """
    options = spec["options"]
    for path, (num_heads, head_width) in spec["layers"].items():
        module = model.get_submodule(path)
        if isinstance(getattr(module, "lie", None), LieFlow):
            continue
        like = next((p for p in (*module.parameters(), *model.parameters()) if p.is_floating_point()), None)
        where: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
        module.lie = LieFlow(num_heads, head_width, **options, **where).train(module.training)
        module.register_forward_pre_hook(note_call, with_kwargs=True)
        module.register_forward_hook(check_call)


def detach(module: nn.Module) -> None:
    """Take a flow and its hooks out of a module."""
    del module.lie
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is note_call]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
    for key in [key for key, hook in module._forward_hooks.items() if hook is check_call]:
        del module._forward_hooks[key]


def flowing(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have a flow."""
    for name, module in model.named_modules():
        if isinstance(module._modules.get("lie"), LieFlow):
            yield name, module


def written(options: dict[str, Any]) -> dict[str, Any]:
    """Options of flows as plain JSON; device and dtype are the module's."""
    plain = {key: value for key, value in options.items() if key not in ("device", "dtype")}
    return {key: str(value) if key == "clock" and value is not None else value for key, value in plain.items()}


def _with_flows(post_init: Any) -> Any:
    @wraps(post_init)
    def wrapped(self: PreTrainedModel) -> None:
        post_init(self)
        if groups := getattr(self.config, "lie_attention", None):
            _attach_all(self, groups["flows"])
            if not getattr(_state, "loading", False):
                _scale(self)
            elif any("time_scale" not in spec for spec in groups["flows"]):
                _reshape_times(self, -1, 1)
        parts = [part for part in _naming(self) if any(True for _ in flowing(part))]
        if parts:
            made_with_own_configs(self)
        for part in parts:
            part.set_attn_implementation(NAME)

    wrapped._lie = True  # type: ignore[attr-defined]
    return wrapped


def _with_factors(save_pretrained: Any) -> Any:
    """Before saving: factors on times go into the configuration, and are no weights to be looked for."""

    @wraps(save_pretrained)
    def wrapped(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        for part in _naming(self):
            for spec in part.config.lie_attention["flows"]:
                factors = {path: flow.time_scale for path, flow in _flows_of(part, spec)}
                spec["time_scale"] = {path: factor for path, factor in factors.items() if factor != 1}
        if any(module.lie.time_scale != 1 for _, module in flowing(self)):  # type: ignore[union-attr]
            given = inspect.signature(save_pretrained).bind(self, *args, **kwargs)
            state = given.arguments.get("state_dict") or self.state_dict()
            given.arguments["state_dict"] = {key: x for key, x in state.items() if not key.endswith("lie.time_scale")}
            args, kwargs = given.args[1:], given.kwargs
        return save_pretrained(self, *args, **kwargs)

    return wrapped


def _flows_of(model: PreTrainedModel, spec: dict[str, Any]) -> Iterator[tuple[str, LieFlow]]:
    """Paths as a configuration writes them, and the flows of this model that they name."""
    flows: dict[str, Any] = {name: module.lie for name, module in flowing(model)}
    for path in spec["layers"]:
        if (here := next((way for way in ways(model, path) if way in flows), None)) is not None:
            yield path, flows[here]


def _reshape_times(model: PreTrainedModel, *shape: int) -> None:
    """Times as rows, or as the columns that they are in checkpoints of before."""
    for _, module in flowing(model):
        flow: Any = module.lie
        time = flow.time.detach().reshape(shape)
        if isinstance(flow.time, nn.Parameter):
            flow.time = nn.Parameter(time, flow.time.requires_grad)
        else:
            flow.time = time


def _scale(model: PreTrainedModel) -> None:
    """Factors on times, as a configuration has them."""
    for spec in model.config.lie_attention["flows"]:
        for path, flow in _flows_of(model, spec):
            flow.time_scale = spec.get("time_scale", {}).get(path, 1.0)


def _naming(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The model and its parts whose configurations name flows."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return [part for part in parts if getattr(part.config, "lie_attention", None)]


def _attach_all(model: PreTrainedModel, flows: list[dict[str, Any]]) -> None:
    """Attach what a configuration names in this model."""
    names = {name for name, _ in model.named_modules()}
    for spec in flows:
        found = {}
        for path, sizes in spec["layers"].items():
            if (here := next((way for way in ways(model, path) if way in names), None)) is not None:
                found[here] = sizes
        attach(model, {**spec, "layers": found})


def ways(model: PreTrainedModel, path: str) -> tuple[str, str, str]:
    """What a path may be called: as it is, in a model without the head, in one with it."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    return path, path.removeprefix(prefix), prefix + path


def _with_check(from_pretrained: Any) -> Any:
    """After loading: flows whose weights the checkpoint lacks start anew, and flows that fit nowhere are told about."""

    @wraps(from_pretrained)
    def wrapped(cls: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        _state.loading = True
        try:
            model, info = from_pretrained(cls, *args, output_loading_info=True, **kwargs)
        finally:
            _state.loading = False
        groups = getattr(model.config, "lie_attention", None)
        if groups:
            _reshape_times(model, -1)
            _scale(model)
            _start_missing(model, info["missing_keys"])
            wanted = sum(len(spec["layers"]) for spec in groups["flows"])
            found = sum(1 for _ in flowing(model))
            if not found:
                raise ConversionError(
                    f"{cls.__name__}: expected modules {list(groups['flows'][0]['layers'])}, which config.lie_attention names, got none of "
                    "them; load the class that was converted, or its base model"
                )
            if found < wanted:
                warnings.warn(f"{found} of {wanted} converted layers are part of {cls.__name__}", stacklevel=2)
        return (model, info) if output_loading_info else model

    return wrapped


@torch.no_grad()
def _start_missing(model: PreTrainedModel, missing: Any) -> None:
    for name, module in flowing(model):
        flow: LieFlow = module.lie  # type: ignore[assignment]
        fresh = _fresh(model, flow, name)
        for key, tensor in (*flow.named_parameters(), *flow.named_buffers()):
            if f"{name}.lie.{key}" in missing:
                tensor.copy_(fresh[key])


def _fresh(model: PreTrainedModel, flow: LieFlow, name: str) -> dict[str, torch.Tensor]:
    """Start values of a flow, by the options in the configuration."""
    for spec in model.config.lie_attention["flows"]:
        if any(path == name or path.endswith(f".{name}") or name.endswith(f".{path}") for path in spec["layers"]):
            return LieFlow(flow.num_heads, flow.width, **spec["options"]).state_dict()
    return LieFlow(flow.num_heads, flow.width).state_dict()
