"""One cell: a task, an encoding, a way of mixing and a seed; trained, then tested once."""

from __future__ import annotations

import copy
import datetime
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import nn

from experiments.positions.encodings import MIXINGS, RESCALED, recipes
from experiments.positions.tasks import TASKS, Batch, Task
from experiments.provenance import code_hash, device_name
from liegroup_attn.nn import LieAttention
from liegroup_attn.positional import LearnedEncoding

__all__ = ["Cell", "measured", "run_cell"]

Test = dict[str, dict[str, float] | None]


class Cell(NamedTuple):
    """What a result file is about.

    Args:
        task: its name.
        encoding: its name.
        mixing: its name.
        seed: of data and weights.
        setting: of the task, as the files say it.
        corpus: of the text.
        path: a local copy of it.
        file: where the result goes.
    """

    task: str
    encoding: str
    mixing: str
    seed: int
    setting: dict[str, Any]
    corpus: str
    path: str | None
    file: Path

    @property
    def recipes(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Of attention and encoding."""
        choice = TASKS[self.task].encodings[self.encoding]
        return recipes(choice, MIXINGS[self.mixing], self.setting["lengths"][0])


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train, validate, test: what the file holds."""
    task, setting = TASKS[cell.task], cell.setting
    attention, encoding = cell.recipes
    data = task.data(setting, cell.seed, cell.corpus, cell.path)
    model = started(task, setting, attention, encoding, cell.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=setting["steps"],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            gradient_clip_val=1.0,
        )
        start = time.process_time()
        trainer.fit(model, data)
    trained = time.process_time()
    train_loss = float(trainer.callback_metrics["train/loss"])
    validation = measured(model, task, data.validation, setting["lengths"][0])
    test = _tests(model, task, data.tests, setting)
    return {
        "task": cell.task,
        "encoding": cell.encoding,
        "mixing": cell.mixing,
        "seed": cell.seed,
        "setting": setting,
        "recipes": {"attention": attention, "encoding": encoding},
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_loss": train_loss,
        "validation": validation,
        "test": test,
        "references": {title: _tests(known, task, data.tests, setting) for title, known in data.references.items()},
        "times": _times(model),
        "rescaled": _rescaled(model, task, data.tests, cell) if cell.encoding == "rope" and len(data.tests) > 1 else {},
        "cpu_seconds": {"train": trained - start, "test": time.process_time() - trained},
        "data": data.facts,
        "hardware": {"name": device_name(torch.device("cpu")), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("torch", "lightning", "numpy")},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "code": code_hash(),
        "experiment_code": code_hash(Path(__file__).parent),
    }


def started(
    task: Task, setting: dict[str, Any], attention: dict[str, Any], encoding: dict[str, Any] | None, seed: int
) -> L.LightningModule:
    """The model before training: whatever an encoding draws, all else starts as in softmax attention without positions."""
    L.seed_everything(seed, verbose=False)
    bare = task.model(setting, {"module": "SoftmaxAttention"}, None)
    L.seed_everything(seed, verbose=False)
    model = task.model(setting, attention, encoding)
    model.load_state_dict(bare.state_dict(), strict=False)
    return model


@torch.no_grad()
def measured(model: nn.Module, task: Task, batches: list[Batch], trained: int) -> dict[str, float]:
    """Means over what a task counts: bytes, questions or images."""
    model.eval()
    sums: dict[str, tuple[float, int]] = {}
    for batch in batches:
        for name, (total, count) in task.measure(model(batch["tokens"]).float(), batch, trained).items():
            before = sums.get(name, (0.0, 0))
            sums[name] = before[0] + total, before[1] + count
    return {name: total / count for name, (total, count) in sums.items()}


def _tests(model: nn.Module, task: Task, tests: dict[int, list[Batch]], setting: dict[str, Any]) -> Test:
    """Test length → what was measured; None where a table has no row for a position."""
    absolute = getattr(getattr(model, "transformer", None), "absolute", None)
    rows = len(absolute.weight) if isinstance(absolute, LearnedEncoding) else None
    return {
        str(length): measured(model, task, batches, setting["lengths"][0]) if rows is None or length <= rows else None
        for length, batches in tests.items()
    }


def _times(model: nn.Module) -> dict[str, list[float]]:
    """Module → times of its heads; empty for softmax attention, which has none."""
    return {
        name: [round(time, 4) for time in module.flow.flow_time().detach().flatten().tolist()]
        for name, module in model.named_modules()
        if isinstance(module, LieAttention)
    }


def _rescaled(model: L.LightningModule, task: Task, tests: dict[int, list[Batch]], cell: Cell) -> dict[str, Test]:
    """The same weights with scaled frequencies, at the lengths beyond that of training."""
    trained = cell.setting["lengths"][0]
    weights = copy.deepcopy(model.state_dict())
    found: dict[str, Test] = {}
    for name, choice in RESCALED.items():
        found[name] = {}
        for length, batches in tests.items():
            if length > trained:
                own = recipes(choice, MIXINGS[cell.mixing], trained, length / trained)
                scaled = task.model(cell.setting, *own)
                scaled.load_state_dict(weights)
                found[name][str(length)] = measured(scaled, task, batches, trained)
    return found
