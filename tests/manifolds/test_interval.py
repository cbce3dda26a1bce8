"""OpenInterval: the laws of a Riemannian manifold (those of geoopt's battery), and its gradient in the chart."""

from __future__ import annotations

import copy
import math
import pickle

import geoopt
import pytest
import torch

from liegroup_attn.errors import GeneratorError
from liegroup_attn.lightning import RiemannianAdamW
from liegroup_attn.manifolds import ManifoldParameter, OpenInterval

UPPER = {"unit": 1.0, "4": 4.0, "tiny": 1e-6, "large": 1e6, "half-line": math.inf}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
CASES = [(f"{u}-{d}-{s}", u, d, s) for u in UPPER for d in DTYPES for s in range(3)]
SHAPE = (5, 7)


class Case:
    """Points and tangent vectors made from the chart, as numbers of size 1 there."""

    def __init__(self, upper: str, dtype: str, seed: int) -> None:
        self.manifold, self.dtype = OpenInterval(UPPER[upper]), DTYPES[dtype]
        generator = torch.Generator().manual_seed(seed)
        phi, psi, a, b = torch.randn(4, *SHAPE, generator=generator, dtype=torch.float64).unbind()
        self.phi, self.psi = phi.to(self.dtype), psi.to(self.dtype)
        self.x, self.y = self.point(phi), self.point(psi)
        slope = self.slope(phi)
        self.u, self.v = (a / slope).to(self.dtype), (b / slope).to(self.dtype)
        self.length = a.abs().to(self.dtype)  # |u| in the chart
        self.close = {"atol": 0.0, "rtol": 2e-5 if self.dtype == torch.float32 else 1e-11}

    def point(self, phi: torch.Tensor) -> torch.Tensor:
        """The inverse chart, written anew."""
        upper = self.manifold.upper
        return (phi.exp() if math.isinf(upper) else upper / (1 + (-phi).exp())).to(self.dtype)

    def slope(self, phi: torch.Tensor) -> torch.Tensor:
        """φ'(x) at x = φ⁻¹(phi)."""
        upper = self.manifold.upper
        return (-phi).exp() if math.isinf(upper) else (phi.exp() + 2 + (-phi).exp()) / upper


@pytest.fixture(params=CASES, ids=lambda case: case[0])
def case(request) -> Case:
    return Case(*request.param[1:])


def equal(got: torch.Tensor, expected: torch.Tensor, case: Case, **looser) -> None:
    torch.testing.assert_close(got, expected, **{**case.close, **looser})


# geoopt's battery


def test_points_are_points(case):
    for point in (case.x, case.y):
        assert case.manifold.check_point_on_manifold(point, explain=True) == (True, None)
        assert torch.equal(case.manifold.projx(point), point)


def test_projection_lands_on_the_manifold(case):
    wild = torch.tensor([-1e30, -1.0, 0.0, case.manifold.upper, 1e30, math.inf, -math.inf], dtype=case.dtype)
    there = case.manifold.projx(wild)
    assert case.manifold.check_point_on_manifold(there)
    assert torch.equal(case.manifold.projx(there), there)
    assert case.manifold._slope(there).isfinite().all()


def test_every_number_is_a_tangent_vector(case):
    assert torch.equal(case.manifold.proju(case.x, case.u), case.u)
    assert case.manifold.check_vector_on_tangent(case.x, case.u)
    assert case.manifold.proju(case.x, case.u[0]).shape == SHAPE


def test_the_exponential_map(case):
    m = case.manifold
    there = m.expmap(case.x, case.u)
    assert m.check_point_on_manifold(there)
    equal(there, case.point(case.phi + case.slope(case.phi) * case.u), case)
    assert torch.equal(m.retr(case.x, case.u), there)
    equal(m.expmap(case.x, torch.zeros_like(case.u)), case.x, case)
    # the speed at 0 is u
    _, speed = torch.autograd.functional.jvp(
        lambda t: m.expmap(case.x, t * case.u), torch.zeros((), dtype=case.dtype), torch.ones((), dtype=case.dtype)
    )
    equal(speed, case.u, case)
    # a one-parameter group along the geodesic
    half = m.expmap(case.x, case.u / 2)
    equal(m.expmap(half, m.transp(case.x, half, case.u / 2)), there, case)


def test_logmap_inverts_expmap(case):
    m, floor = case.manifold, 2e-6 if case.dtype == torch.float32 else 1e-13
    back = m.logmap(case.x, m.expmap(case.x, case.u))
    torch.testing.assert_close(back * case.slope(case.phi), case.u * case.slope(case.phi), atol=8 * floor, rtol=1e-5)
    equal(m.expmap(case.x, m.logmap(case.x, case.y)), case.y, case)
    assert torch.equal(m.logmap(case.x, case.x), torch.zeros_like(case.x))


def test_distance(case):
    m = case.manifold
    apart = m.dist(case.x, case.y)
    floor = 4e-6 if case.dtype == torch.float32 else 1e-13
    torch.testing.assert_close(apart, (case.phi - case.psi).abs(), atol=floor, rtol=1e-5 if floor > 1e-9 else 1e-11)
    assert torch.equal(apart, m.dist(case.y, case.x))
    assert torch.equal(m.dist(case.x, case.x), torch.zeros_like(apart))
    torch.testing.assert_close(m.norm(case.x, m.logmap(case.x, case.y)), apart, **{**case.close, "atol": floor})
    equal(m.dist2(case.x, case.y), apart.square(), case)
    third = m.expmap(case.y, case.v)
    assert (m.dist(case.x, third) <= apart + m.dist(case.y, third) + floor).all()


def test_the_inner_product(case):
    m = case.manifold
    equal(m.inner(case.x, case.u), case.length.square(), case)
    equal(m.norm(case.x, case.u), case.length, case)
    equal(m.inner(case.x, case.u), m.inner(case.x, case.u, case.u), case)
    equal(m.inner(case.x, case.u, case.v), m.inner(case.x, case.v, case.u), case)
    assert (m.inner(case.x, case.u) > 0).all()
    equal(m.inner(case.x, 3 * case.u, case.v), 3 * m.inner(case.x, case.u, case.v), case)
    equal(m.component_inner(case.x, case.u), m.inner(case.x, case.u), case)
    assert m.inner(case.x, case.u, keepdim=True).shape == SHAPE


def test_transport(case):
    m = case.manifold
    u, v = m.transp(case.x, case.y, case.u), m.transp(case.x, case.y, case.v)
    equal(m.inner(case.y, u, v), m.inner(case.x, case.u, case.v), case)
    equal(m.transp(case.y, case.x, u), case.u, case)
    assert torch.equal(m.transp(case.x, case.x, case.u), case.u) or torch.allclose(
        m.transp(case.x, case.x, case.u), case.u
    )
    there, moved = m.retr_transp(case.x, case.u, case.v)
    equal(there, m.retr(case.x, case.u), case)
    equal(moved, m.transp(case.x, there, case.v), case)
    also, along = m.expmap_transp(case.x, case.u, case.v)
    equal(also, there, case)
    equal(along, moved, case)
    equal(m.transp_follow_retr(case.x, case.u, case.v), moved, case)


def test_the_gradient_is_the_gradient_in_the_chart(case):
    """⟨grad f, u⟩ = df(u); in the chart the gradient is d(f∘φ⁻¹)/dφ."""
    m = case.manifold

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (x / (m.upper if math.isfinite(m.upper) else 1.0)).sin().sum()

    x = case.x.clone().requires_grad_()
    (euclidean,) = torch.autograd.grad(loss(x), x)
    gradient = m.egrad2rgrad(case.x, euclidean)
    equal(m.inner(case.x, gradient, case.u), euclidean * case.u, case)
    phi = m.chart(case.x).detach().requires_grad_()
    (in_chart,) = torch.autograd.grad(loss(m.from_chart(phi)), phi)
    equal(gradient * m._slope(case.x), in_chart, case, rtol=1e-4 if case.dtype == torch.float32 else 1e-10)


def test_chart_and_back(case):
    m = case.manifold
    equal(m.from_chart(case.phi), case.x, case)
    floor = 4e-6 if case.dtype == torch.float32 else 1e-13
    torch.testing.assert_close(m.chart(case.x), case.phi, atol=floor, rtol=1e-5)


def test_the_slope_is_the_derivative_of_the_chart(case):
    x = case.x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(case.manifold.chart(x).sum(), x)
    equal(case.manifold._slope(case.x), slope, case, rtol=1e-4 if case.dtype == torch.float32 else 1e-10)


def test_random_points_and_the_origin(case):
    m = case.manifold
    for make in (m.random, m.origin):
        for size in ((3, 2), ((3, 2),)):
            point = make(*size, dtype=case.dtype)
            assert isinstance(point, geoopt.ManifoldTensor)
            assert point.shape == (3, 2)
            assert point.dtype == case.dtype
            assert m.check_point_on_manifold(point)
    middle = 1.0 if math.isinf(m.upper) else m.upper / 2
    equal(m.origin(4, dtype=case.dtype).as_subclass(torch.Tensor), torch.full((4,), middle, dtype=case.dtype), case)
    spread = m.chart(m.random(4000, dtype=case.dtype, std=0.5))
    assert abs(float(spread.std()) - 0.5) < 0.05
    assert abs(float(spread.mean())) < 0.05
    assert torch.equal(m.origin(4, seed=1), m.origin(4, seed=2))


def test_scaled_manifolds_obey_the_scaled_laws(case):
    m = geoopt.Scaled(case.manifold, 2.0)
    equal(m.dist(case.x, case.y), 2 * case.manifold.dist(case.x, case.y), case)
    equal(
        m.norm(case.x, m.logmap(case.x, case.y)),
        m.dist(case.x, case.y),
        case,
        atol=1e-5 if case.dtype == torch.float32 else 1e-12,
    )
    equal(m.expmap(case.x, m.logmap(case.x, case.y)), case.y, case)
    assert m.check_point_on_manifold(m.random(3, dtype=case.dtype))


def test_batches_are_entries(case):
    m = case.manifold
    for name, arguments in {
        "expmap": (case.x, case.u),
        "logmap": (case.x, case.y),
        "dist": (case.x, case.y),
        "inner": (case.x, case.u, case.v),
        "transp": (case.x, case.y, case.u),
        "egrad2rgrad": (case.x, case.u),
    }.items():
        whole = getattr(m, name)(*arguments)
        assert whole.shape == SHAPE, name
        equal(getattr(m, name)(*(a[2, 3] for a in arguments)), whole[2, 3], case)
        assert getattr(m, name)(*(a[:, :0] for a in arguments)).shape == (5, 0), name
    many = m.expmap(case.x[:, None], case.u[None])  # broadcasting
    equal(many[1, 1], m.expmap(case.x[1], case.u[1]), case)


# at the ends


@pytest.mark.parametrize("upper", UPPER.values(), ids=UPPER)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("step", [1e30, -1e30, math.inf, -math.inf])
def test_no_step_leaves_and_nothing_breaks_at_the_ends(upper, dtype, step):
    m = OpenInterval(upper)
    start = m.origin(3, dtype=dtype).as_subclass(torch.Tensor)
    end = m.expmap(start, torch.full((3,), step, dtype=dtype))
    assert m.check_point_on_manifold(end)
    assert (end > start).all() if step > 0 else (end < start).all()
    gradient = m.egrad2rgrad(end, torch.full((3,), 0.1, dtype=dtype))
    assert gradient.isfinite().all()
    assert m.component_inner(end, gradient).isfinite().all()
    assert m.dist(start, end).isfinite().all()
    assert m.logmap(end, start).isfinite().all() or math.isinf(upper)
    assert m.check_point_on_manifold(m.expmap(end, torch.full((3,), -step, dtype=dtype)))


@pytest.mark.parametrize("upper", UPPER.values(), ids=UPPER)
@pytest.mark.parametrize("towards", [1.0, -1.0])
def test_a_learned_point_comes_back_from_an_end(upper, towards):
    m = OpenInterval(upper)
    point = ManifoldParameter(m.origin(2), manifold=m)
    optimizer = RiemannianAdamW([point], lr=0.5)
    best = m.from_chart(torch.tensor([-1.0, 1.0]))
    for step in range(500):
        optimizer.zero_grad()
        if step < 20:
            optimizer.param_groups[0]["lr"] = 50.0
            (-towards * m.chart(point).sum()).backward()
        else:
            optimizer.param_groups[0]["lr"] = 0.5
            m.dist2(point, best).sum().backward()
        optimizer.step()
        assert m.check_point_on_manifold(point)
    torch.testing.assert_close(m.chart(point).detach(), m.chart(best), atol=0.1, rtol=0)


@pytest.mark.parametrize(
    ("upper", "point", "good"),
    [
        (2.0, [0.1, 1.9], True),
        (2.0, [0.0, 1.0], False),
        (2.0, [1.0, 2.0], False),
        (2.0, [-1.0], False),
        (2.0, [math.nan], False),
        (math.inf, [1e30], True),
        (math.inf, [0.0], False),
        (math.inf, [math.inf], False),
    ],
)
def test_points_off_the_manifold_are_named(upper, point, good):
    ok, reason = OpenInterval(upper).check_point_on_manifold(torch.tensor(point), explain=True)
    assert ok is good
    assert good or reason == f"entries must lie in (0, {upper:g}); start from a number inside"


@pytest.mark.parametrize("upper", [0, -1.0, -math.inf, math.nan])
def test_bad_ends(upper):
    with pytest.raises(GeneratorError, match=r"upper: expected a positive number, got .*; times"):
        OpenInterval(upper)


def test_copies():
    m = OpenInterval(3.0)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert other.upper == 3.0
    assert "upper=3.0" in repr(m)
    parameter = ManifoldParameter(torch.tensor([1.0]), manifold=m)
    for other in (copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter))):
        assert isinstance(other, ManifoldParameter)
        assert other.manifold.upper == 3.0
        assert torch.equal(other, parameter)
