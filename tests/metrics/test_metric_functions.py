import math

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import torch

from liegroup_attn.errors import DtypeError, GeneratorError, ShapeError
from liegroup_attn.metrics import (
    attention_entropy,
    bits_per_byte,
    exit_rates,
    expected_hops,
    row_stochasticity_error,
)


def random_generator(*shape, dtype=torch.float64, seed=0):
    rates = torch.rand(*shape, shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rates = rates * (1 - torch.eye(shape[-1], dtype=torch.float64))
    return (rates - torch.diag_embed(rates.sum(-1))).to(dtype)


def golden_hops(generator, time, exponential):
    """SciPy: the integral by adaptive quadrature of expm, or the mean of it over the law of the time."""
    q = -np.diag(generator)
    if exponential:  # E ∫₀^τ f = ∫ P(τ > s) f(s) ds

        def integrand(u):  # s = u/(1 − u) maps [0, 1) to [0, ∞)
            s = u / (1 - u)
            return math.exp(-s / time) * scipy.linalg.expm(s * generator) @ q / (1 - u) ** 2

        return scipy.integrate.quad_vec(integrand, 0, 1 - 1e-6, epsabs=1e-11, epsrel=1e-11)[0]
    return scipy.integrate.quad_vec(lambda s: scipy.linalg.expm(s * generator) @ q, 0, time, epsabs=1e-12)[0]


def two_states(a, b, time, exponential):
    """Expected moves from state 0 of the chain 0 →a 1 →b 0."""
    c = a + b
    decayed = c * time / (1 + c * time) if exponential else 1 - math.exp(-c * time)
    return 2 * a * b * time / c + a * (a - b) * decayed / c**2


@pytest.mark.parametrize("exponential", [False, True])
class TestExpectedHops:
    @pytest.mark.parametrize("time", [1e-4, 0.3, 1.0, 20.0, 1e6])
    def test_two_state_chain(self, exponential, time):
        a, b = 3.0, 0.5
        got = expected_hops(torch.tensor([[-a, a], [b, -b]], dtype=torch.float64), time, exponential=exponential)
        expected = [two_states(a, b, time, exponential), two_states(b, a, time, exponential)]
        rtol = 1e-12 + 1e-14 * time  # squaring doubles the relative rounding error log₂‖tQ‖ times
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=0)

    def test_sink_column_costs_no_digits(self, exponential):
        """N − 1 leaves that all jump to one sink: two lumped states, but a column N times as heavy as a row."""
        n, a, b, time = 257, 3.0, 0.5, 8.0  # b/256 is exact
        Q = -a * torch.eye(n, dtype=torch.float64)
        Q[:, 0], Q[0, 1:], Q[0, 0] = a, b / (n - 1), -b
        got = expected_hops(Q, time, exponential=exponential)
        expected = torch.full((n,), two_states(a, b, time, exponential), dtype=torch.float64)
        expected[0] = two_states(b, a, time, exponential)
        torch.testing.assert_close(got, expected, rtol=2e-12, atol=0)  # untransposed: 5e-11

    @pytest.mark.parametrize("n", [1, 2, 7])
    def test_quadrature(self, exponential, n):
        Q = random_generator(n)
        got = expected_hops(Q, 0.8, exponential=exponential)
        np.testing.assert_allclose(got, golden_hops(Q.numpy(), 0.8, exponential), rtol=1e-8, atol=1e-10)

    def test_equal_exit_rates_give_rate_times_time(self, exponential):
        Q = random_generator(63)
        Q = 2.5 * Q / exit_rates(Q)[:, None]
        got = expected_hops(Q, 4.0, exponential=exponential)
        torch.testing.assert_close(got, torch.full((63,), 10.0, dtype=torch.float64))

    def test_absorbing_state_takes_one_move(self, exponential):
        Q = torch.tensor([[-1.0, 1.0], [0.0, 0.0]])
        moved = 0.5 if exponential else 1 - math.exp(-1)
        torch.testing.assert_close(expected_hops(Q, exponential=exponential), torch.tensor([moved, 0.0]))

    def test_batch_is_a_loop_and_time_broadcasts(self, exponential):
        Q, times = random_generator(2, 3, 5), torch.tensor([0.1, 1.0, 7.0])
        got = expected_hops(Q, times, exponential=exponential)
        assert got.shape == (2, 3, 5)
        for b in range(2):
            for h in range(3):
                alone = expected_hops(Q[b, h], float(times[h]), exponential=exponential)
                torch.testing.assert_close(got[b, h], alone, rtol=1e-7, atol=0)  # the times are float32

    @pytest.mark.parametrize("shape", [(0, 0), (1, 0, 0), (0, 3, 3), (2, 0, 4, 4), (1, 1)])
    def test_empty_and_single(self, exponential, shape):
        got = expected_hops(torch.zeros(shape), 1.0, exponential=exponential)
        torch.testing.assert_close(got, torch.zeros(shape[:-1]))

    def test_time_zero_is_no_move(self, exponential):
        assert (expected_hops(random_generator(4), 0.0, exponential=exponential) == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_half_precision_and_autocast(self, exponential, dtype, autocast):
        Q = random_generator(3, 6, dtype=dtype)
        exact = expected_hops(Q.double(), 2.0, exponential=exponential)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = expected_hops(Q, 2.0, exponential=exponential)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, exact.float(), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    def test_nan_stays_in_its_item(self, exponential, poison):
        Q = random_generator(3, 4)
        clean = expected_hops(Q, exponential=exponential)
        Q[1, 0, 2] = poison
        got = expected_hops(Q, exponential=exponential)
        assert got[1].isnan().all()
        torch.testing.assert_close(got[[0, 2]], clean[[0, 2]], rtol=0, atol=1e-12)

    def test_strided_input(self, exponential):
        Q = random_generator(2, 4).mT.contiguous().mT.expand(3, 2, 4, 4)
        got = expected_hops(Q, exponential=exponential)
        torch.testing.assert_close(got[0], expected_hops(Q[0].contiguous(), exponential=exponential))

    def test_gradient(self, exponential):
        Q = random_generator(2, 3).requires_grad_()
        time = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda Q, t: expected_hops(Q, t, exponential=exponential), (Q, time))

    @pytest.mark.parametrize("time", [-1.0, math.nan, math.inf, torch.tensor([0.5, -0.5])])
    def test_wrong_time(self, exponential, time):
        with pytest.raises(GeneratorError, match=r"time: expected finite numbers ≥ 0, got .*; "):
            expected_hops(random_generator(2, 3), time, exponential=exponential)

    @pytest.mark.parametrize(("batch", "shape"), [((), (5,)), ((2,), (3,)), ((1,), (3,)), ((2, 3), (2,))])
    def test_time_that_does_not_broadcast(self, exponential, batch, shape):
        with pytest.raises(ShapeError, match=r"time: expected .*got .*; expand"):
            expected_hops(random_generator(*batch, 4), torch.ones(shape), exponential=exponential)


def test_exit_rates():
    Q = random_generator(2, 3, 5)
    torch.testing.assert_close(exit_rates(Q), -torch.einsum("...ii->...i", Q))
    assert not torch.signbit(exit_rates(torch.zeros(2, 2))).any()  # 0, not −0
    assert exit_rates(Q.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("function", [exit_rates, expected_hops])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 3, 2)])
def test_generator_must_be_square(function, shape):
    with pytest.raises(ShapeError, match=r"generator: expected .*, got .*; "):
        function(torch.zeros(shape))
    with pytest.raises(DtypeError):
        function(torch.zeros(3, 3, dtype=torch.long))


def test_entropy():
    P = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0], [0.7, 0.2, 0.1, 0]])
    expected = torch.tensor([0, math.log(4), math.log(2), 0.8018185525433373])
    torch.testing.assert_close(attention_entropy(P), expected)
    torch.testing.assert_close(attention_entropy(P.expand(2, 3, 4, 4)), expected.expand(2, 3, 4))
    assert attention_entropy(P[:, :3].half()).dtype == torch.float32  # (N, M), half
    assert attention_entropy(torch.tensor([[1.5, -0.5]])) == -math.inf
    with pytest.raises(ShapeError, match="transition"):
        attention_entropy(P[0])


def test_row_stochasticity_error():
    P = torch.eye(3).repeat(4, 1, 1)
    P[1, 0, 0] = 1.25  # a row sum
    P[2, 1] = torch.tensor([-0.5, 1.25, 0.25])  # an entry
    P[3, 2, 2] = math.nan
    got = row_stochasticity_error(P)
    torch.testing.assert_close(got, torch.tensor([0, 0.25, 0.5, math.nan]), equal_nan=True)
    assert row_stochasticity_error(torch.zeros(2, 3, 3)).tolist() == [1, 1]
    assert row_stochasticity_error(torch.zeros(2, 0, 0)).tolist() == [0, 0]
    # 2⁻⁸ is half a unit of bfloat16 at 1: a sum in bfloat16 would round it away.
    assert row_stochasticity_error(torch.tensor([[1.0, 2**-8]], dtype=torch.bfloat16)) == 2**-8
    with pytest.raises(ShapeError, match="transition"):
        row_stochasticity_error(P[0, 0])


def test_bits_per_byte():
    assert bits_per_byte(math.log(2)) == 1.0
    assert isinstance(bits_per_byte(1.0), float)
    torch.testing.assert_close(bits_per_byte(torch.tensor([1.0, 2.0])), torch.tensor([1.442695, 2.885390]))
    assert bits_per_byte(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32
