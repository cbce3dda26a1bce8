"""convert_attention: one line that puts Lie attention into a model that somebody else wrote, and back."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from liegroup_attn.errors import ConversionError
from liegroup_attn.nn.attention import SoftmaxAttention
from liegroup_attn.nn.lie_flow import LieFlow
from liegroup_attn.nn.multihead import LieMultiheadAttention
from liegroup_attn.nn.report import ConversionReport, ConvertedLayer
from liegroup_attn.options import options_of

__all__ = ["convert_attention", "restore_attention"]

# The top-level package of somebody else's modules -> what knows them; imported when a model holds one.
_GUESTS = {
    "transformers": "liegroup_attn.integrations.transformers",
    "x_transformers": "liegroup_attn.integrations.x_transformers",
    "litgpt": "liegroup_attn.integrations.litgpt",
}


def convert_attention(
    model: nn.Module,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    **lie_options: Any,
) -> ConversionReport:
    """Give every attention of a model a flow along exp(tQ) behind its softmax, in place.

    It knows ``torch.nn.MultiheadAttention``, this library's ``SoftmaxAttention``, and the attention of Hugging Face
    Transformers, x-transformers and LitGPT. Time starts at 0, where outputs are those of the model as it was; the new
    parameters (``….lie.time``, ``….lie.rate_weight``, ``….lie.rate_bias``) have the dtype and device of their layer and
    require gradients whether or not the others do. Modules, weights, ties, hooks, training mode and references to
    parameters stay; make the optimizer after the conversion, or add the new parameters to it. A module that is converted
    already stays as it is.

    Args:
        model: any module; a Transformers model also gets a configuration of its own, with these options in it.
        include: patterns of module paths (``"encoder.layers.*"``, as in shells) to convert; default all.
        exclude: patterns of module paths to leave as they are.
        example_inputs: arguments for one forward in eval mode without gradients, after which every converted module must
            have been called; Transformers models make their own.
        **lie_options: those of ``LieFlow``, but for ``device`` and ``dtype``, which are the layer's.

    Returns:
        The report, which prints as a table: what was converted, what not, and why.

    Raises:
        ConversionError: nothing could be converted; a pattern fits no module; a module would not be called.
        GeneratorError: see ``LieFlow``.
        TypeError: an unknown option.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 2)
        >>> print(convert_attention(model, max_time=2.0))
        module              class               outcome    why
        ──────────────────────────────────────────────────────
        layers.0.self_attn  MultiheadAttention  converted
        layers.1.self_attn  MultiheadAttention  converted

    Source: docs/mathematics, "Clocks and the first hop".
    """
    if torch.is_inference_mode_enabled():
        raise ConversionError(
            "model: expected a conversion outside torch.inference_mode(), got one inside; its parameters could never be trained"
        )
    known = options_of(LieFlow).keys() - {"device", "dtype"}
    if unknown := sorted(set(lie_options) - known):
        raise TypeError(f"lie_options: expected names of {sorted(known)}, got {unknown}; check the spelling")
    LieFlow(1, 1, **lie_options)  # wrong values end here, before anything is changed
    wanted = _chooser(model, include, exclude)
    guests = _guests(model)
    layers: list[ConvertedLayer] = []
    try:
        done = _convert_all(model, guests, wanted, example_inputs, lie_options, layers)
        report = ConversionReport(tuple(layers))
        if not any(layer.outcome in ("converted", "already converted") for layer in layers):
            raise ConversionError(_nothing(report))
        if example_inputs is not None:
            _verify(
                model, example_inputs, [name for name in report.converted if id(model.get_submodule(name)) not in done]
            )
    except BaseException:
        names = {layer.name for layer in layers if layer.outcome == "converted"}
        _restore_all(model, guests, lambda name: name in names)
        raise
    _close_nested_path(model)
    return report


def restore_attention(model: nn.Module) -> ConversionReport:
    """Take the flows out again: every converted module is what it was, with the weights it has now.

    What time and rates have learned is lost; while time is 0 outputs do not change.

    Args:
        model: a converted module, changed in place.

    Returns:
        The report.

    Raises:
        ConversionError: nothing in it was converted.

    Example:
        >>> model = nn.MultiheadAttention(16, 2)
        >>> report = convert_attention(model)
        >>> restore_attention(model).converted, type(model).__name__
        ([''], 'MultiheadAttention')
    """
    layers = _restore_all(model, _guests(model), lambda name: True)
    if not any(layer.outcome == "restored" for layer in layers):
        raise ConversionError("model: expected one that convert_attention has converted, got none; nothing to restore")
    return ConversionReport(tuple(layers))


def _convert_all(
    model: nn.Module,
    guests: list[Any],
    wanted: Callable[[str], str | None],
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None,
    options: dict[str, Any],
    layers: list[ConvertedLayer],
) -> set[int]:
    """Add what became of each module to ``layers``; return the modules that a guest has converted as part of a whole."""
    done: set[int] = set()
    for guest in guests:
        for name, part in _whole_models(model, guest):
            layers += guest.convert_model(name, part, wanted, example_inputs, options)
            done |= {id(m) for m in part.modules()}
    drop_ins = _drop_ins(guests)
    for name, module, parents in _with_parents(model):
        if id(module) not in done:
            layers += _convert_module(name, module, parents, drop_ins, wanted, options)
    return done


def _restore_all(model: nn.Module, guests: list[Any], chosen: Callable[[str], bool]) -> list[ConvertedLayer]:
    layers: list[ConvertedLayer] = []
    for guest in guests:
        for name, part in _whole_models(model, guest):
            if any(chosen(f"{name}.{inner}" if name else inner) for inner, _ in part.named_modules()):
                layers += guest.restore_model(name, part, chosen)
    drop_ins = tuple(_drop_ins(guests).values())
    for name, module in list(model.named_modules()):
        converted: Any = module
        if isinstance(module, drop_ins) and type(module) not in drop_ins:
            why = "its class was changed after the conversion; take parametrizations off first"
            layers.append(ConvertedLayer(name, type(module).__name__, "kept", why))
        elif type(module) in drop_ins and getattr(module, "lie", None) is not None and chosen(name):
            converted.drop()
            converted.__class__ = type(converted).plain
            layers.append(ConvertedLayer(name, type(module).__name__, "restored"))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and not any(isinstance(m, drop_ins) for m in module.modules()):
            module.use_nested_tensor |= module.__dict__.pop("_lie_nested", False)
    return layers


def _convert_module(
    name: str,
    module: nn.Module,
    parents: Sequence[nn.Module],
    drop_ins: dict[type[nn.Module], Any],
    wanted: Callable[[str], str | None],
    options: dict[str, Any],
) -> list[ConvertedLayer]:
    kind: Any = type(module)
    drop_in = drop_ins.get(kind)
    if isinstance(module, tuple(drop_ins.values())):  # or of a class made from it, by parametrizations
        flow = getattr(module, "lie", None)
        if flow is not None:
            why = f"as before, max_time={flow.max_time:g}, {flow.clock}"
            return [ConvertedLayer(name, kind.plain.__name__, "already converted", why)]
        if drop_in is None and kind not in drop_ins.values():
            return [ConvertedLayer(name, kind.__name__, "kept", "a subclass, whose forward may be another")]
        if drop_in is None:
            return []
    if drop_in is None:
        if isinstance(module, tuple(drop_ins)):
            return [ConvertedLayer(name, kind.__name__, "kept", "a subclass, whose forward may be another")]
        return []
    reason = wanted(name) or drop_in.why_not(module, parents)
    if reason is not None:
        return [ConvertedLayer(name, kind.__name__, "kept", reason)]
    flow = drop_in.flow_of(module, **options)
    module.__class__ = drop_in
    module.carry(flow)  # type: ignore[operator]
    flow.train(module.training)
    return [ConvertedLayer(name, kind.__name__, "converted")]


def _chooser(
    model: nn.Module, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> Callable[[str], str | None]:
    """Path → why it is not wanted, or None."""
    chosen, left = ([p] if isinstance(p, str) else list(p or ()) for p in (include, exclude))
    modules = list(model.named_modules(remove_duplicate=False))
    names = [name for name, _ in modules]
    paths: dict[int, list[str]] = {}  # of a module that stands in several places
    for name, module in modules:
        paths.setdefault(id(module), []).append(name)
    alike = {name: paths[id(module)] for name, module in modules}
    for pattern in (*chosen, *left):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConversionError(
                f"include, exclude: expected patterns of module paths, got {pattern!r}, which fits none; see "
                "[name for name, _ in model.named_modules()]"
            )

    def why_not(name: str) -> str | None:
        own = alike.get(name, [name])
        if chosen and not any(fnmatchcase(path, p) for path in own for p in chosen):
            return "not in include"
        return "in exclude" if any(fnmatchcase(path, p) for path in own for p in left) else None

    return why_not


def _guests(model: nn.Module) -> list[Any]:
    """The integrations that know modules of this model."""
    packages = {cls.__module__.partition(".")[0] for module in model.modules() for cls in type(module).__mro__}
    return [importlib.import_module(path) for package, path in _GUESTS.items() if package in packages]


def _drop_ins(guests: list[Any]) -> dict[type[nn.Module], Any]:
    """Class → the subclass that it is exchanged for."""
    own: tuple[Any, ...] = (LieMultiheadAttention, SoftmaxAttention)
    return {one.plain: one for one in (*own, *(one for guest in guests for one in guest.DROP_INS))}


def _whole_models(model: nn.Module, guest: Any) -> Iterator[tuple[str, nn.Module]]:
    """The outermost models that a guest converts as a whole."""
    inside: set[int] = set()
    for name, module in list(model.named_modules()):
        if isinstance(module, guest.WHOLE_MODELS) and id(module) not in inside:
            inside |= {id(m) for m in module.modules()}
            yield name, module


def _with_parents(model: nn.Module) -> Iterator[tuple[str, nn.Module, Sequence[nn.Module]]]:
    """Every module once, by its first path, and those that it is inside of, the nearest first."""
    for name, module in list(model.named_modules()):
        path = name.split(".") if name else []
        yield name, module, [model.get_submodule(".".join(path[:i])) for i in reversed(range(len(path)))]


def _close_nested_path(model: nn.Module) -> None:
    """``nn.TransformerEncoder`` made before the conversion would hand nested tensors to its layers."""
    for module in model.modules():
        if (
            isinstance(module, nn.TransformerEncoder)
            and module.use_nested_tensor
            and any(isinstance(m, LieMultiheadAttention) for m in module.modules())
        ):
            module.use_nested_tensor = False
            module.__dict__["_lie_nested"] = True


def _verify(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...], names: list[str]) -> None:
    """One forward, after which every named module must have been called."""
    called: set[str] = set()
    hooks = [
        model.get_submodule(name).lie.register_forward_pre_hook(lambda *_, name=name: called.add(name))  # type: ignore[union-attr]
        for name in names
    ]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    if idle := [name for name in names if name not in called]:
        raise ConversionError(
            f"example_inputs: expected a forward that calls every converted module, got one that leaves out {idle}; "
            "exclude them, or give inputs that reach them"
        )


def _nothing(report: ConversionReport) -> str:
    if not report.layers:
        return (
            "model: expected torch.nn.MultiheadAttention, SoftmaxAttention or attention of transformers, x-transformers "
            "or litgpt inside, got none; call liegroup_attn.lie_attention in the model's own code"
        )
    return f"model: expected at least one attention that can be converted, got none:\n{report}"
