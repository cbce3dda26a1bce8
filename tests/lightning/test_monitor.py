"""GeneratorMonitor in training: the numbers of any converted model, and no trace of itself."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import scipy.linalg
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from theirs import Classifier, loader, trainer
from torch import nn
from torch.utils.checkpoint import checkpoint

from liegroup_attn.errors import GeneratorError
from liegroup_attn.lightning import FineTune, GeneratorMonitor, LanguageModel, LieConversion
from liegroup_attn.lightning.diagnosis import Look, evaluating, look_at_flow
from liegroup_attn.lightning.numbers import CHEAP, NUMBERS, diagnose, numbers_of, of_generator
from liegroup_attn.lightning.watch import Watch
from liegroup_attn.nn import LieAttention, LieFlow, convert_attention

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]
LAYERS = ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
FLOWS = {
    "fixed": {"time": 0.7, "tol": 1e-9},
    "no first hop": {"time": 0.7, "tol": 1e-9, "first_hop": False},
    "exponential": {"time": 0.7, "clock": "ExponentialClock"},
    "erlang": {"time": 0.7, "clock": "ErlangClock(3)"},
    "still": {},
}


class Mine(LieConversion, Classifier):
    pass


class Keeper(Logger):
    """A logger that keeps everything, with a place for figures as TensorBoard's has."""

    name, version, experiment = "keeper", 0, None

    def __init__(self):
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}
        self.figures: list[tuple[str, int]] = []
        self.experiment = self

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.setdefault(step, {}).update(metrics)

    def add_figure(self, tag, figure, global_step):
        self.figures.append((tag, global_step))

    def lie(self, step: int) -> dict[str, float]:
        return {name: value for name, value in self.rows.get(step, {}).items() if name.startswith("lie/")}


def randomized(model: nn.Module) -> nn.Module:
    """Rates that differ from token to token, once the flows are there."""
    for flow in model.modules():
        if isinstance(flow, LieFlow):
            nn.init.normal_(flow.rate_weight, generator=torch.Generator().manual_seed(2))
    return model


def made(options, **more) -> Mine:
    torch.manual_seed(0)
    model = Mine(lie_attention=dict(options), dropout=0.0, **more)
    model.configure_model()
    return randomized(model)


def look(flow: LieFlow, sequences: int, max_tokens: int, query, key, value, **options) -> Look:
    """At a call with these; a mask is taken as it is."""
    return look_at_flow(flow, sequences, max_tokens, flow.generator(query, key, value, closed=True, **options), value)


def golden(flow: LieFlow, query, key, value) -> dict[str, float]:
    """The numbers by NumPy and SciPy in float64, with nothing of the library but its parameters."""
    q, k, v = (x.detach().double().numpy() for x in (query, key, value))
    weight, bias = flow.rate_weight.detach().double().numpy(), flow.rate_bias.detach().double().numpy()
    scores = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]))
    chain = scores / scores.sum(-1, keepdims=True)
    rates = 1 / (1 + np.exp(-np.einsum("bhnd,hd->bhn", v, weight) - bias[:, None]))
    eye = np.eye(q.shape[-2])
    generator = rates[..., None] * (chain - eye)
    time = flow.time.detach().double().numpy()[:, None, None]
    exits = -np.diagonal(generator, axis1=-2, axis2=-1)[..., None]
    shape = flow.clock.resolvents
    if shape is None:
        mixing = scipy.linalg.expm(time * generator)
        nodes, weights = np.polynomial.legendre.leggauss(30)
        hops = sum(
            w / 2 * time * scipy.linalg.expm((s + 1) / 2 * time * generator) @ exits
            for s, w in zip(nodes, weights, strict=True)
        )
    else:  # ∫ of the moves before an Erlang time s: its survival at s times the rate of moving then
        mixing = np.linalg.matrix_power(np.linalg.inv(eye - time / shape * generator), shape)
        nodes, weights = np.polynomial.laguerre.laggauss(40)
        survival = [sum(x**j / float(np.prod(range(1, j + 1))) for j in range(shape)) for x in nodes]  # · e^{−x}
        hops = sum(
            w * alive * (time / shape) * scipy.linalg.expm(x * time / shape * generator) @ exits
            for x, w, alive in zip(nodes, weights, survival, strict=True)
        )
    mixing = chain @ mixing if flow.first_hop else mixing
    spectra = np.sort(-np.linalg.eigvals(generator).real, -1)
    return {
        "time": float(time.mean()),
        "exit_rate": float(exits.mean()),
        "expected_hops": float(hops.mean()) + flow.first_hop,
        "entropy": float(-(mixing * np.log(mixing)).sum(-1).mean()),
        "spectral_gap": float(spectra[0, :, 1].mean()),
    }


@pytest.mark.parametrize("options", FLOWS.values(), ids=FLOWS)
def test_the_numbers_are_those_of_the_forward_pass(tmp_path, options):
    model, logger = made(options), Keeper()
    calls: dict[LieFlow, list] = {}
    hooks = [
        m.register_forward_pre_hook(lambda flow, args: calls.setdefault(flow, []).append(args))
        for m in model.modules()
        if isinstance(m, LieFlow)
    ]
    with torch.no_grad():
        model(next(iter(loader()))[0])
    for hook in hooks:
        hook.remove()
    expected = {
        f"lie/{name}/{number}": wanted
        for name, (flow, [(generator, value)]) in zip(LAYERS, calls.items(), strict=True)
        for number, wanted in golden(flow, generator.query[:3], generator.key[:3], value[:3]).items()
    }
    monitor = GeneratorMonitor(sequences=3, metrics=[*CHEAP, "spectral_gap"])
    trainer(tmp_path, [monitor], logger=logger, max_steps=1).fit(model, loader())
    found = logger.lie(0)
    assert max(found.pop(f"lie/{name}/row_error") for name in LAYERS) < 1e-5
    assert found == pytest.approx(expected, rel=1e-4)


def test_when_it_looks(tmp_path):
    """Once an optimizer step, whatever is accumulated; at no other step, and never in validation."""
    model, logger = made(FLOWS["fixed"]), Keeper()
    seen: list[tuple[int, bool]] = []

    class Spy(L.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            hooked = any(m._forward_pre_hooks for m in pl_module.modules())
            seen.append((trainer.global_step, hooked))

    monitor = GeneratorMonitor(every_n_steps=3)
    one = trainer(
        tmp_path, [monitor, Spy()], logger=logger, max_steps=7, accumulate_grad_batches=2, val_check_interval=2
    )
    one.fit(model, loader(), loader())
    assert [step for step in sorted(logger.rows) if logger.lie(step)] == [0, 3, 6]
    assert set(logger.lie(3)) == {f"lie/{name}/{number}" for name in LAYERS for number in CHEAP}
    assert logger.lie(3) != logger.lie(0)
    assert {step for step, hooked in seen if hooked} <= {0, 3, 6}
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_none_never_looks(tmp_path):
    logger = Keeper()
    monitor = GeneratorMonitor(every_n_steps=None)
    trainer(tmp_path, [monitor], logger=logger, max_steps=2).fit(made({}), loader())
    assert not any(map(logger.lie, logger.rows))
    assert not (tmp_path / "figures").exists()


class Checkpointed(Mine):
    """Layers run again in the backward pass, hooks included."""

    def forward(self, words):
        x = self.embedding(words)
        for layer in self.encoder.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.head(x.mean(1))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", [Mine, Checkpointed, LanguageModel])
def test_it_does_not_disturb_training(tmp_path, kind, precision):
    """Weights, moments and random numbers are bitwise those without; a layer's parts keep their modes."""
    tokens = torch.randint(64, (8, 7), generator=torch.Generator().manual_seed(1))
    language = torch.utils.data.DataLoader([{"tokens": tokens, "targets": tokens}] * 4, batch_size=None)
    ends = []
    for monitors in ([], [GeneratorMonitor(every_n_steps=1, metrics="all", figures=False)]):
        torch.manual_seed(0)
        if kind is LanguageModel:
            model, data = LanguageModel({"module": "LieAttention"}, 64, 8, 2, 2, dropout=0.2), language
        else:
            model, data = kind(lie_attention=FLOWS["fixed"], dropout=0.2), loader()
        logger = Keeper()
        one = trainer(tmp_path, monitors, precision=precision, logger=logger, max_steps=3)
        one.fit(model, data)
        moments = [state["exp_avg"] for state in one.optimizers[0].state.values()]
        ends.append([*model.state_dict().values(), *moments, *(p.grad for p in model.parameters()), torch.rand(3)])
        assert all(m.training for m in model.modules())
    assert len(ends[0]) == len(ends[1])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True) if a is not None)
    assert len(logger.lie(2)) >= 2 * len(CHEAP)  # it did look


def test_modes_of_parts_are_kept():
    layer = LieAttention(8, 2)
    layer.q_proj.eval()
    with evaluating(layer):
        assert not layer.training
    assert layer.training
    assert not layer.q_proj.training


def test_hooks_go_when_training_fails(tmp_path):
    class Failing(Mine):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise RuntimeError("diverged")

    model = Failing()
    with pytest.raises(RuntimeError, match="diverged"):
        trainer(tmp_path, [GeneratorMonitor()]).fit(model, loader())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("how", ["module", "function"])
def test_compiled_models_warn_once_and_keep_no_hook(tmp_path, how):
    class Compiled(Mine):
        def configure_model(self):
            super().configure_model()
            if how == "module":
                self.encoder.compile(backend="eager")
            else:
                self.encoder.forward = torch.compile(self.encoder.forward, backend="eager")

    ends = []
    for monitors in ([], [GeneratorMonitor(every_n_steps=1)]):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, logger = Compiled(lie_attention={"max_time": 0.5}, dropout=0.0), Keeper()
        one = trainer(tmp_path, monitors, logger=logger, max_steps=2)
        if monitors:
            with pytest.warns(
                UserWarning, match=r"expected a call of encoder.*compiled modules call no hooks"
            ) as caught:
                one.fit(model, loader())
            assert sum("GeneratorMonitor" in str(w.message) for w in caught) == 1
        else:
            one.fit(model, loader())
        assert not any(map(logger.lie, logger.rows))
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


def test_figures_at_steps_and_at_the_end_in_files_and_loggers(tmp_path):
    logger = Keeper()
    monitor = GeneratorMonitor(every_n_steps=2, figures_at=[1, 2])
    trainer(tmp_path, [monitor], logger=[CSVLogger(tmp_path, "", ""), logger]).fit(made(FLOWS["fixed"]), loader())
    (folder,) = tmp_path.rglob("figures")
    ends = ["", "_step_1", "_step_2"]
    assert sorted(f.name for f in folder.iterdir()) == sorted(f"{name}{end}.png" for name in LAYERS for end in ends)
    assert all(f.read_bytes().startswith(b"\x89PNG") and f.stat().st_size > 5000 for f in folder.iterdir())
    assert [(tag, step) for tag, step in logger.figures if "layers.0" in tag] == [
        (f"lie/{LAYERS[0]}_step_1", 1),
        (f"lie/{LAYERS[0]}_step_2", 2),
        (f"lie/{LAYERS[0]}", 2),  # what was seen last
    ]
    assert not logger.lie(1)
    alone = Keeper()  # which has no folder
    trainer(tmp_path / "none", [GeneratorMonitor()], logger=alone, max_steps=1).fit(made({}), loader())
    assert [tag for tag, _ in alone.figures] == [f"lie/{name}" for name in LAYERS]
    assert not list(tmp_path.glob("none/**/*.png"))


def test_what_is_drawn():
    model = made(FLOWS["fixed"])
    watch = Watch(model, 2, 4, ["time"])
    model(next(iter(loader()))[0])
    watch.close()
    found = watch.drawn[LAYERS[0]]
    assert {name: tuple(m.shape) for name, m in found.items()} == {"S": (4, 4), "Q": (4, 4), "S·P(t)": (4, 4)}
    moved = found["S"].double() @ torch.matrix_exp(torch.stack([0.7 * found["Q"].double()] * 2))[0]
    torch.testing.assert_close(found["S·P(t)"].double(), moved, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_the_first_tokens_of_causal_attention_are_part_of_the_whole(mask):
    flow = LieFlow(2, 4, time=0.8, tol=1e-9)
    q, k, v = torch.randn(3, 3, 2, 9, 4)
    allowed = torch.ones(9, 9, dtype=torch.bool).tril() & (torch.arange(9) != 1)
    masks = {None: None, "bool": allowed, "float": torch.zeros(3, 1, 9, 9).masked_fill(~allowed, -torch.inf)}
    options = {"visible": masks[mask], "is_causal": mask is None, "scale": 0.3}
    part = look(flow, 2, 5, q, k, v, **options)
    whole = look(flow, 3, 99, q, k, v, **options)
    torch.testing.assert_close(part.mixing, whole.mixing[:2, :, :5, :5])
    torch.testing.assert_close(part.flows["Q"], whole.flows["Q"][:2, :, :5, :5])
    torch.testing.assert_close(whole.mixing @ v, flow(flow.generator(q, k, v, closed=True, **options), v))


def test_all_numbers_and_unknown_ones():
    flow = LieFlow(2, 4, time=0.8)
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    found = numbers_of(look(flow, 2, 5, q, k, v), list(NUMBERS))
    assert list(found) == list(NUMBERS)
    assert all(bool(value.isfinite()) and not value.dim() for value in found.values())
    assert found["off_manifold"] == 0
    with torch.no_grad():
        flow.time.fill_(1.25)
    assert numbers_of(look(flow, 2, 5, q, k, v), ["off_manifold"])["off_manifold"] == pytest.approx(0.25)
    padded = torch.tensor([True, True, False, True, True]).expand(2, 1, 5, 5).clone()
    padded[0, :, 1:3] = False  # rows without targets: several closed classes, of the first item alone
    of_chains = ["spectral_gap", "mixing_time", "detailed_balance_residual"]
    part = numbers_of(look(flow, 2, 5, q, k, v, visible=padded), of_chains)
    one = numbers_of(look(flow, 1, 5, q[1:], k[1:], v[1:], visible=padded[1:]), of_chains)
    assert all(value.isfinite() for value in one.values())
    torch.testing.assert_close(part, one)
    with pytest.raises(ValueError, match=r"metrics: expected \"all\" or names of.*got \['entropie'\]"):
        GeneratorMonitor(metrics=["entropie"])
    with pytest.raises(ValueError, match="sequences: expected at least 1, got 0"):
        GeneratorMonitor(sequences=0)


def test_review_m9_what_goes_matrix_by_matrix_is_bounded():
    """By four matrices, however many sequences and heads; of those without a single closed class none is looked at."""
    flow = LieFlow(6, 4, time=0.8)
    q, k, v = torch.randn(3, 3, 6, 5, 4)
    padded = torch.ones(3, 1, 5, 5, dtype=torch.bool)
    padded[0, :, 1:3] = False  # rows without targets: several closed classes
    seen_at = look(flow, 3, 5, q, k, v, visible=padded)
    seen: list[torch.Tensor] = []

    def spy(matrix):
        seen.append(matrix)
        return matrix.sum() + len(seen)

    value = of_generator(spy)(seen_at)
    assert len(seen) == 4
    torch.testing.assert_close(torch.stack(seen).float(), seen_at.flows["Q"][1, :4].float())
    assert float(value) == pytest.approx(2.5)
    padded[1:, :, 1:3] = False
    seen.clear()
    assert bool(of_generator(spy)(look(flow, 3, 5, q, k, v, visible=padded)).isnan())
    assert not seen


def test_dicts_of_any_keys_and_this_librarys_layers(tmp_path):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)
            self.one, self.two = nn.MultiheadAttention(8, 2, batch_first=True), LieAttention(8, 2, time=0.5)

        def forward(self, input_ids):
            x = self.embedding(input_ids)
            return self.head(self.two(self.one(x, x, x)[0]))

    model, logger = Bag(), Keeper()
    convert_attention(model, time=0.5)
    ids = torch.randint(9, (4, 6))
    data = torch.utils.data.DataLoader([{"input_ids": ids, "labels": ids}] * 2, batch_size=None)
    trainer(tmp_path, [GeneratorMonitor()], logger=logger, max_steps=1).fit(FineTune(model), data)
    assert {name.split("/")[1] for name in logger.lie(0)} == {"model.one", "model.two"}
    assert logger.lie(0)["lie/model.two/time"] == pytest.approx(0.5)
    x = model.one(*[model.embedding(ids[:2])] * 3)[0]  # trained for one step, which moved the flow a little
    assert logger.lie(0)["lie/model.two/entropy"] == pytest.approx(diagnose(model.two, x)["entropy"], rel=1e-2)


def test_errors_of_a_look_are_not_swallowed(monkeypatch):
    model = made({})
    watch = Watch(model, 1, 4, ["time"])

    def broken(*_, **__):
        raise GeneratorError("a bug")

    monkeypatch.setattr(LieFlow, "generator", broken)
    with pytest.raises(GeneratorError, match="a bug"):
        model(next(iter(loader()))[0])
    watch.close()


@pytest.mark.slow
def test_two_processes_log_once_and_stay_equal(tmp_path):
    logger = CSVLogger(tmp_path, "", "")
    monitor = GeneratorMonitor(every_n_steps=1, figures_at=[1])
    one = trainer(tmp_path, [monitor], logger=logger, devices=2, strategy="ddp_fork", max_steps=2)
    one.fit(Mine(lie_attention=FLOWS["fixed"]), loader())
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert f"lie/{LAYERS[0]}/time" in header
    assert len(rows) == 2
    assert len(list((tmp_path / "figures").glob("*_step_1.png"))) == 2


def test_a_module_without_anything_to_watch_is_told(tmp_path):
    class Plain(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def training_step(self, batch, batch_idx):
            return self.layer(batch, batch, batch)[0].square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.randn(4, 5, 8), batch_size=2)

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, callbacks=[GeneratorMonitor()], default_root_dir=tmp_path, **quiet
    )
    with pytest.warns(UserWarning, match="nothing to log"):
        trainer.fit(Plain())
