"""Recipes: every argument of every class reaches it by its own name; anything else is refused with what would be right."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
import yaml

import liegroup_attn as la
from experiments.results import ROOT
from liegroup_attn import lightning
from liegroup_attn.manifolds import ReversibleRateMatrices
from liegroup_attn.nn import LieAttention, SelfAttention, SkewScores, SoftmaxAttention, Transformer, build_attention
from liegroup_attn.nn.recipe import in_parts
from liegroup_attn.positional import ALiBi

LIE = {"module": "LieAttention"}
RELATIVE = {"module": "RelativeRates", "max_distance": 5}
MATRIX = {"module": "RateMatrix", "num_tokens": 5}
SETTINGS = [
    # key, value in the recipe, what the module holds
    ("num_kv_heads", 1, lambda m: m.k_proj.out_features == 4),
    ("dropout", 0.25, lambda m: m.dropout == 0.25),
    ("bias", True, lambda m: m.q_proj.bias is not None),
    ("max_time", 7.0, lambda m: m.flow.max_time == 7.0 == m.flow.time.manifold.upper),
    ("time", 0.25, lambda m: m.flow.time.tolist() == [0.25, 0.25] and m.flow.max_time == 0.5),
    (
        "learn_time",
        False,
        lambda m: "flow.time" not in dict(m.named_parameters()) and "flow.time" in dict(m.named_buffers()),
    ),
    ("learn_rates", False, lambda m: not m.flow.learn_rates and "flow.rate_weight" not in dict(m.named_parameters())),
    ("rate", 0.9, lambda m: m.flow.rate_bias.sigmoid().allclose(m.flow.rate_bias.new_tensor(0.9))),
    ("first_hop", True, lambda m: m.flow.first_hop),
    ("clock", "FixedClock", lambda m: isinstance(m.flow.clock, la.clocks.FixedClock)),
    ("clock", "ExponentialClock()", lambda m: isinstance(m.flow.clock, la.ExponentialClock)),
    ("clock", "ErlangClock(3)", lambda m: m.flow.clock.resolvents == 3),
    ("rate_fn", "exponential", lambda m: m.rate_fn is la.rates.exponential),
    ("rate_fn", "softplus", lambda m: m.rate_fn is la.rates.softplus),
    ("rate_fn", "squared_relu", lambda m: m.rate_fn is la.rates.squared_relu),
    ("rate_fn", "torch.nn.functional.softplus", lambda m: m.rate_fn is torch.nn.functional.softplus),
    ("scores", "SkewScores", lambda m: type(m.scores) is SkewScores),
    ("scores", {"module": "SkewScores"}, lambda m: type(m.scores) is SkewScores),
    ("plus", RELATIVE, lambda m: m.plus.max_distance == 5),
    (
        "plus",
        RELATIVE | {"rate": 2.0},
        lambda m: m.plus(99).rate_bound().allclose(m.flow.time.new_tensor(2.0), rtol=0.3),
    ),
    ("plus", MATRIX, lambda m: m.plus.num_tokens == 5),
    (
        "plus",
        MATRIX | {"manifold": "ReversibleRateMatrices"},
        lambda m: type(m.plus.matrix.manifold) is ReversibleRateMatrices,
    ),
    ("method", {"module": "Uniformization", "max_terms": 8}, lambda m: m.flow.method.max_terms == 8),
    ("method", "MatrixExp", lambda m: isinstance(m.flow.method, la.MatrixExp)),
    ("bias_as", "rates", lambda m: m.bias_as == "rates"),
    ("position_rate", 0.7, lambda m: m.position_rate.allclose(m.position_rate.new_tensor(0.7))),
    ("ordered", True, lambda m: m.ordered),
    ("mix_heads", True, lambda m: m.head_weights.shape == (2, 2)),
    ("tol", 1e-5, lambda m: m.flow.tol == 1e-5),
    ("allow_open_mask", True, lambda m: m.flow.allow_open_mask is True),
]
NEEDS = {"position_rate": {"bias_as": "rates"}, "ordered": {"plus": RELATIVE}}  # what a key has no meaning without


@pytest.mark.parametrize(("key", "value", "holds"), SETTINGS)
def test_settings_arrive(key, value, holds):
    recipe = {**LIE, **NEEDS.get(key, {}), key: value}
    given = copy.deepcopy(recipe)
    encoding = {"encoding": ALiBi(2)} if "bias_as" in recipe else {}
    assert holds(build_attention(recipe, 8, 2, **encoding))
    assert recipe == given  # the caller's dictionary goes into the checkpoint
    default = {**LIE, key: None}  # YAML's null
    assert repr(build_attention(default, 8, 2)) == repr(LieAttention(8, 2))


def test_every_argument_is_in_the_table():
    known = {"embed_dim", "num_heads", "is_causal", "encoding"}  # by the model
    of_both = {*inspect.signature(LieAttention).parameters, *inspect.signature(SelfAttention).parameters}
    assert {key for key, _, _ in SETTINGS} == of_both - known - {"options"}


def test_options_are_those_of_the_module():
    layer = build_attention(LIE, 8, 4, num_kv_heads=2, is_causal=True, dropout=0.25, bias=True)
    assert type(layer) is LieAttention
    assert (layer.num_kv_heads, layer.is_causal, layer.dropout) == (2, True, 0.25)
    assert layer.q_proj.bias is not None
    assert type(build_attention({"module": "SoftmaxAttention", "time": None}, 8, 2)) is SoftmaxAttention


class Doubled(LieAttention):
    """Somebody's own: an argument more, whose name a part once had, and all others by ``**options``."""

    def __init__(self, embed_dim: int, num_heads: int, *, num_tokens: int, **options: object) -> None:
        super().__init__(embed_dim, num_heads, **options)
        self.num_tokens = num_tokens


class Blind(SoftmaxAttention):
    """Knows of no mask."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__(embed_dim, num_heads)


def test_a_class_of_others_by_its_path():
    recipe = {
        "module": f"{__name__}.Doubled",
        "num_tokens": 3,
        "clock": "ExponentialClock",
        "plus": RELATIVE,
        "bias": True,
    }
    layer = Transformer(8, 1, 2, recipe, is_causal=True).blocks[0].attention
    assert type(layer) is Doubled
    assert (layer.num_tokens, layer.is_causal, layer.plus.is_causal) == (3, True, True)
    assert repr(layer.flow.clock) == "ExponentialClock()"
    with pytest.raises(ValueError, match=r"got \['tiem'\]; did you mean time\?"):
        build_attention(recipe | {"tiem": 1.0}, 8, 2)
    blind = {"module": f"{__name__}.Blind"}
    assert type(build_attention(blind, 8, 2)) is Blind
    with pytest.raises(ValueError, match="is_causal: expected False with Blind, got True"):  # it would look ahead
        Transformer(8, 1, 2, blind, is_causal=True, encoding=None)


FLAT = {  # until 0.2: parts beside attention's own arguments, as checkpoints hold them
    "clock": ({"clock": "ErlangClock", "clock_shape": 3}, {"clock": "ErlangClock(3)"}),
    "relative": (
        {"plus": "RelativeRates", "max_distance": 5, "learned_rate": 0.5, "ordered": True},
        {"plus": RELATIVE | {"rate": 0.5}, "ordered": True},
    ),
    "matrix": (
        {"module": "LieMixer", "generator": "RateMatrix", "num_tokens": 5, "manifold": "ReversibleRateMatrices"},
        {"module": "LieMixer", "generator": MATRIX | {"manifold": "ReversibleRateMatrices"}},
    ),
}


@pytest.mark.parametrize(("flat", "parts"), FLAT.values(), ids=FLAT)
def test_flat_keys_are_read_for_one_release(flat, parts):
    torch.manual_seed(0)
    with pytest.warns(FutureWarning, match=r"attention: expected parts as recipes, got \{.*\}; write \{"):
        old = build_attention(LIE | flat, 8, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        new = build_attention(LIE | parts, 8, 2)
        assert in_parts(LIE | parts) == LIE | parts
    assert repr(old) == repr(new)
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("*/variants/*.yaml")), ids=lambda path: f"{path.parts[-3]}-{path.stem}"
)
def test_variants_of_the_experiments_build_without_a_warning(path):
    base = yaml.safe_load((path.parents[1] / "base.yaml").read_text())["model"]
    own = yaml.safe_load(path.read_text())["model"]["init_args"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(lightning, base["class_path"])(**base["init_args"] | own)


SOFTMAX = r"\['bias', 'dropout', 'num_kv_heads', 'scores'\] for SoftmaxAttention"
BAD = [
    (
        {},
        r"attention: expected the key 'module', got \[\]; name a class, \['LieAttention', 'LieMixer', 'SoftmaxAttention'\]",
    ),
    ({"module": "Softmax"}, r"attention.module: expected one of .*, got 'Softmax'; did you mean SoftmaxAttention\?"),
    (
        {"module": "FlowAttention"},
        r"attention.module: expected one of \['LieAttention', 'LieMixer', 'SoftmaxAttention'\]",
    ),
    (
        {"module": "nowhere.Attention"},
        r"attention.module: expected a path, .* got 'nowhere.Attention' .*; is it installed",
    ),
    (
        {**LIE, "tiem": 1.0},
        r"attention: expected keys from \[.*'time'.*\] for LieAttention, got \['tiem'\]; did you mean time\?",
    ),
    ({**LIE, "num_heads": 2}, r"got \['num_heads'\]; did you mean num_kv_heads"),
    ({**LIE, "zzz": 1.0}, r"got \['zzz'\]; remove them"),
    ({"module": "SoftmaxAttention", "time": 1.0}, rf"attention: expected keys from {SOFTMAX}, got \['time'\]; remove"),
    *(
        ({**LIE, "clock": name}, rf"clock: expected FixedClock, ExponentialClock or .*, got '{name}'; name one")
        for name in ("Exponential", "DenseGenerator", "ErlangClock", "3")
    ),
    *(
        ({**LIE, "rate_fn": name}, rf"attention.rate_fn: expected one of \[.*'softplus'.*\], .*got '{name}'; ")
        for name in ("relu", "lie_attention", "exp")
    ),
    (
        {**LIE, "scores": "Free"},
        r"attention.scores.module: expected one of \['RateScores', .*\], .* got 'Free'; name one",
    ),
    (
        {**LIE, "plus": {**RELATIVE, "max_distnace": 3}},
        r"attention.plus: .* got \['max_distnace'\]; did you mean max_distance",
    ),
    ({**LIE, "plus": "RelativeRates"}, r"attention.plus: expected \['max_distance'\] for RelativeRates, got \[\]; add"),
    (
        {**LIE, "plus": {"module": "LearnedSum"}},
        r"attention.plus.module: expected one of \['RateMatrix', 'RelativeRates'\]",
    ),
    (
        {**LIE, "plus": MATRIX | {"manifold": "Sphere"}},
        r"attention.plus.manifold.module: expected one of \['Doubly.*'RateMatrices', .*\], .* got 'Sphere'; name one",
    ),
    ({**LIE, "max_distance": 3}, r"attention.plus.module: expected one of .* got None"),
    ({**LIE, "time": -1.0}, r"time: expected 0 < time < max_time < inf, got time=-1.0"),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("recipe", "match"), BAD)
def test_bad_recipes(recipe, match):
    with pytest.raises(ValueError, match=match):
        build_attention(recipe, 8, 2)


def test_what_is_no_recipe():
    for recipe in (None, "LieAttention", LIE | {"plus": 3}, {"module": "torch.nn.Linear"}):
        with pytest.raises(TypeError, match=r"attention.*: expected a (recipe|class derived from SelfAttention)"):
            build_attention(recipe, 8, 2)
