"""ManifoldGuard: what it refuses, projects and logs; and that it does nothing where nothing is declared."""

from __future__ import annotations

import copy
import csv
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import geoopt
import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from manifold_training import BATCHES, MANIFOLDS, QUIET, Places
from torch import nn
from torch.distributed.fsdp import fully_shard

from liegroup_attn.errors import DtypeError, GeneratorError
from liegroup_attn.lightning import LanguageModel, ManifoldGuard, RiemannianAdamW, build_optimizer, replicate
from liegroup_attn.lightning.guard import checked
from liegroup_attn.manifolds import ManifoldParameter, Sphere, Stiefel, declared, hold, off_manifold

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


def trainer(*callbacks: L.Callback, **options) -> L.Trainer:
    defaults = {"accelerator": "cpu", "max_steps": 3, "logger": False, "enable_checkpointing": False} | QUIET
    return L.Trainer(callbacks=list(callbacks), **(defaults | options))


# what is refused when a fit starts


class Refused(NamedTuple):
    spoil: Callable[[Places], None]
    message: str
    options: dict = {}  # noqa: RUF012
    error: type[Exception] = GeneratorError


def plain_and_forgotten(model):
    """After setup, where the guard would have mended it."""
    model.configure_model = lambda: setattr(model.points, "sphere", nn.Parameter(model.points.sphere.detach()))
    model.configure_optimizers = lambda: RiemannianAdamW(model.parameters(), lr=1e-2)


def replaced_behind_the_optimizer(model):
    def configure():
        optimizer = build_optimizer(model, 1e-2)
        hold(model.points, "sphere", model.points.sphere, Sphere())
        return optimizer

    model.configure_optimizers = configure


def euclidean(model):
    model.configure_optimizers = lambda: torch.optim.AdamW(model.parameters(), weight_decay=0.0)


def penalized(model):
    model.configure_optimizers = lambda: geoopt.optim.RiemannianAdam(model.parameters(), weight_decay=0.1)


def undeclared(model):
    model.free = ManifoldParameter(torch.tensor([0.6, 0.8]), manifold=Sphere())
    model.configure_optimizers = lambda: build_optimizer(model.points, 1e-2)


REFUSED = {
    "plain": Refused(
        plain_and_forgotten, r"points.sphere: expected a ManifoldParameter on Sphere.*, got Parameter; call"
    ),
    "not in the optimizer": Refused(
        replaced_behind_the_optimizer, r"points.sphere: expected in the optimizer, got none that holds this very param"
    ),
    "Euclidean": Refused(
        euclidean, r"points.interval: expected a Riemannian optimizer, got AdamW; use build_optimizer"
    ),
    "decay": Refused(penalized, r"points.interval: expected decay 0 on a manifold, got 0.1; put it in a group"),
    "undeclared": Refused(undeclared, r"free: expected in the optimizer, got none"),
    "half": Refused(
        lambda model: None,
        r'points.interval: expected float32 or float64 .*, got torch.bfloat16; train with .*ManifoldPrecision\("bf16',
        {"precision": "bf16-true"},
        DtypeError,
    ),
    "float16": Refused(
        lambda model: None,
        r'points.interval: expected float32 or float64 .*, got torch.float16; train with .*ManifoldPrecision\("16-true',
        {"precision": "16-true"},
        DtypeError,
    ),
    "NaN": Refused(
        lambda model: model.points.sphere.data.fill_(math.nan), r"points.sphere: expected a point of Sphere.*, got NaN"
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused(case):
    model = Places()
    case.spoil(model)
    with pytest.raises(case.error, match=case.message):
        trainer(ManifoldGuard(), **case.options).fit(model)


def test_sharded_points_are_refused(tmp_path):
    """fully_shard turns them into plain DTensors; with replicate's set it does not."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Places()
        fully_shard(model)
        with pytest.raises(
            GeneratorError, match=r"points.interval: expected a ManifoldParameter .*, got DTensor; .*replic"
        ):
            checked(model, [])
        with pytest.raises(
            GeneratorError, match=r"points.interval: expected a parameter on .*, got DTensor; keep it out"
        ):
            build_optimizer(model, 1e-2)
        model = Places()
        whole = replicate(model)
        fully_shard(model, ignored_params=whole)
        assert {id(p) for p in checked(model, []).values()} == {id(p) for p in whole}
        assert len(whole) == len(MANIFOLDS)
    finally:
        dist.destroy_process_group()


def test_every_n_steps_is_positive():
    with pytest.raises(ValueError, match="every_n_steps: expected at least 1, got 0; raise it"):
        ManifoldGuard(every_n_steps=0)


def test_a_plain_parameter_is_mended_before_the_optimizer_is_built():
    model = Places()
    model.points.sphere = nn.Parameter(model.points.sphere.detach())
    with pytest.warns(UserWarning, match="points.sphere: expected parameters on their manifolds, got plain ones"):
        trainer(ManifoldGuard()).fit(model)
    assert isinstance(model.points.sphere, ManifoldParameter)
    assert model.distance() <= 1e-6


def test_a_frozen_parameter_needs_no_optimizer():
    model = Places()
    model.points.sphere.requires_grad_(False)
    trainer(ManifoldGuard()).fit(model)


class Astray(Places):
    """A point that nobody declared, off its manifold."""

    def build(self) -> None:
        super().build()
        self.frame = ManifoldParameter(2 * torch.randn(3, 3), manifold=Stiefel())

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.frame.square().sum()


def test_a_point_that_starts_off_its_manifold_is_projected():
    seen = []

    class Start(L.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            seen.append(float(off_manifold(pl_module.frame, Stiefel())))

    with pytest.warns(UserWarning, match=r"frame: expected a point of Stiefel.*, got one that is .* off; it was proj"):
        trainer(ManifoldGuard(), Start()).fit(Astray())
    assert seen[0] <= 1e-6


# gradients


class Diverges(Places):
    """At its second step the gradient of the frame is not finite."""

    bad = math.nan

    def on_before_zero_grad(self, optimizer) -> None:
        if self.global_step == 1:
            self.points.stiefel.register_hook(lambda grad: grad * self.bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_ends_the_fit(bad):
    model = Diverges()
    model.bad = bad
    with pytest.raises(
        GeneratorError, match=r"points.stiefel: expected a finite gradient, got NaN or inf; .*Lower the"
    ):
        trainer(ManifoldGuard(), gradient_clip_val=1.0).fit(model)
    assert model.distance() <= 1e-6


class FreeDiverges(Places):
    """At its second step the gradient of a free parameter is not finite."""

    bad = math.nan

    def on_before_zero_grad(self, optimizer) -> None:
        if self.global_step == 1:
            self.net[0].weight.register_hook(lambda grad: grad * self.bad)


class ClipsItself(FreeDiverges):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        self.clip_gradients(optimizer, 1.0, "norm")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("kind", "clip"), [(FreeDiverges, 1.0), (ClipsItself, None)])
def test_clipping_does_not_spread_nan(bad, kind, clip):
    model = kind()
    model.bad = bad
    with pytest.raises(GeneratorError, match=r"net.0.weight: expected a finite gradient, got NaN or inf"):
        trainer(ManifoldGuard(), gradient_clip_val=clip).fit(model)
    assert model.distance() <= 1e-6


def test_without_clipping_nan_stays_with_the_free_parameter():
    model = FreeDiverges()
    trainer(ManifoldGuard()).fit(model)
    assert model.net[0].weight.isnan().any()
    assert model.distance() <= 1e-6


@pytest.mark.parametrize("clip", [None, 1.0])
def test_under_a_gradient_scaler_it_is_the_scalers_business(clip):
    model, plugin = (
        Diverges(),
        L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0)),
    )
    fitted = trainer(ManifoldGuard(), plugins=plugin, max_steps=2, gradient_clip_val=clip)
    fitted.fit(model)
    assert fitted.optimizers[0].state[model.points.stiefel]["step"] == 1  # the other step was skipped
    assert model.distance() <= 1e-6


# checkpoints


class Moved(L.Callback):
    """Writes a checkpoint whose points are off their manifolds."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        for name in MANIFOLDS:
            checkpoint["state_dict"][f"points.{name}"] = checkpoint["state_dict"][f"points.{name}"] * -1.3


def test_a_checkpoint_off_the_manifold_is_projected(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)
    trainer(ManifoldGuard(), Moved(), saver, enable_checkpointing=True).fit(Places())
    seen = []

    class Look(L.Callback):
        def on_fit_start(self, trainer, pl_module) -> None:
            seen.append(pl_module.distance())

    with pytest.warns(UserWarning, match=r"points.stiefel: expected a point of Stiefel.*, got one that is .* off"):
        trainer(ManifoldGuard(), Look()).fit(Places(), ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    assert seen[0] <= 1e-6


# averages of weights


class Look(L.Callback):
    """Distances during the validations; Lightning's own averages differ from the last weights."""

    def __init__(self) -> None:
        self.validated, self.last = [], {}

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.last = {name: point.detach().clone() for name, point in pl_module.held().items()}

    def on_validation_batch_end(self, trainer, pl_module, *_) -> None:
        self.validated.append(pl_module.distance())


AVERAGES = {
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, annealing_epochs=1),
    "mean": lambda: WeightAveraging(),
    "EMA": lambda: EMAWeightAveraging(decay=0.9),
}
ORDERS = {
    "guard first": lambda average: (ManifoldGuard(), average),
    "guard last": lambda average: (average, ManifoldGuard()),
}


class Validated(Places):
    def val_dataloader(self):
        return torch.utils.data.DataLoader([torch.zeros(6)])


def averaged(callbacks, batch_norm: bool = False) -> tuple[Places, Look]:
    model, look = Validated(), Look()
    if batch_norm:
        model.net.append(nn.BatchNorm1d(1))
    options = {"max_steps": -1, "max_epochs": 3, "limit_train_batches": 12, "num_sanity_val_steps": 0}
    trainer(*callbacks, look, **options).fit(model)
    return model, look


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_averages_are_projected(average, order):
    model, look = averaged(order(average()))
    assert model.distance() <= 1e-6
    assert len(look.validated) == 3
    assert max(look.validated) <= 1e-6
    assert not torch.equal(model.points.stiefel, look.last["stiefel"])


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_without_the_guard_they_are_not(average):
    model, _ = averaged((average(),))
    assert model.distance() > 1e-5


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("average", [AVERAGES["mean"], AVERAGES["EMA"]], ids=["mean", "EMA"])
def test_validations_do_not_change_the_average(average, order):
    ends = []
    for every in (12, 2, 3):
        model = Validated()
        options = {"max_steps": 12, "val_check_interval": every, "num_sanity_val_steps": 0}
        trainer(*order(average()), **options).fit(model)
        ends.append({name: point.detach() for name, point in model.held().items()})
    for name, end in ends[0].items():
        assert all(torch.equal(end, other[name]) for other in ends[1:]), name


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_a_validation_outside_a_fit_leaves_the_weights(order):
    model = Validated()
    before = copy.deepcopy(model.state_dict())
    trainer(*order(WeightAveraging())).validate(model, verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_averages_with_batch_norm_are_projected_before_its_last_epoch(order):
    """SWA puts its averages in when an epoch of statistics starts."""
    seen = []

    class Statistics(Look):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.fit_loop._skip_backward:
                seen.append(pl_module.distance())

    model = Validated()
    model.net.append(nn.BatchNorm1d(1))
    options = {"max_steps": -1, "max_epochs": 3, "limit_train_batches": 6, "num_sanity_val_steps": 0}
    trainer(*order(AVERAGES["SWA"]()), Statistics(), **options).fit(model)
    assert seen
    assert max(seen) <= 1e-6


# what is logged, and stabilized


def logged(logger: CSVLogger) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()))


def test_distances_are_logged_at_their_steps(tmp_path):
    logger = CSVLogger(tmp_path, "log", "")
    trainer(ManifoldGuard(every_n_steps=4), logger=logger, max_steps=10, accumulate_grad_batches=2).fit(Places())
    rows = logged(logger)
    assert [int(row["step"]) for row in rows] == [3, 7]  # counted from 0, after steps 4 and 8
    for name in MANIFOLDS:
        assert all(0 <= float(row[f"manifold/points.{name}/distance"]) <= 1e-6 for row in rows)


def test_the_distance_that_is_logged(tmp_path):
    """Moved away in mid-training, it is seen, and mended."""

    class Push(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            with torch.no_grad():
                pl_module.points.sphere.mul_(3)

    model, logger = Places(), CSVLogger(tmp_path, "log", "")
    trainer(Push(), ManifoldGuard(every_n_steps=1), logger=logger, max_steps=1).fit(model)
    (row,) = logged(logger)
    assert float(row["manifold/points.sphere/distance"]) > 0.3
    assert model.distance() <= 1e-6


def test_geoopts_own_optimizer_is_stabilized():
    model, looks = Places(), []
    model.configure_optimizers = lambda: geoopt.optim.RiemannianSGD(model.parameters(), lr=1e-2)  # stabilize=None

    class Distances(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            with torch.no_grad():
                pl_module.points.stiefel.mul_(1 + 1e-4)
            looks.append(pl_module.distance())

    trainer(ManifoldGuard(every_n_steps=2), Distances(), max_steps=9).fit(model)
    assert max(looks) < 2.5e-4  # 9e-4 without


# where nothing is declared


class Free(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(6, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), fused=True, weight_decay=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader([torch.full((6,), float(i)) for i in range(BATCHES)], batch_size=4)


def test_it_does_nothing_to_free_parameters(tmp_path):
    ends, logger = [], CSVLogger(tmp_path, "log", "")
    for callbacks in ((), (ManifoldGuard(every_n_steps=1),)):
        model = Free()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer(*callbacks, logger=logger, max_steps=20).fit(model)
        ends.append(model.net.weight.detach())
    assert torch.equal(*ends)
    assert not Path(logger.log_dir, "metrics.csv").exists()


# torch.compile of what is inside


class Compiled(LanguageModel):
    """The inner module is compiled in configure_model, in place, so that names stay; the LightningModule is not."""

    backend: str | None = None

    def configure_model(self) -> None:
        if self.backend is not None:
            self.transformer.compile(backend=self.backend)

    def train_dataloader(self):
        text = torch.randint(256, (6, 2, 13), generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader([{"tokens": t[:, :-1], "targets": t[:, 1:]} for t in text], batch_size=None)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_inner_module_trains_on_its_manifolds(backend):
    ends = []
    for chosen in (None, backend):
        torch.manual_seed(0)
        model = Compiled({"module": "LieAttention", "time": 1.3, "tol": 1e-2}, width=8, depth=1, num_heads=2)
        model.backend = chosen
        fitted = trainer(ManifoldGuard(), max_steps=6)
        fitted.fit(model)
        assert type(fitted.optimizers[0]) is RiemannianAdamW
        ends.append(model.state_dict())
    assert isinstance(model.transformer.blocks[0].attention.flow.time, ManifoldParameter)
    assert list(declared(model)) == ["transformer.blocks.0.attention.flow.time"]
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=1e-5, rtol=1e-4)
    assert not torch.equal(ends[0]["transformer.blocks.0.attention.flow.time"], torch.full((2,), 1.3))
