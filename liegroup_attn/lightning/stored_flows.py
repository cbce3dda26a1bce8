"""Checks that a checkpoint's flows fit the model's: options, names, laws."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from liegroup_attn.clocks import Clock
from liegroup_attn.errors import ConversionError
from liegroup_attn.nn import LieFlow
from liegroup_attn.options import options_of

__all__ = [
    "LIE_NAME",
    "check_law",
    "check_laws",
    "check_options",
    "fit_state",
    "plain_options",
    "refuse_resume",
    "warn_of_rounded_flows",
    "warn_of_untrained_flows",
]

LIE_NAME = re.compile(r"(?:^|\.)lie\.(?:time|rate_weight|rate_bias)$")


def plain_options(options: Any, where: str = "lie_attention") -> Any:
    """A copy of options that a checkpoint can hold: a dict, or False."""
    if where == "lie_attention" and options in (True, None):
        return {}
    if isinstance(options, list | tuple):
        return [plain_options(value, f"{where}[{i}]") for i, value in enumerate(options)]
    if isinstance(options, dict):
        return {str(key): plain_options(value, f"{where}[{key!r}]") for key, value in options.items()}
    if options is None or type(options) in (str, bool, int, float):
        return options
    if isinstance(options, Clock):  # LightningCLI makes one of "ExponentialClock"
        return repr(options)
    raise ConversionError(
        f"{where}: expected strings, numbers, lists and dicts, got {type(options).__name__}; a checkpoint would not load: "
        'name a clock as in "ErlangClock(3)", and call nn.convert_attention yourself for the rest'
    )


def check_law(stored: Any, own: Any) -> None:
    """Raise unless both options, where both convert, mean the same clock and first hop."""
    laws = [_of_options(options) for options in (stored, own) if isinstance(options, dict)]
    if len(laws) == 2 and laws[0] != laws[1]:
        raise ConversionError(
            f"checkpoint: expected flows with {laws[1]}, got {laws[0]}; convert with lie_attention={stored}"
        )


def _of_options(options: dict[str, Any]) -> dict[str, object]:
    """Of the law that flows with these options have, what values of parameters cannot show."""
    known = {name: options[name] for name in options_of(LieFlow) if options.get(name) is not None}
    return {name: value for name, value in LieFlow(1, 1, **known).law.items() if name != "max_time"}


def check_laws(stored: dict[str, dict[str, Any]], own: dict[str, dict[str, Any]]) -> None:
    """Raise unless flows of the same path, on either side, have the same law."""
    for path in sorted(stored.keys() & own.keys()):
        if stored[path] != own[path]:
            wanted = ", ".join(f"{name}={value!r}" for name, value in stored[path].items())
            raise ConversionError(
                f"checkpoint: expected for {path or 'the model'} a flow with {own[path]}, got {stored[path]}; convert the "
                f"model with {wanted} before it is loaded"
            )


def check_options(model: nn.Module, names: Iterable[str], options: dict[str, Any], door: str) -> None:
    """Raise unless the converted modules of these names are what the options would have made of them.

    Not ``time`` and ``rate``, which are initial values.
    """
    wanted = options | _of_options(options)
    include, exclude = ([p] if isinstance(p, str) else p or [] for p in (options["include"], options["exclude"]))
    for name in names:
        flow = model.get_submodule(name).lie
        if not isinstance(flow, LieFlow):
            continue
        there = flow.law | {"learn_time": isinstance(flow.time, nn.Parameter), "learn_rates": flow.learn_rates}
        there |= {"tol": flow.tol, "allow_open_mask": flow.allow_open_mask}
        apart = [f"{key}={value!r}" for key, value in there.items() if wanted[key] != value]
        if include and not any(fnmatchcase(name, p) for p in include):
            apart.append(f"a flow outside include={include}")
        if any(fnmatchcase(name, p) for p in exclude):
            apart.append(f"a flow in exclude={exclude}")
        if apart:
            raise ConversionError(
                f"{door}: expected {name or 'the module'} as its options say, got it converted already, with "
                f"{', '.join(apart)}; give the options it was converted with, or nn.restore_attention(model) before"
            )


def fit_state(module: nn.Module, state: dict[str, Tensor], from_plain: bool, remedy: str) -> bool:
    """Check that a checkpoint has this module's flows; with ``from_plain`` fill them in where it has none (True)."""
    flows = [(n, m) for n, m in module.named_modules(remove_duplicate=False) if isinstance(m, LieFlow)]
    # Without the factor on its time, which is there if it is not 1.
    own = {f"{name}.{key}": p for name, flow in flows for key, p in flow.state_dict().items() if key != "time_scale"}
    given = {name for name in state if name in own or LIE_NAME.search(name)}
    if given == own.keys():
        return False
    if own and not given:
        if from_plain:
            state.update({name: value.clone() for name, value in own.items()})
            return True
        raise ConversionError(
            f"checkpoint: expected the parameters of a converted model, got one without any flow; {remedy}"
        )
    if not own:
        raise ConversionError(
            f"checkpoint: expected the parameters of an unconverted model, got those of {len(given)} flows' "
            f"({', '.join(sorted(given)[:2])}, …); convert with the options it was trained with"
        )
    names = sorted(given ^ own.keys())
    raise ConversionError(
        f"checkpoint: expected the flows that the model has, got others; {len(names)} names differ "
        f"({', '.join(names[:3])}, …); convert with the include, exclude and learn_rates it was trained with"
    )


def refuse_resume(trainer: Any, checkpoint: dict[str, Any], remedy: str, why: str = "knows no flow") -> None:
    """A fit would go on with the optimizer's states, which are of other parameters."""
    if trainer is not None and trainer.state.fn == "fit" and "optimizer_states" in checkpoint:
        raise ConversionError(
            f"ckpt_path: expected a checkpoint of this model to resume, got one whose optimizer {why}; {remedy} and fit without ckpt_path"
        )


def warn_of_rounded_flows(module: nn.Module) -> None:
    """At the start of a fit: flows in half precision, whose steps are smaller than what is rounded away."""
    parameters = {
        id(p): p for m in module.modules() if isinstance(m, LieFlow) for p in m.parameters() if p.requires_grad
    }
    narrow = {
        n: p.dtype for n, p in module.named_parameters() if id(p) in parameters and torch.finfo(p.dtype).bits < 32
    }
    if narrow:
        name, dtype = next(iter(narrow.items()))
        precision = "16-true" if dtype == torch.float16 else "bf16-true"
        rank_zero_warn(
            f"{name}: expected times and rates of flows in float32, got {dtype}, where small steps round to nothing and they stay "
            f'at their start; train with Trainer(plugins=ManifoldPrecision("{precision}"))'
        )


def warn_of_untrained_flows(trainer: L.Trainer, module: nn.Module) -> None:
    """At the start of a fit: flows that could learn, and whose parameters no optimizer has."""
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    flows = {name: m for name, m in module.named_modules() if isinstance(m, LieFlow)}
    idle = [
        name for name, flow in flows.items() if any(p.requires_grad and id(p) not in held for p in flow.parameters())
    ]
    if idle and held:
        rank_zero_warn(
            f"optimizers: expected the parameters of {len(flows)} converted attentions, got none of {', '.join(idle[:3])}; they will not "
            "learn: make the optimizer in configure_optimizers, after the conversion"
        )
