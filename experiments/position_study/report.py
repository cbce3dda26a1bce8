"""Tables and figures of the study of positions from its JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import markdown
from experiments.markdown import says
from experiments.position_study.figures import figures
from experiments.results import read_runs, write_figure, write_text

__all__ = ["CLAIMS", "FOLDER", "load", "report", "study_tables"]

FOLDER = "position_study"
NONE_YET = "No results are committed yet; `liegroup-attn position-study` makes them.\n"
Run = dict[str, Any]
Results = dict[tuple[str, str, str], list[Run]]  # (mixing, encoding, role) → runs by seed
# part of the claim → what is measured, and on a seed's encoder and decoder: above 0 where the part holds
CLAIMS: dict[str, list[tuple[str, str, Callable[[Run, Run], float]]]] = {
    "the decoder's table knows absolute position": [
        ("R², decoder − encoder", "r2", lambda e, d: _table(d, "r2") - _table(e, "r2")),
        ("R², decoder − untrained", "r2", lambda e, d: _table(d, "r2") - _table(d, "r2", "untrained")),
    ],
    "the encoder's table is local": [
        (
            "contrast, encoder − untrained",
            "contrast",
            lambda e, d: _table(e, "contrast") - _table(e, "contrast", "untrained"),
        ),
    ],
    "the encoder's is the more local one": [
        ("contrast, encoder − decoder", "contrast", lambda e, d: _table(e, "contrast") - _table(d, "contrast")),
    ],
}
R2 = "{:z.2f}"
SAYS = {
    f"{FOLDER}_embeddings": "Tables of positions: what can be read from their rows by a straight line, and how alike near rows are.",
    f"{FOLDER}_hidden": "Hidden states: what a model has learned, and what of positions can be read from its tokens by a straight line.",
    f"{FOLDER}_claim": "The claim in parts: differences between decoder and encoder, and what they say.",
}
SIZE = 2.0  # standard deviations of untrained tables, below which a difference is none


def load(output: Path) -> Results:
    """(mixing, encoding, role) → its runs by seed.

    Raises:
        ValueError: a damaged file, or results of several settings.
    """
    runs = read_runs(output, FOLDER, "*-seed*.json", "mixing", "encoding", "role")
    # softmax before exp, learned before what is fixed, encoder before decoder
    places = {name: i for i, name in enumerate(("softmax", "learned", "sinusoidal", "encoder"))}
    found: Results = {}
    for run in runs:
        found.setdefault((run["mixing"], run["encoding"], run["role"]), []).append(run)
    return dict(sorted(found.items(), key=lambda item: [places.get(name, 9) for name in item[0]]))


def report(output: Path) -> list[Path]:
    """Write table.md and figures/*.png beside the results; returns what was written."""
    folder, results = output / FOLDER, load(output)
    if not results:
        return []
    written = [folder / "table.md"]
    write_text(written[0], says(SAYS, study_tables(output)))
    for mixing in dict.fromkeys(key[0] for key in results):
        own = {key[1:]: runs for key, runs in results.items() if key[0] == mixing}
        for name, figure in figures(own).items():
            written.append(folder / "figures" / f"{mixing}_{name}.png")
            write_figure(written[-1], figure)
    return written


def study_tables(output: Path) -> dict[str, str]:
    """Markdown by the names of its markers."""
    results = load(output)
    if not results:
        return {f"{FOLDER}_{name}": NONE_YET for name in ("embeddings", "hidden", "claim")}
    source = f"\n{_provenance(results)}\n"
    made = {"embeddings": _embeddings(results), "hidden": _hidden(results), "claim": _claims(results)}
    return {
        f"{FOLDER}_{name}": markdown.table(*rows, words=_words(rows[1])) + source
        for name, rows in made.items()
        if rows[1]
    }


def _table(run: Run, number: str, when: str = "trained") -> float:
    return float(run[when]["table"][number])


TABLE_NUMBERS = {
    "r2": ("position R²", "{:z.2f}"),
    "mae": ("position, error in tokens", "{:.1f}"),
    "order": ("order right, %", "{:.0f}"),
    "near": ("cosine, 1–2 apart", "{:z.2f}"),
    "beyond": ("4–8 apart", "{:z.2f}"),
    "far": ("far apart", "{:z.2f}"),
    "contrast": ("contrast", "{:z.2f}"),
    "mass": ("mass within 2", "{:z.2f}"),
    "rows": ("neighbouring rows, r", "{:z.2f}"),
}


def _embeddings(results: Results) -> tuple[list[str], list[list[str]]]:
    """Learned tables, as they started, in both roles alike, and as they ended; the fixed one once."""
    rows = []
    for (mixing, encoding, role), runs in results.items():
        if runs[0]["trained"]["table"] is None or (
            encoding == "sinusoidal" and not _first(results, mixing, encoding, role)
        ):
            continue
        learned = encoding == "learned"
        for when in ("untrained", "trained") if learned and _first(results, mixing, encoding, role) else ("trained",):
            name = f"learned, {role if when == 'trained' else when}" if learned else "sinusoidal, fixed"
            own = runs if learned else runs[:1]
            numbers = [
                markdown.spread([(100 if key == "order" else 1) * _table(run, key, when) for run in own], form)
                for key, (_, form) in TABLE_NUMBERS.items()
            ]
            rows.append([mixing, name, *numbers])
    return ["mixing", "table", *(title for title, _ in TABLE_NUMBERS.values())], rows


def _first(results: Results, *key: str) -> bool:
    """Whether this role is the first that has the mixing and the encoding."""
    return next(role for *other, role in results if other == [*key[:2]]) == key[2]


def _hidden(results: Results) -> tuple[list[str], list[list[str]]]:
    """Position and order from hidden states, first and last; and what the model is worth."""
    header = ["mixing", "positions", "model", "validation, nats per byte asked for", "by counts: left, both neighbours"]
    header += ["position R²: tokens", "after the last block", "untrained", "order right, %: after the last block"]
    header += ["distance R²: after the last block", "CPU s"]
    rows = []
    for (mixing, encoding, role), runs in results.items():
        first, last = ([run["trained"]["layers"][layer] for run in runs] for layer in (0, -1))
        rows.append(
            [
                mixing,
                encoding,
                role,
                markdown.spread([run["validation_loss"] for run in runs], "{:.3f}"),
                ", ".join(f"{count:.2f}" for name, count in runs[0]["counts"].items() if name != "none"),
                markdown.spread([numbers["r2"] for numbers in first], R2),
                markdown.spread([numbers["r2"] for numbers in last], R2),
                markdown.spread([run["untrained"]["layers"][-1]["r2"] for run in runs], R2),
                markdown.spread([100 * numbers["order"] for numbers in last], "{:.0f}"),
                markdown.spread([numbers["distance_r2"] for numbers in last], R2),
                markdown.spread([run["cpu_seconds"] for run in runs], "{:.0f}"),
            ]
        )
    return header, rows


def _claims(results: Results) -> tuple[list[str], list[list[str]]]:
    """Every difference that is judged, and what it says of its part."""
    rows = []
    for mixing in dict.fromkeys(key[0] for key in results):
        encoders, decoders = (
            {run["seed"]: run for run in results.get((mixing, "learned", role), [])} for role in ("encoder", "decoder")
        )
        seeds = sorted(set(encoders) & set(decoders))
        if not seeds:
            continue
        pairs = [(encoders[seed], decoders[seed]) for seed in seeds]
        for part, measured in CLAIMS.items():
            found = [([claim(e, d) for e, d in pairs], _least(pairs, number)) for _, number, claim in measured]
            for (title, _, _), (values, least) in zip(measured, found, strict=True):
                rows.append([mixing, part, title, markdown.spread(values, R2), f"{least:.2f}", verdict(pairs, found)])
    return ["mixing", "part of the claim", "what must be above 0", "found", "least that counts", "verdict"], rows


def _least(pairs: list[tuple[Run, Run]], number: str) -> float:
    """The size of a difference that chance makes: of tables that were not trained."""
    untrained = [_table(encoder, number, "untrained") for encoder, _ in pairs]
    return SIZE * statistics.stdev(untrained) if len(untrained) > 1 else float("inf")


def verdict(pairs: list[tuple[Run, Run]], found: list[tuple[list[float], float]]) -> str:
    """What the differences of a part say, by the rule of the README."""
    if any(run["validation_loss"] > run["counts"]["left"] for pair in pairs for run in pair):
        return "none: a model has not learned its task"
    if all(value > least for values, least in found for value in values):
        return "supported"
    if any(all(value < -least for value in values) for values, least in found):
        return "refuted"
    return "undecided"


def _words(rows: list[list[str]]) -> int:
    """Columns before the first number."""
    return next((i for i, cell in enumerate(rows[0]) if cell[:1] in "−-0123456789"), len(rows[0]))


def _provenance(results: Results) -> str:
    runs = [run for group in results.values() for run in group]
    setting, seeds = runs[0]["setting"], sorted({run["seed"] for run in runs})

    def each(key: str, name: str) -> str:
        return ", ".join(sorted({str(run[key][name]) for run in runs}))

    spread = "mean ± s.d. over seeds" if len(seeds) > 1 else "one run, no spread: seed"
    return (
        f"{spread} {', '.join(map(str, seeds))}; width {setting['width']}, {setting['depth']} blocks, "
        f"{setting['steps']} steps of {setting['batch_size']} × {setting['context']} bytes; corpus {setting['corpus']}, sha256 "
        f"{setting['sha256'][:12]}…; {each('hardware', 'name')}, {each('hardware', 'threads')} thread a run; "
        f"torch {each('versions', 'torch')}; {', '.join(sorted({run['date'] for run in runs}))}. Written by `liegroup-attn "
        "position-study` from `results/*.json`."
    )
