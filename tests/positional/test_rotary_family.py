"""Forms, layouts and axes of rotary encodings."""

import pytest
import torch

from liegroup_attn.nn import SoftmaxAttention
from liegroup_attn.positional import (
    AxialRotary,
    MixedRotary,
    RotaryEncoding,
    XPos,
    complex_form,
    convert_layout,
    exponential_form,
    rotation_form,
)


@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
@pytest.mark.parametrize("form", [complex_form, rotation_form, exponential_form])
def test_forms(form, layout):
    x, at = torch.randn(6, 8, dtype=torch.float64), torch.arange(6)
    rotary = RotaryEncoding(8, layout=layout)
    angles = rotary.angles(at[:, None].double(), x)
    torch.testing.assert_close(form(x, angles, layout), rotary(x, at), atol=1e-12, rtol=0)


@pytest.mark.parametrize("make", [AxialRotary, lambda d, **k: MixedRotary(d, 2, **k)])
def test_actions_of_three_axes(make):
    encoding = make(12, layout="half_split", axes=3).double()
    v, x, y = torch.randn(2, 5, 12).double(), torch.randn(5, 3).double(), torch.randn(5, 3).double()
    torch.testing.assert_close(encoding(encoding(v, x), y), encoding(v, x + y), atol=1e-12, rtol=0)


@pytest.mark.parametrize("width", [None, 4])
def test_layouts_convert(width):
    options = {"rotary_width": width}
    layers = [
        SoftmaxAttention(16, 2, encoding=RotaryEncoding(8, layout=s, **options)).double()
        for s in ("half_split", "interleaved")
    ]
    state = layers[0].state_dict()
    names = [n for n in state if "query" in n or "key" in n or n.startswith(("q_", "k_"))]
    assert names
    for n in names:
        state[n] = convert_layout(state[n], head_width=8, source="half_split", target="interleaved", **options)
    layers[1].load_state_dict(state)
    x = torch.randn(1, 6, 16).double()
    torch.testing.assert_close(layers[1].mixing_matrix(x), layers[0].mixing_matrix(x), atol=1e-12, rtol=0)


def test_refusals_and_range():
    with pytest.raises(ValueError, match="rotary_width: expected an even number ≤ head_width"):
        RotaryEncoding(8, layout="half_split", rotary_width=10)
    with pytest.raises(ValueError, match="axes: expected a divisor"):
        AxialRotary(8, layout="half_split", axes=3)
    x = torch.ones(1, 1, 4096, 8)
    assert all(t.isfinite().all() for t in XPos(8, layout="half_split").rotate(x, x))
