"""What the laws do not say of rate matrices: Adam on log-rates, supports, rounding, families, bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from liegroup_attn.algebra import expm
from liegroup_attn.errors import ConvergenceError, DtypeError, GeneratorError, MaskError, ShapeError
from liegroup_attn.lightning import RiemannianAdamW
from liegroup_attn.manifolds import (
    DoublyBalancedRateMatrices,
    FlatRateMatrices,
    ManifoldParameter,
    OpenInterval,
    RateMatrices,
    ReversibleRateMatrices,
    banded_support,
    block_support,
    causal_support,
    off_manifold,
)
from liegroup_attn.manifolds import balanced as balanced_module

SUPPORTS = {
    "all": None,
    "causal": causal_support(5),
    "banded": banded_support(5, 1),
    "blocks": block_support([2, 1, 2]),
}
FAMILIES = [RateMatrices, FlatRateMatrices, ReversibleRateMatrices, DoublyBalancedRateMatrices]


def plain(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor)


# training


@pytest.mark.parametrize("support", SUPPORTS.values(), ids=SUPPORTS)
def test_riemannian_adam_is_adam_on_the_log_rates(support):
    m = RateMatrices(5, support)
    start, best = (plain(m.random(3, 5, 5, dtype=torch.float64)) for _ in range(2))
    point, phi = ManifoldParameter(start.clone(), manifold=m), nn.Parameter(m.chart(start))
    one, two = RiemannianAdamW([point], lr=0.1), torch.optim.Adam([phi], lr=0.1)
    for _ in range(50):
        for optimizer, x in ((one, point), (two, phi)):
            optimizer.zero_grad()
            ((x if x is point else m.from_chart(x)) - best).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(m.chart(point).detach(), phi.detach(), atol=1e-8, rtol=0)
    assert m.check_point_on_manifold(point, explain=True) == (True, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_five_hundred_steps_stay(family):
    torch.manual_seed(0)
    m = family(6)
    point = ManifoldParameter(m.random(2, 6, 6), manifold=m)
    optimizer = RiemannianAdamW([point], lr=0.05, stabilize=1000)
    for step in range(500):
        optimizer.zero_grad()
        (point * torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(step))).sum().backward()
        optimizer.step()
    assert float(off_manifold(point, m)) < 1e-6
    assert m.check_point_on_manifold(point, explain=True, atol=1e-6, rtol=1e-6) == (True, None)


@pytest.mark.parametrize("family", [RateMatrices, ReversibleRateMatrices, DoublyBalancedRateMatrices])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_look_at_rates_only(family, dtype):
    """Garbage on the diagonal of a step, where adaptive optimizers put some, changes nothing."""
    m = family(4)
    x = plain(m.random(4, 4, dtype=dtype))
    u = m.proju(x, torch.randn(4, 4, dtype=dtype))
    assert torch.equal(m.retr(x, u + torch.full((4,), 1e6, dtype=dtype).diag()), m.retr(x, u))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_state_of_a_caller_is_written(family):
    m = family(4)
    x, u, v, y = plain(m.random(4, 4)), torch.randn(4, 4), torch.randn(4, 4), plain(m.random(4, 4))
    before = [t.clone() for t in (x, u, v, y)]
    for verb, arguments in {
        "projx": (x,),
        "proju": (x, u),
        "egrad2rgrad": (x, u),
        "retr": (x, u),
        "expmap": (x, u),
        "logmap": (x, y),
        "transp": (x, y, v),
        "retr_transp": (x, u, v),
        "component_inner": (x, u, v),
        "chart": (x,),
        "from_chart": (u,),
        "push": (x, u),
        "lift": (x, u),
        "chart_gradient": (x, u),
        "difference": (x, y),
        "move": (x, u),
    }.items():
        for grad_mode in (True, False):
            if grad_mode or verb != "move":  # what an optimizer calls may use up its step
                with torch.set_grad_enabled(grad_mode):
                    getattr(m, verb)(*arguments)
                assert all(torch.equal(a, b) for a, b in zip((x, u, v, y), before, strict=True)), verb


@pytest.mark.parametrize("verb", ["retr", "expmap", "egrad2rgrad", "move", "lift", "push"])
@pytest.mark.parametrize("family", [RateMatrices, FlatRateMatrices, ReversibleRateMatrices])
def test_verbs_go_through_functional_transforms(family, verb):
    m = family(4, banded_support(4, 1))
    x, u = plain(m.random(3, 4, 4, dtype=torch.float64)), torch.randn(3, 4, 4, dtype=torch.float64)
    u, step = m.proju(x, u), getattr(m, verb)

    def loss(x: Tensor, u: Tensor, map_items: bool) -> Tensor:
        return (torch.func.vmap(step)(x, u) if map_items else step(x, u)).sin().sum()

    for argument in (0, 1):
        got, expected = (torch.func.grad(loss, argnums=argument)(x, u, mapped) for mapped in (True, False))
        torch.testing.assert_close(got, expected)
        leaves = [t.clone().requires_grad_() for t in (x, u)]
        (usual,) = torch.autograd.grad(loss(*leaves, False), leaves[argument], materialize_grads=True)
        torch.testing.assert_close(got, usual)


@pytest.mark.parametrize("support", SUPPORTS.values(), ids=SUPPORTS)
def test_verbs_can_be_differentiated(support):
    m = RateMatrices(5, support)
    x, y = (plain(m.random(5, 5, dtype=torch.float64)).requires_grad_() for _ in range(2))
    u = m.proju(x, torch.randn(5, 5, dtype=torch.float64)).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, u: m.expmap(m.projx(x), u), (x, u))
    assert torch.autograd.gradcheck(lambda x, y, u: (m.transp(x, y, u), m.dist2(x, y)), (x, y, u))
    assert torch.autograd.gradcheck(m.egrad2rgrad, (x, u))


# rounding and ends


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_sum_to_zero_within_one_rounding(family):
    torch.manual_seed(1)
    m = family(100)
    x = plain(m.random(2, 100, 100, std=2.0))
    for point in (x, m.retr(x, m.proju(x, 0.1 * torch.randn_like(x) * x.abs()))):
        rows = point.double().sum(-1).abs()
        assert (rows <= 2**-24 * point.diagonal(dim1=-2, dim2=-1).abs().double() * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [1e30, -1e30, math.inf, -math.inf])
def test_the_ends_are_finite(dtype, step):
    m = RateMatrices(3, causal_support(3))
    x = plain(m.origin(3, 3, dtype=dtype))
    end = m.expmap(x, torch.full((3, 3), step, dtype=dtype).tril(-1))
    assert m.check_point_on_manifold(end, explain=True) == (True, None)
    assert torch.equal(end == 0, x == 0)
    gradient = m.egrad2rgrad(end, torch.full((3, 3), 0.1, dtype=dtype).tril(-1))
    for value in (gradient, m.component_inner(end, gradient), m.dist(x, end), m.transp(end, x, gradient)):
        assert value.isfinite().all()


HALVES = [(family, torch.bfloat16) for family in FAMILIES] + [(f, torch.float16) for f in FAMILIES[:2]]


@pytest.mark.parametrize(("family", "dtype"), HALVES)
def test_half_precision_stays_half(family, dtype):
    m = family(4)
    x, u = m.projx(torch.rand(2, 4, 4).to(dtype)), torch.randn(2, 4, 4).to(dtype)
    u = m.proju(x, u)
    for value in (x, u, m.retr(x, u), m.egrad2rgrad(x, u), m.random(4, 4, dtype=dtype)):
        assert value.dtype == dtype
    assert float(off_manifold(x, m)) <= 2 * torch.finfo(dtype).eps


# supports


def test_supports():
    assert RateMatrices(4).closed
    assert RateMatrices(4, causal_support(4)).closed
    assert RateMatrices(6, block_support([2, 3, 1])).closed
    assert not RateMatrices(4, banded_support(4, 1)).closed
    assert RateMatrices(4, banded_support(4, 3)).closed
    assert RateMatrices(4, banded_support(4, 1).tril() | torch.ones(4, 4, dtype=torch.bool).tril()).closed
    x = RateMatrices(4, causal_support(4)).origin(4, 4)
    assert torch.equal(plain(x), torch.ones(4, 4).tril(-1) - torch.arange(4.0).diag())
    assert repr(RateMatrices(4)) == "RateMatrices(n=4) manifold"
    assert repr(RateMatrices(4, causal_support(4))) == "RateMatrices(n=4, transitions=6) manifold"


def test_the_support_follows_the_point():
    m = RateMatrices(3, causal_support(3))
    assert m.projx(torch.ones(3, 3, device="meta")).device.type == "meta"
    twin = copy.deepcopy(m)
    for each in (m, twin):
        assert each.check_point_on_manifold(each.projx(torch.ones(3, 3)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [0, -1, 2.0, True])
def test_bad_sizes(family, n):
    with pytest.raises(GeneratorError, match="n: expected an integer ≥ 1, got"):
        family(n)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("support", "error", "message"),
    [
        (torch.ones(3, 3), DtypeError, "support: expected a torch.bool tensor .*, got torch.float32"),
        ([[True]], DtypeError, "support: expected a torch.bool tensor .*, got list"),
        (torch.ones(2, 3, dtype=torch.bool), MaskError, r"support: expected shape \(3, 3\), got \(2, 3\)"),
        (torch.ones(2, 3, 3, dtype=torch.bool), MaskError, "all heads share one support"),
        (torch.eye(3, dtype=torch.bool), MaskError, "support: expected at least one transition, got none"),
        (torch.ones(3, 3, dtype=torch.bool).tril(-1), MaskError, "got none in row 0; set its diagonal to True"),
    ],
)
def test_bad_supports(family, support, error, message):
    with pytest.raises(error, match=message):
        family(3, support)


def test_bad_helpers():
    with pytest.raises(GeneratorError, match="n: expected"):
        causal_support(0)
    with pytest.raises(GeneratorError, match="width: expected an integer ≥ 0, got -1"):
        banded_support(3, -1)
    with pytest.raises(GeneratorError, match="sizes: expected at least one block, got none"):
        block_support([])
    with pytest.raises(GeneratorError, match="n: expected an integer ≥ 1, got 0"):
        block_support([2, 0])


@pytest.mark.parametrize(
    ("support", "message"),
    [(causal_support(3), "got 1 → 0 without a way back"), (~torch.eye(3, dtype=torch.bool).roll(1, 0), "0 → 2")],
)
def test_balance_needs_cycles(support, message):
    if message == "0 → 2":  # strongly connected: fine
        DoublyBalancedRateMatrices(3, support)
        return
    with pytest.raises(MaskError, match=message):
        DoublyBalancedRateMatrices(3, support)


def test_reversibility_needs_returns():
    with pytest.raises(MaskError, match="expected a symmetric mask, got the transition 1 → 0 without its return"):
        ReversibleRateMatrices(3, causal_support(3))


def test_a_balance_out_of_reach_says_so(monkeypatch):
    monkeypatch.setattr(balanced_module, "_MOST_STEPS", 1)
    with pytest.raises(ConvergenceError, match="expected balanced rates within 1 Newton steps"):
        DoublyBalancedRateMatrices(5).random(5, 5, std=3.0)


# reasons

GOOD = torch.tensor([[-2.0, 1.0, 1.0], [1.0, -1.5, 0.5], [1.0, 1.0, -2.0]])
NOT_POSITIVE = (
    "rates on the support must be positive, got {}; start from a positive rate, leave the transition out of the support, "
    "or use FlatRateMatrices"
)


def changed(i: int, j: int, value: float) -> Tensor:
    return GOOD.clone().index_put((torch.tensor(i), torch.tensor(j)), torch.tensor(value))


@pytest.mark.parametrize(
    ("manifold", "point", "reason"),
    [
        (RateMatrices(3), GOOD, None),
        (RateMatrices(3), changed(0, 0, -1.0), "rows must sum to 0, off by 1"),
        (RateMatrices(3), changed(0, 0, math.nan), "entries must be finite, got NaN or inf"),
        (RateMatrices(3), changed(2, 0, math.inf), "entries must be finite, got NaN or inf"),
        (RateMatrices(2), torch.tensor([[1.0, -1.0], [1.0, -1.0]]), NOT_POSITIVE.format(-1)),
        (RateMatrices(2), torch.tensor([[0.0, 0.0], [1.0, -1.0]]), NOT_POSITIVE.format(0)),
        (RateMatrices(2), torch.tensor([[9.0, 0.0], [1.0, -1.0]]), NOT_POSITIVE.format(0)),
        (RateMatrices(3, causal_support(3)), GOOD, "entries off the support must be 0, off by 1"),
        (RateMatrices(2), GOOD, "'x' must have shape (..., 2, 2), got (3, 3)"),
        (FlatRateMatrices(2), torch.tensor([[0.0, 0.0], [1.0, -1.0]]), None),
        (
            FlatRateMatrices(2),
            torch.tensor([[1.0, -1.0], [1.0, -1.0]]),
            "rates on the support must be at least 0, off by -1",
        ),
        (
            ReversibleRateMatrices(3),
            GOOD,
            "log-rates must be symmetric plus p_j (Kolmogorov's criterion), off by 0.116",
        ),
        (DoublyBalancedRateMatrices(3), GOOD, "columns must sum to 0, off by 0.5"),
    ],
)
def test_reasons(manifold, point, reason):
    ok, why = manifold.check_point_on_manifold(point, explain=True)
    assert ok is (reason is None)
    assert why == reason


@pytest.mark.parametrize(
    ("manifold", "vector", "reason"),
    [
        (RateMatrices(2), [[1.0, -1.0], [0.0, 0.0]], None),
        (RateMatrices(2), [[1.0, 0.0], [0.0, 0.0]], "rows must sum to 0, off by 1"),
        (RateMatrices(2), [[math.nan, 0.0], [0.0, 0.0]], "entries must be finite, got NaN or inf"),
        (DoublyBalancedRateMatrices(2), [[1.0, -1.0], [0.0, 0.0]], "columns must sum to 0, off by"),
    ],
)
def test_reasons_for_vectors(manifold, vector, reason):
    x = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    ok, why = manifold.check_vector_on_tangent(x, torch.tensor(vector), explain=True)
    assert ok is (reason is None)
    assert why == reason if reason is None else why.startswith(reason)


def test_large_rates_are_judged_by_their_size():
    m = RateMatrices(50)
    x = plain(m.random(50, 50)) * 1e6
    assert m.check_point_on_manifold(m.projx(x))
    assert not m.check_point_on_manifold(m.projx(x) + torch.eye(50) * 1e4)


def test_off_manifold():
    m = RateMatrices(2)
    Q = torch.tensor([[-1.0, 1.0], [2.0, -2.0]])
    assert float(off_manifold(Q, m)) == 0
    assert float(off_manifold(Q + torch.tensor([[0.5, 0.0], [0.0, 0.0]]), m)) == pytest.approx(0.5)
    assert float(off_manifold(Q * 100 - torch.tensor([[100.0, 0.0], [0.0, 0.0]]), m)) == pytest.approx(0.5)
    for bad in (math.nan, math.inf):
        assert math.isnan(float(off_manifold(Q * bad, m)))
        assert math.isnan(float(off_manifold(Q * bad, FlatRateMatrices(2))))
    assert float(off_manifold(torch.zeros(0, 2, 2), m)) == 0
    assert float(off_manifold(torch.tensor([3.0]), OpenInterval(2.0))) == pytest.approx(1 / 3)
    assert off_manifold(Q.requires_grad_(), m).shape == ()
    with pytest.raises(ShapeError, match=r"x: expected a point on RateMatrices\(n=2\) manifold, got shape \(3, 3\)"):
        off_manifold(torch.zeros(3, 3), m)


# families


def test_the_flat_projection_is_the_nearest():
    """No feasible move makes the distance smaller: the variational inequality, at many rate matrices."""
    torch.manual_seed(0)
    for support in (None, causal_support(4), banded_support(4, 1)):
        m = FlatRateMatrices(4, support)
        x = 2 * torch.randn(50, 4, 4, dtype=torch.float64)
        near = m.projx(x)
        others = plain(m.random(20, 1, 4, 4, dtype=torch.float64, std=2.0))
        at_zero = torch.cat([others, torch.zeros_like(others[:1])])
        assert (((x - near) * (at_zero - near)).sum((-2, -1)) <= 1e-9).all()


@pytest.mark.parametrize("support", [None, banded_support(5, 1), block_support([3, 2])], ids=["all", "band", "blocks"])
def test_reversible_matrices_are_in_detailed_balance(support):
    m = ReversibleRateMatrices(5, support)
    Q = plain(m.random(3, 5, 5, dtype=torch.float64))
    pi, s = m.stationary(Q), m.exchangeabilities(Q)
    flow = pi[..., None] * Q
    torch.testing.assert_close(flow, flow.mT, atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(pi.sum(-1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close((pi[:, None] @ Q), torch.zeros(3, 1, 5, dtype=torch.float64), atol=1e-13, rtol=0)
    torch.testing.assert_close(s, s.mT, atol=1e-13, rtol=1e-12)


def test_reversible_matrices_are_totally_geodesic():
    small, large = ReversibleRateMatrices(5), RateMatrices(5)
    x, y = (plain(small.random(5, 5, dtype=torch.float64)) for _ in range(2))
    u = small.proju(x, torch.randn(5, 5, dtype=torch.float64))
    torch.testing.assert_close(small.expmap(x, u), large.expmap(x, u))
    torch.testing.assert_close(small.dist(x, y), large.dist(x, y))
    # proju is the orthogonal projection there
    v = large.proju(x, torch.randn(5, 5, dtype=torch.float64))
    torch.testing.assert_close(large.inner(x, v - small.proju(x, v), u), torch.zeros((), dtype=torch.float64))


def test_doubly_balanced_matrices_have_doubly_stochastic_exponentials():
    m = DoublyBalancedRateMatrices(6)
    P = expm(plain(m.random(3, 6, 6, dtype=torch.float64)))
    for axis in (-1, -2):
        torch.testing.assert_close(P.sum(axis), torch.ones(3, 6, dtype=torch.float64), atol=1e-13, rtol=0)
    assert (P > 0).all()


def test_rescaling_states_does_not_change_the_balanced_matrix():
    m = DoublyBalancedRateMatrices(6)
    x = plain(RateMatrices(6).random(3, 6, 6, dtype=torch.float64))
    scale = torch.randn(3, 6, dtype=torch.float64).exp()
    torch.testing.assert_close(m.projx(scale[..., None] * x / scale[..., None, :]), m.projx(x))


@pytest.mark.parametrize("std", [3.0, 30.0, 1e4])
@pytest.mark.parametrize("support", [None, banded_support(12, 1), torch.eye(12, dtype=torch.bool).roll(1, 1)])
def test_balance_is_found_from_afar(std, support):
    torch.manual_seed(0)
    m = DoublyBalancedRateMatrices(12, support)
    x = plain(m.random(5, 12, 12, dtype=torch.float64, std=std))
    exits = x.diagonal(dim1=-2, dim2=-1).abs()
    assert (x.sum(-2).abs() <= 1e-12 * exits).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", [DoublyBalancedRateMatrices, ReversibleRateMatrices])
def test_projection_keeps_what_passes_the_check(family, dtype):
    """Symmetric rates, reversible and balanced as they are, with whatever size and spread."""
    m, passed = family(4), []
    off = ~torch.eye(4, dtype=torch.bool)
    for seed in range(200):
        logs = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        logs = (seed % 5) * (logs + logs.mT) + 2.0 * (seed % 19 - 9)
        x = logs.exp().masked_fill(~off, 0).to(dtype)
        x = x - torch.diag(x.sum(-1))
        passed.append(m.check_point_on_manifold(x))
        near = m.projx(x)
        assert torch.allclose(near[off], x[off], rtol=1e-4, atol=0) == passed[-1], seed
        assert m.check_point_on_manifold(near, explain=True) == (True, None)
        if passed[-1]:
            torch.testing.assert_close(m.retr(x, torch.zeros_like(x)), near)
    assert 50 < sum(passed) < 200 or family is ReversibleRateMatrices


def test_a_rate_out_of_reach_is_named():
    x = torch.tensor([[0.0, 1e-18, 1.0], [1e-18, 0.0, 1e18], [1.0, 1e18, 0.0]])
    ok, reason = ReversibleRateMatrices(3).check_point_on_manifold(x - torch.diag(x.sum(-1)), explain=True)
    assert not ok
    assert "coordinates, logarithms of rates, must be within reach, ±40, off by" in reason


def test_a_common_factor_is_in_reach():
    m = DoublyBalancedRateMatrices(4)
    x = plain(m.random(4, 4, dtype=torch.float64, std=2.0))
    for factor in (1e-7, 1e-3, 1e5):
        torch.testing.assert_close(m.projx(factor * x), factor * x)
        assert m.check_point_on_manifold(factor * x, explain=True) == (True, None)
