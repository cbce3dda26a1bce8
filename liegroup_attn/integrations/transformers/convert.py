"""Whole models of Transformers, to the implementation "lie" and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from liegroup_attn.errors import ConversionError
from liegroup_attn.integrations.transformers.attention import Call, recorded_calls
from liegroup_attn.integrations.transformers.configs import configs, own_configs, plain_implementation, undo
from liegroup_attn.integrations.transformers.inputs import dummy_inputs, example
from liegroup_attn.integrations.transformers.loading import NAME, attach, detach, flowing, register, ways, written
from liegroup_attn.nn.report import ConvertedLayer

__all__ = ["DROP_INS", "WHOLE_MODELS", "convert_model", "restore_model"]

DROP_INS: tuple[Any, ...] = ()
WHOLE_MODELS: tuple[type[nn.Module], ...] = (PreTrainedModel,)
_ACROSS = re.compile("cross|encoder_?attn|encdec", re.IGNORECASE)


def convert_model(
    name: str,
    model: PreTrainedModel,
    wanted: Callable[[str], str | None],
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None,
    options: dict[str, Any],
) -> list[ConvertedLayer]:
    """Switch a model to the implementation "lie" and give its self-attentions flows; or change nothing and raise.

    Two forwards on made-up inputs, before and after the switch, find the modules that call the attention function and
    their sizes, and that outputs stay the same. The model gets a configuration of its own.

    Args:
        name: path of the model.
        model: changed in place.
        wanted: path → why a module is not to be converted, or None.
        example_inputs: for the forwards, if the model is the whole; default made from the configuration.
        options: of ``LieFlow``.

    Returns:
        An entry an attention.

    Raises:
        ConversionError: the model does not call the attention function, or calls it and means something else.
    """
    register()
    if getattr(model.config, "output_attentions", False):
        raise ConversionError(
            "config.output_attentions: expected False, got True, which Transformers keeps for eager attention; pass output_attentions=True "
            "to each call"
        )
    before = {path for path, _ in flowing(model)}
    # What a larger module takes is not for a model inside it.
    inputs = dummy_inputs(model) if example_inputs is None or name else example_inputs
    held = [] if before else own_configs(model)
    plain = plain_implementation(model)
    try:
        calls = _switch_and_record(model, inputs, lambda path: wanted(_join(name, path)))
        layers, sizes = _sort(name, model, calls, wanted, before)
        if sizes:
            attach(model, {"layers": sizes, "options": written(options)})
            _write(model, sizes, written(options), plain)
    except BaseException:
        undo(held)
        raise
    if not sizes and not before:
        undo(held)
    return layers


def restore_model(name: str, model: PreTrainedModel, chosen: Callable[[str], bool]) -> list[ConvertedLayer]:
    """Take flows out; with the last one switch to the implementation that the model had.

    The model gets a configuration of its own: another may have been made from the one it has.

    Args:
        name: path of the model.
        model: changed in place.
        chosen: path → whether its flow is taken out.

    Returns:
        An entry an attention that had a flow.
    """
    layers, gone = [], set()
    for path, module in list(flowing(model)):
        if chosen(_join(name, path)):
            detach(module)
            gone.add(path)
            layers.append(ConvertedLayer(_join(name, path), type(module).__name__, "restored"))
    if not any(True for _ in _said(model)):
        return layers
    own_configs(model)
    if any(True for _ in flowing(model)):
        for path, part in list(_said(model)):
            _strike(part, {inner.removeprefix(f"{path}." if path else "") for inner in gone})
        return layers
    parts = [(part, part.config.lie_attention["plain"]) for _, part in _said(model)]
    whole = [(part, plain) for part, plain in parts if part is model]
    for config in {id(config): config for _, _, config in configs(model)}.values():
        vars(config).pop("lie_attention", None)
    for part, plain in whole or parts:
        part.set_attn_implementation(plain)
    return layers


def _said(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    """Path and part, for each configuration that names flows."""
    seen: set[int] = set()
    for path, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and id(part.config) not in seen:
            seen.add(id(part.config))
            if getattr(part.config, "lie_attention", None):
                yield path, part


def _strike(part: PreTrainedModel, gone: set[str]) -> None:
    """Take paths out of what a configuration names."""
    said = part.config.lie_attention
    gone = {way for path in gone for way in ways(part, path)}
    flows = [
        {**spec, "layers": {path: size for path, size in spec["layers"].items() if path not in gone}}
        for spec in said["flows"]
    ]
    flows = [spec for spec in flows if spec["layers"]]
    if flows:
        part.config.lie_attention = {**said, "flows": flows}
    else:
        del part.config.lie_attention


def _write(model: PreTrainedModel, sizes: dict[str, list[int]], options: dict[str, Any], plain: Any) -> None:
    """What was converted, into the configuration; and into those of parts, which may be loaded without the rest."""
    seen: set[int] = set()
    for path, part in model.named_modules():
        if not isinstance(part, PreTrainedModel) or id(part.config) in seen:
            continue
        seen.add(id(part.config))
        start = f"{path}." if path else ""
        layers = {name.removeprefix(start): size for name, size in sizes.items() if name.startswith(start)}
        if layers:
            said = getattr(part.config, "lie_attention", None) or {"flows": [], "plain": plain}
            part.config.lie_attention = {**said, "flows": [*said["flows"], {"layers": layers, "options": options}]}


def _join(name: str, path: str) -> str:
    return f"{name}.{path}" if name and path else name or path


def _switch_and_record(
    model: PreTrainedModel, inputs: Mapping[str, Any] | tuple[Any, ...], wanted: Callable[[str], str | None]
) -> list[Call]:
    """Forwards before and after the switch."""
    kind = type(model).__name__
    with example(model):
        expected = None if model.config._attn_implementation == NAME else _outputs(model, inputs)
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise ConversionError(
                f"{kind}: expected a model that takes the attention implementation of its configuration, got one that computes attention "
                "itself; call liegroup_attn.lie_attention in the model's own code"
            )
        with recorded_calls() as calls:
            found = _outputs(model, inputs)
    if not calls:
        raise ConversionError(
            f"{kind}: expected a model that calls the attention function, got one that accepts its name and never calls it; call "
            "liegroup_attn.lie_attention in the model's own code"
        )
    if silent := [path for path in _silent(model, calls) if wanted(path) is None]:
        raise ConversionError(
            f"{kind}: expected one call of the attention function from each attention, got none from {silent}; give example_inputs that "
            "reach them, or exclude them"
        )
    if expected is not None and not expected.is_meta:
        scale = float(expected.abs().max())
        apart = float((found.float() - expected.float()).abs().max())
        if not apart <= (1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2) * max(1.0, scale):
            raise ConversionError(
                f"{kind}: expected the outputs of before at time 0, got a difference of {apart:.2g}; its attention means something else by "
                "what it hands over"
            )
    return calls


def _outputs(model: PreTrainedModel, inputs: Mapping[str, Any] | tuple[Any, ...]) -> Tensor:
    """The first output; of padded tokens, nothing."""
    try:
        found: Any = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
        values = found.values() if isinstance(found, Mapping) else found if isinstance(found, tuple | list) else [found]
        out = next(x for x in values if isinstance(x, Tensor) and x.is_floating_point())
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, StopIteration) as error:
        raise ConversionError(
            f"{type(model).__name__}: expected a forward with {sorted(inputs) if isinstance(inputs, Mapping) else len(inputs)} to work, got "
            f"{type(error).__name__}: {error}; call convert_attention on this model alone, with example_inputs that it takes"
        ) from error
    shown = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if isinstance(shown, Tensor) and shown.dim() == 2 and out.shape[:2] == shown.shape:
        out = out[shown.bool()]
    return out.detach()


def _silent(model: nn.Module, calls: list[Call]) -> list[str]:
    """Paths of what looks like an attention over its own tokens, and neither calls nor holds or is held by one that does."""
    callers = {id(call.module) for call in calls}
    paths = [path for path, module in model.named_modules() if id(module) in callers]
    found = []
    for path, module in model.named_modules():
        looks = re.search(r"(Attention|Attn)$", type(module).__name__) and id(module) not in callers
        looks = looks and not isinstance(module, nn.MultiheadAttention)  # PyTorch's own: reported as kept
        across = _ACROSS.search(f"{path}.{type(module).__name__}") or getattr(module, "is_cross_attention", False)
        kin = any(p.startswith(f"{path}.") or path.startswith(f"{p}.") for p in paths)
        if looks and not across and not kin:
            found.append(path)
    return found


def _by_hand(name: str, module: nn.MultiheadAttention, unwanted: str | None) -> ConvertedLayer:
    """What becomes of PyTorch's attention inside a model of Transformers."""
    if getattr(module, "lie", None) is not None:
        return ConvertedLayer(name, type(module).__name__, "already converted")
    reason = unwanted or "torch.nn.MultiheadAttention inside a Transformers model: convert it by hand"
    return ConvertedLayer(name, type(module).__name__, "kept", reason)


def _sort(
    name: str,
    model: nn.Module,
    calls: list[Call],
    wanted: Callable[[str], str | None],
    before: set[str],
) -> tuple[list[ConvertedLayer], dict[str, list[int]]]:
    """What becomes of each calling module, and path → sizes of those to be converted."""
    by_module: dict[int, list[Call]] = {}
    for call in calls:
        by_module.setdefault(id(call.module), []).append(call)
    layers, sizes = [], {}
    for path, module in model.named_modules():
        own = by_module.get(id(module))
        kind, full = type(module).__name__, _join(name, path)
        if own is None:
            if isinstance(module, nn.MultiheadAttention):
                layers.append(_by_hand(full, module, wanted(full)))
            continue
        if path in before:
            layers.append(ConvertedLayer(full, kind, "already converted"))
            continue
        across = (
            any(call.across for call in own)
            or _ACROSS.search(f"{path}.{kind}")
            or getattr(module, "is_cross_attention", False)
        )
        refused = next((call.refused for call in own if call.refused), None)
        reason = wanted(full)
        reason = reason or ("cross-attention: only time 0 exists" if across else None)
        reason = reason or (f"{refused}: no generator on the tokens alone" if refused else None)
        if reason is None:
            sizes[path] = [own[0].num_heads, own[0].head_width]
        layers.append(
            ConvertedLayer(full, kind, "converted" if reason is None else "kept", "" if reason is None else reason)
        )
    return layers, sizes
