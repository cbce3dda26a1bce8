"""Encodings in layers and models: where they may stand, what recipes say, what caches and images make of positions."""

from __future__ import annotations

import pytest
import torch

from liegroup_attn import transition_matrix
from liegroup_attn.errors import CacheError, DtypeError, GeneratorError, MaskError, ShapeError
from liegroup_attn.lightning import ImageClassifier, LanguageModel, build_optimizer
from liegroup_attn.lightning.diagnosis import look_at_flow
from liegroup_attn.nn import (
    LieAttention,
    SoftmaxAttention,
    SymmetricScores,
    Transformer,
    build_attention,
    build_encoding,
    convert_attention,
)
from liegroup_attn.positional import (
    ALiBi,
    AxialBlocks,
    BiasEncoding,
    CayleyString,
    ForgettingGate,
    LearnedEncoding,
    LieRotary,
    RotaryEncoding,
    RotationEncoding,
    SinusoidalEncoding,
    T5Bias,
    XPos,
    grid_positions,
)

C, H, N = 16, 4, 7
D = C // H


class PerHead(RotationEncoding):
    """Turns each key head's first pair at its own speed, by the sum of the axes."""

    def __init__(self, head_width: int, num_heads: int, axes: int = 1) -> None:
        super().__init__(head_width, num_heads, axes)
        self.speed = torch.nn.Parameter(torch.arange(1.0, num_heads + 1))

    def act(self, x, coordinates):
        angle = coordinates.sum(-1) * self.per_head(self.speed, x).unsqueeze(-1)  # (..., H, N)
        a, b = x[..., 0], x[..., 1]
        turned = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
        return torch.cat([turned, x[..., 2:]], -1)


class Backward(BiasEncoding):
    """Counts from the end, so it needs a causal mask, and tokens decide."""

    contextual = causal_only = True

    def between(self, here, there):
        raise NotImplementedError

    def of_tokens(self, x, query, key, coordinates):
        return (query @ key.mT).tril()


def tokens(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*(shape or (2, N, C)), generator=torch.Generator().manual_seed(0), dtype=dtype)


BAD = {
    "absolute in a layer": (
        lambda: SoftmaxAttention(C, H, encoding=SinusoidalEncoding(C)),
        TypeError,
        r"encoding: expected a RotationEncoding or BiasEncoding, got SinusoidalEncoding; build_encoding makes one of a recipe, absolute encodings are added",
    ),
    "heads of a bias": (
        lambda: SoftmaxAttention(C, H, encoding=ALiBi(2)),
        ShapeError,
        r"encoding: expected num_heads=4, got 2; one bias per query head",
    ),
    "heads of a rotation": (
        lambda: SoftmaxAttention(C, H, num_kv_heads=2, encoding=PerHead(D, H)),
        ShapeError,
        r"encoding: expected num_heads=2, got 4; one R per key head",
    ),
    "width of a rotation": (
        lambda: SoftmaxAttention(C, H, encoding=RotaryEncoding(8, layout="half_split")),
        ShapeError,
        r"encoding: expected head_width=4, got 8; it is embed_dim // num_heads",
    ),
    "no causal mask": (
        lambda: SoftmaxAttention(C, H, encoding=Backward(H)),
        MaskError,
        r"encoding: expected is_causal=True beside Backward, got False; it means something for earlier",
    ),
    "symmetric scores": (
        lambda: LieAttention(C, H, scores=SymmetricScores(C, H), encoding=ALiBi(H)),
        MaskError,
        r"encoding=None with SymmetricScores",
    ),
    "rates of a rotation": (
        lambda: LieAttention(C, H, encoding=RotaryEncoding(D, layout="half_split"), bias_as="rates"),
        GeneratorError,
        r"bias_as: expected a BiasEncoding and ordered=False beside 'rates', got RotaryEncoding and ordered=False; give",
    ),
    "neither scores nor rates": (
        lambda: LieAttention(C, H, encoding=ALiBi(H), bias_as="weights"),
        GeneratorError,
        r"bias_as: expected 'scores' or 'rates', got 'weights'; say where",
    ),
    "no rate": (
        lambda: LieAttention(C, H, encoding=ALiBi(H), bias_as="rates", position_rate=0.0),
        GeneratorError,
        r"position_rate: expected a positive number, got 0.0; a rate of 0",
    ),
    "mixer": (
        lambda: build_attention(
            {"module": "LieMixer", "generator": {"module": "RelativeRates", "max_distance": 3}}, C, H, encoding=ALiBi(H)
        ),
        ValueError,
        r"encoding: expected None with LieMixer, got ALiBi\(4\); it takes no other",
    ),
    "unknown encoding": (
        lambda: build_encoding({"module": "Rope"}, C, H),
        ValueError,
        r"encoding.module: expected one of \[.*'ALiBi'.*'RotaryEncoding'.*\], .* got 'Rope'; did you mean RotaryEncoding",
    ),
    "wrong capitals": (
        lambda: build_encoding({"module": "alibi"}, C, H),
        ValueError,
        r"got 'alibi'; did you mean ALiBi",
    ),
    "no name": (
        lambda: build_encoding({"type": "yarn"}, C, H),
        ValueError,
        r"expected the key 'module', got \['type'\]",
    ),
    "no layout": (
        lambda: build_encoding({"module": "RotaryEncoding"}, C, H),
        ValueError,
        r"expected \['layout'\] .*; add what is missing, half_split or interleaved",
    ),
    "base class": (
        lambda: build_encoding({"module": "BiasEncoding"}, C, H),
        ValueError,
        r"encoding.module: expected one of .*, got 'BiasEncoding'; did you mean",
    ),
    "unknown key": (
        lambda: build_encoding({"module": "ALiBi", "slope": 2}, C, H),
        ValueError,
        r"encoding: expected keys from \[\] for ALiBi, got \['slope'\]; remove",
    ),
    "sizes are the model's": (
        lambda: build_encoding({"module": "ALiBi", "num_heads": 2}, C, H),
        ValueError,
        r"encoding: expected keys from \[\] for ALiBi, got \['num_heads'\]; remove",
    ),
    "an object for a recipe": (
        lambda: build_encoding(ALiBi(H), C, H),
        TypeError,
        r"encoding: expected a recipe such as .* or None, got ALiBi\(4\); objects go into layers",
    ),
    "a path to nothing": (
        lambda: build_encoding({"module": "liegroup_attn.positional.Nothing"}, C, H),
        ValueError,
        r"expected a path, .*, got 'liegroup_attn.positional.Nothing'",
    ),
    "a package that is not there": (
        lambda: build_encoding({"module": "nowhere.Nothing"}, C, H),
        ValueError,
        r"expected a path, .* is it installed",
    ),
    "a path to something else": (
        lambda: build_encoding({"module": "torch.nn.Linear"}, C, H),
        TypeError,
        r"expected a class derived from PositionalEncoding and complete, got torch.nn.Linear",
    ),
    "half a path": (lambda: build_encoding({"module": ".alibi.ALiBi"}, C, H), ValueError, r"got '.alibi.ALiBi'"),
    "a base by its path": (
        lambda: build_encoding({"module": "liegroup_attn.positional.RotationEncoding"}, C, H),
        TypeError,
        r"expected a class derived from PositionalEncoding and complete, got liegroup",
    ),
    "a list for a name": (lambda: build_encoding({"module": ["ALiBi"]}, C, H), ValueError, r"got \['ALiBi'\]; "),
    "an integer mask": (
        lambda: SoftmaxAttention(C, H, is_causal=True)(torch.zeros(1, N, C), torch.ones(1, 1, 1, N, dtype=torch.long)),
        DtypeError,
        r"attn_mask: expected torch.bool .* got torch.int64; convert",
    ),
    "a name for a recipe": (lambda: build_encoding("ALiBi", C, H), TypeError, r"expected a recipe .*, got 'ALiBi'"),
    "no scaling": (
        lambda: build_encoding({"module": "RotaryEncoding", "layout": "half_split", "scaling": "YaRN"}, C, H),
        ValueError,
        r"encoding.scaling: expected \['factor', 'original_length'\] for YaRN, got \[\]; add",
    ),
    "another scaling": (
        lambda: build_encoding(
            {"module": "RotaryEncoding", "layout": "half_split", "scaling": {"module": "ALiBi"}}, C, H
        ),
        ValueError,
        r"encoding.scaling.module: expected one of \['DynamicNTK', .*'YaRN'\], .* got 'ALiBi'; name one",
    ),
    "contract": (
        lambda: build_encoding({"module": "PositionalEncoding"}, C, H),
        ValueError,
        r"encoding.module: expected one of .*, got 'PositionalEncoding'; ",
    ),
    "width": (lambda: build_encoding({"module": "ALiBi"}, 17, 2), ShapeError, r"num_heads: expected a divisor of 17"),
    "missing key": (
        lambda: build_encoding({"module": "RotaryEncoding"}, C, H),
        ValueError,
        r"encoding: expected \['layout'\] for RotaryEncoding, got \[\]; add",
    ),
    "grid": (lambda: grid_positions(3, 0), ShapeError, r"sizes: expected numbers ≥ 1, got \(3, 0\); give rows"),
    "no grid": (grid_positions, ShapeError, r"sizes: expected numbers ≥ 1, got \(\); give rows"),
    "learned size": (
        lambda: LearnedEncoding(C, 0),
        ShapeError,
        r"num_positions: expected an integer from 1, got 0; change",
    ),
    "sinusoidal width": (
        lambda: SinusoidalEncoding(5),
        ShapeError,
        r"embed_dim: expected an even number, got 5; sines",
    ),
    "beyond the table": (
        lambda: LearnedEncoding(C, 5)(tokens()),
        ValueError,
        r"positions: expected numbers < 5 for a table of 5, got 6; train with num_positions=7",
    ),
    "heads that do not divide": (
        lambda: PerHead(D, 2)(tokens(3, N, D)),
        ShapeError,
        r"x: expected a multiple of 2 heads, got shape \(3, 7, 4\); match num_heads",
    ),
    "axes": (
        lambda: PerHead(D, 1, axes=2)(tokens(1, N, D), torch.arange(N)),
        ShapeError,
        r"positions: expected \(..., N, 2\) for PerHead on 2 axes, got \(7,\); one number per token and axis",
    ),
}


@pytest.mark.parametrize(("make", "error", "match"), BAD.values(), ids=BAD.keys())
def test_bad_settings(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_a_group_of_query_heads_shares_the_rotation_of_its_key_head():
    layer = SoftmaxAttention(C, H, num_kv_heads=2, encoding=PerHead(D, 2)).double()
    whole = SoftmaxAttention(C, H, encoding=PerHead(D, H)).double()
    with torch.no_grad():
        whole.encoding.speed.copy_(layer.encoding.speed.repeat_interleave(2))
        for name in ("k_proj", "v_proj"):
            narrow = getattr(layer, name).weight.view(2, D, C)
            getattr(whole, name).weight.copy_(narrow.repeat_interleave(2, 0).flatten(0, 1))
    whole.q_proj.load_state_dict(layer.q_proj.state_dict())
    torch.testing.assert_close(layer.mixing_matrix(tokens()), whole.mixing_matrix(tokens()), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: SoftmaxAttention(C, H, is_causal=True, encoding=ALiBi(H)),
        lambda: LieAttention(C, H, is_causal=True, encoding=ALiBi(H)),
        lambda: SoftmaxAttention(C, H, is_causal=True, encoding=Backward(H)),
        lambda: LieAttention(C, H, is_causal=True, encoding=ALiBi(H), bias_as="rates"),
    ],
    ids=["softmax", "exp", "contextual", "rates"],
)
@torch.no_grad()
def test_a_cache_knows_positions_by_counting_or_there_is_none(layer):
    layer = layer().double()
    if not layer.can_cache:
        with pytest.raises(CacheError, match="use_cache=False"):
            layer.new_cache(2, N)
        return
    cache = layer.new_cache(2, N)
    parts = [layer(tokens()[:, :3], cache=cache), layer(tokens()[:, 3:], cache=cache)]
    torch.testing.assert_close(torch.cat(parts, 1), layer(tokens()), atol=1e-10, rtol=0)
    cache = layer.new_cache(2, N)
    with pytest.raises(CacheError, match="positions: expected None beside a cache with ALiBi, got some"):
        layer(tokens(), positions=torch.arange(N), cache=cache)
    assert cache.length == 0


@pytest.mark.parametrize("kind", [SoftmaxAttention, LieAttention])
def test_a_bias_acts_beside_masks(kind):
    options = {"time": 0.7} if kind is LieAttention else {}
    layer, bare = (kind(C, H, encoding=encoding, **options).double() for encoding in (ALiBi(H), None))
    bare.load_state_dict(layer.state_dict())
    x, padding = tokens(), (torch.arange(N) < 5).view(1, 1, 1, N)
    slopes = ALiBi(H).slopes().view(H, 1, 1)
    distance = (torch.arange(N)[:, None] - torch.arange(N)).abs()
    bias = (-slopes * distance).masked_fill(~padding, -torch.inf)
    torch.testing.assert_close(layer(x, padding), bare(x, bias), atol=1e-12, rtol=0)


def test_a_converted_layer_keeps_its_bias():
    layer = SoftmaxAttention(C, H, is_causal=True, encoding=ALiBi(H)).double()
    before, matrix = layer(tokens()), layer.mixing_matrix(tokens())
    convert_attention(layer)
    torch.testing.assert_close(layer(tokens()), before, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.mixing_matrix(tokens()), matrix, atol=1e-12, rtol=0)
    with torch.no_grad():
        layer.lie.time += 0.5
        moved = layer(tokens())
        assert (moved - before).abs().max() > 1e-3
        cache = layer.new_cache(2, N)
        parts = [layer(tokens()[:, :3], cache=cache), layer(tokens()[:, 3:], cache=cache)]
    torch.testing.assert_close(torch.cat(parts, 1), moved, atol=1e-9, rtol=0)


@torch.no_grad()
def test_a_transformer_adds_absolute_positions_once():
    model = Transformer(C, 2, H, is_causal=True, encoding={"module": "LearnedEncoding", "num_positions": N}).double()
    bare = Transformer(C, 2, H, is_causal=True, encoding=None).double()
    bare.load_state_dict(model.state_dict(), strict=False)
    assert [name for name in model.state_dict() if name not in bare.state_dict()] == ["absolute.weight"]
    x, table = tokens(), model.absolute.weight
    torch.testing.assert_close(model(x), bare(x + table), atol=1e-12, rtol=0)
    each = torch.stack([torch.arange(N), torch.arange(N).flip(0)]).unsqueeze(1)  # (B, 1, N), as layers take it
    expected = bare(torch.stack([x[0] + table, x[1] + table.flip(0)]))
    torch.testing.assert_close(model(x, positions=each), expected, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="positions: expected numbers < 7 for a table of 7, got 7"):
        model(tokens(2, N + 1, C))


def test_encodings_of_blocks_are_their_own():
    model = Transformer(C, 2, H, encoding={"module": "RotaryEncoding", "layout": "interleaved"})
    first, second = (block.attention.encoding for block in model.blocks)
    assert first is not second
    assert first.layout == "interleaved"


@pytest.mark.parametrize("encoding", [None, {"module": "ALiBi"}, {"module": "SinusoidalEncoding"}])
def test_images_without_places_know_positions_by_the_encoding_alone(encoding):
    model = ImageClassifier({"module": "SoftmaxAttention"}, width=C, num_heads=H, places=False, encoding=encoding)
    image = tokens(1, 16, 4, dtype=torch.float32)
    shuffled = image[:, torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    same = torch.allclose(model(image), model(shuffled), atol=1e-5)
    assert same == (encoding is None)


def test_language_models_say_positions_by_one_recipe():
    named = LanguageModel({"module": "SoftmaxAttention"}, width=C, depth=1, num_heads=H, encoding={"module": "ALiBi"})
    assert isinstance(named.transformer.blocks[0].attention.encoding, ALiBi)
    default = LanguageModel({"module": "SoftmaxAttention"}, width=C, depth=1, num_heads=H)
    assert isinstance(default.transformer.blocks[0].attention.encoding, RotaryEncoding)
    assert default.hparams.encoding == {"module": "RotaryEncoding", "layout": "half_split"}


class OneFor(BiasEncoding):
    """A number per head and key, or per head and query, for all of the others: broadcastable, as the contract allows."""

    def __init__(self, axis: str, *, spelled_out: bool = False) -> None:
        super().__init__(H)
        self.axis, self.spelled_out = axis, spelled_out

    def between(self, here, there):
        bias = 2 * (there if self.axis == "row" else here).cos().expand(self.num_heads, -1, -1)
        return bias + 0 * (here - there) if self.spelled_out else bias


def converted(encoding):
    layer = SoftmaxAttention(C, H, is_causal=True, encoding=encoding)
    convert_attention(layer, time=0.5)
    return layer


@pytest.mark.parametrize(
    "build",
    [
        lambda encoding: SoftmaxAttention(C, H, is_causal=True, encoding=encoding),
        lambda encoding: LieAttention(C, H, is_causal=True, encoding=encoding),
        lambda encoding: LieAttention(C, H, num_kv_heads=2, is_causal=True, encoding=encoding, first_hop=True),
        lambda encoding: LieAttention(C, H, is_causal=True, encoding=encoding, bias_as="rates"),
        converted,
    ],
    ids=["softmax", "exp", "first hop", "rates", "converted"],
)
@pytest.mark.parametrize("axis", ["row", "column"])
@torch.no_grad()
def test_a_bias_with_one_row_or_column_leaves_the_causal_mask(build, axis):
    layer, x = build(OneFor(axis)).double(), tokens()
    same = build(OneFor(axis, spelled_out=True)).double()
    same.load_state_dict(layer.state_dict())
    matrix = layer.mixing_matrix(x)
    assert matrix.triu(1).abs().max() == 0
    torch.testing.assert_close(matrix, same.mixing_matrix(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(layer(x), same(x), atol=1e-12, rtol=0)
    if layer.can_cache:
        cache = layer.new_cache(2, N)
        parts = [layer(x[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, N))]
        torch.testing.assert_close(torch.cat(parts, 1), layer(x), atol=1e-9, rtol=0)


# what a first review found


ENCODINGS = {"alibi": lambda: ALiBi(H), "gate": lambda: ForgettingGate(C, H), "rotary": lambda: PerHead(D, H)}


@pytest.mark.parametrize("options", [{}, {"bias_as": "rates"}], ids=["scores", "rates"])
@pytest.mark.parametrize("build", ENCODINGS.values(), ids=ENCODINGS.keys())
def test_the_generator_of_a_layer_has_its_positions(build, options):
    if options and isinstance(build(), RotationEncoding):
        return
    layer = LieAttention(C, H, is_causal=True, encoding=build(), **options).double()
    for at in (None, torch.arange(N) * 2):
        generator = layer.generator(tokens(), positions=at)
        mixing = layer.mixing_matrix(tokens(), positions=at)
        flow = transition_matrix(generator, layer.flow.flow_time().detach())
        torch.testing.assert_close(flow, mixing, atol=2e-3, rtol=0)  # the layer leaves a tail of hops
        (of_flows, _), *_ = layer.flows(tokens(), at).values()
        torch.testing.assert_close(of_flows.dense(), generator.dense(), atol=1e-12, rtol=0)


def test_a_converted_layer_shows_the_generator_that_it_runs():
    layer = SoftmaxAttention(C, H, is_causal=True, encoding=ALiBi(H)).double()
    convert_attention(layer)
    with torch.no_grad():
        layer.lie.time += 0.7
        wanted = layer.mixing_matrix(tokens())
        generator, time = layer.flows(tokens())["Q"]
        chain = generator.jump_chain()
        torch.testing.assert_close(chain @ transition_matrix(generator, time), wanted, atol=2e-3, rtol=0)
        seen = []
        with layer.lie.register_forward_pre_hook(lambda _, a, k: seen.append((a, k)), with_kwargs=True):
            layer(tokens())
        arguments, options = seen[0]
        look = look_at_flow(layer.lie, 2, N, *arguments, **options)
    torch.testing.assert_close(look.mixing, wanted.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("start", [0, 3])
def test_padding_has_no_share_in_positional_rates(start):
    layer = LieAttention(C, H, encoding=ALiBi(H), bias_as="rates").double()
    x, kept = tokens(), slice(start, start + 4)
    mask = torch.zeros(1, 1, 1, N, dtype=torch.bool)
    mask[..., kept] = True
    for given in (mask, torch.zeros_like(mask, dtype=torch.float64).masked_fill(~mask, -torch.inf)):
        # Hops are as many as the largest rate of all tokens asks for.
        torch.testing.assert_close(layer(x, given)[:, kept], layer(x[:, kept]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "encoding", [RotaryEncoding(D, layout="half_split"), ALiBi(H), PerHead(D, H)], ids=["rotary", "alibi", "per head"]
)
@pytest.mark.parametrize("kind", [SoftmaxAttention, LieAttention])
def test_positions_of_two_dimensions_are_refused(kind, encoding):
    """They could be of items or of heads, and are both where there are as many."""
    layer = kind(C, H, encoding=encoding).double()
    x = tokens(H, N, C)
    with pytest.raises(ShapeError, match=r"positions: expected \(7\) or \(4, 1, 7\), got \(4, 7\); index them as"):
        layer(x, positions=torch.arange(N).expand(H, N))
    with pytest.raises(TypeError, match=r"positions: expected a tensor, got list; use torch.as_tensor"):
        layer(x, positions=[0, 1])


@pytest.mark.parametrize("kind", [SoftmaxAttention, LieAttention])
def test_a_mask_of_integers_is_refused_beside_a_bias(kind):
    layer = kind(C, H, encoding=ALiBi(H)).double()
    with pytest.raises(ValueError, match=r"attn_mask: expected torch.bool .* got torch.int64; convert it"):
        layer(tokens(), torch.ones(N, N, dtype=torch.long))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (
            lambda: SoftmaxAttention(C, H, encoding=T5Bias(H, is_causal=True)),
            r"is_causal=False as the layer's, got T5Bias",
        ),
        (
            lambda: SoftmaxAttention(C, H, is_causal=True, encoding=T5Bias(H, is_causal=False)),
            r"is_causal=True as the layer's, got T5Bias with False; build it",
        ),
        (
            lambda: SoftmaxAttention(C, H, encoding=XPos(D, layout="half_split")),
            r"is_causal=True beside XPos, got False",
        ),
    ],
)
def test_directions_are_those_of_the_mask(build, match):
    with pytest.raises(MaskError, match=match):
        build()


def test_positions_do_not_decay():
    model = Transformer(C, 1, H, encoding={"module": "MixedRotary", "axes": 1, "layout": "half_split"}, is_causal=True)
    optimizer = build_optimizer(model, 1e-2, weight_decay=0.1)
    decaying = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    frequencies = model.blocks[0].attention.encoding.frequencies
    assert decaying
    assert id(frequencies) not in decaying
    assert id(model.blocks[0].attention.q_proj.weight) in decaying


@pytest.mark.parametrize("encoding", [CayleyString(D, H), LieRotary(D, H, block=4), AxialBlocks(D, H, block=4)])
def test_learned_rotations_compile_into_one_graph(encoding):
    layer = SoftmaxAttention(C, H, is_causal=True, encoding=encoding)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = tokens(dtype=torch.float32)
    torch.testing.assert_close(compiled(x), layer(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "encoding", [{"module": "CayleyString"}, {"module": "LieRotary", "block": 4}, {"module": "ALiBi"}]
)
@pytest.mark.parametrize("module", ["SoftmaxAttention", "LieAttention"])
def test_grouped_heads_by_recipe(module, encoding):
    model = Transformer(C, 2, 4, {"module": module, "num_kv_heads": 2}, is_causal=True, encoding=encoding)
    assert all(block.attention.num_kv_heads == 2 for block in model.blocks)
    assert torch.isfinite(model(torch.randn(1, N, C))).all()


def test_a_class_of_ones_own_by_its_path():
    named = build_encoding({"module": "liegroup_attn.positional.alibi.ALiBi"}, C, H)
    assert type(named) is ALiBi


class Passing(ALiBi):
    """Leaves its arguments to its base."""

    def __init__(self, num_heads, **more):
        super().__init__(num_heads, **more)


def test_a_class_that_passes_its_arguments_on(monkeypatch):
    monkeypatch.setattr("liegroup_attn.positional.alibi.Passing", Passing, raising=False)
    assert build_encoding({"module": "liegroup_attn.positional.alibi.Passing"}, C, H).num_heads == H
