"""Tables and figures of the comparison from its JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchmetrics.functional import spearman_corrcoef

from experiments import markdown
from experiments.markdown import says
from experiments.positions.encodings import ENCODINGS, MIXINGS, RESCALED, combined
from experiments.positions.figures import dots, lines
from experiments.positions.tasks import TASKS
from experiments.results import read_runs, write_figure, write_text

__all__ = ["FOLDER", "Rows", "load", "positions_tables", "report", "rows"]

FOLDER = "positions"
NONE_YET = "No results are committed yet; `liegroup-attn positions` makes them.\n"
LEARNED = 90.0  # percent
Result = dict[str, Any]
SAYS = {
    f"{FOLDER}_text": "Text, bits per byte of whole sequences as long as those of the training and longer.",
    f"{FOLDER}_text_last": "Text, bits per byte of the same bytes at every length, as many as were trained on.",
    f"{FOLDER}_recall": "Recall, % of answers right, in sequences as long as those of the training and longer.",
    f"{FOLDER}_counting": "Counting, % of answers right, in sequences as long as those of the training and longer.",
    f"{FOLDER}_digits": "Images of digits, % recognised.",
    f"{FOLDER}_recall_seeds": "Recall is learned or it is not: how many seeds have learned it.",
    f"{FOLDER}_cost": "What an encoding costs: time and parameters.",
    f"{FOLDER}_summary": "All tasks at the longest sequences.",
    f"{FOLDER}_agreement": "Whether encodings stand in the same order under two ways of mixing: rank correlation of their means.",
}
Rows = dict[str, dict[str, list[Result]]]  # title of the encoding → mixing → runs by seed


def load(output: Path, task: str) -> list[Result]:
    """Runs of a task.

    Raises:
        ValueError: a damaged file, or results of several settings.
    """
    return read_runs(output, FOLDER, f"{task}-*-seed*.json", "task", "encoding", "mixing", "test", "rescaled")


def rows(runs: Sequence[Result]) -> Rows:
    """Runs by encoding and mixing, in the order of tables; below RoPE its weights with scaled frequencies."""
    found: Rows = {}
    for name, choice in TASKS[runs[0]["task"]].encodings.items():
        own = [run for run in runs if run["encoding"] == name]
        if own:
            found[choice.title] = _by_mixing(own)
        for scaling, scaled in RESCALED.items():
            tests = [
                run | {"test": run["test"] | run["rescaled"][scaling]} for run in own if scaling in run["rescaled"]
            ]
            if tests:
                found[scaled.title] = _by_mixing(tests)
    return found


def _by_mixing(runs: Sequence[Result]) -> dict[str, list[Result]]:
    by = {mixing: [run for run in runs if run["mixing"] == mixing] for mixing in MIXINGS}
    return {mixing: some for mixing, some in by.items() if some}


def report(output: Path) -> list[Path]:
    """Write table.md and figures/*.png beside the results; returns what was written."""
    folder = output / FOLDER
    results = {task: runs for task in TASKS if (runs := load(output, task))}
    if not results:
        return []
    written = [folder / "table.md"]
    tables = {name: text for name, text in positions_tables(output).items() if text != NONE_YET}
    write_text(written[0], says(SAYS, tables))
    for task, runs in results.items():
        written.append(folder / "figures" / f"{task}.png")
        figure = (lines if task == "text" else dots)(rows(runs), TASKS[task].unit)
        write_figure(written[-1], figure)
    return written


def positions_tables(output: Path) -> dict[str, str]:
    """Markdown by the names of its markers; a sentence where there are no results."""
    found = {}
    for task in TASKS:
        runs = load(output, task)
        for suffix, key in (("", "all"), *((("_last", "last"),) if task == "text" else ())):
            found[f"{FOLDER}_{task}{suffix}"] = _table(runs, key) if runs else NONE_YET
    recall = load(output, "recall")
    found[f"{FOLDER}_recall_seeds"] = _seeds(recall) if recall else NONE_YET
    runs = [run for task in TASKS for run in load(output, task)]
    return found | {
        f"{FOLDER}_cost": _cost(runs) if runs else NONE_YET,
        f"{FOLDER}_summary": _summary(runs) if runs else NONE_YET,
        f"{FOLDER}_agreement": _agreement(runs) if runs else NONE_YET,
    }


def _table(runs: Sequence[Result], key: str) -> str:
    lengths = [str(length) for length in runs[0]["setting"]["lengths"]]
    form = _form(runs[0]["task"])
    mixings = [name for name in MIXINGS if any(run["mixing"] == name for run in runs)]
    header = ["encoding"]
    for mixing in mixings:
        header += [
            MIXINGS[mixing].title if len(lengths) == 1 else f"{MIXINGS[mixing].title}: {length}" if not at else length
            for at, length in enumerate(lengths)
        ]
    lines = []
    for title, by in rows(runs).items():
        cells = [
            markdown.spread(
                [None if run["test"][length] is None else run["test"][length][key] for run in by[mixing]], form
            )
            if mixing in by
            else _missing(runs[0]["task"], title, mixing)
            for mixing in mixings
            for length in lengths
        ]
        lines.append([title, *cells])
    return markdown.table(header, lines) + f"\n{_references(runs, key, form)} {_provenance(runs)}\n"


def _seeds(runs: Sequence[Result]) -> str:
    """Seeds that have learned the task at the training length: it is all or nothing."""
    length = str(runs[0]["setting"]["lengths"][0])
    mixings = [name for name in MIXINGS if any(run["mixing"] == name for run in runs)]
    lines = []
    for title, by in rows(runs).items():
        if title in {choice.title for choice in RESCALED.values()}:  # the weights of RoPE
            continue
        shares = [[run["test"][length]["all"] >= LEARNED for run in by.get(mixing, [])] for mixing in mixings]
        cells = [
            f"{sum(share)} of {len(share)}" if share else _missing(runs[0]["task"], title, mixing)
            for mixing, share in zip(mixings, shares, strict=True)
        ]
        lines.append([title, *cells])
    header = [f"seeds right in at least {LEARNED:g} % at {length} tokens", *(MIXINGS[name].title for name in mixings)]
    return markdown.table(header, lines) + f"\n{_source(runs, 'seeds')}\n"


def _summary(runs: Sequence[Result]) -> str:
    """Sequences at the longest test length, under the ways of mixing that are run with all encodings."""
    tasks = [task for task in TASKS if TASKS[task].encodings is ENCODINGS and any(run["task"] == task for run in runs)]
    mixings = [name for name, mixing in MIXINGS.items() if not mixing.only and any(r["mixing"] == name for r in runs)]
    table = {task: rows([run for run in runs if run["task"] == task]) for task in tasks}
    header, lines = ["encoding"], []
    settings = {task: next(run["setting"] for run in runs if run["task"] == task) for task in tasks}
    for task in tasks:
        first, *_, last = settings[task]["lengths"]
        start = f"{task}, {TASKS[task].unit}, trained at {first}, tested at {last}: "
        header += [f"{start if not at else ''}{MIXINGS[name].title}" for at, name in enumerate(mixings)]
    for title in dict.fromkeys(title for task in tasks for title in table[task]):
        cells = []
        for task in tasks:
            last, form = str(settings[task]["lengths"][-1]), _form(task)
            for name in mixings:
                own = [run["test"][last] for run in table[task].get(title, {}).get(name, [])]
                missing = _missing(task, title, name)
                cells.append(markdown.spread([x and x["all"] for x in own], form) if own else missing)
        lines.append([title, *cells])
    return markdown.table(header, lines) + f"\n{_source(runs)}\n"


def _agreement(runs: Sequence[Result]) -> str:
    """Whether encodings stand in the same order under another way of mixing: rank correlation of their means over seeds."""
    present = [name for name in MIXINGS if any(run["mixing"] == name for run in runs)]
    pairs = [(present[0], other) for other in present[1:]]
    header = ["task", "tested at", *(f"{MIXINGS[a].title} and {MIXINGS[b].title}" for a, b in pairs)]
    lines = []
    for task in dict.fromkeys(run["task"] for run in runs):
        own = [run for run in runs if run["task"] == task]
        ends = own[0]["setting"]["lengths"]
        for length in dict.fromkeys([str(ends[0]), str(ends[-1])]):
            mean: dict[tuple[str, str], float] = {}
            for key in {(run["encoding"], run["mixing"]) for run in own if run["test"][length] is not None}:
                mean[key] = statistics.fmean(
                    run["test"][length]["all"] for run in own if (run["encoding"], run["mixing"]) == key
                )
            cells = []
            for a, b in pairs:
                both = [encoding for encoding, mixing in mean if mixing == a and (encoding, b) in mean]
                x, y = (torch.tensor([mean[encoding, mixing] for encoding in both]) for mixing in (a, b))
                cells.append(f"{spearman_corrcoef(x, y):.2f} of {len(both)}" if len(both) > 2 else "")
            lines.append([task, length, *cells])
    return markdown.table(header, lines, words=2) + f"\n{_source(runs, 'means over seeds')}\n"


def _form(task: str) -> str:
    return "{:.3f}" if TASKS[task].better == "lower" else "{:.1f}"


def _missing(task: str, title: str, mixing: str) -> str:
    """Why there is no number: the two cannot stand together, or the cell was not run."""
    choice = next((choice for choice in TASKS[task].encodings.values() if choice.title == title), None)
    return markdown.NONE if choice is not None and not combined(choice, MIXINGS[mixing]) else ""


def _references(runs: Sequence[Result], key: str, form: str) -> str:
    """What is reached without attention."""
    first = {run["seed"]: run["references"] for run in runs}  # the same for all cells of a seed
    lengths = [str(length) for length in runs[0]["setting"]["lengths"]]
    parts = []
    for title in next(iter(first.values())):
        found = {
            length: markdown.spread([known[title][length][key] for known in first.values()], form) for length in lengths
        }
        same = len(set(found.values())) == 1
        parts.append(
            f"{title} {found[lengths[0]] if same else ', '.join(f'{x} at {length}' for length, x in found.items())}"
        )
    return f"Without attention: {'; '.join(parts)}."


def _cost(runs: Sequence[Result]) -> str:
    """Milliseconds a training step, and parameters beside those of the model without positions."""
    tasks = [task for task in TASKS if any(run["task"] == task for run in runs)]
    mixings = [name for name in MIXINGS if any(run["mixing"] == name for run in runs)]
    titles = {c.title: None for task in tasks for c in TASKS[task].encodings.values()}
    bare = {(run["task"], run["mixing"]): run["parameters"] for run in runs if run["encoding"] == "none"}
    header = ["ms a training step", "more parameters"]
    header += [
        f"{task}: {MIXINGS[m].title}" if not at else MIXINGS[m].title for task in tasks for at, m in enumerate(mixings)
    ]
    table = {task: rows([run for run in runs if run["task"] == task]) for task in tasks}
    lines = []
    for title in titles:
        cells: list[str] = []
        more: list[int] = []
        for task in tasks:
            for mixing in mixings:
                some = table[task].get(title, {}).get(mixing, [])
                each = [1000 * run["cpu_seconds"]["train"] / run["setting"]["steps"] for run in some]
                cells.append(f"{statistics.fmean(each):.0f}" if each else _missing(task, title, mixing))
                more += [run["parameters"] - bare[task, mixing] for run in some if (task, mixing) in bare]
        between = f"{min(more)}–{max(more)}" if len(set(more)) > 1 else str(more[0]) if more else ""
        lines.append([title, between, *cells])
    note = (
        "CPU time on one thread, mean over seeds; other runs were on the other cores. Parameters beside those without positions; "
        "they depend on the task where there are two numbers."
    )
    return markdown.table(header, lines) + f"\n{note}\n"


def _provenance(runs: Sequence[Result]) -> str:
    setting = runs[0]["setting"]
    parts = [
        f"{setting['steps']} steps of {setting['batch_size']} sequences of {setting['lengths'][0]} tokens",
        f"data {_each(runs, 'data', 'source')}, sha256 {setting['sha256'][:12]}…",
    ]
    return f"{'; '.join(parts)}; {_source(runs)}"


def _each(runs: Sequence[Result], key: str, name: str) -> str:
    return ", ".join(sorted({str(run[key][name]) for run in runs}))


def _source(runs: Sequence[Result], of: str = "mean ± s.d. over seeds") -> str:
    """What the numbers are of, seeds, machine, versions and dates."""
    seeds = sorted({run["seed"] for run in runs})
    cells = [tuple(run[key] for key in ("task", "encoding", "mixing")) for run in runs]
    over = f"{of} {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}, no spread"
    parts = [
        over + ("" if len({cells.count(cell) for cell in cells}) == 1 else "; some cells have fewer seeds"),
        f"{_each(runs, 'hardware', 'name')}, {_each(runs, 'hardware', 'threads')} thread",
        f"torch {_each(runs, 'versions', 'torch')}",
        ", ".join(sorted({run["date"] for run in runs})),
        f"code {', '.join(sorted({run['code'][:8] for run in runs}))}",
    ]
    return f"{'; '.join(parts)}. Written by `liegroup-attn positions` from `results/*.json`."
