"""LightningModules: what they log, keep, load, generate and predict; mixed precision and two processes."""

from __future__ import annotations

import copy
import functools
import math
import subprocess
import sys
from inspect import signature
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger

from liegroup_attn.errors import CacheError, ConversionError, GeneratorError, ShapeError
from liegroup_attn.lightning import ByteCorpus, LanguageModel, RandomForests, TokenClassifier
from liegroup_attn.lightning.modules import Trained
from liegroup_attn.manifolds import ManifoldParameter
from liegroup_attn.nn import LieAttention, Transformer

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]
RECIPES = {
    "softmax": {"module": "SoftmaxAttention"},
    "exp": {"module": "LieAttention", "time": 2.0},
    "first_hop": {"module": "LieAttention", "first_hop": True, "time": 2.0},
    "resolvent": {"module": "LieAttention", "first_hop": True, "clock": "ExponentialClock", "time": 2.0},
    "softplus": {"module": "LieAttention", "rate_fn": "softplus", "time": 2.0},
    "longer": {"module": "LieAttention", "time": 8.0},
}
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def language_model(recipe=RECIPES["exp"], **options) -> LanguageModel:
    torch.manual_seed(0)
    options = {"vocab_size": 128, "width": 16, "depth": 2, "num_heads": 2, "warmup_steps": 2} | options
    return LanguageModel(dict(recipe), **options)


def classifier(recipe=RECIPES["exp"], **options) -> TokenClassifier:
    torch.manual_seed(0)
    options = {"vocab_size": 12, "report_depth": 9, "width": 16, "num_heads": 2, "warmup_steps": 2} | options
    return TokenClassifier(dict(recipe), **options)


@pytest.fixture
def corpus(tmp_path) -> ByteCorpus:
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog.\n" * 60)
    return ByteCorpus(str(file), context=16, batch_size=4, train_windows=24, eval_windows=7)


def forests() -> RandomForests:
    return RandomForests(
        num_nodes=8, max_depth=4, deep_nodes=12, deep_depth=9, train_size=24, val_size=8, test_size=10, batch_size=4
    )


def trainer(folder: Path, **options) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_steps": 6,
        "default_root_dir": folder,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return L.Trainer(**defaults | options)


# starts


@pytest.mark.parametrize("make", [language_model, classifier])
def test_variants_start_equal_and_differ_by_the_lie_parameters(make):
    base = dict(make(RECIPES["softmax"]).named_parameters())
    for recipe in list(RECIPES.values())[1:]:
        other = dict(make(recipe).named_parameters())
        assert all(torch.equal(other[name], value) for name, value in base.items())
        assert {name.split(".")[-1] for name in set(other) - set(base)} == {"time", "rate_weight", "rate_bias"}


@recipes
def test_every_parameter_gets_a_gradient(recipe):
    model, other = language_model(recipe), classifier(recipe)
    model.log = other.log = lambda *_, **__: None
    batch = {"tokens": torch.randint(128, (4, 9)), "targets": torch.randint(128, (4, 9))}
    model.training_step(batch, 0).backward()
    batch = {"tokens": torch.randint(12, (4, 9, 2)), "labels": torch.randint(12, (4, 9))}
    other.training_step(batch, 0).backward()
    for m in (model, other):
        assert [n for n, p in m.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


# checkpoints


@pytest.mark.parametrize("recipe", [RECIPES["softmax"], RECIPES["resolvent"]], ids=["softmax", "resolvent"])
@pytest.mark.parametrize("make", [language_model, classifier])
def test_checkpoints_load_with_weights_only(tmp_path, corpus, recipe, make):
    model, data = make(recipe), corpus if make is language_model else forests()
    before = copy.deepcopy(model)
    trained = trainer(tmp_path, max_steps=3)
    trained.fit(model, data)
    path = tmp_path / "saved.ckpt"
    trained.save_checkpoint(path)

    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["hyper_parameters"]["attention"] == recipe
    assert {type(value) for value in checkpoint["hyper_parameters"].values()} <= {dict, int, float, str, type(None)}
    for options in ({}, {"weights_only": True}):
        loaded = type(model).load_from_checkpoint(path, **options)
        assert dict(loaded.hparams) == dict(model.hparams)
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        assert [type(p) for p in loaded.parameters()] == [type(p) for p in before.parameters()]
        tokens = torch.randint(12, (2, 5) if make is language_model else (2, 5, 2))
        assert torch.equal(loaded.eval()(tokens), model.eval()(tokens))
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, dict(before.named_parameters())[n])]
    assert len(changed) == len(list(model.parameters()))  # all of it was trained


@pytest.mark.parametrize("make", [language_model, classifier])
def test_hyperparameters_are_all_arguments_given_or_not(make):
    """So that a checkpoint keeps its model when a default changes."""
    model = make(dropout=0.25)
    wanted = {*signature(type(model)).parameters, *signature(Trained).parameters, *signature(Transformer).parameters}
    assert set(model.hparams) == wanted - {"options", "transformer", "is_causal"}
    assert (model.hparams.dropout, model.hparams.streams, model.hparams.learning_rate) == (0.25, 1, 3e-3)
    with pytest.raises(TypeError, match="dropuot"):
        make(dropuot=0.25)


OTHERS = [(a, b) for a in RECIPES for b in RECIPES if a != b]


@pytest.mark.parametrize(("saved", "asked"), OTHERS)
def test_the_checkpoint_of_another_variant_is_refused(tmp_path, saved, asked):
    path = tmp_path / "saved.ckpt"
    one = trainer(tmp_path)
    one.strategy.connect(language_model(RECIPES[saved], depth=1))
    one.save_checkpoint(path, weights_only=True)
    message = r"checkpoint: expected the parameters of attention=.*, got .*attention=.*; .*load it with that config"
    with pytest.raises(ValueError, match=message):
        LanguageModel.load_from_checkpoint(path, attention=RECIPES[asked])
    LanguageModel.load_from_checkpoint(path, attention={**RECIPES[saved]}, dropout=0.3)  # this one may change


def test_the_checkpoint_of_another_size_is_refused(tmp_path):
    path = tmp_path / "saved.ckpt"
    one = trainer(tmp_path)
    one.strategy.connect(language_model(depth=1))
    one.save_checkpoint(path, weights_only=True)
    for options in ({"width": 32}, {"depth": 2}, {"vocab_size": 100}):
        with pytest.raises(ValueError, match=r"checkpoint: expected .* names or shapes differ \(.*[._]weight"):
            LanguageModel.load_from_checkpoint(path, **options)


def of_before(path: Path) -> Path:
    """A checkpoint as it was written before attention layers had flows: their own keys, times as columns."""
    checkpoint = torch.load(path, weights_only=True)
    state = {name.replace(".attention.flow.", ".attention."): x for name, x in checkpoint["state_dict"].items()}
    checkpoint["state_dict"] = {name: x.unsqueeze(-1) if name.endswith(".time") else x for name, x in state.items()}
    assert state.keys() != torch.load(path, weights_only=True)["state_dict"].keys()
    old = path.with_name("before.ckpt")
    torch.save(checkpoint, old)
    return old


@pytest.mark.parametrize("make", [language_model, classifier])
def test_checkpoints_of_before_there_were_flows(tmp_path, corpus, make):
    """They load; a fit is not resumed from one, since the optimizer's states are in another order."""
    model, data = make(), corpus if make is language_model else forests()
    fitted = trainer(tmp_path, max_steps=3)
    fitted.fit(model, data)
    fitted.save_checkpoint(tmp_path / "saved.ckpt")
    old = of_before(tmp_path / "saved.ckpt")
    loaded = type(model).load_from_checkpoint(old)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    found = [
        trainer(tmp_path).validate(make(), data, ckpt_path=path, verbose=False)
        for path in (old, tmp_path / "saved.ckpt")
    ]
    assert found[0] == found[1]
    message = "ckpt_path: expected a checkpoint of this model to resume, got one whose optimizer has its states"
    with pytest.raises(ConversionError, match=message):
        trainer(tmp_path, max_steps=5).fit(make(), data, ckpt_path=old)
    resumed = trainer(tmp_path, max_steps=5)
    resumed.fit(make(), data, ckpt_path=tmp_path / "saved.ckpt")
    assert resumed.global_step == 5
    weights = trainer(tmp_path)
    weights.strategy.connect(model)
    weights.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(ValueError, match="names or shapes differ"):  # as ever
        type(model).load_from_checkpoint(of_before(tmp_path / "weights.ckpt"), attention=RECIPES["softmax"])


# what is logged


def test_language_model_metrics(tmp_path, corpus):
    model, one = language_model(), trainer(tmp_path)
    one.fit(model, corpus)
    for stage, run, loader in (
        ("validation", one.validate, corpus.val_dataloader()),
        ("test", one.test, corpus.test_dataloader()),
    ):
        (logged,) = run(model, loader, verbose=False)
        with torch.no_grad():
            batches = list(loader)
            scores = torch.cat([model.eval()(b["tokens"]) for b in batches])
            targets = torch.cat([b["targets"] for b in batches])
        assert len(batches) == 2  # 4 and 3 windows: means of means would show
        loss = float(F.cross_entropy(scores.flatten(0, 1), targets.flatten()))
        assert logged == pytest.approx(
            {
                f"{stage}/loss": loss,
                f"{stage}/perplexity": math.exp(loss),
                f"{stage}/bits_per_byte": loss / math.log(2),
            },
            rel=1e-5,
        )


def test_the_training_loss_is_logged_and_falls(tmp_path, corpus):
    corpus.train_windows = 400
    one = trainer(tmp_path, max_steps=60, logger=CSVLogger(tmp_path, "", ""), check_val_every_n_epoch=None)
    one.fit(language_model(learning_rate=1e-2), corpus.train_dataloader() if corpus.setup() else corpus)
    lines = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    losses = [float(row[lines[0].index("train/loss")]) for row in lines[1:] if row[lines[0].index("train/loss")]]
    assert len(losses) == 60
    assert losses[0] == pytest.approx(math.log(128), abs=1.0)
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5


def test_both_test_sets_are_logged_by_depth(tmp_path):
    model, data, one = classifier(), forests(), trainer(tmp_path)
    one.fit(model, data)
    merged: dict[str, float] = {}
    for logged in one.test(model, data, verbose=False):
        merged |= logged
    expected = {}
    for name, loader in zip(("test", "deeper"), data.test_dataloader(), strict=True):
        batches = list(loader)
        with torch.no_grad():
            right = torch.cat([model.eval()(b["tokens"]).argmax(-1) == b["labels"] for b in batches])
        depth = torch.cat([b["depth"] for b in batches])
        expected[f"{name}/accuracy"] = float(right.float().mean())
        for d in depth.unique().tolist():
            expected[f"{name}/accuracy_at_depth_{d:02d}"] = float(right[depth == d].float().mean())
    assert merged == pytest.approx(expected, abs=1e-6)
    assert "deeper/accuracy_at_depth_09" in merged
    assert "test/accuracy_at_depth_05" not in merged
    again: dict[str, float] = {}
    for logged in one.test(model, data, verbose=False):
        again |= logged
    assert again == merged  # counts start anew


def test_classifier_validation(tmp_path):
    model, data, one = classifier(), forests(), trainer(tmp_path)
    (logged,) = one.validate(model, data, verbose=False)
    batches = list(data.val_dataloader())
    with torch.no_grad():
        scores = torch.cat([model.eval()(b["tokens"]) for b in batches]).flatten(0, 1)
    labels = torch.cat([b["labels"] for b in batches]).flatten()
    accuracy = float((scores.argmax(-1) == labels).float().mean())
    loss = float(F.cross_entropy(scores, labels))
    assert logged == pytest.approx({"validation/loss": loss, "validation/accuracy": accuracy}, rel=1e-5)


def test_a_third_test_set_is_refused(tmp_path):
    loaders = [*forests().test_dataloader(), forests().val_dataloader()]
    with pytest.raises(ValueError, match=r"test sets: expected at most 2, got 3; drop the others"):
        trainer(tmp_path).test(classifier(), loaders, verbose=False)


# prediction and generation


def test_predictions(tmp_path, corpus):
    """Prompts are continued, by default by their most probable tokens."""
    for continuation in (None, {"max_new_tokens": 3, "top_p": 0.5, "seed": 1}):
        model = language_model(continuation=continuation)
        (first, _) = trainer(tmp_path).predict(model, corpus)
        sampling = continuation or {"max_new_tokens": 64, "temperature": 0.0}
        batch = next(iter(corpus.test_dataloader()))
        assert torch.equal(first, model.generate(batch["tokens"], **sampling))
    sets = trainer(tmp_path).predict(classifier(), forests())
    assert [[tuple(p.shape) for p in batches] for batches in sets] == [
        [(4, 8), (4, 8), (2, 8)],
        [(4, 12), (4, 12), (2, 12)],
    ]


@recipes
def test_generation(recipe):
    model, prompt = language_model(recipe, dropout=0.5).train(), torch.randint(128, (3, 4))
    if recipe.get("rate_fn"):  # not a jump chain: says so, and can compute all anew
        with pytest.raises(CacheError, match="rate_fn"):
            model.generate(prompt, 1)
        model.generate = functools.partial(model.generate, use_cache=False)
    greedy = model.generate(prompt, 5, temperature=0)
    assert model.training
    assert greedy.shape == (3, 9)
    assert greedy.dtype == prompt.dtype
    assert torch.equal(greedy[:, :4], prompt)
    torch.manual_seed(9)
    assert torch.equal(model.generate(prompt, 5, temperature=0), greedy)
    model.eval()
    for n in range(4, 9):  # each token is the most probable one after those before it
        assert torch.equal(greedy[:, n], model(greedy[:, :n])[:, -1].argmax(-1))
    assert torch.equal(model.generate(prompt, 0), prompt)
    state = torch.get_rng_state()
    one, two, three = (model.generate(prompt, 8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())  # a seed leaves the global generator alone
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert torch.equal(model.generate(prompt, 8, seed=1, temperature=1e-4), model.generate(prompt, 8, temperature=0))
    torch.manual_seed(5)
    free = model.generate(prompt, 8)
    torch.manual_seed(5)
    assert torch.equal(model.generate(prompt, 8), free)


@pytest.mark.parametrize(
    ("tokens", "temperature", "error", "match"),
    [
        (
            torch.zeros(2, 0).long(),
            1.0,
            ShapeError,
            r"tokens: expected integers \(batch, at least 1\), got torch.int64 \(2, 0\); start",
        ),
        (
            torch.zeros(3).long(),
            1.0,
            ShapeError,
            r"tokens: expected integers \(batch, at least 1\), got torch.int64 \(3,\); start",
        ),
        (torch.zeros(1, 1).long(), -1.0, GeneratorError, r"temperature: expected ≥ 0, got -1.0; 0 takes"),
    ],
)
def test_bad_prompts(tokens, temperature, error, match):
    with pytest.raises(error, match=match):
        language_model().generate(tokens, 2, temperature=temperature)


def test_bad_fields():
    with pytest.raises(ShapeError, match=r"tokens: expected \(batch, tokens, 2 fields\), got \(2, 5\); one column"):
        classifier()(torch.zeros(2, 5).long())
    with pytest.raises(ShapeError, match=r"tokens: expected \(batch, tokens, 2 fields\), got \(2, 5, 3\); one column"):
        classifier()(torch.zeros(2, 5, 3).long())


# precision and processes


@recipes
def test_mixed_precision_trains(tmp_path, corpus, recipe):
    model = language_model(recipe, dropout=0.1)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    one = trainer(tmp_path, precision="bf16-mixed", gradient_clip_val=1.0)
    one.fit(model, corpus)
    assert one.global_step == 6
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert value.isfinite().all(), name
        assert not torch.equal(value, start[name]), name
    for layer in (m for m in model.modules() if isinstance(m, LieAttention)):
        assert layer.flow.time.manifold.check_point_on_manifold(layer.flow.time)
    assert math.isfinite(one.validate(model, corpus, verbose=False)[0]["validation/loss"])


DDP = """
import sys, torch, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
import lightning as L
from liegroup_attn.lightning import ExactResume, GeneratorMonitor, RandomForests, TokenClassifier

class Save(L.Callback):
    def on_train_end(self, trainer, module):
        torch.save(module.state_dict(), f"{sys.argv[2]}/rank{trainer.global_rank}.pt")

L.seed_everything(0)
data = RandomForests(num_nodes=6, max_depth=3, deep_nodes=8, deep_depth=5, train_size=32, val_size=8, batch_size=4)
recipe = {"module": "LieAttention", "first_hop": True, "time": 2.0}
model = TokenClassifier(recipe, vocab_size=8, width=8, num_heads=2, dropout=0.1)
trainer = L.Trainer(
    accelerator="cpu", strategy="ddp", devices=2, max_steps=4, default_root_dir=sys.argv[2], logger=False,
    enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    callbacks=[Save(), ExactResume(), GeneratorMonitor()],
)
trainer.fit(model, data)
"""


@pytest.mark.slow
def test_two_processes_end_with_equal_weights(tmp_path):
    """Also with the monitor, whose figures are drawn by one process alone: nothing may wait for the other."""
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, script, root, tmp_path], capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["transformer.blocks.0.attention.flow.time"], torch.full((2,), 2.0))
    assert (tmp_path / "figures" / "layer_0.png").is_file()


def test_manifold_parameters_survive_a_fit(tmp_path):
    model = classifier()
    trainer(tmp_path).fit(model, forests())
    assert isinstance(model.transformer.blocks[0].attention.flow.time, ManifoldParameter)
