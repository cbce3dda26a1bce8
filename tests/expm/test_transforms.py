"""Fast paths under torch.func, torch.compile, autocast, deterministic mode, and on inputs that break others."""

import itertools

import numpy as np
import pytest
import torch
from cases import METHODS, Combination, assert_stochastic, combinations, library_knobs, problem
from covering import covering
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import liegroup_attn as la
from liegroup_attn.clocks import Clock
from liegroup_attn.errors import GeneratorError

OWN = ("matrix exp", "formed hops", "sweep", "squaring", "triangular", "default")  # all but torch's fused kernels
EXP = la.ExponentialClock()


def _cases(**columns):
    """With ``strength=1``, for what takes seconds a case, each value occurs once at least."""
    kept = {"mask": ("causal",), "rates": ("jump chain",), "method": OWN} | columns
    return pytest.mark.parametrize("c", combinations(**kept))


def _call(c, n=7, **knobs):
    p = problem(c, n, time=torch.tensor([[0.7], [1.4]], dtype=torch.float64), **knobs)

    def call(q, k, v, rho, time):
        given = library_knobs(p.knobs | {"jump_rates": rho, "time": time})
        return la.lie_attention(q, k, v, method=p.method, **given)

    return call, (p.query, p.key, p.value, p.knobs["jump_rates"], p.knobs["time"])


@_cases()
def test_vmap_is_a_loop(c):
    call, (q, k, v, rho, time) = _call(c)
    many = [torch.stack([x, x.flip(0) / 2]) for x in (q, k, v, rho)]
    together = torch.func.vmap(call, in_dims=(0, 0, 0, 0, None))(*many, time)
    for i in range(2):
        torch.testing.assert_close(together[i], call(*(x[i] for x in many), time))
    # what is not mapped is shared
    shared = torch.func.vmap(call, in_dims=(None, None, 0, None, None))(q, k, many[2], rho, time)
    torch.testing.assert_close(shared[1], call(q, k, many[2][1], rho, time))


@_cases(method=("sweep", "formed hops", "uniformization"), clock=("fixed",))
def test_a_mapped_time_wants_a_number_of_hops(c):
    call, (q, k, v, rho, _) = _call(c)
    times = torch.tensor([0.5, 2.0], dtype=torch.float64)
    over_times = torch.func.vmap(call, in_dims=(None, None, None, None, 0))
    with pytest.raises(GeneratorError, match="max_terms=K"):
        over_times(q, k, v, rho, times)
    options = {"is_causal": True, "jump_rates": rho, "first_hop": c.first_hop}
    for method in (la.CausalSweep(max_terms=40), la.Uniformization(max_terms=40, formed=True)):
        found = torch.func.vmap(lambda t, m=method: la.lie_attention(q, k, v, time=t, method=m, **options))(times)
        torch.testing.assert_close(found, torch.stack([call(q, k, v, rho, t) for t in times]))


@_cases()
def test_forward_and_reverse_jacobians_agree(c):
    call, inputs = _call(c, n=4, batch=1, heads=2, width=2, value_width=1)
    for i in range(len(inputs)):
        forward, reverse = (jac(call, argnums=i)(*inputs) for jac in (torch.func.jacfwd, torch.func.jacrev))
        torch.testing.assert_close(forward, reverse, rtol=1e-9, atol=1e-11)
        assert reverse.abs().sum() > 0


@_cases(first_hop=(True,))
def test_per_sample_gradients(c):
    call, (q, k, v, rho, time) = _call(c)

    def loss(q, k, v, rho, time):
        return call(q[None], k[None], v[None], rho[None], time).square().sum()

    every = torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))
    together = torch.func.vmap(every, in_dims=(0, 0, 0, 0, None))(q, k, v, rho, time)
    for i in range(len(q)):
        for one, all_ in zip(every(q[i], k[i], v[i], rho[i], time), together, strict=True):
            torch.testing.assert_close(one, all_[i])


@_cases(first_hop=(True,), method=("sweep", "formed hops", "squaring"))
def test_hessian_is_symmetric(c):
    call, (q, k, v, rho, time) = _call(c, n=3, batch=1, heads=2, width=2, value_width=1)
    curve = torch.func.hessian(lambda x: call(x, k, v, rho, time).square().sum())(q)
    square = curve.reshape(q.numel(), q.numel())
    torch.testing.assert_close(square, square.mT)
    assert square.abs().sum() > 0


@_cases(method=("sweep", "formed hops", "default"), first_hop=(True,), strength=1)
def test_compiles_into_one_graph(c):
    """With the time a number, K is known: no look at any value, in forward and backward."""
    torch._dynamo.reset()
    p = problem(c, 9, torch.float32, time=1.3)
    method = {"formed hops": la.Uniformization(max_terms=6, formed=True), "sweep": la.CausalSweep(max_terms=6)}

    def call(q, k, v, rho):
        given = library_knobs(p.knobs | {"jump_rates": rho})
        return la.lie_attention(q, k, v, method=method.get(c.method), **given)

    plain, compiled = (
        [x.clone().requires_grad_() for x in (p.query, p.key, p.value, p.knobs["jump_rates"])] for _ in "ab"
    )
    expected, ours = call(*plain), torch.compile(call, fullgraph=True, backend="aot_eager")(*compiled)
    torch.testing.assert_close(ours, expected)
    expected.square().sum().backward()
    ours.square().sum().backward()
    for a, b in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


LAYERS = {
    "fixed": {},
    "first hop, exponential": {"clock": EXP, "first_hop": True},
    "erlang": {"clock": la.ErlangClock(2)},
}


@pytest.mark.parametrize(("options", "causal"), covering(itertools.product(LAYERS, (False, True)), strength=1))
def test_a_layer_compiles_into_one_graph(options, causal):
    from liegroup_attn.nn import LieAttention

    torch._dynamo.reset()
    layer, x = LieAttention(16, 2, is_causal=causal, **LAYERS[options]), torch.randn(2, 9, 16)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@_cases(method=(*OWN, "uniformization"), mask=("none", "causal"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(c, dtype):
    """Half-precision products would show at 1e-3; scores and hops are as exact as without autocast."""
    p = problem(c, 9, torch.float32)
    expected = p.golden()
    with torch.autocast("cpu", dtype=dtype):
        found = p.solve()
    assert found.dtype == torch.float32
    solved = c.method == "default" and c.clock != "fixed" and c.mask == "none"
    if c.method != "uniformization" and not (
        c.first_hop and (solved or c.method in ("matrix exp", "squaring", "triangular"))
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)  # torch's kernels follow autocast in their jumps


@_cases(first_hop=(True,), strength=1)
def test_fifty_backwards_are_bitwise_equal(c):
    p = problem(c, 33, torch.float32)
    leaves = [x.requires_grad_() for x in (p.query, p.key, p.value)]
    torch.use_deterministic_algorithms(True)
    try:
        first = torch.autograd.grad(p.solve().square().sum(), leaves)
        for _ in range(50):
            again = torch.autograd.grad(p.solve().square().sum(), leaves)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@_cases(method=("sweep", "formed hops", "default", "matrix exp"), mask=("none", "causal"))
@pytest.mark.parametrize("shape", [(), (2, 1)])
def test_forward_derivative_by_a_time_that_is_exactly_zero(c, shape):
    """A dual number does not require a gradient, and yet wants its hop."""
    call, (q, k, v, rho, _) = _call(c)
    zero = torch.zeros(shape, dtype=torch.float64)
    forward = torch.func.jvp(lambda t: call(q, k, v, rho, t), (zero,), (torch.ones_like(zero),))[1]
    reverse = torch.func.jacrev(lambda t: call(q, k, v, rho, t))(zero)
    torch.testing.assert_close(forward, reverse.flatten(4).sum(-1) if shape else reverse)
    assert forward.abs().sum() > 1


# --- inputs that break others -------------------------------------------------------------------------------------


@_cases(method=tuple(METHODS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_scores(c, dtype):
    """Scores of ±1e4: rows stay stochastic, gradients finite."""
    p = problem(c, 21, dtype, width=4)
    p = p._replace(query=100 * p.query.sign(), key=100 * p.key.sign())
    mixing = p.mixing()
    assert_stochastic(mixing, 1.3)
    leaves = [x.requires_grad_() for x in (p.query, p.key, p.value)]
    for gradient in torch.autograd.grad(p.solve().float().sum(), leaves, allow_unused=True):
        assert torch.isfinite(gradient).all()


@_cases(method=tuple(METHODS), mask=("none", "causal"))
def test_a_sink_column(c):
    """One key takes nearly all mass."""
    p = problem(c, 40, torch.float32, time=6.0)
    p.key[..., 0, :] = 40 * p.query.mean((0, 1, 2))
    p.query[...] = p.query.mean((0, 1, 2)) + 0.1 * p.query
    np.testing.assert_allclose(p.solve(), p.golden(), atol=2e-5)


@_cases(clock=("exponential", "erlang"), method=("sweep", "default", "triangular", "matrix exp"))
@pytest.mark.parametrize("time", [1e3, 1e6, 1e12])
def test_a_clock_that_runs_on(c, time):
    """γ → 1: what is asked again and again ends at the first token, which asks itself."""
    p = problem(c, 12, torch.float32, time=time, jump_rates=False)
    mixing = p.mixing().double()
    assert torch.isfinite(mixing).all()
    assert (mixing >= 0).all()
    torch.testing.assert_close(mixing.sum(-1), torch.ones_like(mixing.sum(-1)), atol=2e-5, rtol=0)
    if time == 1e12 and c.method in ("sweep", "default"):
        torch.testing.assert_close(mixing[..., 0], torch.ones_like(mixing[..., 0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize("block", [1, 7, 64, 128, 5000])
@pytest.mark.parametrize("clock", [None, EXP])
def test_any_block_size_serves_any_number_of_tokens(n, block, clock):
    if n == 1000 and block < 64:
        block = 37
    q, k, v = torch.randn(3, 2, n, 4, dtype=torch.float64)
    rho = torch.rand(2, n, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, rho)]
    found = []
    for method in (la.CausalSweep(1e-14, block_size=block), la.CausalSweep(1e-14, block_size=n)):
        out = la.lie_attention(q, k, v, is_causal=True, first_hop=True, clock=clock, jump_rates=rho, method=method)
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@_cases(method=tuple(METHODS))
def test_a_broken_item_breaks_no_other(c):
    p = problem(c, 9, torch.float32)
    sound = p.solve()[1]
    p.value[0, :, 3] = float("nan")
    assert torch.equal(p.solve()[1], sound)


class _TwoPoint(Clock):
    """τ is 0 or 2t, one as likely as the other: no semigroup, no resolvent."""

    def terms(self, theta, tol):
        return la.FixedClock().terms(2 * theta, tol)

    def hop_weights(self, theta, terms):
        return (la.FixedClock().hop_weights(0 * theta, terms) + la.FixedClock().hop_weights(2 * theta, terms)) / 2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("time", [1.0, 60.0])
def test_a_clock_of_ones_own_takes_hops(causal, time):
    q, k, v = torch.randn(3, 2, 6, 4, dtype=torch.float64)
    generator = la.SoftmaxGenerator(q, k, is_causal=causal)
    expected = (v + la.transition_matrix(generator, 2 * time) @ v) / 2
    torch.testing.assert_close(la.expm_multiply(generator, v, time, clock=_TwoPoint()), expected)
    low = la.LowRankGenerator(q.exp(), k.exp())
    expected = (v + la.transition_matrix(low, 2 * time) @ v) / 2
    torch.testing.assert_close(la.expm_multiply(low, v, time, clock=_TwoPoint()), expected)
    with pytest.raises(GeneratorError, match=r"clock: expected FixedClock\(\) for ScalingSquaring"):
        la.expm_multiply(generator, v, time, clock=_TwoPoint(), method=la.ScalingSquaring())


@pytest.mark.parametrize("options", [{"time": 2e5}, {"time": 2e4, "clock": EXP}], ids=str)
def test_the_default_never_runs_out_of_hops(options, monkeypatch):
    """However little may be formed: past 1000 hops the matrix is formed anyway."""
    monkeypatch.setattr("liegroup_attn.expm.choice._MOST_FORMED", 1)
    q = torch.randn(2, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(
        la.lie_attention(q, q, q, **options), la.lie_attention(q, q, q, **options, method=la.MatrixExp())
    )


def test_several_times_form_no_polynomial_each():
    """One set of iterates serves all times, at sizes where one time would be a polynomial of the matrix."""
    q, k, v = torch.randn(3, 2, 16, 64)
    times = torch.rand(9, 1, 1)
    with _Largest() as seen:
        la.lie_attention(q, k, v, time=times, method=la.Uniformization(max_terms=6, formed=True))
    assert seen.elements <= max(2 * 16 * 64 * 9, 2 * 16 * 64 * 6)


def test_a_width_of_zero():
    q, v = torch.randn(2, 5, 4), torch.zeros(2, 5, 0)
    for causal in (False, True):
        for method in (None, la.Uniformization(formed=True)):
            assert la.lie_attention(q, q, v, is_causal=causal, method=method).shape == (2, 5, 0)


class _Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return found


@pytest.mark.parametrize("clock", [None, EXP, la.ErlangClock(2)], ids=str)
def test_a_sweep_is_linear_in_memory(clock):
    n, block, d = 2000, 50, 4
    q, k, v = (torch.randn(1, n, d, requires_grad=True) for _ in range(3))
    with _Largest() as seen:
        method = la.CausalSweep(1e-3, block_size=block)
        la.lie_attention(q, k, v, is_causal=True, clock=clock, method=method).sum().backward()
    assert seen.elements <= max(block, 8 * d) * n


@pytest.mark.parametrize("method", [la.CausalSweep(1e-3), la.Uniformization(1e-3, formed=True)], ids=str)
def test_recomputing_keeps_nothing_but_inputs(method):
    n, d = 64, 8
    q, k, v = (torch.randn(1, n, d, requires_grad=True) for _ in range(3))
    kept = {}
    for recompute in (False, True):
        method.recompute, sizes = recompute, []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            la.lie_attention(q, k, v, is_causal=True, time=2.0, method=method).sum().backward()
        kept[recompute] = max(sizes)
    assert kept[True] <= n * d < kept[False]


def test_combination_of_everything():
    """GQA, a bias, padding, per-token rates and one time per head on the default path, against the reference."""
    c = Combination("fixed", True, "default", "float bias")
    p = problem(c, 30, time=torch.tensor([[0.3], [4.0]], dtype=torch.float64))
    np.testing.assert_allclose(p.solve(), p.golden(), atol=1e-10)
