"""Positive feature maps: their formulas, and how fast random features approach softmax."""

import numpy as np
import pytest
import torch
from cases import worst

import liegroup_attn as la


def test_elu_plus_one_is_its_formula_and_positive():
    x = torch.linspace(-80, 8, 89)
    torch.testing.assert_close(la.elu_plus_one(x), torch.nn.functional.elu(x) + 1)
    assert (la.elu_plus_one(x) > 0).all()
    assert torch.autograd.gradcheck(la.elu_plus_one, torch.randn(5, dtype=torch.float64, requires_grad=True))


def _softmax_error(num_features, seed, orthogonal=True):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 32, 8, generator=generator, dtype=torch.float64) / 4
    phi = la.RandomFeatures(8, num_features, seed=seed, orthogonal=orthogonal)
    scaled = 8**-0.25  # √scale on each side, scale = 1/√E
    chain = la.LowRankGenerator(phi(scaled * query, is_query=True), phi(scaled * key)).jump_chain()
    return (chain - la.SoftmaxGenerator(query, key).jump_chain()).square().mean().sqrt().item()


@pytest.mark.parametrize("orthogonal", [True, False])
def test_random_features_approach_softmax(orthogonal):
    """16 times the features, a quarter of the error; over twenty fixed seeds the ratio was 4.7 and 4.3."""
    few, many = (
        np.sqrt(np.mean([_softmax_error(r, seed, orthogonal) ** 2 for seed in range(20)])) for r in (256, 4096)
    )
    assert 3 < few / many < 6
    assert many < 0.01 / 32


def test_random_features_are_the_published_ones():
    """E φ(q)·φ(k) = e^{q·k}: over many features the estimate is right up to the stabilizers, which cancel."""
    phi = la.RandomFeatures(4, 20_000)
    q, k = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 4
    estimate, wanted = phi(q) @ phi(k).mT, (q @ k.mT).exp()
    torch.testing.assert_close(estimate / estimate.sum(), wanted / wanted.sum(), rtol=0.05, atol=0)
    rows = la.RandomFeatures(4, 6)._directions
    assert worst((rows[:4] @ rows[:4].mT).fill_diagonal_(0).numpy()) < 1e-13


def test_random_features_are_fixed_by_their_seed():
    before = torch.get_rng_state()
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    first, again, other = (la.RandomFeatures(4, 7, seed=s)(x) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
    assert la.RandomFeatures(4, 7)(x.bfloat16()).dtype == torch.float32
    assert first.shape == (2, 5, 7)


def test_random_features_neither_overflow_nor_depend_on_the_stabilizer():
    x = 30 * torch.randn(5, 4, dtype=torch.float32)
    phi = la.RandomFeatures(4, 16)
    assert torch.isfinite(phi(x)).all()
    assert torch.isfinite(phi(x, is_query=True)).all()
    small = x / 30
    torch.testing.assert_close(
        la.LowRankGenerator(phi(small, is_query=True), phi(small)).dense(),
        la.LowRankGenerator(phi(small), phi(small)).dense(),
    )
