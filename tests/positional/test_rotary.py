"""RoPE against complex products and matrix exponentials, and its group law act(p)act(q) = act(p + q)."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from liegroup_attn.errors import DtypeError, ShapeError
from liegroup_attn.positional import RotaryEncoding

D = 8
LAYOUTS = ("half_split", "interleaved")
layouts = pytest.mark.parametrize("layout", LAYOUTS)
bases = pytest.mark.parametrize("base", [10_000.0, 500_000.0, 2.0])


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(*positions: int) -> torch.Tensor:
    return torch.tensor(positions)


def pairs(layout: str, width: int = D) -> list[tuple[int, int]]:
    if layout == "half_split":
        return [(i, i + width // 2) for i in range(width // 2)]
    return [(2 * i, 2 * i + 1) for i in range(width // 2)]


def skew(layout: str, base: float = 10_000.0, width: int = D) -> np.ndarray:
    """The generator A with act(m) = exp(mA): one rotation a pair, at frequency base^(−2i/D)."""
    generator = np.zeros((width, width))
    for i, (a, b) in enumerate(pairs(layout, width)):
        generator[b, a] = base ** (-2 * i / width)
        generator[a, b] = -generator[b, a]
    return generator


@layouts
@bases
def test_it_is_the_exponential_of_a_skew_generator(layout, base):
    rotary, x = RotaryEncoding(D, layout=layout, base=base), vectors(5, D)
    for m in (0, 1, 7, 1000, -3):
        golden = x.numpy() @ scipy.linalg.expm(m * skew(layout, base)).T
        got = rotary(x, torch.full((5,), m))
        np.testing.assert_allclose(got.numpy(), golden, atol=1e-10)


@layouts
@bases
def test_it_is_a_complex_product(layout, base):
    x, positions = vectors(2, 3, 6, D), torch.tensor([0, 1, 2, 50, 4096, 131_071])
    real, imaginary = (x[..., list(columns)] for columns in zip(*pairs(layout), strict=True))
    angle = positions[:, None] * base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    got = RotaryEncoding(D, layout=layout, base=base)(x, positions)
    for i, (a, b) in enumerate(pairs(layout)):
        torch.testing.assert_close(got[..., a], turned[..., i].real, atol=1e-10, rtol=0)
        torch.testing.assert_close(got[..., b], turned[..., i].imag, atol=1e-10, rtol=0)


def test_published_frequencies():
    # D = 128, base 10000: the first, second, 33rd and last of Llama's inverse frequencies.
    rotary, x = RotaryEncoding(128, layout="half_split"), torch.zeros(1, 128, dtype=torch.float64)
    x[:, :64] = 1.0
    turned = rotary(x, at(1))[0]
    angle = torch.atan2(turned[64:], turned[:64])
    golden = torch.tensor([1.0, 0.8659643233600653, 0.01, 1.1547819846894582e-4], dtype=torch.float64)
    torch.testing.assert_close(angle[[0, 1, 32, 63]], golden, atol=1e-15, rtol=1e-12)


positions = st.integers(-100_000, 100_000)


@given(m=positions, n=positions, shift=positions, layout=st.sampled_from(LAYOUTS))
def test_products_depend_on_differences_only(m, n, shift, layout):
    rotary, q, k = RotaryEncoding(D, layout=layout), vectors(1, D), vectors(1, D, seed=1)
    one = (rotary(q, at(m)) * rotary(k, at(n))).sum()
    two = (rotary(q, at(m + shift)) * rotary(k, at(n + shift))).sum()
    torch.testing.assert_close(one, two, atol=1e-9, rtol=0)  # angles to 2e5, of which float64 knows 3e-11
    one_sided = (q * rotary(k, at(n - m))).sum()
    torch.testing.assert_close(one, one_sided, atol=1e-9, rtol=0)


@layouts
def test_products_depend_on_differences_only_within_1e_10(layout):
    rotary, q, k = RotaryEncoding(D, layout=layout), vectors(20, D), vectors(20, D, seed=1)
    shifts = [rotary(q, torch.arange(20) + s) @ rotary(k, torch.arange(20) + s).T for s in (0, 1, 37, 4000)]
    for scores in shifts[1:]:
        torch.testing.assert_close(scores, shifts[0], atol=1e-10, rtol=0)
    far = rotary(q, torch.arange(20) + 5) @ rotary(k, torch.arange(20)).T
    assert (far - shifts[0]).abs().max() > 0.1


@given(p=positions, q=positions, layout=st.sampled_from(LAYOUTS))
def test_it_is_an_action_of_the_integers(p, q, layout):
    rotary, x = RotaryEncoding(D, layout=layout), vectors(3, D)
    torch.testing.assert_close(rotary(rotary(x, at(p)), at(q)), rotary(x, at(p + q)), atol=1e-9, rtol=0)
    torch.testing.assert_close(rotary(x, at(p)).norm(dim=-1), x.norm(dim=-1), atol=1e-12, rtol=0)
    torch.testing.assert_close(rotary(rotary(x, at(p)), at(-p)), x, atol=1e-9, rtol=0)


@layouts
def test_it_is_orthogonal_and_position_0_the_identity(layout):
    rotary, eye = RotaryEncoding(D, layout=layout), torch.eye(D, dtype=torch.float64)
    for m in (1, 12345):
        matrix = rotary(eye, torch.full((D,), m))
        torch.testing.assert_close(matrix @ matrix.T, eye, atol=1e-14, rtol=0)
        torch.testing.assert_close(torch.linalg.det(matrix), torch.tensor(1.0).double(), atol=1e-14, rtol=0)
    assert torch.equal(rotary(eye, torch.zeros(D, dtype=torch.long)), eye)


@pytest.mark.parametrize("width", [2, 4, 6, 64])
def test_layouts_differ_by_a_permutation(width):
    order = torch.arange(width).unflatten(0, (-1, 2)).T.flatten()  # even features first: 0 2 4 … 1 3 5 …
    x = vectors(3, 10, width)
    halves = RotaryEncoding(width, layout="half_split")(x[..., order])
    mixed = RotaryEncoding(width, layout="interleaved")(x)
    torch.testing.assert_close(halves, mixed[..., order], atol=1e-14, rtol=0)
    assert width == 2 or not torch.allclose(RotaryEncoding(width, layout="half_split")(x), mixed)


@layouts
def test_positions(layout):
    rotary, x = RotaryEncoding(D, layout=layout), vectors(2, 3, 10, D)
    whole = rotary(x)
    assert torch.equal(rotary(x, torch.arange(10)), whole)
    assert torch.equal(rotary(x[..., 4:, :], torch.arange(4, 10)), whole[..., 4:, :])  # an offset is a slice
    assert torch.equal(rotary(x[..., 4:5, :], at(4)), whole[..., 4:5, :])
    each = torch.stack([torch.arange(10), torch.arange(10) + 3])[:, None]  # (B, 1, N)
    assert torch.equal(rotary(x, each)[0], whole[0])
    assert torch.equal(rotary(x, each)[1], rotary(x[1], torch.arange(3, 13)))
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(rotary(x, torch.arange(10, dtype=dtype)), whole)
    assert rotary(x[:0]).shape == (0, 3, 10, D)
    assert rotary(x[..., :0, :]).shape == (2, 3, 0, D)


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_positions_apart(layout, dtype):
    rotary = RotaryEncoding(2, layout=layout).to(dtype)
    x = torch.tensor([[1.0, 0.0]]).expand(4096, 2)
    golden = rotary(x.double())
    # A float32 input through the cast module: nothing in the module was cast.
    torch.testing.assert_close(rotary(x).double(), golden, atol=1e-6, rtol=0)
    assert len(torch.unique(rotary(x), dim=0)) == 4096
    half = rotary(x.to(dtype))
    assert half.dtype == dtype
    assert (half.double() - golden).abs().max() <= torch.finfo(dtype).eps
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotary(x), rotary(x.clone()))
        torch.testing.assert_close(rotary(x).double(), golden, atol=1e-6, rtol=0)


@layouts
def test_it_holds_no_state(layout):
    rotary, x = RotaryEncoding(D, layout=layout, base=7.0), vectors(4, D)
    assert not rotary.state_dict()
    assert not list(rotary.buffers())
    before = rotary(x)
    rotary(vectors(100, D))
    with torch.inference_mode():
        rotary(vectors(50, D))
    assert torch.equal(rotary(x), before)
    for copied in (copy.deepcopy(rotary), pickle.loads(pickle.dumps(rotary))):
        assert torch.equal(copied(x), before)
    assert repr(rotary) == f"RotaryEncoding(8, layout='{layout}', base=7)"


@layouts
def test_gradients(layout):
    rotary = RotaryEncoding(4, layout=layout)
    x = vectors(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(rotary, (x,))
    strided = vectors(4, 6).T[::2].requires_grad_()  # (3, 4), not contiguous
    assert torch.autograd.gradcheck(rotary, (strided,))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: RotaryEncoding(3, layout="half_split"),
            ShapeError,
            r"head_width: expected an even number, got 3; .*choose",
        ),
        (
            lambda: RotaryEncoding(0, layout="half_split"),
            ShapeError,
            r"head_width: expected an even number, got 0; .*choose",
        ),
        (lambda: RotaryEncoding(-2, layout="half_split"), ShapeError, r"head_width: expected .*, got -2; .*choose"),
        (
            lambda: RotaryEncoding(4, layout="neox"),
            ValueError,
            r"layout: expected one of .*half_split.*, got 'neox'; it must",
        ),
    ],
)
def test_bad_settings(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("x", "positions", "error", "match"),
    [
        (
            torch.zeros(5, D),
            torch.arange(5).half(),
            DtypeError,
            r"positions: expected integers, float32 or float64 for RotaryEncoding, got torch.float16; half precision",
        ),
        (torch.zeros(5, D), torch.ones(5).bool(), DtypeError, r"positions: expected integers, got torch.bool; count"),
        (torch.zeros(5, D), torch.arange(4), ShapeError, r"positions: expected .*\(5,\), got \(4,\); one per token"),
        (
            torch.zeros(5, D),
            torch.zeros(2, 5).long(),
            ShapeError,
            r"positions: expected .*\(5,\), got \(2, 5\); one per",
        ),
        (torch.zeros(5, 4), None, ShapeError, r"x: expected width 8, got shape \(5, 4\); match head_width"),
        (torch.zeros(D), None, ShapeError, r"x: expected at least 2 dimensions, got shape \(8,\); give"),
        (torch.zeros(5, D).long(), None, DtypeError, r"x: expected a floating-point tensor, got torch.int64; convert"),
    ],
)
def test_bad_inputs(x, positions, error, match):
    with pytest.raises(error, match=match):
        RotaryEncoding(D, layout="half_split")(x, positions)
