"""ManifoldPrecision: points stay in single precision and unrounded, the rest is in half."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from manifold_training import QUIET, Places
from torch import nn

from liegroup_attn import ErlangClock, ExponentialClock
from liegroup_attn.lightning import LanguageModel, ManifoldGuard, ManifoldPrecision
from liegroup_attn.manifolds import ManifoldParameter, OpenInterval, Sphere, Stiefel, hold, off_manifold
from liegroup_attn.nn import LieAttention

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
    assert layer.time.is_meta
    assert layer.time.dtype == torch.float32
    assert layer.rate_weight.dtype == torch.bfloat16


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
    assert layer.time.dtype == layer.time.grad.dtype == torch.float32
    assert half.dtype == layer.rate_weight.dtype == layer.rate_weight.grad.dtype == torch.bfloat16
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
    time = model.transformer.blocks[0].attention.time
    assert time.dtype == torch.float32
    assert not torch.equal(time, torch.full((2, 1), 1.3))
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
