"""Each method against the golden reference at its own knobs, and the rule by which one is chosen."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.linalg
import torch
from cases import CLOCKS, METHODS, Combination, golden_chain, problem

import liegroup_attn as la
from liegroup_attn.expm import Automatic
from liegroup_attn.expm.base import Method, per_row, working_dtype


def _chain(n=8, dtype=torch.float64, **knobs):
    q, k = 2 * torch.randn(2, 2, n, 4, dtype=torch.float64)
    return la.SoftmaxGenerator(q.to(dtype), k.to(dtype), **knobs)


def test_every_method_is_in_the_table():
    def leaves(base):
        found = base.__subclasses__()
        return {leaf for sub in found for leaf in leaves(sub)} if found else {base}

    assert leaves(Method) <= {type(row.method) for row in METHODS.values()} | {Automatic}


@pytest.mark.parametrize("tol", [0.1, 1e-3, 1e-6, 1e-12])
@pytest.mark.parametrize("clock", list(CLOCKS))
@pytest.mark.parametrize("time", [0.5, 6.0])
def test_uniformization_reaches_its_tolerance(tol, clock, time):
    generator, value = _chain(), torch.randn(2, 8, 3, dtype=torch.float64)
    ours = la.expm_multiply(generator, value, time, clock=CLOCKS[clock].clock, method=la.Uniformization(tol))
    exact = CLOCKS[clock].golden(time * generator.dense().numpy()) @ value.numpy()
    oscillation = np.ptp(value.numpy(), axis=-2).max()
    assert np.abs(ours.numpy() - exact).max() <= tol * oscillation + 1e-13


@pytest.mark.parametrize("terms", [1, 2, 7, 40])
@pytest.mark.parametrize("clock", list(CLOCKS))
def test_rows_sum_to_one_however_few_the_terms(terms, clock):
    ones = torch.ones(2, 8, 1, dtype=torch.float64)
    method = la.Uniformization(max_terms=terms)
    for time in (0.0, 0.3, 30.0, 1e6):
        out = la.expm_multiply(_chain(), ones, time, clock=CLOCKS[clock].clock, method=method)
        torch.testing.assert_close(out, ones, rtol=0, atol=1e-14)


def test_max_terms_alone_is_taken_as_it_is():
    """exp(tQ) with one term is E[P^min(n, 1)] = e^{−t}I + (1 − e^{−t})P, and no tolerance is asked for."""
    generator, value = _chain(), torch.randn(2, 8, 3, dtype=torch.float64)
    ours = la.expm_multiply(generator, value, 3.0, method=la.Uniformization(max_terms=1))
    hop = generator.jump(value)
    torch.testing.assert_close(ours, np.exp(-3.0) * value + (1 - np.exp(-3.0)) * hop)


def test_max_terms_is_enough_when_it_allows_the_tolerance():
    generator, value = _chain(), torch.randn(2, 8, 3, dtype=torch.float64)
    exact = la.Uniformization(tol=1e-6, max_terms=12)  # MATHEMATICS §3: θ = 2 takes 12
    assert torch.equal(
        la.expm_multiply(generator, value, 2.0, method=exact),
        la.expm_multiply(generator, value, 2.0, method=la.Uniformization(tol=1e-6)),
    )


def test_hops_are_counted_as_the_clock_says():
    """K hops cost K applications of Q, and none at time 0."""
    generator, value, calls = _chain(), torch.randn(2, 8, 3, dtype=torch.float64), []
    apply = generator.apply
    generator.apply = lambda v: calls.append(1) or apply(v)
    la.expm_multiply(generator, value, 2.0, method=la.Uniformization(tol=1e-3))
    assert len(calls) == la.FixedClock().terms(2.0, 1e-3) == 8


@pytest.mark.parametrize("mask", [{}, {"is_causal": True}])
def test_uniformization_forms_no_matrix(mask, monkeypatch):
    def formed(self, *args):
        raise AssertionError("an N×N matrix was formed")

    for name in ("dense", "jump_chain", "scores"):
        monkeypatch.setattr(la.SoftmaxGenerator, name, formed)
    q = torch.randn(1, 2, 80, 4)
    for knobs in ({}, {"first_hop": True}, {"time": torch.rand(80)}):
        assert la.lie_attention(q, q, q, **mask, **knobs, method=la.Uniformization()).shape == q.shape


def test_matrix_exp_of_one_matrix_is_as_exact_as_of_two():
    """torch's single-matrix path is less exact (pytorch #196592); ours takes the batched one."""
    for n, t in ((2, 0.05), (8, 0.5), (32, 8.0), (64, 60.0)):  # 1e-11 off at the first
        rates = torch.rand(n, n, dtype=torch.float64).fill_diagonal_(0)
        one = la.DenseGenerator.from_rates(rates / n)
        two = la.DenseGenerator.from_rates((rates / n).expand(2, n, n))
        single, double = la.transition_matrix(one, t), la.transition_matrix(two, t)
        torch.testing.assert_close(single, double[0], rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(single, scipy.linalg.expm(t * one.dense().numpy()), rtol=1e-11, atol=1e-14)


def test_a_sink_column_costs_no_accuracy():
    """MATHEMATICS §3: n = 256, θ = 8, float32: 4e-6 on the transpose, 8e-4 without."""
    n, theta = 256, 8.0
    rates = torch.full((n, n), 1e-3 / n, dtype=torch.float64)
    rates[:, 0] = 1.0
    generator = la.DenseGenerator.from_rates(rates.float())
    exact = rates * (1 - torch.eye(n, dtype=torch.float64))
    exact = exact - torch.diag(exact.sum(-1))
    error = la.transition_matrix(generator, theta) - torch.tensor(scipy.linalg.expm(theta * exact.numpy()))
    assert error.abs().max() < 4e-6


def test_triangular_solve_is_forward_substitution_by_hand():
    """Uniform causal attention over two tokens, t = 1: row 1 of (I − Q)⁻¹ is (1/3, 2/3)."""
    q = torch.zeros(2, 4, dtype=torch.float64)
    generator = la.SoftmaxGenerator(q, q, is_causal=True)
    mixing = la.expm_multiply(
        generator, torch.eye(2, dtype=torch.float64), clock=la.ExponentialClock(), method=la.TriangularSolve()
    )
    torch.testing.assert_close(mixing, torch.tensor([[1, 0], [1 / 3, 2 / 3]], dtype=torch.float64))


@pytest.mark.parametrize("time", [1e-4, 1.0, 1e3, 1e6])
def test_triangular_solve_at_every_time(time):
    p = problem(Combination("exponential", False, "triangular", "causal"), 24, time=time)
    np.testing.assert_allclose(p.solve(), p.golden(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "low rank"])  # that has its own generator
def test_values_that_broadcast_against_the_generator(method):
    """One value for every head, and one generator for every item."""
    clock = "fixed" if method == "squaring" else "exponential"
    generator = _chain(is_causal=True)
    _, q = golden_chain(generator.query, generator.key, is_causal=True)
    mixing = CLOCKS[clock].golden(0.9 * q)
    for shape in ((2, 8, 3), (5, 2, 8, 3)):
        value = torch.randn(shape, dtype=torch.float64)
        ours = la.expm_multiply(generator, value, 0.9, clock=CLOCKS[clock].clock, method=METHODS[method].method)
        np.testing.assert_allclose(ours, mixing @ value.numpy(), atol=1e-10)


def test_methods_say_their_knobs():
    assert repr(la.Uniformization(tol=0.5, max_terms=3)) == "Uniformization(tol=0.5, max_terms=3)"
    assert repr(la.MatrixExp()) == "MatrixExp()"


def test_iterates_are_kept_in_float32_at_least():
    for dtype, kept in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert working_dtype(torch.zeros(1, dtype=dtype)) == kept


def test_a_time_per_row_is_told_from_one_per_head():
    assert [per_row(torch.ones(s)) for s in ((), (1,), (2, 1), (5,), (2, 5))] == [False, False, False, True, True]


# --- the choice -----------------------------------------------------------------------------------------------

HOPS = la.Uniformization


class Choice(NamedTuple):
    """One call and the method that must serve it."""

    method: type
    clock: Any = None
    time: float = 1.0
    shape: tuple = (1, 2, 96, 16)
    causal: bool = False
    rows: bool = False
    dense: bool = False
    formed: bool = False  # of Uniformization
    streams: bool = False
    tol: float | None = None


EXP, ERLANG = la.ExponentialClock(), la.ErlangClock(3)
CHOICES = {
    "middle N": Choice(HOPS, formed=True),
    "large N": Choice(HOPS, shape=(1, 2, 8192, 1)),
    "causal": Choice(la.CausalSweep, causal=True),
    "causal, large N": Choice(la.CausalSweep, causal=True, shape=(1, 2, 8192, 1)),
    "small N, hops to the rounding unit": Choice(la.ScalingSquaring, time=8.0, shape=(1, 2, 24, 16)),
    "small N, hops to a tolerance": Choice(HOPS, time=8.0, shape=(1, 2, 24, 16), formed=True, tol=1e-3),
    "small N, many hops": Choice(la.ScalingSquaring, time=40.0, shape=(1, 2, 24, 16)),
    "small N, many hops, causal": Choice(la.ScalingSquaring, time=40.0, shape=(1, 2, 24, 16), causal=True),
    "causal layer, many hops": Choice(la.CausalSweep, time=40.0, shape=(1, 2, 24, 16), causal=True, streams=True),
    "very many hops": Choice(la.ScalingSquaring, time=1e30),
    "exponential, causal": Choice(la.CausalSweep, EXP, causal=True),
    "Erlang, causal": Choice(la.CausalSweep, ERLANG, causal=True, shape=(1, 2, 8192, 1)),
    "exponential, long, causal": Choice(la.CausalSweep, EXP, 1e30, causal=True),
    "exponential, short": Choice(HOPS, EXP, 0.1, formed=True),
    "exponential, long": Choice(la.MatrixExp, EXP, 1e30),
    "exponential, dense": Choice(la.MatrixExp, EXP, 1e3, dense=True),
    "exponential, dense, causal": Choice(la.TriangularSolve, EXP, dense=True, causal=True),
    "one time per row": Choice(HOPS, time=200.0, rows=True, formed=True),
    "one time per row, causal": Choice(la.CausalSweep, time=2.0, rows=True, causal=True),
    "exponential, one time per row, causal": Choice(HOPS, EXP, rows=True, causal=True, formed=True),
    "dense, large": Choice(HOPS, dense=True, formed=True),
}


def _choose(row, **changes):
    row = row._replace(**changes)
    b, h, n, d = row.shape
    value = torch.empty(b, h, n, d)
    generator = la.SoftmaxGenerator(torch.randn(b, h, n, 1), torch.randn(b, h, n, 1), is_causal=row.causal)
    if row.dense:
        generator = la.DenseGenerator.from_rates(generator.jump_chain())
        generator.is_causal = row.causal
    time = torch.full((n,), row.time) if row.rows else torch.tensor(row.time)
    return Automatic(row.tol, streams=row.streams).choose(generator, value, time, row.clock or la.FixedClock())


@pytest.mark.parametrize("name", CHOICES)
def test_choice(name):
    chosen = _choose(CHOICES[name])
    assert type(chosen) is CHOICES[name].method
    assert getattr(chosen, "formed", False) == CHOICES[name].formed


def test_a_known_longest_time_fixes_the_number_of_hops():
    """K is 8 for θ = 2 and tail 1e-3 (MATHEMATICS §3), whatever the times of the call."""
    for causal in (False, True):
        q = torch.randn(1, 2, 512, 4)
        generator = la.SoftmaxGenerator(q, q, is_causal=causal)
        chosen = Automatic(1e-3, longest=2.0).choose(generator, q, torch.tensor(0.1), la.FixedClock())
        assert chosen.max_terms == 8


def test_dropout_is_drawn_anew_in_each_hop():
    q = torch.randn(1, 2, 96, 16)
    generator = la.SoftmaxGenerator(q, q, dropout_p=0.1, is_causal=True)
    chosen = Automatic().choose(generator, q, torch.tensor(0.1), la.FixedClock())
    assert type(chosen) is HOPS
    assert not chosen.formed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("time", [2.0, torch.tensor(2.0)])
def test_the_default_is_as_exact_as_its_dtype(dtype, time, monkeypatch):
    """K of the default method reaches the rounding unit of the input (1e-3 for half precision)."""
    tolerances = []
    terms = la.FixedClock.terms
    monkeypatch.setattr(
        la.FixedClock, "terms", lambda self, theta, tol: tolerances.append(tol) or terms(self, theta, tol)
    )
    q = torch.randn(1, 1, 100, 4).to(dtype)
    la.lie_attention(q, q, q, time=time)
    assert 0.5 <= tolerances[-1] / min(torch.finfo(dtype).eps, 1e-3) <= 1
