"""A run, its configuration and its result file: what compare writes and draw reads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from liegroup_attn.lightning.files import draft, unusable

__all__ = [
    "BUDGETS",
    "EXPERIMENTS",
    "MAIN",
    "ROOT",
    "TITLES",
    "Run",
    "load_results",
    "read_json",
    "read_runs",
    "seeds_of",
    "variants_of",
    "write_figure",
    "write_json",
    "write_text",
]

ROOT = Path(__file__).parent
MAIN = ("reachability", "language")  # what compare trains unless told
EXPERIMENTS = (*MAIN, "digits")
BUDGETS = ("quick", "full")

_PARTS = ("seed", "config_hash", "config", "budget", "data", "test", "curve")  # of a result, that tables need
_STEPS = ("max_steps", "val_check_interval")

# In the order of tables and legends.
TITLES = {
    "softmax": "softmax",
    "softmax_2_blocks": "softmax, 2 blocks",
    "softmax_4_blocks": "softmax, 4 blocks",
    "exp": "exp(tQ)",
    "first_hop_fixed": "first hop + fixed clock",
    "first_hop_exponential": "first hop + exponential clock",
    "relative_rates": "exp(t(Q + R)), R = r(i − j)",
    "added_matrix": "exp(t(Q + L)), L learned",
    "ordered_product": "exp(tQ) exp(tL)",
    "head_sums": "exp(t Σ w Q) over heads",
    "reversible_scores": "exp(tQ), Q reversible",
    "streams": "exp(tQ), 4 balanced streams",
    "spectral_scores": "softmax, A = U diag(σ) Vᵀ",
    "skew_scores": "softmax, A = U K Uᵀ, K skew",
    "rate_scores": "softmax, A = U Q Uᵀ, Q rates",
    "mixer": "exp(L), no queries",
    "mixer_fixed": "exp(L), L not learned",
    "mixer_reversible": "exp(L), L reversible",
    "mixer_balanced": "exp(L), L doubly balanced",
    "mixer_relative": "exp(R), R = r(i − j)",
}


def seeds_of(experiment: str, budget: str) -> range:
    """The seeds that a budget trains by default; five of what the first page shows."""
    return range(1 if budget == "quick" else 5 if experiment == "reachability" else 3)


def variants_of(experiment: str) -> list[str]:
    """Names of an experiment's overlays, in the order of TITLES."""
    names = {path.stem for path in (ROOT / experiment / "variants").glob("*.yaml")}
    return [name for name in TITLES if name in names] + sorted(names - set(TITLES))


@dataclass(frozen=True)
class Run:
    """One training run: experiment × variant × budget × seed, with what was set on the command line, by dotted keys."""

    experiment: str
    variant: str
    budget: str
    seed: int
    settings: tuple[tuple[str, str], ...] = field(default=())

    @property
    def name(self) -> str:
        """Short and unique within an output folder."""
        return f"{self.experiment}/{self.variant}-seed{self.seed}"

    @property
    def files(self) -> list[Path]:
        """Base, budget, overlay and what this budget tuned for the variant, if it did; later ones override."""
        folder = ROOT / self.experiment
        tuned = folder / "budgets" / self.budget / f"{self.variant}.yaml"
        return [
            folder / "base.yaml",
            folder / "budgets" / f"{self.budget}.yaml",
            folder / "variants" / f"{self.variant}.yaml",
            *([tuned] if tuned.exists() else []),
        ]

    def config(self) -> dict[str, Any]:
        """The merged configuration."""
        merged: dict[str, Any] = {}
        for path in self.files:
            _merge(merged, yaml.safe_load(path.read_text()))
        for key, value in self.settings:
            nested = yaml.safe_load(value)
            for part in reversed(key.split(".")):
                nested = {part: nested}
            _merge(merged, nested)
        return merged

    def config_hash(self) -> str:
        """Of the merged configuration; the seed is not part of it."""
        return hashlib.sha256(json.dumps(self.config(), sort_keys=True).encode()).hexdigest()[:16]

    def arguments(self) -> list[str]:
        """The run as arguments of LightningCLI."""
        found = [part for path in self.files for part in ("--config", str(path))]
        found += ["--seed_everything", str(self.seed), "--data.init_args.seed", str(self.seed)]
        return found + [part for key, value in self.settings for part in (f"--{key}", value)]

    def result_path(self, output: Path) -> Path:
        """Where its JSON lies when it is finished."""
        return output / self.experiment / "results" / f"{self.variant}-seed{self.seed}.json"

    def work_path(self, work: Path) -> Path:
        """Where checkpoints, logs and progress lie while it runs; another configuration has another place."""
        return work / self.experiment / f"{self.variant}-seed{self.seed}-{self.budget}-{self.config_hash()}"

    def finished(self, output: Path) -> bool:
        """Whether a result of exactly this configuration is there."""
        path = self.result_path(output)
        return path.exists() and read_json(path, "config_hash")["config_hash"] == self.config_hash()


def load_results(output: Path, experiment: str) -> dict[str, list[dict[str, Any]]]:
    """Every result of an experiment: variant → its runs by seed, variants in the order of TITLES.

    Raises:
        ValueError: a damaged file; runs of one variant come from different configurations, or variants from different budgets,
            trainers (but for the steps, which a budget may tune) or data.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    settings: set[str] = set()
    for variant in variants_of(experiment):
        paths = sorted((output / experiment / "results").glob(f"{variant}-seed*.json"))
        runs = sorted((read_json(p, *_PARTS) for p in paths), key=lambda run: run["seed"])
        if len({run["config_hash"] for run in runs}) > 1:
            raise ValueError(
                f"{experiment}/{variant}: expected runs of one configuration, got several in {output}; "
                "delete the outdated files or choose another --output"
            )
        if runs:
            found[variant] = runs
        for run in runs:
            trainer = {key: value for key, value in run["config"]["trainer"].items() if key not in _STEPS}
            parts = [run["budget"], trainer, run["config"]["data"], (run["data"] or {}).get("sha256")]
            settings.add(json.dumps(parts, sort_keys=True))
    if len(settings) > 1:
        raise ValueError(
            f"{experiment}: expected one budget, trainer and data for all variants, got {len(settings)} in {output}; "
            "delete the outdated files or choose another --output"
        )
    return found


def read_runs(output: Path, study: str, pattern: str, *parts: str) -> list[dict[str, Any]]:
    """Results of one setting, by seed.

    Args:
        output: holds ``<study>/results``.
        study: its folder.
        pattern: of the files' names.
        parts: what each must hold beside ``setting`` and ``seed``.

    Raises:
        ValueError: a damaged file, or results of several settings.
    """
    paths = sorted((output / study / "results").glob(pattern))
    runs = [read_json(path, "setting", "seed", *parts) for path in paths]
    if len({json.dumps(run["setting"], sort_keys=True) for run in runs}) > 1:
        raise ValueError(
            f"{study}: expected results of one setting for {pattern}, got several in {output}; delete the outdated files or "
            "choose another --output"
        )
    return sorted(runs, key=lambda run: run["seed"])


def read_json(path: Path, *parts: str) -> dict[str, Any]:
    """A result.

    Args:
        path: of its file.
        parts: names that it must hold.

    Raises:
        ValueError: cut short, no JSON, or something else's.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise type(error)(unusable(path, error)) from error
    except ValueError:
        found = None
    missing = [part for part in parts if part not in found] if isinstance(found, dict) else None
    if missing or missing is None:
        got = "one that is cut short or no result" if missing is None else f"one without {', '.join(missing)}"
        raise ValueError(f"{path}: expected a whole result, got {got}; delete it and run the same command again")
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all."""
    with draft(path) as part:
        part.write_text(text)


def write_figure(path: Path, figure: Figure, dpi: int = 160) -> None:
    """Write whole or not at all."""
    with draft(path) as part:
        figure.savefig(part, dpi=dpi, bbox_inches="tight", format=path.suffix[1:])


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
