"""``score_bias``: log-rates before the jump chain, in every shape, beside any mask, clock, method and rate function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CLOCKS, RATE_FNS, attention, golden_mixing, to_numpy

import liegroup_attn as la
from liegroup_attn.errors import DtypeError, GeneratorError, MaskError

pytestmark = pytest.mark.filterwarnings(
    "ignore:score_bias will go"
)  # across tokens, under autocast: by the keyword of before

B, H, N, E = 2, 2, 6, 3

METHODS = {
    "default": None,
    "matrix exp": la.MatrixExp(),
    "uniformization": la.Uniformization(),
    "formed hops": la.Uniformization(formed=True),
    "recomputed hops": la.Uniformization(formed=True, recompute=True),
    "triangular": la.TriangularSolve(),
    "squaring": la.ScalingSquaring(),
}
SHAPES = {"full": (B, H, N, N), "heads": (H, N, N), "one row": (H, 1, N), "one column": (H, N, 1), "a number": (1, 1)}

# name -> (attn_mask, is_causal)
MASKS = {
    "none": (None, False),
    "causal": (None, True),
    "causal, padding": ((torch.arange(N) >= torch.tensor([[0], [2]]))[:, None, None], True),
    "bool": (torch.ones(N, N, dtype=torch.bool).tril(), False),
    "padding": ((torch.arange(N) < torch.tensor([[N], [N - 2]]))[:, None, None], False),
    "row without target": (torch.arange(N)[:, None] != torch.full((N,), 2), False),
    "float": (torch.randn(N, N, generator=torch.Generator().manual_seed(5), dtype=torch.float64), False),
    "float causal": (torch.full((N, N), -torch.inf, dtype=torch.float64).triu(1) + 0.5, False),
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [normal(B, H, N, E, seed=seed, dtype=dtype) for seed in (1, 2, 3)]


Q, K, V = inputs()
BIAS = normal(H, N, N, seed=3)
TIME = 1.3


def golden(query, key, value, bias, mask, is_causal, **knobs) -> np.ndarray:
    """The same scores from wider queries and keys: (q, row of the bias)·(k, unit vector), so that cases.py needs no bias."""
    eye = torch.eye(N, dtype=torch.float64).expand(B, H, N, N)
    per_query = bias.double().expand(B, H, N, N)
    scale = E**-0.5
    return golden_mixing(
        torch.cat([scale * query.double(), per_query], -1),
        torch.cat([key.double(), eye], -1),
        attn_mask=mask,
        is_causal=is_causal,
        scale=1.0,
        **knobs,
    ) @ to_numpy(value)


def possible(method: str, clock: str, mask: str) -> bool:
    resolvent = clock != "fixed"
    return {"triangular": resolvent and mask in ("causal", "causal, padding"), "squaring": not resolvent}.get(
        method, True
    )


@pytest.mark.parametrize("first_hop", [False, True])
@pytest.mark.parametrize(
    ("method", "clock", "mask"),
    [(m, c, k) for m in METHODS for c in CLOCKS for k in MASKS if possible(m, c, k)],
)
def test_it_is_added_to_the_scores(method, clock, mask, first_hop):
    attn_mask, is_causal = MASKS[mask]
    rates = torch.rand(B, H, N, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for shape in SHAPES.values():
        bias = 2 * normal(*shape, seed=4)
        got = attention(
            *inputs(),
            attn_mask,
            is_causal=is_causal,
            score=bias,
            time=1.3,
            jump_rates=rates,
            first_hop=first_hop,
            clock=CLOCKS[clock].clock,
            method=METHODS[method],
        )
        expected = golden(
            *inputs(), bias, attn_mask, is_causal, time=1.3, jump_rates=rates, first_hop=first_hop, clock=clock
        )
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9, err_msg=str(shape))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rates", ["exponential", "softplus", "squared relu"])
def test_a_rate_function_sees_it(rates, mask):
    attn_mask, is_causal = MASKS[mask]
    bias = normal(H, N, N, seed=4)
    got = attention(*inputs(), attn_mask, is_causal=is_causal, score=bias, rate_fn=RATE_FNS[rates].rate_fn, time=0.4)
    expected = golden(*inputs(), bias, attn_mask, is_causal, rate_fn=rates, time=0.4)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("mask", MASKS)
def test_the_generator_acts_as_its_matrix(mask, shape):
    attn_mask, is_causal = MASKS[mask]
    query, key, value = inputs()
    chain = la.SoftmaxGenerator(
        query, key, visible=attn_mask, is_causal=is_causal, score=normal(*shape, seed=4), jump_rates=0.7
    )
    torch.testing.assert_close(chain.apply(value), chain.dense() @ value, atol=1e-12, rtol=0)
    torch.testing.assert_close(chain.jump(value), chain.jump_chain() @ value, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("first_hop", [False, True])
@pytest.mark.parametrize("method", ["default", "uniformization", "formed hops"])
def test_causality_whatever_its_shape(shape, first_hop, method):
    """A bias with one row or column for all once made the causal mask one for all, too."""
    eye = torch.eye(N, dtype=torch.float64).expand(B, H, N, N)
    query, key, _ = inputs()
    matrix = attention(
        query,
        key,
        eye,
        is_causal=True,
        score=normal(*shape, seed=4),
        first_hop=first_hop,
        method=METHODS[method],
    )
    assert matrix.triu(1).abs().max() == 0
    torch.testing.assert_close(matrix.sum(-1), torch.ones(B, H, N, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("is_causal", [False, True])
def test_across_tokens(is_causal):
    query, key, value = normal(B, H, 4, E), normal(B, H, N, E, seed=1), normal(B, H, N, E, seed=2)
    bias = normal(H, 4, N, seed=4)
    got = la.lie_attention(query, key, value, is_causal=is_causal, score_bias=bias, time=0.0, first_hop=True)
    scores = query @ key.mT / E**0.5 + bias
    if is_causal:
        scores = scores.masked_fill(torch.ones(4, N, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(got, scores.softmax(-1) @ value, atol=1e-12, rtol=0)


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_mask_beside_a_causal_one_across_tokens(with_bias):
    query, key, value = normal(B, H, 4, E), normal(B, H, N, E, seed=1), normal(B, H, N, E, seed=2)
    bias = normal(H, 4, N, seed=4) if with_bias else None
    mask = torch.arange(N) != 1
    got = la.lie_attention(query, key, value, mask[None], is_causal=True, score_bias=bias, time=0.0, first_hop=True)
    scores = query @ key.mT / E**0.5 + (bias if with_bias else 0)
    hidden = torch.ones(4, N, dtype=torch.bool).triu(1) | ~mask
    torch.testing.assert_close(got, scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value, atol=1e-12, rtol=0)


def test_several_times_at_once():
    times, bias = torch.tensor([0.3, 2.0], dtype=torch.float64).view(2, 1, 1, 1), normal(H, N, N, seed=4)
    both = attention(*inputs(), score=bias, time=times)
    for got, time in zip(both, (0.3, 2.0), strict=True):
        torch.testing.assert_close(
            got, attention(*inputs(), score=bias, time=time, method=la.MatrixExp()), atol=1e-9, rtol=0
        )


@pytest.mark.parametrize("first_hop", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("method", ["default", "matrix exp", "uniformization", "recomputed hops"])
@pytest.mark.parametrize("shape", ["full", "one row"])
def test_gradients_reach_it(method, is_causal, first_hop, shape):
    query, key, value = (x[:1, :, :3].requires_grad_() for x in inputs())
    size = {"full": (1, H, 3, 3), "one row": (H, 1, 3)}[shape]
    bias = normal(*size, seed=4).requires_grad_()

    def attend(query, key, value, bias):
        return attention(
            query,
            key,
            value,
            is_causal=is_causal,
            score=bias,
            first_hop=first_hop,
            method=METHODS[method],
            time=0.7,
        )

    assert torch.autograd.gradcheck(attend, (query, key, value, bias))
    (grad,) = torch.autograd.grad(attend(query, key, value, bias).square().sum(), bias)
    assert grad.abs().max() > 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [-1e5, 1e5])
@pytest.mark.parametrize("is_causal", [False, True])
def test_half_precision_takes_any_size(dtype, size, is_causal):
    """The same number for a whole row says nothing, also where the dtype ends at 65504."""
    query, key, value = inputs(dtype)
    bias = torch.zeros(N, N)
    bias[3] = size
    got = attention(query, key, value, is_causal=is_causal, score=bias, method=la.Uniformization())
    assert got.isfinite().all()
    # At that size the scores beside it are rounded away: row 3 jumps to all that it sees alike.
    chain = la.SoftmaxGenerator(query, key, is_causal=is_causal, score=bias)
    ones = chain.jump(torch.ones_like(value))
    torch.testing.assert_close(ones, torch.ones_like(value), atol=2e-2, rtol=0)


def test_autocast():
    query, key, value = (x.float() for x in inputs())
    bias = normal(H, N, N, seed=4).float()
    golden = la.lie_attention(query, key, value, score_bias=bias)
    with torch.autocast("cpu", torch.bfloat16):
        got = la.lie_attention(query.bfloat16(), key, value, score_bias=bias)
    torch.testing.assert_close(got.float(), golden, atol=5e-2, rtol=0)


def test_time_0_after_a_hop_is_biased_softmax_attention():
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    wanted = F.scaled_dot_product_attention(Q, K, V, BIAS.masked_fill(hidden, -torch.inf))
    got = la.lie_attention(Q, K, V, is_causal=True, score_bias=BIAS, time=0.0, first_hop=True)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    fewer = la.lie_attention(Q[..., :3, :], K, V, score_bias=BIAS[:, :3], time=0.0, first_hop=True)  # cross-attention
    wanted = F.scaled_dot_product_attention(Q[..., :3, :], K, V, BIAS[:, :3])
    torch.testing.assert_close(fewer, wanted, atol=1e-12, rtol=0)


def test_a_constant_in_a_row_changes_nothing():
    same = attention(Q, K, V, score=BIAS + normal(H, N, 1, seed=9), time=TIME)
    torch.testing.assert_close(same, attention(Q, K, V, score=BIAS, time=TIME), atol=1e-12, rtol=0)


def test_a_row_without_a_target_keeps_its_value():
    mask = torch.ones(N, N, dtype=torch.bool)
    mask[2] = False
    got = attention(Q, K, V, mask, score=BIAS, time=TIME)
    torch.testing.assert_close(got[..., 2, :], V[..., 2, :], atol=1e-12, rtol=0)


def test_far_biases_are_no_masks():
    """Tokens that a bias puts out of reach by 5000 are not hidden: no closure is asked for."""
    window = -10_000.0 * (torch.arange(N)[:, None] - torch.arange(N)).abs().double()
    got = attention(Q, K, V, is_causal=True, score=window, time=TIME)
    torch.testing.assert_close(got, V, atol=1e-12, rtol=0)


def test_gradients_under_a_mask():
    inside = [x[:, :1].clone().requires_grad_() for x in (Q, K, V)]
    bias = BIAS[:1].clone().requires_grad_()
    options = {"attn_mask": MASKS["padding"][0], "clock": la.ExponentialClock(), "time": TIME}
    assert torch.autograd.gradcheck(lambda q, k, v, b: attention(q, k, v, score=b, **options), (*inside, bias))


def test_grouped_heads():
    q = normal(B, 2 * H, N, E, seed=11)
    bias = normal(2 * H, N, N, seed=12)
    got = la.lie_attention(q, K, V, score_bias=bias, time=TIME, enable_gqa=True)
    wanted = la.lie_attention(q, K.repeat_interleave(2, 1), V.repeat_interleave(2, 1), score_bias=bias, time=TIME)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes(dtype):
    half = [t.to(dtype) for t in (Q, K, V)]
    got = attention(*half, is_causal=True, score=BIAS.float(), time=TIME)
    assert got.dtype == dtype
    wanted = attention(*(t.double() for t in half), is_causal=True, score=BIAS, time=TIME)
    torch.testing.assert_close(got.double(), wanted, atol=6 * torch.finfo(dtype).eps, rtol=0)


BAD_BIASES = {
    "integers": (torch.zeros(N, N, dtype=torch.long), DtypeError, r"score: expected a floating-point tensor, got"),
    "bool": (torch.ones(N, N, dtype=torch.bool), DtypeError, r"got torch.bool; what hides tokens is a mask"),
    "number": (1.0, DtypeError, r"or a floating-point tensor to be added, got float"),
    "shape": (torch.zeros(N, N + 1), MaskError, r"score: expected .*\(2, 2, 6, 6\).*, got \(6, 7\); one number"),
    "rank": (torch.zeros(N), MaskError, r"score: .* got \(6,\); one number per query and key"),
    "hides": (torch.zeros(N, N).masked_fill(torch.eye(N).bool(), -torch.inf), GeneratorError, r"score"),
    "NaN": (torch.full((N, N), torch.nan), GeneratorError, r"score"),
}


@pytest.mark.parametrize(("bias", "error", "match"), BAD_BIASES.values(), ids=BAD_BIASES)
def test_bad_biases(bias, error, match):
    with pytest.raises(error, match=match):
        attention(Q, K, V, score=bias)


@pytest.mark.filterwarnings("always")
def test_the_keyword_of_before():
    with pytest.warns(FutureWarning, match=r"score_bias will go .*SoftmaxGenerator\(q, k, score=bias"):
        got = la.lie_attention(Q, K, V, score_bias=BIAS, time=TIME)
    assert torch.equal(got, attention(Q, K, V, score=BIAS, time=TIME))
    with pytest.warns(FutureWarning, match="write score="):
        before = la.SoftmaxGenerator(Q, K, score_bias=BIAS).dense()
    assert torch.equal(before, la.SoftmaxGenerator(Q, K, score=BIAS).dense())
    with pytest.raises(TypeError, match="got both"):
        la.SoftmaxGenerator(Q, K, score_bias=BIAS, score=BIAS)


BAD = {
    "NaN": (torch.full((4, N), torch.nan), GeneratorError),
    "square": (torch.zeros(N, N), MaskError),
    "wider batch": (torch.zeros(7, B, H, 4, N), MaskError),
    "integers": (torch.zeros(4, N, dtype=torch.long), DtypeError),
}


@pytest.mark.parametrize(("bias", "error"), BAD.values(), ids=BAD)
def test_bad_input_across_tokens(bias, error):
    query, key, value = inputs()
    with pytest.raises(error, match=r"^score.*: expected .*, got .*; \w+"):
        la.lie_attention(query[..., :4, :], key, value, score_bias=bias, time=0.0, first_hop=True)
