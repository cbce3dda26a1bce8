"""Learned generators in layers: what each mixes by, what it keeps, that every parameter learns, and what it refuses."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import NamedTuple

import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

import liegroup_attn as la
from liegroup_attn.errors import CacheError, GeneratorError, MaskError, ShapeError
from liegroup_attn.lightning import build_optimizer
from liegroup_attn.manifolds import (
    DoublyBalancedRateMatrices,
    ManifoldParameter,
    RateMatrices,
    ReversibleRateMatrices,
    SpecialOrthogonal,
    Stiefel,
    banded_support,
    causal_support,
    declared,
    off_manifold,
)
from liegroup_attn.nn import (
    BilinearScores,
    LearnedSum,
    LieAttention,
    LieMixer,
    RateMatrix,
    RateScores,
    RelativeRates,
    ResidualStreams,
    SelfAttention,
    SkewScores,
    SoftmaxAttention,
    SpectralScores,
    SymmetricScores,
    Transformer,
    build_attention,
    scale_time,
)
from liegroup_attn.positional import RotaryEncoding

B, N, C, H = 2, 6, 16, 4


class Case(NamedTuple):
    """A layer with learned generators; causal or not."""

    make: Callable[[], SelfAttention]
    is_causal: bool = False


def lie(**options) -> LieAttention:
    return LieAttention(C, H, **{"time": 1.0, "max_time": 4.0, **options})


LAYERS = {
    "relative rates": Case(lambda: lie(plus=RelativeRates(H, 3))),
    "relative rates, causal": Case(lambda: lie(plus=RelativeRates(H, 3, is_causal=True), is_causal=True), True),
    "relative rates, first hop": Case(lambda: lie(plus=RelativeRates(H, 3), first_hop=True)),
    "relative rates, resolvent": Case(lambda: lie(plus=RelativeRates(H, 4), clock=la.ExponentialClock())),
    "relative rates, resolvent, causal": Case(
        lambda: lie(plus=RelativeRates(H, 4, is_causal=True), clock=la.ExponentialClock(), is_causal=True), True
    ),
    "rate function and relative rates": Case(lambda: lie(plus=RelativeRates(H, 3), rate_fn=la.softplus)),
    "added matrix": Case(lambda: lie(plus=RateMatrix(H, N))),
    "ordered product": Case(lambda: lie(plus=RateMatrix(H, N), ordered=True)),
    "ordered product, causal": Case(
        lambda: lie(plus=RateMatrix(H, N, is_causal=True), ordered=True, is_causal=True), True
    ),
    "sums over heads": Case(lambda: lie(mix_heads=True)),
    "sums over heads, causal": Case(lambda: lie(mix_heads=True, is_causal=True), True),
    "sums over heads and relations": Case(lambda: lie(mix_heads=True, plus=RelativeRates(H, 3))),
    "mixer": Case(lambda: LieMixer(C, H, RateMatrix(H, N))),
    "mixer, causal": Case(lambda: LieMixer(C, H, RateMatrix(H, N, is_causal=True)), True),
    "mixer, reversible": Case(lambda: LieMixer(C, H, RateMatrix(H, N, manifold=ReversibleRateMatrices(N)))),
    "mixer, balanced": Case(lambda: LieMixer(C, H, RateMatrix(H, N, manifold=DoublyBalancedRateMatrices(N)))),
    "mixer, relative": Case(lambda: LieMixer(C, H, RelativeRates(H, 3))),
    "mixer, resolvent": Case(lambda: LieMixer(C, H, RateMatrix(H, N), clock=la.ExponentialClock())),
    "spectral scores": Case(lambda: SoftmaxAttention(C, H, scores=SpectralScores(C, H))),
    "spectral scores, rotary, causal": Case(
        lambda: lie(scores=SpectralScores(C, H), encoding=RotaryEncoding(C // H, layout="half_split"), is_causal=True),
        True,
    ),
    "skew scores": Case(lambda: lie(scores=SkewScores(C, H))),
    "rate scores": Case(lambda: lie(scores=RateScores(C, H))),
    "symmetric scores": Case(lambda: lie(scores=SymmetricScores(C, H))),
    "symmetric scores, softmax": Case(lambda: SoftmaxAttention(C, H, scores=SymmetricScores(C, H))),
}


@pytest.fixture(params=LAYERS, ids=str)
def layer(request) -> SelfAttention:
    return LAYERS[request.param].make().double()


def inputs() -> Tensor:
    return torch.randn(B, N, C, dtype=torch.float64)


def test_rows_are_stochastic(layer):
    mixing = layer.mixing_matrix(inputs())
    assert mixing.shape == (B, H, N, N)
    assert (mixing >= 0).all()
    torch.testing.assert_close(mixing.sum(-1), torch.ones(B, H, N, dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_output_is_the_mixing_matrix_applied(layer):
    x = inputs()
    value = layer.v_proj(x).unflatten(-1, (H, -1)).transpose(1, 2)
    wanted = layer.out_proj((layer.mixing_matrix(x) @ value).transpose(1, 2).flatten(2))
    tol = (
        layer.flow.tol if isinstance(layer, LieAttention) else 0
    )  # hops on values and hops on the identity leave the same tail
    torch.testing.assert_close(layer(x), wanted, atol=1e-10 + tol, rtol=0)


@pytest.mark.parametrize("name", [name for name, case in LAYERS.items() if case.is_causal])
def test_causal_layers_do_not_look_ahead(name):
    layer, x = LAYERS[name].make().double(), inputs()
    later = x.clone()
    later[:, 4:] = torch.randn(B, N - 4, C, dtype=torch.float64)
    assert torch.equal(layer.mixing_matrix(x).triu(1), torch.zeros(B, H, N, N, dtype=torch.float64))
    torch.testing.assert_close(layer(x)[:, :4], layer(later)[:, :4], atol=1e-12, rtol=0)


def test_every_parameter_gets_a_gradient(layer):
    layer(inputs()).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


def test_training_stays_on_the_manifolds(layer):
    layer = layer.float()
    optimizer = build_optimizer(layer, 0.05, 0.1)
    target, x = torch.randn(B, N, C), inputs().float()
    start = {name: p.detach().clone() for name, p in layer.named_parameters()}
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for name, manifold in declared(layer).items():
        point = layer.get_parameter(name)
        assert isinstance(point, ManifoldParameter)
        within = 1e-5 if isinstance(manifold, Stiefel) else 1e-6  # geoopt's retraction, projected every ten steps
        assert manifold.check_point_on_manifold(point, atol=within), name
        assert off_manifold(point, manifold) <= within, name
        assert not torch.equal(point, start[name]), name


def test_it_is_saved_loaded_and_copied(layer):
    x = inputs()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(
                parameter.manifold.projx(parameter * 1.1) if hasattr(parameter, "manifold") else parameter + 1
            )
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert torch.equal(other(x), layer(x))
    assert declared(other).keys() == declared(layer).keys()
    assert all(isinstance(other.get_parameter(name), ManifoldParameter) for name in declared(other))


def test_half_precision_forward(layer):
    """The mixing matrix of bf16 weights is near the one of double weights."""
    x = inputs()
    exact = layer.mixing_matrix(x)
    half = copy.deepcopy(layer).bfloat16()
    with torch.no_grad():
        assert half(x.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(half.mixing_matrix(x.bfloat16()).double(), exact, atol=0.05, rtol=0)


@pytest.mark.parametrize("train", [False, True])
def test_dropout(layer, train):
    layer.dropout = 0.5
    layer.train(train)
    x = inputs()
    assert torch.equal(layer(x), layer(x)) is not train


@pytest.mark.parametrize(
    "name", [name for name, case in LAYERS.items() if name.startswith(("rel", "add", "ord", "sum"))]
)
def test_the_same_seed_gives_the_parameters_of_softmax_attention(name):
    torch.manual_seed(3)
    layer, state = LAYERS[name].make(), torch.get_rng_state()
    torch.manual_seed(3)
    softmax, plain = SoftmaxAttention(C, H), torch.get_rng_state()
    assert torch.equal(state, plain)  # what is built next is equal too
    assert all(torch.equal(layer.get_parameter(n), value) for n, value in softmax.named_parameters())


HOPS = la.Uniformization(max_terms=12)  # the rates need not be looked at
COMPILED = {
    "sums over heads": lambda: lie(mix_heads=True),
    "symmetric scores": lambda: lie(scores=SymmetricScores(C, H)),
    "relative rates": lambda: lie(plus=RelativeRates(H, 3), method=HOPS),
    "mixer": lambda: LieMixer(C, H, RateMatrix(H, N), method=HOPS),
    "streams": lambda: Transformer(C, 1, H, streams=3),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_without_a_break(name):
    layer, x = COMPILED[name](), inputs().float()
    wanted = layer(x)
    torch._dynamo.reset()
    got = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
    got.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


# what each is


def test_relative_rates_are_toeplitz_and_extrapolate():
    rates = RelativeRates(2, 3)
    for name, parameter in rates.named_parameters():
        with torch.no_grad():
            parameter.mul_(torch.rand_like(parameter) + 0.5)
        assert parameter.grad is None, name
    long, short = rates(12).dense(), rates(5).dense()
    off = ~torch.eye(5, dtype=torch.bool)
    assert torch.equal(long[:, :5, :5][:, off], short[:, off])
    for d in range(1, 12):
        assert torch.equal(long.diagonal(-d, -2, -1), long[:, d, :1].expand(2, 12 - d))
        assert torch.equal(long.diagonal(d, -2, -1), long[:, :1, d].expand(2, 12 - d))
    for table, row in ((rates.past, long[:, :, 0]), (rates.future, long[:, 0])):
        assert torch.equal(row[:, 1:4], table)
        tail = table[:, 2:] * (3 / torch.arange(4.0, 12)) ** (1 + rates.tail)
        torch.testing.assert_close(row[:, 4:], tail)


def test_relative_exit_rates_stay_bounded():
    rates = RelativeRates(1, 4, is_causal=True, rate=0.5)
    exits = [float(-rates(n).dense().detach().diagonal(dim1=-2, dim2=-1).amin()) for n in (5, 50, 500)]
    assert exits[0] == pytest.approx(0.5)
    assert exits[1] < exits[2] < 0.7


def test_the_sum_is_the_sum():
    layer, x = lie(plus=RelativeRates(H, 3), mix_heads=True, tol=1e-12).double(), inputs()
    chain = LieAttention.generator(_without_additions(layer), x).dense()
    joined = torch.einsum("gh,bhij->bgij", layer.head_weights, chain) + layer.plus(N).dense()
    torch.testing.assert_close(layer.generator(x).dense(), joined, atol=1e-12, rtol=0)
    golden = scipy.linalg.expm((layer.flow.flow_time()[..., None] * joined).detach().numpy())
    torch.testing.assert_close(layer.mixing_matrix(x), torch.from_numpy(golden), atol=1e-10, rtol=0)


def test_the_ordered_product_is_the_product():
    layer, x = lie(plus=RateMatrix(H, N), ordered=True, tol=1e-12).double(), inputs()
    time = layer.flow.flow_time()[..., None]
    content, learned = layer.generator(x).dense(), layer.plus(N).dense()
    golden = [torch.from_numpy(scipy.linalg.expm((time * q).detach().numpy())) for q in (content, learned)]
    torch.testing.assert_close(layer.mixing_matrix(x), golden[0] @ golden[1], atol=1e-10, rtol=0)


def _without_additions(layer: LieAttention) -> LieAttention:
    bare = copy.deepcopy(layer)
    bare.plus = bare.head_weights = None
    return bare


@pytest.mark.parametrize("options", [{"mix_heads": True}, {"ordered": True}, {"first_hop": True}], ids=str)
def test_padding_does_not_leak_through_relative_rates(options):
    layer, x = lie(plus=RelativeRates(H, 3), **options).double(), inputs()
    keep = (torch.arange(N) < 4)[None, None, None, :]
    other = x.clone()
    other[:, 4:] = torch.randn(B, 2, C, dtype=torch.float64)
    assert (layer.mixing_matrix(x, keep)[:, :, :4, 4:] == 0).all()
    torch.testing.assert_close(layer(x, keep)[:, :4], layer(other, keep)[:, :4], atol=1e-12, rtol=0)


def test_a_mask_that_hides_nothing_does_nothing(layer):
    if isinstance(layer, LieMixer) or layer.is_causal:
        return
    x = inputs()
    torch.testing.assert_close(layer(x, torch.ones(N, N, dtype=torch.bool)), layer(x), atol=1e-10, rtol=0)


def test_relations_add_up():
    both = RelativeRates(H, 3) + RateMatrix(H, N)
    layer, x = lie(plus=both, tol=1e-12).double(), inputs()
    bare = _without_additions(layer).generator(x).dense()
    wanted = bare + both.parts[0](N).dense() + both.parts[1](N).dense()
    torch.testing.assert_close(layer.generator(x).dense(), wanted, atol=1e-12, rtol=0)
    assert {"plus.parts.0.past", "plus.parts.1.matrix"} <= set(declared(layer))


@pytest.mark.parametrize("tokens", [1, 2, N])
def test_no_relative_rate_is_left_out_of_the_graph(tokens):
    """A parameter without a gradient stops distributed training."""
    layer = lie(plus=RelativeRates(H, 32))
    layer(torch.randn(B, tokens, C)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(layer, dtype):
    """Generators are made, added and exponentiated in float32, whatever autocast does to the projections."""
    layer, x = layer.float(), inputs().float()
    exact = layer.mixing_matrix(x)
    with torch.autocast("cpu", dtype=dtype):
        mixing = layer.mixing_matrix(x)
        flows = [generator.dense() for generator, _ in layer.flows(x).values()]
    torch.testing.assert_close(mixing.float(), exact, atol=0.03, rtol=0)
    for dense in flows:
        assert dense.dtype == torch.float32
        assert dense.sum(-1).abs().max() < 1e-5


def test_time_scales_a_mixer_too():
    layer, x = LieMixer(C, H, RateMatrix(H, N)).double(), inputs()
    once = layer.mixing_matrix(x)
    assert scale_time(layer, 2.0) == 1
    torch.testing.assert_close(layer.mixing_matrix(x), once @ once, atol=1e-12, rtol=0)


def test_flows_are_what_mixes(layer):
    x = inputs()
    if not isinstance(layer, LieAttention | LieMixer) or getattr(layer, "rate_fn", None) is not None:
        assert layer.flows(x) == {}
        return
    if isinstance(layer, LieAttention):
        layer.flow.tol = 1e-12
    mixing = torch.eye(N, dtype=torch.float64)
    for generator, time in layer.flows(x).values():
        mixing = mixing @ la.transition_matrix(generator, time.double(), clock=layer.flow.clock)
    if layer.flow.first_hop:
        mixing = layer.generator(x).jump(mixing)
    torch.testing.assert_close(layer.mixing_matrix(x), mixing.expand(B, H, N, N), atol=1e-10, rtol=0)


def test_a_causal_matrix_serves_shorter_inputs():
    layer, x = LieMixer(C, H, RateMatrix(H, N, is_causal=True)).double(), inputs()
    torch.testing.assert_close(layer(x)[:, :3], layer(x[:, :3]), atol=1e-12, rtol=0)


SCORES = {"spectral": SpectralScores, "skew": SkewScores, "rate": RateScores, "symmetric": SymmetricScores}


@pytest.mark.parametrize("kind", SCORES.values(), ids=SCORES)
def test_scores_are_the_bilinear_form(kind):
    scores, x = kind(C, H).double(), inputs()
    query, key = scores(x)
    assert query.shape == key.shape == (B, H, N, C // H)
    if kind is SymmetricScores:
        w = scores.proj.weight.unflatten(0, (H, -1))  # (H, D, C)
        a = w.mT @ torch.diag_embed(scores.spectrum) @ w
        assert torch.allclose(a, a.mT)
    elif kind is SpectralScores:
        a = scores.left @ torch.diag_embed(scores.spectrum) @ scores.right.mT
        spectrum = torch.linalg.svdvals(a)[:, : C // H]
        torch.testing.assert_close(spectrum, scores.spectrum.sort(-1, descending=True).values, atol=1e-6, rtol=0)
    elif kind is SkewScores:
        a = scores.frame @ (scores.core - scores.core.mT) @ scores.frame.mT
        assert torch.allclose(a, -a.mT)
    else:
        a = scores.frame @ scores.rates @ scores.frame.mT
        assert RateMatrices(C // H).check_point_on_manifold(scores.rates)
    torch.testing.assert_close(query @ key.mT, x.unsqueeze(1) @ a @ x.mT.unsqueeze(1), atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", SCORES.values(), ids=SCORES)
def test_scores_start_as_small_as_linear_ones(kind):
    x = torch.randn(4, 64, 256)
    query, key = kind(256, 4)(x)
    found = query @ key.mT / 8
    assert 0.1 < float(found[:, :, ~torch.eye(64, dtype=torch.bool)].std()) < 1.0  # two nn.Linear: 1/3


def test_symmetric_scores_make_a_reversible_generator():
    """Detailed balance with μ ∝ π Z / ρ, though π and ρ are learned and nothing is constant."""
    layer, x = lie(scores=SymmetricScores(C, H)).double(), inputs()
    with torch.no_grad():
        layer.scores.stationary.normal_()
        layer.flow.rate_weight.normal_()
    matrix = layer.generator(x).dense()
    query, key = layer.scores(x)
    log_pi = layer.scores.key_bias(x)  # (B, H, N)
    log_z = (query @ key.mT / 2 + log_pi.unsqueeze(-2)).logsumexp(-1)  # width 4
    mu = (log_pi + log_z).softmax(-1) / layer.flow.jump_rates(x)
    flows = mu.unsqueeze(-1) * matrix
    torch.testing.assert_close(flows, flows.mT, atol=1e-12, rtol=1e-9)
    assert torch.linalg.eigvals(matrix).imag.abs().max() < 1e-8


# residual streams


def test_streams_mix_by_a_doubly_stochastic_matrix():
    streams = ResidualStreams(5).double()
    with torch.no_grad():
        manifold = DoublyBalancedRateMatrices(5)
        streams.generator.copy_(manifold.random(5, 5, dtype=torch.float64))
    mixing = streams.mixing_matrix()
    one = torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(mixing.sum(-1), one, atol=1e-12, rtol=0)
    torch.testing.assert_close(mixing.sum(-2), one, atol=1e-12, rtol=0)
    x, y = torch.randn(B, N, 5, C, dtype=torch.float64), torch.randn(B, N, C, dtype=torch.float64)
    torch.testing.assert_close(streams.write(x, y).mean(-2), x.mean(-2) + y, atol=1e-12, rtol=0)


def test_a_stream_takes_from_the_others_by_its_own_row():
    """Not by its column, which sums to 1 as well."""
    streams = ResidualStreams(3).double()
    x, y = torch.randn(3, C, dtype=torch.float64), torch.randn(C, dtype=torch.float64)
    with torch.no_grad():
        streams.generator.copy_(DoublyBalancedRateMatrices(3).random(3, 3, dtype=torch.float64))
        streams.writing.copy_(torch.randn(3))
        mixing = torch.tensor(scipy.linalg.expm(streams.generator.numpy()))
        assert (mixing - mixing.mT).abs().max() > 1e-2
        expected = torch.stack([mixing[s] @ x + streams.writing[s] * y for s in range(3)])
        torch.testing.assert_close(streams.write(x, y), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_transformer_with_streams(depth):
    model = Transformer(C, depth, H, {"module": "LieAttention"}, streams=3).double()
    x = torch.randn(B, N, C, dtype=torch.float64)
    (model(x) * torch.randn(B, N, C, dtype=torch.float64)).sum().backward()
    assert model(x).shape == x.shape
    for name, parameter in model.named_parameters():  # no stream idles, from the first step on
        assert parameter.grad.abs().max() > 1e-4, name
    reads = [m.reading.detach().argmax().item() for m in model.modules() if isinstance(m, ResidualStreams)]
    assert reads == [0, 1, 2, 0][: 2 * depth]


def test_streams_are_not_rounded_under_autocast():
    streams, x = ResidualStreams(3), torch.randn(B, N, 3, C)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = x
        for _ in range(12):
            kept = streams.write(kept, torch.zeros(B, N, C))
    assert kept.dtype == torch.float32
    torch.testing.assert_close(kept.mean(-2), x.mean(-2), atol=1e-5, rtol=0)


def test_one_stream_is_the_ordinary_transformer():
    torch.manual_seed(0)
    one = Transformer(C, 2, H)
    names = set(one.state_dict())
    assert not any("residual" in name for name in names)


# recipes

RELATIVE = {"module": "RelativeRates", "max_distance": 3}
MATRIX = {"module": "RateMatrix", "num_tokens": N}
RECIPES = {
    "relative": {"module": "LieAttention", "plus": RELATIVE},
    "matrix": {"module": "LieAttention", "plus": MATRIX | {"rate": 0.5}, "ordered": True},
    "heads": {"module": "LieAttention", "mix_heads": True},
    "scores": {"module": "SoftmaxAttention", "scores": "RateScores"},
    "symmetric": {"module": "LieAttention", "scores": "SymmetricScores"},
    "mixer": {"module": "LieMixer", "generator": MATRIX | {"manifold": "ReversibleRateMatrices"}},
    "relative mixer": {"module": "LieMixer", "generator": RELATIVE, "clock": "ExponentialClock"},
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_recipes(name, is_causal):
    if is_causal and name in ("symmetric", "mixer"):
        with pytest.raises(MaskError):
            build_attention(RECIPES[name], C, H, is_causal=is_causal)
        return
    layer = build_attention(RECIPES[name], C, H, is_causal=is_causal, dropout=0.1)
    assert layer.is_causal is is_causal
    assert layer.dropout == 0.1
    assert layer(torch.randn(B, N, C)).shape == (B, N, C)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"module": "LieMixer"}, r"attention: expected \['generator'\] for LieMixer, got \[\]; add what is missing"),
        ({"module": "LieMixer", "generator": "RateMatrix"}, r"expected \['num_tokens'\] for RateMatrix, got \[\]"),
        ({"module": "LieMixer", "generator": "Free"}, "attention.generator.module: expected one of"),
        ({"module": "LieMixer", "generator": RELATIVE, "time": 1.0}, r"for LieMixer, got \['time'\]"),
        ({"module": "SoftmaxAttention", "mix_heads": True}, r"for SoftmaxAttention, got \['mix_heads'\]"),
        ({"module": "LieAttention", "plus": RELATIVE | {"num_tokens": 3}}, r"attention.plus: .*got \['num_tokens'\]"),
        (
            {"module": "LieAttention", "plus": MATRIX | {"manifold": "Sphere"}},
            "attention.plus.manifold.module: expected",
        ),
        ({"module": "LieAttention", "scores": "Free"}, "attention.scores.module: expected one of"),
        ({"module": "LieAttention", "ordered": True}, "ordered: expected False without plus"),
    ],
)
def test_bad_recipes(recipe, message):
    with pytest.raises(ValueError, match=message):
        build_attention(recipe, C, H)


# bad input


class Sizes(BilinearScores):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


BAD: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "heads": (lambda: RelativeRates(0, 3), ShapeError, "num_heads: expected at least 1"),
    "distance": (lambda: RelativeRates(2, 0), ShapeError, "max_distance: expected a whole number from 1"),
    "rate": (lambda: RelativeRates(2, 3, rate=0.0), GeneratorError, "rate: expected a positive number"),
    "matrix rate": (lambda: RateMatrix(2, 3, rate=-1.0), GeneratorError, "rate: expected a positive number"),
    "tokens": (lambda: RateMatrix(2, 0), ShapeError, "num_tokens: expected at least 1"),
    "other size": (lambda: RateMatrix(2, 3, manifold=RateMatrices(4)), ShapeError, "rate matrices on 3 states"),
    "open support": (
        lambda: RateMatrix(2, 5, manifold=RateMatrices(5, banded_support(5, 1))),
        MaskError,
        "transitively closed",
    ),
    "leads ahead": (lambda: RateMatrix(2, 5, manifold=RateMatrices(5), is_causal=True), MaskError, "leads ahead"),
    "no balance": (lambda: DoublyBalancedRateMatrices(4, causal_support(4)), MaskError, "support"),
    "open plus": (lambda: lie(plus=RelativeRates(H, 3), is_causal=True), MaskError, "causal generator"),
    "other heads": (lambda: lie(plus=RelativeRates(H + 1, 3)), ShapeError, "one generator per head"),
    "mixer heads": (lambda: LieMixer(C, H, RateMatrix(2, N)), ShapeError, "one generator per head"),
    "no product": (lambda: lie(ordered=True), GeneratorError, "a product needs two generators"),
    "score heads": (lambda: SpectralScores(C, 3), ShapeError, "divisor of embed_dim"),
    "score size": (lambda: lie(scores=Sizes(C, 2)), ShapeError, "scores: expected embed_dim"),
    "kv heads": (lambda: lie(scores=Sizes(C, H), num_kv_heads=2), ShapeError, "scores: expected embed_dim"),
    "symmetric, causal": (lambda: lie(scores=SymmetricScores(C, H), is_causal=True), MaskError, "break the symmetry"),
    "symmetric, rotary": (
        lambda: lie(scores=SymmetricScores(C, H), encoding=RotaryEncoding(C // H, layout="half_split")),
        MaskError,
        "break the symmetry",
    ),
    "no learned generator": (
        lambda: lie(plus=la.DenseGenerator(torch.zeros(N, N))),
        GeneratorError,
        "LearnedGenerator",
    ),
    "no generator": (
        lambda: LieMixer(C, H, nn.Linear(2, 2)),
        GeneratorError,
        "expected a LearnedGenerator, got Linear",
    ),
    "rotations": (lambda: RateMatrix(2, 4, manifold=SpecialOrthogonal(4)), ShapeError, "rate matrices on 4 states"),
    "half a distance": (lambda: RelativeRates(2, 1.5), ShapeError, "a whole number from 1, got 1.5"),
    "no part": (lambda: LearnedSum(), GeneratorError, "at least one LearnedGenerator"),
    "one stream": (lambda: ResidualStreams(1), ShapeError, "num_streams: expected at least 2"),
    "no stream": (lambda: Transformer(C, 1, H, streams=0), ShapeError, "streams: expected at least 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()


def test_an_open_support_by_name():
    manifold = RateMatrices(5, banded_support(5, 1))
    assert RateMatrix(2, 5, manifold=manifold, allow_open_support=True)(5).check() == (True, None)


def test_other_sizes_and_masks_at_run_time():
    mixer, x = LieMixer(C, H, RateMatrix(H, N)), torch.randn(B, N + 1, C)
    with pytest.raises(ShapeError, match=f"num_tokens: expected {N}, got {N + 1}"):
        mixer(x)
    with pytest.raises(MaskError, match="its manifold's support"):
        mixer(x[:, :N], torch.ones(N, N, dtype=torch.bool))
    with pytest.raises(ShapeError, match="num_tokens: expected at least 1, got 0"):
        RelativeRates(2, 4)(0)
    with pytest.raises(ShapeError, match=f"at most {N}, got {N + 1}"):
        LieMixer(C, H, RateMatrix(H, N, is_causal=True))(x)


@pytest.mark.parametrize("name", ["relative rates, causal", "sums over heads, causal", "mixer, causal"])
def test_caches_are_refused(name):
    with pytest.raises(CacheError, match="use_cache=False"):
        LAYERS[name].make().new_cache(1, 8)
