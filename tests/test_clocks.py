"""The law of the number of hops: against SciPy's distributions, and the bound that the lumped tail promises."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from cases import CLOCKS

import liegroup_attn as la
from liegroup_attn.errors import ConvergenceError

LAWS = {  # clock -> (object, hops as a SciPy distribution on 0, 1, 2, …)
    "fixed": (la.FixedClock(), lambda theta: scipy.stats.poisson(theta)),
    "exponential": (la.ExponentialClock(), lambda theta: scipy.stats.geom(1 / (1 + theta), loc=-1)),
    "erlang": (la.ErlangClock(3), lambda theta: scipy.stats.nbinom(3, 3 / (3 + theta))),
}
THETAS = (1e-3, 0.5, 0.999, 1.0, 1.001, 4.0, 32.0, 300.0)
over_laws = pytest.mark.parametrize("law", list(LAWS))


def test_every_clock_has_its_law_here():
    assert set(LAWS) == set(CLOCKS)


# MATHEMATICS §3: θ -> smallest K with tail ≤ 1e-2, 1e-3, 1e-6
SMALLEST_K = {
    0.5: (3, 4, 7),
    1.0: (4, 5, 9),
    2.0: (6, 8, 12),
    4.0: (9, 11, 17),
    8.0: (15, 18, 25),
    16.0: (26, 30, 38),
    32.0: (46, 51, 62),
}


@pytest.mark.parametrize("theta", SMALLEST_K)
def test_smallest_k_is_that_of_the_table(theta):
    assert tuple(la.FixedClock().terms(theta, tol) for tol in (1e-2, 1e-3, 1e-6)) == SMALLEST_K[theta]


@over_laws
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("tol", [0.3, 1e-2, 1e-7, 1e-13])
def test_terms_are_the_fewest_that_reach_the_tolerance(law, theta, tol):
    clock, hops = LAWS[law]
    k, slack = clock.terms(theta, tol), 1 + 1e-9
    assert hops(theta).sf(k) <= tol * slack
    assert k == 1 or hops(theta).sf(k - 1) > tol / slack


@over_laws
def test_no_time_needs_no_hops(law):
    clock, _ = LAWS[law]
    assert clock.terms(0.0, 1e-6) == 0
    assert torch.equal(clock.hop_weights(torch.zeros(2), 0), torch.ones(1, 2, dtype=torch.float64))
    weights = clock.hop_weights(torch.zeros(2), 4)
    assert torch.equal(weights[0], torch.ones(2, dtype=torch.float64))
    assert not weights[1:].any()


@over_laws
@pytest.mark.parametrize("theta", [1e5, 1e8, 1e17, 1e300])
def test_too_many_hops_are_refused(law, theta):
    with pytest.raises(ConvergenceError, match="MatrixExp"):
        LAWS[law][0].terms(theta, 1e-7)


@over_laws
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("terms", [1, 3, 20])
def test_weights_are_the_law_with_the_tail_on_the_last(law, theta, terms):
    clock, hops = LAWS[law]
    weights = clock.hop_weights(torch.tensor(theta, dtype=torch.float64), terms)
    expected = np.append(hops(theta).pmf(np.arange(terms)), hops(theta).sf(terms - 1))
    assert weights.dtype == torch.float64
    np.testing.assert_allclose(weights, expected, rtol=1e-11, atol=1e-13)


@over_laws
@pytest.mark.parametrize("theta", [0.0, *THETAS, 5000.0])
@pytest.mark.parametrize("terms", [0, 1, 2, 64, 6000])
def test_weights_sum_to_one_at_every_number_of_terms(law, theta, terms):
    weights = LAWS[law][0].hop_weights(torch.tensor([theta], dtype=torch.float64), terms)
    assert weights.shape == (terms + 1, 1)
    assert (weights >= 0).all()
    assert float((weights.sum(0) - 1).abs()) <= 8 * torch.finfo(torch.float64).eps


@over_laws
def test_weights_keep_the_shape_of_theta(law):
    theta = torch.rand(2, 3, 1)
    weights = LAWS[law][0].hop_weights(theta, 5)
    assert weights.shape == (6, 2, 3, 1)
    torch.testing.assert_close(weights[:, 1, 2, 0], LAWS[law][0].hop_weights(theta[1, 2, 0], 5))


@pytest.mark.parametrize("theta", [0.0, 1e-6, *THETAS[:-1]])
def test_gradient_of_poisson_weights(theta):
    """dp_k/dθ = p_{k−1} − p_k, at θ = 0 too; the lumped weight takes what is left of zero."""
    at, terms = torch.tensor(theta, dtype=torch.float64), 12
    gradient = torch.func.jacrev(lambda x: la.FixedClock().hop_weights(x, terms))(at)
    p = np.append(0.0, scipy.stats.poisson(theta).pmf(np.arange(terms)))
    expected = np.append(p[:-1] - p[1:], p[-1])
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("theta", [0.0, 1e-6, *THETAS[:-1]])
def test_gradient_of_geometric_weights(theta):
    """d/dθ θᵏ/(1 + θ)ᵏ⁺¹."""
    at, terms = torch.tensor(theta, dtype=torch.float64), 12
    gradient = torch.func.jacrev(lambda x: la.ExponentialClock().hop_weights(x, terms))(at)
    k = np.arange(terms)
    expected = (k * theta ** np.maximum(k - 1, 0) - theta**k) / (1 + theta) ** (k + 2)
    np.testing.assert_allclose(gradient, np.append(expected, -expected.sum()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [1, 2, 7, 40])
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("tol", [0.3, 1e-3, 1e-13])
def test_erlang_counts_the_fewest_hops_at_every_shape(shape, theta, tol):
    k, law = la.ErlangClock(shape).terms(theta, tol), scipy.stats.nbinom(shape, shape / (shape + theta))
    assert law.sf(k) <= tol * (1 + 1e-9)
    assert k == 1 or law.sf(k - 1) > tol / (1 + 1e-9)


@pytest.mark.parametrize(("shape", "theta"), [(200, 2500.0), (1000, 300.0), (1000, 600.0), (1000, 1e-3), (3, 5000.0)])
def test_erlang_weights_neither_overflow_nor_underflow(shape, theta):
    at, law = (
        torch.tensor(theta, dtype=torch.float64, requires_grad=True),
        scipy.stats.nbinom(shape, shape / (shape + theta)),
    )
    weights = la.ErlangClock(shape).hop_weights(at, 4000)
    np.testing.assert_allclose(weights.detach()[:-1], law.pmf(np.arange(4000)), rtol=1e-8, atol=1e-12)
    (gradient,) = torch.autograd.grad((weights * torch.arange(4001)).sum(), at)
    assert torch.isfinite(gradient)
    if law.sf(4000) < 1e-12:
        assert float(gradient) == pytest.approx(1, rel=1e-6)  # the mean number of hops is θ


def test_erlang_lies_between_the_exponential_and_the_fixed_clock():
    theta = torch.tensor(2.0)
    one, many = la.ErlangClock(1).hop_weights(theta, 30), la.ErlangClock(100_000).hop_weights(theta, 30)
    torch.testing.assert_close(one, la.ExponentialClock().hop_weights(theta, 30))
    torch.testing.assert_close(many, la.FixedClock().hop_weights(theta, 30), atol=1e-4, rtol=0)


@over_laws
@pytest.mark.parametrize("theta", [0.5, 4.0, 16.0])
@pytest.mark.parametrize("terms", [1, 2, 5, 12])
def test_error_is_at_most_tail_times_oscillation(law, theta, terms):
    clock, hops = LAWS[law]
    n = 8
    q, k = 2 * torch.randn(2, n, 4, dtype=torch.float64)
    value = torch.randn(n, 3, dtype=torch.float64)
    generator = la.SoftmaxGenerator(q, k)
    ours = la.expm_multiply(generator, value, theta, clock=clock, method=la.Uniformization(max_terms=terms))
    flow = theta * generator.dense().numpy()
    exact = CLOCKS[law].golden(flow) @ value.numpy()
    last = np.linalg.matrix_power(np.eye(n) + flow / theta, terms) @ value.numpy()
    bound = hops(theta).sf(terms) * np.ptp(last, axis=0)
    error = np.abs(ours.numpy() - exact).max(0)
    assert (error <= bound + 1e-14).all()
    assert error.max() > bound.max() / 100, "the bound should not be idle: hops were left out"


def test_the_mean_over_an_exponential_time_is_the_resolvent():
    """∫ e^{−s} exp(s·tQ) ds = (I − tQ)⁻¹, by Gauss–Laguerre quadrature."""
    generator = la.DenseGenerator.from_rates(torch.rand(4, 4, dtype=torch.float64) / 8)
    nodes, weights = np.polynomial.laguerre.laggauss(30)
    mean = sum(w * scipy.linalg.expm(s * generator.dense().numpy()) for s, w in zip(nodes, weights, strict=True))
    np.testing.assert_allclose(la.transition_matrix(generator, clock=la.ExponentialClock()), mean, atol=1e-10)


@over_laws
def test_clocks_say_what_they_are(law):
    assert repr(LAWS[law][0]) == {"erlang": "ErlangClock(3)"}.get(law, f"{type(LAWS[law][0]).__name__}()")
