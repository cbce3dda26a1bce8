"""The laws of a Lie algebra, its basis, and Baker–Campbell–Hausdorff with the observed order."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import D, algebra_element, rate_matrix, square_matrix
from torch.autograd import gradcheck, gradgradcheck

from liegroup_attn.algebra import (
    Ad,
    ad,
    basis,
    bch,
    bracket,
    coordinates,
    elementary,
    expm,
    from_coordinates,
    in_algebra,
    is_rate_matrix,
    logm,
)
from liegroup_attn.errors import DtypeError, GeneratorError, ShapeError

SIZES = (1, 2, 3, 6)


def close(got, expected, rtol=1e-13):
    size = float(expected.detach().abs().max()) if expected.numel() else 0
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol * max(1.0, size))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", [algebra_element, rate_matrix, square_matrix])
def test_the_laws_of_a_lie_algebra(n, kind):
    X, Y, Z = kind(3, 2, n)
    zero = torch.zeros_like(X)
    close(bracket(X, Y), -bracket(Y, X))
    close(bracket(X, X), zero)
    close(bracket(2 * X - 3 * Y, Z), 2 * bracket(X, Z) - 3 * bracket(Y, Z))
    jacobi = bracket(X, bracket(Y, Z)) + bracket(Y, bracket(Z, X)) + bracket(Z, bracket(X, Y))
    close(jacobi, zero, 1e-12)
    close(bracket(X, Y), torch.from_numpy(X.numpy() @ Y.numpy() - Y.numpy() @ X.numpy()))


@given(st.integers(1, 6), st.integers(0, 1000))
def test_the_algebra_is_closed_and_the_cone_is_not(n, seed):
    X, Y = algebra_element(n, seed=seed), algebra_element(n, seed=seed + 1)
    assert in_algebra(bracket(X, Y), atol=1e-11) == (True, None)
    A, B = rate_matrix(n, seed=seed), rate_matrix(n, seed=seed + 1)
    assert is_rate_matrix(A + 2 * B)[0]
    trace = bracket(A, B).diagonal().sum()
    assert abs(trace) < 1e-13  # a rate matrix of trace 0 is 0
    assert not is_rate_matrix(bracket(A, B), atol=1e-9)[0] or bracket(A, B).abs().max() < 1e-9


def test_brackets_broadcast():
    got = bracket(algebra_element(4, 1, 3), algebra_element(5, 3))
    assert got.shape == (4, 5, 3, 3)
    close(got[2, 3], bracket(algebra_element(4, 1, 3)[2, 0], algebra_element(5, 3)[3]))


# the adjoint action


@pytest.mark.parametrize("n", SIZES)
def test_ad_is_the_matrix_of_the_bracket(n):
    X, Y = algebra_element(2, n), square_matrix(2, n)
    close((ad(X) @ Y.flatten(-2)[..., None])[..., 0], bracket(X, Y).flatten(-2))
    close(ad(bracket(X, Y)), bracket(ad(X), ad(Y)), 1e-12)  # ad is a representation


@pytest.mark.parametrize("n", SIZES)
def test_Ad_of_exp_is_exp_of_ad(n):
    X, Y = algebra_element(2, n, size=0.5), square_matrix(2, n)
    golden = scipy.linalg.expm(ad(X).numpy()) @ Y.flatten(-2)[..., None].numpy()
    close(Ad(expm(X), Y).flatten(-2), torch.from_numpy(golden[..., 0]), 1e-11)


def test_Ad_is_an_action_by_automorphisms():
    g, h = expm(algebra_element(2, 4, size=0.5))
    X, Y = algebra_element(4), algebra_element(4, seed=1)
    close(Ad(g @ h, Y), Ad(g, Ad(h, Y)), 1e-12)
    close(Ad(torch.eye(4, dtype=D), Y), Y)
    close(bracket(Ad(g, X), Ad(g, Y)), Ad(g, bracket(X, Y)), 1e-11)
    assert in_algebra(Ad(g, Y), atol=1e-11) == (True, None)  # g is in the group of the algebra
    close(expm(Ad(g, 0.1 * Y)), Ad(g, expm(0.1 * Y)), 1e-12)


# the basis


@pytest.mark.parametrize("n", SIZES)
def test_the_basis(n):
    L = basis(n, dtype=D)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    assert L.shape == (n * (n - 1), n, n)
    for got, (i, j) in zip(L, pairs, strict=True):
        e = torch.eye(n, dtype=D)
        assert torch.equal(got, torch.outer(e[i], e[j] - e[i]))
        assert torch.equal(got, elementary(i, j, n, dtype=D))
        assert is_rate_matrix(got) == (True, None)
    assert n == 1 or torch.linalg.matrix_rank(L.flatten(1)) == n * (n - 1)


@pytest.mark.parametrize("n", SIZES)
def test_coordinates_and_back(n):
    X = algebra_element(2, 3, n)
    r = coordinates(X)
    assert r.shape == (2, 3, n * (n - 1))
    close(from_coordinates(r), X, 1e-14)
    assert torch.equal(coordinates(from_coordinates(r)), r)
    close(torch.einsum("...a,aij->...ij", r, basis(n, dtype=D)), X)
    assert is_rate_matrix(from_coordinates(r.abs())) == (True, None)


# Baker–Campbell–Hausdorff


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [rate_matrix, algebra_element])
def test_the_error_of_bch_has_the_order_that_is_promised(order, kind):
    X, Y = kind(2, 4)
    steps = np.array([0.2, 0.1, 0.05, 0.025]) / float(torch.linalg.matrix_norm(X, 2))
    errors = [float((bch(s * X, s * Y, order) - logm(expm(s * X) @ expm(s * Y))).norm()) for s in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - (order + 1)) < 0.25, errors


def test_bch_of_commuting_matrices_is_their_sum():
    X = algebra_element(3)
    for order in (1, 2, 3, 4):
        close(bch(X, 2 * X, order), 3 * X, 1e-12)


def test_gradients():
    X, Y = algebra_element(3).requires_grad_(), algebra_element(3, seed=1).requires_grad_()
    for function in (bracket, bch, lambda x, y: Ad(expm(x), y)):
        assert gradcheck(function, (X, Y))
        assert gradgradcheck(function, (X, Y))
    assert gradcheck(ad, X)
    assert gradcheck(lambda x: from_coordinates(coordinates(x).exp()), X)


# bad input

WRONG = {
    "not square": (lambda: bracket(torch.ones(2, 3), torch.ones(2, 3)), ShapeError, r"X: .*square"),
    "another size": (lambda: bracket(torch.eye(2), torch.eye(3)), ShapeError, r"X, Y: .*one size"),
    "another batch": (lambda: bch(torch.zeros(2, 3, 3), torch.zeros(4, 3, 3)), ShapeError, "broadcast"),
    "integers": (lambda: ad(torch.ones(2, 2).long()), DtypeError, "int64"),
    "singular g": (lambda: Ad(torch.zeros(2, 2), torch.eye(2)), GeneratorError, r"g: .*invertible"),
    "to itself": (lambda: elementary(1, 1, 3), GeneratorError, "two different states"),
    "out of range": (lambda: elementary(0, 3, 3), GeneratorError, "0 … 2"),
    "no states": (lambda: basis(0), ShapeError, "at least 1 state"),
    "5 coordinates": (lambda: from_coordinates(torch.ones(5)), ShapeError, "got 5"),
    "order 5": (lambda: bch(torch.eye(2), torch.eye(2), 5), GeneratorError, "order: .*got 5"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()
