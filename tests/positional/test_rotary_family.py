"""The rotary family: three forms of one turn, layouts that convert, partial heads, actions of the plane, decay, and refusals."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from positional_cases import CASES
from rotation_forms import complex_form, exponential_form, rotation_form, skew_generator
from torch import Tensor

from liegroup_attn.nn import SoftmaxAttention
from liegroup_attn.positional import (
    AxialRotary,
    FoldedRotary,
    MixedRotary,
    PairRotation,
    RotaryEncoding,
    RotationEncoding,
    XPos,
    convert_layout,
    grid_positions,
)

LAYOUTS = ("half_split", "interleaved")
layouts = pytest.mark.parametrize("layout", LAYOUTS)
forms = pytest.mark.parametrize("form", [complex_form, rotation_form, exponential_form])


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@layouts
@forms
def test_three_forms_of_one_turn(form, layout):
    rotary, x, at = RotaryEncoding(8, layout=layout), vectors(2, 3, 6, 8), torch.tensor([0, 1, 5, -7, 100, 1000])
    angles = rotary.angles(at[:, None].double(), x)
    torch.testing.assert_close(form(x, angles, layout), rotary(x, at), atol=1e-12, rtol=0)


@layouts
@forms
def test_gradients_of_every_form(form, layout):
    x, angles = vectors(2, 3, 4).requires_grad_(), vectors(3, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, angles: form(x, angles, layout), (x, angles))


@layouts
def test_the_generator_is_the_derivative_at_0(layout):
    frequencies = vectors(4).exp()
    generator = skew_generator(frequencies, layout)
    assert torch.equal(generator, -generator.mT)

    def turned(t: Tensor) -> Tensor:
        return rotation_form(torch.eye(8, dtype=torch.float64), (t * frequencies).expand(8, -1), layout)

    derivative = torch.func.jacfwd(turned)(torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(derivative.mT, generator, atol=1e-12, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("width", [None, 4, 8])
@pytest.mark.parametrize(("source", "target"), [LAYOUTS, LAYOUTS[::-1]])
def test_layouts_convert(source, target, width, heads, bias):
    """Weights and biases, fewer key heads than query heads, and heads that turn in part."""
    layers = {
        layout: SoftmaxAttention(
            48, 4, num_kv_heads=heads, bias=bias, encoding=RotaryEncoding(12, layout=layout, rotary_width=width)
        ).double()
        for layout in (source, target)
    }
    state = layers[source].state_dict()
    for name, tensor in state.items():
        if name.startswith(("q_proj", "k_proj")):
            tensor.add_(vectors(*tensor.shape, seed=len(name)))  # biases start at 0
    x = vectors(2, 7, 48) / 4
    before = layers[source].mixing_matrix(x)
    layers[target].load_state_dict(state)
    assert (layers[target].mixing_matrix(x) - before).abs().max() > 1e-3  # another layout, other scores
    converted = {
        name: convert_layout(tensor, head_width=12, source=source, target=target, rotary_width=width)
        if name.startswith(("q_proj", "k_proj"))
        else tensor
        for name, tensor in state.items()
    }
    layers[target].load_state_dict(converted)
    torch.testing.assert_close(layers[target].mixing_matrix(x), before, atol=1e-12, rtol=0)
    torch.testing.assert_close(layers[target](x), layers[source](x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("width", [None, 4])
def test_layouts_convert_there_and_back(width):
    weight = vectors(24, 5)
    options = {"head_width": 12, "rotary_width": width}
    there = convert_layout(weight, source="half_split", target="interleaved", **options)
    assert torch.equal(convert_layout(there, source="interleaved", target="half_split", **options), weight)
    same = convert_layout(weight, source="half_split", target="half_split", **options)
    assert torch.equal(same, weight)
    assert same.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("part", [0.25, 0.5, 1.0])
def test_partial_heads_turn_as_gpt_neox_s(part):
    theirs = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    given = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": part}
    config = theirs.GPTNeoXConfig(hidden_size=64, num_attention_heads=4, rope_parameters=given)
    query, key, at = vectors(2, 4, 9, 16).float(), vectors(2, 4, 9, 16, seed=1).float(), torch.arange(9)[None]
    expected = theirs.apply_rotary_pos_emb(query, key, *theirs.GPTNeoXRotaryEmbedding(config)(query, at))
    got = RotaryEncoding(16, layout="half_split", rotary_width=int(16 * part)).rotate(query, key)
    for ours, golden in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, golden, atol=1e-6, rtol=0)


@pytest.mark.parametrize("part", [8, 16])
def test_partial_heads_turn_as_gpt_j_s(part):
    theirs = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    query = vectors(2, 4, 9, 16).float()
    sin, cos = theirs.create_sinusoidal_positions(9, part)[None].chunk(2, -1)
    turned = theirs.apply_rotary_pos_emb(query[..., :part].transpose(1, 2), sin, cos).transpose(1, 2)
    got = RotaryEncoding(16, layout="interleaved", rotary_width=part)(query)
    torch.testing.assert_close(got, torch.cat([turned, query[..., part:]], -1), atol=1e-6, rtol=0)


def mixed(axes: int, layout: str) -> MixedRotary:
    return MixedRotary(12, 2, layout=layout, axes=axes, base=10.0)


ACTIONS = {
    "rotary": lambda layout: RotaryEncoding(12, layout=layout),
    "rotary, partial": lambda layout: RotaryEncoding(12, layout=layout, rotary_width=8),
    **{f"axial, {p} axes": lambda layout, p=p: AxialRotary(12, layout=layout, axes=p) for p in (1, 2, 3, 6)},
    **{f"mixed, {p} axes": lambda layout, p=p: mixed(p, layout) for p in (1, 2, 3, 5)},
}
actions = pytest.mark.parametrize("make", ACTIONS.values(), ids=ACTIONS.keys())
reals = st.floats(-500, 500, allow_nan=False)


@layouts
@actions
@given(data=st.data())
def test_it_is_an_action_of_the_reals(make, layout, data):
    """act(x)act(y) = act(x + y), act(0) = 1 and R Rᵀ = 1, at positions between integers and below 0, too."""
    torch.manual_seed(3)
    encoding = make(layout).double()
    axes = encoding.axes
    x, y = (torch.tensor([data.draw(st.lists(reals, min_size=axes, max_size=axes))]).double() for _ in range(2))
    at, then, both = (t if axes > 1 else t[..., 0] for t in (x, y, x + y))
    v = vectors(2, 1, 12)
    torch.testing.assert_close(encoding(encoding(v, at), then), encoding(v, both), atol=1e-10, rtol=0)
    assert torch.equal(encoding(v, torch.zeros_like(at)), v)
    matrix = encoding.matrix(at)
    eye = torch.eye(12, dtype=torch.float64).expand_as(matrix)
    torch.testing.assert_close(matrix @ matrix.mT, eye, atol=1e-12, rtol=0)
    torch.testing.assert_close(matrix.mT, encoding.matrix(-at), atol=1e-12, rtol=0)


@layouts
@pytest.mark.parametrize("axes", [2, 3])
def test_an_axis_turns_its_own_pairs_as_rope_of_its_width(axes, layout):
    encoding, width = AxialRotary(12, layout=layout, axes=axes), 12 // axes
    at = grid_positions(*range(3, 3 + axes))
    rotary = RotaryEncoding(width, layout=layout)
    pair = torch.arange(6)
    first, second = (pair, pair + 6) if layout == "half_split" else (2 * pair, 2 * pair + 1)
    x = vectors(len(at), 12)
    got = encoding(x, at)
    for p in range(axes):
        own = slice(p * width // 2, (p + 1) * width // 2)
        features = torch.cat([first[own], second[own]])
        order = features if layout == "half_split" else features.sort().values
        torch.testing.assert_close(got[:, order], rotary(x[:, order], at[:, p]), atol=1e-12, rtol=0)


def test_mixed_starts_as_rope_on_one_axis_and_as_turned_axial_on_more():
    along = MixedRotary(12, 3, layout="half_split", axes=1, base=100.0).double()
    x, at = vectors(3, 7, 12), torch.arange(7)
    torch.testing.assert_close(
        along(x, at), RotaryEncoding(12, layout="half_split", base=100.0)(x, at), atol=1e-5, rtol=0
    )
    frequencies = MixedRotary(12, 3, layout="half_split", axes=2, base=100.0).frequencies  # (H, 6, 2)
    size = 100.0 ** (-torch.arange(3) / 3)
    torch.testing.assert_close(frequencies.norm(dim=-1), size.repeat_interleave(2).expand(3, -1))
    first, second = frequencies.unflatten(1, (3, 2)).unbind(2)
    torch.testing.assert_close((first * second).sum(-1), torch.zeros(3, 3))  # two directions, at a right angle
    turns = first[:, 0, 0] * second[:, 0, 1] - first[:, 0, 1] * second[:, 0, 0]
    torch.testing.assert_close(turns, torch.ones(3))  # a rotation of the plane, no mirror
    assert (first[0, 0] - first[1, 0]).abs().max() > 1e-3  # per head


@pytest.mark.parametrize(("width", "axes"), [(8, 3), (12, 3), (12, 5), (6, 3)])
def test_mixed_sees_every_axis_from_the_start(width, axes):
    """Also where axes do not divide the pairs: no move leaves all angles as they were."""
    frequencies = MixedRotary(width, 2, layout="half_split", axes=axes, base=10.0).frequencies
    assert torch.linalg.matrix_rank(frequencies).tolist() == [axes, axes]


@layouts
def test_mixed_and_folded_turn_alike(layout):
    """One action: the frequencies of either, in the layout both know."""
    learned = mixed(3, "half_split").double()
    folded = FoldedRotary(learned.frequencies)
    x, at = vectors(2, 4, 12, 12), grid_positions(2, 3, 2)
    assert torch.equal(folded(x, at), learned(x, at))
    other = MixedRotary(12, 2, layout=layout, axes=3).double()
    other.load_state_dict(learned.state_dict())
    order = torch.arange(12).view(2, 6).T.flatten() if layout == "interleaved" else torch.arange(12)
    torch.testing.assert_close(other(x[..., order], at), learned(x, at)[..., order], atol=1e-12, rtol=0)


@layouts
def test_gradients_of_learned_frequencies(layout):
    encoding = MixedRotary(4, 2, layout=layout, axes=2, base=10.0).double()
    query, key, at = vectors(4, 3, 4).requires_grad_(), vectors(2, 3, 4, seed=1).requires_grad_(), vectors(3, 2, seed=2)
    start = encoding.frequencies.detach().clone().requires_grad_()

    def turned(query: Tensor, key: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(_Rotate(encoding), {"encoding.frequencies": frequencies}, (query, key, at))

    assert torch.autograd.gradcheck(turned, (query, key, start))
    assert torch.autograd.gradgradcheck(turned, (query, key, start))


class _Rotate(torch.nn.Module):
    def __init__(self, encoding: RotationEncoding) -> None:
        super().__init__()
        self.encoding = encoding

    def forward(self, query: Tensor, key: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoding.rotate(query, key, at)


class _Counted(MixedRotary):
    made = 0

    def angles(self, coordinates: Tensor, x: Tensor) -> Tensor:
        type(self).made += 1
        return super().angles(coordinates, x)


@pytest.mark.parametrize("make", [lambda: mixed(1, "half_split"), lambda: XPos(12, layout="half_split")])
def test_a_compiled_encoding_is_eager(make):
    encoding, query, key = make().double(), vectors(4, 5, 12), vectors(2, 5, 12, seed=1)
    compiled = torch.compile(encoding.rotate, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(query, key), encoding.rotate(query, key), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("queries", "keys"), [(2, 2), (4, 2), (6, 2), (4, 4), (6, 4)])
@pytest.mark.parametrize("shape", [(5,), (3, 1, 5)])
def test_angles_per_head_are_made_once_for_queries_and_keys(queries, keys, shape):
    encoding = _Counted(8, 2, layout="half_split", axes=1, base=10.0).double()
    query, key, at = vectors(3, queries, 5, 8), vectors(3, keys, 5, 8, seed=1), vectors(*shape, seed=2)
    expected = encoding(query, at), encoding(key, at)
    _Counted.made = 0
    got = encoding.rotate(query, key, at)
    assert _Counted.made == 1
    for ours, golden in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, golden, atol=1e-14, rtol=0)


def test_query_heads_may_differ_in_their_positions():
    encoding = MixedRotary(8, 2, layout="half_split", axes=1).double()
    x, at = vectors(2, 5, 8), vectors(2, 5, seed=1)
    for turned in encoding.rotate(x, x, at):
        for head in range(2):
            torch.testing.assert_close(turned[head], encoding(x, at[head])[head], atol=1e-14, rtol=0)


ROTATIONS = {name: case for name, case in CASES.items() if isinstance(case.build(), PairRotation)}


@pytest.mark.parametrize("case", ROTATIONS.values(), ids=ROTATIONS.keys())
def test_4096_positions_stay_4096_in_bfloat16(case):
    """Module, queries and autocast all in half precision: what turns them is of float32, and all angles differ."""
    encoding = case.build().to(torch.bfloat16)
    sides = {1: (4096,), 2: (64, 64), 3: (16, 16, 16), 4: (8, 8, 8, 8)}[encoding.axes]
    at = grid_positions(*sides)
    at = at[:, 0] if encoding.axes == 1 else at
    x = torch.ones(2, 4096, encoding.head_width, dtype=torch.bfloat16)
    coordinates = encoding.coordinates(at, x.shape[:-1], x)
    made = encoding.angles(coordinates, x.to(coordinates.dtype))
    assert made.dtype == torch.float32
    assert torch.unique(made.reshape(-1, *made.shape[-2:])[0], dim=0).size(0) == 4096
    with torch.autocast("cpu", torch.bfloat16):
        turned = encoding(x, at)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, encoding(x.float(), at).bfloat16())


@layouts
@given(m=st.integers(-20_000, 20_000), n=st.integers(-20_000, 20_000), shift=st.integers(-15_000, 15_000))
def test_xpos_scores_know_differences_alone(layout, m, n, shift):
    encoding = XPos(8, layout=layout)
    query, key = vectors(1, 1, 8), vectors(1, 1, 8, seed=1)

    def score(here: int, there: int) -> float:
        q, _ = encoding.rotate(query, key, torch.tensor([here]))
        _, k = encoding.rotate(query, key, torch.tensor([there]))
        return (q @ k.mT).item()

    size = query.norm().item() * key.norm().item() * max(1.0, (1 + 1 / 0.4) ** ((n - m) / 512))
    assert score(m, n) == pytest.approx(score(m + shift, n + shift), abs=1e-9 * size)


def test_xpos_by_the_formula():
    """ζ_i = (i/(d/2) + γ)/(1 + γ); pair i of a score is Re(q̄k e^{i(n−m)θ_i}) ζ_i^((m−n)/512), here in plain Python."""
    query, key, m, n = vectors(8), vectors(8, seed=1), 700, 45
    golden = 0.0
    for i in range(4):
        zeta, theta = (i / 4 + 0.4) / 1.4, 10_000.0 ** (-i / 4)
        q, k = (complex(v[i], v[i + 4]) for v in (query, key))
        turned = q.conjugate() * k * complex(math.cos((n - m) * theta), math.sin((n - m) * theta))
        golden += turned.real * zeta ** ((m - n) / 512)
    both = torch.stack([query, key]).view(2, 1, 8)
    q, _ = XPos(8, layout="half_split").rotate(both[:1], both[:1], torch.tensor([m]))
    _, k = XPos(8, layout="half_split").rotate(both[1:], both[1:], torch.tensor([n]))
    assert (q * k).sum().item() == pytest.approx(golden, rel=1e-12)


@pytest.mark.parametrize(("gamma", "scale_base"), [(0.4, 512), (0.1, 64), (2.0, 2048)])
def test_xpos_is_finite_and_normal_to_the_stated_range(gamma, scale_base):
    """In float32; a tenth beyond it no more. Scores near the end are those of float64."""
    encoding = XPos(8, layout="half_split", gamma=gamma, scale_base=scale_base)
    end = int(87 * scale_base / math.log(1 + 1 / gamma))
    for at in (-end, end):
        scale = encoding.scale(torch.tensor([[float(at)]]))
        assert scale.isfinite().all()
        assert scale.min() >= np.finfo(np.float32).tiny
    assert not encoding.scale(torch.tensor([[-1.1 * end]])).isfinite().all()
    x, near = vectors(1, 6, 8), torch.arange(end - 6, end)
    golden, got = (q @ k.mT for q, k in (encoding.rotate(v, v, near) for v in (x, x.float())))
    torch.testing.assert_close(got.double(), golden, atol=0.05, rtol=0.01)  # angles of 10⁴ in float32


def test_xpos_has_the_range_its_docstring_says():
    for at, dtype in ((35_000, torch.float32), (4_400, torch.float16), (35_000, torch.bfloat16)):
        x = torch.ones(1, 1, 8, dtype=dtype)
        for turned in XPos(8, layout="half_split").rotate(x, x, torch.tensor([at])):
            assert turned.isfinite().all()


BASES = {
    "rotary": lambda base: RotaryEncoding(8, layout="half_split", base=base),
    "axial": lambda base: AxialRotary(8, layout="half_split", base=base),
    "mixed": lambda base: MixedRotary(8, 2, layout="half_split", base=base),
    "xpos": lambda base: XPos(8, layout="half_split", base=base),
}
REFUSED = {
    **{f"{name}, base {b}": (lambda m=m, b=b: m(b), f"base: expected a number > 0, got {b}; ") for name, m in BASES.items() for b in (-1.0, 0.0, math.inf, math.nan)},
    **{
        f"{kind.__name__}, odd head": (lambda kind=kind, a=a: kind(7, *a, layout="half_split"), "head_width: expected an even number, got 7; ")
        for kind, a in ((RotaryEncoding, ()), (AxialRotary, ()), (MixedRotary, (2,)), (XPos, ()))
    },
    **{
        f"{kind.__name__}, layout": (
            lambda kind=kind, a=a: kind(8, *a, layout="halves"),
            "layout: expected one of ('half_split', 'interleaved'), got 'halves'; ",
        )
        for kind, a in ((RotaryEncoding, ()), (AxialRotary, ()), (MixedRotary, (2,)), (XPos, ()))
    },
    **{
        f"rotary_width {w}": (
            lambda w=w: RotaryEncoding(8, layout="half_split", rotary_width=w),
            f"rotary_width: expected an even number ≤ head_width = 8, got {w}; ",
        )
        for w in (10, 3, 0, -2, 4.0)
    },
    "axes that do not divide": (
        lambda: AxialRotary(8, layout="half_split", axes=3),
        "axes: expected a divisor of head_width/2 = 4, got 3; ",
    ),
    "no axes": (lambda: AxialRotary(8, layout="half_split", axes=0), "axes: expected at least 1, got 0; "),
    "mixed, no axes": (
        lambda: MixedRotary(8, 2, layout="half_split", axes=0),
        "axes: expected an integer from 1, got 0; ",
    ),
    "mixed, no heads": (
        lambda: MixedRotary(8, 0, layout="half_split"),
        "num_heads: expected an integer from 1, got 0; ",
    ),
    "xpos, gamma": (lambda: XPos(8, layout="half_split", gamma=0.0), "gamma: expected a number > 0, got 0.0; "),
    "xpos, scale_base": (
        lambda: XPos(8, layout="half_split", scale_base=-1),
        "scale_base: expected a number > 0, got -1; ",
    ),
    "convert, source": (
        lambda: convert_layout(torch.ones(8), head_width=8, source="x", target="half_split"),
        "source: expected one of ('half_split', 'interleaved'), got 'x'; ",
    ),
    "convert, target": (
        lambda: convert_layout(torch.ones(8), head_width=8, source="half_split", target="x"),
        "target: expected one of ('half_split', 'interleaved'), got 'x'; ",
    ),
    "convert, rows": (
        lambda: convert_layout(torch.ones(12, 3), head_width=8, source="half_split", target="interleaved"),
        "features: expected a multiple of 8 rows, got shape (12, 3); ",
    ),
    "convert, scalar": (
        lambda: convert_layout(torch.ones(()), head_width=8, source="half_split", target="interleaved"),
        "features: expected a multiple of 8 rows, got shape (); ",
    ),
    "convert, head": (
        lambda: convert_layout(torch.ones(9), head_width=9, source="half_split", target="interleaved"),
        "head_width: expected an even number, got 9; ",
    ),
    "convert, rotary_width": (
        lambda: convert_layout(torch.ones(8), head_width=8, source="half_split", target="interleaved", rotary_width=5),
        "rotary_width: expected an even number ≤ head_width = 8, got 5; ",
    ),
    "other heads": (
        lambda: MixedRotary(8, 2, layout="half_split")(torch.ones(3, 4, 8), grid_positions(2, 2)),
        "x: expected a multiple of 2 heads, got shape (3, 4, 8); ",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match="^" + re.escape(message) + r"\w+"):
        make()
