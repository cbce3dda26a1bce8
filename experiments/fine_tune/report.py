"""Tables and figures of the fine-tuning from its JSON alone."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from experiments import markdown
from experiments.fine_tune.figures import figures
from experiments.fine_tune.tasks import TASKS
from experiments.markdown import says
from experiments.results import read_runs, write_figure, write_text

__all__ = ["FOLDER", "VARIANTS", "fine_tune_tables", "load", "report"]

FOLDER = "fine_tune"
NATS = "{:.4f}"
_EXPONENTIAL = {"clock": "ExponentialClock"}
# name → title, options of the conversion, what is trained; in the order of tables and legends
VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "softmax": ("softmax", {"learn_time": False, "learn_rates": False}, "all"),
    "fixed": ("S exp(tQ)", {}, "all"),
    "exponential": ("S (I − tQ)⁻¹", _EXPONENTIAL, "all"),
    "fixed_lie": ("S exp(tQ), flows alone", {}, "lie"),
    "exponential_lie": ("S (I − tQ)⁻¹, flows alone", _EXPONENTIAL, "lie"),
}
SAYS = {
    f"{FOLDER}_{task}": f"{title}: a model trained with softmax, then trained on as it is and with flows put in."
    for task, title in {"text": "Text", "forests": "Roots of random forests"}.items()
}
Results = dict[str, list[dict[str, Any]]]


def load(output: Path, task: str) -> Results:
    """Variant → its runs by seed.

    Raises:
        ValueError: a damaged file, or results of several settings.
    """
    runs = read_runs(output, FOLDER, f"{task}-*-seed*.json", "variant", "validation")
    by = {variant: [run for run in runs if run["variant"] == variant] for variant in VARIANTS}
    return {variant: own for variant, own in by.items() if own}


def report(output: Path) -> list[Path]:
    """Write table.md and figures/*.png beside the results; returns what was written."""
    folder, tables = output / FOLDER, fine_tune_tables(output)
    if not tables:
        return []
    written = [folder / "table.md"]
    write_text(written[0], says(SAYS, tables))
    titles = {name: title for name, (title, _, _) in VARIANTS.items()}
    for task in TASKS:
        results = load(output, task)
        for name, figure in figures(results, titles, TASKS[task].unit).items() if results else ():
            written.append(folder / "figures" / f"{task}_{name}.png")
            write_figure(written[-1], figure)
    return written


def fine_tune_tables(output: Path) -> dict[str, str]:
    """Markdown by the names of its markers."""
    found = {f"{FOLDER}_{task}": load(output, task) for task in TASKS}
    return {name: _table(results) for name, results in found.items() if results}


def _table(results: Results) -> str:
    task = TASKS[next(iter(results.values()))[0]["setting"]["task"]]
    header = ["variant", "trained parameters", f"validation, {task.unit}: before", "after", f"test, {task.unit}"]
    header += [*(["test accuracy %"] if task.accuracy else []), "time t", "CPU s"]
    rows = []
    for variant, runs in results.items():
        times = [t for run in runs for head in run["times"].values() for t in head]
        cells = [
            VARIANTS[variant][0],
            f"{runs[0]['parameters']:,}",
            markdown.spread([run["validation"][0][1] for run in runs], NATS),
            markdown.spread([run["validation"][-1][1] for run in runs], NATS),
            markdown.spread([run["test_loss"] for run in runs], NATS),
            *([markdown.spread([100 * run["test_accuracy"] for run in runs], "{:.1f}")] if task.accuracy else []),
            "0" if not any(times) else f"{statistics.fmean(times):.2f} ({min(times):.2f}–{max(times):.2f})",
            markdown.spread([run["cpu_seconds"] for run in runs], "{:.0f}"),
        ]
        rows.append(cells)
    return markdown.table(header, rows) + f"\n{_provenance(results)}\n"


def _provenance(results: Results) -> str:
    runs = [run for group in results.values() for run in group]
    setting, seeds = runs[0]["setting"], sorted({run["seed"] for run in runs})

    def each(key: str, name: str) -> str:
        return ", ".join(sorted({str(run[key][name]) for run in runs}))

    corpus = f"corpus {setting['corpus']}, sha256 {each('data', 'sha256')[:12]}…; " if "corpus" in setting else ""
    versions = ", ".join(f"{name} {each('versions', name)}" for name in runs[0]["versions"] if name != "lightning")
    return (
        f"mean ± s.d. over seeds {', '.join(map(str, seeds))} (time: mean over layers, heads and seeds, least–most); "
        f"{setting['model']['name']}, {setting['pretrain_steps']} steps with softmax, then {setting['steps']} more; {corpus}"
        f"{each('hardware', 'name')}, {each('hardware', 'threads')} thread; {versions}; "
        f"{', '.join(sorted({run['date'] for run in runs}))}. Written by `liegroup-attn fine-tune` from `results/*.json`."
    )
