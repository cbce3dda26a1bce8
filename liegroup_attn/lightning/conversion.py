"""Lie attention in somebody else's LightningModule: the mixin, which is the main road."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, TypeVar

import lightning as L

from liegroup_attn.errors import ConversionError
from liegroup_attn.lightning.files import AtomicCheckpointIO, CheckedLoading
from liegroup_attn.lightning.stored_flows import (
    check_law,
    fit_state,
    plain_options,
    refuse_resume,
    warn_of_rounded_flows,
    warn_of_untrained_flows,
)
from liegroup_attn.nn import ConversionReport, convert_attention

__all__ = ["LieConversion", "load_converted"]

_Module = TypeVar("_Module", bound=L.LightningModule)


class LieConversion(CheckedLoading):
    """Mixin: ``class Mine(LieConversion, TheirModule)`` is their module with Lie attention.

    Attention is converted in ``configure_model``, once, after theirs has run: so it may be built there or in
    ``__init__``, and a checkpoint finds its names, resumed or with ``load_from_checkpoint``. At the start outputs are
    those of their module. A subclass with a ``configure_model`` of its own calls ``super().configure_model()``; without a
    Trainer call ``model.configure_model()`` yourself.

    Options are what ``nn.convert_attention`` takes, as plain values: ``include``, ``exclude`` and those of ``LieFlow``,
    the clock by name. Give them as class attribute or to the constructor, which passes whatever else it gets on to
    theirs; they become the hyperparameter ``lie_attention``.

    A checkpoint must have the flows that the model has: an unconverted one in a converted model is refused, and the
    other way round, and so is one of another clock or first hop. ``load_from_checkpoint(path, from_plain=True)`` takes a
    checkpoint that has no flow at all, and then starts with fresh ones; it is no hyperparameter.

    Args:
        lie_attention: options; True are the defaults, False leaves the model as it is, None is the class attribute.
        from_plain: accept a checkpoint without any flow.

    Raises:
        ConversionError: options that are no plain values; see ``nn.convert_attention``; a checkpoint that does not fit.
        TypeError: the mixin stands behind their module.

    Example:
        >>> import torch
        >>> class Theirs(L.LightningModule):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.attention = torch.nn.MultiheadAttention(width, 2)
        >>> class Mine(LieConversion, Theirs):
        ...     lie_attention = {"max_time": 2.0}
        >>> model = Mine(width=8)
        >>> model.configure_model()  # the Trainer does
        >>> model.conversion_report.converted
        ['attention']
    """

    lie_attention: dict[str, Any] | bool = True
    conversion_report: ConversionReport | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        ahead = cls.__mro__[: cls.__mro__.index(LieConversion)]
        late = [c.__name__ for c in ahead if issubclass(c, L.LightningModule) and not issubclass(c, LieConversion)]
        if late:
            raise TypeError(
                f"{cls.__name__}: expected LieConversion before {late[0]}, got it behind, where it would never convert; "
                f"write class {cls.__name__}(LieConversion, {late[0]})"
            )

    def __init__(
        self,
        *args: Any,
        lie_attention: dict[str, Any] | bool | None = None,
        from_plain: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        saved = self.hparams.get("lie_attention")
        given = (lie_attention, saved, type(self).lie_attention)
        self.lie_attention = plain_options(next(options for options in given if options is not None))
        self.from_plain = from_plain
        # What is saved, and, where theirs saves any, what Lightning hands to loggers: it copied them before this.
        for kept in (self.hparams, getattr(self, "_hparams_initial", {})):
            kept.pop("from_plain", None)
            kept["lie_attention"] = copy.deepcopy(self.lie_attention)

    def configure_model(self) -> None:
        super().configure_model()
        if self.conversion_report is None and isinstance(self.lie_attention, dict):
            self.conversion_report = convert_attention(self, **self.lie_attention)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        warn_of_untrained_flows(self.trainer, self)
        warn_of_rounded_flows(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["lie_attention"] = self.lie_attention

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        check_law(checkpoint.get("lie_attention"), self.lie_attention)
        if "state_dict" not in checkpoint:  # strategies that shard load the parameters by themselves
            return
        way = f"{type(self).__name__}.load_from_checkpoint(path, from_plain=True)"
        if fit_state(self, checkpoint["state_dict"], self.from_plain, f"start from it with {way}"):
            refuse_resume(getattr(self, "_trainer", None), checkpoint, f"load it with {way}")


def load_converted(module_class: type[_Module], path: str | Path, **options: Any) -> _Module:
    """Load a checkpoint that was trained with :class:`ConvertAttention`.

    Args:
        module_class: the unconverted module's.
        path: of the checkpoint; the options of the conversion are in it.
        **options: as for ``module_class.load_from_checkpoint``.

    Returns:
        The converted module, an instance of a subclass with :class:`LieConversion`.

    Raises:
        ConversionError: the checkpoint names no conversion.
        ValueError: no whole checkpoint.
    """
    stored = AtomicCheckpointIO().load_checkpoint(path, weights_only=True).get("lie_attention")
    if stored is None:
        raise ConversionError(
            f"path: expected a checkpoint trained with ConvertAttention, got {path}, which names no conversion; load it with "
            f"{module_class.__name__}.load_from_checkpoint"
        )
    loader: Any = type(module_class.__name__, (LieConversion, module_class), {"lie_attention": stored})
    loaded: _Module = loader.load_from_checkpoint(path, lie_attention=stored, **options)
    return loaded
