"""Lie attention in somebody else's LightningModule: the callback, for configs and trials."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from liegroup_attn.errors import ConversionError
from liegroup_attn.lightning.conversion import LieConversion
from liegroup_attn.lightning.stored_flows import (
    LIE_NAME,
    check_law,
    check_options,
    fit_state,
    plain_options,
    refuse_resume,
    warn_of_rounded_flows,
    warn_of_untrained_flows,
)
from liegroup_attn.nn import LieFlow, convert_attention
from liegroup_attn.nn.recipe import defaults_of

__all__ = ["ConvertAttention"]


class ConvertAttention(L.Callback):
    """Convert the attention of whatever module is trained: a convenience for configs and trials.

    It converts in ``setup``, before the optimizer is made and a checkpoint is loaded, logs the report once, and leaves
    alone what is converted already with these options; give it for every stage. Resuming works. Where it ends: a module that is built in
    ``configure_model`` comes too late, and ``TheirModule.load_from_checkpoint`` knows nothing of callbacks and finds
    names it does not expect: use :func:`load_converted`, or the mixin :class:`LieConversion`, which has neither limit.

    Args:
        include: patterns of module paths to convert; default all.
        exclude: patterns of module paths to leave as they are.
        from_plain: let ``validate``, ``test`` and ``predict`` take a checkpoint without any flow, and start with fresh ones.
        **flow: those of ``nn.LieFlow``; the clock by its name, such as ``"ErlangClock(3)"``.

    Raises:
        ConversionError: nothing to convert, something converted with other options, or a checkpoint that does not fit.

    Example:
        >>> ConvertAttention(exclude="decoder.*", clock="ExponentialClock").options["exclude"]
        'decoder.*'
    """

    def __init__(
        self,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        *,
        from_plain: bool = False,
        **flow: Any,
    ) -> None:
        LieFlow(1, 1, device=None, dtype=None, **flow)  # wrong ones end here; where flows lie is the module's affair
        options = {"include": include, "exclude": exclude} | defaults_of(LieFlow) | flow
        self.options = plain_options({key: options[key] for key in options if key not in ("device", "dtype")})
        self.from_plain = from_plain
        self._check: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(pl_module, LieConversion):
            raise ConversionError(
                "callbacks: expected no ConvertAttention beside a module with LieConversion, got both; leave the callback out"
            )
        try:
            report = convert_attention(pl_module, **self.options)
        except ConversionError as error:
            if not is_overridden("configure_model", pl_module):
                raise
            raise ConversionError(
                f"{error}\nWhat configure_model builds comes after this callback: class Mine(LieConversion, "
                f"{type(pl_module).__name__}) converts it"
            ) from None
        already = [layer.name for layer in report.layers if layer.outcome == "already converted"]
        check_options(pl_module, already, self.options, type(self).__name__)  # they go into the checkpoint
        if report.converted:
            rank_zero_info(str(report))
        self._check = pl_module.register_load_state_dict_pre_hook(self._fit)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        warn_of_untrained_flows(trainer, pl_module)
        warn_of_rounded_flows(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._check is not None:
            self._check.remove()
            self._check = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["lie_attention"] = self.options

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        check_law(checkpoint.get("lie_attention"), self.options)
        if not any(map(LIE_NAME.search, checkpoint.get("state_dict", {"lie.time": None}))):
            refuse_resume(trainer, checkpoint, "load its state_dict into the module before")

    def _fit(self, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        if not prefix:
            fit_state(
                module, state, self.from_plain, "load its state_dict into the module before fit, or set from_plain"
            )
