"""The comparison of encodings at a size that takes seconds: tasks, JSON, resumption, tables and figures."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from experiments import draw, tables
from experiments.counts import log_frequencies
from experiments.positions import cell, encodings, report, run, tasks
from experiments.positions.encodings import MIXINGS, Choice
from experiments.positions.tasks import NO_TARGET, SETTINGS, TASKS
from experiments.results import ROOT
from liegroup_attn.lightning.cli import main as command
from liegroup_attn.nn import build_encoding

COMMITTED = dict(SETTINGS)  # before a fixture makes them small
TINY = {"width": 8, "depth": 1, "num_heads": 2, "weight_decay": 0.01, "learning_rate": 1e-2, "warmup_steps": 1}
SMALL = {
    "text": {"batch_size": 2, "lengths": [8, 16], "test_bytes": 64},
    "recall": {"batch_size": 2, "lengths": [16, 32], "test_sequences": 4, "keys": 4, "pairs": 3, "queries": 4},
    "counting": {"batch_size": 2, "lengths": [16, 32], "test_sequences": 4},
    "digits": {"batch_size": 2, "patch_size": 4, "lengths": [4]},
}
FEW = ["none", "learned", "rope", "alibi_rates"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A folder with results, and the arguments that made them."""
    folder = tmp_path_factory.mktemp("positions")
    (folder / "corpus.txt").write_text("the cat sat on the mat, and the dog sat on the cat. " * 60)
    arguments = ["--encodings", *FEW, "--mixings", "softmax", "first_hop", "--seeds", "0", "1", "--jobs", "1"]
    arguments += ["--corpus", str(folder / "corpus.txt"), "--output", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        for name, small in SMALL.items():
            patch.setitem(SETTINGS, name, SETTINGS[name] | small | {"model": TINY})
        # Not of scaled frequencies, of which this is not the test.
        rope = Choice("RoPE, base 100 at test", {"module": "RotaryEncoding", "layout": "half_split", "base": 100.0})
        patch.setattr(cell, "RESCALED", {"yarn": rope})
        patch.setattr(report, "RESCALED", {"yarn": rope})
        run.main([*arguments, "--max-steps", "2"])
        yield folder, [*arguments, "--max-steps", "2"]


def drawn(name, count=20, length=None, **more):
    setting = SETTINGS[name] | more
    length = length or setting["lengths"][0]
    return setting, *(x.tolist() for x in getattr(tasks, name)(np.random.default_rng(3), count, length, setting))


# tasks


@pytest.mark.parametrize("length", SETTINGS["recall"]["lengths"])
def test_recall_has_one_right_answer_at_each_query_and_none_elsewhere(length):
    setting, tokens, targets = drawn("recall", length=length)
    keys, filler = setting["keys"], setting["keys"] + setting["values"]
    for row, wanted in zip(tokens, targets, strict=True):
        assert len(row) == length
        known, answers, last = {}, [], None
        for token in row:
            answers.append(NO_TARGET)
            if last is not None:  # the value that follows a key
                assert keys <= token < filler
                assert last not in known
                known[last], last = token, None
            elif token < keys and len(known) < setting["pairs"]:
                last = token
            elif token < keys:
                answers[-1] = known[token]
            else:
                assert token == filler
        assert answers == wanted
        assert sum(answer != NO_TARGET for answer in answers) == setting["queries"]


@pytest.mark.parametrize("length", SETTINGS["counting"]["lengths"])
def test_counting_asks_for_marks_since_the_last_reset(length):
    setting, tokens, targets = drawn("counting", length=length)
    most = setting["most"]
    for row, wanted in zip(tokens, targets, strict=True):
        assert len(row) == length
        assert min(row) > most
        count = 0
        for token, target in zip(row, wanted, strict=True):
            count = {most + 1: count + 1, most + 2: 0}.get(token, count)
            assert target == (min(count, most) if token == most + 3 else NO_TARGET)


def test_longer_counting_has_as_much_to_count():
    """As many marks, resets and questions, between more letters."""
    setting = SETTINGS["counting"]
    for token in range(setting["most"] + 1, setting["most"] + 4):
        each = []
        for length in setting["lengths"]:
            _, tokens, _ = drawn("counting", count=2000, length=length)
            each.append(sum(row.count(token) for row in tokens) / len(tokens))
        assert each == pytest.approx([each[0]] * len(each), rel=0.05)


def test_text_is_tested_on_the_same_bytes_at_every_length(compared):
    folder, _ = compared
    setting = SETTINGS["text"] | {"steps": 1}
    data = TASKS["text"].data(setting, 0, str(folder / "corpus.txt"), None)
    assert list(data.tests) == setting["lengths"]
    joined = []
    for length, batches in data.tests.items():
        assert all(batch["tokens"].size(1) == length for batch in batches)
        joined.append(torch.cat([batch["targets"].flatten() for batch in batches]))
        for batch in batches:
            assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert len(joined[0]) == setting["test_bytes"]
    assert all(torch.equal(joined[0], other) for other in joined)


def test_the_last_bytes_are_the_same_at_every_length(compared):
    folder, _ = compared
    setting = SETTINGS["text"] | {"steps": 1}
    data = TASKS["text"].data(setting, 0, str(folder / "corpus.txt"), None)
    last = setting["lengths"][0]
    found = [
        torch.cat([batch["targets"][batch["ends"], -last:].flatten() for batch in batches])
        for batches in data.tests.values()
    ]
    assert len(found[0]) == last * setting["test_bytes"] // max(setting["lengths"])
    assert all(torch.equal(found[0], other) for other in found)


def test_splits_share_no_bytes(compared):
    folder, _ = compared
    text = "".join(map(chr, np.random.default_rng(0).integers(32, 122, 4000)))  # no stretch of it comes again
    (folder / "other_text.txt").write_text(text)
    data = TASKS["text"].data(SETTINGS["text"] | {"steps": 40}, 0, str(folder / "other_text.txt"), None)

    def stretches(batches):
        return {bytes(row[:8].tolist()) for batch in batches for row in batch["tokens"]}

    train, held, test = stretches(data.train), stretches(data.validation), stretches(data.tests[8])
    assert not train & held
    assert not train & test
    assert not held & test


@pytest.mark.parametrize("encoding", ["learned", "rope", "alibi", "t5", "fire", "cope", "forgetting_gate"])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_all_start_from_the_same_weights(compared, encoding, mixing):
    setting = SETTINGS["recall"] | {"steps": 1}
    models = [
        cell.started(TASKS["recall"], setting, *encodings.recipes(encodings.ENCODINGS[name], MIXINGS[how], 16), 7)
        for name, how in (("none", "softmax"), (encoding, mixing))
    ]
    plain, other = (model.state_dict() for model in models)
    assert set(plain) <= set(other)
    assert all(torch.equal(value, other[name]) for name, value in plain.items())


@pytest.mark.parametrize("name", TASKS)
def test_data_are_those_of_their_seed_and_tests_are_everybodys(compared, name):
    folder, _ = compared
    setting = SETTINGS[name] | {"steps": 2}
    one, again, other = (TASKS[name].data(setting, seed, str(folder / "corpus.txt"), None) for seed in (0, 0, 1))

    def tokens(batches):
        return torch.cat([batch["tokens"].flatten() for batch in batches])

    assert torch.equal(tokens(one.train), tokens(again.train))
    assert not torch.equal(tokens(one.train), tokens(other.train))
    assert len(one.train) == 2
    for length in setting["lengths"]:
        assert torch.equal(tokens(one.tests[length]), tokens(other.tests[length]))


def test_measures_against_numbers_by_hand():
    scores = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [math.log(3), 0.0]]])  # (B, N, V)
    batch = {"tokens": torch.zeros(1, 3), "targets": torch.tensor([[0, 1, 0]]), "ends": torch.tensor([True])}
    found = TASKS["text"].measure(scores, batch, 1)
    assert found["last"] == (pytest.approx(2 - math.log2(3)), 1)
    assert found["all"] == (pytest.approx(4 - math.log2(3)), 3)
    assert TASKS["text"].measure(scores, batch | {"ends": torch.tensor([False])}, 1)["last"] == (0.0, 0)
    batch["targets"] = torch.tensor([[NO_TARGET, 1, 0]])
    assert TASKS["recall"].measure(scores, batch, 1) == {"all": (100.0, 2)}  # of equal scores the first is taken: 0
    batch["targets"] = torch.tensor([[NO_TARGET, 0, 1]])
    assert TASKS["recall"].measure(scores, batch, 1) == {"all": (100.0, 2)}


def test_references_are_counts():
    always = tasks.Always(torch.tensor([2, 1, 2, 0]), 4)
    assert always(torch.zeros(3, 5)).argmax(-1).tolist() == [[2] * 5] * 3
    assert always(torch.zeros(3, 5, 6)).argmax(-1).tolist() == [2] * 3
    setting = SETTINGS["recall"] | {"steps": 50, "test_sequences": 64, "lengths": [64]}
    data = TASKS["recall"].data(setting, 0, "", None)
    (reference,) = data.references.values()
    found = cell.measured(reference, TASKS["recall"], data.tests[64], 64)["all"]
    assert found == pytest.approx(100 / setting["values"], abs=5)  # as often as any other
    text = "ab" * 2000 + "ac" * 500  # after a, b four times out of five
    given, after = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long().unfold(0, 2, 1).T
    logs = log_frequencies(given, after)
    assert logs[ord("a"), ord("b")].exp() == pytest.approx(0.8, abs=1e-3)
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(256))
    assert log_frequencies(given)[ord("a")].exp() == pytest.approx(0.5, abs=1e-3)


# encodings


@pytest.mark.parametrize("mixing", MIXINGS)
def test_what_is_run_is_there(mixing):
    for task, names in MIXINGS[mixing].only.items():
        assert set(names) <= set(TASKS[task].encodings)
    for choice in encodings.ENCODINGS.values():
        assert encodings.combined(choice, MIXINGS[mixing]) == (mixing != "softmax" or not choice.attention)


@pytest.mark.parametrize("name", ["sinusoidal", "learned", "rope", "alibi"])
def test_recipes_build(name):
    attention, recipe = encodings.recipes(encodings.ENCODINGS[name], MIXINGS["exp"], 12)
    assert attention == MIXINGS["exp"].attention
    built = build_encoding(recipe, 16, 2, is_causal=True)
    assert type(built).__name__ == recipe["module"]
    if name == "learned":
        assert len(built.weight) == 12


def test_recipes_take_lengths_and_factors_at_any_depth():
    _, yarn = encodings.recipes(encodings.RESCALED["yarn"], MIXINGS["softmax"], 64, 4)
    assert yarn["scaling"] == {"module": "YaRN", "factor": 4.0, "original_length": 64}
    assert encodings.RESCALED["yarn"].encoding["scaling"]["factor"] == encodings.FACTOR  # the table is as it was


# results


def test_every_cell_has_its_file(compared):
    folder, _ = compared
    for name, task in TASKS.items():
        runs = report.load(folder / "out", name)
        has = [encoding for encoding in FEW if encoding in task.encodings]
        wanted = {
            (e, m, s)
            for e in has
            for m in ("softmax", "first_hop")
            for s in (0, 1)
            if (e, m) != ("alibi_rates", "softmax")
        }
        assert {(r["encoding"], r["mixing"], r["seed"]) for r in runs} == wanted
        for one in runs:
            assert one["setting"]["steps"] == 2
            assert list(one["test"]) == [str(length) for length in SETTINGS[name]["lengths"]]
            assert math.isfinite(one["train_loss"])
            assert bool(one["rescaled"]) == (one["encoding"] == "rope" and name != "digits")
            assert [len(times) for times in one["times"].values()] == ([] if one["mixing"] == "softmax" else [2])
            assert all(list(known) == list(one["test"]) for known in one["references"].values())


def test_a_table_has_no_number_beyond_its_rows(compared):
    folder, _ = compared
    for one in report.load(folder / "out", "text"):
        assert one["test"]["8"] is not None
        assert (one["test"]["16"] is None) == (one["encoding"] == "learned")
    (line,) = (x for x in report.positions_tables(folder / "out")["positions_text"].splitlines() if "learned" in x)
    assert line.count("—") == 2


def test_other_frequencies_at_test_change_the_numbers_beyond_training_alone(compared):
    folder, _ = compared
    (one,) = (
        r
        for r in report.load(folder / "out", "text")
        if (r["encoding"], r["mixing"], r["seed"]) == ("rope", "first_hop", 0)
    )
    assert list(one["rescaled"]["yarn"]) == ["16"]
    assert one["rescaled"]["yarn"]["16"] != one["test"]["16"]
    shown = report.rows([one])["RoPE, base 100 at test"]["first_hop"][0]["test"]
    assert shown == {"8": one["test"]["8"], "16": one["rescaled"]["yarn"]["16"]}


def test_the_same_command_again_trains_nothing(compared, monkeypatch):
    folder, arguments = compared
    monkeypatch.setattr(run, "run_cell", lambda _: pytest.fail("trained again"))
    run.main(arguments)
    with pytest.raises(ValueError, match=r"with another .steps.; delete it"):
        run.main([*arguments[:-1], "1"])
    other = folder / "other.txt"
    other.write_text("something else altogether, and again. " * 90)
    with pytest.raises(ValueError, match=r"with another .sha256.; delete it"):
        run.main([str(other) if word.endswith("corpus.txt") else word for word in arguments])


def test_a_missing_cell_is_trained_again_and_no_other(compared, monkeypatch):
    folder, arguments = compared
    path = folder / "out" / "positions" / "results" / "recall-rope-softmax-seed1.json"
    before = json.loads(path.read_text())
    path.unlink()
    ran = []
    monkeypatch.setattr(run, "run_cell", lambda one: ran.append(one.file) or cell.run_cell(one))
    run.main(arguments)
    assert ran == [path]
    assert json.loads(path.read_text())["test"] == before["test"]  # seeds make it the same run


def test_tables_and_figures_need_no_training(compared, monkeypatch):
    folder, _ = compared
    monkeypatch.setattr(cell, "run_cell", lambda _: pytest.fail("trained"))
    written = {path.name: path for path in draw.draw(folder / "out", [report.FOLDER])}
    assert set(written) == {"table.md", *(f"{name}.png" for name in TASKS)}
    found = tables.other_tables(folder / "out")
    assert {
        f"positions_{name}" for name in (*TASKS, "text_last", "cost", "summary", "agreement", "recall_seeds")
    } <= set(found)
    line = next(x for x in found["positions_recall"].splitlines() if x.startswith("| RoPE |"))
    by = report.rows(report.load(folder / "out", "recall"))["RoPE"]
    values = [one["test"]["16"]["all"] for one in by["softmax"]]
    assert f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" == line.split("|")[2].strip()


def test_agreement_is_a_rank_correlation_over_encodings(compared):
    folder, _ = compared
    (like,) = (
        one
        for one in report.load(folder / "out", "text")
        if (one["encoding"], one["mixing"], one["seed"]) == ("none", "softmax", 0)
    )
    first, last = (str(length) for length in like["setting"]["lengths"][:: len(like["setting"]["lengths"]) - 1])
    runs = [
        like
        | {
            "encoding": encoding,
            "mixing": mixing,
            "test": {first: {"all": up}, last: {"all": up if mixing == "softmax" else -up}},
        }
        for mixing in ("softmax", "first_hop")
        for up, encoding in enumerate(("none", "rope", "alibi", "t5"))
    ]
    lines = [line.split(" | ") for line in report._agreement(runs).splitlines() if line.startswith("| text")]
    assert [line[2].removesuffix(" |") for line in lines] == ["1.00 of 4", "-1.00 of 4"]


def test_without_results_the_page_says_so(tmp_path):
    assert set(report.positions_tables(tmp_path).values()) == {report.NONE_YET}
    assert report.report(tmp_path) == []
    assert ROOT / report.FOLDER / "README.md" in tables.readmes()


def test_results_of_several_settings_are_refused(compared, tmp_path):
    folder, _ = compared
    results = tmp_path / "positions" / "results"
    results.mkdir(parents=True)
    one = json.loads((folder / "out/positions/results/recall-rope-first_hop-seed0.json").read_text())
    for seed in (0, 1):
        one["setting"]["steps"] += seed
        (results / f"recall-rope-first_hop-seed{seed}.json").write_text(json.dumps(one | {"seed": seed}))
    with pytest.raises(ValueError, match="one setting for recall"):
        report.load(tmp_path, "recall")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", "0"], "jobs: expected"),
        (["--seeds", "-1"], "seeds: expected"),
        (["--max-steps", "0"], "max-steps: expected"),
        (["--steps-factor", "0"], "steps-factor: expected"),
        (["--encodings", "axial"], "encodings: expected"),
        (["--encodings", "relative_rates", "--mixings", "softmax"], "encodings: expected"),
        (["--corpus", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_ends_in_one_sentence(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT.parent)
    with pytest.raises(SystemExit) as stop:
        command(["positions", "--tasks", "text", "--output", str(tmp_path), *words])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


# what is committed


@pytest.mark.parametrize("name", TASKS)
def test_committed_results_are_complete_and_of_the_committed_settings(name):
    runs = report.load(ROOT, name)
    seeds = (0, 1) if name == "text" else (0, 1, 2)  # as the README says
    wanted = {
        (encoding, mixing, seed)
        for encoding, choice in TASKS[name].encodings.items()
        for mixing, how in MIXINGS.items()
        for seed in seeds
        if encodings.combined(choice, how) and encoding in how.only.get(name, [encoding])
    }
    assert {(one["encoding"], one["mixing"], one["seed"]) for one in runs} == wanted
    for one in runs:
        assert {key: value for key, value in one["setting"].items() if key != "sha256"} == COMMITTED[name]
        choice, how = TASKS[name].encodings[one["encoding"]], MIXINGS[one["mixing"]]
        attention, encoding = encodings.recipes(choice, how, COMMITTED[name]["lengths"][0])
        assert one["recipes"] == {"attention": attention, "encoding": encoding}
    starts = {(one["encoding"], one["seed"]): one["parameters"] for one in runs if one["mixing"] == "softmax"}
    assert len({starts["none", seed] for seed in seeds}) == 1
