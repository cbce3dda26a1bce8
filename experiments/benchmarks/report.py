"""Table and figure of the benchmark from its JSON alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.benchmarks.competitors import BASE
from experiments.benchmarks.conversion import PLAIN as UNCONVERTED
from experiments.benchmarks.conversion import WATCHING
from experiments.benchmarks.figure import scaling_figure
from experiments.benchmarks.measure import PHASES
from experiments.benchmarks.parts import PLAIN
from experiments.benchmarks.positions import CHAIN, ROPE
from experiments.benchmarks.summary import Result, attention_cell, find, peak, ratio, seconds, spread, three_digits
from experiments.benchmarks.targets import targets
from experiments.results import read_json, write_figure, write_text

__all__ = ["FOLDER", "benchmark_tables", "load", "render_tables", "report"]

FOLDER = "benchmarks"
WORDS = dict(zip(PHASES, ("forward", "forward + backward"), strict=True))
FAST = "torch.matrix_exp"


def load(output: Path) -> dict[str, Result]:
    """Every result of the benchmark: ``DEVICE-DTYPE`` → its JSON."""
    paths = sorted((output / FOLDER / "results").glob("*.json"))
    return {path.stem: read_json(path, "setting", "cells") for path in paths}


def report(output: Path) -> list[Path]:
    """Write table.md and figures/*.png beside the results; returns what was written."""
    results, folder = load(output), output / FOLDER
    if not results:
        return []
    sections = [f"# {name}\n\n" + "\n".join(render_tables(result).values()) for name, result in results.items()]
    write_text(folder / "table.md", "\n".join(sections))
    written = [folder / "table.md"]
    for name, result in results.items():
        figure = scaling_figure(result)
        if figure is not None:
            written.append(folder / "figures" / f"{name}.png")
            write_figure(written[-1], figure, dpi=200)
    return written


def benchmark_tables(output: Path) -> dict[str, str]:
    """Tables by the names of their markers, e.g. ``targets_cpu_float32``, each with its provenance."""
    return {
        f"{table}_{name.replace('-', '_')}": f"{text}\n{_provenance(result)}\n"
        for name, result in load(output).items()
        for table, text in render_tables(result).items()
    }


def render_tables(result: Result) -> dict[str, str]:
    """Markdown by name; a table without rows is left out."""
    found = {"targets": _targets(result), "attention": _attention(result)}
    for phase in PHASES:
        found[f"time_{phase}"] = _over_tokens(result, phase, "time")
        found[f"memory_{phase}"] = _over_tokens(result, phase, "memory")
    found |= {
        "small": _small(result),
        "decode": _decode(result),
        "optimizer": _steps(result),
        "conversion": _conversions(result),
        "monitor": _monitor(result),
        "rope": _rope(result),
        "encodings": _encodings(result),
        "import": _imports(result),
    }
    found |= {"left_out": _left_out(result), "method": f"{_provenance(result)}\n"}
    return {name: text for name, text in found.items() if text}


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    rule = f"|{'|'.join([':--', *['--:'] * (len(header) - 1)])}|"
    return "\n".join([f"{title}\n", f"| {' | '.join(header)} |", rule, *lines, ""]) if lines else ""


def _targets(result: Result) -> str:
    rows = []
    whole = bool(find(result, part="attention"))
    for t in targets(result):
        if t.measured is None and not whole:
            continue  # a file of single parts
        alone = t.measured is not None and t.measured.low == t.measured.high
        number = "–" if t.measured is None else three_digits(t.measured.median) if alone else t.measured.show()
        answer = {True: "yes", False: "no", None: "not measured"}[t.reached]
        rows.append([t.what, f"{t.sign} {t.needed:g}{t.unit}", number, t.by, answer])
    return _table("Targets: median (least–most).", ["what", "needed", "measured", "by", "reached"], rows)


def _tokens(result: Result) -> list[int]:
    return sorted({cell["tokens"] for cell in find(result, part="attention")})


def _attention(result: Result) -> str:
    """All columns at one N: 1024, or the largest below."""
    n = max((tokens for tokens in _tokens(result) if tokens <= 1024), default=None)
    if n is None:
        return ""
    both = [attention_cell(result, n, phase) for phase in PHASES]
    values = result["cells"].get("values", {"rows": {}})["rows"]
    rows = []
    for name in dict.fromkeys(name for cell in both for name in cell.get("rows", {})):
        times = [spread(s).show(1e3) if (s := seconds(cell, name)) else "–" for cell in both]
        over = ratio(both[1], name, BASE)
        bytes_ = [peak(result, name, n, phase) for phase in PHASES]
        memory = ["–" if b is None else three_digits(b / 2**20) for b in bytes_]
        off = values.get(name, {}).get("error")
        rows.append([name, *times, over.show() if over else "–", *memory, "–" if off is None else f"{off:.0e}"])
    heads = find(result, part="attention", tokens=n)[0]["heads"]
    width = result["setting"]["width"]
    title = f"N = {n}, batch × heads = {heads}, d = {width}; median (least–most) of interleaved repeats."
    header = ["method", "forward ms", "forward + backward ms", f"forward + backward over {BASE}"]
    return _table(title, [*header, "peak MiB, forward", "peak MiB, both", "error"], rows)


def _over_tokens(result: Result, phase: str, what: str) -> str:
    tokens = _tokens(result)
    cells = [attention_cell(result, n, phase) for n in tokens]

    def entry(name: str, n: int, cell: Result) -> str:
        if what == "time":
            return three_digits(1e3 * spread(s).median) if (s := seconds(cell, name)) else "–"
        return "–" if (b := peak(result, name, n, phase)) is None else three_digits(b / 2**20)

    names = dict.fromkeys(name for cell in cells for name in cell.get("rows", {}))
    rows = [[name, *(entry(name, n, cell) for n, cell in zip(tokens, cells, strict=True))] for name in names]
    heads = ", ".join(str(cell.get("heads", "–")) for cell in cells)
    unit = "median ms" if what == "time" else "peak MiB beyond the inputs"
    title = f"{WORDS[phase].capitalize()}, {unit}, over N (batch × heads {heads})."
    seen = [row for row in rows if set(row[1:]) != {"–"}]
    return _table(title, ["method", *(f"N = {n}" for n in tokens)], seen)


def _small(result: Result) -> str:
    cells = find(result, part="small")
    times = sorted({cell["time"] for cell in cells})
    rows = []
    for n, d in sorted({(cell["tokens"], cell["width"]) for cell in cells}):
        entries = []
        for time in times:
            cell = next(iter(find(result, part="small", tokens=n, width=d, time=time)), {})
            gain = ratio(cell, FAST, "method=None")
            entries.append(gain.show() if gain else "–")
        rows.append([f"{n}, {d}", *entries])
    batch = cells[0]["heads"] if cells else 0
    title = f"{batch} small matrices, forward + backward: how many times as long as `method=None` {FAST} takes."
    return _table(title, ["N, d", *(f"θ = {time:g}" for time in times)], rows)


def _decode(result: Result) -> str:
    rows = []
    for cell in find(result, part="decode"):
        for name in cell["rows"]:
            if s := seconds(cell, name):
                over = ratio(cell, "softmax", name)
                rows.append([name, spread([1 / x for x in s]).show(), over.show() if over else "–"])
    header = ["attention", "tokens a second", "over softmax"]
    return _table("Decoding, batch 1, 2 blocks, 8 heads.", header, rows)


def _steps(result: Result) -> str:
    rows = []
    for cell in find(result, part="optimizer"):
        for name in cell["rows"]:
            if s := seconds(cell, name):
                over = ratio(cell, name, PLAIN)
                rows.append([name, spread(s).show(1e3), over.show() if over else "–"])
    return _table("One optimizer step.", ["optimizer", "ms", f"over {PLAIN}"], rows)


def _conversions(result: Result) -> str:
    rows = []
    for cell in find(result, part="conversion"):
        for name in cell["rows"]:
            if s := seconds(cell, name):
                over = ratio(cell, name, UNCONVERTED)
                rows.append([f"{cell['model']}, {name}", spread(s).show(1e3), over.show() if over else "–"])
    title = "One training step, batch 8, N = 256, 4 layers of width 256, 8 heads."
    return _table(title, ["model", "ms", f"over the model {UNCONVERTED}"], rows)


def _monitor(result: Result) -> str:
    rows = []
    for cell in find(result, part="monitor"):
        for name in cell["rows"]:
            if s := seconds(cell, name):
                over = ratio(cell, name, WATCHING[0])
                rows.append([name, spread(s).show(), over.show() if over else "–"])
    return _table("The same encoder at t = 0.5.", ["step", "s", "over one without"], rows)


def _rope(result: Result) -> str:
    rows = []
    for cell in find(result, part="rope"):
        for name in cell["rows"]:
            if s := seconds(cell, name):
                over, error = ratio(cell, name, CHAIN), cell["rows"][name].get("error")
                off = "–" if error is None else f"{error:.0e}"
                rows.append([f"{name}, {cell['kind']}", spread(s).show(1e3), over.show() if over else "–", off])
    title = "RoPE of query and key, batch 8, 8 heads, N = 1024, D = 64, forward + backward."
    return _table(title, ["rotation", "ms", f"over {CHAIN}", "error"], rows)


def _encodings(result: Result) -> str:
    rows = []
    for part, words in (("folded", "inference"), ("training", "training")):
        for cell in find(result, part=part):
            for name in cell["rows"]:
                if s := seconds(cell, name):
                    over = ratio(cell, name, ROPE)
                    rows.append([f"{name}, {words}", spread(s).show(1e3), over.show() if over else "–"])
    title = (
        "Encodings, batch 8, 4 heads, N = 256, D = 16: in inference forward alone, folded; in training with backward."
    )
    return _table(title, ["encoding", "ms", f"over {ROPE}"], rows)


def _imports(result: Result) -> str:
    rows = [
        [name, spread(found["seconds"]).show()]
        for cell in find(result, part="import")
        for name, found in cell["rows"].items()
    ]
    return _table("Seconds of an import in a fresh process.", ["import", "s"], rows)


def _left_out(result: Result) -> str:
    reasons = {(name, why) for cell in result["cells"].values() for name, why in cell["skipped"].items()}
    for cell in result["cells"].values():
        reasons |= {(name, row["failed"]) for name, row in cell["rows"].items() if "failed" in row}
    return _table("Left out.", ["method", "why"], sorted(reasons))


def _provenance(result: Result) -> str:
    s = result["setting"]
    dates = ", ".join(sorted({cell["date"] for cell in result["cells"].values()}))
    how = {row["how"] for cell in find(result, part="memory") for row in cell["rows"].values() if "how" in row}
    solver = result["cells"].get("values", {}).get("dopri5")
    parts = [
        f"{s['hardware']}, {s['cores']} cores, {s['threads']} threads, {s['device']}, {s['dtype']}, torch {s['torch']}, {dates}",
        f"{s['repeats']} rounds (fewer of slow cells) of all methods in turn in one process after a warm-up",
    ]
    of_attention = [
        "RoPE on query and key is part of every time of attention; forward alone keeps no graph",
        f"peak memory: one call in a fresh process, {', '.join(sorted(how)) or 'not measured'}, minus what was held before",
        "error: largest difference from a float64 reference at N = 128 over max − min of the value's column",
    ]
    if find(result, part="attention"):
        parts += of_attention
    if solver:
        parts.append(
            f"dopri5 at rtol = atol = {solver['tolerance']:g}, the loosest with an error ({solver['error']:.1e}) under that "
            f"of Uniformization at tail 1e-3 ({solver['library_error']:.1e})"
        )
    return f"{'; '.join(parts)}. Written by `liegroup-attn bench` from `results/*.json`."
