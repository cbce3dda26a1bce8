"""Membership with reasons; projections that land, stay and are nearest."""

import math
import re

import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import D, algebra_element, rate_matrix, seeded, square_matrix
from torch.autograd import gradcheck, gradgradcheck

from liegroup_attn.algebra import in_algebra, is_rate_matrix, is_stochastic, project_algebra, project_cone
from liegroup_attn.errors import DtypeError, GeneratorError, MaskError, ShapeError

OUT = {
    "NaN": (in_algebra, torch.tensor([[math.nan]]), "entries must be finite, got NaN or inf"),
    "row sum": (in_algebra, torch.eye(2), "rows must sum to 0 within .*, got 1$"),
    "negative row sum": (in_algebra, -torch.eye(2), "rows must sum to 0 within .*, got 1$"),
    "negative rate": (is_rate_matrix, torch.tensor([[1.0, -1.0], [0, 0]]), "off-diagonal .* got -1$"),
    "one of a batch": (is_rate_matrix, torch.stack([torch.zeros(2, 2), torch.eye(2)]), "sum to 0"),
    "negative probability": (is_stochastic, torch.tensor([[1.25, -0.25], [0, 1]]), "entries .* got -0.25$"),
    "negative diagonal": (is_stochastic, torch.tensor([[-0.25, 1.25], [0, 1]]), "entries .* got -0.25$"),
    "probabilities of 0.9": (is_stochastic, torch.tensor([[0.5, 0.4], [0, 1]]), "rows must sum to 1 .* got 0.9$"),
    "infinite": (is_stochastic, torch.tensor([[math.inf]]), "finite"),
}


@pytest.mark.parametrize("name", OUT)
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_what_is_outside_and_why(name, dtype):
    check, matrix, reason = OUT[name]
    ok, why = check(matrix.to(dtype))
    assert not ok
    assert re.search(reason, why)


@pytest.mark.parametrize("n", [1, 2, 20])
def test_what_is_inside(n):
    assert in_algebra(algebra_element(3, n)) == (True, None)
    assert is_rate_matrix(rate_matrix(3, n)) == (True, None)
    assert is_stochastic(square_matrix(3, n).softmax(-1)) == (True, None)
    assert is_stochastic(square_matrix(3, n).float().softmax(-1)) == (True, None)
    assert in_algebra(torch.eye(n), atol=2.0) == (True, None)
    assert is_stochastic(torch.zeros(0, n, n)) == (True, None)


# projections

SUPPORTS = {
    "all": None,
    "causal": torch.ones(5, 5).tril().bool(),
    "band": (torch.arange(5)[:, None] - torch.arange(5)).abs() <= 1,
    "a row alone": torch.arange(5)[:, None] > 0,
    "one each": torch.rand(3, 5, 5, generator=seeded()) < 0.5,
}
PROJECTIONS = {"algebra": (project_algebra, in_algebra), "cone": (project_cone, is_rate_matrix)}


@pytest.mark.parametrize("support", SUPPORTS.values(), ids=SUPPORTS)
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_projections_land_and_stay(projection, support, dtype):
    project, inside = PROJECTIONS[projection]
    X = square_matrix(3, 5, size=3.0).to(dtype)
    there = project(X, support)
    assert there.dtype == dtype
    assert inside(there) == (True, None)
    if support is not None:
        assert (there.masked_select(~(support | torch.eye(5).bool()).expand(3, 5, 5)) == 0).all()
    if projection == "cone":
        assert (there.masked_fill(torch.eye(5).bool(), 0) >= 0).all()  # not merely to rounding
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(project(there, support), there, rtol=0, atol=16 * eps)
    close_sums = there.double().sum(-1).abs().max()
    assert close_sums <= 4 * eps * float(there.abs().max())


@pytest.mark.parametrize("support", SUPPORTS.values(), ids=SUPPORTS)
def test_the_projection_on_the_algebra_is_orthogonal(support):
    """X − π(X) is orthogonal to every element of the algebra on the support."""
    X, Z = square_matrix(3, 5), project_algebra(square_matrix(3, 5, seed=1), support)
    gap = X - project_algebra(X, support)
    torch.testing.assert_close((gap * Z).sum((-2, -1)), torch.zeros(3, dtype=D), rtol=0, atol=1e-13)


@pytest.mark.parametrize("support", SUPPORTS.values(), ids=SUPPORTS)
def test_the_projection_on_the_cone_is_nearest(support):
    """For a closed convex cone: ⟨X − π, π⟩ = 0 and ⟨X − π, Z⟩ ≤ 0 for its edges Z, hence for all of it."""
    X = square_matrix(3, 5)
    there = project_cone(X, support)
    gap = X - there
    torch.testing.assert_close((gap * there).sum(-1), torch.zeros(3, 5, dtype=D), rtol=0, atol=1e-13)
    along = gap - gap.diagonal(dim1=-2, dim2=-1)[..., None]  # ⟨gap, L_ij⟩
    allowed = torch.ones(5, 5).bool() if support is None else support
    assert (along.masked_select(allowed.expand(3, 5, 5)) <= 1e-14).all()


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.integers(0, 3))
def test_rows_of_the_cone_by_nonnegative_least_squares(row, i):
    """SciPy: the rates r ≥ 0 that bring Σ r_j L_ij nearest to the row."""
    X = torch.zeros(4, 4, dtype=D)
    X[i] = torch.tensor(row, dtype=D)
    targets = [j for j in range(4) if j != i]
    edges = torch.eye(4, dtype=D)[targets] - torch.eye(4, dtype=D)[i]
    rates, _ = scipy.optimize.nnls(edges.T.numpy(), X[i].numpy())
    torch.testing.assert_close(project_cone(X)[i, targets], torch.from_numpy(rates), rtol=0, atol=1e-10)


def test_points_of_the_cone_do_not_move():
    for n in (1, 2, 7):
        Q = rate_matrix(2, n)
        torch.testing.assert_close(project_cone(Q), Q, rtol=0, atol=1e-15)
        torch.testing.assert_close(project_algebra(algebra_element(n)), algebra_element(n), rtol=0, atol=1e-14)


def test_ties_and_large_offsets():
    X = torch.tensor([[0.0, 1.0, 1.0], [1e8, 1e8, 1e8], [-1.0, -1.0, -1.0]], dtype=D)
    expected = torch.tensor([[-2 / 3, 1 / 3, 1 / 3], [0, 0, 0], [0, 0, 0]], dtype=D)
    torch.testing.assert_close(project_cone(X), expected)


def test_gradients():
    for support in (None, SUPPORTS["causal"]):
        X = square_matrix(2, 5, seed=3).requires_grad_()
        for project in (project_algebra, project_cone):
            assert gradcheck(lambda x, p=project, s=support: p(x, s), X)
            assert gradgradcheck(lambda x, p=project, s=support: p(x, s).square(), X)


def test_the_gradient_of_softmax_lives_in_the_algebra():
    """MATHEMATICS: the row centring of the softmax backward is the projection, weighted by S."""
    scores = square_matrix(4).requires_grad_()
    D_loss = square_matrix(4, seed=1)
    (gradient,) = torch.autograd.grad(scores.softmax(-1), scores, D_loss)
    assert in_algebra(gradient) == (True, None)
    torch.testing.assert_close(project_algebra(gradient), gradient)


WRONG = {
    "not square": (lambda f: f(torch.ones(2, 3)), ShapeError, "square"),
    "vector": (lambda f: f(torch.ones(2)), ShapeError, "2 dimensions"),
    "integers": (lambda f: f(torch.ones(2, 2).long()), DtypeError, "int64"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("function", [in_algebra, is_rate_matrix, is_stochastic, project_algebra, project_cone])
def test_wrong_inputs(function, name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call(function)


@pytest.mark.parametrize("project", [project_algebra, project_cone])
def test_wrong_inputs_of_projections(project):
    for support in (torch.ones(2, 2), torch.ones(3, 3).bool(), torch.ones(4, 2, 2).bool(), [[True]]):
        with pytest.raises(MaskError, match=r"support: expected a bool tensor .* got .*; "):
            project(torch.zeros(2, 2), support)
    for poison in (math.nan, math.inf):
        with pytest.raises(GeneratorError, match="X: expected finite"):
            project(torch.full((2, 2), poison))
    assert project(torch.zeros(0, 2, 2)).shape == (0, 2, 2)
    assert project(torch.zeros(0, 0)).shape == (0, 0)
    assert project(torch.ones(2, 2).bfloat16()).dtype == torch.float32
