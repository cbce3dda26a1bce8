"""The Transformer: equal starts, masks, padding and packing, causality, gradients at every depth."""

from __future__ import annotations

import copy

import pytest
import torch

from liegroup_attn.errors import ShapeError
from liegroup_attn.manifolds import ManifoldParameter
from liegroup_attn.nn import LieAttention, Transformer, scale_time
from liegroup_attn.nn.recipe import ROPE

C, H, N = 16, 4, 8
RECIPES = {
    "softmax": None,
    "exp": {"module": "LieAttention", "time": 2.0},
    "long": {"module": "LieAttention", "time": 8.0},
    "first_hop": {"module": "LieAttention", "first_hop": True, "time": 0.5},
    "resolvent": {"module": "LieAttention", "first_hop": True, "clock": "ExponentialClock", "time": 2.0},
    "softplus": {"module": "LieAttention", "rate_fn": "softplus"},
}
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
lie_recipes = pytest.mark.parametrize(
    "recipe", [r for r in RECIPES.values() if r], ids=[n for n in RECIPES if RECIPES[n]]
)


def build(recipe, depth=2, **options) -> Transformer:
    torch.manual_seed(1)
    model = Transformer(C, depth, H, recipe, **options).double()
    for layer in model.modules():
        if isinstance(layer, LieAttention):
            torch.nn.init.normal_(layer.flow.rate_weight, 0, 0.5)
    return model


def tokens(batch=2, n=N):
    return torch.randn(batch, n, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@lie_recipes
@pytest.mark.parametrize("depth", [1, 6])
def test_the_same_seed_gives_the_parameters_of_the_softmax_model(recipe, depth):
    models, states = [], []
    for one in (None, recipe):
        torch.manual_seed(3)
        models.append(dict(Transformer(C, depth, H, one).named_parameters()))
        states.append(torch.get_rng_state())
    softmax, lie = models
    own = {f"blocks.{i}.attention.flow.{name}" for i in range(depth) for name in ("time", "rate_weight", "rate_bias")}
    assert set(lie) - set(softmax) == own
    assert all(torch.equal(lie[name], value) for name, value in softmax.items())
    assert torch.equal(*states)
    assert sum(lie[name].numel() for name in own) == depth * (H + H * C + H)


def test_first_hop_for_no_time_is_the_softmax_model():
    lie, softmax = build(RECIPES["first_hop"], 3, is_causal=True), build(None, 3, is_causal=True)
    softmax.load_state_dict(lie.state_dict(), strict=False)
    assert scale_time(lie, 0.0) == 3
    torch.testing.assert_close(lie(tokens()), softmax(tokens()), atol=1e-10, rtol=0)


@recipes
@pytest.mark.parametrize("encoding", [ROPE, ROPE | {"layout": "interleaved"}, None])
def test_every_parameter_of_every_block_gets_a_gradient(recipe, encoding):
    model = build(recipe, 3, encoding=encoding, is_causal=True)
    model(tokens())[..., 0].square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [
        n for n, p in model.named_parameters() if p.grad.abs().max() == 0 and n not in ("norm.weight", "norm.bias")
    ] == []


@recipes
def test_training_and_evaluation_agree(recipe):
    model, x = build(recipe), tokens()
    expected = model.train()(x)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(model.eval()(x), expected, atol=1e-10, rtol=0)


@recipes
def test_causal_outputs_do_not_see_the_future(recipe):
    model, x = build(recipe, 3, is_causal=True), tokens()
    other = x.clone()
    other[:, 5:] = 7.0
    torch.testing.assert_close(
        model(other)[:, :5], model(x)[:, :5], atol=1e-6 if recipe == RECIPES["softplus"] else 1e-10, rtol=0
    )
    assert (model(other)[:, 5:] - model(x)[:, 5:]).abs().min() > 0


@recipes
@pytest.mark.parametrize("depth", [1, 3])
def test_padding_does_not_matter(recipe, depth):
    model, x, length = build(recipe, depth), tokens(), 5
    keep = (torch.arange(N) < length)[None, None, None, :]  # (1, 1, 1, N), True = takes part
    alone = model(x[:, :length])
    noise = x.clone()
    noise[:, length:] = 9.0
    close = {"atol": 1e-6 if recipe == RECIPES["softplus"] else 1e-10, "rtol": 0}
    floats = torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -torch.inf)
    for mask in (keep, keep.expand(2, H, N, N), floats):
        torch.testing.assert_close(model(noise, mask)[:, :length], alone, **close)
    assert not torch.allclose(model(noise)[:, :length], alone, atol=1e-3)


@recipes
def test_packed_sequences_are_separate_ones(recipe):
    model, x = build(recipe), tokens()
    document = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4])
    out = model(x, document[:, None] == document, positions)
    alone = torch.cat([model(x[:, :3]), model(x[:, 3:])], 1)
    torch.testing.assert_close(out, alone, atol=1e-6 if recipe == RECIPES["softplus"] else 1e-10, rtol=0)


@lie_recipes
def test_a_causal_mask_is_is_causal(recipe):
    recipe = {**recipe, "tol": 1e-10}  # the methods differ
    causal, full = build(recipe, is_causal=True), build(recipe)
    mask = torch.ones(N, N, dtype=torch.bool).tril()
    torch.testing.assert_close(full(tokens(), mask), causal(tokens()), atol=1e-6, rtol=0)


@lie_recipes
def test_tokens_without_targets_stay_finite(recipe):
    mask = torch.ones(2, 1, 1, N, dtype=torch.bool)
    mask[1] = False  # an item that is all padding
    model, x = build(recipe), tokens()
    out = model(x, mask)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:1], model(x[:1], mask[:1]), atol=1e-6, rtol=0)


@recipes
def test_positions_matter_only_relatively(recipe):
    model, bare = build(recipe), build(recipe, encoding=None)
    x, shifted = tokens(), torch.arange(N) + 100
    close = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(model(x, None, shifted), model(x), **close)
    assert not torch.allclose(model(x, None, torch.arange(N) * 2), model(x), atol=1e-4)
    torch.testing.assert_close(bare(x, None, torch.arange(N) * 2), bare(x), **close)


def test_dropout_acts_in_training_only():
    model, plain = build(RECIPES["exp"], dropout=0.3), build(RECIPES["exp"])
    assert torch.equal(model.eval()(tokens()), plain(tokens()))
    assert not torch.allclose(model.train()(tokens()), plain(tokens()), atol=1e-3)
    assert [block.attention.dropout for block in model.blocks] == [0.3, 0.3]


def test_copies_keep_manifolds_at_every_depth():
    model = build(RECIPES["exp"], 3)
    new = copy.deepcopy(model)
    times = [block.attention.flow.time for block in new.blocks]
    assert all(isinstance(time, ManifoldParameter) and time.manifold.upper == 4.0 for time in times)
    assert len({id(time) for time in times}) == 3
    assert torch.equal(new(tokens()), model(tokens()))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((C, 1, 3), {}, ShapeError, r"num_heads: expected a divisor of width=16, got 3; change"),
        ((C, 1, 0), {}, ShapeError, r"num_heads: expected a divisor of width=16, got 0; change"),
        ((C, 1, -4), {}, ShapeError, r"num_heads: expected a divisor of width=16, got -4; change"),
        ((C, 1, C), {}, ShapeError, r"head_width: expected an even number, got 1; rotations act on pairs, choose"),
        (
            (C, 1, H),
            {"encoding": {"module": "RotaryEncoding", "layout": "neox"}},
            ValueError,
            r"layout: expected one of .*, got 'neox'; it must",
        ),
        ((C, 1, H, {"module": "X"}), {}, ValueError, r"attention.module: expected .*, got 'X'; name one of them"),
        ((C, 1, H), {"dropout": 1.5}, ValueError, r"dropout: expected 0 ≤ dropout < 1, got 1.5; choose"),
    ],
)
def test_bad_settings(arguments, options, error, match):
    with pytest.raises(error, match=match):
        Transformer(*arguments, **options)
    if "head_width" in match:  # without positions any width will do
        Transformer(*arguments, **options, encoding=None)


def test_bad_inputs():
    model = build(RECIPES["exp"])
    with pytest.raises(ShapeError, match=r"x: expected at least 3 dimensions, got shape \(8, 16\)"):
        model(tokens()[0])
    with pytest.raises(ValueError, match=r"attn_mask: expected a shape broadcastable to \(2, 4, 8, 8\)"):
        model(tokens(), torch.ones(5, 5, dtype=torch.bool))
