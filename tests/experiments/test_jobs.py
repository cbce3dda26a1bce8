"""Runs side by side: what is finished stays, what fails is named, what is stopped loses nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from rich.console import Console

from experiments.jobs import finished, run_all
from experiments.results import write_json


def square(number: int) -> dict[str, int]:
    if number < 0:
        raise ArithmeticError(f"{number} has no business here")
    return {"square": number**2, "process": os.getpid()}


def interrupted(number: int) -> dict[str, int]:
    if number == 2:
        raise KeyboardInterrupt
    return {"square": number**2}


def slow(number: int) -> dict[str, int]:
    signal.signal(signal.SIGTERM, lambda *_: None)  # as Lightning's trainer does
    if number == 0:
        os.kill(os.getppid(), 2)  # as Ctrl-C, while the others are at work
    until = time.monotonic() + 3600
    while time.monotonic() < until:
        time.sleep(0.1)
    return {}


def killed(number: int) -> dict[str, int]:
    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)  # as a machine without memory does
    return {"square": number**2}


def fitted(number: int) -> dict[str, int]:
    """Ctrl-C within Lightning's trainer, which makes a SystemExit of it."""
    import lightning as L  # here: every process that a test starts imports this file, and Lightning takes seconds

    class Stopped(L.LightningModule):
        def training_step(self, batch, batch_idx):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(3600)

        def configure_optimizers(self):
            return None

    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    if number == 2:
        L.Trainer(max_steps=1, accelerator="cpu", **quiet).fit(Stopped(), [torch.zeros(1)])
    return {"square": number**2}


def alive(process: int) -> bool:
    """Asked of the system: two threads that wait for one child confuse multiprocessing."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def waiting(folder, *numbers):
    return {folder / f"{number}.json": (number,) for number in numbers}


def stored(folder):
    return {path.stem: json.loads(path.read_text())["square"] for path in sorted(folder.glob("*.json"))}


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_run_is_written_and_a_failure_stops_no_other(tmp_path, jobs):
    with pytest.raises(
        ValueError, match=r"runs: expected all to finish, got 1 that failed \(-1; -1: -1 has no business"
    ):
        run_all(square, waiting(tmp_path, 3, -1, 4), jobs, 1, Console(quiet=True))
    assert stored(tmp_path) == {"3": 9, "4": 16}
    here = {json.loads(path.read_text())["process"] == os.getpid() for path in tmp_path.glob("*.json")}
    assert here == {jobs == 1}


def test_nothing_to_do(tmp_path):
    run_all(square, {}, 2, 1, Console(quiet=True))
    assert stored(tmp_path) == {}


def test_a_stop_keeps_what_is_finished(tmp_path):
    with pytest.raises(SystemExit, match="130"):
        run_all(interrupted, waiting(tmp_path, 1, 2, 3), 1, 1, Console(quiet=True))
    assert stored(tmp_path) == {"1": 1}


def test_a_stop_within_a_fit_is_a_stop(tmp_path):
    with pytest.raises(SystemExit, match="130"):
        run_all(fitted, waiting(tmp_path, 1, 2, 3), 1, 1, Console(quiet=True))
    assert stored(tmp_path) == {"1": 1}


def test_a_killed_process_ends_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"runs: expected every process to live, got one that was killed .*--jobs"):
        run_all(killed, waiting(tmp_path, 0, 1, 2, 3, 4), 2, 1, Console(quiet=True))


def test_a_stop_ends_the_other_processes(tmp_path):
    with pytest.raises(SystemExit, match="130"):
        run_all(slow, waiting(tmp_path, 0, 1), 2, 1, Console(quiet=True))
    started = [process.pid for process in multiprocessing.active_children()]
    for _ in range(600):
        multiprocessing.active_children()  # which also lets the dead go
        if not any(map(alive, started)):
            break
        time.sleep(0.1)
    assert not any(map(alive, started))
    assert stored(tmp_path) == {}


def test_finished_is_what_holds_this_commands_setting(tmp_path):
    path = tmp_path / "one.json"
    assert not finished(path, {"setting": {"steps": 3}})
    write_json(path, {"setting": {"steps": 3, "model": {"width": 8}}, "square": 9})
    assert finished(path, {"setting": {"steps": 3, "model": {"width": 8}}})
    for other, name in (({"steps": 4, "model": {"width": 8}}, "steps"), ({"steps": 3, "model": {"width": 9}}, "width")):
        with pytest.raises(
            ValueError, match=rf"got .*one.json with another \({name}\); delete it, or pass another --output"
        ):
            finished(path, {"setting": other})
    with pytest.raises(ValueError, match=r"with another \(setting\); delete it"):
        finished(path, {"setting": {"steps": 3}})
