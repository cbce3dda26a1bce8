"""The axioms of ``lie_attention``, ``expm_multiply`` and ``transition_matrix`` over the tables of cases.py."""

import itertools

import numpy as np
import pytest
import torch
from cases import (
    CLOCKS,
    DTYPES,
    HALF,
    LARGE,
    MASKS,
    METHODS,
    RATE_FNS,
    SIZES,
    WIDE,
    Combination,
    assert_as_exact_as,
    assert_stochastic,
    combinations,
    golden_chain,
    library_knobs,
    plain,
    problem,
    sdpa,
    to_numpy,
    worst,
)

import liegroup_attn as la

JUMP_CHAIN = ("jump chain",)
BOTH = ("jump chain", "softplus")  # without a matrix, with a matrix
FULLY_MASKED = ("padding rows", "fully masked row", "all-masked item", "float, empty row")


def over(**narrow):
    return pytest.mark.parametrize("c", combinations(**narrow))


# --- value ----------------------------------------------------------------------------------------------------


@over()
def test_value_is_the_golden_one(c):
    p = problem(c, n=7)
    np.testing.assert_allclose(p.solve(), p.golden(), rtol=1e-10, atol=1e-10)


@over(rates=JUMP_CHAIN, mask=("none", "causal", "key padding", "fully masked row", "float causal"))
@pytest.mark.parametrize("n", SIZES)
def test_value_at_every_size(c, n):
    p = problem(c, n, time=2.0)
    np.testing.assert_allclose(p.solve(), p.golden(), rtol=1e-10, atol=1e-10)


@over(clock=("fixed",), first_hop=(True,), method=("default", "uniformization"), mask=("causal",), rates=JUMP_CHAIN)
def test_value_at_a_thousand_tokens(c):
    p = problem(c, LARGE, batch=1, heads=1, time=2.0)
    np.testing.assert_allclose(p.solve(), p.golden(), rtol=1e-10, atol=1e-10)


@over(first_hop=(False,), method=("default",), mask=("none", "causal"), rates=JUMP_CHAIN)
@pytest.mark.parametrize("time", [0.01, 0.5, 4.0, 20.0, 60.0, 200.0])
def test_value_at_every_time(c, time):
    p = problem(c, n=9, time=time)
    np.testing.assert_allclose(p.solve(), p.golden(), rtol=1e-10, atol=1e-10)


@over(rates=BOTH)
def test_float32_is_as_exact_as_plain_torch(c):
    p = problem(c, n=16, dtype=torch.float32, time=3.0)
    assert_as_exact_as(p.solve(), plain(p.query, p.key, p.value, **p.knobs), p.golden())


@over(method=("default",), mask=("none", "causal"))
def test_scale_is_that_of_the_scores(c):
    p = problem(c, n=5)
    np.testing.assert_allclose(p.solve(scale=0.3), p.golden(scale=0.3), atol=1e-10)


@over(method=("default",), mask=("none",))
@pytest.mark.parametrize("rate", [None, 0.0, 0.25, 1.0, 1])
def test_jump_rates_may_be_one_number(c, rate):
    p = problem(c, n=5)
    given = None if rate is None else torch.full((2, 2, 5), float(rate), dtype=torch.float64)
    np.testing.assert_allclose(p.solve(jump_rates=rate), p.golden(jump_rates=given), atol=1e-10)


@over(method=("default",), mask=("none", "causal"))
def test_a_token_that_never_jumps_keeps_its_value_and_its_first_hop(c):
    """ρ_i = 0 stops the chain at i; the first hop is S, which does not depend on ρ."""
    p = problem(c, n=5)
    still = p.knobs["jump_rates"].clone()
    still[..., 2] = 0
    np.testing.assert_allclose(p.solve(jump_rates=still), p.golden(jump_rates=still), atol=1e-10)


@over(method=("default",), mask=("none", "causal"), rates=JUMP_CHAIN)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 1), (2, 5), (2, 2, 1), (2, 1, 5)])
def test_jump_rates_broadcast(c, shape):
    p = problem(c, n=5)
    rates = torch.rand(shape, dtype=torch.float64)
    np.testing.assert_allclose(p.solve(jump_rates=rates), p.golden(jump_rates=rates.expand(2, 2, 5)), atol=1e-10)


# --- time -----------------------------------------------------------------------------------------------------


@over(mask=("none", "causal", "fully masked row"), rates=JUMP_CHAIN)
@pytest.mark.parametrize("shape", [(1,), (2, 1), (2, 1, 1), (2, 2, 1)])
def test_one_time_per_head_or_item(c, shape):
    p = problem(c, n=5, time=3 * torch.rand(shape, dtype=torch.float64))
    np.testing.assert_allclose(p.solve(), p.golden(), atol=1e-10)


@over(mask=("none", "causal", "key padding"), rates=BOTH)
@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (4, 1, 2, 1), (4, 1, 1, 1, 1)])
def test_several_times_at_once(c, shape):
    """Dimensions of the time in front of the batch are times of their own: one call, one set of iterates."""
    times = 3 * torch.rand(shape, dtype=torch.float64)
    times[0] = 0.0
    p = problem(c, n=5, time=times)
    out = p.solve()
    for one, time in zip(out.flatten(0, len(shape) - 4), times.flatten(0, len(shape) - 4), strict=True):
        np.testing.assert_allclose(one, p.golden(time=time), atol=1e-10)


@over(mask=("none", "causal"), rates=JUMP_CHAIN, per_row=True)
def test_several_times_per_query_row(c):
    times = 3 * torch.rand(3, 1, 2, 5, dtype=torch.float64)
    p = problem(c, n=5, time=times)
    for one, time in zip(p.solve(), times, strict=True):
        np.testing.assert_allclose(one, p.golden(time=time), atol=1e-10)


def test_several_times_share_their_iterates():
    q = torch.randn(1, 2, 6, 4)
    generator, calls = la.SoftmaxGenerator(q, q), []
    apply = generator.apply
    generator.apply = lambda v: calls.append(1) or apply(v)
    la.expm_multiply(generator, q, torch.rand(7, 1, 1, 1), method=la.Uniformization(max_terms=5))
    assert len(calls) == 5


@over(mask=("none", "causal"), rates=BOTH, per_row=True)
@pytest.mark.parametrize("shape", [(5,), (2, 1, 5), (2, 2, 5)])
def test_one_time_per_query_row(c, shape):
    time = 3 * torch.rand(shape, dtype=torch.float64)
    time[..., 1] = 0.0
    p = problem(c, n=5, time=time)
    np.testing.assert_allclose(p.solve(), p.golden(), atol=1e-10)


@over(method=("default", "matrix exp"), mask=("none",), rates=JUMP_CHAIN, first_hop=(False,))
@pytest.mark.parametrize("time", [2, torch.tensor(2), torch.tensor([[2], [2]]), np.float64(2.0)])
def test_whole_numbers_are_times(c, time):
    p = problem(c, n=5)
    np.testing.assert_allclose(p.solve(time=time), p.golden(time=2.0), atol=1e-10)


@over(first_hop=(False,), rates=BOTH)
def test_no_time_returns_the_value_exactly(c):
    p = problem(c, n=5, dtype=torch.float32)
    for time in (0, 0.0, torch.zeros(()), torch.zeros(2, 1)):
        assert torch.equal(p.solve(time=time), p.value)


@over(first_hop=(False,), rates=JUMP_CHAIN, mask=("none", "causal", "key padding"))
def test_one_head_without_time_among_others_keeps_its_value_exactly(c):
    p = problem(c, n=5, dtype=torch.float32, time=torch.tensor([[0.0], [1.0]]))
    assert torch.equal(p.solve()[:, 0], p.value[:, 0])


def _kept_by_sdpa(n):
    """Masks for which torch's own attention has a target in every row."""
    row = torch.rand(n, n) < 0.6
    return {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": row | torch.eye(n, dtype=torch.bool)},
        "bool, diagonal hidden": {"attn_mask": ~torch.eye(n, dtype=torch.bool)},
        "float": {"attn_mask": torch.randn(2, n, n)},
        "float with -inf": {"attn_mask": torch.zeros(n, n).masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf)},
    }


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("mask", list(_kept_by_sdpa(2)))
@pytest.mark.parametrize("clock", list(CLOCKS))
@pytest.mark.parametrize("method", ["default", "matrix exp", "uniformization"])
def test_first_hop_without_time_is_scaled_dot_product_attention(mask, gqa, clock, method):
    n = 6
    knobs = _kept_by_sdpa(n)[mask] | {"enable_gqa": gqa}
    inputs = [torch.randn(2, heads, n, 4, requires_grad=True) for heads in (4 if gqa else 2, 2, 2)]
    if gqa and mask == "float":
        knobs["attn_mask"] = torch.randn(4, n, n)
    ours = la.lie_attention(
        *inputs, **knobs, first_hop=True, time=0.0, clock=CLOCKS[clock].clock, method=METHODS[method].method
    )
    torchs = sdpa(*inputs, **knobs)
    torch.testing.assert_close(ours, torchs, atol=1e-6, rtol=1e-6)
    upstream = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(torchs, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rates", list(RATE_FNS))
def test_queries_that_are_not_the_keys_have_only_the_first_hop(rates):
    query, key, value = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    rate_fn = RATE_FNS[rates].rate_fn
    with pytest.raises(la.errors.ShapeError, match="first_hop"):
        la.lie_attention(query, key, value, rate_fn=rate_fn)
    with pytest.raises(la.errors.ShapeError, match="first_hop"):
        la.lie_attention(query, key, value, first_hop=True, rate_fn=rate_fn)
    with pytest.raises(la.errors.ShapeError, match="first_hop"):
        la.lie_attention(query, key, value, time=0.0, rate_fn=rate_fn)
    if rate_fn is not None:  # softmax attention is all there is across tokens
        with pytest.raises(la.errors.ShapeError, match="rate_fn=None"):
            la.lie_attention(query, key, value, first_hop=True, time=0.0, rate_fn=rate_fn)
        return
    ours = la.lie_attention(query, key, value, first_hop=True, time=0.0)
    torch.testing.assert_close(ours, sdpa(query, key, value), atol=1e-6, rtol=1e-5)


def test_a_query_without_a_key_to_look_at_gives_no_nan():
    query, key, value = torch.randn(1, 3, 4), torch.randn(1, 5, 4), torch.randn(1, 5, 3)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    out = la.lie_attention(query, key, value, mask, first_hop=True, time=0.0)
    torch.testing.assert_close(out[:, 0], sdpa(query, key, value)[:, 0])
    assert torch.isfinite(out).all()


# --- the mixing matrix ----------------------------------------------------------------------------------------


@over()
def test_rows_are_distributions_and_masked_targets_get_exactly_nothing(c):
    norm = 8.0
    for dtype in WIDE:
        p = problem(c, n=9, dtype=dtype)
        _, generator = golden_chain(
            p.query, p.key, attn_mask=p.knobs["attn_mask"], is_causal=p.knobs["is_causal"], rate_fn=c.rates
        )
        mixing = p.mixing(time=norm / np.linalg.norm(generator, np.inf, axis=(-2, -1)).max())
        assert_stochastic(mixing, norm)
        hidden = torch.tensor(~p.allowed()) & ~torch.eye(9, dtype=torch.bool)
        assert (mixing[hidden] == 0).all()


@over(first_hop=(False,), method=("matrix exp",), mask=("none", "causal", "fully masked row"))
@pytest.mark.parametrize("dtype", WIDE)
def test_transition_matrix_is_the_mixing_matrix(c, dtype):
    p = problem(c, n=6, dtype=dtype, jump_rates=False)
    if c.rates == "jump chain":
        generator = la.SoftmaxGenerator(p.query, p.key, visible=p.knobs["attn_mask"], is_causal=p.knobs["is_causal"])
    else:
        allowed = torch.tensor(p.allowed())
        rates = RATE_FNS[c.rates].rate_fn(p.query @ p.key.mT / 3**0.5).masked_fill(~allowed, 0)
        generator = la.DenseGenerator.from_rates(rates)
    matrix = la.transition_matrix(generator, 1.3, clock=CLOCKS[c.clock].clock)
    assert matrix.dtype == dtype
    torch.testing.assert_close(matrix, p.mixing())
    identity = la.transition_matrix(generator, 0.0, clock=CLOCKS[c.clock].clock)
    assert torch.equal(identity, torch.eye(6, dtype=dtype).expand_as(identity))


@over(mask=("causal", "causal mask", "float causal"), rates=BOTH)
def test_causal_is_exactly_triangular(c):
    mixing = problem(c, n=17, dtype=torch.float32, time=3.0).mixing()
    assert torch.equal(mixing, mixing.tril())


@over(mask=("causal", "causal mask"), method=("uniformization", "triangular"), rates=JUMP_CHAIN)
def test_changing_the_future_leaves_the_past_bitwise_equal(c):
    p = problem(c, n=17, dtype=torch.float32, time=3.0)
    _assert_past_kept(p, lambda a, b: torch.equal(a, b))


@over(mask=("causal", "causal mask"), rates=BOTH)
def test_changing_the_future_leaves_the_past_alone(c):
    """Dense methods scale by the norm of the whole matrix, so there the past is kept to rounding only."""
    p = problem(c, n=17, time=3.0)
    _assert_past_kept(p, lambda a, b: torch.allclose(a, b, rtol=1e-11, atol=1e-11))


def _assert_past_kept(p, same):
    before, now = p.solve(), 11
    query, key, value = (x.clone() for x in (p.query, p.key, p.value))
    for x in (query, key, value):
        x[..., now:, :] = torch.randn_like(x[..., now:, :])
    rates = p.knobs["jump_rates"].clone()
    rates[..., now:] = torch.rand_like(rates[..., now:])
    after = p._replace(query=query, key=key, value=value).solve(jump_rates=rates)
    assert same(before[..., :now, :], after[..., :now, :])
    assert not torch.allclose(before[..., now:, :], after[..., now:, :])


@over(clock=("fixed",), first_hop=(False,), rates=BOTH)
def test_semigroup(c):
    """P(s)P(t) = P(s + t)."""
    p = problem(c, n=8)
    step = p._replace(value=p.solve(time=0.7)).solve(time=1.1)
    torch.testing.assert_close(step, p.solve(time=1.8), rtol=1e-10, atol=1e-10)


@over(mask=("none",))
def test_permutation_equivariance(c):
    p = problem(c, n=9)
    shuffle = torch.randperm(9)
    shuffled = p._replace(query=p.query[..., shuffle, :], key=p.key[..., shuffle, :], value=p.value[..., shuffle, :])
    after = shuffled.solve(jump_rates=p.knobs["jump_rates"][..., shuffle])
    torch.testing.assert_close(after, p.solve()[..., shuffle, :], rtol=1e-10, atol=1e-10)


@over(mask=FULLY_MASKED, rates=BOTH)
@pytest.mark.parametrize("time", [0.0, 1.3])
def test_a_fully_masked_row_keeps_its_value(c, time):
    p = problem(c, n=6, dtype=torch.float32, time=time)
    out, empty = p.solve(), torch.tensor(~p.allowed().any(-1))
    assert empty.any()
    torch.testing.assert_close(out[empty], p.value[empty], rtol=1e-6, atol=1e-6)
    assert torch.isfinite(out).all()


@over(mask=("key padding", *FULLY_MASKED, "float causal"), rates=BOTH)
def test_padding_is_finite_in_value_and_gradient(c):
    p = problem(c, n=6, dtype=torch.float32, time=torch.tensor([[0.8], [1.2]]).requires_grad_())
    leaves = [x.requires_grad_() for x in (p.query, p.key, p.value, p.knobs["jump_rates"])]
    out = p.solve()
    out.square().sum().backward()
    assert torch.isfinite(out).all()
    for leaf in (*leaves, p.knobs["time"]):
        assert torch.isfinite(leaf.grad).all()


@over(mask=("none", "causal", "padding rows"), rates=BOTH)
@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf])
def test_a_spoiled_value_stays_in_its_batch_item(c, spoiled):
    p = problem(c, n=5, dtype=torch.float32)
    value = p.value.clone()
    value[1, :, 2] = spoiled
    out = p._replace(value=value).solve()
    torch.testing.assert_close(out[0], p.solve()[0], rtol=0, atol=0)
    assert not torch.isfinite(out[1]).all()


# --- dtype and layout -----------------------------------------------------------------------------------------


@over(mask=("none", "causal", "padding rows", "float bias"), rates=BOTH)
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_within_a_hundredth_of_float32(c, dtype):
    p = problem(c, n=16, dtype=dtype, time=2.0, width=8)
    wide = {k: v.float() if _floats(v) else v for k, v in p.knobs.items()}
    exact = p._replace(query=p.query.float(), key=p.key.float(), value=p.value.float(), knobs=wide).solve()
    out = p.solve()
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), exact, rtol=1e-2, atol=1e-2)


@over(first_hop=(False,), mask=("none", "causal", "fully masked row"), rates=JUMP_CHAIN)
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_keeps_a_constant_over_many_hops(c, dtype):
    """Iterates and weights are kept in float32: in half precision 100 hops would lose 4 %."""
    p = problem(c, n=16, dtype=dtype, time=30.0, width=8, jump_rates=False)
    ones = torch.ones_like(p.value)
    torch.testing.assert_close(p._replace(value=ones).solve(), ones, rtol=0, atol=torch.finfo(dtype).eps)


@over(mask=("none", "causal", "padding rows", "float bias"), rates=BOTH)
def test_autocast_is_within_a_hundredth_of_float32(c):
    p = problem(c, n=16, dtype=torch.float32, time=2.0, width=8)
    exact = p.solve()
    with torch.autocast("cpu", torch.bfloat16):
        out = p.solve()
    torch.testing.assert_close(out.float(), exact, rtol=1e-2, atol=1e-2)


@over(mask=("none", "causal"), rates=BOTH)
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_output_has_the_dtype_of_the_input(c, dtype):
    for time in (0.0, 1.3):
        out = problem(c, n=4, dtype=dtype, time=time).solve()
        assert out.dtype == dtype
        assert out.shape == (2, 2, 4, 2)


def _floats(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "strided": lambda x: torch.stack([x, torch.zeros_like(x)], -1).flatten(-2)[..., ::2],
    "width first": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.cat([x, x], dim=-2)[..., : x.size(-2), :],
}


@over(mask=("none", "causal", "key padding"), rates=BOTH)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_in_memory_does_not_matter(c, layout):
    p = problem(c, n=5, time=torch.rand(2, 2, dtype=torch.float64).mT.reshape(2, 2, 1))
    q, k, v = (LAYOUTS[layout](x) for x in (p.query, p.key, p.value))
    torch.testing.assert_close(p._replace(query=q, key=k, value=v).solve(), p.solve(), rtol=1e-12, atol=1e-12)


@over(mask=("none", "causal", "key padding"), rates=BOTH)
def test_expanded_inputs(c):
    p = problem(c, n=5)
    q, k, v, rates = (x[:, :1].expand_as(x) for x in (p.query, p.key, p.value, p.knobs["jump_rates"]))
    out = p._replace(query=q, key=k, value=v).solve(jump_rates=rates)
    own = p._replace(query=q.clone(), key=k.clone(), value=v.clone()).solve(jump_rates=rates.clone())
    torch.testing.assert_close(out, own, rtol=1e-12, atol=1e-12)


@over(mask=("none", "causal"), rates=BOTH)
@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 3)])
def test_any_number_of_batch_dimensions(c, shape):
    p = problem(c, n=4, batch=1, heads=6, jump_rates=False)
    size = int(np.prod(shape))
    q, k, v = (x[0, :size].reshape(*shape, *x.shape[-2:]) for x in (p.query, p.key, p.value))
    torch.testing.assert_close(
        p._replace(query=q, key=k, value=v).solve(),
        p.solve()[0, :size].reshape(*shape, 4, 2),
        rtol=1e-12,
        atol=1e-12,
    )


@over(mask=("none", "causal", "key padding"), rates=BOTH)
def test_no_batch_items_give_no_batch_items(c):
    p = problem(c, n=4, batch=0)
    for time in (0.0, 1.3, torch.ones(2, 1), torch.ones(0, 2, 4)):
        if isinstance(time, torch.Tensor) and time.size(-1) > 1 and not METHODS[c.method].takes_rows(c):
            continue
        assert p.solve(time=time).shape == (0, 2, 4, 2)


@over(rates=BOTH, mask=("none",), method=("default", "uniformization", "matrix exp"))
def test_grouped_heads_are_repeated_heads(c):
    p = problem(c, n=5, heads=4)
    k, v = p.key[:, ::2], p.value[:, ::2]
    grouped = la.lie_attention(p.query, k, v, enable_gqa=True, method=p.method, **library_knobs(p.knobs))
    repeated = p._replace(key=k.repeat_interleave(2, 1), value=v.repeat_interleave(2, 1)).solve()
    torch.testing.assert_close(grouped, repeated)


# --- ladder ---------------------------------------------------------------------------------------------------

LADDER = [1e-4, 1e-2, 1.0, 30.0, 1e3, 1e5, 1e6]


@pytest.mark.parametrize("norm", LADDER)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("clock", list(CLOCKS))
@pytest.mark.parametrize("method", ["default", "matrix exp"])
def test_ladder_of_norms(norm, batch, clock, method):
    """A sink column is the hard case: it makes the column sums, hence ‖Qᵀ‖, large."""
    n = 12
    for dtype, sink in itertools.product(WIDE, (1, 100)):
        rates = torch.rand(batch, n, n, dtype=torch.float64)
        rates[..., 0] *= sink
        exits = rates.sum(-1) - rates.diagonal(dim1=-2, dim2=-1)
        rates = (rates / (2 * exits.max())).to(dtype)  # ‖Q‖ = 1
        generator = la.DenseGenerator.from_rates(rates)
        identity = torch.eye(n, dtype=dtype).expand(batch, n, n)
        mixing = la.expm_multiply(generator, identity, norm, clock=CLOCKS[clock].clock, method=METHODS[method].method)
        assert_stochastic(mixing, norm)
        exact = to_numpy(rates) * (1 - np.eye(n))
        exact = exact - exact.sum(-1, keepdims=True) * np.eye(n)
        rough = CLOCKS[clock].plain(norm * generator.dense())
        assert_as_exact_as(mixing, rough, CLOCKS[clock].golden(norm * exact), dtype=dtype)


@over(first_hop=(False,), method=("default", "matrix exp", "triangular"), mask=("none", "causal"), rates=JUMP_CHAIN)
@pytest.mark.parametrize("norm", LADDER)
def test_ladder_of_times(c, norm):
    for dtype in WIDE:
        mixing = problem(c, n=9, dtype=dtype, time=norm, jump_rates=False).mixing()
        assert_stochastic(mixing, 2 * norm)
        if c.mask == "causal":
            assert torch.equal(mixing, mixing.tril())


@over(clock=("fixed",), first_hop=(False,), method=("default",), mask=("none",), rates=JUMP_CHAIN)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("time", LADDER)
def test_ladder_in_half_precision(c, dtype, time):
    p = problem(c, n=9, dtype=dtype, time=time)
    out, value = p.solve(), p.value
    assert torch.isfinite(out).all()
    slack = 2e-2
    assert (out <= value.amax(-2, keepdim=True) + slack).all()
    assert (out >= value.amin(-2, keepdim=True) - slack).all()


# --- dropout --------------------------------------------------------------------------------------------------


@over(mask=("causal",), rates=BOTH)
def test_no_dropout_is_exact(c):
    p = problem(c, n=5, dtype=torch.float32)
    assert torch.equal(p.solve(dropout_p=0.0), p.solve())


@over(mask=("causal",), rates=BOTH)
def test_mean_over_dropouts_is_the_undropped_result(c):
    p = problem(c, n=4, dtype=torch.float32, batch=1, heads=1)
    exact, draws = p.solve(), 3000
    many = p._replace(
        query=p.query.expand(draws, 1, 4, 3), key=p.key.expand(draws, 1, 4, 3), value=p.value.expand(draws, 1, 4, 2)
    ).solve(dropout_p=0.3)
    mean, spread = many.mean(0, keepdim=True), many.std(0, keepdim=True)
    assert (spread > 0).any()
    assert worst(to_numpy((mean - exact) / (spread / draws**0.5 + 1e-3))) < 5


@pytest.mark.parametrize("method", ["default", "uniformization", "matrix exp"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout_of_the_first_hop_is_that_of_torch(method, is_causal):
    q, k, v = torch.randn(3, 2, 2, 6, 4)
    torch.manual_seed(7)
    torchs = sdpa(q, k, v, dropout_p=0.4, is_causal=is_causal)
    torch.manual_seed(7)
    ours = la.lie_attention(q, k, v, None, 0.4, is_causal, first_hop=True, time=0.0, method=METHODS[method].method)
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("rates", list(RATE_FNS))
def test_the_first_hop_drops_entries_under_every_rate_function(rates):
    q, k, v = torch.randn(3, 1, 2, 8, 4)
    draws = [
        la.lie_attention(q, k, v, dropout_p=0.5, first_hop=True, time=0.0, rate_fn=RATE_FNS[rates].rate_fn)
        for _ in range(2)
    ]
    assert not torch.equal(*draws)


# --- by hand --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["default", "matrix exp", "uniformization"])
def test_two_state_chain_by_hand(method):
    generator = la.DenseGenerator(torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    for t in (0.0, 0.3, 1.0, 5.0):
        kept, moved = (1 + np.exp(-2 * t)) / 2, (1 - np.exp(-2 * t)) / 2
        ours = la.expm_multiply(generator, torch.eye(2, dtype=torch.float64), t, method=METHODS[method].method)
        np.testing.assert_allclose(ours, [[kept, moved], [moved, kept]], atol=1e-14)
        np.testing.assert_allclose(la.transition_matrix(generator, t), [[kept, moved], [moved, kept]], atol=1e-14)
    np.testing.assert_allclose(la.transition_matrix(generator), [[0.5677, 0.4323], [0.4323, 0.5677]], atol=5e-5)


def test_softmax_is_the_jump_chain_of_exponential_rates():
    """With ρ = exp, R / R1 is the softmax, whatever the exit rates."""
    q, k, v = torch.randn(3, 2, 2, 6, 4, dtype=torch.float64)
    ours = la.lie_attention(q, k, v, first_hop=True, time=0.0, rate_fn=la.exponential)
    torch.testing.assert_close(ours, sdpa(q, k, v))


@pytest.mark.parametrize("mask", list(MASKS))
def test_first_hop_and_exponential_clock_answer_or_pass_on(mask):
    """S(I − tQ)⁻¹ = (I − SΓ)⁻¹S(I − Γ), γ_j = tρ_j/(1 + tρ_j)."""
    c = Combination("exponential", True, "default", mask)
    p = problem(c, n=6, time=2.0)
    chain, _ = golden_chain(p.query, p.key, attn_mask=p.knobs["attn_mask"], is_causal=p.knobs["is_causal"])
    rates = to_numpy(p.knobs["jump_rates"])
    gamma = (2 * rates / (1 + 2 * rates))[..., None, :]
    expected = np.linalg.inv(np.eye(6) - chain * gamma) @ (chain * (1 - gamma)) @ to_numpy(p.value)
    np.testing.assert_allclose(p.solve(), expected, atol=1e-10)
