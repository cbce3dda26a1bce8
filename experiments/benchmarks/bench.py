"""Time and memory of exp(tQ) attention beside its competitors; then the table and the figure."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.benchmarks.measure import describe
from experiments.benchmarks.parts import PARTS, Cell, Options
from experiments.benchmarks.report import FOLDER
from experiments.draw import draw
from experiments.markdown import show
from experiments.provenance import code_hash, device_name
from experiments.results import read_json, write_json

__all__ = ["main"]

_QUICK: dict[str, Any] = {"tokens": (128, 256, 512, 1024), "repeats": 3, "seconds": 30.0, "new_tokens": 8}
_QUICK |= {"small_tokens": (16, 64), "small_times": (1.0, 16.0)}
_DTYPES = ("float32", "float64", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``liegroup-attn bench``."""
    args = _parse(argv)
    options = _options(args)
    torch.set_num_threads(options.threads)
    output = args.output or Path("runs") / ("bench-quick" if args.quick else "bench")
    name = "-".join([options.device.partition(":")[0], options.dtype, *([args.label] if args.label else [])])
    path = output / FOLDER / "results" / f"{name}.json"
    cells = list({cell.key: cell for part in args.parts for cell in PARTS[part](options)}.values())
    console = Console()
    try:
        _measure(cells, path, _setting(options), args.fresh, console)
    except KeyboardInterrupt:
        console.print("\nstopped; finished cells are kept, and the same command again resumes")
        sys.exit(130)
    for written in draw(output, [FOLDER]):
        console.print(f"wrote {written}")
    show(console, (output / FOLDER / "table.md").read_text())


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="liegroup-attn bench",
        description="Time and peak memory of exp(tQ) attention beside softmax, torch.matrix_exp, an ODE solver and SciPy, "
        "in turn in one process. Finished cells are kept: the same command again resumes.",
    )
    default = Options()
    parser.add_argument("--parts", nargs="+", default=list(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="N up to 1024, 3 repeats: some minutes on two cores")
    parser.add_argument("--tokens", nargs="+", type=int, default=None, help="N of the part attention")
    parser.add_argument("--heads", type=int, default=default.heads, help="batch × heads up to N = 4096; then 1")
    parser.add_argument("--width", type=int, default=default.width, help="of a head; even")
    parser.add_argument("--repeats", type=int, default=None, help=f"rounds; default {default.repeats}")
    parser.add_argument("--seconds", type=float, default=None, help="a cell; beyond, fewer rounds, at least 3")
    parser.add_argument("--small-tokens", nargs="+", type=int, default=None, help="N of the part small")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--dtype", default="float32", help=f"one of {', '.join(_DTYPES)}")
    parser.add_argument("--output", type=Path, default=None, help="results, table, figure; default runs/bench[-quick]")
    parser.add_argument("--label", default="", help="of a result file of its own, say for a part measured elsewhere")
    parser.add_argument("--fresh", action="store_true", help="measure again what is measured already")
    return parser.parse_args(argv)


def _options(args: argparse.Namespace) -> Options:
    """Options of the command line, checked."""
    _among("parts", args.parts, PARTS)
    _among("dtype", [args.dtype], _DTYPES)
    names = ("tokens", "heads", "width", "repeats", "seconds", "threads", "small_tokens", "device", "dtype")
    given: dict[str, Any] = {name: value for name in names if (value := getattr(args, name)) is not None}
    for name, value in given.items():
        if not isinstance(value, str) and min(value if isinstance(value, list) else [value]) <= 0:
            raise ValueError(f"{name}: expected more than 0, got {value}; give positive numbers")
    if args.width % 2:
        raise ValueError(f"width: expected an even number, got {args.width}; RoPE turns pairs of features")
    try:
        if torch.empty(1, device=args.device).device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda can be timed")
    except (RuntimeError, AssertionError) as problem:
        raise ValueError(
            f"device: expected one that this machine has, got {args.device!r} ({describe(problem)}); try cpu"
        ) from None
    given |= {name: tuple(given[name]) for name in ("tokens", "small_tokens") if name in given}
    return Options(**((_QUICK if args.quick else {}) | given))


def _among(name: str, given: Sequence[str], known: Sequence[str] | dict[str, Any]) -> None:
    unknown = [value for value in given if value not in known]
    if unknown:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {', '.join(unknown)}; check the spelling")


def _setting(options: Options) -> dict[str, Any]:
    """What all cells of a file must share."""
    return {
        "hardware": device_name(torch.device(options.device)),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "device": options.device,
        "dtype": options.dtype,
        "heads": options.heads,
        "width": options.width,
        "repeats": options.repeats,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _measure(cells: list[Cell], path: Path, setting: dict[str, Any], fresh: bool, console: Console) -> None:
    """Measure what is not measured yet; each cell is written at once."""
    stored = _stored(path, setting, {cell.key for cell in cells} if fresh else set())
    done = stored["cells"]
    waiting = [cell for cell in cells if not cell.finished(done.get(cell.key))]
    code = code_hash()
    if len(waiting) < len(cells):
        others = sum(done[cell.key]["code"] != code for cell in cells if cell not in waiting)
        note = f", {others} of them with other code of the library (--fresh measures them again)" if others else ""
        console.print(f"{len(cells) - len(waiting)} of {len(cells)} cells are measured already in {path}{note}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(waiting))
        for cell in waiting:
            progress.update(task, description=cell.key)
            today = datetime.datetime.now(datetime.UTC).date().isoformat()
            found = cell.measure(done)
            for name, row in found["rows"].items():
                if "failed" in row:
                    console.print(f"[red]failed[/red] {cell.key}: {name}: {row['failed']}")
            done[cell.key] = cell.facts | {"date": today, "code": code, "skipped": cell.skipped} | found
            write_json(path, stored)
            progress.advance(task)


def _stored(path: Path, setting: dict[str, Any], unwanted: set[str]) -> dict[str, Any]:
    """What was measured with this setting before, but for the unwanted cells."""
    stored = read_json(path, "setting", "cells") if path.exists() else {"setting": setting, "cells": {}}
    different = [name for name, value in setting.items() if stored["setting"].get(name) != value]
    if different and unwanted:
        return {"setting": setting, "cells": {}}
    if different:
        was = ", ".join(f"{name} {stored['setting'].get(name)}" for name in different)
        now = ", ".join(f"{name} {setting[name]}" for name in different)
        raise ValueError(
            f"output: expected measurements with {now}, got {path} with {was}; pass --fresh to drop them, or another --output"
        )
    return stored | {"cells": {key: cell for key, cell in stored["cells"].items() if key not in unwanted}}


if __name__ == "__main__":
    main()
