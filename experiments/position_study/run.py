"""Train encoders and decoders with several encodings, probe what they know of positions; then tables and figures."""

from __future__ import annotations

import argparse
import itertools
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.draw import draw
from experiments.jobs import finished, run_all
from experiments.markdown import show
from experiments.position_study.probes import FOLDS
from experiments.position_study.report import FOLDER
from experiments.position_study.train import ENCODINGS, MIXINGS, ROLES, corpus_of, train

__all__ = ["main"]

FIXED: dict[str, Any] = {"width": 64, "depth": 2, "num_heads": 2, "learning_rate": 3e-3, "warmup_steps": 50}


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``liegroup-attn position-study``."""
    args = _parse(argv)
    setting = _setting(args)
    console = Console()
    folder = args.output / FOLDER / "results"
    runs = {
        folder / f"{'-'.join(names)}-seed{seed}.json": (*names, seed, setting, args.path, args.threads)
        for *names, seed in itertools.product(args.mixings, args.roles, args.encodings, args.seeds)
    }
    waiting = {path: arguments for path, arguments in runs.items() if not finished(path, {"setting": setting})}
    if len(waiting) < len(runs):
        console.print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already in {folder}")
    try:
        run_all(train, waiting, args.jobs, args.threads, console)
    finally:
        for written in draw(args.output, [FOLDER]):
            console.print(f"wrote {written}")
    show(console, (args.output / FOLDER / "table.md").read_text())


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="liegroup-attn position-study",
        description="Train small encoders (masked bytes) and decoders (next byte) with several encodings of positions, and read "
        "positions from their tables and hidden states. Finished runs are kept: the same command again resumes.",
    )
    parser.add_argument("--mixings", nargs="+", choices=list(MIXINGS), default=["softmax"])
    parser.add_argument("--roles", nargs="+", choices=list(ROLES), default=list(ROLES))
    parser.add_argument("--encodings", nargs="+", choices=list(ENCODINGS), default=list(ENCODINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seed 0 was of the pilots")
    parser.add_argument(
        "--corpus", default="tinyshakespeare", help="a public corpus, or the path of a text of your own"
    )
    parser.add_argument("--path", default=None, help="a local copy of the public corpus instead of a download")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--context", type=int, default=64, help="bytes a window")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--eval-windows", type=int, default=256, help="of validation, and of test")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time; default one a core")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--output", type=Path, default=Path("runs/position-study"), help="results, tables, figures")
    return parser.parse_args(argv)


def _setting(args: argparse.Namespace) -> dict[str, Any]:
    """What all files of a folder must share."""
    sizes = {name: getattr(args, name) for name in ("steps", "batch_size", "eval_windows", "jobs", "threads")}
    for name, size, least in [*((name, size, 1) for name, size in sizes.items()), ("seeds", min(args.seeds), 0)]:
        if size < least:
            raise ValueError(f"{name}: expected at least {least}, got {size}; raise it")
    if args.context < 3 * FOLDS:
        raise ValueError(
            f"context: expected at least {3 * FOLDS}, got {args.context}; the probes need three positions a fold"
        )
    names = ("corpus", "context", "batch_size", "steps", "eval_windows")
    setting = {name: getattr(args, name) for name in names} | FIXED
    data = corpus_of(setting, args.path)
    data.prepare_data()
    return setting | {"sha256": data.corpus_sha256}


if __name__ == "__main__":
    main()
