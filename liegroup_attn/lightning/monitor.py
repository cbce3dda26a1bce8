"""A monitor of what only this attention has, in any model, while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from liegroup_attn.errors import ShapeError
from liegroup_attn.lightning.diagnosis import layer_inputs, matrices
from liegroup_attn.lightning.numbers import chosen_numbers, diagnose
from liegroup_attn.lightning.watch import Watch
from liegroup_attn.nn import LieFlow, SelfAttention
from liegroup_attn.plots import plot_matrices

__all__ = ["GeneratorMonitor"]


class GeneratorMonitor(L.Callback):
    """Log what only this attention has, to every logger, while a model trains; draw it when training ends.

    *In training*, every so many steps, it looks at each converted attention (``nn.LieFlow``) and each attention layer of
    this library during the forward pass that takes place anyway: batches may have any form, nothing runs twice, and
    training is bitwise what it is without. It logs ``lie/<module path>/<number>``. A module that is called several times
    in a step is looked at the first time, before dropout. Rank zero looks at its own batch; the others do nothing.
    Compiled modules are not looked at, their graphs call no hooks; a warning says so once.

    *After each validation* it looks at this library's layers on a fixed batch, the first one's ``"tokens"``, in one
    forward pass of its own, and logs ``lie/<number of the layer>/<number>``.

    The numbers: ``time`` (mean over heads), ``exit_rate`` (mean −Q_ii), ``expected_hops`` (mean number of moves, the first
    hop included), ``entropy`` (nats, of the mixing matrix) and ``row_error`` (how far the mixing matrix as executed is
    from row-stochastic). Softmax layers have entropy and row error. More by ``metrics``, see ``numbers.NUMBERS``; of each
    the mean over sequences and heads, without those for which it is not defined (padding leaves several closed classes);
    some look at less, see the cost.

    Cost of a look: per layer, ``sequences`` × heads dense matrices of at most ``max_tokens``², a few in memory at once, the
    hops that the layer makes on as many columns, and one exponential of each. ``stationary_mass``, ``spectral_gap``,
    ``mixing_time`` and ``detailed_balance_residual`` go matrix by matrix in float64, so they are computed for the first
    four heads of one sequence alone, the first for which they are defined; ``mixing_time`` is by far the dearest. Off these
    steps there is no cost. ``liegroup-attn bench --parts conversion`` measures a look with the default numbers.

    Args:
        sequences: how many items of a batch to look at.
        max_tokens: look at no more than the first so many tokens; at all where a layer of this library takes no fewer.
            Under a causal mask the numbers are those of these tokens; else they are those of the chain among them.
        figures: draw S, Q and P(t) of the first sequence and head when training ends, under ``<log_dir>/figures``, and in
            loggers that take figures, as TensorBoard's does.
        every_n_steps: look every so many optimizer steps, from step 0; None never.
        metrics: names of numbers, or "all"; None the cheap ones.
        figures_at: optimizer steps at which figures are drawn, too.

    Raises:
        ValueError: sizes below 1, or an unknown number.

    Example:
        >>> GeneratorMonitor(sequences=1, metrics=["time", "spectral_gap"]).metrics
        ('time', 'spectral_gap')
    """

    def __init__(
        self,
        sequences: int = 2,
        max_tokens: int = 128,
        figures: bool = True,
        every_n_steps: int | None = 100,
        metrics: str | list[str] | None = None,
        figures_at: list[int] | None = None,
    ) -> None:
        sizes = {"sequences": sequences, "max_tokens": max_tokens, "every_n_steps": every_n_steps}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}; raise it")
        self.sequences, self.max_tokens, self.figures = sequences, max_tokens, figures
        self.every_n_steps, self.figures_at = every_n_steps, sorted(figures_at or [])
        self.metrics = chosen_numbers(metrics)
        self._tokens: Tensor | None = None
        self._watch: Watch | None = None
        self._last: dict[str, dict[str, Tensor]] = {}  # what was last drawn or could be, of converted attention
        self._step = -1  # of the last look
        self._folder: Path | None = None
        self._warned = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = -1
        if not any(isinstance(m, LieFlow | SelfAttention) for m in pl_module.modules()):
            rank_zero_warn(
                "GeneratorMonitor: expected converted attention or attention of this library in the module, got none; it has nothing to "
                "log: call convert_attention, or use ConvertAttention or LieConversion"
            )
        log_dir = trainer.log_dir if self.figures or self.figures_at else None  # a collective: every process has to ask
        self._folder = None if log_dir is None else Path(log_dir) / "figures"

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._stop()
        step = trainer.global_step
        due = self.every_n_steps is not None and step % self.every_n_steps == 0
        if step == self._step or not (due or step in self.figures_at) or not trainer.is_global_zero:
            return
        self._step = step  # once, when gradients of several batches are accumulated
        names = self.metrics if due else ()
        self._watch = Watch(pl_module, self.sequences, self.max_tokens, names)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        watch = self._stop()
        if watch is None:
            return
        if watch.modules and not watch.drawn and not watch.still and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"GeneratorMonitor: expected a call of {', '.join(watch.modules[:3])} in training, got none that hooks can "
                "see; compiled modules call no hooks: watch them uncompiled, or set every_n_steps=None"
            )
        numbers = watch.numbers()
        if numbers:
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=self._step)  # where Lightning puts this step's loss
        drawn = {path: {name: m.cpu() for name, m in found.items()} for path, found in watch.drawn.items()}
        self._last = {path: found for path, found in drawn.items() if path in watch.flows}
        if self._step in self.figures_at:
            self._draw(trainer, {f"{name}_step_{self._step}": found for name, found in drawn.items()})

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        own = self._tokens is None and isinstance(batch, dict) and "tokens" in batch
        if own and any(isinstance(m, SelfAttention) for m in pl_module.modules()):
            self._tokens = batch["tokens"][: self.sequences].clone()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._tokens is None or trainer.sanity_checking:
            return
        with trainer.precision_plugin.forward_context():  # as executed, under autocast too
            found = [diagnose(layer, x, self.metrics) for layer, x in self._inputs(pl_module, self._tokens)]
        for i, numbers in enumerate(found):
            pl_module.log_dict({f"lie/{i}/{name}": v for name, v in numbers.items()}, sync_dist=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.figures or not trainer.is_global_zero:
            return
        if self._tokens is not None:
            looks = enumerate(self._inputs(pl_module, self._tokens))
            self._draw(trainer, {f"layer_{i}": matrices(layer, x[:1]) for i, (layer, x) in looks})
        else:
            self._draw(trainer, self._last)

    def _stop(self) -> Watch | None:
        """Take the hooks away, whatever happened."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()
        return watch

    def _draw(self, trainer: L.Trainer, found: dict[str, dict[str, Tensor]]) -> None:
        experiments: list[Any] = [getattr(logger, "experiment", None) for logger in trainer.loggers]
        takers = [experiment.add_figure for experiment in experiments if hasattr(experiment, "add_figure")]
        if self._folder is None and not takers:
            return
        for name, panels in found.items():
            figure, _ = plot_matrices(panels)
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(self._folder / f"{name}.png", dpi=150)
            for take in takers:
                take(f"lie/{name}", figure, global_step=self._step)

    def _inputs(self, model: nn.Module, tokens: Tensor) -> list[tuple[SelfAttention, Tensor]]:
        try:
            return layer_inputs(model, tokens[:, : self.max_tokens])
        except ShapeError:  # made for so many tokens: places of an image, a learned matrix
            return layer_inputs(model, tokens)
