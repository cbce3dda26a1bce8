"""The study of positions at a size that takes seconds, and its probes on vectors whose answers are known."""

from __future__ import annotations

import json
import math

import pytest
import torch

from experiments.position_study import report, run
from experiments.position_study.counts import counted
from experiments.position_study.model import IGNORED, MASK, PositionModel, mask_tokens
from experiments.position_study.probes import locality, probe_states, probe_table, ridge
from experiments.position_study.train import ENCODINGS, MIXINGS, ROLES
from experiments.results import ROOT
from experiments.tables import other_tables
from liegroup_attn.lightning import ByteCorpus

COMMITTED = dict(run.FIXED)  # before a fixture makes it small
POSITION = torch.arange(64, dtype=torch.float64)


def _circle(width: float = 2.0) -> torch.Tensor:
    """Vectors whose similarity is circulant and falls within a few tokens: bumps on a ring."""
    gap = (POSITION[:, None] - POSITION + 32) % 64 - 32
    return torch.exp(-((gap / width) ** 2))


def test_ridge_finds_a_line_and_prefers_nothing_to_noise():
    x = torch.randn(200, 5, dtype=torch.float64)
    weights = torch.arange(5, dtype=torch.float64)
    torch.testing.assert_close(ridge(x, x @ weights + 3)(x), x @ weights + 3, atol=1e-4, rtol=1e-4)
    noise = torch.randn(200, dtype=torch.float64)
    assert ridge(x, noise)(x).var() < 0.1
    assert torch.equal(ridge(torch.ones_like(x), noise)(x), noise.mean().expand(200))  # features that say nothing


def test_positions_on_a_line_are_read_and_random_ones_are_not():
    line = POSITION[:, None] * torch.randn(16, dtype=torch.float64) + 5
    found = probe_table(line)
    assert found["r2"] > 0.999
    assert found["mae"] < 0.1
    assert found["order"] == 1.0
    random = [probe_table(torch.randn(64, 64, generator=torch.Generator().manual_seed(s))) for s in range(8)]
    for name, most in {"r2": 0.0, "distance_r2": 0.05}.items():
        assert sum(r[name] for r in random) / 8 <= most
    assert all(abs(r["order"] - 0.5) < 0.3 for r in random)


def test_a_ring_knows_distance_but_hardly_position():
    angle = 2 * math.pi * POSITION / 128  # half a turn, so that distance has one cosine
    half = torch.stack([angle.cos(), angle.sin()], -1)
    ring = torch.stack([(2 * angle).cos(), (2 * angle).sin()], -1)
    assert probe_table(half)["r2"] > 0.9
    assert probe_table(ring)["r2"] < 0.7


def test_states_are_read_in_windows_that_the_fit_has_not_seen():
    place = POSITION[:, None] * torch.ones(8, dtype=torch.float64) / 64
    fit, out = (place + 0.01 * torch.randn(6, 64, 8, dtype=torch.float64) for _ in range(2))
    assert probe_states(fit, out)["r2"] > 0.99
    assert probe_states(fit, out)["order"] > 0.95
    noise = probe_states(torch.randn(20, 64, 8), torch.randn(20, 64, 8))
    assert noise["r2"] < 0.01
    assert noise["distance_r2"] < 0.01
    assert abs(noise["order"] - 0.5) < 0.1
    assert noise["mae"] == pytest.approx(16.0, abs=0.3)  # that of the mean of 0 … 63


def test_a_ring_of_bumps_is_local_and_equal_vectors_are_not():
    numbers, curve, similarity = locality(_circle())
    assert numbers["contrast"] > 0.5
    assert numbers["mass"] > 5
    assert numbers["rows"] > 0.8
    assert curve[0] == pytest.approx(1.0)
    assert curve[1] > curve[2] > curve[8]
    torch.testing.assert_close(similarity.roll((1, 1), (0, 1)), similarity)  # circulant
    flat, _, _ = locality(torch.ones(64, 8))
    assert flat["contrast"] == pytest.approx(0.0)
    assert flat["mass"] == pytest.approx(1.0)
    wide, _, _ = locality(_circle(8.0))
    assert wide["mass"] < numbers["mass"]


def test_labels_stand_at_hidden_positions_alone():
    tokens = torch.randint(MASK, (500, 40))
    inputs, labels = mask_tokens(tokens, torch.Generator().manual_seed(0))
    asked = labels != IGNORED
    assert torch.equal(asked.sum(-1), torch.full((500,), 6))  # 15 % of 40
    assert torch.equal(labels[asked], tokens[asked])
    assert torch.equal(inputs[~asked], tokens[~asked])
    assert (inputs[asked] == MASK).double().mean() == pytest.approx(0.8, abs=0.03)
    assert (inputs[asked] == tokens[asked]).double().mean() == pytest.approx(0.1, abs=0.03)
    again, _ = mask_tokens(tokens, torch.Generator().manual_seed(0))
    assert torch.equal(again, inputs)
    assert (mask_tokens(tokens[:, :1], torch.Generator())[1] != IGNORED).all()  # at least one


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_decoder_does_not_see_ahead_and_an_encoder_does(mixing, encoding):
    recipe = ENCODINGS[encoding] | ({"num_positions": 8} if encoding == "learned" else {})
    tokens = torch.randint(MASK, (2, 8))
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % MASK
    for is_causal in ROLES.values():
        model = PositionModel(MIXINGS[mixing], recipe, is_causal, 16, 2, 2)
        states = model.states(tokens)
        assert [s.shape for s in states] == [(2, 8, 16)] * 3
        same = torch.allclose(states[-1][:, :-1], model.states(changed)[-1][:, :-1], atol=1e-6)
        assert same == is_causal
        assert (model.table(8) is None) == (encoding == "rotary")


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("position_study")
    (folder / "corpus.txt").write_text("the cat sat on the mat, and the dog sat on the cat. " * 200)
    patch = pytest.MonkeyPatch()
    patch.setattr(run, "FIXED", run.FIXED | {"width": 16, "num_heads": 2})
    arguments = ["--corpus", str(folder / "corpus.txt"), "--steps", "2", "--context", "24", "--batch-size", "2"]
    arguments += ["--eval-windows", "4", "--seeds", "0", "1", "--output", str(folder / "out"), "--jobs", "1"]
    run.main(arguments)
    yield folder, arguments
    patch.undo()


def test_json_holds_what_was_measured(studied):
    folder, _ = studied
    results = report.load(folder / "out")
    assert list(results) == [("softmax", e, r) for e in ENCODINGS for r in ROLES]
    for (_, encoding, role), runs in results.items():
        assert [one["seed"] for one in runs] == [0, 1]
        for one in runs:
            assert one["role"] == role
            assert math.isfinite(one["validation_loss"])
            assert one["setting"]["sha256"] == one["data"]["sha256"]
            assert {"hardware", "versions", "date", "code"} <= set(one)
            for when in ("untrained", "trained"):
                assert len(one[when]["layers"]) == 3
                assert (one[when]["table"] is None) == (encoding == "rotary")
            if encoding == "sinusoidal":
                assert one["untrained"]["table"] == one["trained"]["table"]
    starts = [results["softmax", "learned", role][0]["untrained"]["table"] for role in ROLES]
    assert starts[0] == starts[1]  # the control is one
    ends = [results["softmax", "learned", role][0]["trained"]["table"] for role in ROLES]
    assert ends[0]["map"] != ends[1]["map"]
    assert len(ends[0]["map"]) == len(ends[0]["curve"]) == 24


def test_the_same_command_again_trains_nothing(studied, monkeypatch):
    _, arguments = studied
    monkeypatch.setattr(run, "train", lambda *a: pytest.fail("trained again"))
    run.main(arguments)
    with pytest.raises(ValueError, match=r"with another \(steps\); delete it"):
        run.main([*arguments, "--steps", "3"])


def test_tables_and_figures(studied):
    folder, _ = studied
    written = {path.name: path for path in report.report(folder / "out")}
    assert set(written) == {"table.md", *(f"softmax_{kind}.png" for kind in ("similarity", "distance", "layers"))}
    assert all(path.stat().st_size > 1000 for path in written.values() if path.suffix == ".png")
    tables = report.study_tables(folder / "out")
    rows = {name: sum(line.startswith("|") for line in text.splitlines()) for name, text in tables.items()}
    assert rows == {
        "position_study_embeddings": 2 + 4,  # untrained, two roles, and the fixed one
        "position_study_hidden": 2 + 6,
        "position_study_claim": 2 + sum(map(len, report.CLAIMS.values())),
    }
    assert tables.items() <= other_tables(folder / "out").items()
    path = folder / "out" / report.FOLDER / "results" / "softmax-encoder-rotary-seed0.json"
    other = json.loads(path.read_text())
    other["setting"]["steps"] = 99
    extra = path.with_name("softmax-encoder-rotary-seed9.json")
    extra.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="one setting"):
        report.load(folder / "out")
    extra.unlink()


def _run(r2, contrast, seed, loss=2.0):
    """A run of a role whose untrained table differs a little between seeds."""
    untrained = {"r2": 0.01 * seed, "contrast": 0.01 * seed}
    return {
        "trained": {"table": {"r2": r2, "contrast": contrast}},
        "untrained": {"table": untrained},
        "validation_loss": loss,
        "counts": {"none": 3.3, "left": 2.5},
        "seed": seed,
    }


LOCAL, ABSOLUTE, BOTH = (0.1, 0.6), (0.9, 0.2), (0.9, 0.6)
VERDICTS = {
    "the claim": ([LOCAL] * 3, [ABSOLUTE] * 3, ["supported", "supported", "supported"]),
    "the reverse": ([ABSOLUTE] * 3, [LOCAL] * 3, ["refuted", "supported", "refuted"]),
    "both are both": ([BOTH] * 3, [BOTH] * 3, ["undecided", "supported", "undecided"]),
    "one seed differs": ([LOCAL] * 3, [ABSOLUTE, ABSOLUTE, (0.0, 0.9)], ["undecided", "supported", "undecided"]),
    "smaller than chance": ([(0.1, 0.2)] * 3, [(0.11, 0.19)] * 3, ["undecided", "supported", "undecided"]),
}


@pytest.mark.parametrize(("encoders", "decoders", "wanted"), VERDICTS.values(), ids=VERDICTS.keys())
def test_verdicts_follow_the_rule(encoders, decoders, wanted):
    results = {
        ("softmax", "learned", role): [_run(*numbers, seed) for seed, numbers in enumerate(tables)]
        for role, tables in (("encoder", encoders), ("decoder", decoders))
    }
    _, rows = report._claims(results)
    assert len(rows) == sum(map(len, report.CLAIMS.values()))
    assert list(dict.fromkeys((row[1], row[-1]) for row in rows)) == list(zip(report.CLAIMS, wanted, strict=True))
    results["softmax", "learned", "encoder"][1]["validation_loss"] = 2.6  # worse than counting
    _, rows = report._claims(results)
    assert {row[-1] for row in rows} == {"none: a model has not learned its task"}


def test_a_line_is_no_neighbourhood_and_a_neighbourhood_no_line():
    """The two things that the claim tells apart, told apart by the two numbers."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    line = POSITION[:, None] / 64 * noise(1, 64) + 0.05 * noise(64, 64)
    weights = torch.exp(-0.5 * ((POSITION[:, None] - POSITION) / 2) ** 2)
    smooth = weights @ noise(64, 64)  # each vector like its neighbours', and nothing else
    line, smooth = line - line.mean(0), smooth - smooth.mean(0)
    assert probe_table(line)["r2"] > 0.9
    assert probe_table(smooth)["r2"] < 0.5
    assert locality(smooth)[0]["contrast"] > 2 * locality(line)[0]["contrast"]


def test_counts_against_counts_by_hand(tmp_path):
    text = ("abxady" * 2000).encode()
    (tmp_path / "text.txt").write_bytes(text)
    data = ByteCorpus(str(tmp_path / "text.txt"), context=12, batch_size=4, eval_windows=8)
    data.setup("fit")
    decoder, encoder = counted(data, True), counted(data, False)
    # After a come b and d by turns, after all others one byte; between two neighbours there is but one.
    assert decoder["left"] == pytest.approx(math.log(2) / 3, abs=0.02)
    assert 0 <= encoder["both"] < 0.6 * encoder["left"]  # but at the edges, which have one neighbour
    assert decoder["none"] == pytest.approx(math.log(3) / 3 + 2 / 3 * math.log(6), abs=0.02)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (["--steps", "0"], "steps: expected at least 1, got 0"),
        (["--context", "8"], "context: expected at least 24, got 8"),
        (["--seeds", "-1"], "seeds: expected at least 0"),
        (["--jobs", "0"], "jobs: expected at least 1"),
        (["--path", "there"], "path: expected with one of the sources"),
    ],
)
def test_bad_input(studied, change, error):
    _, arguments = studied
    with pytest.raises(ValueError, match=error):
        run.main([*arguments, *change])


def test_tables_that_are_too_small():
    for probe in (probe_table, locality):
        with pytest.raises(ValueError, match="table: expected at least"):
            probe(torch.randn(4, 8))


def test_nothing_without_results(tmp_path):
    assert report.report(tmp_path) == []
    assert set(report.study_tables(tmp_path).values()) == {report.NONE_YET}


def test_committed_results_are_complete_and_of_the_committed_settings():
    results = report.load(ROOT)
    assert list(results) == [("softmax", encoding, role) for encoding in ENCODINGS for role in ROLES]
    defaults = run._parse([])
    names = ("corpus", "context", "batch_size", "steps", "eval_windows")
    wanted = {name: getattr(defaults, name) for name in names} | COMMITTED
    for runs in results.values():
        assert [one["seed"] for one in runs] == defaults.seeds
        for one in runs:
            assert {key: value for key, value in one["setting"].items() if key != "sha256"} == wanted
