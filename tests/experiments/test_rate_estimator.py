"""Maximum likelihood: the likelihood itself, exact recovery without noise, the manifold kept, Lightning's roads."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import scipy.linalg
import torch
from lightning.pytorch.loggers import CSVLogger

from experiments.rate_recovery.counts import TransitionCounts, simulate_counts
from experiments.rate_recovery.model import RateEstimator, first_order_rates, negative_log_likelihood
from experiments.rate_recovery.paml import generator_from, read_generator
from liegroup_attn.algebra import is_rate_matrix, is_reversible
from liegroup_attn.errors import DtypeError, ShapeError
from liegroup_attn.generators import DenseGenerator
from liegroup_attn.lightning.cli import main
from liegroup_attn.manifolds import ManifoldParameter

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]
TIMES = [0.3, 1.0]
CYCLE = torch.tensor([[-1.0, 0.9, 0.1], [0.2, -1.0, 0.8], [1.1, 0.1, -1.2]], dtype=torch.float64)  # far from reversible


def reversible(n: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(n)
    s = torch.rand(n, n, generator=draw, dtype=torch.float64) + 0.1
    pi = torch.rand(n, generator=draw, dtype=torch.float64) + 0.2
    return generator_from((s + s.mT).fill_diagonal_(0), pi / pi.sum())


TRUTHS = {"cycle": CYCLE, "n = 3": reversible(3), "n = 4": reversible(4)}


def expected_counts(truth: torch.Tensor) -> torch.Tensor:
    """What infinitely many transitions have, from even starts: P(t) by SciPy."""
    return torch.stack([torch.from_numpy(scipy.linalg.expm(t * truth.numpy())) for t in TIMES]) / len(truth)


def data_of(tmp_path, counts: torch.Tensor, **options) -> TransitionCounts:
    np.savez(tmp_path / "counts.npz", counts=counts.numpy(), times=np.array(TIMES))
    return TransitionCounts(counts=str(tmp_path / "counts.npz"), **options)


def trained(model: RateEstimator, data: TransitionCounts, **options) -> L.Trainer:
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", **({"max_steps": 2000, "logger": False} | silent | options))
    trainer.fit(model, datamodule=data)
    return trainer


# the likelihood


def test_the_likelihood_is_that_of_the_transition_matrix():
    counts = simulate_counts(reversible(4), TIMES, 500, 0)
    P = np.stack([scipy.linalg.expm(t * TRUTHS["n = 4"].numpy()) for t in TIMES])
    golden = -(counts.numpy() * np.log(P)).sum() / 500
    found = negative_log_likelihood(reversible(4), counts, torch.tensor(TIMES, dtype=torch.float64))
    assert float(found) == pytest.approx(golden, rel=1e-12)


@pytest.mark.parametrize("truth", TRUTHS.values(), ids=TRUTHS)
def test_its_gradient_is_that_of_finite_differences(truth):
    counts, times = simulate_counts(truth, TIMES, 300, 1), torch.tensor(TIMES, dtype=torch.float64)
    off = ~torch.eye(len(truth), dtype=torch.bool)
    rates = torch.where(off, 1.3 * truth + 0.1, 1).requires_grad_()  # what stands on the diagonal drops out

    def loss(rates):
        return negative_log_likelihood(DenseGenerator.from_rates(rates).dense(), counts, times)

    assert torch.autograd.gradcheck(loss, rates)


def test_unseen_impossible_transitions_cost_nothing_and_seen_ones_everything():
    Q = torch.tensor([[-1.0, 1.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)  # no way back
    times = torch.tensor([1.0], dtype=torch.float64)
    loss = negative_log_likelihood(Q, torch.tensor([[[5.0, 5.0], [0.0, 9.0]]]).double(), times)
    loss.backward()
    assert bool(Q.grad.isfinite().all())
    assert float(negative_log_likelihood(Q, torch.ones(1, 2, 2).double(), times)) == float("inf")


def test_sizes_that_do_not_fit():
    with pytest.raises(ShapeError, match=r"expected \(T, n, n\) for T = 2 times and Q \(3, 3\), got \(1, 3, 3\)"):
        negative_log_likelihood(CYCLE, torch.ones(1, 3, 3), torch.ones(2))


# the start


def test_the_start_is_right_for_short_times():
    truth, short = reversible(4), torch.tensor([1e-6, 2e-6], dtype=torch.float64)
    P = torch.stack([torch.from_numpy(scipy.linalg.expm(float(t) * truth.numpy())) for t in short])
    torch.testing.assert_close(first_order_rates(1e12 * P, short), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("counts", [torch.zeros(2, 3, 3), torch.eye(3).expand(2, 3, 3)], ids=["none", "no jumps"])
@pytest.mark.parametrize("balanced", [False, True])
def test_the_start_is_a_point_of_the_manifold_whatever_the_counts(counts, balanced):
    start = first_order_rates(counts.double(), torch.tensor(TIMES).double(), reversible=balanced)
    assert is_rate_matrix(start) == (True, None)
    assert bool((start[~torch.eye(3, dtype=torch.bool)] > 0).all())
    assert not balanced or is_reversible(start)[0]


def test_the_start_of_the_reversible_family_is_reversible():
    counts = simulate_counts(CYCLE, TIMES, 1000, 0)
    assert not is_reversible(first_order_rates(counts, torch.tensor(TIMES).double()))[0]
    assert is_reversible(first_order_rates(counts, torch.tensor(TIMES).double(), reversible=True))[0]


# the estimate


@pytest.mark.parametrize("balanced", [False, True], ids=["RateMatrices", "ReversibleRateMatrices"])
@pytest.mark.parametrize("name", TRUTHS)
def test_without_noise_the_truth_is_found(name, balanced, tmp_path):
    if balanced and name == "cycle":
        return  # not in the family: the next test
    truth = TRUTHS[name]
    model = RateEstimator(len(truth), balanced, half_life=40, tolerance=1e-10)
    trained(model, data_of(tmp_path, expected_counts(truth)))
    torch.testing.assert_close(model.generator().detach(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("balanced", [False, True], ids=["RateMatrices", "ReversibleRateMatrices"])
@pytest.mark.parametrize("n", [20, 300])
def test_estimates_from_few_counts_stay_on_their_manifold(balanced, n, tmp_path):
    """With 20 transitions most pairs were never seen: the likelihood pushes their rates towards 0."""
    counts = simulate_counts(CYCLE, TIMES, n, 3)
    model = RateEstimator(3, balanced)
    trained(model, data_of(tmp_path, counts), max_steps=300)
    Q = model.generator().detach()
    assert is_rate_matrix(Q) == (True, None)
    assert bool((Q[~torch.eye(3, dtype=torch.bool)] > 0).all())
    assert is_reversible(Q)[0] or not balanced
    times = torch.tensor(TIMES, dtype=torch.float64)
    start = first_order_rates(counts, times, reversible=balanced)
    assert negative_log_likelihood(Q, counts, times) < negative_log_likelihood(start, counts, times)


def test_training_stops_by_itself(tmp_path):
    data = data_of(tmp_path, simulate_counts(CYCLE, TIMES, 10_000, 0))
    small, model = RateEstimator(3, half_life=40), RateEstimator(3, half_life=10, tolerance=0.0)
    steps = trained(small, data).global_step
    assert 0 < steps < 1000
    assert small.gradient_norm <= 1e-6
    assert trained(model, data).global_step == 200  # the learning rate halved twenty times


def test_a_checkpoint_has_the_estimate_on_its_manifold_and_plain_hyperparameters(tmp_path):
    data = data_of(tmp_path, simulate_counts(CYCLE, TIMES, 1000, 0))
    model = RateEstimator(3, reversible=True)
    trainer = trained(model, data, max_steps=5)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = RateEstimator.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(again.generator(), model.generator())
    assert isinstance(again.Q, ManifoldParameter)
    assert dict(again.hparams) == dict(model.hparams)


def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path):
    data = data_of(tmp_path, simulate_counts(CYCLE, TIMES, 1000, 0), steps=100)
    half, whole = RateEstimator(3), RateEstimator(3)
    trained(half, data, max_steps=7).save_checkpoint(tmp_path / "half.ckpt")
    trained(whole, data, max_steps=20)
    resumed = RateEstimator(3)
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", logger=False, max_steps=20, **silent)
    trainer.fit(resumed, datamodule=data, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert torch.equal(resumed.generator(), whole.generator())


def test_without_a_data_module_the_start_is_the_given_one(tmp_path):
    batch = {"counts": simulate_counts(CYCLE, TIMES, 1000, 0), "times": torch.tensor(TIMES, dtype=torch.float64)}
    model = RateEstimator(3)
    model.start_at(CYCLE)
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", logger=False, max_steps=1, **silent)
    trainer.fit(model, torch.utils.data.DataLoader([batch], batch_size=None))
    assert float((model.generator() / CYCLE).log().abs().max()) == pytest.approx(0.1, rel=0.5)  # one step


def test_bad_settings(tmp_path):
    data = data_of(tmp_path, simulate_counts(CYCLE, TIMES, 100, 0))
    with pytest.raises(ShapeError, match="num_states: expected the data's 3, got 20"):
        trained(RateEstimator(), data)
    with pytest.raises(DtypeError, match=r"Q: expected float64, got torch\.bfloat16"):
        trained(RateEstimator(3), data, precision="bf16-true")
    with pytest.raises(ValueError, match="num_states: expected at least 2, got 1"):
        RateEstimator(1)


# the command line


def test_the_command_line_estimates_from_a_file_of_the_user(tmp_path, monkeypatch, capfd):
    (tmp_path / "my.dat").write_text("1\n2 4\n.5 .25 .25\nthree states")
    monkeypatch.setattr(sys, "argv", ["liegroup-attn"])
    monkeypatch.chdir(tmp_path)
    model = ["--model", "experiments.rate_recovery.model.RateEstimator", "--model.num_states", "3"]
    data = [
        "--data",
        "experiments.rate_recovery.counts.TransitionCounts",
        "--data.path",
        "my.dat",
        "--data.transitions",
        "100000",
    ]
    trainer = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    main(["fit", *model, *data, *trainer, "--trainer.default_root_dir", "out"])
    (checkpoint,) = (tmp_path / "out").rglob("*.ckpt")
    main(["test", *model, *data, *trainer, "--ckpt_path", str(checkpoint), "--trainer.default_root_dir", "out"])
    shown = capfd.readouterr().out
    assert float(shown.split("test/error")[1].split()[0]) < 0.03
    estimate = RateEstimator.load_from_checkpoint(checkpoint, weights_only=True).generator()
    assert is_rate_matrix(estimate.detach()) == (True, None)


def test_the_estimate_is_written_beside_the_logs(tmp_path):
    model = RateEstimator(num_states=3)
    trainer = trained(model, data_of(tmp_path, 1e4 * expected_counts(CYCLE)), logger=CSVLogger(tmp_path), max_steps=5)
    written = read_generator(Path(trainer.log_dir) / "generator.txt")
    torch.testing.assert_close(written, model.Q.detach(), atol=1e-8, rtol=1e-8)
