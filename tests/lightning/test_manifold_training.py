"""The promise: training never leaves the manifold, in any precision, across save, load and resume, on two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning as L
import manifold_training
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from manifold_training import QUIET, Places

from liegroup_attn.lightning import ExactResume, ManifoldGuard, ManifoldPrecision, RiemannianSGD
from liegroup_attn.manifolds import ManifoldParameter

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]
# Steps of the whole run, and where the other one is resumed: after an epoch of 64, in the middle of another.
SHORT, LONG = (100, 80), (500, 400)
NEAR = 1e-6


class Watch(L.Callback):
    """The largest distance from the manifolds after every tenth step, the last one before the optimizer projects."""

    def __init__(self) -> None:
        self.worst, self.looks = 0.0, 0

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        if trainer.global_step % 10 == 9:
            self.worst = max(self.worst, pl_module.distance())
            self.looks += 1


def fit(
    folder: Path, steps: int, stop: int, resume: Path | None = None, optimizer=None, **options
) -> tuple[Places, L.Trainer]:
    model, watch = Places(optimizer), Watch()
    saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=stop)
    L.seed_everything(0 if resume is None else 99, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[saver, ExactResume(), ManifoldGuard(), watch],
        logger=False,
        **QUIET,
        **options,
    )
    trainer.fit(model, ckpt_path=resume, weights_only=True)
    assert watch.looks == (steps - (stop if resume else 0)) / 10
    assert watch.worst <= NEAR
    return model, trainer


PRECISIONS = {
    "32-true": {"precision": "32-true"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"plugins": lambda: ManifoldPrecision("bf16-true")},
}


SGD = partial(RiemannianSGD, momentum=0.9)


@pytest.mark.parametrize("length", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids="{0[0]} steps".format)
@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [("32-true", None), ("bf16-mixed", None), ("bf16-true", None), ("bf16-true", SGD)],
    ids=["32-true", "bf16-mixed", "bf16-true", "bf16-true-sgd"],
)
def test_a_training_and_a_resume_stay_on_the_manifolds(tmp_path, precision, optimizer, length):
    def options() -> dict:
        return {key: value() if callable(value) else value for key, value in PRECISIONS[precision].items()}

    whole, trainer = fit(tmp_path / "whole", *length, optimizer=optimizer, **options())
    start = Places().held()
    for name, point in whole.held().items():
        assert isinstance(point, ManifoldParameter)
        assert point.dtype == torch.float32
        assert point.manifold.check_point_on_manifold(point, atol=NEAR, rtol=NEAR)
        assert not torch.allclose(point, start[name], atol=0.05)
        assert all(v.dtype == torch.float32 for v in trainer.optimizers[0].state[point].values() if torch.is_tensor(v))
    assert whole.net[0].weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)

    resumed, _ = fit(tmp_path / "rest", *length, tmp_path / "whole" / f"step={length[1]}.ckpt", optimizer, **options())
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


# several processes


def results(way: str, steps: int, folder: Path) -> list[dict]:
    process = subprocess.run(
        [sys.executable, manifold_training.__file__, way, str(steps), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def alone(steps: int) -> Places:
    """The same training in one process, on the whole batches."""
    model = Places().eval()
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, **QUIET)
    trainer.fit(model)
    return model


@pytest.mark.slow
def test_two_processes_stay_equal_and_on_the_manifolds(tmp_path):
    first, second = results("ddp", LONG[0], tmp_path)
    assert set(first["kinds"].values()) == {"ManifoldParameter"}
    for name, value in first["values"].items():
        assert torch.equal(second["values"][name], value), name
    assert max(first["distance"], second["distance"]) <= NEAR


STEPS_SHARDED = 40


@pytest.mark.slow
def test_a_sharded_training_is_that_of_one_process(tmp_path):
    """FSDP2 on Lightning's ModelParallelStrategy; the network is sharded, points are replicated."""
    first, second = results("fsdp2", STEPS_SHARDED, tmp_path)
    assert set(first["kinds"].values()) == {"ManifoldParameter"}
    expected = dict(alone(STEPS_SHARDED).named_parameters())
    for name, value in first["values"].items():
        assert torch.equal(second["values"][name], value), name
        torch.testing.assert_close(value, expected[name].detach(), atol=1e-5, rtol=1e-4)
    assert max(first["distance"], second["distance"]) <= NEAR
