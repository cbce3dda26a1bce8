"""One named test for each bug of the training code that a review found."""

import lightning as L
import pytest
import torch

from liegroup_attn.lightning import LanguageModel, RandomForests, TokenClassifier
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


def test_the_monitor_sees_what_autocast_does():
    model = LanguageModel(LIE, width=32, depth=1, num_heads=2)
    tokens = torch.randint(256, (1, 24))
    layer, x = layer_inputs(model, tokens)[0]
    full = diagnose(layer, x)["row_error"]
    with L.Trainer(precision="bf16-mixed", **QUIET).precision_plugin.forward_context():
        layer, x = layer_inputs(model, tokens)[0]
        mixed = diagnose(layer, x)["row_error"]
    assert mixed > 10 * full
