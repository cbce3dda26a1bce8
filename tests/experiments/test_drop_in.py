"""The table of models: its checks can fail, its JSON and Markdown hold what was measured, the committed results pass."""

from __future__ import annotations

import json

import pytest
import torch

from experiments.drop_in import checks, report, run
from experiments.drop_in.checks import BOUNDS, CHECKS, measure
from experiments.drop_in.subjects import of_liegroup_attn, of_torch
from experiments.results import ROOT
from liegroup_attn.nn import LieFlow, SelfAttention

SUBJECTS = {subject.name: subject for subject in of_torch()}
OURS = {subject.name: subject for subject in of_liegroup_attn()}
CAUSAL = SUBJECTS["TransformerEncoder, pre-norm, causal"]


@pytest.mark.parametrize("subject", [*SUBJECTS.values(), *OURS.values()], ids=lambda s: f"{s.library} {s.name}")
def test_models_of_torch_and_ours_pass(subject):
    numbers = measure(subject)
    assert [title for title, number in numbers.items() if report.passed(title, number) is False] == []
    assert sum(number is not None for number in numbers.values()) >= 5


def _shifted(flow, inputs, output):
    return output + 0.01


def _look_ahead(flow, inputs, output):
    return output + 1e-2 * inputs[1].mean(-2, keepdim=True)


def _only_in_training(flow, inputs, output):
    return output + 0.01 if flow.training else output


def _inert(flow, inputs, output):
    return output.detach()


@pytest.mark.parametrize(
    ("hook", "fails"),
    [
        (_shifted, {"equal at t = 0"}),
        (_look_ahead, {"equal at t = 0", "no future leak", "no padding leak"}),
        (_only_in_training, {"train = eval = no_grad"}),
        (_inert, {"trains"}),
    ],
)
def test_every_check_can_fail(monkeypatch, hook, fails):
    forward = LieFlow.forward
    monkeypatch.setattr(LieFlow, "forward", lambda self, *a, **k: hook(self, a, forward(self, *a, **k)))
    numbers = measure(CAUSAL)
    assert {title for title, number in numbers.items() if report.passed(title, number) is False} == fails


def test_a_padding_mask_that_is_ignored_is_seen_under_a_causal_mask(monkeypatch):
    """Padding is on the left, where causality does not hide it."""
    generator = LieFlow.generator

    def without_padding(self, query, key, features, **options):
        causal = torch.ones(query.size(-2), query.size(-2), dtype=torch.bool).tril()
        return generator(self, query, key, features, **{**options, "visible": causal, "is_causal": False})

    monkeypatch.setattr(LieFlow, "generator", without_padding)
    (check,) = (check for check in CHECKS if check.title == "no padding leak")
    assert report.passed(check.title, check.of(CAUSAL)) is False


def test_nan_is_no_small_difference():
    assert checks._largest(torch.tensor([0.0, torch.nan])) == torch.inf


def test_loading_and_decoding_can_fail(monkeypatch):
    subject = OURS["Transformer"]
    save = LieFlow._save_to_state_dict

    def forgets(self, destination, prefix, keep_vars):
        save(self, destination, prefix, keep_vars)
        destination[f"{prefix}time"] = torch.zeros_like(destination[f"{prefix}time"])

    with monkeypatch.context() as patch:
        patch.setattr(LieFlow, "_save_to_state_dict", forgets)
        assert report.passed("save, load", measure(subject)["save, load"]) is False
    extend = SelfAttention._extend

    def forgets_the_past(self, inputs, cache):
        cache.values.zero_()
        return extend(self, inputs, cache)

    monkeypatch.setattr(SelfAttention, "_extend", forgets_the_past)
    assert report.passed("cached = recomputed", measure(subject)["cached = recomputed"]) is False


def test_a_check_that_sees_no_change_at_all_says_so(monkeypatch):
    monkeypatch.setattr(checks, "CUT", 9)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        measure(CAUSAL)


def test_command_json_and_table(tmp_path, capsys):
    run.main(["--libraries", "liegroup_attn", "--output", str(tmp_path)])
    (result,) = report.load(tmp_path)
    assert set(result["models"]) == set(OURS)
    assert {"date", "hardware", "versions", "code"} <= set(result)
    table = report.drop_in_tables(tmp_path)["drop_in"]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(OURS)
    assert all(line.count("|") == 3 + len(CHECKS) for line in lines)
    assert (tmp_path / "drop_in" / "table.md").read_text().endswith(f"\n\n{table}")
    assert "✗" not in table.splitlines()[2]

    result["models"]["Transformer"]["no future leak"] = 0.1  # a failure is not hidden
    path = tmp_path / "drop_in" / "results" / "liegroup_attn.json"
    path.write_text(json.dumps(result))
    assert "✗ 1e-01" in report.drop_in_tables(tmp_path)["drop_in"]


def test_a_failure_ends_in_a_bad_exit_status(tmp_path, monkeypatch):
    monkeypatch.setitem(BOUNDS, "equal at t = 0", -1.0)
    with pytest.raises(SystemExit) as stopped:
        run.main(["--libraries", "liegroup_attn", "--output", str(tmp_path)])
    assert stopped.value.code == 1


def test_the_committed_results():
    """At least fifteen model classes of four libraries; nothing failed."""
    results = report.load(ROOT)
    rows = {(result["library"], name): row for result in results for name, row in result["models"].items()}
    assert len(rows) >= 15
    assert {"torch.nn", "transformers", "x_transformers", "litgpt"} <= {library for library, _ in rows}
    for key, row in rows.items():
        assert set(row) == set(BOUNDS), key
        assert [title for title, number in row.items() if report.passed(title, number) is False] == [], key
