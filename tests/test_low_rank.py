"""The linear-time path: low-rank generators, by hops and in closed form."""

import numpy as np
import pytest
import scipy.linalg
import torch
from cases import CLOCKS, to_numpy, worst
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import liegroup_attn as la
from liegroup_attn.clocks import Clock
from liegroup_attn.errors import DtypeError, GeneratorError, ShapeError
from liegroup_attn.generators import low_rank

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SIZES = (1, 2, 63, 200)
RANKS = (1, 4, 32)
ROUTES = {
    "closed form": (la.LowRank(), False),
    "hops": (la.Uniformization(), False),
    "causal": (la.Uniformization(), True),
}
over_routes = pytest.mark.parametrize(("method", "is_causal"), ROUTES.values(), ids=ROUTES)
over_clocks = pytest.mark.parametrize("clock", CLOCKS)


def features(n, r, dtype=torch.float64, batch=(2,)):
    """Two pairs of features, sparse as a ReLU makes them."""
    return [torch.randn(*batch, n, r, dtype=torch.float64).relu().to(dtype) for _ in range(2)]


def golden_generator(left, right, rate=1.0, is_causal=False):
    """Q in float64, from the definition."""
    rates = to_numpy(left) @ np.swapaxes(to_numpy(right), -1, -2)
    rates = np.tril(rates) if is_causal else rates
    total, eye = rates.sum(-1, keepdims=True), np.eye(rates.shape[-1])
    chain = np.where(total > 0, rates / np.where(total > 0, total, 1), eye)
    rate = to_numpy(rate)
    return (rate[..., None] if np.ndim(rate) else rate) * (chain - eye)


def law(clock):
    return scipy.linalg.expm if clock == "fixed" else CLOCKS[clock].golden


def flow(generator, value, time, clock, method):
    return la.expm_multiply(generator, value, time, clock=CLOCKS[clock].clock, method=method)


# --- the same matrix by every route -----------------------------------------------------------------------------


@over_clocks
@over_routes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("n", SIZES)
def test_equals_the_dense_matrix(n, r, dtype, method, is_causal, clock):
    left, right = features(n, r, dtype)
    value = torch.randn(2, n, 3, dtype=torch.float64).to(dtype)
    generator = la.LowRankGenerator(left, right, jump_rate=0.8, is_causal=is_causal)
    ours = flow(generator, value, 1.7, clock, method)
    assert ours.dtype == dtype
    golden = law(clock)(1.7 * golden_generator(left, right, 0.8, is_causal)) @ to_numpy(value)
    assert worst(to_numpy(ours) - golden) <= 64 * torch.finfo(dtype).eps


@over_clocks
@over_routes
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_rows_are_stochastic(n, dtype, method, is_causal, clock):
    left, right = features(n, 4, dtype)
    generator = la.LowRankGenerator(left, right, is_causal=is_causal)
    mixing = flow(generator, torch.eye(n, dtype=dtype), 2.5, clock, method)
    assert mixing.min() >= 0
    assert worst(to_numpy(mixing).sum(-1) - 1) <= 32 * torch.finfo(dtype).eps
    if is_causal:
        assert torch.equal(mixing, mixing.tril())


@over_clocks
@pytest.mark.parametrize("time", [0.0, 1e-6, 1e-2, 1.0, 2.0, 37.0, 1e3, 1e4])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_closed_form_at_any_time(time, dtype, clock):
    left, right = features(40, 6, dtype)
    left[0, 3] = 0  # and one batch item without such a row
    generator = la.LowRankGenerator(left, right)
    mixing = flow(generator, torch.eye(40, dtype=dtype), time, clock, la.LowRank())
    golden = law(clock)(time * golden_generator(left, right))
    assert worst(to_numpy(mixing) - golden) <= 64 * max(torch.finfo(dtype).eps, max(1.0, time) * 2.2e-16)
    assert mixing.min() >= 0
    assert worst(to_numpy(mixing).sum(-1) - 1) <= 16 * torch.finfo(dtype).eps
    if time == 0:
        assert torch.equal(mixing, torch.eye(40, dtype=dtype).expand_as(mixing))


def test_times_add_up():
    generator, value = la.LowRankGenerator(*features(30, 5)), torch.randn(2, 30, 3, dtype=torch.float64)
    twice = flow(generator, flow(generator, value, 0.4, "fixed", la.LowRank()), 2.3, "fixed", la.LowRank())
    torch.testing.assert_close(twice, flow(generator, value, 2.7, "fixed", la.LowRank()), rtol=0, atol=1e-13)


@over_clocks
def test_one_rate_and_one_time_per_head(clock):
    left, right = features(20, 4, batch=(2, 3))
    rate, time = torch.rand(3, 1, dtype=torch.float64), 5 * torch.rand(2, 3, 1, dtype=torch.float64)
    value = torch.randn(2, 1, 20, 2, dtype=torch.float64)
    generator = la.LowRankGenerator(left, right[:, :1], jump_rate=rate)
    dense = golden_generator(left, right[:, :1], rate)
    golden = law(clock)(to_numpy(time)[..., None] * dense) @ to_numpy(value)
    for method in (la.LowRank(), la.Uniformization()):
        assert worst(to_numpy(flow(generator, value, time, clock, method)) - golden) < 1e-12


@over_clocks
@over_routes
def test_values_that_broadcast_against_the_generator(method, is_causal, clock):
    left, right = features(8, 3)
    generator = la.LowRankGenerator(left, right, is_causal=is_causal)
    mixing = law(clock)(0.9 * golden_generator(left, right, is_causal=is_causal))
    for shape in ((8, 3), (1, 8, 3), (5, 2, 8, 3), (2, 8, 0)):
        value = torch.randn(shape, dtype=torch.float64)
        ours = flow(generator, value, 0.9, clock, method)
        assert worst(to_numpy(ours) - mixing @ to_numpy(value)) < 1e-12
        assert ours.shape == (mixing @ to_numpy(value)).shape


@pytest.mark.parametrize("is_causal", [False, True])
def test_hops_take_a_rate_and_a_time_per_token(is_causal):
    left, right = features(20, 4)
    rate, time = 3 * torch.rand(2, 20, dtype=torch.float64), torch.rand(20, dtype=torch.float64)
    generator = la.LowRankGenerator(left, right, jump_rate=rate, is_causal=is_causal)
    ours = la.expm_multiply(generator, torch.eye(20, dtype=torch.float64), time, method=la.Uniformization())
    dense = golden_generator(left, right, rate, is_causal)
    golden = np.stack([scipy.linalg.expm(float(t) * dense)[:, i] for i, t in enumerate(time)], axis=1)
    assert worst(to_numpy(ours) - golden) < 1e-12


# --- the generator ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("n", [1, 5, 127, 128, 129, 300])
def test_operator_and_matrix_are_one(n, is_causal):
    left, right = features(n, 3)
    left[0, n // 2] = 0
    generator = la.LowRankGenerator(left, right, jump_rate=torch.tensor(1.5), is_causal=is_causal)
    assert generator.check() == (True, None)
    eye = torch.eye(n, dtype=torch.float64)
    np.testing.assert_allclose(generator.dense(), golden_generator(left, right, 1.5, is_causal), atol=1e-13)
    torch.testing.assert_close(generator.apply(eye), generator.dense(), rtol=0, atol=1e-13)
    torch.testing.assert_close(generator.jump(eye), generator.jump_chain(), rtol=0, atol=1e-13)
    assert (-generator.dense().diagonal(dim1=-2, dim2=-1) <= generator.rate_bound()).all()


def test_scales_cancel():
    left, right = features(9, 4)
    scaled = la.LowRankGenerator(left * torch.rand(2, 9, 1) * 1e9, right * 1e-9)
    torch.testing.assert_close(scaled.dense(), la.LowRankGenerator(left, right).dense(), rtol=1e-12, atol=1e-12)


def test_the_past_does_not_see_the_future():
    left, right = features(300, 4, torch.float32)
    value = torch.randn(2, 300, 3)
    other = [torch.cat([x[:, :200], torch.rand_like(x[:, 200:])], 1) for x in (left, right, value)]
    runs = [
        la.expm_multiply(la.LowRankGenerator(a, b, is_causal=True), v, 2.0, method=la.Uniformization())
        for a, b, v in ((left, right, value), other)
    ]
    assert torch.equal(runs[0][:, :200], runs[1][:, :200])


@over_routes
def test_a_row_without_a_normalizer_keeps_its_value(method, is_causal):
    left, right = features(12, 3)
    left[0, 5], left[1] = 0, 0  # one row; all rows
    right[..., 2] = 0  # a feature that no key has
    generator = la.LowRankGenerator(left, right, is_causal=is_causal)
    value = torch.randn(2, 12, 2, dtype=torch.float64)
    for clock in CLOCKS:
        ours = flow(generator, value, 3.0, clock, method)
        golden = law(clock)(3 * golden_generator(left, right, is_causal=is_causal)) @ to_numpy(value)
        assert worst(to_numpy(ours) - golden) < 1e-13
        torch.testing.assert_close(ours[1], value[1], rtol=1e-14, atol=1e-14)
    assert (generator.dense()[0, 5] == 0).all()


@pytest.mark.parametrize("size", [1e-40, 1e-20, 1e19, 1e37])
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_features_of_any_size_cancel(size, is_causal):
    """Of float32: neither sums of products nor the power of two that keeps them in range overflow."""
    left, right = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [3.0]])
    found = la.LowRankGenerator(left * size, right * size, is_causal=is_causal).dense()
    torch.testing.assert_close(found, la.LowRankGenerator(left, right, is_causal=is_causal).dense(), atol=1e-3, rtol=0)


def test_no_rate_no_flow():
    value = torch.randn(2, 7, 2)
    for rate in (0.0, torch.zeros(2, 1)):
        generator = la.LowRankGenerator(*features(7, 3, torch.float32), jump_rate=rate)
        for method in (la.LowRank(), la.Uniformization()):
            torch.testing.assert_close(la.expm_multiply(generator, value, 4.0, method=method), value)


# --- gradients ----------------------------------------------------------------------------------------------------


@over_clocks
@over_routes
@pytest.mark.parametrize("time", [0.4, 2.5])
def test_gradients(time, method, is_causal, clock, monkeypatch):
    monkeypatch.setattr(low_rank, "_BLOCK", 2)
    left, right = (torch.rand(2, 5, 3, dtype=torch.float64) + 0.1 for _ in range(2))
    rate, when = torch.full((2, 1), 0.7, dtype=torch.float64), torch.full((2, 1), time, dtype=torch.float64)
    value = torch.randn(2, 5, 2, dtype=torch.float64)
    moves = torch.ones(2, 5, 1, dtype=torch.float64)
    moves[0, 1] = 0  # a row that keeps its value

    def run(left, right, rate, when, value):
        generator = la.LowRankGenerator(left * moves, right, jump_rate=rate, is_causal=is_causal)
        return flow(
            generator, value, when, clock, method if method.__class__ is la.LowRank else la.Uniformization(1e-9)
        )

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in (left, right, rate, when, value)])


@over_clocks
def test_gradient_in_time_at_zero_is_the_generator(clock):
    generator, value = la.LowRankGenerator(*features(6, 3), jump_rate=0.6), torch.randn(2, 6, 2, dtype=torch.float64)
    time = torch.zeros((), dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 6, 2, dtype=torch.float64)
    for method in (la.LowRank(), la.Uniformization()):
        (ours,) = torch.autograd.grad(flow(generator, value, time, clock, method), time, cotangent)
        torch.testing.assert_close(ours, (generator.apply(value) * cotangent).sum())


def test_gradients_of_gradients():
    left, right = (torch.rand(4, 2, dtype=torch.float64).requires_grad_() for _ in range(2))
    value = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def run(left, right, value):
        return la.expm_multiply(la.LowRankGenerator(left.abs(), right.abs()), value, 1.2, method=la.LowRank())

    assert torch.autograd.gradgradcheck(run, (left, right, value))


def test_a_feature_that_no_key_has_gets_its_gradient():
    left, right = (torch.rand(5, 3, dtype=torch.float64) for _ in range(2))
    right[:, 1] = 0
    value, right = torch.randn(5, 2, dtype=torch.float64), right.requires_grad_()
    closed, hops = (
        torch.autograd.grad(
            la.expm_multiply(la.LowRankGenerator(left, right), value, 2.0, method=m).square().sum(), right
        )
        for m in (la.LowRank(), la.Uniformization())
    )
    assert (hops[0][:, 1] != 0).all()
    torch.testing.assert_close(closed, hops)


# --- no N×N -------------------------------------------------------------------------------------------------------


class _Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *[x.numel() for x in tree_leaves(found) if isinstance(x, torch.Tensor)], 0)
        return found


@over_clocks
@over_routes
def test_no_square_is_formed(method, is_causal, clock):
    n = 2000
    left, right, value = (torch.rand(n, 16, requires_grad=True) for _ in range(3))
    with _Largest() as seen:
        flow(la.LowRankGenerator(left, right, is_causal=is_causal), value, 1.0, clock, method).sum().backward()
    assert n * 16 <= seen.elements <= n * 128 * 1.1
    assert left.grad is not None


# --- where it runs ------------------------------------------------------------------------------------------------


def _attend(left, right, value, method, clock, is_causal=False):
    generator = la.LowRankGenerator(la.elu_plus_one(left), la.elu_plus_one(right), is_causal=is_causal)
    return la.expm_multiply(generator, value, 1.3, clock=clock, method=method)


@pytest.mark.parametrize(
    ("route", "fullgraph"),
    [
        ((la.Uniformization(max_terms=4), None, True), True),
        ((la.LowRank(), la.ExponentialClock()), True),
        ((la.LowRank(), None), False),
    ],
    ids=["causal hops", "closed form, exponential", "closed form, fixed"],
)
def test_compiles(route, fullgraph):
    """Only the closed form of a fixed clock looks at its time, which breaks the graph."""
    inputs = torch.randn(3, 2, 20, 4)
    compiled = torch.compile(_attend, fullgraph=fullgraph, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, *route), _attend(*inputs, *route))


def test_autocast_rounds_no_hop():
    left, right, value = torch.randn(3, 2, 20, 4)
    wanted = [_attend(left, right, value, method, None) for method in (la.LowRank(), la.Uniformization())]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = [_attend(left, right, value, method, None) for method in (la.LowRank(), la.Uniformization())]
    torch.testing.assert_close(ours, wanted)


# --- what it refuses ----------------------------------------------------------------------------------------------


class _OtherClock(Clock):
    """A law that hops could sum and the closed form does not know."""

    def terms(self, theta, tol):
        return 1

    def hop_weights(self, theta, terms):
        return torch.ones(2, *theta.shape, dtype=torch.float64) / 4


GOOD = torch.ones(4, 2)
WRONG = {
    "negative left": (lambda: la.LowRankGenerator(-GOOD, GOOD), GeneratorError, "left: expected nonnegative"),
    "negative right": (lambda: la.LowRankGenerator(GOOD, -GOOD), GeneratorError, "right: expected nonnegative"),
    "nan": (lambda: la.LowRankGenerator(GOOD * torch.nan, GOOD), GeneratorError, "left: expected finite"),
    "rank": (lambda: la.LowRankGenerator(GOOD[0], GOOD[0]), ShapeError, "left: expected at least 2 dimensions"),
    "integers": (lambda: la.LowRankGenerator(GOOD.long(), GOOD), DtypeError, "left: expected a floating-point"),
    "dtypes": (lambda: la.LowRankGenerator(GOOD, GOOD.double()), DtypeError, "right: expected torch.float32"),
    "tokens": (lambda: la.LowRankGenerator(GOOD, GOOD[:3]), ShapeError, "right: expected left's N ≥ 1 tokens"),
    "features": (lambda: la.LowRankGenerator(GOOD, GOOD[:, :1]), ShapeError, "right: expected left's N ≥ 1 tokens"),
    "no token": (lambda: la.LowRankGenerator(GOOD[:0], GOOD[:0]), ShapeError, "N ≥ 1"),
    "no feature": (lambda: la.LowRankGenerator(GOOD[:, :0], GOOD[:, :0]), ShapeError, "r ≥ 1"),
    "batch": (lambda: la.LowRankGenerator(torch.ones(2, 4, 2), torch.ones(3, 4, 2)), ShapeError, "right: expected a batch"),
    "rate < 0": (lambda: la.LowRankGenerator(GOOD, GOOD, jump_rate=-1.0), GeneratorError, "jump_rate: expected 0 ≤ rate"),
    "rate nan": (lambda: la.LowRankGenerator(GOOD, GOOD, jump_rate=torch.tensor(torch.nan)), GeneratorError, "got nan"),
    "rate shape": (lambda: la.LowRankGenerator(GOOD, GOOD, jump_rate=torch.ones(3)), ShapeError, r"to \(4,\), got \(3,\)"),
    "rate type": (lambda: la.LowRankGenerator(GOOD, GOOD, jump_rate="fast"), DtypeError, "jump_rate: expected a number"),
    "rate per token": (lambda: _closed(jump_rate=torch.ones(4)), GeneratorError, r"jump_rate: expected one rate per matrix.*Unif"),
    "causal": (lambda: _closed(is_causal=True), GeneratorError, r"expected is_causal=False.*Uniformization\(\)"),
    "time per row": (lambda: _closed(time=torch.ones(4)), ShapeError, r"time: expected one time per matrix.*Uniformization\(\)"),
    "clock": (lambda: _closed(clock=_OtherClock()), GeneratorError, r"clock: expected FixedClock, .*Uniformization\(\)"),
    "generator": (lambda: _closed(la.SoftmaxGenerator(GOOD, GOOD)), GeneratorError, "expected a LowRankGenerator"),
    "map width": (lambda: la.RandomFeatures(3, 4)(GOOD), ShapeError, "x: expected width 3"),
    "map rank": (lambda: la.RandomFeatures(2, 4)(GOOD[0]), ShapeError, "x: expected at least 2 dimensions"),
    "map size": (lambda: la.RandomFeatures(2, 0), GeneratorError, "num_features: expected at least 1"),
}  # fmt: skip


def _closed(generator=None, *, time=1.0, clock=None, **knobs):
    generator = la.LowRankGenerator(GOOD, GOOD, **knobs) if generator is None else generator
    return la.expm_multiply(generator, GOOD, time, clock=clock, method=la.LowRank())


@pytest.mark.parametrize("name", WRONG)
def test_says_what_is_wrong(name):
    call, error, words = WRONG[name]
    with pytest.raises(error, match=words) as caught:
        call()
    assert "; " in str(caught.value)
