"""Every gradient against finite differences in float64, and the gradient of time where time is exactly 0."""

import numpy as np
import pytest
import torch
from cases import (
    BIASES,
    RATE_FNS,
    Combination,
    assert_as_exact_as,
    combinations,
    golden_chain,
    library_knobs,
    plain,
    problem,
    to_numpy,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

import liegroup_attn as la

METHODS = (
    "matrix exp",
    "uniformization",
    "formed hops",
    "triangular",
    "sweep",
    "squaring",
)  # the default is one of them


def _leaves(p):
    """Every differentiable input of a problem, by name."""
    leaves = {"query": p.query, "key": p.key, "value": p.value, "jump_rates": p.knobs["jump_rates"]}
    leaves["time"] = p.knobs["time"]
    mask = p.knobs["attn_mask"]
    if mask is not None and mask.is_floating_point():
        leaves["attn_mask"] = mask
    return leaves


def _function(p, names):
    def call(*tensors):
        given = dict(zip(names, tensors, strict=True))
        q, k, v = (given.pop(name) for name in ("query", "key", "value"))
        if "attn_mask" in given:  # finite differences must not touch −inf
            given["attn_mask"] = given["attn_mask"].masked_fill(p.knobs["attn_mask"] == -torch.inf, -torch.inf)
        return la.lie_attention(q, k, v, method=p.method, **library_knobs(p.knobs | given))

    return call


def _check(p, check=gradcheck):
    """Fast mode: one random direction per input and output, which an error in any entry shows up in."""
    leaves = _leaves(p)
    tensors = [x.detach().clone().masked_fill(x == -torch.inf, 0).requires_grad_() for x in leaves.values()]
    assert check(_function(p, list(leaves)), tensors, fast_mode=True)


def _small(c, time):
    p = problem(c, 3, time=torch.tensor(time, dtype=torch.float64), batch=1, width=2, value_width=1)
    p.knobs["jump_rates"].mul_(0.8).add_(0.1)  # finite differences must stay in [0, 1]
    return p


@pytest.mark.parametrize(
    "c",
    combinations(
        method=METHODS, mask=("none", "causal", "key padding", "fully masked row", *BIASES), rates=("jump chain",)
    ),
)
def test_gradcheck(c):
    _check(_small(c, [[0.5], [1.1]]))  # one time per head


@pytest.mark.parametrize(
    "c",
    combinations(first_hop=(True,), method=METHODS, mask=("causal", "float bias"), rates=list(RATE_FNS)[1:]),
)
def test_gradcheck_of_rate_functions(c):
    _check(_small(c, [[0.5], [1.1]]))


@pytest.mark.parametrize("c", combinations(method=METHODS, mask=("causal",), rates=("jump chain",), per_row=True))
def test_gradcheck_of_one_time_per_row(c):
    _check(_small(c, [[0.4, 0.7, 1.9], [0.3, 1.0, 2.2]]))


def _tiny(c):
    p = problem(c, 2, time=torch.tensor(0.8, dtype=torch.float64), batch=1, heads=1, width=1, value_width=1)
    p.knobs["jump_rates"].mul_(0.8).add_(0.1)
    return p


SECOND = combinations(method=METHODS, mask=("causal",), rates=("jump chain",))


@pytest.mark.parametrize("c", SECOND)
def test_gradgradcheck(c):
    """torch's fused kernels have no second derivative, its plain one has."""
    with sdpa_kernel(SDPBackend.MATH):
        _check(_tiny(c), gradgradcheck)


@pytest.mark.parametrize("c", SECOND)
def test_second_derivatives_are_right_or_refused(c):
    try:
        _check(_tiny(c), gradgradcheck)
    except RuntimeError as error:
        # torch's fused kernel refuses where it jumps; sweeps and formed hops jump by themselves
        jumps = c.method == "uniformization" or (c.first_hop and c.method in ("matrix exp", "triangular", "squaring"))
        if "is not implemented" not in str(error) or not jumps:
            raise


@pytest.mark.parametrize(
    "c", combinations(mask=("none", "causal", "fully masked row"), rates=("jump chain", "softplus"))
)
@pytest.mark.parametrize("shape", [(), (2, 1)])
def test_gradient_of_time_at_exactly_zero(c, shape):
    """d/dt [S] E[exp(τQ)] V = [S] Q V at t = 0, under every clock: a parameter that starts at 0 must learn."""
    p = problem(c, 5, time=torch.zeros(shape, dtype=torch.float64).requires_grad_())
    weight = torch.randn_like(p.value)
    out = p.solve()
    if not out.requires_grad:
        pytest.fail("time = 0 has cut the graph")
    (gradient,) = torch.autograd.grad((out * weight).sum(), p.knobs["time"])
    chain, generator = golden_chain(
        p.query, p.key, attn_mask=p.knobs["attn_mask"], is_causal=p.knobs["is_causal"], rate_fn=c.rates
    )
    flow = to_numpy(p.knobs["jump_rates"])[..., None] * generator @ to_numpy(p.value)
    slope = (chain @ flow if c.first_hop else flow) * to_numpy(weight)  # (B, H, N, D)
    expected = slope.sum() if shape == () else slope.sum((0, 2, 3))[:, None]
    np.testing.assert_allclose(gradient, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("c", combinations(mask=("causal",), rates=("jump chain",)))
def test_gradient_of_a_head_at_zero_among_running_heads(c):
    p = problem(c, 5, time=torch.tensor([[0.0], [1.0]], dtype=torch.float64).requires_grad_())
    (gradient,) = torch.autograd.grad(p.solve().sum(-1)[:, 0].sum(), p.knobs["time"])
    chain, generator = golden_chain(p.query, p.key, is_causal=True)
    flow = to_numpy(p.knobs["jump_rates"])[..., None] * generator @ to_numpy(p.value)
    slope = chain @ flow if c.first_hop else flow
    np.testing.assert_allclose(gradient, [[slope[:, 0].sum()], [0.0]], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("c", combinations(mask=("none", "causal", "key padding"), rates=("jump chain",)))
def test_gradients_at_zero_time_are_those_without_hops(c):
    """q and k get the gradient of S alone (or none), and it is finite."""
    p = problem(c, 5, time=torch.zeros((), dtype=torch.float64))
    value = p.value.requires_grad_()
    query = p.query.requires_grad_()
    weight = torch.randn_like(value)
    ours = torch.autograd.grad((p.solve() * weight).sum(), (query, value), materialize_grads=True)
    chain = torch.tensor(
        golden_chain(p.query, p.key, attn_mask=p.knobs["attn_mask"], is_causal=p.knobs["is_causal"])[0]
    )
    expected = chain.mT @ weight if c.first_hop else weight
    torch.testing.assert_close(ours[1], expected)
    assert torch.isfinite(ours[0]).all()
    assert c.first_hop == bool(ours[0].any())


@pytest.mark.parametrize("c", combinations(mask=("none", "causal", "float bias"), rates=("jump chain", "softplus")))
def test_float32_gradients_are_as_exact_as_plain_torchs(c):
    p = problem(c, 12, time=torch.tensor([[0.7], [2.5]], dtype=torch.float64))
    weight = torch.randn_like(p.value)

    def gradients(function, dtype):
        leaves = {k: x.detach().to(dtype).requires_grad_() for k, x in _leaves(p).items()}
        given = dict(leaves)
        q, k, v = (given.pop(name) for name in ("query", "key", "value"))
        out = function(q, k, v, **(p.knobs | given))
        return torch.autograd.grad((out * weight.to(dtype)).sum(), list(leaves.values()))

    def ours(q, k, v, **knobs):
        return la.lie_attention(q, k, v, method=p.method, **library_knobs(knobs))

    golden = gradients(plain, torch.float64)
    for a, b, exact in zip(gradients(ours, torch.float32), gradients(plain, torch.float32), golden, strict=True):
        assert_as_exact_as(a, b, exact, factor=3)
    # the float64 yardstick itself, which gradcheck holds for ours
    for a, exact in zip(gradients(ours, torch.float64), golden, strict=True):
        torch.testing.assert_close(a, exact, rtol=1e-7, atol=1e-9)


def test_every_input_of_the_plain_call_gets_a_gradient():
    p = problem(Combination("fixed", True, "default", "float bias"), 6, time=torch.ones(2, 1))
    leaves = [x.requires_grad_() for x in _leaves(p).values()]
    for gradient in torch.autograd.grad(p.solve().square().sum(), leaves):
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("method", [None, la.MatrixExp(), la.Uniformization()], ids=str)
def test_gradient_reaches_a_dense_generator(method):
    """Its rate bound is a constant of the computation; the gradient of Q must not feel that."""

    def call(rates, value, time):
        return la.expm_multiply(la.DenseGenerator.from_rates(rates), value, time, method=method)

    rates = torch.rand(2, 3, 3, dtype=torch.float64) + 0.1
    value, time = torch.randn(2, 3, 2, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    assert gradcheck(call, [x.requires_grad_() for x in (rates, value, time)])


@pytest.mark.parametrize("clock", [None, la.ExponentialClock()], ids=str)
def test_gradient_of_the_transition_matrix(clock):
    def call(rates, time):
        return la.transition_matrix(la.DenseGenerator.from_rates(rates), time, clock=clock)

    rates, time = torch.rand(3, 3, dtype=torch.float64) + 0.1, torch.tensor(0.9, dtype=torch.float64)
    assert gradcheck(call, [rates.requires_grad_(), time.requires_grad_()])
