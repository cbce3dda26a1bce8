"""The fine-tuning at a size that takes seconds: JSON, resumption, table, figures; and the committed results."""

from __future__ import annotations

import json

import pytest

from experiments.fine_tune import report, run, tasks
from experiments.results import ROOT

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fine_tune")
    (folder / "corpus.txt").write_text("the cat sat on the mat, and the dog sat on the cat. " * 400)
    patch = pytest.MonkeyPatch()
    patch.setattr(tasks, "GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16})
    patch.setattr(tasks, "NODES", {"num_nodes": 8, "max_depth": 3, "deep_nodes": 9, "deep_depth": 4})
    patch.setattr(run, "SHOWN", 8)
    arguments = ["--corpus", str(folder / "corpus.txt"), "--pretrain-steps", "4", "--steps", "8", "--seeds", "0"]
    run.main([*arguments, "--output", str(folder / "out")])
    yield folder, arguments
    patch.undo()


@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_json_holds_what_was_measured(tuned, task):
    folder, _ = tuned
    results = report.load(folder / "out", task)
    assert list(results) == list(report.VARIANTS)
    layers = {"text": 2, "forests": 1}[task]
    for variant, (one,) in results.items():
        assert one["validation"][0] == results["softmax"][0]["validation"][0]  # all start from the same outputs
        assert [step for step, _ in one["validation"]] == [0, 2, 4, 6, 8]
        assert ("test_accuracy" in one) == (task == "forests")
        assert ("sha256" in one["setting"]) == (task == "text")
        assert len(one["times"]) == layers
        watched = {name.rpartition("/")[2] for name in one["monitor"]}
        assert watched == set(run.NUMBERS) or (variant == "softmax" and not watched)
        assert (one["matrices"] is None) == (variant == "softmax")
    flows = {"text": 2 * (2 + 2 * 8 + 2), "forests": 4 + 4 * 16 + 4}[task]  # times, rate weights, rate biases
    assert results["fixed_lie"][0]["parameters"] == flows
    assert results["fixed"][0]["parameters"] == results["softmax"][0]["parameters"] + flows


def test_the_same_command_again_trains_nothing(tuned, monkeypatch):
    folder, arguments = tuned
    monkeypatch.setattr(run, "_train", lambda *a, **k: pytest.fail("trained again"))
    run.main([*arguments, "--output", str(folder / "out")])
    with pytest.raises(ValueError, match=r"with another .*; delete it"):
        run.main([*arguments[:-4], "--steps", "5", "--seeds", "0", "--output", str(folder / "out")])
    other = folder / "other.txt"
    other.write_text("something else altogether, and again. " * 600)
    with pytest.raises(
        ValueError, match=r"with another .*; delete it"
    ):  # another corpus under the same name would be, too
        run.main(["--corpus", str(other), *arguments[2:], "--output", str(folder / "out")])


def test_table_and_figures(tuned):
    folder, _ = tuned
    written = {path.name: path for path in report.report(folder / "out")}
    kinds = ("curves", "monitor", "times", "matrices_fixed", "matrices_exponential")
    assert set(written) == {"table.md", *(f"{task}_{kind}.png" for task in tasks.TASKS for kind in kinds)}
    assert all(path.stat().st_size > 1000 for path in written.values() if path.suffix == ".png")
    table = written["table.md"].read_text()
    assert sum(line.startswith("|") for line in table.splitlines()) == len(tasks.TASKS) * (2 + len(report.VARIANTS))
    path = folder / "out" / "fine_tune" / "results" / "text-fixed-seed0.json"
    other = json.loads(path.read_text())
    other["setting"]["steps"] = 99
    (path.parent / "text-fixed-seed1.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="one setting"):
        report.load(folder / "out", "text")
    (path.parent / "text-fixed-seed1.json").unlink()


@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_the_committed_results(task):
    results = report.load(ROOT, task)
    assert list(results) == list(report.VARIANTS)
    assert all([run["seed"] for run in runs] == [0, 1, 2] for runs in results.values())
    starts = [[run["validation"][0][1] for run in runs] for runs in results.values()]
    assert all(start == pytest.approx(starts[0], abs=1e-5) for start in starts)
