"""One named test for each bug that a review found and no table of cases had."""

import pytest
import torch

import liegroup_attn as la
from liegroup_attn.nn import LieAttention

WINDOW = torch.ones(6, 6, dtype=torch.bool).tril().triu(-1)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_generator_that_starts_at_zero_has_a_gradient(batch):
    """Λ = 0 made every hop weight 0; in a batch it was the zero matrix alone that never learned."""
    dense = torch.zeros(*batch, 3, 3, dtype=torch.float64)
    if batch:
        dense[1] = torch.tensor([[-1.0, 1.0, 0.0], [0.5, -1.0, 0.5], [0.0, 2.0, -2.0]])
    value, weight = torch.randn(3, 2, dtype=torch.float64), torch.randn(*batch, 3, 2, dtype=torch.float64)
    gradients = []
    for method in (la.MatrixExp(), la.Uniformization(), None):
        leaf = dense.clone().requires_grad_()
        (la.expm_multiply(la.DenseGenerator(leaf), value, 0.7, method=method) * weight).sum().backward()
        gradients.append(leaf.grad - leaf.grad.diagonal(dim1=-2, dim2=-1).unsqueeze(-1))  # along zero row sums
    assert gradients[0].abs().max() > 0.1
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-10, rtol=0)


def test_a_layer_takes_an_open_mask_by_name():
    x = torch.randn(2, 6, 16)
    with pytest.raises(la.errors.MaskError, match="allow_open_mask"):
        LieAttention(16, 2)(x, WINDOW)
    layer = LieAttention(16, 2, allow_open_mask=True)
    assert torch.isfinite(layer(x, WINDOW)).all()
    assert layer.generator(x, WINDOW).check()[0]


def test_a_float_mask_goes_with_autocast():
    x, bias = torch.randn(2, 6, 16), torch.randn(6, 6)
    layer = LieAttention(16, 2)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x, bias)
    torch.testing.assert_close(mixed.float(), layer(x, bias), atol=2e-2, rtol=2e-2)


def test_a_rate_function_without_a_gradient_at_minus_infinity():
    q = torch.randn(1, 5, 4, requires_grad=True)
    causal = torch.zeros(5, 5).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    la.lie_attention(q, q, q, causal, rate_fn=torch.square).sum().backward()
    assert torch.isfinite(q.grad).all()


def test_a_scale_that_is_not_finite_is_refused_on_every_road():
    q, k = torch.randn(1, 3, 4), torch.randn(1, 5, 4)
    for key in (q, k):
        with pytest.raises(la.errors.GeneratorError, match="scale"):
            la.lie_attention(q, key, key, scale=float("nan"), time=0.0, first_hop=True)
