"""The benchmark at sizes that take seconds: values, JSON, resumption, report, messages. No time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.benchmarks import bench, conversion, fit, parts, positions, summary, targets, values
from experiments.benchmarks.competitors import BASE, Row, attention_rows, small_rows, why_not
from experiments.benchmarks.measure import Shape, make_call, make_inputs, time_in_turn
from experiments.benchmarks.report import benchmark_tables, load, report
from experiments.draw import draw
from experiments.results import ROOT, write_json
from experiments.tables import fill_tables
from liegroup_attn.expm.choice import SOLVE_OVER_HOP
from liegroup_attn.expm.uniformization import HOP_OVER_PRODUCT

TINY = Shape(values.TOKENS, 2, 8)
ARGUMENTS = ["--tokens", "16", "32", "--heads", "1", "--width", "8", "--repeats", "2", "--threads", "1"]
ARGUMENTS += ["--parts", "attention", "import"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with a benchmark of two tiny sizes."""
    output = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    bench.main([*ARGUMENTS, "--output", str(output)])
    return output


def test_every_row_computes_what_it_says():
    found = values.check_values(TINY)
    kept = {name for name, row in attention_rows(1e-3).items() if why_not(row, TINY.tokens, False, "cpu") is None}
    assert set(found["rows"]) == kept
    assert {name: row["failed"] for name, row in found["rows"].items() if "failed" in row} == {}
    for name, row in found["rows"].items():
        assert row["error"] <= 1e-3, name
    solver = found["dopri5"]
    assert solver["error"] <= solver["library_error"]
    assert all(off > solver["library_error"] for off in list(solver["ladder"].values())[:-1])
    assert found["rows"]["exp, torch.matrix_exp"]["flops"] > found["rows"][BASE]["flops"] > 0


@pytest.mark.parametrize("time", [1.0, 16.0])
def test_small_rows_are_the_same_to_rounding(time):
    inputs = make_inputs(Shape(24, 3, 8))
    rows = {n: row for n, row in small_rows(time).items() if why_not(row, 24, True, "cpu") is None}
    wide = [x.double() for x in inputs]
    golden = {"exp": rows["torch.matrix_exp"].run(*wide), "resolvent": rows["resolvent, solve"].run(*wide)}
    for name, row in rows.items():
        expected = golden[row.computes]
        torch.testing.assert_close(row.run(*inputs).double(), expected, atol=1e-5, rtol=1e-4, msg=name)


def test_rows_out_of_reach_say_why():
    row = Row(lambda q, k, v: v, "exp", forward=64, backward=0)
    assert why_not(row, 64, False, "cpu") is None
    assert why_not(row, 65, False, "cpu") == "out of reach beyond N = 64"
    assert why_not(row, 64, True, "cpu") == "has no backward"
    assert "NoSuchMethod" in (why_not(row._replace(needs=("NoSuchMethod",)), 8, False, "cpu") or "")
    assert "NoSuchKnob" in (why_not(row._replace(needs=("Uniformization.NoSuchKnob",)), 8, False, "cpu") or "")


def test_a_row_that_breaks_is_recorded_and_the_others_are_timed():
    inputs = make_inputs(Shape(4, 1, 2))
    calls = {
        "breaks": make_call(lambda q, k, v: (_ for _ in ()).throw(RuntimeError("no\nmore")), inputs, False, False),
        "works": make_call(lambda q, k, v: q + k + v, inputs, True, False),
    }
    found = time_in_turn(calls, repeats=4, budget=60.0, device="cpu")
    assert found["breaks"] == {"failed": "RuntimeError: no"}
    assert len(found["works"]["seconds"]) == 4


def test_json_holds_every_repeat_and_what_was_left_out(measured):
    (result,) = load(measured).values()
    assert {"hardware", "cores", "threads", "torch", "dtype"} <= set(result["setting"])
    for tokens in (16, 32):
        for phase in ("forward", "forward_backward"):
            cell = summary.attention_cell(result, tokens, phase)
            assert set(cell["rows"]) | set(cell["skipped"]) == set(attention_rows(1e-3))
            assert all(len(row["seconds"]) == 2 for row in cell["rows"].values())
    assert cell["skipped"]["exp, SciPy expm_multiply"] == "has no backward"
    assert set(result["cells"]["import"]["rows"]) == {"torch", "torch, liegroup_attn"}
    assert "git" not in json.dumps(result["setting"])


def test_finished_cells_are_not_measured_again(measured, monkeypatch, capsys):
    (path,) = (measured / "benchmarks" / "results").glob("*.json")
    before = json.loads(path.read_text())
    monkeypatch.setattr(parts, "time_in_turn", lambda *a: pytest.fail("measured again"))
    bench.main([*ARGUMENTS, "--output", str(measured)])
    assert json.loads(path.read_text()) == before
    assert f"{len(before['cells'])} of {len(before['cells'])} cells" in " ".join(capsys.readouterr().out.split())


def test_a_stop_keeps_what_is_finished(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "time_in_turn", stop)
    with pytest.raises(SystemExit) as left:
        bench.main([*ARGUMENTS, "--output", str(tmp_path)])
    assert left.value.code == 130
    (result,) = load(tmp_path).values()
    assert list(result["cells"]) == ["values"]


def test_a_cell_with_another_row_is_measured_again():
    cell = parts.Cell("k", {}, ("a", "b"), lambda _: {}, {"c": "why"})
    stored = {"rows": {"a": {}, "b": {}}, "skipped": {"c": "why"}}
    assert cell.finished(stored)
    assert not cell.finished(None)
    assert not cell.finished(stored | {"skipped": {}})
    assert not cell.finished(stored | {"rows": {"a": {}}})


def test_memory_is_measured_in_a_fresh_process():
    """An eager softmax holds its N×N; each cell is one row."""
    cells = {cell.key: cell for cell in parts.memory(parts.Options(tokens=(512,), heads=2, width=8, threads=1))}
    cell = cells["memory, N = 512, forward, softmax, eager"]
    found = cell.measure({"values": {"dopri5": None}})["rows"]["softmax, eager"]
    assert found["bytes"] >= 2 * 512 * 512 * 4
    assert found["how"] in ("VmHWM", "ru_maxrss")


def test_decoding_is_timed_without_its_prompt():
    (cell,) = parts.decode(parts.Options(context=8, new_tokens=2, decode_width=16, repeats=2, seconds=1.0))
    rows = cell.measure({})["rows"]
    assert set(rows) == set(parts.DECODERS) == set(cell.rows)
    assert all(len(row["seconds"]) == 2 for row in rows.values())


def test_conversion_and_monitor(tmp_path, monkeypatch):
    """Every row of every model is measured, and the targets are ratios of rounds."""
    for name, size in {"BATCH": 1, "TOKENS": 8, "WIDTH": 16, "DEPTH": 1, "HEADS": 2, "STEPS": 2}.items():
        monkeypatch.setattr(conversion, name, size)
    arguments = ["--parts", "conversion", "--label", "conversion", "--repeats", "2", "--threads", "1", "--seconds", "1"]
    bench.main([*arguments, "--output", str(tmp_path)])
    (result,) = load(tmp_path).values()
    cells = {cell.get("model", cell["part"]): cell for cell in result["cells"].values()}
    assert set(cells) == {*conversion.MODELS, "monitor"}
    assert set(cells["nn.TransformerEncoder"]["rows"]) == set(conversion.CONVERSIONS)
    assert all("seconds" in row for cell in cells.values() for row in cell["rows"].values())
    found = [t for t in targets.targets(result) if t.measured is not None]
    assert [t.needed for t in found] == [1.1, 1.1, 1.02]
    cell = cells["nn.TransformerEncoder"]["rows"]
    pairs = zip(cell[conversion.FROZEN]["seconds"], cell[conversion.PLAIN]["seconds"], strict=True)
    assert found[0].measured.low == min(a / b for a, b in pairs)
    tables = benchmark_tables(tmp_path)
    assert "converted, exponential clock" in tables["conversion_cpu_float32_conversion"]
    assert "GeneratorMonitor" in tables["monitor_cpu_float32_conversion"]


def test_positions(tmp_path, monkeypatch):
    """Every row is held to float64 and measured; the targets are ratios of rounds."""
    for name, size in {"BATCH": 1, "HEADS": 2, "TOKENS": 16, "WIDTH": 8}.items():
        monkeypatch.setattr(positions, name, size)
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)  # inductor takes a minute
    monkeypatch.setattr(positions, "SMALL", (1, positions.SMALL[1], 16, positions.SMALL[3]))
    arguments = ["--parts", "positions", "--label", "positions", "--repeats", "2", "--threads", "1", "--seconds", "1"]
    bench.main([*arguments, "--output", str(tmp_path)])
    (result,) = load(tmp_path).values()
    for kind in positions.KINDS:
        (cell,) = summary.find(result, part="rope", kind=kind)
        assert set(cell["rows"]) | set(cell["skipped"]) == set(positions.RIVALS)
        assert all(row["error"] < 1e-5 for name, row in cell["rows"].items() if name != positions.CHAIN)
    for part, rows in (("folded", positions.FOLDED), ("training", positions.TRAINED)):
        (cell,) = summary.find(result, part=part)
        assert set(cell["rows"]) == set(rows)
    assert all(len(row["seconds"]) == 2 for cell in result["cells"].values() for row in cell["rows"].values())
    found = [t for t in targets.targets(result) if t.measured is not None]
    others = len(positions.FOLDED) - 1
    assert [t.needed for t in found] == [1.3, 1.3, 1.0, 1.0, *[1.5] * others]
    tables = benchmark_tables(tmp_path)
    assert "rotary-embedding-torch" in tables["rope_cpu_float32_positions"]
    assert "ALiBi, training" in tables["encodings_cpu_float32_positions"]


def test_a_wrong_rotation_is_not_timed(monkeypatch):
    for name, size in {"BATCH": 1, "HEADS": 1, "TOKENS": 8, "WIDTH": 4}.items():
        monkeypatch.setattr(positions, name, size)
    row = positions.OURS[0]
    monkeypatch.setitem(positions.RIVALS, row, positions.RIVALS[positions.OURS[1]])
    found = positions.time_rope([row], "eager", 2, 1.0, "cpu", "float32")["rows"][row]
    assert found["failed"].startswith("off by")
    assert "seconds" not in found


def test_a_part_of_its_own_file(tmp_path):
    arguments = ["--parts", "optimizer", "--label", "step", "--repeats", "2", "--threads", "1", "--seconds", "1"]
    bench.main([*arguments, "--output", str(tmp_path)])
    (name, result), *others = load(tmp_path).items()
    assert (name, others) == ("cpu-float32-step", [])
    (cell,) = result["cells"].values()
    assert set(cell["rows"]) == {parts.PLAIN, parts.ON_MANIFOLD}
    assert all(len(row["seconds"]) == 2 for row in cell["rows"].values())
    tables = benchmark_tables(tmp_path)
    assert "not measured" not in tables["targets_cpu_float32_step"]
    assert "RoPE" not in tables["targets_cpu_float32_step"]
    assert "RiemannianAdamW, RateMatrices" in tables["optimizer_cpu_float32_step"]


def test_report_comes_from_json_alone(measured, tmp_path, monkeypatch):
    (name, result), *_ = load(measured).items()
    write_json(tmp_path / "benchmarks" / "results" / f"{name}.json", result)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a: pytest.fail("ran a method"))
    written = draw(tmp_path)
    assert {path.name for path in written} == {"table.md", "cpu-float32.png"}
    assert all(path.stat().st_size > 0 for path in written)
    text = written[0].read_text()
    assert BASE in text
    assert "not measured" in text  # N = 1024
    readme = tmp_path / "README.md"
    readme.write_text(
        "<!-- table: attention_cpu_float32 -->\n<!-- end of table -->\n<!-- table: no_such -->\n<!-- end of table -->\n"
    )
    assert fill_tables(readme, tmp_path)
    assert "| softmax, SDPA |" in readme.read_text()
    assert readme.read_text().endswith("<!-- table: no_such -->\n<!-- end of table -->\n")


def test_nothing_measured_nothing_reported(tmp_path):
    assert report(tmp_path) == []
    assert benchmark_tables(tmp_path) == {}


def _result():
    """N = 1024, 16384 and 32768, times in round numbers."""
    cells = {}
    for n, scale in ((1024, 1.0), (16384, 5.0), (32768, 10.0)):
        times = {
            BASE: 1.0,
            "exp, torch.matrix_exp": 100.0,
            "exp, Uniformization": 5.0,
            "exp low rank, closed form": 2.0,
        }
        rows = {name: {"seconds": [scale * t, 2 * scale * t]} for name, t in times.items()}
        facts = {"tokens": n, "heads": 1, "skipped": {}, "date": "2026-01-01", "code": "c"}
        cells[f"a{n}"] = facts | {"part": "attention", "phase": "forward_backward", "rows": rows}
        rows = {"exp, Uniformization": {"bytes": 600 * 2**20, "how": "VmHWM"}}
        cells[f"m{n}"] = facts | {"part": "memory", "phase": "forward", "rows": rows}
    rows = {"softmax": {"seconds": [1.0]}, "first hop + exponential clock": {"seconds": [1.1]}}
    cells["d"] = {"part": "decode", "context": 8, "rows": rows, "skipped": {}, "date": "2026-01-01"}
    return {"cells": cells}


def test_targets_compare_rounds_in_pairs():
    found = {target.what: target for target in targets.targets(_result())}
    exp = next(t for what, t in found.items() if "matrix_exp takes" in what and "1024" in what)
    assert (exp.measured, exp.by, exp.reached) == (summary.Spread(20.0, 20.0, 20.0), "exp, Uniformization", False)
    over = next(t for what, t in found.items() if "1024" in what and "over SDPA" in what)
    assert (over.measured.median, over.reached) == (5.0, False)
    memory = next(t for what, t in found.items() if what.startswith("fixed clock, N = 32768"))
    assert (memory.measured.median, memory.reached) == (600.0, False)
    low_rank = next(t for t in targets.targets(_result()) if t.by == "exp low rank, closed form")
    assert (low_rank.measured.median, low_rank.measured.low, low_rank.measured.high) == (2.0, 1.0, 4.0)
    assert low_rank.reached
    decode = next(t for t in targets.targets(_result()) if t.by == "first hop + exponential clock")
    assert decode.measured.median == pytest.approx(1 / 1.1)  # tokens a second, not seconds a token
    assert decode.reached
    assert sum(t.reached is None for t in targets.targets({"cells": {}})) == len(targets.targets({"cells": {}}))


def test_slope_is_the_power():
    assert summary.slope([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2.0)
    assert summary.slope([1], [3]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "atention"], "parts: expected one of attention, memory, .*, got atention; check the spelling"),
        (["--tokens", "64", "0"], r"tokens: expected more than 0, got \[64, 0\]; give"),
        (["--small-tokens", "-1"], "small_tokens: expected more than 0"),
        (["--repeats", "0"], "repeats: expected more than 0"),
        (["--width", "7"], "width: expected an even number, got 7"),
        (["--dtype", "int8"], "dtype: expected one of float32"),
        (["--device", "nowhere"], "device: expected one that this machine has, got 'nowhere'"),
    ],
)
def test_bad_arguments_are_named(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        bench.main([*arguments, "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_measurements_of_another_setting_do_not_mix(measured):
    with pytest.raises(
        ValueError, match=r"output: expected measurements with repeats 3, got .* with repeats 2; pass --fresh"
    ):
        bench.main([*ARGUMENTS, "--repeats", "3", "--output", str(measured)])


def test_fresh_drops_what_is_asked_for(tmp_path):
    setting = {"repeats": 2}
    path = tmp_path / "r.json"
    write_json(path, {"setting": setting, "cells": {"a": {}, "b": {}}})
    assert set(bench._stored(path, setting, set())["cells"]) == {"a", "b"}
    assert set(bench._stored(path, setting, {"a"})["cells"]) == {"b"}
    assert bench._stored(path, {"repeats": 3}, {"a"}) == {"setting": {"repeats": 3}, "cells": {}}


def test_the_command_ends_in_one_sentence(tmp_path):
    code = "import sys; from liegroup_attn.lightning.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "bench", "--parts", "none", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("liegroup-attn: ValueError: parts: expected one of")
    assert "Traceback" not in done.stderr


FOLDER = Path(__file__).parents[2] / "experiments" / "benchmarks" / "results"
RESULTS = [path for path in sorted(FOLDER.glob("cpu-*.json")) if '"part": "small"' in path.read_text()]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("question", "factor"), [(fit.HOPS, HOP_OVER_PRODUCT), (fit.SOLVE, SOLVE_OVER_HOP)], ids=["hops", "solve"]
)
def test_the_rule_of_choice_is_fitted_to_the_committed_measurements(path, question, factor):
    """The library's factor costs at most 2 % over the best one, and at most 5 % over knowing the faster method."""
    cells = json.loads(path.read_text())["cells"]
    least = fit.regret(cells, question, fit.best_factor(cells, question))
    assert fit.regret(cells, question, factor) <= min(1.02 * least, 1.05)
    # a rule that always takes the first costs more: the factor matters
    assert fit.regret(cells, question, 0.0 if question is fit.HOPS else float("inf")) > 1.05
