"""Train every variant side by side, each run in a process of its own; then draw the tables and figures."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from experiments.draw import draw
from experiments.markdown import show
from experiments.results import BUDGETS, EXPERIMENTS, MAIN, Run, read_json, seeds_of, variants_of

_RUN = "experiments.run"


@dataclass
class _Running:
    run: Run
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    folder: Path
    task: TaskID


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``liegroup-attn compare``."""
    parser = argparse.ArgumentParser(
        prog="liegroup-attn compare",
        description="Train exp(tQ) attention beside RoPE softmax attention on real text and on root finding, test them, "
        "and write one JSON a run, tables and figures. Finished runs are kept: the same command again resumes.",
    )
    parser.add_argument(
        "--experiments", nargs="+", choices=EXPERIMENTS, default=list(MAIN), help=f"default: {' '.join(MAIN)}"
    )
    parser.add_argument("--variants", nargs="+", default=None, help="some of the variants; default all")
    parser.add_argument(
        "--budget",
        choices=BUDGETS,
        default="quick",
        help="quick: five to ten minutes on two CPU cores; full: about an hour",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=None, help="default: 0 for quick; three for full, five of root finding"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        help="results, tables, figures; default runs/BUDGET, and the settings below",
    )
    parser.add_argument("--work", type=Path, default=Path("runs/work"), help="checkpoints and logs")
    parser.add_argument("--jobs", type=int, default=None, help="runs at a time; default: one a core, 1 off the CPU")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--accelerator", default=None, help="of Lightning's Trainer: cpu, gpu, …")
    parser.add_argument("--devices", default=None, help="of Lightning's Trainer")
    parser.add_argument("--precision", default=None, help="of Lightning's Trainer: 32-true, bf16-mixed, …")
    parser.add_argument("--strategy", default=None, help="of Lightning's Trainer: auto, ddp, …")
    parser.add_argument(
        "--max-steps", type=int, default=None, help="stop earlier than the budget says, to try things out"
    )
    args = parser.parse_args(argv)
    settings = tuple(
        (f"trainer.{key}", str(value))
        for key in ("accelerator", "devices", "precision", "strategy", "max_steps")
        if (value := getattr(args, key)) is not None
    )
    if args.max_steps is not None:  # Lightning validates every so many steps, and at no other time
        settings += (("trainer.val_check_interval", str(max(1, args.max_steps // 2))),)
    # Other settings, another folder: they would overwrite each other's results.
    output = args.output or Path("runs") / "-".join([args.budget, *(value for _, value in settings)])
    runs = [
        Run(experiment, variant, args.budget, seed, settings)
        for experiment in args.experiments
        for seed in args.seeds or seeds_of(experiment, args.budget)
        for variant in variants_of(experiment)
        if args.variants is None or variant in args.variants
    ]
    if not runs:
        known = sorted({v for e in args.experiments for v in variants_of(e)})
        raise ValueError(f"variants: expected some of {known}, got {args.variants}; check the spelling")
    if any(run.experiment == "digits" for run in runs) and importlib.util.find_spec("sklearn") is None:
        raise ValueError(
            "experiments: expected scikit-learn for digits, which ships the images, got none; pip install scikit-learn, or "
            "leave digits out with --experiments"
        )
    on_cpu = args.accelerator in (None, "cpu") and args.devices in (None, "1")
    jobs = args.jobs or (max(1, (os.cpu_count() or 1) // args.threads) if on_cpu else 1)
    console = Console()
    for name in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: the runs must not go on without us
        signal.signal(name, signal.default_int_handler)
    failed = _run_all(runs, output, args.work, jobs, args.threads, console)
    for path in draw(output, args.experiments):
        console.print(f"wrote {path}")
    for experiment in args.experiments:
        table = output / experiment / "table.md"
        if table.exists():
            console.print(f"\n{experiment}")
            show(console, table.read_text())
    if failed:
        raise ValueError(
            "runs: expected all to finish, but these failed: "
            + ", ".join(f"{run.name} (log {run.work_path(args.work) / 'log.txt'})" for run in failed)
            + "; mend the cause and run the same command again"
        )


def _run_all(runs: list[Run], output: Path, work: Path, jobs: int, threads: int, console: Console) -> list[Run]:
    """Run what isn't finished, ``jobs`` at a time; returns the runs that failed."""
    waiting = [run for run in runs if not run.finished(output)]
    if len(waiting) < len(runs):
        console.print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already in {output}")
    # Long runs first, so that no core idles at the end.
    waiting.sort(key=lambda run: (run.seed, run.experiment != "language", run.variant == "softmax"))
    running: list[_Running] = []
    failed: list[Run] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        total = progress.add_task("all runs", total=len(waiting), loss="")
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_start(waiting.pop(0), output, work, threads, progress))
                time.sleep(0.3)
                for one in list(running):
                    _show(one, progress)
                    if one.process.poll() is None:
                        continue
                    running.remove(one)
                    one.log.close()
                    progress.remove_task(one.task)
                    if one.process.returncode or not one.run.finished(output):
                        failed.append(one.run)
                        console.print(f"[red]failed[/red] {one.run.name}: {_last_line(one.folder / 'log.txt')}")
                    else:
                        console.print(f"finished {one.run.name}: {_summary(one.run.result_path(output))}")
                    progress.advance(total)
        except KeyboardInterrupt:
            _stop(running)
            console.print("\nstopped; finished runs are kept, and the same command again resumes")
            sys.exit(130)
        except BaseException:
            _stop(running)
            raise
    return failed


def _start(run: Run, output: Path, work: Path, threads: int, progress: Progress) -> _Running:
    folder = run.work_path(work)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", _RUN, "--experiment", run.experiment, "--variant", run.variant]
    command += ["--budget", run.budget, "--seed", str(run.seed), "--threads", str(threads)]
    command += ["--output", str(output), "--work", str(work)]
    for key, value in run.settings:
        command += ["--set", key, value]
    log = (folder / "log.txt").open("wb")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    # A session of its own: Ctrl-C reaches this process alone, which then stops the others.
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    return _Running(run, process, log, folder, progress.add_task(f"  {run.name}", total=None, loss="starting"))


def _show(one: _Running, progress: Progress) -> None:
    try:
        state = json.loads((one.folder / "progress.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return
    progress.update(one.task, completed=state["step"], total=state["steps"], loss=f"loss {state['loss']:.3f}")


def _stop(running: list[_Running]) -> None:
    for one in running:
        try:
            os.killpg(one.process.pid, signal.SIGTERM)
        except ProcessLookupError:
            continue
    for one in running:
        one.process.wait()
        one.log.close()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def _summary(path: Path) -> str:
    result = read_json(path, "test", "seconds")
    metrics = next(iter(result["test"].values()))
    shown = [
        f"{k} {v:.4g}" for k, v in metrics.items() if k in ("test/bits_per_byte", "test/accuracy", "deeper/accuracy")
    ]
    return f"{', '.join(shown)} ({result['seconds']:.0f} s)"


if __name__ == "__main__":
    main()
