"""Train GPT-2 with softmax, convert it, train on in several ways; then the table and the figures."""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import hashlib
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from experiments.draw import draw
from experiments.fine_tune.report import FOLDER, VARIANTS
from experiments.fine_tune.tasks import TASKS
from experiments.jobs import finished
from experiments.markdown import show
from experiments.provenance import code_hash, device_name
from experiments.results import write_json
from liegroup_attn.lightning import AtomicCheckpointIO, ByteCorpus, ExactResume, FineTune, GeneratorMonitor
from liegroup_attn.nn import LieFlow, convert_attention, restore_attention

__all__ = ["main"]

SHOWN = 24  # tokens of the matrices in the figures
NUMBERS = ["time", "exit_rate", "expected_hops", "entropy", "effective_rank", "distance_to_softmax"]


class Tuner(FineTune):
    """``FineTune`` with the accuracy of tokens."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self._log_accuracy(batch, "validation")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        self._log_accuracy(batch, "test")

    def _log_accuracy(self, batch: Any, stage: str) -> None:
        right = (self(batch).argmax(-1) == batch[1]).float().mean()
        self.log(f"{stage}/accuracy", right, batch_size=len(batch[1]))


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``liegroup-attn fine-tune``."""
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    told = logging.getLogger("lightning.pytorch")
    level = told.level
    told.setLevel(logging.ERROR)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            bar = progress.add_task("", total=len(args.tasks) * len(args.seeds) * len(VARIANTS))
            for name in args.tasks:
                for seed in args.seeds:
                    _run_seed(
                        name,
                        seed,
                        args,
                        lambda what: progress.update(bar, description=what),
                        lambda: progress.advance(bar),
                    )
    except KeyboardInterrupt:
        console.print("\nstopped; finished runs are kept, and the same command again resumes")
        sys.exit(130)
    finally:
        told.setLevel(level)
    for written in draw(args.output, [FOLDER]):
        console.print(f"wrote {written}")
    show(console, (args.output / FOLDER / "table.md").read_text())


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="liegroup-attn fine-tune",
        description="Train somebody else's model with softmax attention, convert its attention and train on: everything or the "
        "flows alone, with a fixed or an exponential clock, beside softmax. Finished runs are kept: the same command again "
        "resumes.",
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--corpus", default="tinyshakespeare", help="of the text, as ByteCorpus takes it")
    parser.add_argument("--path", default=None, help="a local copy of the corpus instead of a download")
    parser.add_argument("--pretrain-steps", type=int, default=None, help="with softmax; default by task")
    parser.add_argument("--steps", type=int, default=None, help="after the conversion; default by task")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/fine-tune"), help="results, tables, figures")
    return parser.parse_args(argv)


def _setting(task: str, args: argparse.Namespace) -> dict[str, Any]:
    """What all files of a task must share."""
    given = {"pretrain_steps": args.pretrain_steps, "steps": args.steps}
    own = {name: value for name, value in given.items() if value is not None}
    found = {"task": task, **TASKS[task].setting, **own}
    data = TASKS[task].data(0, 64, args.corpus, args.path)
    if not isinstance(data, ByteCorpus):
        return found
    data.prepare_data()
    data.setup("fit")
    return found | {"corpus": args.corpus, "sha256": data.facts()["sha256"]}


def _run_seed(
    task: str, seed: int, args: argparse.Namespace, say: Callable[[str], None], advance: Callable[[], None]
) -> None:
    folder, work, setting = args.output / FOLDER / "results", args.output / FOLDER / "work", _setting(task, args)
    trained: nn.Module | None = None
    for variant, (_, options, trainable) in VARIANTS.items():
        path = folder / f"{task}-{variant}-seed{seed}.json"
        if finished(path, {"setting": setting}):
            advance()
            continue
        if trained is None:
            say(f"{task}, seed {seed}: softmax")
            own = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]  # of no other setting
            trained = _pretrained(seed, args, setting, work / f"{task}-seed{seed}-{own}.pt")
        say(f"{task}, seed {seed}: {variant}")
        model = copy.deepcopy(trained)
        convert_attention(model, **options, **({} if variant == "softmax" else {"max_time": setting["max_time"]}))
        found = _train(model, seed + 1000, args, setting, trainable, "after")
        found["matrices"] = _matrices(model, args, task) if variant != "softmax" and seed == args.seeds[0] else None
        write_json(path, _facts(args, setting) | {"variant": variant, "seed": seed} | found)
        advance()


def _pretrained(seed: int, args: argparse.Namespace, setting: dict[str, Any], path: Path) -> nn.Module:
    """The softmax model, from where it was kept if it was."""
    L.seed_everything(seed, verbose=False)
    model = TASKS[setting["task"]].build()
    if path.exists():
        model.load_state_dict(AtomicCheckpointIO().load_checkpoint(path, weights_only=True)["state_dict"])
        return model
    convert_attention(model, learn_time=False, learn_rates=False)  # FineTune takes converted models; time stays 0
    _train(model, seed, args, setting, "all", "pretrain", warmup=50)
    restore_attention(model)
    AtomicCheckpointIO().save_checkpoint({"state_dict": model.state_dict()}, path)
    return model


def _train(
    model: nn.Module,
    seed: int,
    args: argparse.Namespace,
    setting: dict[str, Any],
    trainable: Any,
    phase: str,
    warmup: int = 20,
) -> dict[str, Any]:
    """Train, validate every quarter, test once at the end; what the monitor saw."""
    L.seed_everything(seed, verbose=False)
    task, rates = TASKS[setting["task"]], setting["learning_rate"]
    steps = setting["pretrain_steps"] if phase == "pretrain" else setting["steps"]
    options: dict[str, Any] = {"weight_decay": 0.01, "warmup_steps": warmup, "lie_learning_rate": rates["lie"]}
    tuner = (Tuner if task.accuracy else FineTune)(model, trainable, learning_rate=rates[phase], **options)
    data = task.data(seed, steps * setting["batch_size"], args.corpus, args.path)
    with tempfile.TemporaryDirectory() as logs:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            val_check_interval=max(1, steps // 4),
            logger=CSVLogger(logs),
            callbacks=[
                ExactResume(),
                GeneratorMonitor(figures=False, every_n_steps=max(1, steps // 10), metrics=NUMBERS),
            ],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            log_every_n_steps=max(1, steps // 10),
            gradient_clip_val=1.0,
        )
        (before,) = trainer.validate(tuner, data, verbose=False)
        start = time.process_time()
        trainer.fit(tuner, data)
        seconds = time.process_time() - start
        test = {} if phase == "pretrain" else trainer.test(tuner, data, verbose=False)[0]  # once, and at the end
        with open(Path(trainer.log_dir or logs) / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    names = ("loss", "accuracy") if task.accuracy else ("loss",)
    found: dict[str, Any] = {
        "validation" if name == "loss" else f"validation_{name}": [
            [0, before[f"validation/{name}"]],
            *_series(rows, f"validation/{name}", past=0),
        ]
        for name in names
    }
    return found | {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **{f"test_{name}": test.get(f"test/{name}") for name in names},
        "cpu_seconds": seconds,
        "monitor": {
            name: _series(rows, name) for name in sorted({n for row in rows for n in row if n.startswith("lie/")})
        },
        "times": {
            name.rpartition(".")[0]: [round(float(t), 4) for t in m.flow_time().detach().flatten()]
            for name, m in model.named_modules()
            if isinstance(m, LieFlow)
        },
        "data": data.facts() if isinstance(data, ByteCorpus) else {},
    }


def _series(rows: list[dict[str, str]], name: str, past: int = -1) -> list[list[float]]:
    """Pairs (step, value) of a column."""
    return [[int(row["step"]) + 1, float(row[name])] for row in rows if row.get(name) and int(row["step"]) > past]


def _matrices(model: nn.Module, args: argparse.Namespace, task: str) -> dict[str, Any]:
    """S, Q and P(t) of the head with the longest time on the first validation example, its first tokens."""
    data = TASKS[task].data(0, 64, args.corpus, args.path)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    tokens = batch["tokens"][:1, :SHOWN]
    flows = {name: m for name, m in model.named_modules() if isinstance(m, LieFlow)}
    name, flow = max(flows.items(), key=lambda pair: float(pair[1].flow_time().detach().max()))
    head = int(flow.flow_time().argmax())
    seen: list[Any] = []
    hook = flow.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    model.eval().requires_grad_(True)(tokens)  # without gradients a time of 0 would be passed by
    hook.remove()
    generator, value = seen[0]
    with torch.no_grad():
        found = {"S": generator.jump_chain(), "Q": generator.dense(), "P(t)": flow.mixing(generator, value)}
    return {
        "layer": name.removesuffix(".lie"),
        "head": head,
        "time": round(float(flow.flow_time().detach()[head]), 3),
        "tokens": _names(tokens[0], task),
        **{k: [[round(x, 4) for x in row] for row in m[0, head].tolist()] for k, m in found.items()},
    }


def _names(tokens: Tensor, task: str) -> list[str]:
    if task == "text":
        return [{" ": "␣", "\n": "⏎"}.get(c, c) for c in bytes(tokens.tolist()).decode("latin-1")]
    return [f"{node} → {parent}" for node, parent in tokens.tolist()]


def _facts(args: argparse.Namespace, setting: dict[str, Any]) -> dict[str, Any]:
    return {
        "setting": setting,
        "hardware": {"name": device_name(torch.device("cpu")), "threads": args.threads},
        "versions": {
            name: version(name)
            for name in ("torch", "lightning", *(["transformers"] if setting["task"] == "text" else []))
        },
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "code": code_hash(),
    }


if __name__ == "__main__":
    main()
