"""A bias on the scores: log-rates before the jump chain, beside any mask, clock, method and rate function."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

import liegroup_attn as la
from liegroup_attn.errors import DtypeError, GeneratorError, MaskError
from liegroup_attn.expm import CausalSweep, MatrixExp, ScalingSquaring, TriangularSolve, Uniformization

B, H, N, D = 2, 3, 7, 4
TIME = 1.3


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = (vectors(B, H, N, D, seed=seed) for seed in range(3))
BIAS = vectors(H, N, N, seed=3)
PADDING = (torch.arange(N) < torch.tensor([N, N - 2])[:, None]).view(B, 1, 1, N)
FLOAT = vectors(N, N, seed=4)
CLOCKS = {"fixed": None, "exponential": la.ExponentialClock(), "erlang": la.ErlangClock(2)}
MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "padding": {"attn_mask": PADDING},
    "float": {"attn_mask": FLOAT},
}


def golden(clock, first_hop, mask, rate_fn=None, bias=BIAS):
    """Dense, in NumPy, from the scores and what is added to them."""
    scores = (Q @ K.mT / D**0.5 + bias).numpy()
    hidden = np.zeros((B, H, N, N), dtype=bool)
    if mask == "causal":
        hidden |= np.triu(np.ones((N, N), dtype=bool), 1)
    elif mask == "padding":
        hidden |= ~PADDING.numpy()
    elif mask == "float":
        scores = scores + FLOAT.numpy()
    rates = np.exp(scores) if rate_fn is None else rate_fn(torch.from_numpy(scores)).numpy()
    rates[hidden] = 0
    chain = rates / rates.sum(-1, keepdims=True)
    generator = chain - np.eye(N) if rate_fn is None else rates - np.eye(N) * rates.sum(-1, keepdims=True)
    flow = TIME * generator
    if clock == "fixed":
        mixing = scipy.linalg.expm(flow)
    else:
        shape = 1 if clock == "exponential" else 2
        mixing = np.linalg.matrix_power(np.linalg.inv(np.eye(N) - flow / shape), shape)
    return torch.from_numpy((chain @ mixing if first_hop else mixing) @ V.numpy())


@pytest.mark.parametrize(
    ("clock", "first_hop", "mask"), list(itertools.product(CLOCKS, (False, True), MASKS)), ids=lambda v: str(v)
)
def test_it_is_added_to_the_scores(clock, first_hop, mask):
    got = la.lie_attention(Q, K, V, score_bias=BIAS, time=TIME, clock=CLOCKS[clock], first_hop=first_hop, **MASKS[mask])
    torch.testing.assert_close(got, golden(clock, first_hop, mask), atol=1e-10, rtol=0)


METHODS = {
    "dense": (MatrixExp(), "fixed", "none"),
    "dense, resolvent": (MatrixExp(), "exponential", "padding"),
    "hops": (Uniformization(tol=1e-13), "fixed", "float"),
    "hops, causal": (Uniformization(tol=1e-13), "fixed", "causal"),
    "hops, formed": (Uniformization(tol=1e-13, formed=True), "fixed", "causal"),
    "squaring": (ScalingSquaring(), "fixed", "padding"),
    "triangular": (TriangularSolve(), "exponential", "causal"),
}


@pytest.mark.parametrize(("method", "clock", "mask"), METHODS.values(), ids=METHODS.keys())
def test_every_method_sees_it(method, clock, mask):
    options = {"time": TIME, "clock": CLOCKS[clock], "method": method, **MASKS[mask]}
    got = la.lie_attention(Q, K, V, score_bias=BIAS, **options)
    torch.testing.assert_close(got, golden(clock, False, mask), atol=1e-10, rtol=0)


def test_rate_functions_see_it():
    got = la.lie_attention(Q, K, V, is_causal=True, score_bias=BIAS, time=TIME, rate_fn=la.softplus)
    torch.testing.assert_close(got, golden("fixed", False, "causal", F.softplus), atol=1e-10, rtol=0)


def test_time_0_after_a_hop_is_biased_softmax_attention():
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    wanted = F.scaled_dot_product_attention(Q, K, V, BIAS.masked_fill(hidden, -torch.inf))
    got = la.lie_attention(Q, K, V, is_causal=True, score_bias=BIAS, time=0.0, first_hop=True)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    fewer = la.lie_attention(Q[..., :3, :], K, V, score_bias=BIAS[:, :3], time=0.0, first_hop=True)  # cross-attention
    wanted = F.scaled_dot_product_attention(Q[..., :3, :], K, V, BIAS[:, :3])
    torch.testing.assert_close(fewer, wanted, atol=1e-12, rtol=0)


def test_a_constant_in_a_row_changes_nothing():
    same = la.lie_attention(Q, K, V, score_bias=BIAS + vectors(H, N, 1, seed=9), time=TIME)
    torch.testing.assert_close(same, la.lie_attention(Q, K, V, score_bias=BIAS, time=TIME), atol=1e-12, rtol=0)


def test_a_row_without_a_target_keeps_its_value():
    mask = torch.ones(N, N, dtype=torch.bool)
    mask[2] = False
    got = la.lie_attention(Q, K, V, mask, score_bias=BIAS, time=TIME)
    torch.testing.assert_close(got[..., 2, :], V[..., 2, :], atol=1e-12, rtol=0)


def test_far_biases_are_no_masks():
    """Tokens that a bias puts out of reach by 5000 are not hidden: no closure is asked for."""
    window = -10_000.0 * (torch.arange(N)[:, None] - torch.arange(N)).abs().double()
    got = la.lie_attention(Q, K, V, is_causal=True, score_bias=window, time=TIME)
    torch.testing.assert_close(got, V, atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": PADDING, "clock": la.ExponentialClock()}])
def test_gradients(options):
    inputs = [t[:, :1, :4].clone().requires_grad_() for t in (Q, K, V)]
    bias = BIAS[:1, :4, :4].clone().requires_grad_()
    if "attn_mask" in options:
        options = options | {"attn_mask": PADDING[..., :4]}
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: la.lie_attention(q, k, v, score_bias=b, time=TIME, **options), (*inputs, bias)
    )


def test_grouped_heads():
    q = vectors(B, 6, N, D, seed=11)
    bias = vectors(6, N, N, seed=12)
    got = la.lie_attention(q, K, V, score_bias=bias, time=TIME, enable_gqa=True)
    wanted = la.lie_attention(q, K.repeat_interleave(2, 1), V.repeat_interleave(2, 1), score_bias=bias, time=TIME)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes(dtype):
    half = [t.to(dtype) for t in (Q, K, V)]
    got = la.lie_attention(*half, is_causal=True, score_bias=BIAS.float(), time=TIME)
    assert got.dtype == dtype
    wanted = la.lie_attention(*(t.double() for t in half), is_causal=True, score_bias=BIAS, time=TIME)
    torch.testing.assert_close(got.double(), wanted, atol=6 * torch.finfo(dtype).eps, rtol=0)


BAD = {
    "integers": (torch.zeros(N, N, dtype=torch.long), DtypeError, r"score_bias: expected a floating-point tensor, got"),
    "bool": (torch.ones(N, N, dtype=torch.bool), DtypeError, r"got torch.bool; what hides tokens is attn_mask"),
    "number": (1.0, DtypeError, r"score_bias: expected a floating-point tensor, got float"),
    "shape": (torch.zeros(N, N + 1), MaskError, r"score_bias: expected .*\(2, 3, 7, 7\).*, got \(7, 8\); one number"),
    "rank": (torch.zeros(N), MaskError, r"score_bias: .* got \(7,\); one number per query and key"),
    "hides": (torch.zeros(N, N).masked_fill(torch.eye(N).bool(), -torch.inf), GeneratorError, r"score_bias"),
    "NaN": (torch.full((N, N), torch.nan), GeneratorError, r"score_bias"),
}


@pytest.mark.parametrize(("bias", "error", "match"), BAD.values(), ids=BAD.keys())
def test_bad_biases(bias, error, match):
    with pytest.raises(error, match=match):
        la.lie_attention(Q, K, V, score_bias=bias)


def test_a_sweep_refuses_it():
    with pytest.raises(GeneratorError, match=r"no bias or mask for CausalSweep, .*and a score_bias; use method=None"):
        la.lie_attention(Q, K, V, is_causal=True, score_bias=BIAS, method=CausalSweep())
