"""exp, its derivative and its inverse, against SciPy in float64 and the integral formula."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import scipy.linalg
import torch
from matrices import D, algebra_element, jordan, rate_matrix, rotation, sink, square_matrix
from torch.autograd import gradcheck, gradgradcheck

from liegroup_attn.algebra import dexp, expm, logm
from liegroup_attn.errors import DtypeError, GeneratorError, ShapeError

EXP = {
    "zero": torch.zeros(3, 3, dtype=D),
    "one number": torch.tensor([[-2.5]], dtype=D),
    "rates 2": rate_matrix(2),
    "rates 20": rate_matrix(20, size=30.0),
    "sink": sink(33),
    "source": sink(33).mT.contiguous(),
    "small": square_matrix(5, size=1e-7),
    "any": square_matrix(6),
    "defective": jordan(-0.5, 4),
    "nilpotent": jordan(0.0, 4, above=10.0),
    "skew": square_matrix(4) - square_matrix(4).mT,
    "strided": rate_matrix(4).mT,
}
# Upper triangular, of unlike sizes: a norm of 1e5 and powers that vanish.
NON_NORMAL = torch.diag(torch.tensor([0.3, -0.2, 0.1, 0.25], dtype=D)) + 3e4 * torch.ones(4, 4, dtype=D).triu(1)


def close(got: torch.Tensor, expected: object, rtol: float = 1e-13) -> None:
    """Relative to the largest entry."""
    expected = torch.as_tensor(np.real(expected) if isinstance(expected, np.ndarray) else expected).detach()
    torch.testing.assert_close(got, expected, rtol=0, atol=rtol * max(float(expected.abs().max()), 1e-300))


@pytest.mark.parametrize("name", EXP)
def test_expm_is_scipys(name):
    X = EXP[name]
    close(expm(X), scipy.linalg.expm(X.numpy()))
    close(expm(torch.stack([X, -X]))[1], scipy.linalg.expm(-X.numpy()), 1e-12)
    close(expm(X.float()).double(), scipy.linalg.expm(X.float().double().numpy()), 3e-5 if "rates 20" in name else 3e-6)


def test_strongly_non_normal_matrices_keep_their_digits():
    """Each entry, beside matrices of other kinds; torch scales by the norm and loses what SciPy keeps."""
    both = torch.stack([NON_NORMAL, torch.zeros(4, 4, dtype=D), NON_NORMAL.mT]).requires_grad_()
    found = expm(both)
    expected = scipy.linalg.expm(NON_NORMAL.numpy())
    np.testing.assert_allclose(found[0].detach().numpy(), expected, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(found[2].detach().numpy(), expected.T, rtol=1e-12, atol=1e-300)
    assert torch.equal(found[1], torch.eye(4, dtype=D))
    (gradient,) = torch.autograd.grad(found[:, 0, 3].sum(), both)
    assert gradient.isfinite().all()
    step = torch.zeros_like(both)
    step[0, 1, 2] = 1e-2
    (slope,) = (expm(both.detach() + step) - expm(both.detach() - step))[0, 0, 3:] / 2e-2
    assert abs(float(gradient[0, 1, 2] / slope) - 1) < 1e-6


@pytest.mark.parametrize("t", [1e-4, 0.1, 1.0, 10.0, 1e3])
def test_exp_of_the_cone_is_stochastic(t):
    for n in (1, 2, 7, 20):
        P = expm(t * rate_matrix(3, n, size=2.0, seed=n))
        assert (P > -1e-15).all()
        torch.testing.assert_close(P.sum(-1), torch.ones(3, n, dtype=D), rtol=0, atol=1e-13 * max(1, math.log2(t)))


def test_exp_is_a_one_parameter_group():
    X = algebra_element(2, 5)
    close(expm(0.3 * X) @ expm(0.5 * X), expm(0.8 * X))
    close(expm(X) @ expm(-X), torch.eye(5, dtype=D).expand(2, 5, 5), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_and_autocast_compute_in_float32(dtype):
    X = rate_matrix(3, 6).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = expm(X), dexp(X, X), logm(expm(X))
    assert {g.dtype for g in got} == {torch.float32}
    golden = scipy.linalg.expm(X.double().numpy())
    close(got[0].double(), golden, 1e-6)
    close(got[1].double(), X.double().numpy() @ golden, 1e-6)
    close(got[2].double(), X.double(), 1e-5)


def test_nan_stays_in_its_item():
    X = rate_matrix(3, 4)
    clean = expm(X)
    X[1, 0, 2] = math.nan
    got = expm(X)
    assert got[1].isnan().all()
    torch.testing.assert_close(got[[0, 2]], clean[[0, 2]], rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape", [(0, 0), (2, 0, 0), (0, 3, 3)])
@pytest.mark.parametrize("function", [expm, logm, lambda X: dexp(X, X)])
def test_nothing_in_nothing_out(function, shape):
    assert function(torch.zeros(shape)).shape == shape


# the derivative


@pytest.mark.parametrize("name", EXP)
def test_dexp_is_scipys(name):
    X = EXP[name]
    for H in (square_matrix(X.size(0), seed=1), square_matrix(X.size(0), size=1e6, seed=2)):
        expected = scipy.linalg.expm_frechet(X.numpy(), H.numpy(), compute_expm=False)
        close(dexp(X, H), expected, 1e-12)


def test_dexp_is_the_integral():
    """∫₀¹ e^{(1−s)X} H e^{sX} ds by Gauss–Legendre."""
    X, H = algebra_element(2, 4), algebra_element(2, 4, seed=1)
    nodes, weights = np.polynomial.legendre.leggauss(24)
    terms = [w / 2 * expm((1 - s) * X) @ H @ expm(s * X) for s, w in zip((nodes + 1) / 2, weights, strict=True)]
    close(dexp(X, H), sum(terms))


def test_dexp_is_the_limit_of_differences():
    X, H, step = algebra_element(4), algebra_element(4, seed=1), 1e-5
    close(dexp(X, H), (expm(X + step * H) - expm(X - step * H)) / (2 * step), 1e-8)


def test_dexp_is_linear_and_broadcasts():
    X, H, K = algebra_element(3, 1, 4), square_matrix(2, 4, seed=1), square_matrix(2, 4, seed=2)
    got = dexp(X, 2 * H - 3 * K)
    assert got.shape == (3, 2, 4, 4)
    close(got, 2 * dexp(X, H) - 3 * dexp(X, K))
    assert (dexp(X, 0 * H) == 0).all()
    assert dexp(X, H.float()).dtype == D


def test_gradients_of_exp():
    X, H = algebra_element(2, 3).requires_grad_(), square_matrix(3, seed=1).requires_grad_()
    for one in (X, X[0].detach().requires_grad_()):
        assert gradcheck(expm, one, check_forward_ad=True)
        assert gradgradcheck(expm, one)
    assert gradcheck(dexp, (X, H), check_forward_ad=True)
    assert gradgradcheck(dexp, (X[0].detach().requires_grad_(), H))
    (gradient,) = torch.autograd.grad(expm(X), X, H.expand(2, 3, 3))
    close(gradient, dexp(X.mT, H))  # the adjoint of the derivative


# the logarithm


class Log(NamedTuple):
    A: torch.Tensor
    rtol: float = 1e-12  # its sensitivity times the rounding unit


LOG = {
    "identity": Log(torch.eye(3, dtype=D)),
    "one number": Log(torch.tensor([[7.0]], dtype=D)),
    "one small number": Log(torch.tensor([[1e-9]], dtype=D)),
    "stochastic 2": Log(expm(rate_matrix(2))),
    "stochastic 20": Log(expm(rate_matrix(20))),
    "stochastic, long time": Log(expm(rate_matrix(20, size=10.0))),
    "any 20": Log(expm(square_matrix(20, size=0.4))),
    "defective": Log(jordan(2.0, 6)),
    "defective, far from normal": Log(jordan(1.0, 4, above=1e6)),
    "defective, small": Log(jordan(1e-3, 4)),
    "rotation": Log(rotation(1.0)),
    "rotation by nearly π": Log(rotation(3.14), 1e-11),
    "rotation by all but π": Log(rotation(3.14159), 1e-8),
    "ill-conditioned": Log(torch.from_numpy(scipy.linalg.hilbert(6)), 1e-8),
    "graded": Log(torch.diag(torch.tensor([1e-6, 1.0, 1e6], dtype=D))),
    "positive definite": Log(square_matrix(8) @ square_matrix(8).mT + torch.eye(8, dtype=D)),
    "causal": Log((square_matrix(12).abs() + 1).tril()),
}


@pytest.mark.filterwarnings("ignore:logm result may be inaccurate")
@pytest.mark.parametrize("name", LOG)
def test_logm_is_scipys(name):
    A, rtol = LOG[name]
    close(logm(A), scipy.linalg.logm(A.numpy()), rtol)


@pytest.mark.parametrize("n", [1, 2, 20])
@pytest.mark.parametrize("size", [1e-8, 1e-9, 1e-12])
def test_near_the_identity_logm_keeps_its_digits(n, size):
    """log(I + E) = E − E²/2 + …; SciPy has eight digits left here."""
    A = torch.eye(n, dtype=D) + square_matrix(n, size=size)
    E = A - torch.eye(n, dtype=D)
    close(logm(A), E - E @ E / 2, 1e-14)


def test_logm_inverts_exp_and_exp_inverts_logm():
    for X in (rate_matrix(3, 5, size=3.0), algebra_element(3, 6, size=0.3), square_matrix(2, 4, size=0.5)):
        close(logm(expm(X)), X, 1e-11)
    for A, rtol in LOG.values():
        if float(torch.linalg.cond(A)) < 1e6:
            close(expm(logm(A)), A, rtol)


def test_the_items_of_a_batch_take_their_own_roots():
    items = [torch.eye(2, dtype=D), expm(rate_matrix(2, size=8.0)), rotation(2.0), 1e5 * torch.eye(2, dtype=D)]
    for got, A in zip(logm(torch.stack(items)[None])[0], items, strict=True):
        close(got, logm(A), 1e-15)


def test_gradients_of_log():
    A = expm(algebra_element(2, 3, size=0.5)).requires_grad_()
    assert gradcheck(logm, A, check_forward_ad=True)
    assert gradgradcheck(logm, A[0].detach().requires_grad_())
    defective = jordan(2.0, 3).requires_grad_()
    assert gradcheck(logm, defective)
    assert gradgradcheck(logm, defective)


def test_the_derivative_of_log_inverts_that_of_exp():
    X, H = algebra_element(2, 4, size=0.5), square_matrix(2, 4, seed=1)
    _, back = torch.func.jvp(logm, (expm(X),), (dexp(X, H),))
    close(back, H, 1e-11)


@pytest.mark.parametrize("function", [expm, logm, lambda X: dexp(X, X)])
def test_function_transforms(function):
    A = expm(algebra_element(3, 4, size=0.3))
    torch.testing.assert_close(torch.func.vmap(function, in_dims=1)(A.movedim(0, 1)), function(A))
    jacobian = torch.func.vmap(torch.func.jacrev(function))(A)
    torch.testing.assert_close(jacobian, torch.func.vmap(torch.func.jacfwd(function))(A))
    torch.testing.assert_close(jacobian[0], torch.autograd.functional.jacobian(function, A[0]))


NO_LOG = {
    "zero": (torch.zeros(2, 2), "singular"),
    "rank one": (torch.tensor([[0.3, 0.7], [0.3, 0.7]]), "singular"),
    "singular, stochastic": (torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.25, 0.5, 0.25]]), "singular"),
    "swap": (torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "eigenvalue -1 on the negative real axis"),
    "half turn": (-torch.eye(2), "eigenvalue -1 on the negative real axis"),
    "negative number": (torch.tensor([[-0.5]]), "eigenvalue -0.5 on the negative real axis"),
    "one in a batch": (torch.stack([torch.eye(2), torch.diag(torch.tensor([1.0, -3.0]))]), "eigenvalue -3"),
    "NaN": (torch.tensor([[math.nan]]), "finite"),
    "inf": (torch.tensor([[math.inf]]), "finite"),
}


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("name", NO_LOG)
def test_matrices_without_logarithm(name, dtype):
    A, reason = NO_LOG[name]
    with pytest.raises(GeneratorError, match=rf"A: expected .*{reason}.*; "):
        logm(A.to(dtype))


@pytest.mark.parametrize("function", [expm, logm, lambda X: dexp(X, torch.eye(2))])
def test_wrong_inputs(function):
    for shape in ((3,), (2, 3)):
        with pytest.raises(ShapeError, match=r"expected .*, got .*; "):
            function(torch.ones(shape))
    with pytest.raises(DtypeError):
        function(torch.ones(2, 2, dtype=torch.long))


def test_dexp_wants_matrices_that_go_together():
    with pytest.raises(ShapeError, match="one size"):
        dexp(torch.eye(2), torch.eye(3))
    with pytest.raises(ShapeError, match="broadcast"):
        dexp(torch.zeros(2, 3, 3), torch.zeros(4, 3, 3))
