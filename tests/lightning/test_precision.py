"""ManifoldPrecision: points stay in single precision and unrounded, the rest is in half."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from manifold_training import QUIET, Places
from torch import nn

from liegroup_attn import ErlangClock, ExponentialClock
from liegroup_attn.lightning import (
    ConvertAttention,
    FineTune,
    LanguageModel,
    LieConversion,
    ManifoldGuard,
    ManifoldPrecision,
    build_optimizer,
)
from liegroup_attn.lightning.stored_flows import warn_of_rounded_flows
from liegroup_attn.manifolds import ManifoldParameter, OpenInterval, Sphere, Stiefel, hold, off_manifold
from liegroup_attn.nn import LieAttention, LieFlow, convert_attention

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


def trainer(*callbacks: L.Callback, **options) -> L.Trainer:
    defaults = {"accelerator": "cpu", "max_steps": 3, "logger": False, "enable_checkpointing": False} | QUIET
    return L.Trainer(callbacks=list(callbacks), **(defaults | options))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_values_are_kept_before_they_are_rounded(precision):
    model, expected = Places(), {name: p.detach().clone() for name, p in Places().held().items()}
    model.points.sphere.data.mul_(3)
    converted = ManifoldPrecision(precision).convert_module(model)
    half = {"bf16-true": torch.bfloat16, "16-true": torch.float16}[precision]
    assert converted is model
    assert model.net[0].weight.dtype == model.targets.sphere.dtype == half
    for name, point in model.held().items():
        assert isinstance(point, ManifoldParameter)
        assert point.dtype == torch.float32
        torch.testing.assert_close(point.detach(), expected[name], atol=1e-7, rtol=1e-6)
        assert torch.equal(point, expected[name]) or name == "sphere"


def test_a_rounded_point_is_projected_in_single_precision():
    module = nn.Module()
    frame = hold(module, "frame", torch.linalg.qr(torch.randn(4, 5, 3)).Q, Stiefel()).double()
    module.bfloat16()
    ManifoldPrecision("bf16-true").convert_module(module)
    assert module.frame.dtype == torch.float32
    assert off_manifold(module.frame, module.frame.manifold) <= 1e-6
    torch.testing.assert_close(module.frame.detach().double(), frame.detach(), atol=2e-2, rtol=0)


def test_double_stays_double():
    module = nn.Module()
    hold(module, "time", torch.ones(2, dtype=torch.float64), OpenInterval(2.0))
    assert ManifoldPrecision("bf16-true").convert_module(module).time.dtype == torch.float64


WAYS = {  # how torch converts modules
    "data": (False, False),
    "overwrite": (True, False),
    "swap": (False, True),
}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def conversion(request):
    future = torch.__future__
    before = future.get_overwrite_module_params_on_conversion(), future.get_swap_module_params_on_conversion()
    future.set_overwrite_module_params_on_conversion(request.param[0])
    future.set_swap_module_params_on_conversion(request.param[1])
    yield
    future.set_overwrite_module_params_on_conversion(before[0])
    future.set_swap_module_params_on_conversion(before[1])


@pytest.mark.usefixtures("conversion")
def test_however_torch_converts_modules():
    model = Places()
    model.free = ManifoldParameter(torch.tensor([0.6, 0.8]), manifold=Sphere())
    model.free.requires_grad_(False)
    expected = {name: p.detach().clone() for name, p in (model.held() | {"free": model.free}).items()}
    ManifoldPrecision("bf16-true").convert_module(model)
    assert model.net[0].weight.dtype == torch.bfloat16
    for name, point in (model.held() | {"free": model.free}).items():
        assert type(point) is ManifoldParameter
        assert torch.equal(point.detach(), expected[name])
        assert point.requires_grad == (name != "free")
    assert isinstance(model.free.manifold, Sphere)


def test_points_without_values_are_left_so():
    with torch.device("meta"):
        layer = LieAttention(8, 2)
    ManifoldPrecision("bf16-true").convert_module(layer)
    assert layer.flow.time.is_meta
    assert layer.flow.time.dtype == torch.float32
    assert layer.flow.rate_weight.dtype == torch.bfloat16


class Late(Places):
    """Made in configure_model."""

    def build(self) -> None:
        pass

    def configure_model(self) -> None:
        if not hasattr(self, "points"):
            super().build()


def test_modules_made_in_configure_model():
    starts = []

    class Start(L.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            starts.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    for model in (Late(), Places()):
        trainer(ManifoldGuard(), Start(), plugins=ManifoldPrecision("bf16-true")).fit(model)
        assert model.points.sphere.dtype == torch.float32
    late, early = starts
    for name, value in early.items():
        assert late[name].dtype == value.dtype
        assert torch.equal(late[name], value), name
    fitted = trainer(plugins=ManifoldPrecision("bf16-true"))
    with fitted.init_module():
        assert Places().points.sphere.dtype == torch.float32


# Lie attention with a time in float32 and all else in half

LAYERS = {
    "fixed": {},
    "causal": {"is_causal": True},
    "long": {"time": 8.0},
    "resolvent": {"first_hop": True, "is_causal": True, "clock": ExponentialClock()},
    "Erlang": {"clock": ErlangClock(3)},
    "rate_fn": {"rate_fn": torch.exp},
}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_lie_attention_gives_half_precision(options):
    layer = LieAttention(16, 2, **options)
    x = torch.randn(2, 5, 16)
    full = layer(x)
    ManifoldPrecision("bf16-true").convert_module(layer)
    half = layer(x.bfloat16())
    half.float().square().sum().backward()
    assert layer.flow.time.dtype == layer.flow.time.grad.dtype == torch.float32
    assert half.dtype == layer.flow.rate_weight.dtype == layer.flow.rate_weight.grad.dtype == torch.bfloat16
    assert float((half.float() - full).abs().max() / full.abs().max()) < 3e-2
    assert layer.mixing_matrix(x.bfloat16()).dtype == torch.bfloat16


class Bytes(LanguageModel):
    def train_dataloader(self):
        text = torch.randint(256, (6, 2, 13))
        return torch.utils.data.DataLoader([{"tokens": t[:, :-1], "targets": t[:, 1:]} for t in text], batch_size=None)


def test_a_language_model_trains_resumes_and_generates(tmp_path):
    model = Bytes({"module": "LieAttention", "time": 1.3}, width=16, depth=1, num_heads=2)
    fitted = trainer(ManifoldGuard(), plugins=ManifoldPrecision("bf16-true"), max_steps=5)
    fitted.fit(model)
    time = model.transformer.blocks[0].attention.flow.time
    assert time.dtype == torch.float32
    assert not torch.equal(time, torch.full((2,), 1.3))
    assert all(p.dtype == torch.bfloat16 for name, p in model.named_parameters() if not name.endswith("time"))
    assert fitted.optimizers[0].state[time]["exp_avg"].dtype == torch.float32
    assert fitted.optimizers[0].state[model.head.weight]["exp_avg"].dtype == torch.bfloat16
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    again = Bytes({"module": "LieAttention", "time": 1.3}, width=16, depth=1, num_heads=2)
    plugin = ManifoldPrecision("bf16-true")
    trainer(plugins=plugin).fit(again, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert model.eval().generate(torch.zeros(1, 3, dtype=torch.long), 4, temperature=0.0).shape == (1, 7)


# flows, whose times are plain parameters


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True, dropout=0.0), 1)


def error(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Of an output that is the mean of the tokens."""
    found = model(batch.to(model.layers[0].linear1.weight.dtype)).float()
    return (found - batch.mean(1, keepdim=True)).square().mean()


class Theirs(L.LightningModule):
    def __init__(self, convert: bool = False) -> None:
        super().__init__()
        self.model = encoder()
        if convert:
            convert_attention(self.model, time=0.5)

    def training_step(self, batch, index):
        return error(self.model, batch)

    def configure_optimizers(self):
        return build_optimizer(self, 1e-4)


class Ours(LieConversion, Theirs):
    lie_attention = {"time": 0.5}  # noqa: RUF012


class Tuned(FineTune):
    def __init__(self) -> None:
        model = encoder()
        convert_attention(model, time=0.5)
        super().__init__(model, lie_learning_rate=1e-4)

    def training_step(self, batch, index):
        return error(self.model, batch)


ROADS = {  # module and callbacks by which a flow comes into a fit
    "LieConversion": (Ours, []),
    "LieConversion and guard": (Ours, [ManifoldGuard]),
    "ConvertAttention": (Theirs, [lambda: ConvertAttention(time=0.5)]),
    "FineTune": (Tuned, []),
    "convert_attention and guard": (lambda: Theirs(convert=True), [ManifoldGuard]),
}


def flow_after(road: str, **options) -> tuple[LieFlow, list[str]]:
    new, callbacks = ROADS[road]
    module = new()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # as in an interpreter: the same words once
        data = torch.utils.data.DataLoader(torch.randn(40, 5, 8, generator=torch.Generator().manual_seed(0)), 2)
        trainer(*(new() for new in callbacks), max_steps=20, **options).fit(module, data)
    (flow,) = (m for m in module.modules() if isinstance(m, LieFlow))
    return flow, [str(w.message) for w in caught if "flows in float32" in str(w.message)]


@pytest.mark.parametrize("road", ROADS)
def test_times_learn_in_single_precision(road):
    """bf16-true alone leaves them at their start, and says so once."""
    frozen, warned = flow_after(road, precision="bf16-true")
    assert frozen.time.dtype == torch.bfloat16
    assert (frozen.time == 0.5).all()
    (sentence,) = warned
    assert ".lie." in sentence
    assert sentence.endswith('stay at their start; train with Trainer(plugins=ManifoldPrecision("bf16-true"))')
    moving, warned = flow_after(road, plugins=ManifoldPrecision("bf16-true"))
    assert warned == []
    assert {p.dtype for p in moving.parameters()} == {torch.float32}
    reference, warned = flow_after(road)
    assert warned == []
    assert ((reference.time - 0.5).abs() > 4e-4).any()
    torch.testing.assert_close(moving.time, reference.time, atol=3e-4, rtol=0)


def test_only_flows_that_learn_are_warned_of():
    module = Theirs(convert=True).bfloat16()
    for flow in (m for m in module.modules() if isinstance(m, LieFlow)):
        flow.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_rounded_flows(module)
    with pytest.warns(UserWarning, match=r'model\.layers\.0\.self_attn\.lie\.time: expected .*"16-true"'):
        warn_of_rounded_flows(Theirs(convert=True).half())


@pytest.mark.usefixtures("conversion")
def test_flows_stay_however_torch_converts_modules():
    module = Theirs(convert=True)
    flow = module.model.layers[0].self_attn.lie
    before = {name: p.detach().clone() for name, p in flow.named_parameters()}
    ManifoldPrecision("bf16-true").convert_module(module)
    assert module.model.layers[0].linear1.weight.dtype == torch.bfloat16
    for name, value in before.items():
        assert torch.equal(flow.get_parameter(name), value)
        assert flow.get_parameter(name).dtype == torch.float32
