"""The command line: ``liegroup-attn fit|validate|test|predict`` on LightningCLI, and the comparison."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichModelSummary
from lightning.pytorch.cli import LightningCLI

from liegroup_attn.errors import ConvergenceError
from liegroup_attn.lightning.callbacks import ExactResume, GeneratorMonitor
from liegroup_attn.lightning.files import AtomicCheckpointIO, unusable
from liegroup_attn.lightning.guard import ManifoldGuard
from liegroup_attn.lightning.terminal import Summary, say

__all__ = ["LieCLI", "main"]

_MENDABLE = (ValueError, TypeError, OSError, ConvergenceError, MisconfigurationException)
_EXPERIMENTS = {
    "compare": "experiments.compare",
    "draw": "experiments.draw",
    "bench": "experiments.benchmarks.bench",
    "recover": "experiments.rate_recovery.run",
    "drop-in": "experiments.drop_in.run",
    "fine-tune": "experiments.fine_tune.run",
    "position-study": "experiments.position_study.run",
    "positions": "experiments.positions.run",
}
_USAGE = """\
liegroup-attn: attention that mixes tokens with exp(tQ)

  liegroup-attn fit|validate|test|predict --config FILE [--config FILE …] [--KEY VALUE …]
        train or run one model; --help after the word lists every key
  liegroup-attn compare [--help]    train every variant side by side, then the table and figures (from a clone)
  liegroup-attn bench [--help]      time and memory beside the competitors, table and figure (from a clone)
  liegroup-attn recover [--help]    find a known generator again from transition counts, table and figure (from a clone)
  liegroup-attn drop-in [--help]    convert models of several libraries and measure what must hold, table (from a clone)
  liegroup-attn fine-tune [--help]  train GPT-2 with softmax, convert it and train on, table and figures (from a clone)
  liegroup-attn position-study [--help]
                                    probe what encoders and decoders learn of positions, tables and figures (from a clone)
  liegroup-attn positions [--help]  train every positional encoding beside every way of mixing, tables and figures (from a clone)
  liegroup-attn draw [--help]       draw tables and figures again from the result files (from a clone)
"""


class LieCLI(LightningCLI):
    """LightningCLI for any module and data module, with exact resumption, generator monitor and manifold guard on.

    Numbers of a test are printed in few lines.
    Checkpoints are written by ``AtomicCheckpointIO``, unless plugins or the strategy bring their own way.
    """

    _says = False  # what Lightning was told not to print

    def __init__(self, callbacks: Sequence[L.Callback] | None = None, **options: Any) -> None:
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [ExactResume(), GeneratorMonitor(), ManifoldGuard(), *(callbacks or ())]},
            **options,
        )

    def instantiate_trainer(self, **options: Any) -> L.Trainer:
        trainer: Any = super().instantiate_trainer(**options)
        # Not among the plugins: those of a config would take its place, and some strategies refuse any.
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        for i, callback in enumerate(trainer.callbacks):
            if type(callback) is RichModelSummary and not callback._summarize_kwargs:
                trainer.callbacks[i] = Summary(callback._max_depth)
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        given = super()._prepare_subcommand_kwargs(subcommand)
        if given.get("verbose"):  # of validate and test: Lightning's table has a row for every number
            given["verbose"], self._says = False, True
        return given

    def after_validate(self) -> None:
        """Print the numbers, unless ``--verbose false``."""
        if self._says:
            say(self.trainer.callback_metrics)

    def after_test(self) -> None:
        """Print the numbers, unless ``--verbose false``."""
        self.after_validate()

    def _parse_ckpt_path(self) -> None:
        # Lightning puts the checkpoint's hyperparameters over the config's: a softmax config with a checkpoint of Lie
        # attention would silently run Lie attention. Here the config says what is built, the checkpoint must fit.
        pass


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``liegroup-attn``; a wrong input ends in one sentence and exit status 1 or 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return
    # Named here, so that a config may say LanguageModel instead of the whole path.
    import liegroup_attn.lightning

    assert liegroup_attn.lightning
    sys.path.insert(0, "")  # and so that it may name a class of the folder it is called from, as for ``python -m``
    try:
        if argv[0] in _EXPERIMENTS:
            _run_experiments(_EXPERIMENTS[argv[0]], argv)
        else:
            # LightningCLI wants the arguments in one place only; strategy ddp starts sys.argv[0] again.
            sys.argv = [sys.argv[0], *argv]
            LieCLI()
    except _MENDABLE as error:
        # What the user can mend; anything else is a bug and keeps its traceback.
        sentence = unusable(error.filename or "a file", error) if isinstance(error, OSError) and error.errno else error
        print(f"liegroup-attn: {type(error).__name__}: {sentence}", file=sys.stderr)
        sys.exit(1)


def _run_experiments(module: str, argv: list[str]) -> None:
    try:
        sys.argv = [f"liegroup-attn {argv[0]}", *argv[1:]]
        runpy.run_module(module, run_name="__main__")
    except ModuleNotFoundError as error:
        if error.name not in ("experiments", module):
            raise
        raise FileNotFoundError(
            f"{module}: expected the repository's folder experiments/ here, got none; run this in a clone of the repository"
        ) from None
