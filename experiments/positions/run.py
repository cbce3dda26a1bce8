"""Train every cell of task × encoding × mixing × seed; then the tables and the figures."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.draw import draw
from experiments.jobs import finished, run_all
from experiments.markdown import show
from experiments.positions.cell import Cell, run_cell
from experiments.positions.encodings import ENCODINGS, IMAGE_ENCODINGS, MIXINGS, combined
from experiments.positions.report import FOLDER
from experiments.positions.tasks import SETTINGS, TASKS

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``liegroup-attn positions``."""
    args = _parse(argv)
    console = Console()
    cells = _cells(args)
    waiting = [cell for cell in cells if not _finished(cell)]
    for task in args.tasks:
        own = {cell.encoding for cell in cells if cell.task == task}
        if left := [name for name in args.named if name not in own]:
            console.print(
                f"{task} is run without {', '.join(left)}, which it does not have with {', '.join(args.mixings)}"
            )
    if len(waiting) < len(cells):
        console.print(
            f"{len(cells) - len(waiting)} of {len(cells)} cells are finished already in {args.output / FOLDER}"
        )
    try:
        run_all(run_cell, {cell.file: (cell,) for cell in waiting}, args.jobs, 1, console)
    finally:
        for written in draw(args.output, [FOLDER]):
            console.print(f"wrote {written}")
    show(console, (args.output / FOLDER / "table.md").read_text())


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="liegroup-attn positions",
        description="Train small Transformers on text, recall, counting and digits with every positional encoding beside every "
        "way of mixing, and test them at the training length and beyond. Finished cells are kept: the same command again "
        "resumes.",
    )
    names = list(dict.fromkeys([*ENCODINGS, *IMAGE_ENCODINGS]))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument(
        "--encodings", nargs="+", choices=names, default=None, help="those that a task has are run on it; default all"
    )
    parser.add_argument("--mixings", nargs="+", choices=list(MIXINGS), default=list(MIXINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps-factor", type=float, default=1.0, help="times the steps of every task")
    parser.add_argument("--max-steps", type=int, default=None, help="at most so many steps a cell, for a first look")
    parser.add_argument(
        "--corpus", default="tinyshakespeare", help="a public corpus, or the path of a text of your own"
    )
    parser.add_argument("--path", default=None, help="a local copy of the public corpus instead of a download")
    parser.add_argument("--jobs", type=int, default=None, help="cells at a time, one thread each; default: one a core")
    parser.add_argument("--output", type=Path, default=Path("runs/positions"), help="results, tables, figures")
    args = parser.parse_args(argv)
    args.named = args.encodings or []
    args.encodings = args.encodings or names
    args.jobs = args.jobs if args.jobs is not None else os.cpu_count() or 1
    for name, wrong in (
        ("seeds", min(args.seeds) < 0),
        ("steps-factor", not args.steps_factor > 0),
        ("max-steps", args.max_steps is not None and args.max_steps < 1),
        ("jobs", args.jobs < 1),
    ):
        if wrong:
            least = "numbers ≥ 0" if name == "seeds" else "a number above 0"
            raise ValueError(f"{name}: expected {least}, got {getattr(args, name.replace('-', '_'))}; choose another")
    return args


def _cells(args: argparse.Namespace) -> list[Cell]:
    """All that are asked for, seed by seed, so that a run that is stopped has whole tables of fewer seeds."""
    folder = args.output / FOLDER / "results"
    wanted = [
        (task, encoding, mixing)
        for task in args.tasks
        for encoding, choice in TASKS[task].encodings.items()
        for mixing in args.mixings
        if encoding in args.encodings
        and combined(choice, MIXINGS[mixing])
        and encoding in MIXINGS[mixing].only.get(task, [encoding])
    ]
    if "digits" in {task for task, _, _ in wanted} and importlib.util.find_spec("sklearn") is None:
        raise ValueError(
            "tasks: expected scikit-learn for digits, which ships the images, got none; pip install scikit-learn, or leave digits "
            "out with --tasks text recall counting"
        )
    if not wanted:
        raise ValueError(
            f"encodings: expected some that {args.tasks} have with {args.mixings}, got {args.encodings}; they have "
            + "; ".join(f"{task}: {', '.join(TASKS[task].encodings)}" for task in args.tasks)
        )
    settings = {task: _setting(task, args) for task in dict.fromkeys(task for task, _, _ in wanted)}
    return [
        Cell(task, encoding, mixing, seed, settings[task], args.corpus, args.path, folder / f"{name}.json")
        for seed in dict.fromkeys(args.seeds)
        for task, encoding, mixing in wanted
        for name in [f"{task}-{encoding}-{mixing}-seed{seed}"]
    ]


def _setting(task: str, args: argparse.Namespace) -> dict[str, Any]:
    """What all files of a task must share."""
    setting = copy.deepcopy(SETTINGS[task])
    steps = max(1, round(setting["steps"] * args.steps_factor))
    setting["steps"] = steps if args.max_steps is None else min(steps, args.max_steps)
    once = {**setting, "steps": 1}
    return setting | {"sha256": TASKS[task].data(once, 0, args.corpus, args.path).facts["sha256"]}


def _finished(cell: Cell) -> bool:
    attention, encoding = cell.recipes
    return finished(cell.file, {"setting": cell.setting, "recipes": {"attention": attention, "encoding": encoding}})


if __name__ == "__main__":
    main()
