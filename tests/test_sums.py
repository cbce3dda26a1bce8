"""Sums, multiples and mixtures of generators: operators, jump chains, flows and gradients against dense algebra."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import scipy.linalg
import torch
from cases import attention
from torch import Tensor

import liegroup_attn as la
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.generators import Generator, HeadMixture, ScaledGenerator, SumGenerator

N, H, D = 7, 3, 4
F64 = torch.float64


def softmax(causal: bool = False, rho: bool = True) -> la.SoftmaxGenerator:
    q, k = torch.randn(2, 2, H, N, D, dtype=F64).unbind()
    return la.SoftmaxGenerator(q, k, jump_rates=torch.rand(2, H, N, dtype=F64) if rho else None, is_causal=causal)


def dense(rho: bool = False) -> la.DenseGenerator:
    rates = torch.rand(H, N, N, dtype=F64)
    rates[:, 2] = 0  # a token that stays
    return la.DenseGenerator.from_rates(rates, jump_rates=torch.rand(N, dtype=F64) if rho else None)


def toeplitz(causal: bool = False) -> la.DenseGenerator:
    past, future = torch.rand(2, H, N - 1, dtype=F64)
    return la.DenseGenerator.from_offsets(past, None if causal else future)


def low_rank() -> la.LowRankGenerator:
    left, right = torch.rand(2, H, N, 3, dtype=F64)
    return la.LowRankGenerator(left, right, jump_rate=0.7)


class Case(NamedTuple):
    """A generator made of others, and the matrix it must be."""

    make: Callable[[], tuple[Generator, Tensor]]
    is_causal: bool = False


def _sum(*parts: Generator) -> tuple[Generator, Tensor]:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total, sum(part.dense() for part in parts[1:]) + parts[0].dense()


def _scaled(part: Generator, factor: Tensor | float) -> tuple[Generator, Tensor]:
    rows = factor.unsqueeze(-1) if isinstance(factor, Tensor) else factor
    return factor * part if isinstance(factor, float) else part * factor, rows * part.dense()


def _mixed(part: Generator, weights: Tensor) -> tuple[Generator, Tensor]:
    return HeadMixture(part, weights), torch.einsum("gh,...hij->...gij", weights, part.dense())


def _deep() -> tuple[Generator, Tensor]:
    first, second, third = softmax(), toeplitz(), low_rank()
    weights = torch.rand(H, H, dtype=F64)
    joined = HeadMixture(first, weights) + 0.5 * (second + third)
    mixed = torch.einsum("gh,...hij->...gij", weights, first.dense())
    return joined, mixed + 0.5 * (second.dense() + third.dense())


CASES = {
    "softmax + dense": Case(lambda: _sum(softmax(), dense())),
    "softmax + Toeplitz": Case(lambda: _sum(softmax(), toeplitz())),
    "causal + causal": Case(lambda: _sum(softmax(True), toeplitz(True)), True),
    "causal + open": Case(lambda: _sum(softmax(True), toeplitz())),
    "dense + low rank + softmax": Case(lambda: _sum(dense(rho=True), low_rank(), softmax(rho=False))),
    "a number": Case(lambda: _scaled(softmax(), 2.5)),
    "zero": Case(lambda: _scaled(dense(), 0.0)),
    "one per matrix": Case(lambda: _scaled(softmax(), torch.rand(H, 1, dtype=F64))),
    "one per token": Case(lambda: _scaled(dense(rho=True), torch.rand(2, H, N, dtype=F64))),
    "some tokens at rest": Case(lambda: _scaled(low_rank(), torch.tensor([0.0, 1, 2, 0, 1, 0, 3], dtype=F64))),
    "over heads": Case(lambda: _mixed(softmax(), torch.rand(H, H, dtype=F64))),
    "causal over heads": Case(lambda: _mixed(softmax(True), torch.rand(H, H, dtype=F64)), True),
    "fewer heads out": Case(lambda: _mixed(dense(), torch.rand(1, H, dtype=F64))),
    "a head that takes none": Case(lambda: _mixed(dense(rho=True), torch.eye(H, dtype=F64)[[0, 1, 1]] * 0.5)),
    "a sum of sums": Case(_deep),
}


@pytest.fixture(params=CASES, ids=str)
def made(request) -> tuple[Generator, Tensor]:
    return CASES[request.param].make()


def equal(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted.expand_as(got), atol=1e-12, rtol=1e-10)


def value_for(generator: Generator) -> Tensor:
    return torch.randn(2, generator.batch_shape[-1], N, 5, dtype=F64)


def test_it_is_the_matrix_it_says(made):
    generator, matrix = made
    value = value_for(generator)
    equal(generator.dense(), matrix)
    assert generator.check() == (True, None)
    assert torch.broadcast_shapes(generator.batch_shape, matrix.shape[:-2]) == generator.batch_shape
    equal(generator.apply(value), matrix @ value)


def test_the_bound_bounds_every_exit_rate(made):
    generator, matrix = made
    exits = -matrix.diagonal(dim1=-2, dim2=-1)
    assert (exits <= torch.as_tensor(generator.rate_bound()) + 1e-12).all()


def test_jump_chain_and_rates_make_the_generator(made):
    """Q = Λ(S − I), S stochastic."""
    generator, matrix = made
    eye = torch.eye(N, dtype=F64).expand(*generator.batch_shape, N, N)
    chain = generator.jump(eye)
    assert (chain >= 0).all()
    equal(chain.sum(-1), torch.ones((), dtype=F64))
    equal(generator.jump_intensities().unsqueeze(-1) * (chain - eye), matrix)


@pytest.mark.parametrize(
    "method", [None, la.MatrixExp(), la.Uniformization(), la.Uniformization(formed=True)], ids=repr
)
def test_the_flow_is_the_exponential(made, method):
    generator, matrix = made
    value, time = value_for(generator), 1.7
    golden = torch.from_numpy(scipy.linalg.expm(time * matrix.numpy())) @ value
    equal(la.expm_multiply(generator, value, time, method=method), golden)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.is_causal])
def test_causal_sums_stay_causal(name):
    generator, _ = CASES[name].make()
    assert generator.is_causal
    assert torch.equal(la.transition_matrix(generator, 3.0).triu(1), torch.zeros(()).expand(2, H, N, N).double())


def test_a_sum_with_one_open_part_is_not_causal():
    assert not CASES["causal + open"].make()[0].is_causal


def test_every_parameter_gets_its_gradient():
    q, k = torch.randn(2, H, N, D, dtype=F64).requires_grad_(), torch.randn(2, H, N, D, dtype=F64).requires_grad_()
    past = torch.rand(H, N - 1, dtype=F64).requires_grad_()
    weights, factor = torch.rand(H, H, dtype=F64).requires_grad_(), torch.rand(H, 1, dtype=F64).requires_grad_()
    value = torch.randn(2, H, N, 2, dtype=F64)

    def flow(q, k, past, weights, factor):
        learned = la.DenseGenerator.from_offsets(past, past)
        content = HeadMixture(la.SoftmaxGenerator(q, k), weights)
        return la.expm_multiply(content + factor * learned, value, 0.8)

    torch.autograd.gradcheck(flow, (q, k, past, weights, factor), nondet_tol=1e-12, fast_mode=True)


def test_a_factor_of_zero_has_a_gradient():
    factor = torch.zeros(H, 1, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(la.expm_multiply(factor * dense(), torch.rand(H, N, 2, dtype=F64)).sum(), factor)
    assert (gradient.abs() > 1e-6).any()


def test_the_first_hop_has_its_gradient_at_rates_of_zero():
    """S does not depend on rates that are all 0, but ΛS does."""
    q, k, v = torch.randn(3, 1, N, D, dtype=torch.float64).unbind()
    grown = torch.rand(N, N, dtype=F64)

    def loss(size: Tensor) -> Tensor:
        plus = la.DenseGenerator.from_rates(size * grown)
        return attention(q, k, v, plus=plus, first_hop=True, time=0.5, method=la.MatrixExp()).sum()

    size = torch.zeros((), dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(size), size)
    step = torch.tensor(1e-6, dtype=F64)
    torch.testing.assert_close(gradient, (loss(step) - loss(0 * step)) / step, atol=1e-5, rtol=1e-4)


def test_sum_and_a_scale_without_dimensions():
    one, two = dense(), toeplitz()
    equal(sum([one, two]).dense(), one.dense() + two.dense())
    equal((torch.tensor(0.5, dtype=F64) * one).dense(), 0.5 * one.dense())


def test_a_sum_holds_words_that_a_product_does_not():
    """forth leads 0 → 1, back leads 1 → 0: the word back·forth is in the sum, in neither factor."""
    forth = la.DenseGenerator.from_rates(torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=F64))
    back = la.DenseGenerator.from_rates(torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=F64))
    both = la.transition_matrix(forth + back)
    ordered = la.transition_matrix(forth) @ la.transition_matrix(back)
    equal(both, torch.from_numpy(scipy.linalg.expm([[-1.0, 1.0], [1.0, -1.0]])))
    assert (both - ordered).abs().max() > 0.1


# Toeplitz


def test_offsets():
    past, future = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0])
    matrix = la.DenseGenerator.from_offsets(past, future).dense()
    assert not matrix.sum(-1).any()
    for d in (1, 2, 3):
        assert (matrix.diagonal(-d) == past[d - 1]).all()
        assert (matrix.diagonal(d) == future[d - 1]).all()
    one = la.DenseGenerator.from_offsets(torch.zeros(2, 0))
    assert torch.equal(one.dense(), torch.zeros(2, 1, 1))


# in lie_attention


@pytest.mark.parametrize("clock", [None, la.ExponentialClock(), la.ErlangClock(2)], ids=repr)
@pytest.mark.parametrize("first_hop", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal", "padding"])
def test_attention_with_more_generators(clock, first_hop, mask):
    q, k, v = torch.randn(3, 2, H, N, D, dtype=F64).unbind()
    weights, plus, time = torch.rand(H, H, dtype=F64), toeplitz(), torch.tensor([[0.3], [1.0], [2.0]], dtype=F64)
    given = {"is_causal": mask == "causal", "attn_mask": None}
    allowed = torch.ones(N, N, dtype=torch.bool)
    if mask == "padding":
        given["attn_mask"] = allowed = (torch.arange(N) < 5)[None, :]
    elif mask == "causal":
        allowed = allowed.tril()
    got = attention(q, k, v, time=time, first_hop=first_hop, clock=clock, plus=plus, weights=weights, **given)
    chain = (q @ k.mT / 2).masked_fill(~allowed, -torch.inf).softmax(-1)  # width 4
    eye = torch.eye(N, dtype=F64)
    rates = torch.where(allowed & ~eye.bool(), plus.dense(), 0)
    joined = torch.einsum("gh,bhij->bgij", weights, chain - eye) + rates - torch.diag_embed(rates.sum(-1))
    flow = time[..., None] * joined
    if clock is None:
        mixing = torch.from_numpy(scipy.linalg.expm(flow.numpy()))
    else:
        mixing = torch.linalg.matrix_power(torch.linalg.inv(eye - flow / clock.resolvents), clock.resolvents)
    if first_hop:
        total = (weights.sum(-1)[:, None] + rates.sum(-1))[..., None]
        jumps = (torch.einsum("gh,bhij->bgij", weights, chain) + rates) / total
        mixing = jumps @ mixing
    equal(got, mixing @ v)


# bad input


def test_bad_parts():
    with pytest.raises(ShapeError, match="generators on the same tokens"):
        _ = dense() + la.DenseGenerator(torch.zeros(2, 2))
    with pytest.raises(ShapeError, match="batches that broadcast"):
        _ = dense() + la.DenseGenerator(torch.zeros(H + 1, N, N))
    with pytest.raises(GeneratorError, match="at least one Generator"):
        SumGenerator()
    with pytest.raises(TypeError):
        _ = dense() + torch.zeros(N, N)
    with pytest.raises(TypeError):
        _ = dense() * "2"


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf"), torch.tensor([-1.0]), torch.tensor([torch.inf])])
def test_bad_factors(factor):
    with pytest.raises(GeneratorError, match=r"0 ≤ factor < inf.*−Q is no generator"):
        ScaledGenerator(dense(), factor)


def test_a_factor_that_does_not_fit():
    with pytest.raises(ShapeError, match=f"last size 1 or {N}"):
        ScaledGenerator(dense(), torch.ones(3))
    with pytest.raises(ShapeError, match="batches that broadcast"):
        ScaledGenerator(dense(), torch.ones(H + 1, 1))


def test_bad_weights():
    with pytest.raises(ShapeError, match="one column a head"):
        HeadMixture(dense(), torch.ones(2, H + 1))
    with pytest.raises(ShapeError, match="0 heads of the generator"):
        HeadMixture(la.DenseGenerator(torch.zeros(2, 2)), torch.ones(1, 1))
    for bad in (-1.0, torch.nan, torch.inf):
        with pytest.raises(GeneratorError, match="finite numbers ≥ 0"):
            HeadMixture(dense(), torch.full((1, H), bad))


def test_bad_offsets():
    with pytest.raises(ShapeError, match="one rate per distance"):
        la.DenseGenerator.from_offsets(torch.ones(3), torch.ones(2))
    with pytest.raises(GeneratorError, match="nonnegative"):
        la.DenseGenerator.from_offsets(-torch.ones(3))


@pytest.mark.filterwarnings("default")
def test_keywords_of_before():
    q = torch.randn(1, H, N, D, dtype=F64)
    weights, plus = torch.full((H, H), 0.5, dtype=F64), dense()
    with pytest.warns(FutureWarning, match="(plus|head_weights) will go"):
        got = la.lie_attention(q, q, q, plus=plus, head_weights=weights, rate_fn=la.softplus, first_hop=True)
    torch.testing.assert_close(got, attention(q, q, q, plus=plus, weights=weights, rate_fn=la.softplus, first_hop=True))
    with pytest.warns(FutureWarning):
        assert torch.equal(la.lie_attention(q, q, q, plus=None), la.lie_attention(q, q, q))
    with pytest.raises(ShapeError), pytest.warns(FutureWarning):
        la.lie_attention(q, q[..., :3, :], q[..., :3, :], time=0.0, first_hop=True, plus=dense())


def test_a_sum_refuses_what_does_not_fit():
    q = torch.randn(1, H, N, D)
    with pytest.raises(TypeError):
        la.SoftmaxGenerator(q, q) + torch.zeros(N, N)
    with pytest.raises(ShapeError, match="same tokens"):
        la.SoftmaxGenerator(q, q) + la.DenseGenerator(torch.zeros(2, 2))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_keywords_where_no_time_passes():
    """Without hops nothing leaks, so an open mask is none."""
    q = torch.randn(1, H, N, D, dtype=F64)
    window = torch.ones(N, N, dtype=torch.bool).tril().triu(-1)
    bias = torch.zeros(N, N, dtype=F64)
    got = la.lie_attention(q, q, q, window, time=0.0, first_hop=True, score_bias=bias)
    torch.testing.assert_close(got, torch.nn.functional.scaled_dot_product_attention(q, q, q, window))
    with pytest.raises(GeneratorError, match="plus: expected a Generator, got int"):
        la.lie_attention(q, q, q, plus=3)
