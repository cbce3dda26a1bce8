"""The fine-tuning at a size that takes seconds: JSON, resumption, table, figures; and the committed results."""

from __future__ import annotations

import json

import pytest

from experiments.fine_tune import report, run
from experiments.results import ROOT

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fine_tune")
    (folder / "corpus.txt").write_text("the cat sat on the mat, and the dog sat on the cat. " * 400)
    patch = pytest.MonkeyPatch()
    patch.setattr(run, "SIZES", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16})
    patch.setattr(run, "SHOWN", 12)
    arguments = ["--corpus", str(folder / "corpus.txt"), "--pretrain-steps", "4", "--steps", "8", "--seeds", "0"]
    run.main([*arguments, "--output", str(folder / "out")])
    yield folder, arguments
    patch.undo()


def test_json_holds_what_was_measured(tuned):
    folder, _ = tuned
    results = report.load(folder / "out")
    assert list(results) == list(report.VARIANTS)
    for variant, (one,) in results.items():
        assert one["validation"][0] == results["softmax"][0]["validation"][0]  # all start from the same outputs
        assert [step for step, _ in one["validation"]] == [0, 2, 4, 6, 8]
        assert set(one["data"]) >= {"sha256", "source"}
        assert len(one["times"]) == 2
        watched = {name.rpartition("/")[2] for name in one["monitor"]}
        assert watched == (set() if variant == "softmax" else set(run.NUMBERS))
        assert (one["matrices"] is None) == (variant == "softmax")
    flows = results["fixed_lie"][0]["parameters"]
    assert flows == 2 * (2 + 2 * 8 + 2)  # two layers: times, rate weights, rate biases
    assert results["fixed"][0]["parameters"] == results["softmax"][0]["parameters"] + flows


def test_the_same_command_again_trains_nothing(tuned, monkeypatch):
    folder, arguments = tuned
    monkeypatch.setattr(run, "_train", lambda *a, **k: pytest.fail("trained again"))
    run.main([*arguments, "--output", str(folder / "out")])
    with pytest.raises(ValueError, match="with another; delete it"):
        run.main([*arguments[:-4], "--steps", "5", "--seeds", "0", "--output", str(folder / "out")])


def test_table_and_figures(tuned):
    folder, _ = tuned
    written = {path.name: path for path in report.report(folder / "out")}
    assert {
        "table.md",
        "curves.png",
        "monitor.png",
        "times.png",
        "matrices_fixed.png",
        "matrices_exponential.png",
    } == set(written)
    assert all(path.stat().st_size > 1000 for path in written.values() if path.suffix == ".png")
    table = written["table.md"].read_text()
    assert sum(line.startswith("|") for line in table.splitlines()) == 2 + len(report.VARIANTS)
    path = folder / "out" / "fine_tune" / "results" / "fixed-seed0.json"
    other = json.loads(path.read_text())
    other["setting"]["steps"] = 99
    (path.parent / "fixed-seed1.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="one setting"):
        report.load(folder / "out")
    (path.parent / "fixed-seed1.json").unlink()


def test_the_committed_results():
    results = report.load(ROOT)
    assert list(results) == list(report.VARIANTS)
    assert all([run["seed"] for run in runs] == [0, 1, 2] for runs in results.values())
    starts = [[run["validation"][0][1] for run in runs] for runs in results.values()]
    assert all(start == pytest.approx(starts[0], abs=1e-5) for start in starts)
