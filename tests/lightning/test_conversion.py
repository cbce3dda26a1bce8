"""Lie attention in somebody else's LightningModule: by the mixin and by the callback, through checkpoints and YAML."""

from __future__ import annotations

import logging
import sys
from typing import ClassVar

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from theirs import Classifier, Late, loader, trainer

from liegroup_attn import ErlangClock
from liegroup_attn.clocks import clock_from
from liegroup_attn.errors import ConversionError, GeneratorError
from liegroup_attn.lightning import ConvertAttention, ExactResume, LieConversion, load_converted
from liegroup_attn.nn import LieFlow, LieMultiheadAttention, convert_attention, restore_attention

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]
LAYERS = ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]


class Mine(LieConversion, Classifier):
    lie_attention: ClassVar = {"max_time": 2.0}


class MineLate(LieConversion, Late):
    lie_attention: ClassVar = {"max_time": 2.0}


mixed = pytest.mark.parametrize("kind", [Mine, MineLate])


def flows(model) -> list[LieFlow]:
    return [m for m in model.modules() if isinstance(m, LieFlow)]


def saved(folder, model, callbacks=(), steps: int = 4):
    """Train and give the checkpoint's path."""
    one = trainer(folder, callbacks, max_steps=steps)
    one.fit(model, loader())
    one.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.fixture(scope="module")
def plain_file(tmp_path_factory):
    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("plain"), Classifier())


@pytest.fixture(scope="module")
def mine_file(tmp_path_factory):
    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("mine"), Mine())


@pytest.fixture(scope="module")
def callback_file(tmp_path_factory):
    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("callback"), Classifier(), [ConvertAttention(clock="ExponentialClock")])


@mixed
def test_the_mixin_converts_once_and_starts_where_theirs_is(kind):
    torch.manual_seed(0)
    theirs = Classifier()
    torch.manual_seed(0)
    model = kind()
    model.configure_model()
    model.eval(), theirs.eval()
    report = model.conversion_report
    assert report.converted == LAYERS
    model.configure_model()
    assert model.conversion_report is report
    assert [flow.max_time for flow in flows(model)] == [2.0, 2.0]
    words = next(iter(loader()))[0]
    torch.testing.assert_close(model(words), theirs(words))
    restore_attention(model)
    model.configure_model()  # another fit
    assert not flows(model)


@mixed
def test_pitfall_20_a_trained_mixin_loads_from_its_checkpoint(tmp_path, kind):
    file = saved(
        tmp_path, kind(width=12, lie_attention={"max_time": 3.0, "clock": "ErlangClock(2)", "exclude": "*.0.*"})
    )
    loaded = kind.load_from_checkpoint(file, weights_only=True)
    assert loaded.conversion_report.converted == LAYERS[1:]
    assert loaded.hparams.width == 12
    (flow,) = flows(loaded)
    assert (flow.max_time, repr(flow.clock)) == (3.0, "ErlangClock(2)")
    state = torch.load(file, weights_only=True)["state_dict"]
    assert state[f"{LAYERS[1]}.lie.time"].abs().max() > 0
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in state.items())
    (metrics,) = trainer(tmp_path).validate(kind(**loaded.hparams), loader(), ckpt_path=file, verbose=False)
    assert metrics == trainer(tmp_path).validate(loaded, loader(), verbose=False)[0]


def test_pitfall_20_a_callback_alone_does_not_load_and_load_converted_does(callback_file):
    with pytest.raises(RuntimeError, match=r"Unexpected key.*lie\.time"):
        Classifier.load_from_checkpoint(callback_file, weights_only=True)
    loaded = load_converted(Classifier, callback_file)
    assert isinstance(loaded, Classifier)
    assert [repr(flow.clock) for flow in flows(loaded)] == ["ExponentialClock()"] * 2
    state = torch.load(callback_file, weights_only=True)["state_dict"]
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in state.items())


def test_load_converted_refuses_a_checkpoint_that_names_no_conversion(plain_file):
    with pytest.raises(ConversionError, match=r"names no conversion; load it with Classifier\.load_from_checkpoint"):
        load_converted(Classifier, plain_file)


def test_hyperparameters_are_plain_and_from_plain_is_none(mine_file):
    checkpoint = torch.load(mine_file, weights_only=True)
    assert checkpoint["hyper_parameters"]["lie_attention"] == {"max_time": 2.0} == checkpoint["lie_attention"]
    assert "from_plain" not in checkpoint["hyper_parameters"]


@pytest.mark.parametrize("given", [None, {"clock": "ErlangClock(2)", "exclude": ["*.0.*"]}, False])
def test_review_m7_loggers_get_the_options_that_are_used(tmp_path, plain_file, given):
    model = Mine.load_from_checkpoint(plain_file, from_plain=True, lie_attention=given)
    logger = CSVLogger(tmp_path, "", "")
    trainer(tmp_path, logger=logger, max_steps=1).fit(model, loader())
    written = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    expected = {"max_time": 2.0} if given is None else given
    assert written["lie_attention"] == expected == model.hparams_initial["lie_attention"]
    assert written["width"] == 8
    assert "from_plain" not in written


def test_theirs_may_save_no_hyperparameters(tmp_path):
    class Silent(Classifier):
        def save_hyperparameters(self, *args, **kwargs):
            self.hparams.update(width=8, depth=1, dropout=0.0, learning_rate=1e-2)

    class MineSilent(LieConversion, Silent):
        pass

    file = saved(tmp_path, MineSilent(lie_attention={"rate": 0.25}))
    (flow,) = flows(MineSilent.load_from_checkpoint(file))
    assert flow.max_time == 1.0
    assert torch.load(file, weights_only=True)["hyper_parameters"]["lie_attention"] == {"rate": 0.25}


def test_switched_off_it_is_their_module(tmp_path, plain_file):
    model = Mine(lie_attention=False)
    model.configure_model()
    assert not flows(model)
    assert model.conversion_report is None
    Mine.load_from_checkpoint(plain_file, lie_attention=False)
    assert Mine.load_from_checkpoint(saved(tmp_path, model)).lie_attention is False  # not the class attribute


class MineDefault(LieConversion, Classifier):
    pass


REFUSED = {
    "plain": (
        "plain_file",
        Mine,
        {},
        r"expected the parameters of a converted model, got one without any flow.*Mine\.load",
    ),
    "off": (
        "mine_file",
        Mine,
        {"lie_attention": False},
        "expected the parameters of an unconverted model, got those of 6",
    ),
    "fewer": (
        "mine_file",
        Mine,
        {"lie_attention": {"include": "*.1.*"}},
        r"got others; 3 names differ \(encoder.layers.0",
    ),
    "more": ("mine_file", Mine, {"lie_attention": {"learn_rates": False}}, "got others; 4 names differ"),
    "clock": (
        "mine_file",
        Mine,
        {"lie_attention": {"clock": "ExponentialClock"}},
        r"\{'clock': 'ExponentialClock\(\)', 'first_hop': True\}, got \{'clock': 'Fixed.*', 'first_hop': True\}",
    ),
    "hop": (
        "mine_file",
        MineDefault,
        {"lie_attention": {"first_hop": False}},
        r"flows with \{.*'first_hop': False\}, got .*lie_attention=\{'max_time': 2.0\}",
    ),
    "from_plain": ("mine_file", Mine, {"lie_attention": {"include": "*.1.*"}, "from_plain": True}, "got others"),
}


@pytest.mark.parametrize(("file", "kind", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_checkpoints_that_do_not_fit(request, file, kind, options, message):
    with pytest.raises(ConversionError, match=message):
        kind.load_from_checkpoint(request.getfixturevalue(file), **options)


@mixed
def test_from_plain_fills_in_fresh_flows(tmp_path, plain_file, kind):
    model = kind.load_from_checkpoint(plain_file, from_plain=True).eval()
    assert [float(flow.time.abs().max()) for flow in flows(model)] == [0.0, 0.0]
    words = next(iter(loader()))[0]
    torch.testing.assert_close(model(words), Classifier.load_from_checkpoint(plain_file).eval()(words))
    (kept,) = trainer(tmp_path).validate(kind(from_plain=True), loader(), ckpt_path=plain_file, verbose=False)
    assert kept["val_loss"] > 0
    file = saved(tmp_path, model)
    kind.load_from_checkpoint(file)  # from here on it is a converted one like any other
    with pytest.raises(ConversionError, match="ckpt_path: expected a checkpoint of this model to resume"):
        trainer(tmp_path, max_steps=8).fit(kind(from_plain=True), loader(), ckpt_path=plain_file)


class Resumed:
    """Fits that are stopped and resumed; a checkpoint at every step."""

    @staticmethod
    def fit(folder, kind, callbacks, resume=None) -> dict:
        L.seed_everything(0 if resume is None else 99)
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        one = trainer(folder, [saver, ExactResume(), *callbacks], max_steps=9, enable_checkpointing=True)
        one.fit(kind(dropout=0.2), loader(shuffle=False), ckpt_path=resume, weights_only=True)
        return torch.load(folder / "step=9.ckpt", weights_only=True)


@pytest.mark.parametrize("kind", [Mine, MineLate, Classifier])
def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path, kind):
    callbacks = [ConvertAttention()] if kind is Classifier else []
    whole = Resumed.fit(tmp_path / "whole", kind, callbacks)
    again = Resumed.fit(tmp_path / "again", kind, callbacks, tmp_path / "whole" / "step=6.ckpt")
    assert sum(".lie." in name for name in whole["state_dict"]) == 6
    assert all(torch.equal(again["state_dict"][name], value) for name, value in whole["state_dict"].items())
    moments = [[s["exp_avg"] for s in c["optimizer_states"][0]["state"].values()] for c in (whole, again)]
    assert all(torch.equal(*pair) for pair in zip(*moments, strict=True))


def test_options_that_a_checkpoint_could_not_hold_and_wrong_ones():
    with pytest.raises(ConversionError, match=r"lie_attention\['include'\]: expected strings, numbers.*got set"):
        Mine(lie_attention={"include": {"encoder"}})
    assert Mine(lie_attention={"clock": ErlangClock(2)}).lie_attention == {"clock": "ErlangClock(2)"}
    with pytest.raises(TypeError, match="tiem"):
        Mine(lie_attention={"tiem": 1.0}).configure_model()
    with pytest.raises(GeneratorError, match="time: expected 0 ≤ time ≤ max_time"):
        ConvertAttention(time=2.0)
    with pytest.raises(GeneratorError, match="clock: expected"):
        ConvertAttention(clock="Sundial")


def test_the_mixin_behind_their_module_is_refused():
    with pytest.raises(
        TypeError, match=r"expected LieConversion before Classifier.*class Behind\(LieConversion, Classifier\)"
    ):

        class Behind(Classifier, LieConversion):
            pass


class Told(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record):
        self.texts.append(record.getMessage())


class Order(L.Callback):
    """Whether what the optimizer holds is what is in the model."""

    def on_fit_start(self, trainer, pl_module):
        held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        assert {id(p) for p in pl_module.parameters()} == held
        assert len(flows(pl_module)) == 2


def test_the_callback_converts_before_the_optimizer_and_once(tmp_path):
    model, callback = Classifier(), ConvertAttention(max_time=2.0)
    one = trainer(tmp_path, [callback, Order()], num_sanity_val_steps=1)
    logger, told = logging.getLogger("lightning.pytorch.utilities.rank_zero"), Told()
    logger.addHandler(told)
    try:
        one.fit(model, loader(), loader())
        times = [flow.time.clone() for flow in flows(model)]
        one.validate(model, loader(), verbose=False)
        one.fit(model, loader())
    finally:
        logger.removeHandler(told)
    assert sum("encoder.layers.0.self_attn  MultiheadAttention  converted" in text for text in told.texts) == 1
    assert all(float(time.abs().max()) > 0 for time in times)
    assert type(model.encoder.layers[0].self_attn) is LieMultiheadAttention
    assert not model._load_state_dict_pre_hooks


def test_the_callbacks_limits_are_told(tmp_path, plain_file, callback_file):
    with pytest.raises(ConversionError, match=r"(?s)configure_model builds.*class Mine\(LieConversion, Late\)"):
        trainer(tmp_path, [ConvertAttention()]).fit(Late(), loader())
    with pytest.raises(ConversionError, match="leave the callback out"):
        trainer(tmp_path, [ConvertAttention()]).fit(Mine(), loader())
    with pytest.raises(ConversionError, match="got one without any flow; load its state_dict into the module"):
        trainer(tmp_path, [ConvertAttention()]).fit(Classifier(), loader(), ckpt_path=plain_file)
    with pytest.raises(ConversionError, match="whose optimizer knows no flow"):
        trainer(tmp_path, [ConvertAttention(from_plain=True)]).fit(Classifier(), loader(), ckpt_path=plain_file)
    with pytest.raises(ConversionError, match=r"got \{'clock': 'ExponentialClock\(\)', 'first_hop': True"):
        trainer(tmp_path, [ConvertAttention()]).validate(Classifier(), loader(), ckpt_path=callback_file)
    with pytest.raises(ConversionError, match="'nothing', which fits none"):
        trainer(tmp_path, [ConvertAttention(include="nothing")]).fit(Classifier(), loader())


BEFORE = {
    "clock": ({"clock": "ErlangClock(2)"}, r"encoder.layers.0.self_attn .* with clock='ErlangClock\(2\)'; give the"),
    "first hop and max_time": ({"first_hop": False, "max_time": 2.0}, r"with first_hop=False, max_time=2.0; give"),
    "rates": ({"learn_rates": False}, "with learn_rates=False"),
    "time": ({"learn_time": False}, "with learn_time=False"),
    "tol": ({"tol": 1e-2, "allow_open_mask": True}, "with tol=0.01, allow_open_mask=True"),
}


@pytest.mark.parametrize(("options", "message"), BEFORE.values(), ids=BEFORE)
def test_review_m6_the_callback_refuses_what_was_converted_otherwise(tmp_path, options, message):
    model = Classifier()
    convert_attention(model, **options)
    with pytest.raises(ConversionError, match=message):
        trainer(tmp_path, [ConvertAttention()]).fit(model, loader())
    same = Classifier()
    convert_attention(same, include="*.0.*", time=0.5, **options)
    file = saved(tmp_path, same, [ConvertAttention(**options)])  # and converts the rest
    assert len(flows(load_converted(Classifier, file))) == 2


def test_review_m6_patterns_count_too(tmp_path):
    model = Classifier()
    convert_attention(model)
    with pytest.raises(ConversionError, match=r"a flow in exclude=\['\*.0.\*'\]; give the options"):
        trainer(tmp_path, [ConvertAttention(exclude="*.0.*")]).fit(model, loader())
    with pytest.raises(ConversionError, match=r"a flow outside include=\['\*.1.\*'\]"):
        trainer(tmp_path, [ConvertAttention(include=["*.1.*"])]).fit(model, loader())


def test_the_callback_validates_a_plain_checkpoint_if_told_so(tmp_path, plain_file):
    expected = trainer(tmp_path).validate(Classifier(), loader(), ckpt_path=plain_file, verbose=False)
    callback = ConvertAttention(from_plain=True)
    found = trainer(tmp_path, [callback]).validate(Classifier(), loader(), ckpt_path=plain_file, verbose=False)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loader()


def test_the_callback_has_the_flows_own_options(capsys):
    own = {"time", "max_time", "learn_time", "learn_rates", "rate", "first_hop", "clock", "tol", "allow_open_mask"}
    assert set(ConvertAttention().options) == own | {"include", "exclude"}
    assert ConvertAttention(clock=ErlangClock(3)).options["clock"] == "ErlangClock(3)"
    for wrong in ("tiem", "device", "num_heads"):
        with pytest.raises(TypeError, match=wrong):
            ConvertAttention(**{wrong: 1})
    with pytest.raises(SystemExit):
        LightningCLI(Classifier, Data, args=["fit", "--trainer.callbacks.help=ConvertAttention"])
    told = capsys.readouterr().out
    for name in own | {"include", "exclude", "from_plain"}:
        assert f"--trainer.callbacks.{name} " in told
    assert "--trainer.callbacks.device" not in told
    assert "upper end of the learned time" in told


@pytest.mark.parametrize("clock", ["ErlangClock(2)", "ExponentialClock"])
@pytest.mark.parametrize("road", ["callback", "mixin"])
def test_from_yaml(tmp_path, monkeypatch, road, clock):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    config = {"trainer": {"accelerator": "cpu", "max_steps": 2, "default_root_dir": str(tmp_path), **quiet}}
    options = {"exclude": ["encoder.layers.0.*"], "max_time": 2.0, "clock": clock}
    if road == "callback":
        config["trainer"]["callbacks"] = [
            {"class_path": "liegroup_attn.lightning.ConvertAttention", "init_args": options}
        ]
        config["model"] = {"width": 12}
    else:
        config["model"] = {"width": 12, "lie_attention": options}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"fit": config}))
    monkeypatch.setattr(sys, "argv", ["cli"])
    cli = LightningCLI(
        Classifier if road == "callback" else Mine,
        Data,
        args=["--config", str(tmp_path / "c.yaml"), "fit"],
        save_config_callback=None,
    )
    (flow,) = flows(cli.model)
    assert (flow.max_time, repr(flow.clock), flow.width) == (2.0, repr(clock_from(clock)), 6)
    cli.trainer.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["lie_attention"]["clock"]
    assert repr(clock_from(stored)) == repr(flow.clock)
    assert flow.time.abs().max() > 0


@pytest.mark.parametrize("how", ["mixin", "callback"])
def test_an_optimizer_that_does_not_hold_the_flows_is_told(how, tmp_path):
    class Early(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
            self.early = torch.optim.SGD(self.parameters(), 0.1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return self.early

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.randn(4, 5, 8), batch_size=2)

    class Mine(LieConversion, Early):
        pass

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callbacks = [ConvertAttention()] if how == "callback" else []
    trainer = L.Trainer(accelerator="cpu", max_steps=1, callbacks=callbacks, default_root_dir=tmp_path, **quiet)
    with pytest.warns(UserWarning, match="after the conversion"):
        trainer.fit(Mine() if how == "mixin" else Early())
