"""effective_rank, sink_mass, distance_to_softmax, stationary_mass: values, edges, and what they refuse."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from liegroup_attn.errors import DtypeError, GeneratorError, ShapeError
from liegroup_attn.metrics import distance_to_softmax, effective_rank, sink_mass, stationary_mass

N = 5


def draw_stochastic(*batch, n=N, seed=0):
    scores = torch.randn(*batch, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * scores).softmax(-1)


def draw_generator(*batch, n=N, seed=0):
    rates = draw_stochastic(*batch, n=n, seed=seed) * (1 - torch.eye(n, dtype=torch.float64))
    return rates - torch.diag_embed(rates.sum(-1))


def golden_rank(P):
    s = scipy.linalg.svdvals(P)
    p = s / s.sum()
    return math.exp(-sum(x * math.log(x) for x in p if x > 0))


def golden_pi(Q):
    left = scipy.linalg.null_space(Q.T)
    assert left.shape[1] == 1
    return left[:, 0] / left.sum()


def second(P):
    """Another stochastic matrix, of the same shape, dtype and device."""
    return P.roll(1, -1) if P.dim() else P


# name: (function of one tensor, what draws it, the same of one matrix in NumPy)
MEASURES = {
    "rank": (effective_rank, draw_stochastic, golden_rank),
    "sink": (sink_mass, draw_stochastic, lambda P: P.mean(0).max()),
    "sink of two": (lambda P: sink_mass(P, [0, -2, 0]), draw_stochastic, lambda P: P[:, [0, N - 2]].sum(1).mean()),
    "distance": (
        lambda P: distance_to_softmax(P, second(P)),
        draw_stochastic,
        lambda P: np.mean([0.5 * np.abs(row - np.roll(row, 1)).sum() for row in P]),
    ),
    "rest": (stationary_mass, draw_generator, lambda Q: golden_pi(Q).max()),
    "rest of two": (lambda Q: stationary_mass(Q, (1, -1)), draw_generator, lambda Q: golden_pi(Q)[[1, -1]].sum()),
}
measures = pytest.mark.parametrize(("function", "draw", "golden"), MEASURES.values(), ids=MEASURES)


@measures
def test_value_of_a_batch(function, draw, golden):
    x = draw(3, 2)
    got = function(x)
    expected = np.array([[golden(one) for one in row] for row in x.numpy()])
    assert got.shape == (3, 2)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    torch.testing.assert_close(function(x[1, 1]), got[1, 1], rtol=1e-13, atol=0)


@measures
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(function, draw, golden, dtype):
    x = draw(3).to(dtype)
    exact = function(draw(3)) if draw is draw_generator else function(x.double())  # rounded, rows of Q do not sum to 0
    got = function(x)
    assert got.dtype == torch.float32
    rtol = 4 * torch.finfo(dtype).eps if draw is draw_generator else 1e-6
    torch.testing.assert_close(got, exact.float(), rtol=rtol, atol=0)


@measures
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_stays_in_its_item(function, draw, golden, poison):
    x = draw(3)
    clean = function(x)
    x[1, 0, 0] = poison
    got = function(x)
    assert not got[1].isfinite()
    torch.testing.assert_close(got[[0, 2]], clean[[0, 2]], rtol=0, atol=0)


@measures
@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_empty_batch(function, draw, golden, batch):
    assert function(draw(*batch)).shape == batch


@measures
def test_strided_input(function, draw, golden):
    x = draw(4)
    strided = x.mT.contiguous().mT[::2].expand(3, 2, N, N)
    torch.testing.assert_close(function(strided)[2], function(x)[::2], rtol=1e-13, atol=0)


@measures
def test_gradient(function, draw, golden):
    rates = draw(2)
    off = 1 - torch.eye(N, dtype=torch.float64)

    def of_free(entries):  # a generator made of free rates stays one under gradcheck's steps
        return function(
            entries * off - torch.diag_embed((entries * off).sum(-1)) if draw is draw_generator else entries
        )

    assert torch.autograd.gradcheck(of_free, rates.clone().requires_grad_())


@measures
@pytest.mark.parametrize(("shape", "dtype"), [((3,), torch.float32), ((), torch.float32), ((3, 3), torch.long)])
def test_refusals(function, draw, golden, shape, dtype):
    with pytest.raises((ShapeError, DtypeError), match=r"(transition|generator): expected .*, got .*; "):
        function(torch.zeros(shape, dtype=dtype))


def test_rank_of_what_is_known():
    eye, uniform = torch.eye(4), torch.full((4, 4), 0.25)
    blocks = torch.block_diag(uniform[:2, :2] * 2, uniform[:2, :2] * 2)
    got = effective_rank(torch.stack([eye, eye.roll(1, 0), uniform, blocks]))
    torch.testing.assert_close(got, torch.tensor([4.0, 4.0, 1.0, 2.0]))
    assert effective_rank(torch.rand(4, 7)) <= 4
    assert effective_rank(torch.zeros(2, 3, 3)).isnan().all()
    assert effective_rank(torch.zeros(2, 0, 0)).isnan().all()


def test_sink_of_what_is_known():
    to_first = torch.zeros(4, 4)
    to_first[:, 0] = 1
    got = sink_mass(torch.stack([torch.eye(4), torch.full((4, 4), 0.25), to_first]))
    torch.testing.assert_close(got, torch.tensor([0.25, 0.25, 1.0]))
    causal = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]
    torch.testing.assert_close(sink_mass(causal, 0), torch.tensor((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4))
    torch.testing.assert_close(sink_mass(causal, range(4)), torch.tensor(1.0))
    assert sink_mass(causal, []) == 0
    assert sink_mass(causal, torch.tensor([0, 3])) == sink_mass(causal, [0, 3])
    assert sink_mass(causal, torch.tensor(3)) == sink_mass(causal, -1) == 1 / 16
    assert sink_mass(torch.ones(2, 1, 3)).tolist() == [1, 1]
    assert sink_mass(torch.zeros(2, 0, 0)).isnan().all()


def test_nan_elsewhere_is_not_of_the_sink():
    P = torch.eye(3)
    P[1, 2] = math.nan
    assert sink_mass(P, 0) == torch.tensor(1 / 3)


@pytest.mark.parametrize("function", [sink_mass, stationary_mass])
def test_sink_that_is_not_there(function):
    x = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    for sink in (2, -3, [0, 5]):
        with pytest.raises(ShapeError, match=r"sink: expected indices from -2 to 1, got .*; "):
            function(x, sink)
    for sink in (0.5, "first", [0.0], torch.tensor([0.5])):
        with pytest.raises(DtypeError, match=r"sink: expected an index .*, got .*; "):
            function(x, sink)


def test_distance_of_what_is_known():
    S = draw_stochastic(2, 3)
    assert (distance_to_softmax(S, S) == 0).all()
    eye = torch.eye(4)
    assert distance_to_softmax(eye, eye.roll(1, 0)) == 1  # nothing in common
    torch.testing.assert_close(distance_to_softmax(eye, torch.full((4, 4), 0.25)), torch.tensor(0.75))
    torch.testing.assert_close(distance_to_softmax(S[0, 0], S)[1, 2], distance_to_softmax(S[0, 0], S[1, 2]))
    assert distance_to_softmax(S.float(), S).dtype == torch.float64
    assert distance_to_softmax(torch.zeros(2, 0, 0), torch.zeros(2, 0, 0)).isnan().all()


@pytest.mark.parametrize(("left", "right"), [((3, 3), (3, 4)), ((3, 3), (1, 3)), ((2, 3, 3), (4, 3, 3))])
def test_distance_of_other_shapes(left, right):
    with pytest.raises(ShapeError, match=r"jump_chain: expected .*, got .*; "):
        distance_to_softmax(torch.zeros(left), torch.zeros(right))
    with pytest.raises(ShapeError, match=r"jump_chain: expected .*, got .*; "):
        distance_to_softmax(torch.zeros(3, 3), torch.zeros(3))


def test_rest_of_what_is_known():
    causal = torch.tensor([[0.0, 0.0, 0.0], [2.0, -2.0, 0.0], [1.0, 1.0, -2.0]])
    frozen, apart = torch.zeros(3, 3), torch.block_diag(torch.zeros(1, 1), torch.tensor([[-1.0, 1.0], [3.0, -3.0]]))
    got = stationary_mass(torch.stack([causal, frozen, apart, causal.roll((1, 1), (0, 1))]))
    torch.testing.assert_close(got, torch.tensor([1, math.nan, math.nan, 1]), equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(
        stationary_mass(torch.stack([causal, frozen]), -1), torch.tensor([0, math.nan]), equal_nan=True
    )
    assert stationary_mass(torch.zeros(1, 1)) == 1


def test_rest_refuses_what_is_no_generator():
    with pytest.raises(GeneratorError, match=r"generator: expected a rate matrix, got .*"):
        stationary_mass(torch.tensor([[1.0, -1.0], [1.0, -1.0]]))
    with pytest.raises(ShapeError, match="generator"):
        stationary_mass(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="generator"):
        stationary_mass(torch.zeros(2, 0, 0))
    rounded = draw_generator(2).bfloat16().float()  # rows no longer sum to 0, by little
    torch.testing.assert_close(stationary_mass(rounded), stationary_mass(draw_generator(2)).float(), rtol=2e-2, atol=0)
