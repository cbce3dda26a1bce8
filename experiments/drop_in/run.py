"""Convert every model of the table and measure what must hold of it; then the table."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.draw import draw
from experiments.drop_in.checks import CHECKS
from experiments.drop_in.report import FOLDER, LIBRARIES, passed
from experiments.drop_in.subjects import Subject, of_liegroup_attn, of_torch
from experiments.markdown import show
from experiments.provenance import code_hash, device_name
from experiments.results import write_json

__all__ = ["main", "subjects_of"]


def subjects_of(library: str) -> list[Subject]:
    """The models of one library, which is imported."""
    if library == "transformers":
        from experiments.drop_in.hugging_face import of_transformers

        return of_transformers()
    if library in ("x_transformers", "litgpt"):
        from experiments.drop_in.guests import of_litgpt, of_x_transformers

        return of_x_transformers() if library == "x_transformers" else of_litgpt()
    own: dict[str, Callable[[], list[Subject]]] = {"torch.nn": of_torch, "liegroup_attn": of_liegroup_attn}
    return own[library]()


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``liegroup-attn drop-in``."""
    args = _parse(argv)
    torch.set_num_threads(1)
    console = Console()
    missing = [name for name in args.libraries if importlib.util.find_spec(name.partition(".")[0]) is None]
    for name in missing:
        console.print(f"left out {name}: it is not installed")
    wanted = [name for name in args.libraries if name not in missing]
    subjects = {name: subjects_of(name) for name in wanted}
    failures = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with warnings.catch_warnings(), Progress(*columns, console=console) as progress:
        warnings.simplefilter("ignore")  # of other people's models
        task = progress.add_task("", total=len(CHECKS) * sum(map(len, subjects.values())))
        for library, models in subjects.items():
            rows: dict[str, dict[str, float | None]] = {}
            for subject in models:
                rows[subject.name] = {}
                for check in CHECKS:
                    progress.update(task, description=f"{subject.name}: {check.title}")
                    number = check.of(subject)
                    rows[subject.name][check.title] = number
                    if passed(check.title, number) is False:
                        failures.append(f"{subject.name}: {check.title}: {number:g}, expected at most {check.bound:g}")
                    progress.advance(task)
            write_json(args.output / FOLDER / "results" / f"{library}.json", _facts(library) | {"models": rows})
    for written in draw(args.output, [FOLDER]):
        console.print(f"wrote {written}")
    show(console, (args.output / FOLDER / "table.md").read_text())
    if failures:
        console.print("\n".join(failures), style="red", markup=False)
        sys.exit(1)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="liegroup-attn drop-in",
        description="Convert models of several libraries by convert_attention and measure that outputs are equal at time 0, "
        "that they train, do not leak, save, load and generate. One to two minutes; exit status 1 if anything fails.",
    )
    parser.add_argument(
        "--libraries", nargs="+", default=list(LIBRARIES), choices=LIBRARIES, help="default all installed"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/drop-in"), help="results and table")
    return parser.parse_args(argv)


def _facts(library: str) -> dict[str, object]:
    package = "torch" if library == "torch.nn" else library.replace("_", "-")
    return {
        "library": library,
        "versions": {name: version(name) for name in dict.fromkeys(["torch", package])},
        "hardware": device_name(torch.device("cpu")),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "code": code_hash(),
    }


if __name__ == "__main__":
    main()
