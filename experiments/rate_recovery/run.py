"""Simulate transitions of a known generator, estimate it from them, many times; then the table and the figure."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor

from experiments.draw import draw
from experiments.jobs import finished
from experiments.markdown import show
from experiments.provenance import code_hash, device_name
from experiments.rate_recovery.bound import relative_bound
from experiments.rate_recovery.counts import TransitionCounts
from experiments.rate_recovery.estimators import ESTIMATORS, Found
from experiments.rate_recovery.paml import read_generator
from experiments.rate_recovery.report import FOLDER
from experiments.results import ROOT, write_json
from liegroup_attn.algebra import is_reversible, stationary_distribution
from liegroup_attn.functional import transition_matrix
from liegroup_attn.generators import DenseGenerator

__all__ = ["excess", "main", "relative_error"]

TRUTH = ROOT / FOLDER / "lg.txt"
KEPT = ("reversible", "likelihood", "projected")  # whose rates go to the file, for one number of transitions


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``liegroup-attn recover``."""
    args = _parse(argv)
    torch.set_num_threads(1)
    setting = _setting(args)
    console = Console()
    folder = args.output / FOLDER / "results"
    waiting = [
        seed for seed in dict.fromkeys(args.seeds) if not finished(folder / f"seed{seed}.json", {"setting": setting})
    ]
    if len(waiting) < len(args.seeds):
        console.print(f"{len(args.seeds) - len(waiting)} of {len(args.seeds)} seeds are finished already in {folder}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=len(waiting) * len(args.transitions) * len(ESTIMATORS))
            for seed in waiting:
                write_json(folder / f"seed{seed}.json", _run(seed, args, setting, progress, task))
    except KeyboardInterrupt:
        console.print("\nstopped; finished seeds are kept, and the same command again resumes")
        sys.exit(130)
    for written in draw(args.output, [FOLDER]):
        console.print(f"wrote {written}")
    show(console, (args.output / FOLDER / "table.md").read_text())


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="liegroup-attn recover",
        description="Simulate transition counts of a known generator, estimate it by maximum likelihood through exp(tQ) and "
        "by the matrix logarithm, and compare with the truth. Finished seeds are kept: the same command again resumes.",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--transitions", nargs="+", type=int, default=[10**3, 10**4, 10**5, 10**6], help="in all")
    parser.add_argument("--times", nargs="+", type=float, default=[0.1, 0.3, 1.0], help="at which the chain is seen")
    parser.add_argument(
        "--q-file", type=Path, default=TRUTH, help="the truth: a rate file of PAML, or n lines of n numbers; default LG"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/recover"), help="results, table, figure")
    return parser.parse_args(argv)


def _setting(args: argparse.Namespace) -> dict[str, Any]:
    """What all files of a folder must share."""
    if min(args.seeds) < 0 or min(args.transitions) < 1:
        raise ValueError(
            f"seeds, transitions: expected seeds ≥ 0 and transitions ≥ 1, got {args.seeds} and {args.transitions}; "
            "give others"
        )
    states = len(read_generator(args.q_file))
    return {
        "q_file": args.q_file.name,
        "sha256": hashlib.sha256(args.q_file.read_bytes()).hexdigest(),
        "states": states,
        "times": args.times,
        "transitions": sorted(set(args.transitions)),
    }


def _run(
    seed: int, args: argparse.Namespace, setting: dict[str, Any], progress: Progress, task: TaskID
) -> dict[str, Any]:
    """Every number of transitions, every estimator, on the same counts."""
    truth = read_generator(args.q_file)
    cells, rates = [], {}
    middle = setting["transitions"][len(setting["transitions"]) // 2]
    for transitions in setting["transitions"]:
        data = TransitionCounts(str(args.q_file), times=args.times, transitions=transitions, seed=seed)
        data.setup()
        for name, estimate in ESTIMATORS.items():
            progress.update(task, description=f"seed {seed}, {transitions:,} transitions, {name}")
            found = estimate(data)
            cells.append({"transitions": transitions, "estimator": name} | _compare(found, truth, args.times))
            if transitions == middle and name in KEPT and found.generator is not None:
                rates[name] = _off_diagonal(found.generator)
            progress.advance(task)
    return {
        "experiment": FOLDER,
        "seed": seed,
        "setting": setting,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": {"name": device_name(torch.device("cpu")), "threads": 1},
        "versions": {name: version(name) for name in ("torch", "lightning", "geoopt")},
        "code": code_hash(),
        "bounds": _bounds(truth, args.times),
        "cells": cells,
        "rates": {"transitions": middle, "truth": _off_diagonal(truth)} | rates,
    }


def _bounds(truth: Tensor, times: list[float]) -> dict[str, float]:
    """Of the families that the truth is in; to be divided by √n."""
    families = {"likelihood": False} | ({"reversible": True} if is_reversible(truth)[0] else {})
    return {name: _digits(relative_bound(truth, times, reversible=family)) for name, family in families.items()}


def _compare(found: Found, truth: Tensor, times: list[float]) -> dict[str, Any]:
    facts = {name: _digits(value) if isinstance(value, float) else value for name, value in found.facts.items()}
    if found.generator is None:
        return {"error": None, "excess": None} | facts
    return {
        "error": _digits(relative_error(found.generator, truth)),
        "excess": excess(found.generator, truth, times),
    } | facts


def relative_error(estimate: Tensor, truth: Tensor) -> float:
    """‖Q̂ − Q‖ / ‖Q‖, Frobenius."""
    return float(torch.linalg.matrix_norm(estimate - truth) / torch.linalg.matrix_norm(truth))


def excess(estimate: Tensor, truth: Tensor, times: list[float]) -> float | None:
    """Σ_i π_i KL(P_i·(t) ‖ P̂_i·(t)), mean over the times: nats that Q̂ costs on a new transition; None without P̂ > 0."""
    when = torch.tensor(times, dtype=truth.dtype)[:, None]
    P = transition_matrix(DenseGenerator(truth), when)
    if float((estimate - torch.diag(estimate.diagonal())).min()) < 0:
        return None
    log = transition_matrix(DenseGenerator(estimate), when).log()
    nats = (stationary_distribution(truth)[:, None] * P * (P.log() - log)).sum((-2, -1)).mean()
    return _digits(float(nats)) if bool(nats.isfinite()) else None


def _off_diagonal(matrix: Tensor) -> list[float]:
    """The rates row by row."""
    return [_digits(x) for x in matrix[~torch.eye(len(matrix), dtype=torch.bool)].tolist()]


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


if __name__ == "__main__":
    main()
