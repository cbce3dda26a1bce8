"""What the command line prints: few lines, at most 100 columns, no number that is none."""

from __future__ import annotations

import sys

import lightning as L
import pytest
import torch
from rich.cells import cell_len

from liegroup_attn.lightning import LanguageModel, RandomForests, TokenClassifier
from liegroup_attn.lightning.cli import main
from liegroup_attn.lightning.terminal import Summary, listing

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]
LISTINGS = [
    ({}, ""),
    ({"b": 1, "a": torch.tensor(0.123456)}, "a  0.1235\nb  1"),
    ({"x_1": 0.5}, "x_1  0.5"),
    ({f"x_{i:02d}": i / 4 for i in range(3)}, "x_00 … 02  0 0.25 0.5"),
    ({"x_9": 1, "x_10": 2}, "x_10 … 9  2 1"),
    ({"l/dataloader_idx_0": 1, "l/dataloader_idx_1": 2}, "l/dataloader_idx_0  1\nl/dataloader_idx_1  2"),
    ({"x_0": 1, "y_0": 2, "x": 3}, "x    3\nx_0  1\ny_0  2"),
]


@pytest.mark.parametrize(("metrics", "lines"), LISTINGS)
def test_numbers_in_few_lines(metrics, lines):
    assert listing(metrics) == lines


def test_long_rows_are_wrapped():
    text = listing({f"test/accuracy_at_depth_{i:02d}": 1 / (i + 3) for i in range(60)}).splitlines()
    assert 4 < len(text) < 10
    assert max(map(len, text)) <= 100
    assert " ".join(line[32:] for line in text).split() == [f"{1 / (i + 3):.4g}" for i in range(60)]


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["liegroup-attn"])
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    model = {"width": 8, "num_heads": 2, "attention": "{module: SoftmaxAttention}"}
    data = {"train_size": 8, "val_size": 8, "test_size": 64, "batch_size": 4}
    given = ["--model", "TokenClassifier", "--data", "RandomForests", "--trainer.enable_progress_bar", "false"]
    given += [part for key, value in model.items() for part in (f"--model.{key}", str(value))]
    given += [part for key, value in data.items() for part in (f"--data.{key}", str(value))]
    given += ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]

    def run(word: str, *more: str) -> list[str]:
        main([word, *given, *more])
        return capfd.readouterr().out.splitlines()

    return run


def test_a_test_prints_a_row_for_all_depths(run):
    lines = run("test")
    names = [line.split()[0] for line in lines if line[:1].strip()]
    assert names == ["deeper/accuracy", "deeper/accuracy_at_depth_00", "test/accuracy", "test/accuracy_at_depth_00"]
    assert len(lines) < 12
    assert max(map(len, lines)) <= 100
    assert run("test", "--verbose", "false") == []


def test_what_a_test_returns_has_every_name():
    """Which experiments/run.py reads."""
    model = TokenClassifier({"module": "SoftmaxAttention"}, width=8, num_heads=2)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    found = L.Trainer(**options).test(
        model, RandomForests(train_size=8, val_size=8, test_size=64, batch_size=4), verbose=False
    )
    assert {"test/accuracy_at_depth_00", "test/accuracy_at_depth_11", "deeper/accuracy_at_depth_28"} <= set(found[0])


def test_a_fit_prints_the_parts_of_the_model_and_no_flops_that_nobody_counted(run):
    lines = run("fit", "--trainer.max_steps", "1", "--trainer.enable_checkpointing", "false")
    text = "\n".join(lines)
    assert "FLOP" not in text
    assert "Transformer" in text
    model = TokenClassifier({"module": "SoftmaxAttention"}, width=8, num_heads=2)
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters that learn, 0 that do not; " in text
    assert max(map(cell_len, lines)) <= 100
    off = (
        "--trainer.max_steps",
        "1",
        "--trainer.enable_checkpointing",
        "false",
        "--trainer.enable_model_summary",
        "false",
    )
    assert run("fit", *off) == []


def test_flops_are_shown_where_they_are_counted(capsys):
    model = LanguageModel({"module": "SoftmaxAttention"}, width=8, depth=1, num_heads=2)
    model.example_input_array = torch.zeros(1, 5, dtype=torch.long)
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[], enable_progress_bar=False)
    Summary().on_fit_start(trainer, model)
    assert "Total FLOPs" in capsys.readouterr().out


def test_a_summary_is_as_deep_as_a_config_says(run, tmp_path):
    (tmp_path / "more.yaml").write_text(
        "trainer:\n  callbacks:\n  - class_path: RichModelSummary\n    init_args: {max_depth: 2}\n"
    )
    text = "\n".join(run("fit", "--config", "more.yaml", "--trainer.max_steps", "1"))
    assert "transformer.blocks" in text
    assert "FLOP" not in text
