"""The recovery on three states: estimators, bound, JSON, resumption, report; and the committed results."""

import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from experiments import draw, tables
from experiments.rate_recovery import estimators, report, run
from experiments.rate_recovery.bound import directions, relative_bound
from experiments.rate_recovery.counts import TransitionCounts
from experiments.rate_recovery.estimators import ESTIMATORS, Found
from experiments.rate_recovery.paml import generator_from, read_generator
from experiments.results import ROOT
from liegroup_attn.algebra import is_rate_matrix, is_reversible

S = torch.tensor([[0.0, 1, 2], [1, 0, 4], [2, 4, 0]], dtype=torch.float64)
PI = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
Q = generator_from(S, PI)
TEXT = "1\n2 4\n.5 .25 .25\n"
SEEDS, SIZES, TIMES = (0, 1), (40, 4000), (0.2, 1.0)


def arguments(folder, *, seeds=SEEDS, times=TIMES):
    (folder / "three.dat").write_text(TEXT)
    words = ["--q-file", folder / "three.dat", "--output", folder / "out", "--transitions", *SIZES]
    return [str(word) for word in (*words, "--seeds", *seeds, "--times", *times)]


@pytest.fixture(scope="module")
def recovered(tmp_path_factory):
    """A folder with the results of two seeds."""
    folder = tmp_path_factory.mktemp("recovery")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimators, "MOST_STEPS", 50)
        run.main(arguments(folder))
    return folder


@pytest.fixture
def hasty(monkeypatch):
    """Not to the maximum: where it does not matter what exactly was estimated."""
    monkeypatch.setattr(estimators, "MOST_STEPS", 50)


def data_of(folder, counts):
    (folder / "three.dat").write_text(TEXT)
    data = TransitionCounts(str(folder / "three.dat"), times=TIMES)
    data.setup()
    data.counts = counts
    return data


def transition_matrices():
    return torch.stack([torch.from_numpy(scipy.linalg.expm(t * Q.numpy())) for t in TIMES])


# estimators


@pytest.mark.parametrize("name", ESTIMATORS)
def test_without_noise_every_estimator_finds_the_truth(name, tmp_path):
    found = ESTIMATORS[name](data_of(tmp_path, PI[:, None] * transition_matrices()))
    close = 1e-9 if name in ("logarithm", "projected") else 1e-4  # where the default tolerance stops the likelihood
    torch.testing.assert_close(found.generator, Q, atol=close, rtol=close)


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "logarithm"])
@pytest.mark.parametrize("size", [40, 4000])
def test_all_but_the_logarithm_give_rate_matrices(name, size, tmp_path, hasty):
    (tmp_path / "three.dat").write_text(TEXT)
    found = ESTIMATORS[name](TransitionCounts(str(tmp_path / "three.dat"), times=TIMES, transitions=size, seed=5))
    assert is_rate_matrix(found.generator) == (True, None)
    assert is_reversible(found.generator)[0] or name != "reversible"


def test_the_manifold_and_the_control_find_the_same_maximum(tmp_path):
    (tmp_path / "three.dat").write_text(TEXT)
    data = TransitionCounts(str(tmp_path / "three.dat"), times=TIMES, transitions=4000)
    found = [ESTIMATORS[name](data) for name in ("likelihood", "softplus")]
    assert all(one.facts["converged"] for one in found)
    torch.testing.assert_close(found[0].generator, found[1].generator, atol=1e-3, rtol=1e-3)


def test_times_without_a_logarithm_are_left_out_and_named(tmp_path):
    flip = torch.tensor([[0.1, 0.9, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)  # eigenvalue −0.8
    empty = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    good = transition_matrices()[1]
    one = ESTIMATORS["logarithm"](data_of(tmp_path, torch.stack([flip, good])))
    assert one.facts["exists"] == [False, True]
    assert "negative real axis" in one.facts["problems"][0]
    torch.testing.assert_close(one.generator, Q, atol=1e-9, rtol=1e-9)
    none = ESTIMATORS["projected"](data_of(tmp_path, torch.stack([flip, empty])))
    assert none.generator is None
    assert none.facts["exists"] == [False, False]


def test_a_logarithm_outside_the_cone_is_said_to_be_there(tmp_path):
    step = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.9, 0.1], [0.0, 0.0, 1.0]], dtype=torch.float64)
    found = ESTIMATORS["logarithm"](data_of(tmp_path, torch.stack([step, step])))
    assert (found.facts["in_cone"], found.facts["times_in_cone"], found.facts["negative_rates"]) == (False, 0, 1)
    assert run.excess(found.generator, Q, list(TIMES)) is None


# measures


def test_the_bound_is_the_delta_method_of_the_logarithm():
    """At one time the frequencies are efficient and P is free, so the bound is the spread of log P̂ to first order."""
    t, n = 0.7, 3
    P = scipy.linalg.expm(t * Q.numpy())
    slope, step = np.zeros((9, 9)), 1e-6  # of log P / t by the entries of P
    for k in range(9):
        change = np.zeros(9)
        change[k] = step
        ahead, behind = (scipy.linalg.logm(P + sign * change.reshape(n, n)) for sign in (1, -1))
        slope[:, k] = ((ahead - behind) / (2 * step * t)).ravel()
    spread = scipy.linalg.block_diag(*((np.diag(p) - np.outer(p, p)) / w for p, w in zip(P, PI.numpy(), strict=True)))
    golden = math.sqrt(np.trace(slope @ spread @ slope.T)) / np.linalg.norm(Q.numpy())
    assert relative_bound(Q, [t], reversible=False) == pytest.approx(golden, rel=1e-6)
    assert 0.3 * golden < relative_bound(Q, [t], reversible=True) < golden


def test_directions_span_the_families():
    for reversible, dimension in ((False, 6), (True, 5)):
        tangents = directions(Q, reversible=reversible)
        assert float(tangents.sum(-1).abs().max()) < 1e-12
        assert int(torch.linalg.matrix_rank(tangents.flatten(1))) == dimension

    def family(log_s, log_pi):
        return generator_from(torch.zeros_like(S) + (S * log_s.exp()), log_pi.exp(), normalize=False)

    by_s, by_pi = S.clamp_min(1e-9).log() * 0, PI.log()
    change = torch.zeros_like(S)
    change[0, 1] = change[1, 0] = 1e-6
    scale = Q[0, 1] / (S * PI)[0, 1]
    tangents = directions(Q, reversible=True)
    ahead, behind = family(by_s + change, by_pi), family(by_s - change, by_pi)
    torch.testing.assert_close(scale * (ahead - behind) / 2e-6, tangents[0], atol=1e-8, rtol=1e-6)


def test_excess_is_the_divergence():
    other = generator_from(S.sqrt(), PI)
    P, R = (np.stack([scipy.linalg.expm(t * M.numpy()) for t in TIMES]) for M in (Q, other))
    golden = (PI.numpy()[:, None] * P * np.log(P / R)).sum((1, 2)).mean()
    assert run.excess(other, Q, list(TIMES)) == pytest.approx(golden, rel=1e-4)
    assert run.excess(Q, Q, list(TIMES)) == 0
    assert run.relative_error(2 * Q, Q) == pytest.approx(1)


# the command


def test_json_holds_every_cell_and_what_made_it(recovered):
    results = report.load(recovered / "out")
    assert [result["seed"] for result in results] == list(SEEDS)
    for result in results:
        assert {"setting", "date", "hardware", "versions", "code"} <= set(result)
        assert result["setting"]["times"] == list(TIMES)
        cells = {(cell["transitions"], cell["estimator"]) for cell in result["cells"]}
        assert cells == {(size, name) for size in SIZES for name in ESTIMATORS}
    assert results[0]["cells"] != results[1]["cells"]


def test_the_same_command_again_does_nothing_twice(recovered, monkeypatch, capsys):
    files = {path: path.stat().st_mtime_ns for path in (recovered / "out").rglob("*.json")}
    monkeypatch.setattr(run, "_run", lambda *a: pytest.fail("estimated again"))
    run.main(arguments(recovered))
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert "2 of 2 seeds are finished already" in " ".join(capsys.readouterr().out.split())


def test_a_stop_keeps_finished_seeds_and_others_are_added(tmp_path, monkeypatch, hasty):
    run.main(arguments(tmp_path, seeds=[1]))
    first = (tmp_path / "out" / "rate_recovery" / "results" / "seed1.json").read_text()

    def stop(data):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(ESTIMATORS, "likelihood", stop)
        with pytest.raises(SystemExit) as left:
            run.main(arguments(tmp_path))
    assert left.value.code == 130
    run.main(arguments(tmp_path))
    assert [result["seed"] for result in report.load(tmp_path / "out")] == [0, 1]
    assert (tmp_path / "out" / "rate_recovery" / "results" / "seed1.json").read_text() == first


def test_another_setting_does_not_mix(recovered):
    with pytest.raises(ValueError, match=r"this command's setting, .*\(times\); delete it"):
        run.main(arguments(recovered, times=(0.5,)))
    with pytest.raises(ValueError, match="seeds, transitions: expected"):
        run.main(arguments(recovered, seeds=[-1]))
    with pytest.raises(FileNotFoundError, match="expected a file of rates"):
        run.main(["--q-file", str(recovered / "nowhere.dat")])


def test_report_comes_from_json_alone(recovered, monkeypatch):
    for name in ESTIMATORS:
        monkeypatch.setitem(ESTIMATORS, name, lambda data: pytest.fail("drawing estimated"))
    written = draw.draw(recovered / "out")
    assert {path.name for path in written} == {"table.md", "recovery.png"}
    assert all(path.stat().st_size > 0 for path in written)
    table = report.recovery_tables(recovered / "out")["rate_recovery"]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| maximum")]
    errors = report.values(report.load(recovered / "out"), "reversible", SIZES[1], "error")
    assert rows[0][2].strip().startswith(f"{100 * sum(errors) / 2:.3g}"[:3])


def test_an_estimator_without_a_result_is_counted(monkeypatch, tmp_path, hasty):
    facts = {"exists": [False, False], "in_cone": False, "negative_rates": 0}
    for name in ("logarithm", "projected"):
        monkeypatch.setitem(ESTIMATORS, name, lambda data: Found(None, facts))
    run.main(arguments(tmp_path, seeds=[0]))
    assert "| matrix logarithm | – | – |" in report.recovery_tables(tmp_path / "out")["rate_recovery"]


# what is committed


def test_the_committed_generator_is_a_rate_file_of_twenty_states():
    truth = read_generator(run.TRUTH)
    assert truth.shape == (20, 20)
    assert is_rate_matrix(truth) == (True, None)
    assert is_reversible(truth)[0]


def test_committed_results_are_of_the_committed_generator_and_stand_in_the_readme():
    results = report.load(ROOT)
    assert len(results) >= 10
    setting = run._setting(run._parse([]))
    assert results[0]["setting"] == setting
    readme = (ROOT / report.FOLDER / "README.md").read_text()
    for name, table in report.recovery_tables(ROOT).items():
        assert f"<!-- table: {name} -->\n{table}<!-- end of table -->" in readme
    assert ROOT / report.FOLDER / "README.md" in tables.readmes()
    assert json.loads((ROOT / report.FOLDER / "results" / "seed0.json").read_text()) == results[0]
