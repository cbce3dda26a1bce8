"""The digits as patches, and the classifier of images."""

from __future__ import annotations

import builtins

import lightning as L
import pytest
import torch
from sklearn.datasets import load_digits

from liegroup_attn.errors import ShapeError
from liegroup_attn.lightning import Digits, ImageClassifier

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def ready(**options) -> Digits:
    data = Digits(**{"batch_size": 4, **options})
    data.setup()
    return data


@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_patches_hold_the_pixels_in_raster_order(p):
    (batch,) = ready(patch_size=p, batch_size=300).test_dataloader()
    tokens, side = batch["tokens"], 8 // p
    assert tokens.shape == (300, side * side, p * p)
    assert tokens.dtype == torch.float32
    image = torch.full((300, 8, 8), -1.0)
    for i, token in enumerate(tokens.unbind(1)):
        row, column = p * (i // side), p * (i % side)
        image[:, row : row + p, column : column + p] = token.unflatten(1, (p, p))
    known = {(tuple(x.flatten().astype(int)), int(y)) for x, y in zip(*load_digits(return_X_y=True), strict=True)}
    pixels = (16 * image.flatten(1)).int()
    assert {(tuple(x.tolist()), int(y)) for x, y in zip(pixels, batch["labels"], strict=True)} <= known


def test_splits_are_apart_and_fixed():
    one, other = ready(seed=0), ready(seed=1)
    sizes = [len(labels) for _, labels in one._splits]
    assert sizes == [1197, 300, 300]
    for (a, _), (b, _) in zip(one._splits, other._splits, strict=True):
        assert torch.equal(a, b)
    seen = [{tuple(x.flatten().tolist()) for x in tokens} for tokens, _ in one._splits]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    assert one.facts()["sha256"] == other.facts()["sha256"]


def test_training_draws_are_a_function_of_the_seed():
    def labels(seed: int) -> list[int]:
        return next(iter(ready(seed=seed, batch_size=64).train_dataloader()))["labels"].tolist()

    assert labels(3) == labels(3)
    assert labels(3) != labels(4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, "patch_size: expected a divisor of 8, got 3"),
        ({"patch_size": 0}, "patch_size: expected at least 1"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"train_size": 0}, "train_size: expected at least 1"),
        ({"seed": -1}, "seed: expected at least 0"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        Digits(**options)


def test_without_scikit_learn(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        Digits().setup()


def test_a_patch_knows_its_place():
    model = ImageClassifier({"module": "LieAttention"}, width=16, num_heads=2).eval()
    tokens = next(iter(ready().val_dataloader()))["tokens"]
    order = torch.randperm(tokens.size(1))
    assert (model(tokens) - model(tokens[:, order])).abs().max() > 1e-3
    with torch.no_grad():
        model.places.weight.zero_()
    torch.testing.assert_close(model(tokens), model(tokens[:, order]), atol=1e-5, rtol=1e-5)


def test_it_fits_and_tests():
    data = ready(train_size=64, batch_size=32)
    model = ImageClassifier({"module": "LieAttention", "mix_heads": True}, width=16, num_heads=2, streams=2)
    trainer = L.Trainer(max_steps=3, **QUIET)
    trainer.fit(model, data)
    (found,) = trainer.test(model, data, verbose=False)
    assert 0 <= found["test/accuracy"] <= 1
    assert found["test/loss"] > 0
    predicted = torch.cat(trainer.predict(model, data))
    labels = torch.cat([batch["labels"] for batch in data.test_dataloader()])
    assert (predicted == labels).float().mean() == pytest.approx(found["test/accuracy"])


def test_patches_that_do_not_fit():
    model = ImageClassifier({"module": "LieAttention"}, width=16, num_heads=2)
    for shape in ((1, 16, 3), (1, 15, 4), (16, 4)):
        with pytest.raises(ShapeError, match=r"tokens: expected \(batch, 16 patches, 4 values\)"):
            model(torch.zeros(shape))
