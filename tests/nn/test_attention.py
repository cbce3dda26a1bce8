"""Softmax and Lie attention: equal but for ``mix``; the axioms of mixing, masks, methods, storage and bad inputs."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import scipy.linalg
import torch
import yaml

from liegroup_attn import ExponentialClock, MatrixExp, SoftmaxGenerator, rates
from liegroup_attn.clocks import FixedClock
from liegroup_attn.errors import DtypeError, GeneratorError, MaskError, ShapeError
from liegroup_attn.expm import Automatic
from liegroup_attn.lightning import build_optimizer
from liegroup_attn.manifolds import ManifoldParameter, OpenInterval
from liegroup_attn.nn import LieAttention, SoftmaxAttention, build_attention, scale_time
from liegroup_attn.positional import RotaryEncoding

C, H, N = 16, 4, 9
OVERLAYS = sorted((Path(__file__).parents[2] / "experiments").glob("*/variants/*.yaml"))
RECIPES = {
    f"{path.parts[-3]}/{path.stem}": yaml.safe_load(path.read_text())["model"]["init_args"]["attention"]
    for path in OVERLAYS
} | {name: {"module": "LieAttention", "rate_fn": name} for name in ("exponential", "softplus", "squared_relu")}
# Those with learned generators have a table of their own, in test_learned.py.
RECIPES = {name: r for name, r in RECIPES.items() if not r.keys() & {"scores", "plus", "generator", "mix_heads"}}
RECIPES = {name: r for i, (name, r) in enumerate(RECIPES.items()) if r not in [*RECIPES.values()][:i]}  # each one once
RECIPES["exponential/first_hop_resolvent"] = {**RECIPES["exponential"], "first_hop": True, "clock": "ExponentialClock"}
LIE = {name: recipe for name, recipe in RECIPES.items() if recipe["module"] == "LieAttention"}
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "gqa": {"num_kv_heads": 2},
    "causal_gqa_rotary_bias": {
        "is_causal": True,
        "num_kv_heads": 1,
        "bias": True,
        "encoding": RotaryEncoding(C // H, layout="interleaved"),
    },
}

recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
lie_recipes = pytest.mark.parametrize("recipe", LIE.values(), ids=LIE)
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def build(recipe: dict, dtype: torch.dtype = torch.float32, **options):
    """A layer away from its start: every head has its own time, every token its own rate."""
    torch.manual_seed(1)
    layer = build_attention(recipe, C, H, **options)
    with torch.no_grad():
        if isinstance(layer, LieAttention):
            layer.flow.rate_weight.normal_(0, 0.5)
            line, time = OpenInterval(layer.flow.max_time), layer.flow.time
            time.copy_(line.from_chart(line.chart(time) + torch.linspace(-0.5, 0.3, H)))
    return layer.to(dtype)


def tokens(batch: int = 2, n: int = N, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, n, C, generator=torch.Generator().manual_seed(2), dtype=dtype)


def test_the_tables_are_not_empty():
    assert len(OVERLAYS) >= 8
    assert len(LIE) >= 8


# equal but for mix


@lie_recipes
@options
def test_the_same_seed_gives_the_parameters_of_softmax_attention(recipe, options):
    built, states = [], []
    for one in ({"module": "SoftmaxAttention"}, recipe):
        torch.manual_seed(3)
        built.append(dict(build_attention(one, C, H, **options).named_parameters()))
        states.append(torch.get_rng_state())
    softmax, lie = built
    assert torch.equal(*states)  # what is built next is equal too
    assert set(lie) - set(softmax) == {"flow.time", "flow.rate_weight", "flow.rate_bias"}
    assert all(torch.equal(lie[name], value) for name, value in softmax.items())
    assert sum(p.numel() for p in lie.values()) - sum(p.numel() for p in softmax.values()) == H + H * C + H


@pytest.mark.parametrize(
    ("switches", "more"),
    [
        ({}, H + H * C + H),
        ({"learn_rates": False}, H),
        ({"learn_time": False}, H * C + H),
        ({"learn_time": False, "learn_rates": False}, 0),
    ],
)
def test_parameters_beyond_softmax(switches, more):
    lie, softmax = LieAttention(C, H, **switches), SoftmaxAttention(C, H)
    count = sum(p.numel() for p in lie.parameters()) - sum(p.numel() for p in softmax.parameters())
    assert count == more
    assert "flow.time" in lie.state_dict()  # a checkpoint says for how long, learned or not


@pytest.mark.parametrize("clock", [None, ExponentialClock()], ids=str)
@options
def test_first_hop_for_no_time_is_softmax_attention(clock, options):
    lie = LieAttention(C, H, first_hop=True, clock=clock, **options)
    softmax = SoftmaxAttention(C, H, **options)
    softmax.load_state_dict(lie.state_dict(), strict=False)
    x = tokens()
    assert not torch.allclose(lie(x), softmax(x), atol=1e-3)
    assert scale_time(lie, 0) == 1
    torch.testing.assert_close(lie(x), softmax(x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lie.mixing_matrix(x), softmax.mixing_matrix(x), atol=1e-6, rtol=1e-6)
    scale_time(lie, 1e-7)  # and the limit is continuous
    torch.testing.assert_close(lie(x), softmax(x), atol=1e-6, rtol=1e-6)


def test_no_time_without_first_hop_is_the_identity():
    layer = LieAttention(C, H)
    scale_time(layer, 0)
    assert torch.equal(layer.mixing_matrix(tokens()), torch.eye(N).expand(2, H, N, N))


# axioms


@recipes
@options
def test_training_and_evaluation_agree(recipe, options):
    layer, x = build(recipe, **options), tokens()
    expected = layer.train()(x)
    outputs = {"eval": layer.eval()(x)}
    with torch.no_grad():
        outputs["eval, no_grad"] = layer(x)
        outputs["train, no_grad"] = layer.train()(x)
    with torch.inference_mode():
        outputs["eval, inference_mode"] = layer.eval()(x)
    for name, output in outputs.items():
        torch.testing.assert_close(
            output, expected, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@recipes
@options
def test_every_parameter_gets_a_gradient(recipe, options):
    layer = build(recipe, **options)
    layer(tokens()).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if name != "k_proj.bias" or layer.encoding is not None:  # without positions softmax does not see it
            assert parameter.grad.abs().max() > 0, name


@recipes
@options
def test_the_mixing_matrix_is_stochastic_and_is_what_mixes(recipe, options):
    layer, x = build(recipe, torch.float64, **options), tokens(dtype=torch.float64)
    mixing = layer.mixing_matrix(x)
    assert mixing.shape == (2, H, N, N)
    assert mixing.min() >= 0
    torch.testing.assert_close(mixing.sum(-1), torch.ones(2, H, N, dtype=torch.float64), atol=1e-12, rtol=0)
    if layer.is_causal:
        assert torch.equal(mixing, mixing.tril())
    inputs = layer._inputs(x, None, None)
    wide = inputs.value.repeat_interleave(H // layer.num_kv_heads, 1)
    torch.testing.assert_close(mixing @ wide, layer._mix(inputs, inputs.value), atol=1e-10, rtol=0)
    heads = (mixing @ wide).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.out_proj(heads), layer(x), atol=1e-10, rtol=0)


@lie_recipes
def test_the_mixing_matrix_is_that_of_the_generator(recipe):
    layer, x = build({**recipe, "tol": 1e-12}, torch.float64), tokens(dtype=torch.float64)
    generator = layer.generator(x)
    flow = layer.flow.flow_time()[..., None] * generator.dense()
    eye = torch.eye(N, dtype=torch.float64)
    fixed = torch.from_numpy(scipy.linalg.expm(flow.detach().numpy()))
    mixing = torch.linalg.inv(eye - flow) if isinstance(layer.flow.clock, ExponentialClock) else fixed
    if layer.flow.first_hop:
        mixing = generator.jump_chain() @ mixing
    torch.testing.assert_close(layer.mixing_matrix(x), mixing, atol=1e-9, rtol=0)


@recipes
@pytest.mark.parametrize("n", [1, 2, N, 70])
def test_causal_outputs_do_not_see_the_future(recipe, n):
    layer = build(recipe, torch.float64, is_causal=True, encoding=RotaryEncoding(C // H, layout="half_split"))
    x = tokens(n=n, dtype=torch.float64)
    now = (n - 1) // 2
    other = x.clone()
    other[:, now + 1 :] += 3.0
    one, two = layer(x), layer(other)
    # The future may change rates, hence how many hops reach the tolerance of 1e-7; a leak would be far larger.
    atol = 1e-12 if "rate_fn" not in recipe else 1e-7
    torch.testing.assert_close(one[:, : now + 1], two[:, : now + 1], atol=atol, rtol=0)
    if n > 1:
        assert (one[:, now + 1 :] - two[:, now + 1 :]).abs().max() > 1e-3


@recipes
def test_permuted_tokens_give_permuted_outputs(recipe):
    layer, x = build(recipe, torch.float64), tokens(dtype=torch.float64)
    order = torch.randperm(N)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], atol=1e-10, rtol=0)


@recipes
def test_grouped_heads_are_repeated_heads(recipe):
    grouped, full = build(recipe, torch.float64, num_kv_heads=2), build(recipe, torch.float64)
    state = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        heads = state[name].unflatten(0, (2, C // H))  # (H_kv, D, C)
        state[name] = heads.repeat_interleave(H // 2, 0).flatten(0, 1)
    full.load_state_dict(state)
    x = tokens(dtype=torch.float64)
    torch.testing.assert_close(full(x), grouped(x), atol=1e-10, rtol=0)


@recipes
@options
def test_a_batch_of_none_and_one_token(recipe, options):
    layer = build(recipe, **options)
    empty = tokens(0)
    out = layer(empty)
    assert out.shape == empty.shape
    out.sum().backward()
    one = layer(tokens(n=1))
    torch.testing.assert_close(layer.mixing_matrix(tokens(n=1)), torch.ones(2, H, 1, 1))
    assert one.isfinite().all()


@recipes
def test_dtypes(recipe):
    layer, x = build(recipe, is_causal=True), tokens()
    golden = copy.deepcopy(layer).double()(x.double())
    assert golden.dtype == torch.float64
    torch.testing.assert_close(layer(x).double(), golden, atol=2e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        half, mixing = layer(x), layer.mixing_matrix(x)
    assert half.dtype == mixing.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), golden, atol=3e-2, rtol=0)
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(mixing.double().sum(-1), torch.ones(2, H, N).double(), atol=8 * eps, rtol=0)
    half.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in layer.parameters())


@recipes
def test_dropout_acts_in_training_only(recipe):
    layer, plain, x = build(recipe, dropout=0.5), build(recipe), tokens()
    torch.testing.assert_close(layer.eval()(x), plain(x))
    layer.train()
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(layer(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)


# time


@pytest.mark.parametrize("clock", [None, ExponentialClock()], ids=str)
@pytest.mark.parametrize("n", [N, 70])
@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_scaled_time_is_time(clock, n, factor):
    layer = LieAttention(C, H, time=1.0, max_time=3.0, clock=clock)
    longer = LieAttention(C, H, time=factor, max_time=3.0 * factor, clock=clock)
    longer.load_state_dict({**layer.state_dict(), "flow.time": longer.flow.time})
    x = tokens(n=n)
    before = layer(x)
    scale_time(layer, factor)
    torch.testing.assert_close(layer(x), longer(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer.flow.flow_time(), longer.flow.flow_time())
    scale_time(layer, 1)
    assert torch.equal(layer(x), before)


def test_scale_time_counts_layers():
    module = torch.nn.ModuleList([LieAttention(C, H), torch.nn.Sequential(LieAttention(C, H)), SoftmaxAttention(C, H)])
    assert scale_time(module, 2) == 2
    assert [m.flow.time_scale for m in module.modules() if isinstance(m, LieAttention)] == [2.0, 2.0]


@pytest.mark.parametrize("rate", [1e3, -1e3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learned_time_stays_in_its_interval(rate, dtype):
    layer, x = LieAttention(C, H, time=1.0, max_time=2.0).to(dtype), tokens(dtype=dtype)
    start = layer.flow.time.detach().clone()
    optimizer = build_optimizer(layer, abs(rate))
    for group in optimizer.param_groups:  # only the time moves by so much
        group["lr"] = abs(rate) if any(p is layer.flow.time for p in group["params"]) else 0.0
    sign = 1 if rate > 0 else -1
    for _ in range(200):
        optimizer.zero_grad()
        (sign * layer(x).square().sum()).backward()
        optimizer.step()
        assert layer.flow.time.manifold.check_point_on_manifold(layer.flow.time), layer.flow.time
    assert not torch.equal(layer.flow.time, start)
    assert layer(x).isfinite().all()


METHODS = [
    ({}, Automatic, 2.0),
    ({"clock": ExponentialClock(), "is_causal": True}, Automatic, 2.0),
    ({"rate_fn": rates.softplus}, Automatic, None),  # its rates are not known before data is seen
    ({"method": MatrixExp()}, MatrixExp, None),
]


def method(layer, generator):
    """What a layer's flow is run by."""
    return layer._method() or layer.flow._method(generator)


@pytest.mark.parametrize(("options", "kind", "longest"), METHODS)
def test_the_method_that_is_chosen(options, kind, longest):
    layer = LieAttention(C, H, **options)
    found = method(layer, layer._generator(layer._inputs(tokens(), None, None)))
    assert type(found) is kind
    assert getattr(found, "longest", None) == longest


def test_the_number_of_hops_is_known_from_max_time_and_tol_alone():
    layer = LieAttention(C, H, time=0.1, max_time=3.0, tol=1e-4)
    q = torch.zeros(1, H, 100, 4)
    generators = [SoftmaxGenerator(q, q, is_causal=causal) for causal in (False, True)]
    assert [(method(layer, g).tol, method(layer, g).longest) for g in generators] == [(1e-4, 3.0)] * 2
    scale_time(layer, 4.0)
    assert [method(layer, g).longest for g in generators] == [12.0] * 2
    for generator in generators:
        chosen = method(layer, generator).choose(generator, q, layer.flow.time, FixedClock())
        assert chosen.max_terms == FixedClock().terms(12.0, 1e-4)


# storage


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_state_dict(layer, assign=False):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    new = LieAttention(C, H, time=1.0, max_time=layer.flow.max_time)
    new.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    return new


def through_assign(layer):
    return through_state_dict(layer, assign=True)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, through_pickle, through_torch_save, through_state_dict, through_assign]
)
def test_a_copy_is_equal_and_keeps_its_manifold(copied):
    layer = build({"module": "LieAttention", "time": 2.0, "max_time": 5.0})
    new = copied(layer)
    assert isinstance(new.flow.time, ManifoldParameter)
    assert isinstance(new.flow.time.manifold, OpenInterval)
    assert new.flow.time.manifold.upper == 5.0
    assert new.flow.time.requires_grad
    assert list(new.state_dict()) == list(layer.state_dict())
    assert torch.equal(new(tokens()), layer(tokens()))
    new(tokens()).sum().backward()
    optimizer = build_optimizer(new, 1e4)
    for _ in range(3):
        optimizer.step()
    assert new.flow.time.manifold.check_point_on_manifold(new.flow.time)  # Euclidean Adam would be far outside
    assert not torch.equal(new.flow.time, layer.flow.time)


def test_conversion_keeps_the_manifold():
    for dtype in (torch.float64, torch.bfloat16):
        layer = build({"module": "LieAttention"}).to(dtype)
        assert isinstance(layer.flow.time, ManifoldParameter)
        assert layer.flow.time.dtype == dtype


@pytest.mark.parametrize("assign", [False, True])
def test_times_of_a_longer_interval_are_refused(assign):
    long, short = LieAttention(C, H, time=8.0), LieAttention(C, H, time=0.1, max_time=1.0)
    with pytest.raises(
        RuntimeError, match=r"flow.time: expected values from 0 to max_time=1, got up to 8; load it into"
    ):
        short.load_state_dict(long.state_dict(), assign=assign)
    assert short.flow.time.manifold.check_point_on_manifold(short.flow.time)


def test_times_rounded_onto_the_end_are_projected():
    layer = LieAttention(C, H, time=1.0)
    layer.load_state_dict({**layer.state_dict(), "time": torch.tensor([[2.0], [0.0], [1.0], [1.5]])})
    assert layer.flow.time.manifold.check_point_on_manifold(layer.flow.time)
    assert layer.flow.time[2:].flatten().tolist() == [1.0, 1.5]


# bad inputs: each message says expected, got and what to do

BUILD = [
    # what, error, pattern
    (lambda: LieAttention(C, 3), ShapeError, r"num_heads: expected a divisor of embed_dim=16 .*, got 3; change"),
    (lambda: SoftmaxAttention(C, 0), ShapeError, r"num_heads: expected .*, got 0; change"),
    (lambda: LieAttention(C, 4, num_kv_heads=3), ShapeError, r"a multiple of num_kv_heads=3, got 4; change"),
    (lambda: LieAttention(C, 4, num_kv_heads=0), ShapeError, r"a multiple of num_kv_heads=0, got 4; change"),
    (lambda: SoftmaxAttention(C, H, dropout=1.0), ValueError, r"dropout: expected 0 ≤ dropout < 1, got 1.0; choose"),
    (lambda: LieAttention(C, H, dropout=-0.1), ValueError, r"dropout: expected .*, got -0.1; choose"),
    (
        lambda: LieAttention(C, H, encoding=RotaryEncoding(8, layout="half_split")),
        ShapeError,
        r"encoding: expected head_width=4, got 8; it is",
    ),
    *(
        (
            lambda options=options: LieAttention(C, H, **options),
            GeneratorError,
            r"time: expected 0 < time < max_time < inf, got time=.*, max_time=.*; raise max_time",
        )
        for options in (
            {"time": 0.0},
            {"time": -1.0},
            {"time": 2.0, "max_time": 2.0},
            {"time": 2.0, "max_time": 1.0},
            {"time": float("inf")},
            {"time": float("nan")},
            {"max_time": float("inf")},
        )
    ),
    *(
        (
            lambda rate=rate: LieAttention(C, H, rate=rate),
            GeneratorError,
            rf"rate: expected 0 < rate < 1, got {rate}; start",
        )
        for rate in (0.0, 1.0, -0.5, float("nan"))
    ),
    *(
        (
            lambda factor=factor: scale_time(LieAttention(C, H), factor),
            GeneratorError,
            r"factor: expected 0 ≤ factor < inf, got .*; the flow runs forward only",
        )
        for factor in (-1, -1e-9, float("inf"), float("nan"))
    ),
    (
        lambda: scale_time(SoftmaxAttention(C, H), 2),
        GeneratorError,
        r"module: expected a LieAttention, LieMixer or converted attention inside, got none; only",
    ),
]


@pytest.mark.parametrize(("make", "error", "match"), BUILD)
def test_bad_settings(make, error, match):
    with pytest.raises(error, match=match):
        make()


window = torch.ones(N, N, dtype=torch.bool).tril().triu(-1)
FORWARD = [
    # arguments of forward, error, pattern, also for softmax
    ((torch.zeros(N, C),), ShapeError, r"x: expected at least 3 dimensions, got shape \(9, 16\); give", True),
    ((torch.zeros(1, 2, N, C),), ShapeError, r"x: expected \(batch, tokens, 16\), got \(1, 2, 9, 16\); match", True),
    ((torch.zeros(2, N, 8),), ShapeError, r"x: expected \(batch, tokens, 16\), got \(2, 9, 8\); match", True),
    ((torch.zeros(2, N, C, dtype=torch.long),), DtypeError, r"x: expected a floating-point tensor, got .*; conv", True),
    (("text",), DtypeError, r"x: expected a floating-point tensor, got str; convert", True),
    ((tokens(), None, torch.arange(N).half()), DtypeError, r"positions: expected integers, .*, got .*; half", True),
    (
        (tokens(), None, torch.arange(5)),
        ShapeError,
        r"positions: expected \(9\) or \(2, 1, 9\), got \(5,\); index",
        True,
    ),
    ((tokens(n=0),), ShapeError, r"query: expected at least 1 token, got shape .*; drop empty", False),
    ((tokens(), window), MaskError, r"attn_mask: expected a transitively closed mask, got .*; close it", False),
    ((tokens(), window[:5]), MaskError, r"attn_mask: expected a shape broadcastable to .*, got \(5, 9\); index", False),
    ((tokens(), window.int()), DtypeError, r"attn_mask: expected torch.bool .*, got torch.int32; convert", False),
]


@pytest.mark.parametrize(("arguments", "error", "match", "both"), FORWARD)
def test_bad_inputs(arguments, error, match, both):
    rotary = RotaryEncoding(C // H, layout="half_split")
    for kind in (LieAttention, SoftmaxAttention) if both else (LieAttention,):
        layer = kind(C, H, encoding=rotary)
        with pytest.raises(error, match=match):
            layer(*arguments)
        with pytest.raises(error, match=match):
            layer.mixing_matrix(*arguments)


def test_a_diverged_layer_says_so():
    layer = LieAttention(C, H)
    with torch.no_grad():
        layer.q_proj.weight.fill_(float("nan"))
    with pytest.raises(GeneratorError, match=r"query: expected finite entries, got NaN or inf; look for"):
        layer(tokens())


def test_repr_names_what_was_chosen():
    text = repr(LieAttention(C, H, first_hop=True, clock=ExponentialClock(), is_causal=True))
    assert all(word in text for word in ("first_hop=True", "ExponentialClock()", "max_time=2", "is_causal=True"))
