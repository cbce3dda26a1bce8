"""Markdown tables from result files: mean ± standard deviation over seeds."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments import markdown
from experiments.benchmarks.report import benchmark_tables
from experiments.drop_in.report import drop_in_tables
from experiments.fine_tune.report import fine_tune_tables
from experiments.position_study.report import study_tables
from experiments.positions.report import positions_tables
from experiments.rate_recovery.report import recovery_tables
from experiments.results import EXPERIMENTS, MAIN, ROOT, TITLES, load_results, write_text

__all__ = ["SAYS", "accuracy_at_depths", "fill_tables", "other_tables", "readmes", "render_table"]

Results = dict[str, list[dict[str, Any]]]
SAYS = {
    "reachability": "Root finding: how many tokens name the root of their tree, in forests as deep as those of the training and "
    "deeper.",
    "language": "Text, byte by byte: how well the next byte is foretold.",
    "digits": "Images of digits, 8 × 8 pixels: how many are recognised.",
}
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def render_table(experiment: str, results: Results) -> str:
    """The table of an experiment, with a line that says where its numbers come from.

    Args:
        experiment: its name.
        results: variant → runs, as ``load_results`` returns them.

    Returns:
        Markdown.
    """
    header, row = {
        "reachability": (_REACHABILITY, _reachability),
        "language": (_LANGUAGE, _language),
        "digits": (_DIGITS, _digits),
    }[experiment]
    rows = [row(TITLES.get(name, name), runs) for name, runs in results.items()]
    return markdown.table(header, rows) + f"\n{_provenance(experiment, results)}\n"


def fill_tables(path: Path, output: Path) -> bool:
    """Put each table of ``output`` between its markers in a Markdown file; says whether the file changed.

    Markers are ``<!-- table: NAME -->`` and ``<!-- end of table -->``; a name is that of an experiment, or of a table
    of the benchmark with its device and dtype, e.g. ``targets_cpu_float32``, of a table of another study, or one of
    ``_front_page``.
    """
    text, others = path.read_text(), other_tables(output)

    def fill(match: re.Match[str]) -> str:
        results = load_results(output, match[2]) if match[2] in EXPERIMENTS else {}
        table = render_table(match[2], results) if results else others.get(match[2])
        return match[1] + table + match[3] if table else match[0]

    filled = _BLOCK.sub(fill, text)
    if filled != text:
        write_text(path, filled)
    return filled != text


def other_tables(output: Path) -> dict[str, str]:
    """Tables of other studies, and what the first page shows of the compared variants, by the names of their markers."""
    tables = (
        benchmark_tables,
        recovery_tables,
        drop_in_tables,
        fine_tune_tables,
        study_tables,
        positions_tables,
        _front_page,
    )
    return {name: text for of in tables for name, text in of(output).items()}


def accuracy_at_depths(run: dict[str, Any], test_set: str, scale: str = "time x1") -> list[float]:
    """Accuracy at depth 0, 1, … of one run (from 0 to 1), NaN where there was no token."""
    metrics = run["test"].get(scale, run["test"]["time x1"])
    prefix = f"{test_set}/accuracy_at_depth_"
    depths = {int(key.removeprefix(prefix)): value for key, value in metrics.items() if key.startswith(prefix)}
    return [depths.get(d, math.nan) for d in range(max(depths, default=-1) + 1)]


_NOT_SCALED, _MOST = "–", 4  # in place of a number; of the factors of time at test, the largest
_REACHABILITY = (
    "variant",
    "blocks",
    "parameters",
    "learning rate",
    "steps",
    "accuracy %",
    "worst trained depth %",
    "deeper forests %, time ×1",
    "×2",
    "×4",
    "TFLOP in all",
    "CPU s",
)


def _reachability(title: str, runs: list[dict[str, Any]]) -> list[str]:
    def scaled(scale: str) -> str:
        if scale not in runs[0]["test"]:
            return _NOT_SCALED
        return markdown.spread((100 * run["test"][scale]["deeper/accuracy"] for run in runs), "{:.1f}")

    return [
        title,
        str(runs[0]["config"]["model"]["init_args"]["depth"]),
        f"{runs[0]['parameters']:,}",
        f"{runs[0]['config']['model']['init_args']['learning_rate']:g}",
        f"{runs[0]['steps']:,}",
        markdown.spread((100 * run["test"]["time x1"]["test/accuracy"] for run in runs), "{:.1f}"),
        markdown.spread((100 * min(accuracy_at_depths(run, "test")) for run in runs), "{:.1f}"),
        *(scaled(f"time x{factor}") for factor in (1, 2, 4)),
        f"{runs[0]['flops_per_step'] * runs[0]['steps'] / 1e12:.2f}",
        _cost(runs)[-1],
    ]


# The first page: a narrow table, and two sentences whose numbers nobody copies by hand.
_HEADLINE = (
    "variant",
    "blocks",
    "parameters",
    "accuracy %",
    f"deeper forests %, time ×1 → ×{_MOST}",
    "CPU s",
)
_HEADLINED = ("softmax", "softmax_2_blocks", "softmax_4_blocks", "exp", "first_hop_fixed", "first_hop_exponential")
_OURS, _FOUR, _ONE = "first_hop_exponential", "softmax_4_blocks", "softmax"


def _front_page(output: Path) -> dict[str, str]:
    forests, text = (load_results(output, name) for name in MAIN)
    found, shown = {}, {name: forests[name] for name in _HEADLINED if name in forests}
    if shown:
        rows = [_headline(TITLES[name], runs) for name, runs in shown.items()]
        found["headline"] = markdown.table(_HEADLINE, rows) + f"\n{_provenance('reachability', shown)}\n"
    if _OURS in forests and _FOUR in forests:
        found["headline_sentence"] = _win(forests[_OURS], forests[_FOUR])
    if _OURS in text and _ONE in text:
        found["language_sentence"] = _loss(text[_OURS], text[_ONE])
    return found


def _headline(title: str, runs: list[dict[str, Any]]) -> list[str]:
    cell = dict(zip(_REACHABILITY, _reachability(title, runs), strict=True))
    deeper, longer = cell["deeper forests %, time ×1"], cell[f"×{_MOST}"]
    cell[_HEADLINE[-2]] = deeper if longer == _NOT_SCALED else f"{deeper} → {longer}"
    return [cell[name] for name in _HEADLINE]


def _win(ours: list[dict[str, Any]], softmax: list[dict[str, Any]]) -> str:
    """Raises ValueError where the numbers no longer say it."""

    def percent(runs: list[dict[str, Any]], test: str, scale: int = 1) -> str:
        return _mean((100 * run["test"][f"time x{scale}"][f"{test}/accuracy"] for run in runs), "{:.1f}")

    if float(percent(ours, "deeper", _MOST)) <= float(percent(softmax, "deeper")):
        raise ValueError(
            "headline_sentence: expected ours ahead in deeper forests, got softmax; write another sentence"
        )
    ours_s, softmax_s = (_mean((run["cpu_seconds"] for run in runs), "{:.0f}") for runs in (ours, softmax))
    blocks = softmax[0]["config"]["model"]["init_args"]["depth"]
    return (
        "**Where it wins: chains of pointers.** Which root has each node of a random forest, given (node, parent) pairs in random "
        f"order? One block ({TITLES[_OURS]}) answers {percent(ours, 'test')} % right after {ours[0]['steps']:,} steps; softmax "
        f"attention, each variant trained to its own best, takes {blocks} blocks and {softmax[0]['steps']:,} steps for "
        f"{percent(softmax, 'test')} %: {softmax[0]['parameters']:,} parameters instead of {ours[0]['parameters']:,}, {softmax_s} s "
        f"of CPU time instead of {ours_s}. In deeper forests than those of training the one block answers {percent(ours, 'deeper')} % "
        f"right, the {blocks} softmax blocks {percent(softmax, 'deeper')} %; with {_MOST} times the time that it has learned, "
        f"{percent(ours, 'deeper', _MOST)} %.\n"
    )


def _loss(ours: list[dict[str, Any]], softmax: list[dict[str, Any]]) -> str:
    bits = [_mean((run["test"]["time x1"]["test/bits_per_byte"] for run in runs), "{:.3f}") for runs in (ours, softmax)]
    seconds = [statistics.fmean(run["cpu_seconds"] for run in runs) for runs in (ours, softmax)]
    if float(bits[0]) < float(bits[1]):
        raise ValueError("language_sentence: expected softmax ahead on text, got ours; write another sentence")
    return (
        f"**Where it does not: text.** A small byte language model reaches {bits[1]} bits per byte with softmax attention, and "
        f"{bits[0]} with {TITLES[_OURS]}, which takes {seconds[0] / seconds[1]:.1f} times the CPU time.\n"
    )


def _mean(values: Iterable[float], form: str) -> str:
    return form.format(statistics.fmean(values))


_LANGUAGE = (
    "variant",
    "parameters",
    "validation nats per byte",
    "test bits per byte",
    "test perplexity",
    "GFLOP a step",
    "CPU s",
)


def _language(title: str, runs: list[dict[str, Any]]) -> list[str]:
    def test(key: str) -> str:
        return markdown.spread((run["test"]["time x1"][key] for run in runs), "{:.3f}")

    return [
        title,
        f"{runs[0]['parameters']:,}",
        markdown.spread((run["curve"][-1]["validation/loss"] for run in runs), "{:.3f}"),
        test("test/bits_per_byte"),
        test("test/perplexity"),
        *_cost(runs),
    ]


_DIGITS = (
    "variant",
    "parameters",
    "on manifolds",
    "validation accuracy %",
    "test accuracy %",
    "test nats",
    "GFLOP a step",
    "CPU s",
)


def _digits(title: str, runs: list[dict[str, Any]]) -> list[str]:
    return [
        title,
        f"{runs[0]['parameters']:,}",
        f"{runs[0]['manifold_parameters']:,}",
        markdown.spread((100 * run["curve"][-1]["validation/accuracy"] for run in runs), "{:.1f}"),
        markdown.spread((100 * run["test"]["time x1"]["test/accuracy"] for run in runs), "{:.1f}"),
        markdown.spread((run["test"]["time x1"]["test/loss"] for run in runs), "{:.3f}"),
        *_cost(runs),
    ]


_DATA = {"language": "corpus", "digits": "images"}


def _cost(runs: list[dict[str, Any]]) -> list[str]:
    return [
        f"{runs[0]['flops_per_step'] / 1e9:.2f}",
        markdown.spread((run["cpu_seconds"] for run in runs), "{:.0f}"),
    ]


def _provenance(experiment: str, results: Results) -> str:
    runs = [run for group in results.values() for run in group]

    def each(get: Callable[[dict[str, Any]], Any]) -> str:
        return ", ".join(sorted({str(get(run)) for run in runs}))

    seeds = sorted({run["seed"] for run in runs})
    spread = "mean ± s.d. over" if len(seeds) > 1 else "one run, no spread:"
    parts = [
        f"{spread} seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}",
        f"{each(lambda r: r['steps'])} steps",
        f"{each(lambda r: r['hardware']['name'])}, {each(lambda r: r['hardware']['threads'])} thread(s) a run, "
        f"{each(lambda r: r['hardware']['precision'])}",
        f"torch {each(lambda r: r['versions']['torch'])}",
        each(lambda r: r["date"]),
    ]
    if experiment in _DATA:
        parts.append(
            f"{_DATA[experiment]} {each(lambda r: r['data']['source'])}, sha256 {each(lambda r: r['data']['sha256'][:12])}…"
        )
    return f"{'; '.join(parts)}. Written by `liegroup-attn draw` from `results/*.json`."


def readmes() -> list[Path]:
    """Files of the repository that hold tables."""
    pages = [path for path in sorted((ROOT.parent / "docs").glob("*.md")) if _BLOCK.search(path.read_text())]
    return [ROOT.parent / "README.md", *sorted(ROOT.glob("*/README.md")), *pages]
