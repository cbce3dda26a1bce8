"""One run in a process of its own: train, test, write the result. ``compare`` starts these."""

from __future__ import annotations

import argparse
import datetime
import fcntl
import os
import platform
import re
import resource
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from experiments.flops import flops_per_step
from experiments.provenance import code_hash, device_name
from experiments.results import Run, write_json
from liegroup_attn.lightning import ByteCorpus, Digits, TokenClassifier
from liegroup_attn.lightning.callbacks import layer_inputs
from liegroup_attn.lightning.cli import LieCLI
from liegroup_attn.manifolds import declared
from liegroup_attn.nn import LieAttention, scale_time

TIME_SCALES = (1.0, 2.0, 4.0)  # all reported, none chosen
MOST_DRAWN = 32  # tokens of the mixing matrices kept for figures


class History(L.Callback):
    """Validation metrics and time spent, kept in the checkpoint so that a resumed run has one history."""

    def __init__(self, progress: Path) -> None:
        self.progress = progress
        self.points: list[dict[str, float]] = []
        self.seconds = self.cpu_seconds = 0.0
        self.peak_memory = 0
        self._since: tuple[float, float] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        seconds, cpu_seconds = self._spent()
        return {
            "points": self.points,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "peak_memory": self.peak_memory,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written."""
        self.points = list(state_dict["points"])
        self.seconds, self.cpu_seconds = state_dict["seconds"], state_dict["cpu_seconds"]
        self.peak_memory = state_dict["peak_memory"]

    def _spent(self) -> tuple[float, float]:
        if self._since is None:
            return self.seconds, self.cpu_seconds
        wall, cpu = self._since
        return self.seconds + time.perf_counter() - wall, self.cpu_seconds + time.process_time() - cpu

    def _pause(self) -> None:
        self.seconds, self.cpu_seconds = self._spent()
        self._since = None

    def _go_on(self) -> None:
        self._since = (time.perf_counter(), time.process_time())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._go_on()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause()
        self._look_at_memory(trainer)

    def _look_at_memory(self, trainer: L.Trainer) -> None:
        """Of the training so far, before tests and the FLOP counter take more: resident, or the GPU allocator's."""
        if trainer.strategy.root_device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.peak_memory = max(self.peak_memory, peak)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._pause()
            self._look_at_memory(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        point = {key: float(value) for key, value in trainer.callback_metrics.items()}
        self.points.append({"step": trainer.global_step, **point})
        self._go_on()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.is_global_zero and trainer.global_step % 10 == 0:
            loss = float(trainer.callback_metrics.get("train/loss", float("nan")))
            write_json(self.progress, {"step": trainer.global_step, "steps": trainer.max_steps, "loss": loss})


def main(argv: list[str] | None = None) -> None:
    """Train one variant with one seed; resumes from its last checkpoint, writes its JSON at the end."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--budget", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"))
    args = parser.parse_args(argv)
    run = Run(args.experiment, args.variant, args.budget, args.seed, tuple(map(tuple, args.set)))
    result = train(run, args.work, args.threads)
    if result is not None:
        write_json(run.result_path(args.output), result)


def train(run: Run, work: Path, threads: int, test: bool = True) -> dict[str, Any] | None:
    """Train a run and, unless it only tunes, test it.

    Returns:
        The result, or None on ranks other than 0.
    """
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    folder = run.work_path(work)
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    if "LOCAL_RANK" not in os.environ:  # processes that ddp starts belong to the one that holds it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"{run.name}: expected to be alone in {folder}, got another process at work there; wait for it or stop it"
            ) from None
    history = History(folder / "progress.json")
    # Written after each validation, when the history already has its point.
    keep = ModelCheckpoint(folder, save_top_k=0, save_last=True, save_on_train_epoch_end=False)
    cli = LieCLI(
        callbacks=[history, keep],
        run=False,
        save_config_callback=None,
        args=[
            *run.arguments(),
            "--trainer.default_root_dir",
            str(folder),
            "--trainer.logger",
            "false",
            "--trainer.enable_progress_bar",
            "false",
            "--trainer.enable_model_summary",
            "false",
        ],
    )
    last = folder / "last.ckpt"
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=str(last) if last.exists() else None)
    tests = _test(cli) if test else {}
    if not cli.trainer.is_global_zero:
        return None
    config = run.config()
    return {
        "experiment": run.experiment,
        "variant": run.variant,
        "budget": run.budget,
        "seed": run.seed,
        "config_hash": run.config_hash(),
        "config": config,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "steps": cli.trainer.global_step,
        "parameters": sum(p.numel() for p in cli.model.parameters()),
        "manifold_parameters": sum(cli.model.get_parameter(name).numel() for name in declared(cli.model)),
        "flops_per_step": _count_flops(cli) * cli.trainer.world_size,
        "seconds": round(history.seconds, 1),
        "cpu_seconds": round(history.cpu_seconds, 1),
        "peak_memory_bytes": history.peak_memory,
        "hardware": _hardware(cli.trainer, threads),
        "code": code_hash(),
        "versions": {name: version(name) for name in ("liegroup-attn", "torch", "lightning", "geoopt", "numpy")},
        "python": platform.python_version(),
        "data": cli.datamodule.facts() if isinstance(cli.datamodule, ByteCorpus | Digits) else None,
        "curve": [{k: _round(v) for k, v in point.items()} for point in history.points],
        "test": tests,
        "mixing": _mixing(cli),
    }


def _test(cli: LieCLI) -> dict[str, dict[str, float]]:
    """Final weights on the test split; for classification with Lie attention also with its time scaled."""
    scales: tuple[float, ...] = (1.0,)
    if isinstance(cli.model, TokenClassifier) and any(isinstance(m, LieAttention) for m in cli.model.modules()):
        scales = TIME_SCALES
    found = {}
    for scale in scales:
        if len(scales) > 1:
            scale_time(cli.model, scale)
        merged: dict[str, float] = {}
        for metrics in cli.trainer.test(cli.model, cli.datamodule, verbose=False):
            merged |= {re.sub(r"/dataloader_idx_\d+", "", k): _round(v) for k, v in metrics.items()}
        found[f"time x{scale:g}"] = merged
    if len(scales) > 1:
        scale_time(cli.model, 1.0)
    return found


def _first_test_batch(cli: LieCLI) -> dict[str, torch.Tensor]:
    loaders = cli.datamodule.test_dataloader()
    return next(iter(loaders[0] if isinstance(loaders, list) else loaders))


def _count_flops(cli: LieCLI) -> int:
    cli.model.to("cpu").train()
    return flops_per_step(cli.model, next(iter(cli.datamodule.train_dataloader())))


def _mixing(cli: LieCLI) -> dict[str, Any]:
    """The first block's mixing matrices, every head, on the first test example: the same input for every variant."""
    batch = _first_test_batch(cli)
    example = {key: value[:1, :MOST_DRAWN] if value.dim() > 1 else value[:1] for key, value in batch.items()}
    cli.model.to("cpu").eval()
    layer, x = layer_inputs(cli.model, example["tokens"])[0]
    with torch.no_grad():
        matrix = layer.mixing_matrix(x)[0]  # (H, N, N)
    found = {key: value[0].tolist() for key, value in example.items() if key != "targets"}
    return {**found, "heads": [[[round(p, 4) for p in row] for row in head] for head in matrix.tolist()]}


def _round(value: float) -> float:
    return float(f"{float(value):.6g}")


def _hardware(trainer: L.Trainer, threads: int) -> dict[str, Any]:
    device = trainer.strategy.root_device
    return {
        "device": device.type,
        "name": device_name(device),
        "cores": os.cpu_count(),
        "threads": threads,
        "devices": trainer.num_devices,
        "precision": str(trainer.precision),
    }


if __name__ == "__main__":
    main()
