"""Axioms over the table of encodings: the relative law, orthogonality, shifts, offsets, no state, gradients, both mixings."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from covering import covering
from positional_cases import CASES, C, D, H, N
from torch.utils._python_dispatch import TorchDispatchMode

from liegroup_attn import ExponentialClock
from liegroup_attn.errors import ShapeError
from liegroup_attn.nn import LieAttention, RelativeRates, SoftmaxAttention, Transformer, build_encoding
from liegroup_attn.positional import AbsoluteEncoding, BiasEncoding, RotationEncoding

ENCODINGS = {name: case.build() for name, case in CASES.items()}


def contextual(encoding) -> bool:
    """What came before is part of what a bias says."""
    return isinstance(encoding, BiasEncoding) and encoding.contextual


def over(applies):
    """Run a law over the encodings that it says something about."""
    names = [name for name, encoding in ENCODINGS.items() if applies(encoding)]
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)


every = over(lambda encoding: True)
rotations = over(lambda encoding: isinstance(encoding, RotationEncoding))
biases = over(lambda encoding: isinstance(encoding, BiasEncoding))
scored = over(lambda encoding: not isinstance(encoding, AbsoluteEncoding))  # the others act before the first layer


def built(case):
    """In float64, every parameter away from its start."""
    torch.manual_seed(1)
    encoding = case.build().double()
    with torch.no_grad():
        for parameter in encoding.parameters():
            if not hasattr(parameter, "manifold"):
                parameter += 0.3 * torch.randn_like(parameter)
    return encoding


def places(encoding, start: int = 0, tokens: int = N) -> torch.Tensor:
    """Different positions on each axis, (N,) or (N, P)."""
    along = torch.arange(start, start + tokens)
    return along if encoding.axes == 1 else torch.stack([along * (p + 1) % 7 + start for p in range(encoding.axes)], -1)


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def applied(encoding, positions, tokens: slice = slice(None), dtype: torch.dtype = torch.float64):
    """What the encoding does to fixed inputs at some of N tokens."""
    if isinstance(encoding, AbsoluteEncoding):
        return encoding(vectors(2, N, C).to(dtype)[:, tokens], positions)
    query, key = (vectors(2, H, N, D, seed=seed).to(dtype)[:, :, tokens] for seed in (0, 1))
    if isinstance(encoding, RotationEncoding):
        return torch.stack(encoding.rotate(query, key, positions))
    return encoding(vectors(2, N, C, seed=2).to(dtype)[:, tokens], query, key, positions).expand(
        2, H, *[query.size(-2)] * 2
    )


@rotations
def test_the_relative_law_holds_where_it_is_claimed(case):
    encoding = built(case)
    assert encoding.relative == case.relative
    x, y = places(encoding), places(encoding, 3).flip(0)
    eye = torch.eye(D, dtype=torch.float64).unsqueeze(1).unsqueeze(1).expand(D, H, N, D)
    # Columns of R(x) on queries and of its twin on keys; R(0) on the query's side leaves keys the difference.
    queries, _ = encoding.rotate(eye, eye, x)
    _, keys = encoding.rotate(eye, eye, y)
    _, differences = encoding.rotate(eye, eye, y - x)
    origin, _ = encoding.rotate(eye, eye, torch.zeros_like(x))
    products = torch.einsum("ihnd,jhnd->hnij", queries, keys)
    residual = (products - torch.einsum("ihnd,jhnd->hnij", origin, differences)).abs().max()
    if case.relative:
        assert residual <= 1e-10
    else:
        assert residual > 1e-3


@rotations
def test_what_acts_is_orthogonal_where_it_is_claimed(case):
    encoding = built(case)
    matrix = encoding.matrix(places(encoding))
    eye = torch.eye(D, dtype=torch.float64)
    residual = (matrix @ matrix.mT - eye).abs().max()
    assert residual <= 1e-12 if case.orthogonal else residual > 1e-6
    at_origin = encoding.matrix(torch.zeros_like(places(encoding)))
    torch.testing.assert_close(at_origin, eye.expand_as(at_origin), atol=1e-12, rtol=0)


@rotations
def test_the_matrix_is_what_acts(case):
    encoding, x = built(case), vectors(H, N, D)
    positions = places(encoding, 5)
    expected = (
        torch.einsum("...nij,hnj->hni", encoding.matrix(positions), x)
        if encoding.num_heads is None
        else (torch.einsum("hnij,hnj->hni", encoding.matrix(positions), x))
    )
    torch.testing.assert_close(encoding(x, positions), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shift", [1, 37, 1000])
@scored
def test_scores_are_shift_invariant_where_the_relative_law_is_claimed(case, shift):
    encoding = built(case)
    start, moved = places(encoding), places(encoding) + shift
    if isinstance(encoding, RotationEncoding):
        scores = [q @ k.mT for q, k in (applied(encoding, at) for at in (start, moved))]
    else:
        scores = [applied(encoding, at) for at in (start, moved)]
    difference = (scores[0] - scores[1]).abs().max()
    assert difference <= 1e-9 if case.relative else difference > 1e-6


@over(lambda encoding: not contextual(encoding))
def test_an_offset_is_a_slice_of_a_longer_run(case):
    encoding = built(case)
    whole, part = applied(encoding, places(encoding)), applied(encoding, places(encoding)[4:9], slice(4, 9))
    whole = whole[..., 4:9, 4:9] if isinstance(encoding, BiasEncoding) else whole[..., 4:9, :]
    torch.testing.assert_close(part, whole, atol=1e-12, rtol=0)


@every
def test_default_positions_count_from_0(case):
    encoding = built(case)
    if encoding.axes > 1:
        with pytest.raises(ValueError, match=r"positions: expected \(..., N, \d\) for .*, got None; give them"):
            applied(encoding, None)
    else:
        torch.testing.assert_close(applied(encoding, None), applied(encoding, torch.arange(N)), atol=0, rtol=0)


@every
def test_positions_may_differ_by_item(case):
    encoding = built(case)
    first, second = places(encoding), places(encoding, 4)
    heads = 0 if isinstance(encoding, AbsoluteEncoding) else 1
    both = torch.stack([first, second])
    both = both if not heads else both.unsqueeze(1)
    got = applied(encoding, both)
    batch = 1 if isinstance(encoding, RotationEncoding) else 0
    for item, at in enumerate((first, second)):
        torch.testing.assert_close(
            got.select(batch, item), applied(encoding, at).select(batch, item), atol=1e-12, rtol=0
        )


@every
def test_nothing_is_kept_between_calls(case):
    encoding = built(case)
    before = applied(encoding, places(encoding))
    state = {name: tensor.clone() for name, tensor in encoding.state_dict().items()}
    applied(encoding, places(encoding, 20))
    assert torch.equal(applied(encoding, places(encoding)), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoding.state_dict().items())
    assert torch.equal(applied(copy.deepcopy(encoding), places(encoding)), before)


@every
def test_half_precision_modules_keep_positions_apart(case):
    """As after .to(bf16) or bf16-true: parameters are rounded, positions are not."""
    half = built(case).to(torch.bfloat16)
    wide = copy.deepcopy(half).double()
    far = 40 if isinstance(half, AbsoluteEncoding) and not half.fractional else 4000
    at = places(half, far)
    got, golden = applied(half, at), applied(wide, at)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, golden, atol=1e-9, rtol=0)


class TF32(TorchDispatchMode):
    """Matrix products as a GPU makes them with TF32: of float32 inputs ten bits of the mantissa are left."""

    products = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Its own products are not seen here.
        assert func._schema.name != "aten::linalg_matrix_exp" or args[0].dtype == torch.float64
        if func._schema.name in self.products:
            args = tuple(self.cut(x) if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x for x in args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def cut(x):
        return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def test_what_stands_for_tf32_merges_positions_in_a_matmul():
    at = torch.tensor([[4097.0], [4096.0]])
    with TF32():
        assert torch.equal(*(at @ torch.ones(1, 1)))


@every
def test_tf32_keeps_positions_apart(case):
    encoding = built(case)
    far = 40 if isinstance(encoding, AbsoluteEncoding) and not encoding.fractional else 4000
    at = places(encoding, far)
    golden = applied(encoding, at)
    with TF32():
        got = applied(encoding.float(), at, dtype=torch.float32)
    torch.testing.assert_close(got.double(), golden, atol=0.03, rtol=0.01)


@pytest.mark.parametrize("kind", [SoftmaxAttention, LieAttention])
@over(lambda encoding: list(encoding.parameters()))
def test_every_parameter_gets_a_gradient(case, kind):
    """From the start, and through a layer: what a softmax does not see is no parameter."""
    encoding = case.build()
    x = vectors(2, N, C).float()
    if isinstance(encoding, AbsoluteEncoding):
        got = encoding(x, places(encoding))
    else:
        got = kind(C, H, is_causal=True, encoding=encoding)(x, positions=places(encoding))
    (got * vectors(*got.shape, seed=3)).sum().backward()
    for name, parameter in encoding.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-9, name


@pytest.mark.parametrize("wrong", ["half", "bool", "shape"])
@every
def test_bad_positions(case, wrong):
    encoding = built(case)
    at = places(encoding)
    bad = {"half": at.to(torch.bfloat16), "bool": at.bool(), "shape": at[:-1]}[wrong]
    with pytest.raises(ValueError, match=r"^positions: expected .*, got .*; \w+"):
        applied(encoding, bad)


@pytest.mark.parametrize("where", ["fraction", "negative"])
@every
def test_positions_that_mean_nothing_are_refused(case, where):
    encoding = built(case)
    at = places(encoding) + 0.5 if where == "fraction" else places(encoding) - 3
    meant = encoding.fractional if where == "fraction" else encoding.negative
    if meant:
        assert applied(encoding, at).isfinite().all()
    else:
        with pytest.raises(ValueError, match=r"^positions: expected .* for .*, got .*; \w+"):
            applied(encoding, at)


MIXINGS = {
    "softmax": (SoftmaxAttention, {}),
    "exp": (LieAttention, {"time": 1.5}),
    "first hop + exponential": (LieAttention, {"first_hop": True, "clock": ExponentialClock()}),
}


@pytest.mark.parametrize(("kind", "options"), MIXINGS.values(), ids=MIXINGS.keys())
@scored
def test_any_encoding_goes_under_any_mixing(case, kind, options):
    encoding = case.build()
    layer = kind(C, H, is_causal=True, encoding=encoding, **options)
    x, at = vectors(2, N, C).float(), places(encoding)
    matrix = layer.mixing_matrix(x, positions=at)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, H, N), atol=1e-5, rtol=0)
    assert matrix.triu(1).abs().max() == 0
    bare = kind(C, H, is_causal=True, **options)
    bare.load_state_dict(layer.state_dict(), strict=False)
    assert (bare.mixing_matrix(x) - matrix).abs().max() > 1e-4


ADDED = {
    "plus": (LieAttention, {"plus": lambda: RelativeRates(H, 4, is_causal=True), "tol": 1e-13}),
    "plus, ordered": (
        LieAttention,
        {"plus": lambda: RelativeRates(H, 4, is_causal=True), "ordered": True, "tol": 1e-13},
    ),
    "as rates": (LieAttention, {"bias_as": "rates", "tol": 1e-13}),
}


PADDED = [
    (name, mixing, side)
    for name, mixing, side in itertools.product(ENCODINGS, MIXINGS | ADDED, ("left", "right"))
    if isinstance(ENCODINGS[name], BiasEncoding)
    or (isinstance(ENCODINGS[name], RotationEncoding) and mixing != "as rates")
]


@pytest.mark.parametrize(("name", "mixing", "side"), covering(PADDED))
def test_padding_beside_a_causal_mask_says_nothing(name, mixing, side):
    encoding, (kind, options) = CASES[name].build(), (MIXINGS | ADDED)[mixing]
    torch.manual_seed(2)
    options = {name: value() if name == "plus" else value for name, value in options.items()}
    layer = kind(C, H, is_causal=True, encoding=encoding, **options).double()
    x, junk, at = vectors(2, N, C), vectors(2, 3, C, seed=3).requires_grad_(), places(encoding)
    none = torch.zeros_like(at[:3])
    parts = [(junk, none, False), (x, at, True)]
    parts = parts if side == "left" else parts[::-1]
    tokens, positions = (torch.cat([part[i] for part in parts], -2 if i == 0 else 0) for i in (0, 1))
    real = torch.cat([torch.full((part[0].size(1),), part[2]) for part in parts])
    mixed = layer(tokens, real[None, None, None], positions)[:, real]
    torch.testing.assert_close(mixed, layer(x, positions=at), atol=1e-9, rtol=0)
    mixed.square().sum().backward()
    assert junk.grad.abs().max() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@biases
def test_a_bias_may_stand_for_rates(case):
    layer = LieAttention(C, H, is_causal=True, encoding=case.build(), bias_as="rates")
    x = vectors(2, N, C).float()
    matrix = layer.mixing_matrix(x)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, H, N), atol=1e-5, rtol=0)
    assert matrix.triu(1).abs().max() == 0
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@every
def test_a_recipe_says_it(case):
    torch.manual_seed(4)
    own = case.build()
    torch.manual_seed(4)
    named = build_encoding(case.recipe, C, H, is_causal=True)
    assert type(named) is type(own)
    assert repr(named) == repr(own)
    for theirs, ours in zip(named.parameters(), own.parameters(), strict=True):
        assert theirs.shape == ours.shape


@over(lambda encoding: encoding.axes == 1 and not contextual(encoding))  # positions that a cache can count
@torch.no_grad()
def test_a_transformer_decodes_as_it_reads(case):
    recipe = {"module": "LieAttention", "first_hop": True}
    model = Transformer(C, 2, H, recipe, is_causal=True, encoding=case.recipe).double()
    x = vectors(1, 6, C)
    whole = model(x)
    cache = model.new_cache(1, 6)
    parts = [model(x[:, :4], cache=cache), model(x[:, 4:5], cache=cache), model(x[:, 5:], cache=cache)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-9, rtol=0)


@every
def test_no_tokens(case):
    encoding = built(case)
    none = places(encoding, tokens=0)
    if isinstance(encoding, AbsoluteEncoding):
        assert encoding(vectors(1, 0, C), none).shape == (1, 0, C)
    elif isinstance(encoding, RotationEncoding):
        assert encoding.rotate(*vectors(2, 1, H, 0, D), none)[1].shape == (1, H, 0, D)
        assert encoding(vectors(1, H, 0, D), none).shape == (1, H, 0, D)
    else:
        query = vectors(1, H, 0, D)
        assert encoding(vectors(1, 0, C), query, query, none).numel() == 0


@rotations
def test_queries_and_keys_are_of_the_same_tokens(case):
    encoding = built(case)
    with pytest.raises(ShapeError, match=r"key: expected the query's 2 tokens, got 3"):
        encoding.rotate(vectors(1, H, 2, D), vectors(1, H, 3, D), places(encoding, tokens=2))
