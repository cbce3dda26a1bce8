"""A learning rate and a length of training for each variant, by validation alone: python -m experiments.tune."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from experiments.jobs import finished, run_all
from experiments.provenance import device_name
from experiments.results import ROOT, Run, read_json, variants_of, write_json
from experiments.run import train

__all__ = ["choose", "main"]

METRIC = "validation/accuracy"
POINT = 0.002  # of accuracy: less is not worth twice the steps


def choose(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one variant's runs, the shortest that is as good as the best but for 0.2 points, with the best rate at that length.

    Args:
        runs: each with ``steps``, ``learning_rate``, ``accuracy`` and ``loss`` on validation.

    Returns:
        The run; of equal accuracy the one of lower loss.
    """
    best = max(run["accuracy"] for run in runs)
    steps = min(run["steps"] for run in runs if run["accuracy"] >= best - POINT)
    return max((run for run in runs if run["steps"] == steps), key=lambda run: (run["accuracy"], -run["loss"]))


def main(argv: list[str] | None = None) -> None:
    """Train every variant at every rate of the grid, then twice as long at the best rate and its neighbours, and again."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tune", description=main.__doc__)
    parser.add_argument("--experiment", choices=["reachability"], default="reachability")
    parser.add_argument("--variants", nargs="+", default=None, help="default all")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2, 3e-2], help="one grid for all variants"
    )
    parser.add_argument("--steps", nargs="+", type=int, default=[1200, 2400, 4800, 9600], help="doubled while it helps")
    parser.add_argument("--seed", type=int, default=100, help="of data and weights; none that the comparison uses")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/tune"), help="runs, finished ones are kept")
    parser.add_argument("--output", type=Path, default=ROOT, help="folder with the experiment's own, for tuning.json")
    args = parser.parse_args(argv)
    variants = args.variants or variants_of(args.experiment)
    runs: list[dict[str, Any]] = []
    for steps in args.steps:
        waiting, paths = {}, []
        for variant in variants:
            for rate in _rates([run for run in runs if run["variant"] == variant], sorted(args.rates)):
                path = args.work / "found" / f"{variant}-{rate:g}-{steps}.json"
                wanted = {"variant": variant, "learning_rate": rate, "steps": steps, "seed": args.seed}
                paths.append(path)
                if not finished(path, wanted):
                    waiting[path] = (args.experiment, wanted, args.work)
        # Long runs first, so that no core idles at the end.
        run_all(
            _run, dict(sorted(waiting.items(), key=lambda item: "blocks" not in item[0].stem)), args.jobs, 1, Console()
        )
        runs += [read_json(path) for path in paths]
    found = {
        "date": datetime.date.today().isoformat(),
        "hardware": device_name(torch.device("cpu")),
        "metric": METRIC,
        "chosen": {variant: _short(choose([run for run in runs if run["variant"] == variant])) for variant in variants},
        "runs": runs,
    }
    path = args.output / args.experiment / "tuning.json"
    write_json(path, found)
    print(f"wrote {path}; its choice belongs into {args.experiment}/budgets/full/VARIANT.yaml")


def _rates(runs: list[dict[str, Any]], grid: list[float]) -> list[float]:
    """The rates to try next with one variant: all, then the best so far and its neighbours, then none that can gain."""
    if not runs:
        return grid
    longest = max(run["steps"] for run in runs)
    best = max((run for run in runs if run["steps"] == longest), key=lambda run: (run["accuracy"], -run["loss"]))
    place = grid.index(best["learning_rate"])
    return [] if best["accuracy"] >= 1 - POINT else grid[max(0, place - 1) : place + 2]


def _short(run: dict[str, Any]) -> dict[str, Any]:
    return {key: run[key] for key in ("learning_rate", "steps", "accuracy")}


def _run(experiment: str, wanted: dict[str, Any], work: Path) -> dict[str, Any]:
    steps = wanted["steps"]
    settings = {
        "model.init_args.learning_rate": wanted["learning_rate"],
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps // 12,
    }
    run = Run(experiment, wanted["variant"], "full", wanted["seed"], tuple((k, str(v)) for k, v in settings.items()))
    result = train(run, work, 1, test=False)
    assert result is not None  # one process
    last = result["curve"][-1]
    return {
        **wanted,
        "accuracy": last[METRIC],
        "loss": last["validation/loss"],
        "curve": [[point["step"], point[METRIC]] for point in result["curve"]],
        "seconds": result["seconds"],
        "config_hash": result["config_hash"],
        "code": result["code"],
    }


if __name__ == "__main__":
    main()
