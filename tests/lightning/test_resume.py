"""A run that was stopped, or killed, and resumed equals the uninterrupted one bit by bit, with dropout."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, DistributedSampler

from liegroup_attn.lightning import ByteCorpus, ExactResume, GeneratorMonitor, LanguageModel
from liegroup_attn.lightning.cli import main
from liegroup_attn.lightning.data import ResumableLoader

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]
RECIPES = {
    "softmax": {"module": "SoftmaxAttention"},
    "exp": {"module": "LieAttention", "time": 2.0},
    "matrix_exp": {"module": "LieAttention", "time": 8.0},
    "resolvent": {"module": "LieAttention", "first_hop": True, "clock": "ExponentialClock"},
}
STEPS, EPOCH = 14, 6  # steps in all and an epoch


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("resume") / "text.txt"
    file.write_bytes(bytes(torch.randint(97, 123, (4000,), generator=torch.Generator().manual_seed(1)).tolist()))
    return str(file)


def fit(folder: Path, recipe: dict, text: str, resume: Path | None = None, exact: bool = True) -> dict:
    """Train and give the last checkpoint; there is one for every step."""
    L.seed_everything(0 if resume is None else 99)
    model = LanguageModel(dict(recipe), width=8, depth=2, num_heads=2, dropout=0.1, warmup_steps=3)
    data = ByteCorpus(text, context=12, batch_size=2, train_windows=2 * EPOCH, eval_windows=2)
    saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        callbacks=[saver, GeneratorMonitor(figures=False), *([ExactResume()] if exact else [])],
        logger=CSVLogger(folder, "log", ""),
        log_every_n_steps=1,
        val_check_interval=4,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data, ckpt_path=resume, weights_only=True)
    return torch.load(folder / f"step={STEPS}.ckpt", weights_only=True)


def losses(file: Path) -> dict[int, float]:
    return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file.open()) if row["train/loss"]}


def assert_equal(one: dict, two: dict) -> None:
    """Weights, optimizer and schedule of two checkpoints, bit by bit."""
    assert list(one["state_dict"]) == list(two["state_dict"])
    for name, value in one["state_dict"].items():
        assert torch.equal(two["state_dict"][name], value), name
    (first,), (second,) = one["optimizer_states"], two["optimizer_states"]
    for index, state in first["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(second["state"][index][key]), torch.as_tensor(value)), (index, key)
    assert first["param_groups"] == second["param_groups"]
    assert one["lr_schedulers"] == two["lr_schedulers"]
    random = [checkpoint["callbacks"]["ExactResume"]["torch"] for checkpoint in (one, two)]
    assert torch.equal(*random)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path, text, recipe):
    whole = fit(tmp_path / "whole", recipe, text)
    expected = losses(tmp_path / "whole" / "log" / "metrics.csv")
    assert len(expected) == STEPS
    for step in (1, 4, EPOCH, 9):  # early, at a validation, at the end of an epoch, in the second one
        folder = tmp_path / f"from {step}"
        assert_equal(whole, fit(folder, recipe, text, tmp_path / "whole" / f"step={step}.ckpt"))
        resumed = losses(folder / "log" / "metrics.csv")
        assert resumed == {k: v for k, v in expected.items() if k >= step}


def test_without_exact_resume_it_is_not(tmp_path, text):
    whole = fit(tmp_path / "whole", RECIPES["exp"], text)
    other = fit(tmp_path / "rest", RECIPES["exp"], text, tmp_path / "whole" / "step=4.ckpt", exact=False)
    assert not torch.equal(other["state_dict"]["head.weight"], whole["state_dict"]["head.weight"])


HANGS_AT = 8
KILLED = f"""
import sys, time, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import torch
torch.set_num_threads(1)
from liegroup_attn.lightning import LanguageModel, cli

step = LanguageModel.training_step
def hang(self, batch, index):
    if self.global_step == {HANGS_AT}:
        print("waits to be killed", flush=True)
        time.sleep(600)
    return step(self, batch, index)
LanguageModel.training_step = hang
cli.main(sys.argv[1:])
"""


def test_a_killed_command_resumes(tmp_path, text, monkeypatch):
    model = {"width": 8, "depth": 1, "num_heads": 2, "dropout": 0.1, "warmup_steps": 3, "attention": RECIPES["exp"]}
    data = {"source": text, "context": 12, "batch_size": 2, "train_windows": 2 * EPOCH, "eval_windows": 2}
    saver = {
        "class_path": "ModelCheckpoint",
        "init_args": {"save_top_k": -1, "every_n_train_steps": 1, "filename": "{step}"},
    }
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "val_check_interval": 4,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [saver],
        },
        "model": {"class_path": "LanguageModel", "init_args": model},
        "data": {"class_path": "ByteCorpus", "init_args": data},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["liegroup-attn"])

    def arguments(folder: str, *more: str) -> list[str]:
        root = ["--trainer.default_root_dir", str(tmp_path / folder)]
        return ["fit", "--config", str(tmp_path / "config.yaml"), *root, *more]

    def found(folder: str, name: str) -> Path:
        (file,) = (tmp_path / folder).rglob(name)
        return file

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments("killed")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    try:
        assert any("waits to be killed" in line for line in process.stdout)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    last = found("killed", f"step={HANGS_AT}.ckpt")
    main(arguments("resumed", "--ckpt_path", str(last)))
    main(arguments("whole"))

    end = f"step={STEPS}.ckpt"
    ends = [torch.load(found(folder, end), weights_only=True) for folder in ("whole", "resumed")]
    assert_equal(*ends)
    whole, resumed = (losses(found(folder, "metrics.csv")) for folder in ("whole", "resumed"))
    assert resumed == {k: v for k, v in whole.items() if k >= HANGS_AT}
    assert len(resumed) == STEPS - HANGS_AT


# other people's loaders


class Seen(L.LightningModule):
    """Remembers its batches, and the random numbers drawn beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple[list, float]] = []

    def training_step(self, batch, index):
        batch = torch.stack(batch) if isinstance(batch, list) else batch  # of several loaders
        self.seen.append((batch.tolist(), float(torch.rand(()))))
        return self.layer(batch.flatten()[:, None].float()).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def look(folder: Path, loader: Any, resume: Path | None = None) -> tuple[list, list[str]]:
    L.seed_everything(0 if resume is None else 99)
    model = Seen()
    saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=3, callbacks=[saver, ExactResume()], **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, loader, ckpt_path=resume, weights_only=True)
    return model.seen, [str(w.message) for w in caught if "resumes where it stopped" in str(w.message)]


def own(**options: Any) -> dict[str, Any]:
    return {"generator": torch.Generator(), **options}


NUMBERS = range(2 * EPOCH)
# Loader → whether a fit that resumes in mid-epoch, and at an epoch's end, equals the uninterrupted one.
LOADERS: dict[str, tuple[Callable[[], Any], bool, bool]] = {
    "torch's": (lambda: DataLoader(NUMBERS, 2), False, False),
    "with a generator": (lambda: DataLoader(NUMBERS, 2, **own()), False, True),
    "shuffled": (lambda: DataLoader(NUMBERS, 2, shuffle=True), False, False),
    "shuffled, with a generator": (lambda: DataLoader(NUMBERS, 2, **own(shuffle=True)), False, False),
    "by epoch": (
        lambda: DataLoader(NUMBERS, 2, **own(sampler=DistributedSampler(NUMBERS, num_replicas=1, rank=0))),
        False,
        True,
    ),
    "resumable": (lambda: ResumableLoader(NUMBERS, batch_size=2), True, True),
    "resumable, shuffled": (lambda: ResumableLoader(NUMBERS, batch_size=2, shuffle=True), True, True),
    "two": (lambda: [ResumableLoader(NUMBERS, batch_size=2), DataLoader(NUMBERS, 2, shuffle=True)], False, False),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_resumes_or_is_warned_of(name, tmp_path):
    new, in_mid_epoch, at_the_end = LOADERS[name]
    whole, warned = look(tmp_path / "whole", new())
    assert warned == []
    for step, exact in ((4, in_mid_epoch), (EPOCH, at_the_end), (9, in_mid_epoch)):
        rest, warned = look(tmp_path / f"from {step}", new(), tmp_path / "whole" / f"step={step}.ckpt")
        assert (rest == whole[step:]) == exact
        assert len(warned) == (not exact)
        if warned:
            assert warned[0].startswith("train_dataloader: expected one that resumes where it stopped, got DataLoader,")
            assert warned[0].endswith(
                "use liegroup_attn.lightning.data.ResumableLoader, which takes shuffle=True as well"
            )
