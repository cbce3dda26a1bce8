"""The command line: what it runs, and that a wrong input ends in one sentence, a status and no traceback."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from covering import covering

from liegroup_attn.lightning import LanguageModel
from liegroup_attn.lightning.cli import main

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]
LIE = {"module": "LieAttention", "time": 2.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a corpus and a config."""
    root = tmp_path_factory.mktemp("cli")
    (root / "texts").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        text = bytes(torch.randint(97, 123, (200,), generator=generator).tolist())
        (root / "texts" / f"{i}.txt").write_bytes(text)
    model = {"width": 16, "depth": 1, "num_heads": 2, "warmup_steps": 2, "attention": LIE}
    data = {"source": str(root / "texts"), "context": 16, "batch_size": 2, "train_windows": 12, "eval_windows": 4}
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    config = {
        "trainer": {"accelerator": "cpu", "max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1, **silent},
        "model": {"class_path": "LanguageModel", "init_args": model},
        "data": {"class_path": "ByteCorpus", "init_args": data},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root


@pytest.fixture
def run(place, capfd, monkeypatch, tmp_path):
    """Run a subcommand with the config; gives (status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["liegroup-attn"])  # main replaces it
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, config: bool = True) -> tuple[int, str, str]:
        given = [*arguments[:1], *(["--config", str(place / "config.yaml")] if config else []), *arguments[1:]]
        status = 0
        try:
            main(given)
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def checkpoint(place, request) -> Path:
    argv = sys.argv
    try:
        root = ["--trainer.default_root_dir", str(place / "out")]
        main(["fit", "--config", str(place / "config.yaml"), *root])
    finally:
        sys.argv = argv
    (file,) = (place / "out").rglob("*.ckpt")
    return file


def test_help(run):
    for arguments in ((), ("--help",), ("-h",)):
        status, out, _ = run(*arguments, config=False)
        assert status == 0
        for word in ("fit", "validate", "test", "predict", "compare", "draw", "--config"):
            assert word in out
    for word in ("fit", "validate", "test", "predict"):
        status, out, _ = run(word, "--help", config=False)
        assert status == 0
        assert "--model" in out
        assert "--ckpt_path" in out


@pytest.mark.parametrize("kind", ["LanguageModel", "TokenClassifier", "ImageClassifier"])
def test_help_of_a_model_lists_what_it_hands_on(run, kind):
    status, out, _ = run("fit", "--model.help", kind, config=False)
    assert status == 0
    for name in ("attention", "width", "encoding", "mlp_ratio", "dropout", "streams", "learning_rate", "momentum"):
        assert f"--model.{name} " in out
    for hidden in ("options", "transformer", "is_causal", "rotary_layout"):
        assert f"--model.{hidden}" not in out
    for told in ("number of residual streams", "on attention entries", "(type: int, default: 1)"):
        assert told in out


def test_fit_leaves_a_checkpoint_metrics_figures_and_the_config(place, checkpoint):
    folder = checkpoint.parents[1]
    assert {"config.yaml", "metrics.csv", "figures", "checkpoints"} <= {p.name for p in folder.iterdir()}
    header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "validation/bits_per_byte", "lie/0/time"} <= set(header)
    assert (folder / "figures" / "layer_0.png").is_file()
    callbacks = torch.load(checkpoint, weights_only=True)["callbacks"]
    assert "ExactResume" in callbacks
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert kept["model"]["init_args"]["attention"] == LIE
    assert isinstance(LanguageModel.load_from_checkpoint(checkpoint, weights_only=True), LanguageModel)


@pytest.mark.parametrize(
    ("word", "shown"), [("validate", "validation/loss"), ("test", "test/bits_per_byte"), ("predict", "")]
)
def test_run_a_checkpoint(run, checkpoint, word, shown):
    status, out, err = run(word, "--ckpt_path", str(checkpoint))
    assert status == 0, err
    assert shown in out


def test_the_config_kept_by_a_run_runs_it_again(run, checkpoint):
    config = checkpoint.parents[1] / "config.yaml"
    status, out, err = run("test", "--config", str(config), "--ckpt_path", str(checkpoint), config=False)
    assert status == 0, err
    assert "test/loss" in out


OTHERS = (
    "{module: SoftmaxAttention}",
    "{module: LieAttention, time: 2.0, first_hop: true}",
    "{module: LieAttention, time: 0.1}",
)


@pytest.mark.parametrize(
    ("word", "attention"), covering(itertools.product(("test", "validate", "fit"), OTHERS), strength=1)
)
def test_the_config_says_what_is_run_and_not_the_checkpoint(run, checkpoint, word, attention):
    """Lightning's own CLI would silently run the checkpoint's variant under the config's name."""
    status, _, err = run(word, "--ckpt_path", str(checkpoint), "--model.init_args.attention", attention)
    assert status == 1
    sentence = err.splitlines()[-1]
    assert sentence.startswith("liegroup-attn: ValueError: checkpoint: expected the parameters of attention=")
    assert sentence.endswith("it was trained with another variant, load it with that config")
    assert "Traceback" not in err


WRONG = [
    # arguments, status, words of the last lines of stderr
    (("fit", "--data.init_args.source", "no/such/folder"), 1, ("source: expected", "no/such/folder", "correct")),
    (("fit", "--data.init_args.context", "9999"), 1, ("tiny corpus", "expected at least", "got", "lower context")),
    (("fit", "--data.init_args.max_bytes", "100"), 1, ("tiny corpus", "raise max_bytes")),
    (("test", "--ckpt_path", "no.ckpt"), 1, ("no.ckpt", "nothing there")),
    (("test", "--ckpt_path", "{place}/config.yaml"), 1, ("checkpoint: expected a whole one", "config.yaml")),
    (("test", "--ckpt_path", "{place}/cut.ckpt"), 1, ("checkpoint: expected a whole one", "cut.ckpt")),
    (("fit", "--model.init_args.num_heads", "3"), 1, ("num_heads: expected a divisor of width=16, got 3",)),
    (("fit", "--model.init_args.attention.time", "-1.0"), 1, ("time: expected 0 < time < max_time",)),
    (("fit", "--model.init_args.widht", "4"), 2, ("widht",)),
    (("fit", "--model.init_args.dropuot", "4"), 2, ("dropuot",)),
    (("fit", "--model.init_args.streams", "two"), 2, ("streams", "two")),
    (("fit", "--model.init_args.attention.tiem", "4"), 1, ("attention: expected keys", "did you mean time?")),
    (("fit", "--model.init_args.attention.clock", "Sundial"), 1, ("Sundial", "ExponentialClock")),
    (("fit", "--model.init_args.attention", "{{module: Softmax}}"), 1, ("Softmax", "did you mean SoftmaxAttention?")),
    (("fit", "--trainer.max_stepz", "4"), 2, ("max_stepz",)),
    (("fit", "--data.init_args.contxt", "4"), 2, ("contxt",)),
    (("fit", "--config", "{place}/unknown.yaml"), 2, ("widht",)),
    (("fit", "--config", "no.yaml"), 2, ("no.yaml",)),
    (
        ("fit", "--trainer.gradient_clip_algorithm", "x"),
        1,
        ("liegroup-attn: MisconfigurationException", "x is invalid"),
    ),
    (("fly",), 2, ("fly", "fit")),
]


@pytest.mark.parametrize(("arguments", "status", "words"), WRONG, ids=[" ".join(a) for a, _, _ in WRONG])
def test_wrong_inputs(run, place, checkpoint, arguments, status, words):
    (place / "unknown.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"widht": 3}}}))
    (place / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:5000])  # the disk was full
    got, _, err = run(*(a.format(place=place) for a in arguments), config=arguments != ("fly",))
    assert got == status, err
    assert "Traceback" not in err
    for word in words:
        assert word in err[err.find("error:") if status == 2 else 0 :]
    if status == 1:
        assert err.splitlines()[-1].startswith("liegroup-attn: ") or "Given value" in err.splitlines()[-1]


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(LanguageModel, "training_step", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run("fit", "--trainer.logger", "false")


@pytest.mark.parametrize("word", ["compare", "draw"])
def test_experiments_need_a_clone(run, monkeypatch, word):
    def missing(lacking: str):
        def run_module(name: str, **_) -> None:
            raise ModuleNotFoundError(f"No module named {lacking!r}", name=lacking)

        return run_module

    for lacking in ("experiments", f"experiments.{word}"):
        monkeypatch.setattr("runpy.run_module", missing(lacking))
        status, _, err = run(word, config=False)
        assert status == 1
        assert f"experiments.{word}: expected the repository's folder experiments/ here, got none; run this in" in err
    monkeypatch.setattr("runpy.run_module", missing("pandas"))  # no user's mistake
    with pytest.raises(ModuleNotFoundError, match="pandas"):
        run(word, config=False)


def test_experiments_get_their_arguments(run, monkeypatch):
    seen = []
    monkeypatch.setattr("runpy.run_module", lambda name, **_: seen.append((name, *sys.argv)))
    assert run("compare", "--help", config=False)[0] == 0
    assert seen == [("experiments.compare", "liegroup-attn compare", "--help")]


@pytest.mark.slow
def test_two_processes(place, tmp_path):
    """strategy ddp starts the command again: sys.argv[0] has to be the script itself."""
    script = shutil.which("liegroup-attn") or shutil.which("liegroup-attn", path=Path(sys.executable).parent)
    if script is None:
        pytest.skip("liegroup-attn is not installed as a command")
    options = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.default_root_dir", str(tmp_path)]
    command = [sys.executable, script, "fit", "--config", str(place / "config.yaml"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "All distributed processes registered. Starting with 2 processes" in done.stderr
    (header, *rows) = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    assert "validation/loss" in header
    assert rows
    assert list(tmp_path.rglob("*.ckpt"))


def test_manifold_precision_momentum_and_guard_from_the_command_line(run):
    plugin = ["--trainer.plugins+=ManifoldPrecision", "--trainer.plugins.precision", "bf16-true"]
    status, _, err = run("fit", *plugin, "--model.momentum", "0.9", "--model.manifold_learning_rate", "0.1")
    assert status == 0, err
    (file,) = Path().rglob("*.ckpt")
    found = torch.load(file, weights_only=True)
    dtypes = {name: v.dtype for name, v in found["state_dict"].items() if name.endswith(("time", "head.weight"))}
    assert sorted(map(str, dtypes.values())) == ["torch.bfloat16", "torch.float32"]
    groups = found["optimizer_states"][0]["param_groups"]
    assert [group["momentum"] for group in groups] == [0.9] * 3
    assert [group["initial_lr"] for group in groups] == [3e-3, 3e-3, 0.1]
    status, _, err = run("fit", "--trainer.precision", "bf16-true")
    assert status == 1
    assert "time: expected float32 or float64" in err
    assert "ManifoldPrecision" in err
