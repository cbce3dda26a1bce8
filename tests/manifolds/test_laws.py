"""The laws of a Riemannian manifold over a table of manifolds; the first part says what geoopt's own battery says."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import geoopt
import pytest
import torch
from covering import parameters
from manifold_cases import DTYPES, ROWS, Case
from torch import Tensor

from liegroup_attn.lightning import RiemannianAdamW
from liegroup_attn.manifolds import ManifoldParameter, off_manifold

NAMES = list(ROWS)
OURS = [name for name in NAMES if not name.startswith("geoopt")]
LOGS = [name for name in NAMES if ROWS[name].has_log]
SEEDS = (0, 1)


def over(names: list[str], dtypes: tuple[str, ...] = tuple(DTYPES), rounding: bool = False):
    """Run a law over these rows of the table; one that ``rounding`` can break is held in float32 by every run."""

    def kept(row: tuple) -> bool:
        return row[2] == SEEDS[0] and (rounding or row[1] == dtypes[-1])

    rows = parameters(itertools.product(names, dtypes, SEEDS), kept, lambda row: "-".join(map(str, row)))
    return pytest.mark.parametrize("case", rows, indirect=True)


@pytest.fixture
def case(request) -> Case:
    return Case(*request.param)


def close(got: Tensor, expected: Tensor, case: Case, loose: float = 1.0) -> None:
    torch.testing.assert_close(got, expected, atol=loose * case.tol, rtol=loose * case.tol)


# geoopt's battery


@over(NAMES, rounding=True)
def test_points_are_points_and_projection_keeps_them(case):
    m = case.manifold
    assert m.check_point_on_manifold(case.x, explain=True) == (True, None)
    close(m.projx(case.x), case.x, case)
    assert float(off_manifold(case.x, m)) < case.tol


@over(NAMES, rounding=True)
def test_projection_lands_on_the_manifold_and_stays(case):
    m = case.manifold
    for wild in (case.wild, 3 * case.wild + 1, case.x + 0.1 * case.wild):
        there = m.projx(wild)
        assert m.check_point_on_manifold(there, explain=True) == (True, None)
        close(m.projx(there), there, case)


@over(NAMES, rounding=True)
def test_projected_vectors_are_tangent_and_stay(case):
    m = case.manifold
    u = m.proju(case.x, case.wild)
    assert m.check_vector_on_tangent(case.x, u, explain=True) == (True, None)
    close(m.proju(case.x, u), u, case)
    close(m.proju(case.x, case.u), case.u, case)


@over(NAMES)
def test_stacks_are_their_items(case):
    m = case.manifold
    stack = torch.stack([case.x] * 4)
    vectors = torch.stack([case.u, case.v, case.w, -case.u])
    wild = torch.stack([case.wild, case.wild + 1, -case.wild, 2 * case.wild])
    ends = m.retr(stack, vectors)
    moved = m.transp(stack, ends, vectors.flip(0))
    for i in range(4):
        close(m.projx(wild)[i], m.projx(wild[i]), case)
        close(m.proju(stack, wild)[i], m.proju(case.x, wild[i]), case)
        close(m.proju(case.x, wild)[i], m.proju(case.x, wild[i]), case)
        close(ends[i], m.retr(case.x, vectors[i]), case)
        close(m.retr(case.x, vectors)[i], ends[i], case)
        close(moved[i], m.transp(case.x, ends[i], vectors.flip(0)[i]), case)
        close(m.egrad2rgrad(stack, wild)[i], m.egrad2rgrad(case.x, wild[i]), case)
        close(m.inner(stack, vectors, vectors.flip(0))[i], m.inner(case.x, vectors[i], vectors.flip(0)[i]), case)
    assert m.proju(stack, case.wild).shape == stack.shape
    assert m.check_point_on_manifold(ends, explain=True) == (True, None)
    assert m.check_vector_on_tangent(ends, moved, explain=True) == (True, None)


@over(NAMES, rounding=True)
def test_a_retraction_is_undone_where_it_says_so(case):
    m = case.manifold
    assert m.reversible in (True, False)
    if m.reversible:
        there, u = m.retr_transp(case.x, case.u, case.u)
        back, v = m.retr_transp(there, -u, u)
        close(back, case.x, case)
        close(v, case.u, case)


@over(LOGS)
def test_a_random_vector_of_one_item_goes_and_comes(case):
    m = case.manifold
    stack = torch.stack([case.x] * 4)
    u = m.proju(stack, 0.1 * case.wild)
    there = m.expmap(stack, u)
    close(m.expmap(stack, m.logmap(stack, there)), there, case)


# geodesics


@over(NAMES)
def test_no_step_is_no_step(case):
    m = case.manifold
    zero = torch.zeros_like(case.x)
    close(m.expmap(case.x, zero), case.x, case)
    close(m.retr(case.x, zero), case.x, case)


@over(NAMES, ("float64",))
@pytest.mark.parametrize("verb", ["expmap", "retr"])
def test_the_first_order_is_the_vector(case, verb):
    step, h = getattr(case.manifold, verb), 1e-5
    speed = (step(case.x, h * case.u) - step(case.x, -h * case.u)) / (2 * h)
    torch.testing.assert_close(speed, case.u, atol=1e-8, rtol=1e-8)


@over(NAMES, rounding=True)
def test_no_step_leaves(case):
    m = case.manifold
    for size in (1.0, 10.0, 1e2, 1e9, 1e30):
        if size <= case.row.far:
            for step in (m.retr, m.expmap):
                there = step(case.x, case.u * (size / case.row.size))
                assert m.check_point_on_manifold(there, explain=True) == (True, None), (size, step)
                assert m.egrad2rgrad(there, 1e-3 * case.wild).isfinite().all()


@over(LOGS)
def test_a_geodesic_is_a_one_parameter_group(case):
    m = case.manifold
    half, speed = m.expmap_transp(case.x, case.u / 2, case.u / 2)
    close(m.expmap(half, speed), m.expmap(case.x, case.u), case)


@over(LOGS, rounding=True)
def test_logmap_inverts_expmap(case):
    m = case.manifold
    close(m.logmap(case.x, m.expmap(case.x, case.u)), case.u, case)
    close(m.expmap(case.x, m.logmap(case.x, case.y)), case.y, case)
    close(m.logmap(case.x, case.x), torch.zeros_like(case.x), case)
    assert m.check_vector_on_tangent(case.x, m.logmap(case.x, case.y), explain=True) == (True, None)


# the metric


@over(LOGS, rounding=True)
def test_distance(case):
    m = case.manifold
    apart = m.dist(case.x, case.y)
    close(m.norm(case.x, m.logmap(case.x, case.y)), apart, case)
    close(m.dist(case.y, case.x), apart, case)
    close(m.dist2(case.x, case.y), apart.square(), case)
    close(m.dist2(case.x, case.x), torch.zeros_like(apart), case)
    close(m.dist(case.x, m.expmap(case.x, case.u)), case.norm_of(case.u), case)
    third = m.expmap(case.x, case.v)
    assert (m.dist(case.y, third) <= apart + m.dist(case.x, third) + case.tol).all()
    assert m.dist(case.x, case.y, keepdim=True).shape == m.inner(case.x, case.u, keepdim=True).shape


@over(NAMES)
def test_the_inner_product(case):
    m, x, u, v, w = case.manifold, case.x, case.u, case.v, case.w
    batch = x.shape[: x.dim() - m.ndim]
    assert m.inner(x, u, v).shape == batch
    assert m.inner(x, u, v, keepdim=True).shape == batch + (1,) * m.ndim
    close(m.inner(x, u), m.inner(x, u, u), case)
    close(m.inner(x, u, v), m.inner(x, v, u), case)
    close(m.inner(x, 2 * u + w, v), 2 * m.inner(x, u, v) + m.inner(x, w, v), case)
    close(m.norm(x, u).square(), m.inner(x, u), case)
    nonzero = u.abs().sum(tuple(range(-m.ndim, 0))) > 0 if m.ndim else u != 0
    assert (m.inner(x, u)[nonzero] > 0).all()
    components = m.component_inner(x, u)
    assert (components >= 0).all()
    assert torch.broadcast_shapes(components.shape, x.shape) == x.shape


@over(NAMES, rounding=True)
def test_transport(case):
    m = case.manifold
    u, v = (m.transp(case.x, case.y, vector) for vector in (case.u, case.v))
    assert m.check_vector_on_tangent(case.y, u, explain=True) == (True, None)
    if case.row.isometric:
        close(m.inner(case.y, u, v), m.inner(case.x, case.u, case.v), case)
        close(m.transp(case.y, case.x, u), case.u, case)
        close(m.transp(case.x, case.x, case.u), case.u, case)


@over(NAMES)
def test_two_verbs_at_once_are_the_two(case):
    m = case.manifold
    there = m.retr(case.x, case.u)
    if case.row.isometric:  # Stiefel's transport at once is another one
        end, moved = m.expmap_transp(case.x, case.u, case.v)
        close(end, m.expmap(case.x, case.u), case)
        close(moved, m.transp(case.x, end, case.v), case)
        close(m.transp_follow_expmap(case.x, case.u, case.v), moved, case)
    end, moved = m.retr_transp(case.x, case.u, case.v)
    close(end, there, case)
    close(moved, m.transp_follow_retr(case.x, case.u, case.v), case)


@over(OURS, ("float64",))
@pytest.mark.parametrize("length", [0.5, 1.0, 3.0])
def test_what_a_retraction_carries_is_its_derivative(case, length):
    """Along the step: what a line search takes for the slope."""
    m, u, h = case.manifold, length * case.u, 1e-5
    end, moved = m.retr_transp(case.x, u, case.u)
    assert m.check_vector_on_tangent(end, moved, explain=True) == (True, None)
    ahead, behind = (m.retr(case.x, u + step * case.u) for step in (h, -h))
    torch.testing.assert_close(moved, (ahead - behind) / (2 * h), atol=1e-7, rtol=1e-7)
    slope = (m.inner(end, m.egrad2rgrad(end, case.wild), moved)).sum()
    by_differences = (case.wild * (ahead - behind)).sum() / (2 * h)
    torch.testing.assert_close(slope, by_differences, atol=1e-6, rtol=1e-6)


@over(NAMES, ("float64",))
def test_what_a_retraction_carries_is_linear(case):
    m, u = case.manifold, case.u
    carried = [m.transp_follow_retr(case.x, u, v) for v in (case.v, case.w, 2 * case.v + case.w)]
    close(carried[2], 2 * carried[0] + carried[1], case)


# gradients


def loss(x: Tensor, weights: Tensor) -> Tensor:
    return (x * weights).sin().sum()


@over(NAMES, rounding=True)
def test_the_gradient_represents_the_derivative(case):
    m, x = case.manifold, case.x.clone().requires_grad_()
    (euclidean,) = torch.autograd.grad(loss(x, case.wild), x)
    gradient = m.egrad2rgrad(case.x, euclidean)
    assert m.check_vector_on_tangent(case.x, gradient, explain=True) == (True, None)
    axes = tuple(range(-m.ndim, 0))
    expected = (euclidean * case.u).sum(axes) if axes else euclidean * case.u
    close(m.inner(case.x, gradient, case.u), expected, case)


@over([name for name in NAMES if Case(name, "float64", 0).flat], rounding=True)
def test_the_gradient_is_that_of_the_chart(case):
    m, x = case.manifold, case.x.clone().requires_grad_()
    (euclidean,) = torch.autograd.grad(loss(x, case.wild), x)
    phi = m.chart(case.x).detach().clone().requires_grad_()
    (in_chart,) = torch.autograd.grad(loss(m.from_chart(phi), case.wild), phi)
    close(m.push(case.x, m.egrad2rgrad(case.x, euclidean)), in_chart, case)
    close(m.from_chart(phi).detach(), case.x, case)
    close(m.lift(case.x, m.push(case.x, case.u)), case.u, case)


@over(LOGS, ("float64",))
def test_distance_can_be_minimised(case):
    """The gradient of half the squared distance to y is −log_x(y)."""
    m, x = case.manifold, case.x.clone().requires_grad_()
    (euclidean,) = torch.autograd.grad(m.dist2(x, case.y).sum() / 2, x)
    close(m.egrad2rgrad(case.x, euclidean), -m.logmap(case.x, case.y), case)


# points, copies, scale, training


@over(NAMES, rounding=True)
def test_random_points_and_the_origin(case):
    m = case.manifold
    for make in (m.random, m.origin):
        for size in (case.row.shape, (case.row.shape,)):
            torch.manual_seed(0)
            point = make(*size, dtype=case.dtype, device=torch.device("cpu"))
            assert isinstance(point, geoopt.ManifoldTensor)
            assert point.shape == case.row.shape
            assert point.dtype == case.dtype
            assert m.check_point_on_manifold(point, explain=True) == (True, None)
            torch.manual_seed(0)
            assert torch.equal(make(*size, dtype=case.dtype), point)
    assert torch.equal(m.origin(*case.row.shape), m.origin(*case.row.shape))


@over(NAMES, ("float64",))
def test_copies(case):
    m = case.manifold
    parameter = ManifoldParameter(case.x.clone(), manifold=m)
    file = io.BytesIO()
    torch.save(parameter, file)
    file.seek(0)
    for other in (
        copy.deepcopy(parameter),
        pickle.loads(pickle.dumps(parameter)),
        torch.load(file, weights_only=False),
    ):
        assert isinstance(other, ManifoldParameter)
        assert torch.equal(other, parameter)
        assert repr(other.manifold) == repr(m)
        close(other.manifold.retr(case.x, case.u), m.retr(case.x, case.u), case)


@over([name for name in LOGS if name != "product"], ("float64",))  # geoopt.Scaled takes no products
def test_scaled_manifolds(case):
    m = geoopt.Scaled(case.manifold, 2.0).to(case.dtype)
    close(m.dist(case.x, case.y), 2 * case.manifold.dist(case.x, case.y), case)
    close(m.expmap(case.x, m.logmap(case.x, case.y)), case.y, case)
    assert m.check_point_on_manifold(m.random(*case.row.shape, dtype=case.dtype))


@over(NAMES, ("float32",))
def test_training_stays_and_improves(case):
    m = case.manifold
    parameter = ManifoldParameter(case.x.clone(), manifold=m)
    optimizer = RiemannianAdamW([parameter], lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        value = (parameter - case.y).square().sum()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert m.check_point_on_manifold(parameter, explain=True) == (True, None)
    assert float(off_manifold(parameter, m)) < 2e-6
    assert losses[-1] <= 0.9 * losses[0]


@over([name for name in OURS if ROWS[name].shape[-1] > 1], ("float64",))  # of size 1 there is but one point
@pytest.mark.parametrize("directions", ["steepest", "fr", "pr"])
def test_a_line_search_goes_down(case, directions):
    """geoopt's, which takes what is carried for the slope: it finds a step every time, and never one that goes up."""
    point = ManifoldParameter(case.x.clone(), manifold=case.manifold)
    optimizer = geoopt.optim.RiemannianLineSearch([point], line_search_method="wolfe", cg_method=directions)

    def closure() -> float:
        optimizer.zero_grad()
        value = (point - case.y).square().sum()
        value.backward()
        return value.item()  # SciPy's search

    losses = [closure()]
    for _ in range(3):
        optimizer.step(closure)
        losses.append(closure())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_the_table_has_every_manifold():
    import liegroup_attn.manifolds as manifolds

    ours = {
        getattr(manifolds, name)
        for name in manifolds.__all__
        if isinstance(getattr(manifolds, name), type)
        and issubclass(getattr(manifolds, name), geoopt.Manifold)
        and getattr(manifolds, name).__module__.startswith("liegroup_attn")
    }
    assert ours - {manifolds.FlatManifold} <= {type(row.make()) for row in ROWS.values()}
