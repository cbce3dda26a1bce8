"""FineTune: flows alone, with a teacher, on batches of either form, and back from a checkpoint."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from theirs import CLASSES, TOKENS, WORDS, Classifier, loader, trainer
from torch import nn

from liegroup_attn.errors import ConversionError
from liegroup_attn.lightning import FineTune, build_optimizer
from liegroup_attn.lightning.outputs import distillation
from liegroup_attn.nn import LieFlow, convert_attention

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


class Language(nn.Module):
    """Returns what Transformers' models do."""

    def __init__(self, own_loss: bool = False):
        super().__init__()
        self.embedding, self.head, self.own_loss = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS), own_loss
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.encoder(self.embedding(input_ids)))
        if not self.own_loss or labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


class LanguageForCausalLM(Language):
    """Named as Transformers' models that shift the labels themselves."""


class Bare(Language):
    """Takes no labels, returns a tensor."""

    def forward(self, input_ids):
        return super().forward(input_ids)["logits"]


def converted(kind=Classifier, lie: dict | None = None, **options) -> nn.Module:
    torch.manual_seed(0)
    model = kind(**options)
    convert_attention(model, **lie or {})
    return model


def dicts(padded: bool = False, items: int = 3) -> torch.utils.data.DataLoader:
    ids = torch.randint(WORDS, (items, 4, TOKENS), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    if padded:
        labels[:, :, -2:] = -100
    return torch.utils.data.DataLoader(
        [{"input_ids": i, "labels": x} for i, x in zip(ids, labels, strict=True)], batch_size=None
    )


def flowing(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if ".lie." in name}


@pytest.mark.parametrize("trainable", ["lie", "all"])
def test_what_moves_and_what_stays(tmp_path, trainable):
    tuner = FineTune(converted(), trainable, weight_decay=0.5, learning_rate=1e-2)
    before = copy.deepcopy(tuner.state_dict())
    one = trainer(tmp_path, max_steps=3)
    one.fit(tuner, loader())
    moved = {name for name, value in tuner.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in flowing(tuner) if name.endswith("time")} <= moved
    assert moved <= flowing(tuner) if trainable == "lie" else moved > flowing(tuner)
    assert {n for n, p in tuner.named_parameters() if p.requires_grad} == (
        flowing(tuner) if trainable == "lie" else set(before)
    )
    assert tuner.training
    assert tuner.model.training == (trainable == "all")
    held = {id(p) for group in one.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in tuner.parameters() if p.requires_grad}


def test_review_h1_flows_alone_are_put_back_into_their_interval_and_nothing_drops(tmp_path):
    tuner = FineTune(converted(dropout=0.5), lie_learning_rate=0.7)
    times = [flow.time for flow in tuner.model.modules() if isinstance(flow, LieFlow)]
    with torch.no_grad():
        for time in times:
            time.fill_(5.0)
    words, _ = batch = next(iter(loader()))
    tuner.training_step(batch, 0)
    assert all(bool((time == 1.0).all()) for time in times)
    assert torch.equal(tuner.model(words), tuner.model(words))
    trainer(tmp_path, max_steps=8).fit(tuner, loader(), loader())
    words, _ = next(iter(loader()))
    tuner.model(words)
    assert all(bool(((time >= 0) & (time <= 1)).all()) for time in times)
    tuner.eval()
    assert not any(module.training for module in tuner.modules())


def test_frozen_before_stays_frozen_with_all():
    model = converted()
    model.embedding.requires_grad_(False)
    assert not FineTune(model, "all").model.embedding.weight.requires_grad


def test_groups_of_the_optimizer():
    model = converted()
    groups = build_optimizer(model, 1e-3, 0.1, lie_learning_rate=0.5).param_groups
    own = {id(p) for m in model.modules() if isinstance(m, LieFlow) for p in m.parameters()}
    (lie,) = [g for g in groups if {id(p) for p in g["params"]} & own]
    assert {id(p) for p in lie["params"]} == own
    assert (lie["lr"], lie["weight_decay"]) == (0.5, 0.0)
    assert {g["lr"] for g in groups if g is not lie} == {1e-3}
    assert build_optimizer(model, 1e-3).param_groups[-1]["lr"] == 1e-3
    with pytest.raises(ValueError, match="lie_learning_rate: expected a number ≥ 0"):
        build_optimizer(model, 1e-3, lie_learning_rate=-1.0)


def test_at_time_0_the_teacher_is_the_student(tmp_path):
    tuner = FineTune(converted(dropout=0.3), teacher="softmax", alpha=1.0)
    assert not any(isinstance(m, LieFlow) for m in tuner.teacher.modules())
    batch = next(iter(loader()))
    loss, found, *_ = tuner._losses(batch)
    assert float(found["kl"].detach()) == pytest.approx(0.0, abs=1e-7)
    torch.testing.assert_close(loss, found["kl"])
    with torch.no_grad():
        for flow in (m for m in tuner.model.modules() if isinstance(m, LieFlow)):
            flow.time.fill_(1.0)
        assert float(tuner._losses(batch)[1]["kl"]) > 1e-6
    (logged,) = trainer(tmp_path).validate(tuner, loader(), verbose=False)
    assert logged["validation/kl"] > 1e-6
    assert logged["validation/loss"] == pytest.approx(logged["validation/kl"])


def test_distilling_brings_the_student_to_the_teacher(tmp_path):
    """A teacher that flows for some time is found again."""
    model = converted(dropout=0.0)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for flow in (m for m in teacher.modules() if isinstance(m, LieFlow)):
            flow.time.fill_(0.8)
    tuner = FineTune(model, teacher=teacher, alpha=1.0, lie_learning_rate=0.05, temperature=2.0)
    (before,) = trainer(tmp_path).validate(tuner, loader(), verbose=False)
    trainer(tmp_path, max_steps=60).fit(tuner, loader())
    (after,) = trainer(tmp_path).validate(tuner, loader(), verbose=False)
    assert after["validation/kl"] < 0.2 * before["validation/kl"]


def test_the_loss_is_the_stated_mixture():
    model = converted(dropout=0.0)
    teacher = nn.Sequential(nn.Embedding(WORDS, CLASSES), Mean())
    tuner = FineTune(model, teacher=teacher, alpha=0.25, temperature=3.0)
    words, labels = next(iter(loader()))
    loss, _, logits, _ = tuner._losses((words, labels))
    p, q = (x.double().div(3.0).softmax(-1) for x in (teacher(words), logits))
    kl = 9 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(loss.double(), 0.25 * kl + 0.75 * F.cross_entropy(logits.double(), labels))


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def test_distillation_skips_padding():
    one, two = torch.randn(2, 2, 5, 7).unbind()
    targets = torch.tensor([[1, 2, 3, -100, -100], [1, 2, 3, 4, 5]])
    whole = torch.cat([distillation(one[0, i], two[0, i]).view(1) for i in range(3)])
    whole = torch.cat([whole, *(distillation(one[1, i], two[1, i]).view(1) for i in range(5))])
    torch.testing.assert_close(distillation(one, two, targets=targets), whole.mean())


@pytest.mark.parametrize("kind", [Language, Bare])
def test_dicts_and_perplexity(tmp_path, kind):
    tuner = FineTune(converted(kind))
    (found,) = trainer(tmp_path).validate(tuner, dicts(padded=True), verbose=False)
    losses = []
    for batch in dicts(padded=True):
        with torch.no_grad():
            output = tuner.model(batch["input_ids"])
        logits = output if kind is Bare else output["logits"]
        losses.append(F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()))
    assert found["validation/loss"] == pytest.approx(float(sum(losses)) / 3, rel=1e-5)
    assert found["validation/perplexity"] == pytest.approx(math.exp(float(sum(losses)) / 3), rel=1e-5)
    assert "validation/accuracy" not in found


def test_the_models_own_loss_goes_first():
    tuner = FineTune(converted(Language, own_loss=True))
    batch = next(iter(dicts()))
    output = tuner.model(**batch)
    assert torch.equal(tuner._losses(batch)[0], output["loss"])


@pytest.mark.parametrize(("student", "teacher"), [(Language, Bare), (Bare, Language)])
def test_review_m8_labels_go_to_whom_they_are_for(student, teacher):
    tuner = FineTune(converted(student), teacher=teacher())
    loss, found, *_ = tuner._losses(next(iter(dicts())))
    torch.testing.assert_close(loss, 0.5 * found["kl"] + 0.5 * found["task"])


@pytest.mark.parametrize("own_loss", [False, True])
def test_review_l2_the_teacher_alone_needs_no_target_that_counts(own_loss):
    tuner = FineTune(converted(Language, own_loss=own_loss), teacher=Language(), alpha=1.0)
    batch = next(iter(dicts()))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = tuner.training_step(batch, 0)
    loss.backward()
    assert loss == 0
    assert all(bool(p.grad.isfinite().all()) for p in tuner.parameters() if p.grad is not None)


@pytest.mark.parametrize("own_loss", [False, True])
def test_review_l3_every_token_weighs_the_same(tmp_path, own_loss):
    ids = torch.randint(WORDS, (3, 4, TOKENS), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[1, :, -3:], labels[1, 2:], labels[2] = -100, -100, -100  # of the third batch nothing counts
    data = [{"input_ids": i, "labels": x} for i, x in zip(ids, labels, strict=True)]
    tuner = FineTune(converted(LanguageForCausalLM, own_loss=own_loss), teacher=Language())
    given = torch.utils.data.DataLoader(data, batch_size=None)
    (found,) = trainer(tmp_path).validate(tuner, given, verbose=False)
    with torch.no_grad():
        student, teacher = (m(ids.flatten(0, 1))["logits"] for m in (tuner.model, tuner.teacher))
    wanted = labels.flatten(0, 1)
    if own_loss:
        student, teacher, wanted = student[:, :-1], teacher[:, :-1], wanted[:, 1:]
    task, kl = F.cross_entropy(student.flatten(0, 1), wanted.flatten()), distillation(student, teacher, 1.0, wanted)
    assert found["validation/perplexity"] == pytest.approx(float(task.exp()), rel=1e-5)
    assert found["validation/kl"] == pytest.approx(float(kl), rel=1e-5)
    assert found["validation/loss"] == pytest.approx(float(kl + task) / 2, rel=1e-5)


SHIFTS = {
    "causal": (LanguageForCausalLM, True, None),
    "told": (Language, True, True),
    "no own loss": (Language, False, True),
    "as they are": (LanguageForCausalLM, False, None),
    "told not": (Language, False, False),
}


@pytest.mark.parametrize(("kind", "own_loss", "shift"), SHIFTS.values(), ids=SHIFTS)
def test_review_m4_the_teacher_counts_where_the_task_does(kind, own_loss, shift):
    tuner = FineTune(converted(kind, own_loss=own_loss), teacher=Language(), shift_labels=shift)
    batch = next(iter(dicts(padded=True)))
    batch["labels"][0, 0] = -100
    kept = []
    tuner.model.head.register_forward_hook(lambda *args: kept.append(args[-1]))
    tuner.model.head.requires_grad_(True)
    _, found, *_ = tuner._losses(batch)
    places = [torch.autograd.grad(found[name], kept[0], retain_graph=True)[0].abs().sum(-1) > 0 for name in found]
    assert set(found) == {"kl", "task"}
    assert torch.equal(*places)
    assert places[0].any()


def test_review_m4_with_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=WORDS, n_positions=TOKENS, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    convert_attention(model)
    tuner = FineTune(model, teacher=transformers.GPT2LMHeadModel(config))
    kept = []
    model.lm_head.register_forward_hook(lambda *args: kept.append(args[-1]))
    _, found, *_ = tuner._losses(next(iter(dicts(padded=True))))
    places = [torch.autograd.grad(found[name], kept[0], retain_graph=True)[0].abs().sum(-1) > 0 for name in found]
    assert torch.equal(*places)
    assert places[0].sum(-1).tolist() == [TOKENS - 3] * 4


def test_what_is_logged(tmp_path):
    tuner = FineTune(converted(dropout=0.0), teacher="softmax")
    one = trainer(tmp_path, max_steps=6)  # an epoch
    one.fit(tuner, loader(), loader())
    names = {"train/loss", "train/kl", "validation/loss", "validation/kl", "validation/accuracy"}
    times = {f"time/encoder.layers.{i}.self_attn" for i in range(2)}
    assert set(one.callback_metrics) == names | times
    assert one.callback_metrics["time/encoder.layers.0.self_attn"] > 0
    words, labels = loader().dataset.tensors
    with torch.no_grad():
        right = (tuner.model(words).argmax(-1) == labels).float().mean()
    (found,) = trainer(tmp_path).test(tuner, loader(), verbose=False)
    assert found["test/accuracy"] == pytest.approx(float(right))


def test_the_teacher_is_in_no_checkpoint_and_the_rest_loads(tmp_path):
    tuner = FineTune(converted(), teacher="softmax", lie_learning_rate=0.02)
    one = trainer(tmp_path, max_steps=3)
    one.fit(tuner, loader())
    one.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"model.{name}" for name in tuner.model.state_dict()}
    assert checkpoint["hyper_parameters"]["lie_learning_rate"] == 0.02
    assert not {"model", "teacher"} & set(checkpoint["hyper_parameters"])
    assert not any(parameter.requires_grad for parameter in tuner.teacher.parameters())
    torch.manual_seed(8)
    loaded = FineTune.load_from_checkpoint(tmp_path / "a.ckpt", model=converted(), weights_only=True)
    assert loaded.teacher is None
    assert loaded.hparams.lie_learning_rate == 0.02
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in tuner.state_dict().items())


OTHER = {
    "clock": (
        {"clock": "ExponentialClock"},
        r"'ExponentialClock\(\)'.*; convert the model with clock='FixedClock\(\)'",
    ),
    "first hop": ({"first_hop": False}, "expected for encoder.layers.0.self_attn a flow with.*'first_hop': False"),
    "max_time": ({"max_time": 2.0}, "convert the model with .*max_time=1.0 before it is loaded"),
}


@pytest.mark.parametrize(("options", "message"), OTHER.values(), ids=OTHER)
def test_review_m5_a_checkpoint_of_another_law_is_refused(tmp_path, options, message):
    one = trainer(tmp_path, max_steps=1)
    one.fit(FineTune(converted()), loader())
    one.save_checkpoint(tmp_path / "a.ckpt")
    laws = torch.load(tmp_path / "a.ckpt", weights_only=True)["lie_laws"]
    assert laws["encoder.layers.1.self_attn"] == {"clock": "FixedClock()", "first_hop": True, "max_time": 1.0}
    with pytest.raises(ConversionError, match=message):
        FineTune.load_from_checkpoint(tmp_path / "a.ckpt", model=converted(lie=options))
    with pytest.raises(ConversionError, match=message):
        trainer(tmp_path).fit(FineTune(converted(lie=options)), loader(), ckpt_path=tmp_path / "a.ckpt")


def test_the_teacher_goes_where_the_model_goes():
    tuner = FineTune(converted(), teacher="softmax").double()
    assert {p.dtype for p in tuner.teacher.parameters()} == {torch.float64}
    tuner.train()
    assert not tuner.teacher.training
    assert tuner.teacher not in list(tuner.modules())


WRONG = {
    "unconverted": (
        lambda: FineTune(Classifier()),
        ConversionError,
        r"call liegroup_attn.nn.convert_attention\(model\) first",
    ),
    "nothing": (lambda: FineTune(nn.Linear(2, 2)), ConversionError, "got a Linear without any"),
    "trainable": (lambda: FineTune(converted(), "some"), ValueError, "trainable: expected"),
    "teacher": (lambda: FineTune(converted(), teacher="lie"), ValueError, "teacher: expected a module"),
    "alpha": (lambda: FineTune(converted(), alpha=1.5), ValueError, "alpha: expected"),
    "temperature": (lambda: FineTune(converted(), temperature=0.0), ValueError, "temperature: expected"),
    "no targets": (
        lambda: FineTune(converted())._losses((torch.zeros(2, 3).long(),)),
        ValueError,
        "expected labels or a teacher",
    ),
    "batch": (lambda: FineTune(converted())._losses(torch.zeros(2, 3).long()), ValueError, "batch: expected a dict"),
}


@pytest.mark.parametrize(("make", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_itself_as_teacher_and_no_logits():
    model = converted()
    with pytest.raises(ValueError, match="got the model itself"):
        FineTune(model, teacher=model)

    class Odd(Classifier):
        def forward(self, words):
            return {"scores": super().forward(words)}

    with pytest.raises(ValueError, match="expected a tensor, or an output with logits, got dict"):
        FineTune(converted(Odd))._losses(next(iter(loader())))
