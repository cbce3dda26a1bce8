"""Recipes: every name and number reaches the module; anything else is refused with what would be right."""

from __future__ import annotations

import copy

import pytest

import liegroup_attn as la
from liegroup_attn.manifolds import ReversibleRateMatrices
from liegroup_attn.nn import AttentionRecipe, LieAttention, SkewScores, SoftmaxAttention, build_attention
from liegroup_attn.positional import ALiBi

LIE = {"module": "LieAttention"}
SETTINGS = [
    # key, value in the recipe, what the module holds
    ("num_kv_heads", 1, lambda m: m.k_proj.out_features == 4),
    ("max_time", 7.0, lambda m: m.max_time == 7.0 == m.time.manifold.upper),
    ("time", 0.25, lambda m: m.time.tolist() == [0.25, 0.25] and m.max_time == 0.5),
    ("learn_time", False, lambda m: "time" not in dict(m.named_parameters()) and "time" in dict(m.named_buffers())),
    ("learn_rates", False, lambda m: not m.learn_rates and "rate_weight" not in dict(m.named_parameters())),
    ("rate", 0.9, lambda m: m.rate_bias.sigmoid().allclose(m.rate_bias.new_tensor(0.9))),
    ("first_hop", True, lambda m: m.first_hop),
    ("clock", "FixedClock", lambda m: isinstance(m.clock, la.clocks.FixedClock)),
    ("clock", "ExponentialClock", lambda m: isinstance(m.clock, la.ExponentialClock)),
    ("clock_shape", 3, lambda m: m.clock.resolvents == 3),
    ("rate_fn", "exponential", lambda m: m.rate_fn is la.rates.exponential),
    ("rate_fn", "softplus", lambda m: m.rate_fn is la.rates.softplus),
    ("rate_fn", "squared_relu", lambda m: m.rate_fn is la.rates.squared_relu),
    ("scores", "SkewScores", lambda m: type(m.scores) is SkewScores),
    ("plus", "RelativeRates", lambda m: m.plus.max_distance == 3),
    ("max_distance", 5, lambda m: m.plus.max_distance == 5),
    ("num_tokens", 5, lambda m: m.plus.num_tokens == 5),
    ("manifold", "ReversibleRateMatrices", lambda m: type(m.plus.matrix.manifold) is ReversibleRateMatrices),
    ("learned_rate", 2.0, lambda m: m.plus(99).rate_bound().allclose(m.time.new_tensor(2.0), rtol=0.3)),
    ("bias_as", "rates", lambda m: m.bias_as == "rates"),
    ("position_rate", 0.7, lambda m: m.position_rate.allclose(m.position_rate.new_tensor(0.7))),
    ("ordered", True, lambda m: m.ordered),
    ("mix_heads", True, lambda m: m.head_weights.shape == (2, 2)),
    ("tol", 1e-5, lambda m: m.tol == 1e-5),
    ("allow_open_mask", True, lambda m: m.allow_open_mask is True),
]

NEEDS = {  # what a key has no meaning without
    "position_rate": {"bias_as": "rates"},
    "clock_shape": {"clock": "ErlangClock"},
    "plus": {"max_distance": 3},
    "max_distance": {"plus": "RelativeRates"},
    "num_tokens": {"plus": "RateMatrix"},
    "manifold": {"plus": "RateMatrix", "num_tokens": 4},
    "learned_rate": {"plus": "RelativeRates", "max_distance": 3},
    "ordered": {"plus": "RelativeRates", "max_distance": 3},
}


@pytest.mark.parametrize(("key", "value", "holds"), SETTINGS)
def test_settings_arrive(key, value, holds):
    recipe = {**LIE, **NEEDS.get(key, {}), key: value}
    given = copy.deepcopy(recipe)
    encoding = {"encoding": ALiBi(2)} if "bias_as" in recipe else {}
    assert holds(build_attention(recipe, 8, 2, **encoding))
    assert recipe == given  # the caller's dictionary goes into the checkpoint
    default = {**LIE, key: None}  # YAML's null
    assert repr(build_attention(default, 8, 2)) == repr(LieAttention(8, 2))


def test_every_key_is_in_the_table():
    assert {key for key, _, _ in SETTINGS} | {"module", "generator"} == set(AttentionRecipe.__annotations__)


def test_options_are_those_of_the_module():
    layer = build_attention(LIE, 8, 4, num_kv_heads=2, is_causal=True, dropout=0.25, bias=True)
    assert type(layer) is LieAttention
    assert (layer.num_kv_heads, layer.is_causal, layer.dropout) == (2, True, 0.25)
    assert layer.q_proj.bias is not None
    assert type(build_attention({"module": "SoftmaxAttention", "time": None}, 8, 2)) is SoftmaxAttention


BAD = [
    (
        {},
        r"attention.module: expected one of \['LieAttention', 'LieMixer', 'SoftmaxAttention'\], got None; name a module",
    ),
    ({"module": "Softmax"}, r"attention.module: expected one of .*, got 'Softmax'; name a module"),
    ({**LIE, "tiem": 1.0}, r"attention: expected keys from \[.*'time'.*\] for LieAttention, got \['tiem'\]; remove"),
    (
        {"module": "SoftmaxAttention", "time": 1.0},
        r"attention: expected keys from \['num_kv_heads', 'scores'\] for SoftmaxAttention, got \['time'\]; remove",
    ),
    (
        {"module": "SoftmaxAttention", "tiem": 1.0},
        r"attention: expected keys from \['num_kv_heads', 'scores'\] for SoftmaxAttention, got \['tiem'\]; remove",
    ),
    *(
        (
            {**LIE, "clock": name},
            rf"attention.clock: expected one of \[.*'ExponentialClock'.*\], got '{name}'; name one",
        )
        for name in ("Exponential", "DenseGenerator", "errors")
    ),
    *(
        ({**LIE, "rate_fn": name}, rf"attention.rate_fn: expected one of \[.*'softplus'.*\], got '{name}'; name one")
        for name in ("relu", "lie_attention", "exp")
    ),
    (
        {**LIE, "clock": "ErlangClock"},
        r"attention.clock_shape: expected it with ErlangClock .*, clock_shape=None; set both",
    ),
    ({**LIE, "clock_shape": 2}, r"attention.clock_shape: .* got clock=None, clock_shape=2; set both or neither"),
    ({**LIE, "time": -1.0}, r"time: expected 0 < time < max_time < inf, got time=-1.0"),
]


@pytest.mark.parametrize(("recipe", "match"), BAD)
def test_bad_recipes(recipe, match):
    with pytest.raises(ValueError, match=match):
        build_attention(recipe, 8, 2)
