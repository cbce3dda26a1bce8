"""The comparison: configurations, result files, tables and figures, and the command itself on a few steps."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments import draw, tables
from experiments.compare import main as compare
from experiments.flops import flops_per_step
from experiments.results import EXPERIMENTS, ROOT, TITLES, Run, load_results, seeds_of, variants_of, write_json
from experiments.tune import choose
from liegroup_attn.lightning import LanguageModel, TokenClassifier

RUNS = [Run(e, v, b, 0) for e in EXPERIMENTS for v in variants_of(e) for b in ("quick", "full")]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.name}-{run.budget}")
def test_every_variant_differs_from_the_baseline_in_its_architecture_only(run):
    base = Run(run.experiment, "softmax", run.budget, 0).config()
    config = run.config()
    tuned = {"digits": ("learning_rate", "manifold_learning_rate"), "reachability": ("learning_rate",)}.get(
        run.experiment, ()
    )
    for part in (base, config):  # how long each was trained is tuned, too
        for key in ("max_steps", "val_check_interval") if run.experiment == "reachability" else ():
            part["trainer"].pop(key)
    for key in ("attention", "depth", "streams", *tuned):
        base["model"]["init_args"].pop(key, None)
        config["model"]["init_args"].pop(key, None)
    assert config == base
    assert run.variant in TITLES


@pytest.mark.parametrize("variant", variants_of("reachability"))
def test_each_variant_is_trained_as_validation_chose(variant):
    """The rule of ``experiments.tune`` on its committed runs, none of which has a seed that is tested."""
    tuning = json.loads((ROOT / "reachability" / "tuning.json").read_text())
    runs = [run for run in tuning["runs"] if run["variant"] == variant]
    assert not {run["seed"] for run in runs} & set(seeds_of("reachability", "full"))
    chosen, config = choose(runs), Run("reachability", variant, "full", 0).config()
    assert config["model"]["init_args"]["learning_rate"] == chosen["learning_rate"]
    assert config["trainer"]["max_steps"] == chosen["steps"]


def test_the_choice_is_the_shortest_as_good_as_the_best():
    def run(steps, rate, accuracy, loss=1.0):
        return {"steps": steps, "learning_rate": rate, "accuracy": accuracy, "loss": loss}

    runs = [run(100, 0.1, 0.5), run(200, 0.1, 0.9), run(200, 0.01, 0.8), run(400, 0.1, 0.901), run(400, 0.01, 0.7)]
    assert choose(runs) == runs[1]
    assert choose([*runs, run(800, 0.01, 0.91)])["steps"] == 800
    assert choose([run(100, 0.1, 1.0, 0.2), run(100, 0.2, 1.0, 0.1)])["learning_rate"] == 0.2


def test_hash_names_the_configuration_and_not_the_seed():
    run = Run("language", "exp", "quick", 0)
    assert run.config_hash() == Run("language", "exp", "quick", 1).config_hash()
    others = [
        Run("language", "softmax", "quick", 0),
        Run("language", "exp", "full", 0),
        Run("language", "exp", "quick", 0, (("trainer.precision", "bf16-mixed"),)),
    ]
    assert len({run.config_hash(), *(other.config_hash() for other in others)}) == 4


def _result(variant, seed, accuracy=0.5, config_hash="h"):
    depths = {f"{s}/accuracy_at_depth_{d:02d}": accuracy for s, n in (("test", 3), ("deeper", 6)) for d in range(n)}
    return {
        "experiment": "reachability",
        "variant": variant,
        "seed": seed,
        "config_hash": config_hash,
        "budget": "quick",
        "data": None,
        "config": {
            "model": {"init_args": {"depth": 1, "learning_rate": 0.01}},
            "trainer": {"max_steps": 3},
            "data": {},
        },
        "date": "2026-01-01",
        "steps": 3,
        "parameters": 1000,
        "flops_per_step": 2_000_000_000,
        "cpu_seconds": 4.0,
        "hardware": {"name": "a machine", "threads": 1, "precision": "32-true"},
        "versions": {"torch": "2"},
        "curve": [{"step": s, "validation/accuracy": accuracy * s / 3} for s in (1, 2, 3)],
        "test": {"time x1": {"test/accuracy": accuracy, "deeper/accuracy": accuracy / 2, **depths}},
        "mixing": {
            "tokens": [[0, 0], [1, 0], [2, 2]],
            "labels": [0, 0, 2],
            "depth": [0, 1, 0],
            "heads": [[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]],
        },
    }


def _write(output, *results):
    for result in results:
        write_json(output / "reachability" / "results" / f"{result['variant']}-seed{result['seed']}.json", result)


def test_table_gives_mean_and_sample_standard_deviation(tmp_path):
    _write(tmp_path, _result("exp", 0, 0.9), _result("exp", 1, 0.8), _result("softmax", 0, 0.5))
    table = tables.render_table("reachability", load_results(tmp_path, "reachability"))
    softmax, lie = [line.split("|")[1:-1] for line in table.splitlines()[2:4]]
    assert [cell.strip() for cell in lie[:7]] == ["exp(tQ)", "1", "1,000", "0.01", "3", "85.0 ± 7.1", "85.0 ± 7.1"]
    assert [cell.strip() for cell in softmax[:6]] == ["softmax", "1", "1,000", "0.01", "3", "50.0"]
    assert "seeds 0, 1" in table
    assert "a machine" in table
    assert "2026-01-01" in table


def test_figures_and_tables_come_from_json_alone(tmp_path, monkeypatch):
    _write(tmp_path, *(_result(v, s, 0.4 + 0.1 * s) for v in ("softmax", "exp") for s in (0, 1)))
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *a, **k: pytest.fail("drawing ran a model"))
    written = draw.draw(tmp_path)
    assert {path.name for path in written} == {
        "table.md",
        "curves.png",
        "accuracy_by_depth.png",
        "cost.png",
        "mixing.png",
    }
    assert all(path.stat().st_size > 0 for path in written)


def test_accuracy_at_depths_is_nan_where_nothing_was_measured():
    run = _result("exp", 0)
    del run["test"]["time x1"]["test/accuracy_at_depth_01"]
    found = tables.accuracy_at_depths(run, "test")
    assert found[0] == found[2] == 0.5
    assert math.isnan(found[1])


def test_results_of_several_configurations_do_not_mix(tmp_path):
    _write(tmp_path, _result("exp", 0), _result("exp", 1, config_hash="other"))
    with pytest.raises(ValueError, match="one configuration"):
        load_results(tmp_path, "reachability")


@pytest.mark.parametrize(
    "change",
    [
        {"budget": "full"},
        {"data": {"sha256": "other"}},
        {"config": {**_result("exp", 0)["config"], "trainer": {"precision": "bf16-mixed"}}},
    ],
)
def test_results_of_several_settings_do_not_stand_in_one_table(tmp_path, change):
    _write(tmp_path, _result("exp", 0), _result("softmax", 0) | change)
    with pytest.raises(ValueError, match="for all variants"):
        load_results(tmp_path, "reachability")


def test_nothing_half_written_is_taken_for_a_result(tmp_path):
    run = Run("reachability", "exp", "quick", 0)
    path = run.result_path(tmp_path)
    path.parent.mkdir(parents=True)
    path.with_suffix(".tmp").write_text("{")
    assert not run.finished(tmp_path)
    write_json(path, {"config_hash": "of another configuration"})
    assert not run.finished(tmp_path)
    write_json(path, {"config_hash": run.config_hash()})
    assert run.finished(tmp_path)


def test_every_marker_names_a_table_that_there_is():
    """One that names none would keep whatever stands there."""
    known = set(EXPERIMENTS) | set(tables.other_tables(ROOT))
    for readme in tables.readmes():
        named = set(re.findall(r"<!-- table: (\w+) -->", readme.read_text()))
        assert named <= known, f"{readme}: {named - known}"


@pytest.mark.parametrize("readme", tables.readmes(), ids=lambda path: str(path.relative_to(ROOT.parent)))
def test_tables_in_readmes_equal_the_committed_results(readme, tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(readme.read_text())
    assert "<!-- table:" in copy.read_text()
    assert not tables.fill_tables(copy, ROOT), "run liegroup-attn draw"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_committed_results_are_of_the_committed_configurations(experiment):
    results = load_results(ROOT, experiment)
    assert list(results) == variants_of(experiment)
    for variant, runs in results.items():
        assert [run["seed"] for run in runs] == [*seeds_of(experiment, "full")]
        for run in runs:
            assert run["config_hash"] == Run(experiment, variant, "full", run["seed"]).config_hash()


@pytest.mark.parametrize(
    ("depth", "expected"),
    # embedding tables cost nothing; per block 4 projections of C², a feed-forward layer of 8C², two N²C attention
    # products; head C·V; two operations a multiply-add; backward is twice forward (the first layer's input has one too)
    [
        (1, 3 * 2 * (2 * 16) * (12 * 8**2 + 2 * 16 * 8 + 8 * 256)),
        (2, 3 * 2 * (2 * 16) * (2 * (12 * 8**2 + 2 * 16 * 8) + 8 * 256)),
    ],
)
def test_flops_of_softmax_equal_the_count_by_hand(depth, expected):
    model = LanguageModel({"module": "SoftmaxAttention"}, width=8, depth=depth, num_heads=2)
    tokens = torch.zeros(2, 16, dtype=torch.long)
    assert flops_per_step(model, {"tokens": tokens, "targets": tokens}) == expected


def test_flops_see_matrix_exp_and_solves():
    batch = {"tokens": torch.zeros(2, 12, 2, dtype=torch.long), "labels": torch.zeros(2, 12, dtype=torch.long)}

    def count(**recipe):
        torch.manual_seed(0)
        return flops_per_step(TokenClassifier(recipe, vocab_size=5, width=8, num_heads=2), batch)

    softmax = count(module="SoftmaxAttention")
    exp = count(module="LieAttention", time=8.0, max_time=16.0)
    assert exp - softmax > 2 * 2 * (5 + 1) * 2 * 12**3  # at least the products of a forward matrix_exp
    assert count(module="LieAttention", clock="ExponentialClock", time=8.0, max_time=64.0) > softmax


def test_unknown_variant_says_which_there_are(tmp_path):
    with pytest.raises(ValueError, match="first_hop_exponential"):
        compare(["--variants", "sofmax", "--output", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_command_survives_a_stop_and_resumes(tmp_path, stop):
    """Interrupt once the first run is finished: it is kept, the rest is done by the same command, nothing twice."""
    command = [
        sys.executable,
        "-m",
        "experiments.compare",
        "--experiments",
        "reachability",
        "--variants",
        "softmax",
        "exp",
    ]
    command += ["--max-steps", "4", "--jobs", "1", "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    first = tmp_path / "out" / "reachability" / "results" / "exp-seed0.json"  # the long run goes first
    process = subprocess.Popen(
        command,
        cwd=ROOT.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    deadline = time.monotonic() + 300
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(stop)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "resumes" in output
    written = first.stat().st_mtime_ns
    again = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert "1 of 2 runs are finished already" in again.stdout
    assert first.stat().st_mtime_ns == written
    folder = tmp_path / "out" / "reachability"
    results = [json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))]
    assert [result["variant"] for result in results] == ["exp", "softmax"]
    assert [point["step"] for point in results[0]["curve"]] == [2, 4]
    assert set(results[0]["test"]) == {"time x1", "time x2", "time x4"}
    assert {path.name for path in (folder / "figures").iterdir()} == {
        "curves.png",
        "accuracy_by_depth.png",
        "cost.png",
        "mixing.png",
    }
    assert "| exp(tQ) |" in (folder / "table.md").read_text()


@pytest.mark.slow
def test_a_failing_run_is_named_and_the_others_finish(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "experiments.compare", "--experiments", "reachability", "--variants", "softmax"]
    command += ["--precision", "no-such", "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "reachability/softmax-seed0" in done.stdout + done.stderr
    assert not list(Path(tmp_path / "out").rglob("*.json"))


@pytest.mark.slow
def test_a_run_killed_half_way_ends_as_if_it_had_not_been(tmp_path):
    """SIGKILL after the first validation; the same command goes on from the checkpoint to the same curve and tests."""

    def command(name):
        parts = [sys.executable, "-m", "experiments.run", "--experiment", "reachability", "--variant", "exp"]
        parts += [
            "--budget",
            "quick",
            "--seed",
            "0",
            "--output",
            str(tmp_path / name),
            "--work",
            str(tmp_path / f"w{name}"),
        ]
        return [*parts, "--set", "trainer.max_steps", "60", "--set", "trainer.val_check_interval", "20"]

    def result(name):
        return json.loads((tmp_path / name / "reachability" / "results" / "exp-seed0.json").read_text())

    process = subprocess.Popen(command("killed"), cwd=ROOT.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(tmp_path.rglob("last.ckpt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert list(tmp_path.rglob("last.ckpt"))
    assert not list((tmp_path / "killed").rglob("*.json"))
    again = subprocess.run(command("killed"), cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert "Restored all states" in again.stdout + again.stderr
    subprocess.run(command("whole"), cwd=ROOT.parent, capture_output=True, check=True)
    for key in ("curve", "test", "steps", "config_hash", "mixing"):
        assert result("killed")[key] == result("whole")[key], key
    assert [point["step"] for point in result("whole")["curve"]] == [20, 40, 60]
