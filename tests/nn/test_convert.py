"""convert_attention: what it finds, keeps and reports; equal at the start, all the way back, and what it refuses."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from liegroup_attn.errors import ConversionError, GeneratorError
from liegroup_attn.lightning import LanguageModel
from liegroup_attn.nn import (
    LieFlow,
    LieMultiheadAttention,
    SoftmaxAttention,
    Transformer,
    convert_attention,
    restore_attention,
)

C, H, N = 16, 2, 6


class Detector(nn.Module):
    """Somebody's model: positions on queries and keys but not on values, one layer used twice, a tied head, a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, C)
        self.shared = nn.MultiheadAttention(C, H, batch_first=True)
        self.again = self.shared
        self.across = nn.MultiheadAttention(C, H, kdim=5, vdim=5, batch_first=True)
        self.head = nn.Linear(C, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.calls = 0
        self.shared.register_forward_hook(self._count)

    def _count(self, *_) -> None:
        self.calls += 1

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in (self.shared, self.again):
            placed = x + torch.linspace(0, 1, N).unsqueeze(-1)
            x = x + layer(placed, placed, x, need_weights=False)[0]
        memory = x[..., :5]
        x = x + self.across(x, memory, memory)[0]
        return self.head(x)


def seq2seq() -> nn.Transformer:
    return nn.Transformer(C, H, 2, 2, 32, dropout=0.0, batch_first=True)


def x() -> torch.Tensor:
    return torch.randn(3, N, C, generator=torch.Generator().manual_seed(0))


MODELS = {
    "attention": (lambda: nn.MultiheadAttention(C, H, batch_first=True), lambda m: m(*[x()] * 3)[0]),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(C, H, 32, dropout=0.0, batch_first=True), 2),
        lambda m: m(x()),
    ),
    "pre-norm, gelu": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(C, H, 32, 0.0, "gelu", batch_first=True, norm_first=True),
            2,
            enable_nested_tensor=False,
        ),
        lambda m: m(x()),
    ),
    "seq2seq": (seq2seq, lambda m: m(x(), x()[:, :4])),
    "somebody's": (Detector, lambda m: m(torch.arange(3 * N).view(3, N) % 11)),
    "ours": (lambda: Transformer(C, 2, H, is_causal=True), lambda m: m(x())),
}
models = pytest.mark.parametrize(("build", "call"), MODELS.values(), ids=MODELS)


@pytest.fixture(autouse=True)
def _warnings_of_other_people():
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nested tensors is in prototype.*")
        yield


@models
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("clock", [None, "ExponentialClock"])
def test_equal_at_the_start_and_all_the_way_back(build, call, training, clock):
    torch.manual_seed(0)
    model = build().train(training)
    original, expected = copy.deepcopy(model), call(model)
    parameters, classes = dict(model.named_parameters()), [type(m) for m in model.modules()]
    report = convert_attention(model, clock=clock)
    assert report.converted
    assert all(m.training == training for m in model.modules())
    torch.testing.assert_close(call(model), expected, atol=2e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(call(model), expected, atol=2e-6, rtol=1e-5)
    found = dict(model.named_parameters())
    assert all(found[name] is parameter for name, parameter in parameters.items())  # optimizers keep what they hold
    added = set(found) - set(parameters)
    assert added
    assert all(re.search(r"(^|\.)lie\.(time|rate_weight|rate_bias)$", name) for name in added)

    back = restore_attention(model)
    assert back.converted == report.converted
    assert [type(m) for m in model.modules()] == classes
    assert model.state_dict().keys() == original.state_dict().keys()
    torch.testing.assert_close(call(model), call(original), rtol=0, atol=0)
    if isinstance(model, nn.TransformerEncoder):
        assert model.use_nested_tensor == original.use_nested_tensor


@models
def test_it_trains(build, call):
    """A plain optimizer finds its way to a model in which time passes; rates follow once it does."""
    torch.manual_seed(0)
    model = build()
    convert_attention(model, max_time=4.0)
    flows = [m for m in model.modules() if isinstance(m, LieFlow)]
    steps = torch.optim.AdamW([p for flow in flows for p in flow.parameters()], lr=5e-2)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for flow in (m for m in teacher.modules() if isinstance(m, LieFlow)):
            flow.time.fill_(1.5)
        target = call(teacher)
    losses = []
    for _ in range(30):
        steps.zero_grad()
        loss = (call(model) - target).square().mean()
        loss.backward()
        steps.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(float(flow.flow_time().detach().max()) > 0 for flow in flows)
    assert all(flow.rate_weight.any() for flow in flows)


def test_the_report():
    model = seq2seq()
    report = convert_attention(model, exclude="encoder.layers.0*")
    assert report.converted == [
        "encoder.layers.1.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.1.self_attn",
    ]
    assert report.kept == {
        "encoder.layers.0.self_attn": "in exclude",
        "decoder.layers.0.multihead_attn": "cross-attention: only time 0 exists",
        "decoder.layers.1.multihead_attn": "cross-attention: only time 0 exists",
    }
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "class", "outcome", "why"]
    assert len(lines) == 2 + 6
    assert lines[2].split() == ["encoder.layers.0.self_attn", "MultiheadAttention", "kept", "in", "exclude"]
    assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention


def test_include_and_exclude():
    model = seq2seq()
    report = convert_attention(model, include=["encoder.*", "decoder.layers.1.*"], exclude="*.0.self_attn")
    assert report.converted == ["encoder.layers.1.self_attn", "decoder.layers.1.self_attn"]
    again = convert_attention(model)  # the rest; what is converted stays as it is
    assert again.converted == ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn"]
    assert [layer.outcome for layer in again.layers].count("already converted") == 2
    for pattern in ({"include": "encoder.layer.*"}, {"exclude": ["decoder.*", "no such"]}):
        with pytest.raises(ConversionError, match="fits none"):
            convert_attention(seq2seq(), **pattern)


def test_idempotent():
    model = seq2seq()
    convert_attention(model, max_time=3.0)
    with torch.no_grad():
        model.encoder.layers[0].self_attn.lie.time.fill_(0.7)
    before = copy.deepcopy(model.state_dict())
    report = convert_attention(model, max_time=5.0)
    assert not report.converted
    assert {layer.outcome for layer in report.layers} == {"already converted", "kept"}
    assert model.encoder.layers[0].self_attn.lie.max_time == 3.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_ties_hooks_and_one_layer_in_two_places_stay():
    model = Detector()
    report = convert_attention(model)
    assert report.converted == ["shared"]
    assert report.kept == {"across": "kdim or vdim: S is not square, only time 0 exists"}
    assert model.shared is model.again
    assert model.head.weight is model.embedding.weight
    model(torch.zeros(1, N, dtype=torch.long))
    assert model.calls == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_of_every_layer(dtype):
    model = seq2seq().to(dtype)
    model.decoder.float()
    convert_attention(model)
    assert {p.dtype for p in model.encoder.parameters()} == {dtype}
    assert {p.dtype for p in model.decoder.parameters()} == {torch.float32}


def test_devices_differ_layer_by_layer():
    model = nn.ModuleList([nn.MultiheadAttention(C, H), nn.MultiheadAttention(C, H, device="meta")])
    convert_attention(model)
    assert [m.lie.time.device.type for m in model] == ["cpu", "meta"]


def test_frozen_models_learn_the_flow_only():
    model = seq2seq().requires_grad_(False)
    convert_attention(model)
    wanted = [name for name, p in model.named_parameters() if p.requires_grad]
    assert wanted
    assert all(".lie." in name for name in wanted)
    model(x(), x()[:, :4]).square().sum().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if ".lie." not in name)
    assert all(p.grad.any() for name, p in model.named_parameters() if name.endswith("lie.time"))


def test_a_checkpoint_of_the_other_kind_says_which_keys():
    plain, converted = seq2seq(), seq2seq()
    convert_attention(converted)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*lie\.time"):
        plain.load_state_dict(converted.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*lie\.time"):
        converted.load_state_dict(plain.state_dict())
    converted.load_state_dict(plain.state_dict(), strict=False)  # the stated way in: softmax attention to start from
    torch.testing.assert_close(converted(x(), x()), plain(x(), x()), atol=2e-6, rtol=1e-5)
    assert not converted.encoder.layers[0].self_attn.lie.time.any()


def test_checkpoints_of_converted_models():
    one, other = seq2seq(), seq2seq()
    for model in (one, other):
        convert_attention(model, clock="ExponentialClock", max_time=3.0)
    with torch.no_grad():
        for name, p in one.named_parameters():
            if ".lie." in name:
                p.uniform_(0.1, 0.9)
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(one(x(), x()), other(x(), x()), rtol=0, atol=0)
    twin = copy.deepcopy(one)
    torch.testing.assert_close(one(x(), x()), twin(x(), x()), rtol=0, atol=0)


class _Own(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Linear(2, 2), "inside, got none"),
        (nn.MultiheadAttention(C, H, add_bias_kv=True), "add_bias_kv: S is not square"),
        (nn.MultiheadAttention(C, H, add_zero_attn=True), "add_zero_attn: S is not square"),
        (_Own(C, H), "a subclass"),
        (nn.Sequential(nn.MultiheadAttention(C, H, kdim=3)), "kdim or vdim"),
    ],
)
def test_nothing_to_convert(model, reason):
    before = [type(m) for m in model.modules()]
    with pytest.raises(ConversionError, match=reason):
        convert_attention(model)
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize(
    ("options", "error"),
    [({"time": -1.0}, GeneratorError), ({"clock": "Erlang"}, GeneratorError), ({"no_such": 1}, TypeError)],
)
def test_wrong_options_change_nothing(options, error):
    model = seq2seq()
    with pytest.raises(error):
        convert_attention(model, **options)
    assert not any(isinstance(m, LieMultiheadAttention) for m in model.modules())


def test_nothing_to_restore():
    with pytest.raises(ConversionError, match="nothing to restore"):
        restore_attention(seq2seq())


def test_a_forward_that_leaves_modules_out_is_told():
    model = nn.ModuleDict({"used": nn.MultiheadAttention(C, H, batch_first=True), "idle": nn.MultiheadAttention(C, H)})
    model.forward = lambda y: model["used"](y, y, y)
    with pytest.raises(ConversionError, match=r"leaves out \['idle'\]"):
        convert_attention(model, example_inputs=(x(),))
    assert type(model["used"]) is nn.MultiheadAttention  # an error leaves the model as it was
    model.train()
    report = convert_attention(model, exclude="idle", example_inputs=(x(),))
    assert report.converted == ["used"]
    assert model.training


def test_our_own_attention_decodes_after_a_conversion():
    torch.manual_seed(0)
    model = LanguageModel({"module": "SoftmaxAttention"}, vocab_size=19, width=C, depth=2, num_heads=H).eval()
    tokens = torch.randint(19, (2, 5))
    expected = model.generate(tokens, 6, temperature=0.0)
    convert_attention(model, max_time=2.0)
    assert torch.equal(model.generate(tokens, 6, temperature=0.0), expected)
    for flow in (m for m in model.modules() if isinstance(m, LieFlow)):
        with torch.no_grad():
            flow.time.uniform_(0.5, 1.5)
            flow.rate_weight.normal_()
    cached = model.generate(tokens, 6, temperature=0.0)
    assert torch.equal(cached, model.generate(tokens, 6, temperature=0.0, use_cache=False))
    layer = model.transformer.blocks[0].attention
    assert type(layer) is SoftmaxAttention
    assert layer.flow is layer.lie
    assert type(layer.lie) is LieFlow
    mixing = layer.mixing_matrix(torch.randn(2, N, C))
    torch.testing.assert_close(mixing.sum(-1), torch.ones(2, H, N))
    (generator, time) = layer.flows(torch.randn(2, N, C))["Q"]
    assert generator.check()[0]
    assert torch.equal(time, layer.lie.flow_time())


def test_it_sits_in_any_module_of_ours():
    layer = SoftmaxAttention(C, H, num_kv_heads=1, is_causal=True)
    expected = layer(x())
    convert_attention(layer)
    torch.testing.assert_close(layer(x()), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("pattern", ["shared", "again"])
def test_a_layer_in_two_places_is_named_by_either(pattern):
    model = Detector()
    with pytest.raises(ConversionError, match="in exclude"):
        convert_attention(model, exclude=pattern)
    assert convert_attention(Detector(), include=pattern).converted == ["shared"]


def test_classes_that_were_changed_after_the_conversion():
    """Parametrizations make a class of their own: it is told, not lost."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(C, H, 32, batch_first=True), 2)
    convert_attention(model)
    nn.utils.parametrize.register_parametrization(model.layers[0].self_attn, "in_proj_weight", nn.Identity())
    assert [layer.outcome for layer in convert_attention(model).layers] == ["already converted"] * 2
    report = restore_attention(model)
    assert report.converted == ["layers.1.self_attn"]
    assert "parametrizations" in report.kept["layers.0.self_attn"]
    assert not model.use_nested_tensor


def test_not_under_inference_mode():
    with torch.inference_mode(), pytest.raises(ConversionError, match="inference_mode"):
        convert_attention(nn.MultiheadAttention(C, H))


def test_a_misspelt_option_lists_those_there_are():
    with pytest.raises(TypeError, match=r"expected names of .*'max_time'.*, got \['maxtime'\]"):
        convert_attention(seq2seq(), maxtime=2.0)
