"""GeneratorMonitor: the right numbers, figures, and no trace of itself in training; ExactResume's state."""

from __future__ import annotations

import io
import random
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import scipy.linalg
import torch
from lightning.pytorch.loggers import CSVLogger

from liegroup_attn.lightning import (
    ExactResume,
    GeneratorMonitor,
    ImageClassifier,
    LanguageModel,
    RandomForests,
    TokenClassifier,
)
from liegroup_attn.lightning.callbacks import diagnose, layer_inputs, matrices
from liegroup_attn.nn import LieAttention, LieMixer, RateMatrix, RelativeRates, SoftmaxAttention

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]
RECIPES = {
    "softmax": {"module": "SoftmaxAttention"},
    "fixed": {"module": "LieAttention", "time": 2.0, "tol": 1e-7},
    "first_hop": {"module": "LieAttention", "first_hop": True, "time": 1.0, "tol": 1e-7},
    "resolvent": {"module": "LieAttention", "clock": "ExponentialClock", "time": 3.0, "tol": 1e-7},
    "softplus": {"module": "LieAttention", "rate_fn": "softplus"},
}
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def classifier(recipe=RECIPES["fixed"], **options) -> TokenClassifier:
    torch.manual_seed(0)
    options = {"vocab_size": 12, "width": 16, "depth": 2, "num_heads": 2, "report_depth": 9} | options
    model = TokenClassifier(dict(recipe), **options)
    for layer in model.modules():
        if isinstance(layer, LieAttention):
            torch.nn.init.normal_(layer.flow.rate_weight)
            with torch.no_grad():
                layer.flow.time.mul_(torch.tensor([0.5, 1.5]))
    return model


def forests() -> RandomForests:
    sizes = {"train_size": 24, "val_size": 8, "test_size": 4, "batch_size": 4}
    return RandomForests(num_nodes=8, max_depth=4, deep_nodes=12, deep_depth=9, **sizes)


def trainer(folder: Path, callbacks: list[L.Callback], **options) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_steps": 6,
        "default_root_dir": folder,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "val_check_interval": 2,
        "callbacks": callbacks,
    }
    return L.Trainer(**defaults | options)


def golden(layer, x: torch.Tensor) -> dict[str, float]:
    """The monitor's numbers from the layer's generator by SciPy, with none of the library's metrics or methods."""
    if isinstance(layer, SoftmaxAttention) or layer.rate_fn is not None:
        mixing = layer.mixing_matrix(x).double().numpy()
        return {"entropy": float(-(mixing * np.log(mixing)).sum(-1).mean())}
    generator = layer.generator(x).dense().double().numpy()  # (B, H, N, N)
    time = layer.flow.time.detach().double().numpy()[:, None, None]  # (H, 1, 1)
    chain = layer.generator(x).jump_chain().double().numpy()
    exits = -np.diagonal(generator, axis1=-2, axis2=-1)[..., None]  # (B, H, N, 1)
    if layer.flow.clock.resolvents is None:
        mixing = scipy.linalg.expm(time * generator)
        nodes, weights = np.polynomial.legendre.leggauss(30)  # ∫₀ᵗ exp(sQ) q ds
        hops = sum(
            w / 2 * time * scipy.linalg.expm((s + 1) / 2 * time * generator) @ exits
            for s, w in zip(nodes, weights, strict=True)
        )
    else:
        mixing = np.linalg.inv(np.eye(x.size(1)) - time * generator)
        hops = mixing @ (time * exits)
    if layer.flow.first_hop:
        mixing = chain @ mixing
    return {
        "entropy": float(-(mixing * np.log(mixing)).sum(-1).mean()),
        "time": float(time.mean()),
        "exit_rate": float(exits.mean()),
        "expected_hops": float(hops.mean()) + layer.flow.first_hop,
    }


@recipes
def test_the_logged_numbers(tmp_path, recipe):
    model, data, monitor = classifier(recipe).eval(), forests(), GeneratorMonitor(sequences=3, max_tokens=6)
    (logged,) = trainer(tmp_path, [monitor]).validate(model, data, verbose=False)
    found = {name: value for name, value in logged.items() if name.startswith("lie/")}

    batch = next(iter(data.val_dataloader()))["tokens"][:3, :6]
    expected = {}
    with torch.no_grad():
        x = sum(table(batch[..., f]) for f, table in enumerate(model.embeddings))
        for i, block in enumerate(model.transformer.blocks):
            for name, value in golden(block.attention, block.attention_norm(x)).items():
                expected[f"lie/{i}/{name}"] = value
            x = block(x)
    errors = [found.pop(f"lie/{i}/row_error") for i in range(2)]
    assert max(errors) < 1e-5
    assert found == pytest.approx(expected, rel=1e-4)
    if "time" in recipe:
        assert found["lie/0/time"] == pytest.approx(recipe["time"])  # the mean of 0.5 and 1.5 times it


def test_the_row_error_is_that_of_what_is_executed(tmp_path, monkeypatch):
    model = classifier()
    mix = LieAttention._mix
    monkeypatch.setattr(LieAttention, "_mix", lambda *arguments: 1.25 * mix(*arguments))
    (logged,) = trainer(tmp_path, [GeneratorMonitor()]).validate(model, forests(), verbose=False)
    assert logged["lie/0/row_error"] == pytest.approx(0.25, abs=1e-4)


@pytest.mark.parametrize("recipe", [RECIPES[name] for name in ("softmax", "first_hop", "softplus")])
def test_figures_are_drawn_at_the_end_of_fit(tmp_path, recipe):
    trainer(tmp_path, [GeneratorMonitor()]).fit(classifier(recipe), forests())
    files = sorted((tmp_path / "figures").iterdir())
    assert [f.name for f in files] == ["layer_0.png", "layer_1.png"]
    assert all(f.read_bytes().startswith(b"\x89PNG") and f.stat().st_size > 5000 for f in files)


@pytest.mark.parametrize("monitor", [GeneratorMonitor(figures=False), GeneratorMonitor()], ids=["off", "no validation"])
def test_no_figures_without_reason(tmp_path, monitor):
    options = {} if not monitor.figures else {"limit_val_batches": 0}
    trainer(tmp_path, [monitor], **options).fit(classifier(), forests())
    assert not (tmp_path / "figures").exists()


def test_matrices_of_a_figure():
    model, x = classifier(RECIPES["first_hop"]), torch.randn(2, 5, 16)
    layer = model.transformer.blocks[0].attention
    found = matrices(layer, x, head=1)
    assert list(found) == ["S", "Q", "S·P(t)"]
    flow = layer.flow.time[1] * found["Q"]
    torch.testing.assert_close(found["S·P(t)"], found["S"] @ torch.matrix_exp(flow.detach()), atol=1e-5, rtol=0)
    rho = layer.flow.jump_rates(x)[0, 1].detach()
    torch.testing.assert_close(found["Q"], rho[:, None] * (found["S"] - torch.eye(5)))
    assert list(matrices(classifier(RECIPES["softmax"]).transformer.blocks[0].attention, x)) == ["softmax"]
    assert list(matrices(classifier(RECIPES["softplus"]).transformer.blocks[0].attention, x)) == ["P(t)"]


@recipes
def test_it_does_not_disturb_training(tmp_path, recipe):
    """Dropout's masks, weights and optimizer states are those of a run without it, and so are random numbers after."""
    ends = []
    for name, callbacks in {"without": [], "with": [GeneratorMonitor(figures="first_hop" in recipe)]}.items():
        model = classifier(recipe, dropout=0.2)
        torch.manual_seed(4)
        random.seed(4)
        np.random.seed(4)  # noqa: NPY002
        one = trainer(tmp_path / name, callbacks, num_sanity_val_steps=1)
        one.fit(model, forests())
        numbers = [torch.rand(3), torch.tensor([random.random(), np.random.rand()])]  # noqa: NPY002
        states = [s["exp_avg"] for s in one.optimizers[0].state.values()]
        ends.append([*model.state_dict().values(), *states, *numbers])
        assert model.training
    assert len(ends[0]) == len(ends[1])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_layer_inputs_leave_no_hooks_and_no_mode_behind():
    model, tokens = classifier(dropout=0.5).train(), torch.randint(12, (2, 5, 2))
    state = torch.get_rng_state()
    seen = layer_inputs(model, tokens)
    assert torch.equal(state, torch.get_rng_state())
    assert [layer for layer, _ in seen] == [block.attention for block in model.transformer.blocks]
    assert not any(x.requires_grad for _, x in seen)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="tokens"):
        layer_inputs(model, tokens[..., :1])
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_sanity_check_logs_nothing_and_other_batches_are_ignored(tmp_path):
    monitor = GeneratorMonitor()
    one = trainer(tmp_path, [monitor], max_steps=0, num_sanity_val_steps=1)
    one.fit(classifier(), forests())
    assert not any(name.startswith("lie/") for name in one.callback_metrics)
    other = GeneratorMonitor()
    other.on_validation_batch_start(one, classifier(), torch.zeros(2, 3), 0)
    other.on_validation_epoch_end(one, classifier())
    assert other._tokens is None


def test_language_models_and_their_validation_metrics(tmp_path):
    batch = {"tokens": torch.randint(64, (5, 9)), "targets": torch.randint(64, (5, 9))}
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    logged = []
    for callbacks in ([], [GeneratorMonitor(sequences=1, max_tokens=4)]):
        torch.manual_seed(0)
        model = LanguageModel({"module": "LieAttention"}, vocab_size=64, width=8, depth=1, num_heads=2)
        logged += trainer(tmp_path, callbacks).validate(model, loader, verbose=False)
    without, with_it = logged
    assert {name for name in with_it if name not in without} == {
        f"lie/0/{name}" for name in ("time", "exit_rate", "expected_hops", "entropy", "row_error")
    }
    assert {name: with_it[name] for name in without} == without


def test_exact_resume_keeps_every_generator_and_loads_with_weights_only():
    def draw() -> list[float]:
        return [float(torch.rand(())), random.random(), random.gauss(0, 1), *np.random.randn(3)]  # noqa: NPY002

    random.gauss(0, 1)  # so that the second half of a pair is kept
    np.random.randn()  # noqa: NPY002
    file = io.BytesIO()
    torch.save(ExactResume().state_dict(), file)
    expected = draw()
    file.seek(0)
    callback = ExactResume()
    callback.load_state_dict(torch.load(file, weights_only=True))
    draw()
    callback.on_train_batch_start(SimpleNamespace(train_dataloader=[]), None, None, 0)
    assert draw() == expected
    callback.on_train_batch_start(None, None, None, 1)  # once: the next batch goes on
    assert draw() != expected
    ExactResume().on_train_batch_start(None, None, None, 0)


def test_a_model_of_a_fixed_size_is_looked_at_whole(tmp_path):
    """Some models take neither fewer tokens nor masks; the monitor must not stop their training."""
    recipe = {"module": "LieMixer", "generator": "RateMatrix", "num_tokens": 9}
    model = ImageClassifier(recipe, num_patches=9, patch_values=1, width=8, depth=1, num_heads=2)
    tokens, labels = torch.randn(8, 9, 1), torch.randint(10, (8,))
    items = [{"tokens": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]
    loader = torch.utils.data.DataLoader(items, batch_size=4)
    monitor = GeneratorMonitor(max_tokens=4)
    one = trainer(tmp_path, [monitor], max_steps=2, logger=CSVLogger(tmp_path))
    one.fit(model, loader, loader)
    mixer = model.transformer.blocks[0].attention
    assert float(one.callback_metrics["lie/0/exit_rate"]) == pytest.approx(
        float(-mixer.learned(9).dense().diagonal(dim1=-2, dim2=-1).mean()), rel=0.1
    )
    assert list((Path(one.log_dir) / "figures").glob("layer_0.png"))


def test_what_is_drawn_of_learned_generators():
    x = torch.randn(2, 5, 8)
    mixer = LieMixer(8, 2, RateMatrix(2, 5))
    ordered = LieAttention(8, 2, plus=RelativeRates(2, 3, rate=5.0), ordered=True)
    assert list(matrices(mixer, x)) == ["S", "Q", "P(t)"]
    found = matrices(ordered, x, head=1)
    assert list(found) == ["S", "Q", "Q₊", "P(t)"]
    flows = [
        torch.matrix_exp(found[name].double()[None].expand(2, 5, 5) * float(ordered.flow.time[1]))[0]
        for name in ("Q", "Q₊")
    ]
    torch.testing.assert_close(found["P(t)"].double(), flows[0] @ flows[1], atol=2e-3, rtol=0)
    assert diagnose(ordered, x)["expected_hops"] > 2  # those along both


def test_prediction_with_layers_that_keep_no_cache():
    recipe = {"module": "LieAttention", "plus": {"module": "RelativeRates", "max_distance": 3}}
    model = LanguageModel(recipe, vocab_size=16, width=8, depth=1, num_heads=2, continuation={"max_new_tokens": 2})
    assert not model.transformer.can_cache
    assert model.predict_step({"tokens": torch.zeros(1, 4, dtype=torch.long)}, 0).shape == (1, 6)
    assert LanguageModel({"module": "LieAttention"}, width=8, depth=1, num_heads=2).transformer.can_cache
