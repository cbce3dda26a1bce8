"""Which stochastic matrices are exponentials of rate matrices: closed forms, and one matrix for every condition."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import D, rate_matrix, seeded, square_matrix

from liegroup_attn.algebra import embed, expm, is_rate_matrix
from liegroup_attn.errors import DtypeError, GeneratorError, ShapeError

CYCLE = torch.eye(3, dtype=D).roll(1, -1)  # 0 → 1 → 2 → 0
V1 = torch.tensor([1.0, -1.0, 0.0], dtype=D) / math.sqrt(2)
V2 = torch.tensor([1.0, 1.0, -2.0], dtype=D) / math.sqrt(6)


def symmetric(a: float, b: float) -> torch.Tensor:
    """Eigenvalues 1, a, b with fixed eigenvectors."""
    return torch.full((3, 3), 1 / 3, dtype=D) + a * torch.outer(V1, V1) + b * torch.outer(V2, V2)


class No(NamedTuple):
    P: torch.Tensor
    condition: str
    conclusive: bool
    reason: str


def _rows(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=D)


NOT = {
    "negative entry": No(_rows([1.2, -0.2], [0.0, 1.0]), "stochastic", True, "got -0.2"),
    "row sum": No(_rows([0.5, 0.4], [0.0, 1.0]), "stochastic", True, "sum to 1"),
    "NaN": No(_rows([math.nan, 0.4], [0.0, 1.0]), "stochastic", True, "finite"),
    "swap": No(_rows([0.0, 1.0], [1.0, 0.0]), "determinant", True, "det P = -1 must"),
    "mostly swap": No(_rows([0.4, 0.6], [0.7, 0.3]), "determinant", True, "det P = -0.3 must"),
    "at rest at once": No(_rows([0.3, 0.7], [0.3, 0.7]), "determinant", False, "0 to rounding"),
    "too long for the digits": No(expm(40 * rate_matrix(2)), "determinant", False, "0 to rounding"),
    "all rotate": No(CYCLE, "diagonal", True, "P_ii = 0"),
    "all but rotate": No(
        0.1 * torch.eye(3, dtype=D) + 0.9 * CYCLE, "diagonal", True, "det P = 0.73 must be at most Π P_ii = 0.001"
    ),
    "steps that do not compose": No(
        _rows([0.9, 0.1, 0.0], [0.1, 0.8, 0.1], [0.0, 0.1, 0.9]), "zero pattern", True, "i = 0, j = 2"
    ),
    "two negative eigenvalues": No(symmetric(-0.01, -0.02), "eigenvalue", True, "negative real axis"),
    "a double negative eigenvalue": No(symmetric(-0.01, -0.01), "eigenvalue", False, "negative real axis"),
    "a negative rate": No(symmetric(0.5, 0.1), "logarithm", True, "log P has the rate -0.037"),
    "a negative rate, det P small": No(symmetric(0.3, 0.02), "logarithm", True, "log P has the rate"),
}


@pytest.mark.parametrize("name", NOT)
def test_every_condition_is_named(name):
    case = NOT[name]
    answer = embed(case.P)
    assert (answer.ok, answer.generator) == (False, None)
    assert answer.condition == case.condition, answer
    assert case.reason in answer.reason
    assert answer.conclusive == case.conclusive


def test_a_double_negative_eigenvalue_may_have_another_logarithm():
    """exp(c(C − I)) with c = 2π/√3 has the eigenvalue −e^{−π√3} twice: embeddable, but not by a principal logarithm."""
    answer = embed(expm(2 * math.pi / math.sqrt(3) * (CYCLE - torch.eye(3, dtype=D))))
    assert not answer.ok
    assert answer.condition == "eigenvalue"
    assert not answer.conclusive


def test_complex_eigenvalues_leave_the_answer_open_when_time_is_long():
    """det P ≤ e^{−π}: some logarithm with |Im| > π could be in the cone."""
    found = set()
    for seed in range(400):
        P = (3 * square_matrix(3, seed=seed) + seed % 2 * 2 * torch.eye(3)).softmax(-1)
        answer = embed(P)
        complex_pair = bool((torch.linalg.eigvals(P).imag != 0).any())
        if answer.condition == "logarithm" and complex_pair:
            assert answer.conclusive == (float(torch.linalg.det(P)) > math.exp(-math.pi))
            found.add(answer.conclusive)
    assert found == {True, False}


@given(st.floats(0.01, 0.98), st.floats(0.01, 0.98))
def test_two_states_are_embeddable_iff_the_determinant_is_positive(a, b):
    answer = embed(_rows([1 - a, a], [b, 1 - b]))
    if abs(a + b - 1) < 1e-6:
        return
    assert answer.ok == (a + b < 1)
    assert answer.conclusive
    if answer.ok:
        expected = -math.log(1 - a - b) / (a + b) * _rows([-a, a], [b, -b])
        torch.testing.assert_close(answer.generator, expected, rtol=1e-8, atol=1e-12)
    else:
        assert answer.condition == "determinant"


@pytest.mark.parametrize("n", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("time", [1e-3, 0.5, 3.0])
def test_exponentials_are_recovered(n, time):
    for Q in (rate_matrix(n, seed=n), torch.diag_embed(torch.zeros(n, dtype=D)), _causal(n)):
        answer = embed(expm(time * Q), time)
        assert answer.ok, answer
        assert answer.conclusive
        assert answer.condition is None
        assert is_rate_matrix(answer.generator) == (True, None)
        torch.testing.assert_close(answer.generator, Q, rtol=1e-7, atol=1e-9)


@given(st.integers(2, 7), st.floats(0.01, 20), st.floats(0.2, 1), st.integers(0, 10**6))
def test_no_exponential_is_ever_refused_for_sure(n, time, density, seed):
    """Long times hide the generator behind rounding or behind another logarithm; the answer then says so."""
    pattern = torch.rand(n, n, generator=seeded(seed), dtype=D) < density
    rates = rate_matrix(n, seed=seed).where(pattern & ~torch.eye(n).bool(), 0)
    Q = rates - torch.diag(rates.sum(-1))
    P = expm(time * Q).clamp_min(0)
    P[~_reachable(Q)] = 0
    answer = embed(P / P.sum(-1, keepdim=True), time)
    assert answer.ok or not answer.conclusive, answer
    if answer.ok:
        torch.testing.assert_close(expm(time * answer.generator), P, rtol=0, atol=1e-7)


def _reachable(Q: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_power(torch.eye(Q.size(0), dtype=D) + (Q > 0), Q.size(0)) > 0


def _causal(n: int) -> torch.Tensor:
    """Token i leaves at rate (i mod 5)/4; token 0 is absorbing."""
    rates = torch.ones(n, n, dtype=D).tril(-1)
    rates = rates * (torch.arange(n, dtype=D)[:, None] % 5 / 4) / rates.sum(-1, keepdim=True).clamp_min(1)
    return rates - torch.diag(rates.sum(-1))


def test_small_steps_whose_products_are_lost_to_rounding():
    """P_02 ≈ t²/2 is under the rounding of P for t = 1e-9: no zero pattern is claimed."""
    Q = _rows([-1.0, 1.0, 0.0], [1.0, -2.0, 1.0], [0.0, 1.0, -1.0])
    P = expm(1e-9 * Q)
    P[0, 2] = P[2, 0] = 0
    answer = embed(P, 1e-9)
    assert answer.ok
    torch.testing.assert_close(answer.generator, Q, rtol=1e-5, atol=1e-5)


def test_single_precision_and_tolerance():
    Q = rate_matrix(5).float()
    answer = embed(expm(Q))
    assert answer.ok
    assert answer.generator.dtype == torch.float32
    torch.testing.assert_close(answer.generator, Q, rtol=0, atol=2e-5)
    noisy = expm(rate_matrix(5)) + 1e-4 * torch.eye(5, dtype=D)
    assert embed(noisy).condition == "stochastic"
    assert embed(noisy, atol=1e-3).ok


def _candidates(n: int, seed: int) -> list[torch.Tensor]:
    """Stochastic: exponentials of matrices in the cone and with one negative rate, and others."""
    rates = rate_matrix(n, size=8.0, seed=seed)
    outside = rates.clone()
    outside[0, -1] = -(10.0 ** -(seed % 7))
    candidates = [(square_matrix(n, seed=seed) + 3 * torch.eye(n, dtype=D)).softmax(-1)]
    for X in (rates, outside):
        X = X - torch.diag(X.sum(-1))
        P = expm(X * (0.3, 1, 2)[seed % 3]).clamp_min(0)
        candidates.append(P / P.sum(-1, keepdim=True))
    return candidates


def test_yes_means_that_the_exponential_is_the_matrix():
    answers = []
    for seed in range(300):
        n, time = 2 + seed % 5, (0.5, 1.0, 3.0)[seed % 3]
        for wide in _candidates(n, seed):
            for P in (wide, wide.float()):
                atol = 8 * n * torch.finfo(P.dtype).eps
                answer = embed(P, time)
                answers.append(answer.ok)
                if answer.ok:
                    apart = expm(time * answer.generator.double()) - P.double()
                    assert float(apart.abs().max()) <= 2 * atol, (seed, answer)
    assert 200 < sum(answers) < len(answers) - 200


def test_a_negative_rate_is_not_forgiven_where_it_shows():
    """P⁻¹ is large, so rounding of P may explain the rate −0.1; zeroing it moves P by 0.01 all the same."""
    Q = _rows([-0.9, 1.0, -0.1], [1.0, -6.0, 5.0], [1.0, 5.0, -6.0])
    answer = embed(expm(Q).float())
    assert (answer.ok, answer.condition, answer.conclusive) == (False, "logarithm", False)
    assert "off P" in answer.reason


WRONG = {
    "batch": (lambda: embed(torch.eye(2).expand(3, 2, 2)), ShapeError, "loop over the batch"),
    "no states": (lambda: embed(torch.zeros(0, 0)), ShapeError, "N ≥ 1"),
    "not square": (lambda: embed(torch.ones(2, 3)), ShapeError, "square"),
    "integers": (lambda: embed(torch.eye(2).long()), DtypeError, "int64"),
    "no time": (lambda: embed(torch.eye(2), 0.0), GeneratorError, "time: .*got 0.0"),
    "time NaN": (lambda: embed(torch.eye(2), math.nan), GeneratorError, "time"),
    "infinite time": (lambda: embed(torch.eye(2), math.inf), GeneratorError, "time"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()
