"""Decoding with a cache: equal to computing all anew, for tokens and chunks, after crops and reorderings."""

import copy

import pytest
import torch
from torch import nn

from liegroup_attn import CausalSweep, ErlangClock, ExponentialClock, MatrixExp, Uniformization, rates
from liegroup_attn.errors import CacheError, GeneratorError, MaskError
from liegroup_attn.nn import LieAttention, SoftmaxAttention, Transformer, sample, scale_time
from liegroup_attn.positional import RotaryEncoding

B, N, C, H = 2, 11, 32, 4  # a head width whose scale 1/√8 is rounded

LAYERS = {
    "softmax": (SoftmaxAttention, {}),
    "fixed": (LieAttention, {}),
    "fixed, long": (LieAttention, {"time": 4.0, "max_time": 8.0}),
    "first hop + fixed": (LieAttention, {"first_hop": True}),
    "rates of 1": (LieAttention, {"learn_rates": False, "learn_time": False}),
    "exponential": (LieAttention, {"clock": ExponentialClock()}),
    "first hop + exponential": (LieAttention, {"clock": ExponentialClock(), "first_hop": True, "max_time": 50.0}),
    "erlang": (LieAttention, {"clock": ErlangClock(3)}),
    "first hop + erlang": (LieAttention, {"clock": ErlangClock(2), "first_hop": True}),
    "own sweep": (LieAttention, {"method": CausalSweep(max_terms=3, block_size=4)}),
    "own hops": (LieAttention, {"method": Uniformization(tol=1e-2, max_terms=9)}),
    "exact": (LieAttention, {"method": MatrixExp(), "first_hop": True}),
}
over_layers = pytest.mark.parametrize("name", LAYERS)


def build(name, dtype=torch.float32, **options):
    kind, own = LAYERS[name]
    layer = kind(C, H, is_causal=True, encoding=RotaryEncoding(C // H, layout="half_split"), **own, **options).to(dtype)
    for parameter in layer.parameters():  # rates that differ from token to token
        if parameter.shape == (H, C):
            nn.init.normal_(parameter)
    return layer.eval()


def chunks(x, sizes):
    return x.split(list(sizes), 1)


def decode(layer, x, sizes, cache=None):
    cache = layer.new_cache(len(x), x.size(1), dtype=x.dtype) if cache is None else cache
    with torch.no_grad():
        return torch.cat([layer(part, cache=cache) for part in chunks(x, sizes)], 1)


@over_layers
@pytest.mark.parametrize("sizes", [(1,) * N, (N,), (4, 1, 1, 5), (1, 10)], ids=str)
@pytest.mark.parametrize("kv_heads", [H, 2])
def test_decoding_equals_recomputing(name, sizes, kv_heads):
    layer, x = build(name, num_kv_heads=kv_heads), torch.randn(B, N, C)
    torch.testing.assert_close(decode(layer, x, sizes), layer(x).detach(), atol=1e-5, rtol=0)


@over_layers
def test_decoding_equals_recomputing_in_float64(name):
    layer, x = build(name, torch.float64), torch.randn(B, N, C, dtype=torch.float64)
    torch.testing.assert_close(decode(layer, x, (3, 1, 7)), layer(x).detach(), atol=1e-12, rtol=0)


@over_layers
def test_decoding_in_half_precision_is_as_exact_as_recomputing(name):
    wide, x = build(name, torch.float64), torch.randn(B, N, C, dtype=torch.float64).bfloat16()
    layer = copy.deepcopy(wide).bfloat16()
    golden = wide(x.double())
    error = (layer(x) - golden).abs().max()
    assert (decode(layer, x, (1,) * N) - golden).abs().max() <= 2 * error


@over_layers
def test_long_contexts_cross_the_blocks_of_the_sweep(name):
    layer, x = build(name), torch.randn(1, 300, C)
    torch.testing.assert_close(decode(layer, x, (140, 1, 159)), layer(x).detach(), atol=1e-5, rtol=0)


@over_layers
def test_a_crop_forgets(name):
    layer, x = build(name), torch.randn(B, N, C)
    cache = layer.new_cache(B, N)
    decode(layer, torch.cat([x[:, :4], torch.randn(B, 5, C)], 1), (4, 5), cache)
    cache.crop(4)
    rest = decode(layer, x[:, 4:], (1, N - 5), cache)
    torch.testing.assert_close(rest, layer(x)[:, 4:].detach(), atol=1e-5, rtol=0)


@over_layers
def test_a_reordered_cache_belongs_to_other_beams(name):
    layer, x, beams = build(name), torch.randn(3, N, C), [2, 0, 0, 1]
    cache = layer.new_cache(3, N)
    decode(layer, x[:, :6], (6,), cache)
    cache.reorder(torch.tensor(beams))
    assert cache.batch_size == 4
    both = torch.cat([x[beams, :6], torch.randn(4, N - 6, C)], 1)
    rest = decode(layer, both[:, 6:], (2, N - 8), cache)
    torch.testing.assert_close(rest, layer(both)[:, 6:].detach(), atol=1e-5, rtol=0)


@over_layers
def test_one_prompt_is_shared_by_several_continuations(name):
    layer, prompt = build(name), torch.randn(1, 6, C)
    cache = layer.new_cache(1, N)
    decode(layer, prompt, (6,), cache)
    other = copy.copy(cache)
    other.reorder([0, 0, 0])
    rest = torch.randn(3, N - 6, C)
    ours = decode(layer, rest, (N - 6,), other)
    expected = layer(torch.cat([prompt.expand(3, -1, -1), rest], 1))[:, 6:].detach()
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert (cache.batch_size, cache.length) == (1, 6)  # the copy took its own tensors


def test_copies_share_nothing():
    layer, x = build("fixed"), torch.randn(B, N, C)
    cache = layer.new_cache(B, N)
    decode(layer, x[:, :4], (4,), cache)
    twin = copy.copy(cache)
    decode(layer, torch.randn(B, 3, C), (3,), twin)
    rest = decode(layer, x[:, 4:], (1, N - 5), cache)
    torch.testing.assert_close(rest, layer(x)[:, 4:].detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["own hops", "exact", "fixed", "softmax", "exponential"])
def test_decoding_under_autocast(name):
    layer, x = build(name), torch.randn(B, N, C)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        ours = decode(layer, x, (5, 1, 5), layer.new_cache(B, N, dtype=torch.bfloat16))
        torch.testing.assert_close(ours, layer(x), atol=2e-2, rtol=0)


@pytest.mark.parametrize("name", ["own hops", "exact", "fixed", "exponential"])
def test_decoding_without_time(name):
    layer, x = build(name), torch.randn(B, N, C)
    scale_time(layer, 0.0)
    torch.testing.assert_close(decode(layer, x, (3, 8)), layer(x).detach(), atol=1e-5, rtol=0)


def test_what_a_token_costs():
    """MATHEMATICS §4: exponential as softmax; Erlang s; fixed K."""
    kept = {name: build(name).new_cache(1, 1).values.numel() for name in LAYERS}
    assert kept["exponential"] == kept["first hop + exponential"] == kept["softmax"] == C
    assert kept["erlang"] == 3 * C
    assert kept["own sweep"] == 3 * C
    assert kept["first hop + fixed"] == kept["fixed"] + C


def test_a_padded_cache_is_as_good():
    layer, x = build("exponential"), torch.randn(B, N, C)
    cache = layer.new_cache(B, 50)
    torch.testing.assert_close(decode(layer, x, (N,), cache), layer(x).detach(), atol=1e-5, rtol=0)
    assert (cache.length, cache.max_tokens) == (N, 50)


# --- what is refused ----------------------------------------------------------------------------------------------


def _used(layer, tokens, **changes):
    cache = layer.new_cache(B, 4)
    with torch.no_grad():
        layer(tokens[:, :2], cache=cache)
        return layer(**({"x": tokens[:, 2:4], "cache": cache} | changes))


X = torch.randn(B, N, C)
REFUSED = {
    "batch": (lambda la: _used(la, X, x=X[:1, :1]), CacheError, "batch of 2, got 1; reorder"),
    "full": (lambda la: _used(la, X, x=X[:, :3]), CacheError, r"max_tokens=4 tokens, got 2 \+ 3"),
    "another layer": (lambda la: _used(la, X, cache=build("softmax").new_cache(B, 4)), CacheError, "another layer"),
    "a copy's": (lambda la: _used(la, X, cache=copy.deepcopy(la).new_cache(B, 4)), CacheError, "another layer"),
    "dtype": (
        lambda la: _used(la, X, cache=la.new_cache(B, 4, dtype=torch.float64)),
        CacheError,
        "expected torch.float64 on cpu, got torch.float32",
    ),
    "mask": (lambda la: _used(la, X, attn_mask=torch.ones(2, 2).bool()), MaskError, "None beside a cache"),
    "gradient": (lambda la: la(X[:, :1], cache=la.new_cache(B, 4)), CacheError, "no_grad"),
    "no room": (lambda la: la.new_cache(B, 0), CacheError, "max_tokens ≥ 1"),
    "crop beyond": (lambda la: la.new_cache(B, 4).crop(1), CacheError, r"expected 0 … 0, got 1"),
    "crop below": (lambda la: la.new_cache(B, 4).crop(-1), CacheError, "got -1"),
    "index": (lambda la: la.new_cache(B, 4).reorder([0, 2]), CacheError, r"0 … 1, got \[0, 2\]"),
    "float index": (lambda la: la.new_cache(B, 4).reorder(torch.ones(2)), CacheError, "integers"),
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("name", ["softmax", "fixed", "exponential"])
def test_refused(why, name):
    call, error, words = REFUSED[why]
    with pytest.raises(error, match=words):
        call(build(name))


@pytest.mark.parametrize("name", ["fixed", "exponential"])
def test_another_time_wants_another_cache(name):
    layer = build(name)
    cache = layer.new_cache(B, 4)
    scale_time(layer, 2.0)
    with torch.no_grad(), pytest.raises(CacheError, match="scale_time"):
        layer(X[:, :1], cache=cache)


def test_a_refused_call_keeps_nothing():
    layer = build("fixed")
    cache = layer.new_cache(B, 4)
    decode(layer, X[:, :2], (2,), cache)
    before = copy.deepcopy((cache.keys, cache.values))
    with torch.no_grad(), pytest.raises(CacheError):
        layer(X[:, :3], cache=cache)
    assert cache.length == 2
    for kept, was in zip((cache.keys, cache.values), before, strict=True):
        assert torch.equal(kept, was)


@pytest.mark.parametrize("name", ["softmax", "fixed"])
def test_trainable_values_want_no_grad_too(name):
    """Frozen keys, trainable rest, as with adapters."""
    layer = build(name)
    layer.k_proj.requires_grad_(False)
    with pytest.raises(CacheError, match="no_grad"):
        layer(X[:, :1], cache=layer.new_cache(B, 4))


def test_layers_that_cannot_decode_say_so():
    with pytest.raises(CacheError, match="is_causal=True"):
        LieAttention(C, H).new_cache(1, 4)
    with pytest.raises(CacheError, match="rate_fn"):
        LieAttention(C, H, is_causal=True, rate_fn=rates.softplus).new_cache(1, 4)
    layer = LieAttention(C, H, is_causal=True, dropout=0.1)
    with torch.no_grad(), pytest.raises(CacheError, match="eval"):
        layer(X[:, :1], cache=layer.new_cache(B, 4))


# --- whole models -------------------------------------------------------------------------------------------------

RECIPES = {
    "softmax": {"module": "SoftmaxAttention"},
    "fixed": {"module": "LieAttention", "time": 2.0},
    "exponential": {"module": "LieAttention", "clock": "ExponentialClock", "first_hop": True},
}


def model(recipe, depth=2):
    torch.manual_seed(1)
    stack = Transformer(C, depth, H, recipe, is_causal=True).eval()
    return stack, nn.Embedding(20, C), nn.Linear(C, 20)


@pytest.mark.parametrize("recipe", RECIPES)
def test_generation_with_and_without_cache(recipe):
    stack, embedding, head = model(RECIPES[recipe])
    prompt = torch.randint(20, (3, 5))
    for sampling in ({"temperature": 0}, {"seed": 3}, {"seed": 3, "top_k": 4, "top_p": 0.7, "temperature": 2.0}):
        ours = stack.generate(prompt, 12, embedding=embedding, head=head, **sampling)
        anew = stack.generate(prompt, 12, embedding=embedding, head=head, use_cache=False, **sampling)
        assert torch.equal(ours, anew)
        assert ours.shape == (3, 17)


def test_caches_of_a_stack_move_together():
    stack, embedding, _ = model(RECIPES["fixed"])
    x = embedding(torch.randint(20, (2, 6)))
    cache = stack.new_cache(2, 8)
    assert (len(cache), cache.length, cache.max_tokens) == (2, 0, 8)
    with torch.no_grad():
        stack(x, cache=cache)
        cache.crop(3)
        cache.reorder([1])
        rest = stack(x[1:, 3:], cache=cache)
    torch.testing.assert_close(rest, stack(x[1:])[:, 3:].detach(), atol=1e-5, rtol=0)
    other, _, _ = model(RECIPES["fixed"], depth=1)
    with torch.no_grad(), pytest.raises(CacheError, match="expected 1 layers, got 2"):
        other(x[:1], cache=cache)


def test_a_copied_stack_shares_nothing():
    stack, embedding, _ = model(RECIPES["exponential"])
    cache = stack.new_cache(2, 8)
    with torch.no_grad():
        stack(embedding(torch.randint(20, (2, 3))), cache=cache)
        twin = copy.copy(cache)
        twin.reorder([0, 0, 0])
        twin.crop(1)
    assert [layer.batch_size for layer in cache] == [2, 2]
    assert cache.length == 3


def test_a_call_that_fails_half_way_keeps_nothing():
    stack, embedding, _ = model(RECIPES["exponential"])
    x, cache = embedding(torch.randint(20, (2, 5))), stack.new_cache(2, 8)
    with torch.no_grad():
        stack(x[:, :4], cache=cache)
        scale_time(stack.blocks[1], 2.0)
        with pytest.raises(CacheError, match="scale_time"):
            stack(x[:, 4:], cache=cache)
        scale_time(stack.blocks[1], 1.0)
        torch.testing.assert_close(stack(x[:, 4:], cache=cache), stack(x)[:, 4:], atol=1e-5, rtol=0)
        cache.layers[0].crop(1)
        with pytest.raises(CacheError, match=r"one length in all layers, got \[1, 5\]"):
            stack(x[:, 4:], cache=cache)


# --- sampling -----------------------------------------------------------------------------------------------------


def draws(scores, **knobs):
    many = torch.tensor(scores).expand(4000, -1)
    found = sample(many, rng=torch.Generator().manual_seed(0), **knobs).flatten()
    return torch.bincount(found, minlength=many.size(-1)) / len(found)


def test_sampling_follows_the_softmax():
    scores = [0.0, 1.0, 2.0, -1.0]
    for temperature in (0.5, 1.0, 3.0):
        expected = (torch.tensor(scores) / temperature).softmax(0)
        torch.testing.assert_close(draws(scores, temperature=temperature), expected, atol=0.03, rtol=0)


def test_top_k_and_top_p_keep_the_most_probable():
    scores = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().tolist()
    torch.testing.assert_close(draws(scores, top_k=2), torch.tensor([0, 4 / 7, 0, 3 / 7]), atol=0.03, rtol=0)
    torch.testing.assert_close(draws(scores, top_p=0.65), torch.tensor([0, 4 / 7, 0, 3 / 7]), atol=0.03, rtol=0)
    torch.testing.assert_close(draws(scores, top_p=0.75), torch.tensor([0, 4, 2, 3]) / 9, atol=0.03, rtol=0)
    for only in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 0}):
        assert draws(scores, **only).tolist() == [0, 1, 0, 0]
    assert torch.equal(draws(scores, top_k=100, top_p=1.0), draws(scores))


@pytest.mark.parametrize("knobs", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}], ids=str)
def test_bad_sampling(knobs):
    with pytest.raises(GeneratorError, match=r"expected .*; "):
        sample(torch.zeros(1, 3), **knobs)
