"""Biases one by one: published numbers, plain loops written from the formulas, causality, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from liegroup_attn.errors import DtypeError, MaskError, ShapeError
from liegroup_attn.nn import SoftmaxAttention
from liegroup_attn.positional import (
    FIRE,
    ALiBi,
    CoPE,
    ForgettingGate,
    T5Bias,
    unipotent_generator,
    unipotent_scores,
)

B, H, N, D, C = 2, 3, 9, 4, 6


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Q, K = vectors(B, N, C), vectors(B, H, N, D, seed=1), vectors(B, H, N, D, seed=2)


def away(encoding):
    """In float64, its free parameters away from their start."""
    encoding = encoding.double()
    with torch.no_grad():
        for parameter in encoding.parameters():
            if not hasattr(parameter, "manifold"):
                parameter += 0.5 * vectors(*parameter.shape, seed=5)
    return encoding


# ALiBi


def test_alibi_slopes_as_published():
    # Press et al.: 1/2 … 1/256 for 8 heads, 1/√2 … 1/256 for 16; between powers of two every other one of the next.
    eighths = [2.0**-k for k in range(1, 9)]
    sixteenths = [2.0 ** (-k / 2) for k in range(1, 17)]
    for heads, wanted in ((8, eighths), (16, sixteenths), (12, eighths + sixteenths[::2][:4])):
        assert ALiBi(heads).slopes().tolist() == pytest.approx(wanted, rel=1e-14)


def test_alibi_is_linear_in_distance_to_both_sides():
    bias = ALiBi(H)(X, Q, K)
    for h, slope in enumerate(ALiBi(H).slopes().tolist()):
        for i in range(N):
            assert bias[h, i].tolist() == pytest.approx([-slope * abs(i - j) for j in range(N)], abs=1e-15)


# T5


def test_t5_buckets_by_hand():
    # 16 buckets a direction: 8 exact ones, then floor(8 · log(d/8)/log(128/8)) = floor(2 log2(d/8)) further.
    differences = [0, 1, 7, 8, 11, 12, 16, 32, 64, 127, 128, 5000]
    wanted = [0, 1, 7, 8, 8, 9, 10, 12, 14, 15, 15, 15]
    both = T5Bias(H, is_causal=False)
    assert both.buckets(torch.tensor(differences)).tolist() == wanted
    assert both.buckets(-torch.tensor(differences[1:])).tolist() == [16 + b for b in wanted[1:]]
    # 32 buckets back: 16 exact ones, then floor(16 · log2(d/16)/3) further; what lies ahead shares 0.
    assert T5Bias(H, is_causal=True).buckets(torch.tensor([15, 16, 17, 32, 64, 128, 999, -5])).tolist() == [
        *(15, 16, 16, 21, 26, 31, 31, 0)
    ]


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 20), (64, 1000)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_t5_buckets_are_those_of_transformers(is_causal, buckets, most):
    module = pytest.importorskip("transformers.models.t5.modeling_t5")
    differences = torch.arange(-1200, 1200)
    theirs = module.T5Attention._relative_position_bucket(-differences, not is_causal, buckets, most)
    ours = T5Bias(H, is_causal=is_causal, num_buckets=buckets, max_distance=most).buckets(differences)
    # Theirs takes the logarithm in float32, which may put a boundary itself one bucket lower.
    boundary = ours != theirs
    assert ((ours - theirs)[boundary] == 1).all()
    assert int(boundary.sum()) <= 4


def test_t5_looks_its_table_up():
    bias = away(T5Bias(H, is_causal=False, num_buckets=8, max_distance=16))
    got = bias(X, Q, K)
    for i in range(N):
        for j in range(N):
            row = int(bias.buckets(torch.tensor(i - j)))
            assert torch.equal(got[:, i, j], bias.table[row])


# FIRE


def test_fire_against_a_loop():
    fire = away(FIRE(H, hidden=5, scale=0.3, threshold=4.0))
    got = fire(X, Q, K)
    w1, b1 = fire.inner.weight[:, 0].tolist(), fire.inner.bias.tolist()
    for h in range(H):
        w2 = fire.outer.weight[h].tolist()
        for i in range(N):
            for j in range(i + 1):
                share = math.log(0.3 * (i - j) + 1) / math.log(0.3 * max(4.0, i) + 1)
                wanted = sum(w * max(0.0, a * share + b) for w, a, b in zip(w2, w1, b1, strict=True))
                assert float(got[h, i, j]) == pytest.approx(wanted, abs=1e-6)  # c and L are float32


def test_fire_counts_a_distance_less_further_on():
    fire = away(FIRE(H, threshold=4.0))
    at = torch.arange(40)
    bias = fire(vectors(1, 40, C), vectors(1, H, 40, D), vectors(1, H, 40, D), at)
    assert torch.allclose(bias[:, 2, 1], bias[:, 4, 3], atol=1e-12)  # up to L
    assert (bias[:, 9, 4] - bias[:, 39, 34]).abs().max() > 1e-3


def test_fire_in_pieces_is_fire(monkeypatch):
    fire = away(FIRE(H))
    whole = fire(X, Q, K)
    monkeypatch.setattr("liegroup_attn.positional.fire._MOST_HIDDEN", 32 * N * 2)
    with torch.no_grad():
        torch.testing.assert_close(fire(X, Q, K), whole, atol=1e-14, rtol=0)


# forgetting gate


def test_forgetting_gate_against_a_double_loop():
    gate = away(ForgettingGate(C, H))
    got = gate(X, Q, K)
    forget = torch.sigmoid(X @ gate.weight.mT + gate.bias)  # (B, N, H)
    for b in range(B):
        for h in range(H):
            for i in range(N):
                for j in range(N):
                    wanted = sum(math.log(float(forget[b, between, h])) for between in range(j + 1, i + 1))
                    assert float(got[b, h, i, j]) == pytest.approx(wanted, abs=1e-12)


def test_forgetting_gate_is_as_exact_far_away_as_near():
    tokens = 4096
    gate, x = ForgettingGate(C, 1), vectors(1, tokens, C)
    with torch.no_grad():
        gate.weight.normal_()
        wide = ForgettingGate(C, 1).double()
        wide.load_state_dict({name: value.double() for name, value in gate.state_dict().items()})
        empty = torch.zeros(1, 1, tokens, 1)
        got = gate(x.float(), empty, empty)[0, 0, -1, -20:].double()
        golden = wide(x.float().double(), empty.double(), empty.double())[0, 0, -1, -20:]
    assert float(wide.accumulated(x)[0, 0, -1]) < -500  # where float32 knows 3e-5
    torch.testing.assert_close(got, golden, atol=0, rtol=2e-6)


def test_forgetting_gate_starts_as_alibi():
    torch.testing.assert_close(
        ForgettingGate(C, 8)(X.float(), *2 * [torch.zeros(B, 8, N, D)]).expand(B, 8, N, N),
        ALiBi(8)(X.float(), *2 * [torch.zeros(B, 8, N, D)]).tril().expand(B, 8, N, N),
        atol=1e-5,
        rtol=1e-5,
    )


# CoPE


@pytest.mark.parametrize("rows", [3, 64])
def test_cope_against_a_loop(rows):
    cope = away(CoPE(H, D, max_positions=rows))
    got = cope(X, Q, K)
    for b in range(B):
        for h in range(H):
            for i in range(N):
                for j in range(i + 1):
                    dots = [float(Q[b, h, i] @ K[b, h, between]) / math.sqrt(D) for between in range(j, i + 1)]
                    position = min(sum(1 / (1 + math.exp(-dot)) for dot in dots), rows - 1)
                    low = min(math.floor(position), rows - 2)
                    part = position - low
                    row = (1 - part) * cope.table[low] + part * cope.table[low + 1]
                    assert float(got[b, h, i, j]) == pytest.approx(float(Q[b, h, i] @ row) / math.sqrt(D), abs=1e-10)


def test_cope_makes_no_five_dimensional_tensor():
    cope, tokens = CoPE(H, 64).double(), 40
    sizes = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    with Sizes():
        cope(vectors(B, tokens, C), vectors(B, H, tokens, 64), vectors(B, H, tokens, 64))
    assert max(sizes) <= B * H * tokens * max(tokens, 64)


# what all share


BIASES = {
    "alibi": lambda: ALiBi(H),
    "t5": lambda: T5Bias(H, is_causal=True, num_buckets=8, max_distance=16),
    "t5, both ways": lambda: T5Bias(H, is_causal=False, num_buckets=8, max_distance=16),
    "fire": lambda: FIRE(H, hidden=4, threshold=4.5),
    "forgetting gate": lambda: ForgettingGate(C, H),
    "cope": lambda: CoPE(H, D, max_positions=5),
}
each = pytest.mark.parametrize("build", BIASES.values(), ids=BIASES.keys())


@each
def test_gradients(build):
    bias = away(build())
    parameters = dict(bias.named_parameters())

    def call(x, query, key, *values):
        return torch.func.functional_call(bias, dict(zip(parameters, values, strict=True)), (x, query, key))

    inputs = [t[..., :4, :].clone().requires_grad_() for t in (X, Q, K)]
    values = [p.detach().as_subclass(torch.Tensor).double().clone().requires_grad_() for p in parameters.values()]
    if values or bias.contextual:
        assert torch.autograd.gradcheck(call, (*inputs, *values))


@each
def test_a_row_knows_nothing_of_later_tokens(build):
    bias = away(build())
    before = bias(X, Q, K).expand(B, H, N, N)
    later = [t.clone() for t in (X, Q, K)]
    for t in later:
        t[..., 5:, :] += 1.0
    after = bias(*later).expand(B, H, N, N)
    assert torch.equal(before[..., :5, :].tril(), after[..., :5, :].tril())
    assert (not torch.equal(before, after)) == bias.contextual


@pytest.mark.parametrize("tokens", [1, 2])
@each
def test_small_and_finite_everywhere(build, tokens):
    bias = away(build())(X[:, :tokens], Q[..., :tokens, :], K[..., :tokens, :])
    assert bias.shape[-3:] == (H, tokens, tokens)
    assert bias.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each
def test_half_precision_inputs_are_computed_in_float32(build, dtype):
    bias = build()
    got = bias(X.to(dtype), Q.to(dtype), K.to(dtype))
    assert got.dtype == torch.float32
    wide = bias(X.to(dtype).float(), Q.to(dtype).float(), K.to(dtype).float())
    torch.testing.assert_close(got, wide, atol=1e-6, rtol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(bias(X.float(), Q.float(), K.float()), bias(X.float(), Q.float(), K.float()))


BAD = {
    "t5 fractional": (
        lambda: T5Bias(H, is_causal=True)(X, Q, K, torch.arange(N) + 0.5),
        DtypeError,
        r"positions: expected integers for T5Bias, got torch.float32; round",
    ),
    "t5 odd": (
        lambda: T5Bias(H, is_causal=False, num_buckets=5),
        ShapeError,
        r"num_buckets: expected an even number ≥ 4, got 5; take 32",
    ),
    "t5 one": (lambda: T5Bias(H, is_causal=True, num_buckets=1), ShapeError, r"num_buckets: expected ≥ 2, got 1; take"),
    "t5 near": (
        lambda: T5Bias(H, is_causal=True, max_distance=16),
        ShapeError,
        r"max_distance: expected more than 16, got 16; take 128",
    ),
    "fire hidden": (lambda: FIRE(H, hidden=0), ShapeError, r"hidden: expected an integer from 1, got 0; change"),
    "fire scale": (lambda: FIRE(H, scale=0.0), ValueError, r"scale: expected a positive number, got 0.0; the paper"),
    "fire threshold": (
        lambda: FIRE(H, threshold=-1.0),
        ValueError,
        r"threshold: expected a positive number, got -1.0; the paper",
    ),
    "fire, no mask": (
        lambda: SoftmaxAttention(12, H, encoding=FIRE(H)),
        MaskError,
        r"encoding: expected is_causal=True beside FIRE, got False",
    ),
    "gate width": (
        lambda: ForgettingGate(C + 1, H)(X, Q, K),
        ShapeError,
        r"x: expected width 7, got shape \(2, 9, 6\); match embed_dim",
    ),
    "gate, no tokens": (
        lambda: ForgettingGate(C, H).between(torch.zeros(1, 1), torch.zeros(1, 1)),
        NotImplementedError,
        r"between: expected tokens beside positions; call",
    ),
    "cope width": (
        lambda: CoPE(H, D + 1)(X, Q, K),
        ShapeError,
        r"query: expected width 5, got shape \(2, 3, 9, 4\); match head_width",
    ),
    "cope rows": (
        lambda: CoPE(H, D, max_positions=1),
        ShapeError,
        r"max_positions: expected at least 2, got 1; e\[p\]",
    ),
    "cope std": (lambda: CoPE(H, D, std=0.0), ValueError, r"std: expected a positive number, got 0.0; at 0"),
    "heads": (lambda: ALiBi(0), ShapeError, r"num_heads: expected at least 1, got 0; one bias per head"),
    "other heads": (
        lambda: ALiBi(2)(X, Q, K),
        ShapeError,
        r"query: expected 2 heads, got shape \(2, 3, 9, 4\); match num_heads",
    ),
    "unipotent": (
        lambda: unipotent_scores(Q[0, 0], K[0, 0], torch.arange(3), torch.arange(N), 0.5),
        ShapeError,
        r"query_positions: expected shape \(9,\), got \(3,\); one per token",
    ),
}


@pytest.mark.parametrize(("make", "error", "match"), BAD.values(), ids=BAD.keys())
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()


# the unipotent reading


def test_alibi_is_a_unipotent_action():
    query, key, at = Q[0, 0], K[0, 0], torch.arange(N)
    for head, slope in enumerate(ALiBi(H).slopes().tolist()):
        wanted = query @ key.mT + ALiBi(H)(X, Q, K)[head]
        got = unipotent_scores(query, key, at, at, slope)
        torch.testing.assert_close(got.tril(), wanted.tril(), atol=1e-12, rtol=0)
        moved = unipotent_scores(query, key, at + 77, at + 77, slope)
        torch.testing.assert_close(moved, got, atol=1e-12, rtol=0)


def test_shears_are_a_one_parameter_group():
    generator = unipotent_generator(0.7, D)
    assert not (generator @ generator).any()

    def shear(m):
        return torch.linalg.matrix_exp(m * generator)

    torch.testing.assert_close(shear(2.0) @ shear(3.5), shear(5.5), atol=1e-14, rtol=0)
    torch.testing.assert_close(shear(2.0), torch.eye(D + 2).double() + 2.0 * generator, atol=1e-15, rtol=0)


def test_the_forgetting_gate_is_the_same_action_at_positions_that_tokens_make():
    gate = away(ForgettingGate(C, H))
    forgotten = -gate.accumulated(X)[0]  # (H, N), grows
    for h in range(H):
        got = unipotent_scores(Q[0, h], K[0, h], forgotten[h], forgotten[h], 1.0)
        wanted = Q[0, h] @ K[0, h].mT + gate(X, Q, K)[0, h]
        torch.testing.assert_close(got.tril(), wanted.tril(), atol=1e-12, rtol=0)
