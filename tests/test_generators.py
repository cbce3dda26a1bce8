"""A generator is known by what it does: the same Q as an operator, as a matrix, and by its bound."""

import numpy as np
import pytest
import torch
from cases import MASKS, RATE_FNS, WIDE, allowed_targets, golden_chain, worst
from hypothesis import given
from hypothesis import strategies as st

import liegroup_attn as la
from liegroup_attn.algebra import is_rate_matrix
from liegroup_attn.errors import GeneratorError


def _softmax(mask, n=6, dtype=torch.float64, **knobs):
    attn_mask, is_causal = MASKS[mask](2, 2, n, dtype)
    query, key = torch.randn(2, 2, 2, n, 3, dtype=torch.float64).to(dtype)
    return la.SoftmaxGenerator(query, key, visible=attn_mask, is_causal=is_causal, **knobs)


def _dense(mask, n=6, dtype=torch.float64):
    attn_mask, is_causal = MASKS[mask](2, 2, n, dtype)
    allowed = torch.tensor(allowed_targets(n, attn_mask, is_causal))
    return la.DenseGenerator.from_rates(torch.rand(2, 2, n, n, dtype=dtype).masked_fill(~allowed, 0))


def _given_by_matrix(mask, n=6, dtype=torch.float64):
    return la.DenseGenerator(_dense(mask, n, dtype).dense())


GENERATORS = {
    "softmax": _softmax,
    "softmax with jump rates": lambda mask, n=6, dtype=torch.float64: _softmax(
        mask, n, dtype, jump_rates=torch.rand(2, 2, n, dtype=dtype)
    ),
    "dense": _dense,
    "dense, by its matrix": _given_by_matrix,
}


def over_generators(test):
    return pytest.mark.parametrize("make", GENERATORS.values(), ids=GENERATORS)(
        pytest.mark.parametrize("mask", list(MASKS))(test)
    )


@over_generators
def test_is_a_rate_matrix(make, mask):
    for dtype in WIDE:
        assert make(mask, dtype=dtype).check() == (True, None)


@over_generators
def test_operator_and_matrix_are_one(make, mask):
    generator = make(mask)
    eye = torch.eye(6, dtype=torch.float64).expand(2, 2, 6, 6)
    torch.testing.assert_close(generator.apply(eye), generator.dense(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(generator.jump(eye), generator.jump_chain().expand(2, 2, 6, 6), rtol=1e-12, atol=1e-12)
    value = torch.randn(2, 2, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(generator.apply(value), generator.dense() @ value, rtol=1e-12, atol=1e-12)


@over_generators
def test_jump_chain_is_stochastic(make, mask):
    chain = make(mask).jump_chain()
    assert (chain >= 0).all()
    torch.testing.assert_close(chain.sum(-1), torch.ones_like(chain[..., 0]), rtol=1e-14, atol=1e-14)


@over_generators
def test_rate_bound_is_above_every_exit_rate(make, mask):
    generator = make(mask)
    exit_rates = -generator.dense().diagonal(dim1=-2, dim2=-1)
    assert (exit_rates <= generator.rate_bound()).all()


@over_generators
def test_constant_values_do_not_move(make, mask):
    moved = make(mask).apply(torch.ones(2, 2, 6, 1, dtype=torch.float64))
    assert worst(moved.numpy()) < 1e-14


@pytest.mark.parametrize("mask", list(MASKS))
def test_softmax_generator_is_the_golden_one(mask):
    rates = torch.rand(2, 2, 6, dtype=torch.float64)
    attn_mask, is_causal = MASKS[mask](2, 2, 6, torch.float64)
    query, key = torch.randn(2, 2, 2, 6, 3, dtype=torch.float64)
    generator = la.SoftmaxGenerator(query, key, visible=attn_mask, is_causal=is_causal, scale=0.7, jump_rates=rates)
    chain, rate_matrix = golden_chain(query, key, attn_mask=attn_mask, is_causal=is_causal, scale=0.7)
    np.testing.assert_allclose(generator.jump_chain().expand(2, 2, 6, 6), chain, atol=1e-14)
    np.testing.assert_allclose(generator.dense(), rates.numpy()[..., None] * rate_matrix, atol=1e-14)
    assert generator.rate_bound() == 1.0


@pytest.mark.parametrize("name", [name for name, row in RATE_FNS.items() if row.rate_fn])
def test_rate_functions_are_their_formulas(name):
    scores = torch.linspace(-8, 8, 33, dtype=torch.float64)
    rates = RATE_FNS[name].rate_fn(scores)
    assert (rates >= 0).all()
    np.testing.assert_allclose(rates, RATE_FNS[name].golden(scores.numpy()), rtol=1e-12, atol=1e-15)


# --- from rates -----------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.sampled_from([1e-6, 1.0, 1e6]), st.booleans(), st.integers(0, 2**31))
def test_from_rates(n, size, single, seed):
    """Q = R − diag(R1) for any R ≥ 0: a generator, whose jump chain is R / R1; R_ii drops out of Q."""
    dtype = torch.float32 if single else torch.float64
    rates = size * torch.rand(3, n, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    rates[0, 0] = 0
    generator = la.DenseGenerator.from_rates(rates)
    assert generator.check() == (True, None)
    off = rates * (1 - torch.eye(n, dtype=dtype))
    torch.testing.assert_close(generator.dense(), off - torch.diag_embed(off.sum(-1)))
    total = rates.sum(-1, keepdim=True)
    still = total == 0
    torch.testing.assert_close(
        generator.jump_chain(), torch.where(still, torch.eye(n, dtype=dtype), rates / total.masked_fill(still, 1))
    )
    no_diagonal = la.DenseGenerator.from_rates(off)
    assert torch.equal(no_diagonal.dense(), generator.dense())


def test_half_precision_is_computed_in_float32():
    for dtype in (torch.float16, torch.bfloat16):
        generator = la.DenseGenerator.from_rates(torch.rand(5, 5).to(dtype))
        assert generator.dense().dtype == torch.float32
        value = torch.randn(5, 2).to(dtype)
        assert generator.apply(value).dtype == generator.jump(value).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *WIDE])
@pytest.mark.parametrize("method", [None, la.MatrixExp(), la.Uniformization()], ids=str)
def test_rows_sum_to_one_from_a_matrix_in_any_precision(dtype, method):
    """A half-precision Q has row sums of 1e-2; they must not end up in the mixing matrix."""
    rates = torch.rand(9, 9, dtype=torch.float64)
    generator = la.DenseGenerator((rates - torch.diag(rates.sum(-1))).to(dtype))
    ones = la.expm_multiply(generator, torch.ones(9, 1), 3.0, method=method)
    torch.testing.assert_close(ones, torch.ones(9, 1), rtol=0, atol=8 * torch.finfo(torch.float32).eps * 6)


# --- check says why -------------------------------------------------------------------------------------------

GOOD = torch.tensor([[-1.0, 1.0], [2.0, -2.0]])
WRONG = {
    "nan": (GOOD.clone().fill_(torch.nan), "finite"),
    "inf": (torch.tensor([[-torch.inf, torch.inf], [0, 0]]), "finite"),
    "signs turned": (-GOOD, "off-diagonal"),
    "antisymmetric": (torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), "off-diagonal"),
    "stochastic": (torch.tensor([[0.5, 0.5], [0.5, 0.5]]), "sum to 0"),
    "columns sum to 0": (GOOD.mT, "sum to 0"),
    "one of a batch": (torch.stack([GOOD, GOOD, -GOOD]), "off-diagonal"),
}


@pytest.mark.parametrize("name", WRONG)
def test_is_rate_matrix_says_why_not(name):
    matrix, word = WRONG[name]
    for dtype in WIDE:
        ok, reason = is_rate_matrix(matrix.to(dtype))
        assert ok is False
        assert word in reason
        assert "got" in reason
    with pytest.raises(GeneratorError, match=word):
        la.DenseGenerator(matrix)


def test_randn_minus_its_row_sums_is_no_rate_matrix():
    """MATHEMATICS §8: G − diag(G1) has zero row sums and negative off-diagonals."""
    g = torch.randn(5, 5)
    ok, reason = is_rate_matrix(g - torch.diag(g.sum(1)))
    assert not ok
    assert "off-diagonal" in reason


def test_tolerance_is_the_callers_or_by_size():
    slightly = GOOD + torch.tensor([[0.0, 1e-3], [0.0, 0.0]])
    assert is_rate_matrix(slightly)[0] is False
    assert is_rate_matrix(slightly, atol=1e-2) == (True, None)
    assert la.DenseGenerator(GOOD).check(atol=0.0) == (True, None)
    large = torch.rand(64, 64) * 1e5
    assert is_rate_matrix(large - torch.diag(large.sum(1)))[0]


def test_a_cone_not_a_group():
    """Rate matrices are closed under sums and nonnegative scaling, not under −Q or commutators."""
    a, b = (la.DenseGenerator.from_rates(torch.rand(4, 4, dtype=torch.float64)).dense() for _ in range(2))
    assert is_rate_matrix(a + 3 * b)[0]
    assert is_rate_matrix(0 * a)[0]
    assert not is_rate_matrix(-a)[0]
    assert not is_rate_matrix(a @ b - b @ a)[0]


def test_nothing_to_look_at_is_a_rate_matrix():
    assert is_rate_matrix(torch.zeros(0, 3, 3)) == (True, None)
    assert is_rate_matrix(torch.zeros(1, 1)) == (True, None)
