"""Chains against closed forms (two states, birth and death, ruin, cycles, complete graphs), SciPy and identities."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from matrices import D, rate_matrix, sink
from torch.autograd import gradcheck, gradgradcheck

from liegroup_attn.algebra import (
    absorption_probabilities,
    coordinates,
    detailed_balance_residual,
    exit_rates,
    expected_hops,
    expm,
    from_coordinates,
    hitting_probabilities,
    hitting_times,
    is_reversible,
    mixing_time,
    spectral_gap,
    stationary_distribution,
)
from liegroup_attn.errors import ConvergenceError, DtypeError, GeneratorError, MaskError, ShapeError


def chain(n: int, rates: dict[tuple[int, int], float]) -> torch.Tensor:
    Q = torch.zeros(n, n, dtype=D)
    for (i, j), rate in rates.items():
        Q[i, j] = rate
    return Q - torch.diag(Q.sum(-1))


def birth_death(up: list[float], down: list[float]) -> torch.Tensor:
    n = len(up) + 1
    return chain(n, {(i, i + 1): up[i] for i in range(n - 1)} | {(i + 1, i): down[i] for i in range(n - 1)})


def cycle(n: int, forth: float = 1.0, back: float = 1.0) -> torch.Tensor:
    one = torch.eye(n, dtype=D)
    return forth * one.roll(1, -1) + back * one.roll(-1, -1) - (forth + back) * one


def ruin(n: int, up: float, down: float) -> torch.Tensor:
    """0 and n absorbing."""
    return chain(n + 1, {(i, i + 1): up for i in range(1, n)} | {(i, i - 1): down for i in range(1, n)})


def complete(n: int) -> torch.Tensor:
    return torch.ones(n, n, dtype=D) - n * torch.eye(n, dtype=D)


def causal(n: int) -> torch.Tensor:
    rates = torch.ones(n, n, dtype=D).tril(-1)
    return rates - torch.diag(rates.sum(-1))


TWO_CLASSES = torch.block_diag(cycle(3), cycle(4))
UNICHAIN = chain(5, {(0, 1): 1.0, (1, 0): 2.0, (2, 1): 1.0, (2, 3): 3.0, (3, 2): 0.5, (4, 3): 1.0})  # {0, 1} is closed
IRREDUCIBLE = {
    "two": chain(2, {(0, 1): 3.0, (1, 0): 0.5}),
    "dense": rate_matrix(7),
    "birth and death": birth_death([1.0, 2.0, 0.5], [3.0, 1.0, 0.25]),
    "turning": cycle(5, 2.0, 0.0),
    "sink": sink(9),
    "slow": 1e-7 * rate_matrix(4),
    "fast and slow": birth_death([1e-4, 1e4], [1e3, 1e-2]),
}


# at rest


@pytest.mark.parametrize("name", IRREDUCIBLE)
def test_at_rest(name):
    Q = IRREDUCIBLE[name]
    pi = stationary_distribution(Q)
    exits = exit_rates(Q)
    null = scipy.linalg.null_space((Q / exits[:, None]).T.numpy(), rcond=1e-13)[:, 0] / exits.numpy()
    torch.testing.assert_close(pi, torch.from_numpy(null / null.sum()), rtol=1e-9, atol=0)
    torch.testing.assert_close(pi @ Q, torch.zeros_like(pi), rtol=0, atol=1e-13 * float(Q.abs().max()))
    assert (pi > 0).all()
    torch.testing.assert_close(pi @ expm(3 * Q / Q.abs().max()), pi, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(stationary_distribution(1e3 * Q), pi, rtol=1e-10, atol=1e-14)


def test_closed_forms_at_rest():
    a, b = 3.0, 0.5
    expected = torch.tensor([b, a], dtype=D) / (a + b)
    torch.testing.assert_close(stationary_distribution(chain(2, {(0, 1): a, (1, 0): b})), expected)
    up, down = [1.0, 2.0, 0.5], [3.0, 1.0, 0.25]
    weights = torch.tensor(np.cumprod([1.0, *(u / d for u, d in zip(up, down, strict=True))]))
    torch.testing.assert_close(stationary_distribution(birth_death(up, down)), weights / weights.sum())
    weights = torch.tensor([1, 1e-7, 0.1], dtype=D)
    torch.testing.assert_close(stationary_distribution(IRREDUCIBLE["fast and slow"]), weights / weights.sum())
    torch.testing.assert_close(stationary_distribution(cycle(6, 2.0)), torch.full((6,), 1 / 6, dtype=D))
    torch.testing.assert_close(stationary_distribution(torch.zeros(1, 1)), torch.ones(1))


@pytest.mark.parametrize("epsilon", [1.0, 1e-8, 1e-30, 1e-200])
def test_no_digit_is_lost_however_far_apart_the_rates_are(epsilon):
    up, down = [1.0, epsilon, 0.7, 3.0], [1.0, 2 * epsilon, 1.3, epsilon]
    weights = torch.tensor(np.cumprod([1.0, *(u / d for u, d in zip(up, down, strict=True))]))
    got = stationary_distribution(birth_death(up, down))
    torch.testing.assert_close(got, weights / weights.sum(), rtol=1e-14, atol=0)


def test_states_that_are_left_for_ever_have_no_share():
    torch.testing.assert_close(stationary_distribution(UNICHAIN), torch.tensor([2, 1, 0, 0, 0], dtype=D) / 3)
    assert torch.equal(stationary_distribution(UNICHAIN.flip(0, 1))[:3], torch.zeros(3, dtype=D))  # exactly
    assert torch.equal(stationary_distribution(causal(6)), torch.eye(6, dtype=D)[0])
    assert torch.equal(stationary_distribution(causal(6).flip(0, 1)), torch.eye(6, dtype=D)[5])


def test_several_closed_classes_are_refused():
    for Q in (TWO_CLASSES, torch.zeros(2, 2), ruin(4, 1.0, 1.0), torch.stack([cycle(3), torch.zeros(3, 3)])):
        for function in (stationary_distribution, detailed_balance_residual, is_reversible):
            with pytest.raises(GeneratorError, match=r"one closed class, got several.*; "):
                function(Q)


# the film backwards


def test_detailed_balance():
    for Q in (IRREDUCIBLE["two"], IRREDUCIBLE["birth and death"], cycle(5), complete(4), causal(5), torch.zeros(1, 1)):
        assert is_reversible(Q) == (True, None)
        assert detailed_balance_residual(Q) < 1e-14
    net = detailed_balance_residual(cycle(5, 2.0, 0.5))
    torch.testing.assert_close(net, torch.tensor(1.5 / 5, dtype=D))
    ok, reason = is_reversible(cycle(5, 2.0, 0.5))
    assert not ok
    assert "= 0.3 between " in reason
    assert is_reversible(cycle(5, 2.0, 0.5), atol=0.31)[0]
    assert not is_reversible(torch.stack([cycle(5), cycle(5, 2.0)]))[0]


def test_reversible_from_symmetric_exchange():
    """Q_ij = s_ij π_j (GTR) balances with π, and with nothing else."""
    s = rate_matrix(5).abs()
    pi = torch.rand(5, dtype=D).softmax(-1)
    rates = ((s + s.mT) * pi).fill_diagonal_(0)
    Q = rates - torch.diag(rates.sum(-1))
    torch.testing.assert_close(stationary_distribution(Q), pi)
    assert detailed_balance_residual(Q, pi) < 1e-16
    assert detailed_balance_residual(Q, torch.full((5,), 0.2, dtype=D)) > 1e-3
    assert is_reversible(Q) == (True, None)
    assert is_reversible(Q.float()) == (True, None)


# forgetting


def test_spectral_gaps():
    gaps = {
        3.5: IRREDUCIBLE["two"],
        2 - 2 * math.cos(2 * math.pi / 7): cycle(7),
        6.0: complete(6),
        1.0: causal(5),
        0.0: TWO_CLASSES,
        math.inf: torch.zeros(1, 1, dtype=D),
    }
    for expected, Q in gaps.items():
        torch.testing.assert_close(spectral_gap(Q), torch.tensor(expected, dtype=D), rtol=1e-12, atol=1e-14)
    assert spectral_gap(torch.stack([cycle(3), complete(3)])).shape == (2,)
    for up, down in (
        (1.0, 3.0),
        (3.0, 1.0),
    ):  # a long drift, far from symmetric: eigenvalues of the plain Q are off by half
        n = 200
        drift = birth_death([up] * (n - 1), [down] * (n - 1))
        expected = up + down - 2 * math.sqrt(up * down) * math.cos(math.pi / n)
        torch.testing.assert_close(spectral_gap(drift), torch.tensor(expected, dtype=D), rtol=1e-11, atol=0)


def distance(Q: torch.Tensor, t: float) -> float:
    """Worst total variation at t, SciPy."""
    P = scipy.linalg.expm(t * Q.numpy())
    return float(np.abs(P - stationary_distribution(Q).numpy()).sum(-1).max() / 2)


@pytest.mark.parametrize("tol", [0.25, 0.05, 1e-6])
def test_mixing_times_in_closed_form(tol):
    a, b = 3.0, 0.5
    expected = math.log(a / (a + b) / tol) / (a + b)
    cases = {expected: chain(2, {(0, 1): a, (1, 0): b})}
    cases |= {math.log((1 - 1 / n) / tol) / n: complete(n) for n in (3, 10)}
    for t, Q in cases.items():
        torch.testing.assert_close(mixing_time(Q, tol), torch.tensor(t, dtype=D), rtol=2e-10, atol=0)
        torch.testing.assert_close(mixing_time(1e-5 * Q, tol), torch.tensor(1e5 * t, dtype=D), rtol=2e-10, atol=0)


@pytest.mark.parametrize("Q", [*list(IRREDUCIBLE.values())[:-1], UNICHAIN, causal(8)])
def test_mixing_times_by_definition(Q):
    t = float(mixing_time(Q))
    assert distance(Q, t * (1 + 1e-7)) <= 0.25 <= distance(Q, t * (1 - 1e-7))


def test_a_bottleneck_mixes_slowly():
    """Two pairs joined by a rate ε: e^{−2·…} takes a time ~ 1/ε, many doublings from the fastest holding time."""
    Q = birth_death([1.0, 1e-8, 1.0], [1.0, 1e-8, 1.0])
    t = mixing_time(Q)
    torch.testing.assert_close(t * spectral_gap(Q), torch.tensor(math.log(2), dtype=D), rtol=1e-6, atol=0)


def test_mixing_times_at_the_ends():
    assert mixing_time(TWO_CLASSES) == math.inf
    assert mixing_time(torch.zeros(3, 3)) == math.inf
    assert mixing_time(torch.zeros(1, 1)) == 0
    assert mixing_time(complete(2), 0.5) == 0  # ½ apart from the start
    got = mixing_time(torch.stack([cycle(4), torch.zeros(4, 4), complete(4)])[None])
    assert got.shape == (1, 3)
    assert got[0, 1] == math.inf
    torch.testing.assert_close(got[0, 0], mixing_time(cycle(4)))
    torch.testing.assert_close(got[0, 2], mixing_time(complete(4)))
    with pytest.raises(ConvergenceError, match="rounding hides"):
        mixing_time(birth_death([1.0, 1e-20, 1.0], [1.0, 1e-20, 1.0]))
    for tol in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(GeneratorError, match="tol"):
            mixing_time(cycle(3), tol)


# where it ends


@pytest.mark.parametrize(("up", "down"), [(1.0, 1.0), (2.0, 1.0), (0.3, 0.9)])
def test_gamblers_ruin(up, down):
    n, i = 8, torch.arange(9, dtype=D)
    Q, r = ruin(n, up, down), down / up
    expected = i / n if r == 1 else (1 - r**i) / (1 - r**n)
    torch.testing.assert_close(hitting_probabilities(Q, i == n), expected)
    torch.testing.assert_close(absorption_probabilities(Q)[:, n], expected)
    torch.testing.assert_close(absorption_probabilities(Q)[:, 0], 1 - expected)
    assert (absorption_probabilities(Q)[:, 1:n] == 0).all()
    times = hitting_times(Q, (i == 0) | (i == n))
    games = i * (n - i) / 2 if r == 1 else (i - n * expected) / (down - up)  # optional stopping
    torch.testing.assert_close(times, games)
    reached = hitting_times(Q, i == n)
    assert reached[:n].isinf().all()  # may be ruined first
    assert reached[n] == 0


def test_probabilities_are_limits_of_the_flow():
    for Q in (ruin(5, 1.0, 2.0), causal(5), chain(4, {(0, 1): 1.0, (1, 0): 1.0, (2, 0): 1.0, (2, 3): 2.0})):
        limit, B = expm(400 * Q), absorption_probabilities(Q)
        absorbing = exit_rates(Q) == 0
        torch.testing.assert_close(B[:, absorbing], limit[:, absorbing], rtol=0, atol=1e-10)
        for j in absorbing.nonzero()[:, 0].tolist():
            torch.testing.assert_close(hitting_probabilities(Q, torch.arange(Q.size(0)) == j), B[:, j])


def test_causal_chains_end_at_token_0():
    Q = causal(6)
    B = absorption_probabilities(Q)
    torch.testing.assert_close(B[:, 0], torch.ones(6, dtype=D))
    assert (B[:, 1:] == 0).all()
    # token i jumps to each earlier one at rate 1: a record process, the time from i is Σ 1/(k(k+1)) + … by recursion
    expected = [0.0]
    for i in range(1, 6):
        expected.append(1 / i + sum(expected) / i)
    torch.testing.assert_close(hitting_times(Q, torch.arange(6) == 0), torch.tensor(expected, dtype=D))


def test_unreachable_and_unsure_targets():
    Q = chain(5, {(0, 1): 1.0, (1, 0): 1.0, (2, 1): 1.0, (2, 3): 3.0, (3, 3): 0.0, (4, 2): 2.0})  # 3 absorbs
    state = torch.arange(5)
    torch.testing.assert_close(hitting_probabilities(Q, state == 0), torch.tensor([1, 1, 0.25, 0, 0.25], dtype=D))
    inf = math.inf
    torch.testing.assert_close(hitting_times(Q, state == 0), torch.tensor([0, 1, inf, inf, inf], dtype=D))
    # through the target is not past it
    torch.testing.assert_close(hitting_times(Q, state == 2), torch.tensor([inf, inf, 0, inf, 0.5], dtype=D))
    assert (hitting_probabilities(Q, state < 0) == 0).all()
    assert hitting_times(Q, state < 0).isinf().all()
    assert (hitting_times(Q, state >= 0) == 0).all()
    assert (hitting_probabilities(torch.zeros(1, 1), torch.tensor([True])) == 1).all()


@pytest.mark.parametrize("name", IRREDUCIBLE)
def test_the_random_target_identity(name):
    """Σ_j π_j E_i T_j is the same from every i, Kemeny's constant Σ 1/|λ| over the other eigenvalues."""
    Q = IRREDUCIBLE[name]
    n = Q.size(0)
    T = hitting_times(Q.expand(n, n, n), torch.eye(n).bool())  # T[j, i] from i to j
    values = torch.linalg.eigvals(Q)
    kemeny = (1 / -values[values.abs().argsort()[1:]]).sum().real
    torch.testing.assert_close(stationary_distribution(Q) @ T, kemeny.expand(n), rtol=1e-8, atol=0)


def test_moves_until_absorption():
    """Expected hops over a long time are the expected number of jumps: with exit rates 1 the expected time."""
    Q = ruin(6, 0.5, 0.5)
    ends = exit_rates(Q) == 0
    torch.testing.assert_close(expected_hops(Q, 1e3), hitting_times(Q, ends))


# batches, dtypes, gradients

VERBS = {
    "stationary_distribution": stationary_distribution,
    "detailed_balance_residual": detailed_balance_residual,
    "spectral_gap": spectral_gap,
    "hitting_probabilities": lambda Q: hitting_probabilities(Q, torch.arange(Q.size(-1)) < 1),
    "hitting_times": lambda Q: hitting_times(Q, torch.arange(Q.size(-1)) < 1),
    "absorption_probabilities": absorption_probabilities,
    "exit_rates": exit_rates,
    "expected_hops": expected_hops,
    "mixing_time": mixing_time,
}


@pytest.mark.parametrize("name", VERBS)
def test_a_batch_is_a_loop(name):
    Q = torch.stack([rate_matrix(4, seed=0), causal(4), cycle(4), birth_death([1.0] * 3, [2.0] * 3)])
    whole = VERBS[name](Q.unflatten(0, (2, 2)).mT.contiguous().mT)
    for i in range(4):
        torch.testing.assert_close(whole.flatten(0, 1)[i], VERBS[name](Q[i]))
    assert VERBS[name](Q[:0]).shape[0] == 0


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_computed_in_float64(name, dtype):
    Q = torch.stack([causal(4), cycle(4)]).to(dtype)  # integers: exact
    got = VERBS[name](Q)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, VERBS[name](Q.double()).float())


@pytest.mark.parametrize("name", VERBS)
def test_a_causal_chain_and_a_single_state(name):
    for Q in (causal(2), causal(7), torch.zeros(1, 1, dtype=D)):
        assert not VERBS[name](Q).isnan().any()


@pytest.mark.parametrize("name", [n for n in VERBS if n != "mixing_time"])
def test_gradients(name):
    """Through the rates: a matrix with one entry moved is no generator."""
    rates = coordinates(rate_matrix(2, 3)).requires_grad_()
    assert gradcheck(lambda r: VERBS[name](from_coordinates(r)), rates)
    assert gradgradcheck(lambda r: VERBS[name](from_coordinates(r)), rates)


def test_gradients_where_not_all_is_reached():
    Q = ruin(4, 1.0, 2.0)
    pattern, target = Q > 0, torch.arange(5) == 4
    rates = Q[pattern].requires_grad_()

    def made(r: torch.Tensor) -> torch.Tensor:
        off = torch.zeros(5, 5, dtype=D).masked_scatter(pattern, r)
        return off - torch.diag(off.sum(-1))

    assert gradcheck(lambda r: hitting_probabilities(made(r), target), rates)
    assert gradcheck(lambda r: absorption_probabilities(made(r)), rates)
    assert gradcheck(lambda r: hitting_times(made(r), (torch.arange(5) % 4) == 0), rates)
    (gradient,) = torch.autograd.grad(hitting_times(made(rates), target)[-1], rates)  # the others are inf
    assert gradient.isfinite().all()


# bad input

WRONG = {
    "not square": (torch.zeros(2, 3), ShapeError, "generator: .*square"),
    "a vector": (torch.zeros(3), ShapeError, "generator: .*2 dimensions"),
    "integers": (torch.zeros(2, 2).long(), DtypeError, "int64"),
    "negative rate": (-cycle(3), GeneratorError, "generator: .*rate matrix.*off-diagonal"),
    "open rows": (torch.eye(3), GeneratorError, "generator: .*sum to 0"),
    "NaN": (torch.full((2, 2), math.nan), GeneratorError, "generator: .*finite"),
    "no states": (torch.zeros(0, 0), ShapeError, "N ≥ 1"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("name", [n for n in VERBS if n not in ("exit_rates", "expected_hops")])
def test_wrong_generators(name, case):
    Q, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        VERBS[name](Q)


@pytest.mark.parametrize("function", [exit_rates, expected_hops])
def test_numbers_of_a_log_refuse_what_is_no_generator_and_pass_nan_on(function):
    for case in ("negative rate", "open rows"):
        Q, error, message = WRONG[case]
        with pytest.raises(error, match=message):
            function(Q)
    one = torch.ones(2, 2)
    bad = torch.full((2, 2), math.nan)
    with pytest.raises(GeneratorError, match=r"generator: .*sum to 0"):
        function(torch.stack([bad, one]))
    got = function(torch.stack([bad, cycle(2).float()]))
    assert got[0].isnan().all()
    torch.testing.assert_close(got[1], function(cycle(2).float()))
    rounded = rate_matrix(5).bfloat16().float()
    assert function(rounded).isfinite().all()


@pytest.mark.parametrize("function", [hitting_probabilities, hitting_times])
def test_wrong_targets(function):
    for target in (torch.ones(3), torch.ones(4).bool(), torch.ones(2, 3).bool(), 1):
        with pytest.raises(MaskError, match=r"target: expected a bool tensor .* got .*; "):
            function(cycle(3), target)


def test_wrong_distributions():
    with pytest.raises(ShapeError, match="distribution"):
        detailed_balance_residual(cycle(3), torch.ones(4))
    with pytest.raises(DtypeError, match="distribution"):
        detailed_balance_residual(cycle(3), torch.ones(3).long())
