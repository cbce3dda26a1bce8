"""Kinds of faults that were seen once, each over a table of where it could come back."""

import itertools

import pytest
import torch
from torch.autograd import grad, gradgradcheck

import liegroup_attn as la
from liegroup_attn import metrics
from liegroup_attn.errors import GeneratorError
from liegroup_attn.expm import CausalSweep, MatrixExp, ScalingSquaring, TriangularSolve, Uniformization
from liegroup_attn.nn import LieAttention, SoftmaxAttention

B, H, N, D = 1, 2, 4, 3
CLOCKS = {"fixed": None, "exponential": la.ExponentialClock(), "erlang": la.ErlangClock(3)}


def _qkv(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, H, N, D, dtype=dtype, generator=generator) for _ in range(3))


# --- a result is new ------------------------------------------------------------------------------------------

VERBS = {
    "lie_attention": lambda q, v, **how: la.lie_attention(q, q, v, **how),
    "expm_multiply, softmax": lambda q, v, first_hop, **how: la.expm_multiply(la.SoftmaxGenerator(q, q), v, **how),
    "expm_multiply, dense": lambda q, v, first_hop, **how: la.expm_multiply(
        la.DenseGenerator(0 * torch.eye(N, dtype=q.dtype)), v, **how
    ),
    "expm_multiply, low rank": lambda q, v, first_hop, **how: la.expm_multiply(
        la.LowRankGenerator(q.exp(), q.exp()), v, **how
    ),
}


@pytest.mark.parametrize("clock", CLOCKS.values(), ids=CLOCKS.keys())
@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())
def test_a_result_never_is_its_argument(verb, clock):
    q, _, v = _qkv()
    for time, first_hop in itertools.product((0.0, torch.zeros(()), torch.zeros(H, 1), 1.0), (False, True)):
        kept = v.clone()
        verb(q, v, time=time, clock=clock, first_hop=first_hop).mul_(0)
        assert torch.equal(v, kept)


# --- second derivatives ---------------------------------------------------------------------------------------

METHODS = {
    "automatic": (None, False),
    "formed": (Uniformization(formed=True), False),
    "squaring": (ScalingSquaring(), False),
    "sweep": (CausalSweep(), True),
    "triangular": (TriangularSolve(), True),
    "automatic, causal": (None, True),
}


def _goes(name, clock):
    return {"squaring": clock is None, "triangular": clock is not None}.get(name, True)


@pytest.mark.parametrize(
    ("name", "clock"),
    [
        pytest.param(name, clock, id=f"{name}-{key}")
        for (name, (key, clock)) in itertools.product(METHODS, CLOCKS.items())
        if _goes(name, clock)
    ],
)
@pytest.mark.parametrize("at", ["time 0", "rate 0", "both 0", "inside"])
def test_second_derivatives_are_those_of_the_dense_formula(name, clock, at):
    method, causal = METHODS[name]
    start = 0.0 if at in ("time 0", "both 0") else 0.7
    rate = 0.0 if at in ("rate 0", "both 0") else 0.6

    def second(how):
        q, k, v = (x.requires_grad_() for x in _qkv())
        time = torch.full((H, 1), start, dtype=torch.float64, requires_grad=True)
        rho = torch.full((H, N), rate, dtype=torch.float64, requires_grad=True)
        out = la.lie_attention(q, k, v, is_causal=causal, time=time, jump_rates=rho, clock=clock, method=how)
        first = grad(out.square().sum(), (time, rho, q), create_graph=True)
        return grad(sum((x * x.detach().cos()).sum() for x in first), (time, rho, q, k, v))

    for found, right in zip(second(method), second(MatrixExp()), strict=True):
        torch.testing.assert_close(found, right, atol=1e-8, rtol=1e-6)


def test_second_derivatives_of_dense_rates_at_0():
    """Where all rates are 0 no hop is made, and yet two are needed."""
    rates, value = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True), torch.randn(3, 2, dtype=torch.float64)
    inside = (0.3 + torch.rand(3, 3, dtype=torch.float64)).requires_grad_()
    for method in (MatrixExp(), Uniformization(), Uniformization(formed=True), ScalingSquaring()):

        def run(x, method=method):
            return la.expm_multiply(la.DenseGenerator.from_rates(x), value, 0.5, method=method)

        assert gradgradcheck(run, inside)
        (first,) = grad(run(rates).square().sum(), rates, create_graph=True)
        (second,) = grad(first[0, 1], rates)

        def plain(x):
            generator = (
                x - torch.diag_embed(x.diagonal()) - torch.diag_embed((x - torch.diag_embed(x.diagonal())).sum(-1))
            )
            return (torch.matrix_exp(torch.stack([0.5 * generator] * 2))[0] @ value).square().sum()

        expected = torch.func.hessian(plain)(rates.detach())[0, 1]
        torch.testing.assert_close(second, expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("law", [la.FixedClock(), la.ExponentialClock(), la.ErlangClock(4)], ids=str)
@pytest.mark.parametrize("at", [0.0, 0.4, 3.0])
def test_laws_of_hops_have_two_derivatives_in_every_mode(law, at):
    theta, grow = torch.tensor(at, dtype=torch.float64), torch.arange(7, dtype=torch.float64) ** 2

    def mean(x):
        return (law.hop_weights(x, 6) * grow).sum()

    forward, reverse = torch.func.jacfwd, torch.func.jacrev
    right = reverse(reverse(mean))(theta)
    for outer, inner in itertools.product((forward, reverse), repeat=2):
        torch.testing.assert_close(outer(inner(mean))(theta), right)


def test_a_nearly_decomposable_chain_under_a_long_clock():
    rates = torch.tensor([[0, 1.0, 0], [1.0, 0, 1e-9], [0, 1e-9, 0]])
    found = la.transition_matrix(la.DenseGenerator.from_rates(rates), 1e12, clock=la.ExponentialClock())
    torch.testing.assert_close(found, torch.full((3, 3), 1 / 3), atol=2e-3, rtol=0)


@pytest.mark.parametrize("time", [1.0, 1e4, 1e8, 1e18])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_gradients_of_scores_stay_in_size_with_time(time, causal):
    """Float32 against float64: what cancels would grow with the time."""

    def of(dtype):
        q, k, v = (x.to(dtype).requires_grad_() for x in _qkv())
        out = la.lie_attention(q, k, v, time=time, is_causal=causal, clock=la.ExponentialClock())
        return grad((out * torch.linspace(0, 1, D, dtype=dtype)).sum(), (q, k))

    for found, right in zip(of(torch.float32), of(torch.float64), strict=True):
        torch.testing.assert_close(found.double(), right, atol=2e-4, rtol=1e-3)


# --- scores ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e8, 1e18, 1e25, 1e37, 1e200])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_scores_of_any_size_give_their_limit_or_are_refused(size, dtype, causal):
    q, k, v = _qkv(dtype)
    q, k = size * q, size * k
    if not (q.isfinite().all() and k.isfinite().all()):
        return
    q.requires_grad_()
    if (size >= 1e25 and dtype != torch.float64) or size >= 1e200:
        with pytest.raises(GeneratorError, match="query, key: expected scores"):
            la.lie_attention(q, k, v, is_causal=causal, time=1.0)
        return
    out = la.lie_attention(q, k, v, is_causal=causal, time=1.0)
    scores = (q.detach().double() @ k.double().mT) / D**0.5
    assert scores.abs().max() < torch.finfo(torch.promote_types(dtype, torch.float32)).max
    scores = scores.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf) if causal else scores
    chain = torch.softmax(scores, -1)
    right = torch.matrix_exp(chain - torch.eye(N, dtype=torch.float64)) @ v.double()
    torch.testing.assert_close(out.double(), right, atol=2e-2 if dtype == torch.bfloat16 else 1e-4, rtol=0)
    out.sum().backward()
    assert q.grad.isfinite().all()


def test_nan_is_named_by_the_tensor_that_holds_it():
    q, k, v = _qkv()
    for name in ("query", "key"):
        for bad in (float("nan"), float("inf")):
            spoilt = {"query": q.clone(), "key": k.clone()}
            spoilt[name][0, 0, 1, 1] = bad
            for call in (
                lambda s: la.lie_attention(s["query"], s["key"], v),
                lambda s: la.SoftmaxGenerator(s["query"], s["key"]),
                lambda s: la.lie_attention(s["query"], s["key"][..., :2, :], v[..., :2, :], time=0.0, first_hop=True),
            ):
                with pytest.raises(GeneratorError, match=f"^{name}: expected finite"):
                    call(spoilt)


@pytest.mark.parametrize("rate", [1e2, 1e8, 1e30])
def test_a_step_that_goes_too_far_ends_in_numbers_or_in_a_clear_error(rate):
    torch.manual_seed(0)
    for layer in (LieAttention(8, 2, is_causal=True), LieAttention(8, 2, clock=la.ExponentialClock(), first_hop=True)):
        optimizer = torch.optim.SGD([p for n, p in layer.named_parameters() if n != "time"], lr=rate)
        x = torch.randn(2, 5, 8)
        for _ in range(3):
            try:
                loss = layer(x).square().mean()
            except GeneratorError:  # what has diverged is named
                break
            if not loss.isfinite():  # values overflow, as in any model; the mixing itself does not
                assert not layer.v_proj(x).abs().max() < 1e15
                break
            loss.backward()
            optimizer.step()


# --- metrics --------------------------------------------------------------------------------------------------

MATRICES = {
    "causal": lambda s: s.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1),
    "padded": lambda s: s.masked_fill(torch.arange(6) > 3, -torch.inf).softmax(-1),
    "window": lambda s: s.masked_fill(~torch.ones(6, 6).tril().triu(-1).bool(), -torch.inf).softmax(-1),
    "identity": lambda s: torch.eye(6, dtype=s.dtype) + 0 * s,
    "flow": lambda s: la.transition_matrix(
        la.DenseGenerator.from_rates(s.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).exp()), 2.0
    ),
}
OF_MATRICES = {
    "AttentionEntropy": 1,
    "EffectiveRank": 1,
    "RowStochasticityError": 1,
    "SinkMass": 1,
    "DistanceToSoftmax": 2,
}


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
@pytest.mark.parametrize("name", OF_MATRICES)
def test_a_differentiable_metric_has_a_finite_gradient_at_zeros(name, matrix):
    metric = getattr(metrics, name)()
    assert metric.is_differentiable
    scores = torch.randn(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = metric(*[matrix(scores) for _ in range(OF_MATRICES[name])])
    found.sum().backward()
    assert scores.grad.isfinite().all()


def test_entropy_of_a_causal_layer_trains():
    for layer in (LieAttention(16, 2, is_causal=True), SoftmaxAttention(16, 2, is_causal=True)):
        metrics.attention_entropy(layer.mixing_matrix(torch.randn(1, 5, 16))).mean().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
