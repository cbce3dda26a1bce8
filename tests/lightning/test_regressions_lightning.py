"""One named test for each bug of the training code that a review found."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from liegroup_attn.lightning import (
    GeneratorMonitor,
    ImageClassifier,
    LanguageModel,
    RandomForests,
    TokenClassifier,
)
from liegroup_attn.lightning.callbacks import diagnose, layer_inputs

LIE = {"module": "LieAttention"}
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def test_data_larger_than_the_model_ends_in_a_sentence():
    model = TokenClassifier(LIE, vocab_size=20, width=16, num_heads=2, report_depth=28)
    data = RandomForests(num_nodes=6, max_depth=3, deep_nodes=30, deep_depth=10, batch_size=4, train_size=8)
    with pytest.raises(ValueError, match="vocab_size: expected at least the data's vocab_size=30, got 20; raise it"):
        L.Trainer(max_steps=1, **QUIET).fit(model, data)


@pytest.mark.parametrize(
    "changed",
    [{"num_heads": 4}, {"encoding": {"module": "RotaryEncoding", "layout": "interleaved"}}, {"encoding": None}],
)
def test_a_checkpoint_of_other_heads_or_positions_is_refused(tmp_path, changed):
    model = LanguageModel(LIE | {"learn_time": False, "learn_rates": False}, width=16, depth=1, num_heads=2)
    trainer = L.Trainer(max_steps=0, **QUIET)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="another variant"):
        LanguageModel.load_from_checkpoint(tmp_path / "a.ckpt", **changed)


@pytest.mark.parametrize(
    ("kind", "options"), [(LanguageModel, {}), (TokenClassifier, {"vocab_size": 20}), (ImageClassifier, {})]
)
def test_checkpoints_of_before_encodings_had_recipes(tmp_path, kind, options):
    """They load where positions are the same, and are refused where they are not."""
    rotary = {"module": "RotaryEncoding", "layout": "half_split", "base": 500.0}
    model = kind(LIE, width=16, depth=1, num_heads=2, encoding=rotary, **options)
    trainer = L.Trainer(max_steps=0, **QUIET)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    for part in (stored["hyper_parameters"], stored["attention"]):
        del part["encoding"]
        part |= {"rotary_layout": "half_split", "rotary_base": 500.0}
    torch.save(stored, tmp_path / "old.ckpt")
    kind.load_from_checkpoint(tmp_path / "old.ckpt", encoding=rotary)
    with pytest.raises(ValueError, match="another variant"):
        kind.load_from_checkpoint(tmp_path / "old.ckpt", encoding=None)
    with pytest.raises(ValueError, match="another variant"):
        kind.load_from_checkpoint(tmp_path / "old.ckpt", encoding={"module": "RotaryEncoding", "layout": "half_split"})


@pytest.mark.filterwarnings("ignore:attention. expected parts as recipes:FutureWarning")
def test_checkpoints_of_before_parts_had_recipes(tmp_path):
    """They load as they are, and with the same said in today's words; another law is refused."""
    parts = {"clock": "ErlangClock(3)", "plus": {"module": "RateMatrix", "num_tokens": 16, "rate": 0.5}}
    flat = {"clock": "ErlangClock", "clock_shape": 3, "plus": "RateMatrix", "num_tokens": 16, "learned_rate": 0.5}
    model = ImageClassifier(LIE | parts, width=16, depth=1, num_heads=2)
    trainer = L.Trainer(max_steps=0, **QUIET)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    stored["hyper_parameters"]["attention"] = LIE | flat
    stored["attention"] = {k: v for k, v in stored["attention"].items() if k not in parts} | flat
    torch.save(stored, tmp_path / "old.ckpt")
    image = torch.rand(1, 16, 4)
    for options in ({}, {"attention": LIE | parts}):
        loaded = ImageClassifier.load_from_checkpoint(tmp_path / "old.ckpt", **options)
        assert torch.equal(loaded(image), model(image))
    for other in ({"clock": "ErlangClock(2)"}, {"plus": parts["plus"] | {"manifold": "ReversibleRateMatrices"}}):
        with pytest.raises(ValueError, match="another variant"):
            ImageClassifier.load_from_checkpoint(tmp_path / "old.ckpt", attention=LIE | parts | other)


def test_a_checkpoint_whose_encoding_goes_by_its_path_loads(tmp_path):
    model = LanguageModel(LIE, width=16, depth=1, num_heads=2, encoding={"module": "liegroup_attn.positional.ALiBi"})
    trainer = L.Trainer(max_steps=0, **QUIET)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    tokens = torch.randint(256, (1, 9))
    assert torch.equal(LanguageModel.load_from_checkpoint(tmp_path / "a.ckpt")(tokens), model(tokens))


def test_a_checkpoint_may_be_read_with_scaled_frequencies(tmp_path):
    model = LanguageModel(LIE, width=16, depth=1, num_heads=2)
    trainer = L.Trainer(max_steps=0, **QUIET)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    scaling = {"module": "LinearScaling", "factor": 4.0}
    rope = {"module": "RotaryEncoding", "layout": "half_split"}
    longer = LanguageModel.load_from_checkpoint(tmp_path / "a.ckpt", encoding=rope | {"scaling": scaling})
    tokens = torch.randint(256, (1, 24))
    assert not torch.allclose(longer(tokens), model(tokens), atol=1e-4)
    same = LanguageModel.load_from_checkpoint(tmp_path / "a.ckpt", encoding=rope | {"base": 10_000.0})
    assert torch.equal(same(tokens), model(tokens))


def test_the_monitor_looks_at_positions_on_two_axes(tmp_path):
    encoding = {"module": "AxialRotary", "axes": 2, "layout": "half_split"}
    model = ImageClassifier(LIE, width=16, depth=1, num_heads=2, encoding=encoding)
    data = [{"tokens": torch.rand(2, 16, 4), "labels": torch.zeros(2, dtype=torch.long)}] * 2
    monitor = GeneratorMonitor(every_n_steps=1, figures=False, max_tokens=9)
    logger = CSVLogger(tmp_path)
    quiet = QUIET | {"logger": logger}
    L.Trainer(max_steps=2, callbacks=[monitor], log_every_n_steps=1, **quiet).fit(
        model, torch.utils.data.DataLoader(data, batch_size=None)
    )
    assert "lie/" in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_the_monitor_sees_what_autocast_does():
    model = LanguageModel(LIE, width=32, depth=1, num_heads=2)
    tokens = torch.randint(256, (1, 24))
    layer, x = layer_inputs(model, tokens)[0]
    full = diagnose(layer, x)["row_error"]
    with L.Trainer(precision="bf16-mixed", **QUIET).precision_plugin.forward_context():
        layer, x = layer_inputs(model, tokens)[0]
        mixed = diagnose(layer, x)["row_error"]
    assert mixed > 10 * full
