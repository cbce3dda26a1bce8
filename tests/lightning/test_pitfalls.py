"""What the package asks for and brings along: traps of Lightning that need no training to be seen."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from liegroup_attn.lightning import LanguageModel, TokenClassifier

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"].values()
REQUIRED = [*PROJECT["project"]["dependencies"], *(line for extra in EXTRAS for line in extra)]


def test_releases_of_lightning_that_were_malware_are_not_accepted():
    (lightning,) = (line for line in REQUIRED if line.startswith("lightning"))
    least = re.fullmatch(r"lightning>=(\d+)\.(\d+)\.(\d+)", lightning)
    assert tuple(map(int, least.groups())) >= (2, 6, 6)


def test_nothing_required_brings_another_torch():
    """timm and torchvision bring a CUDA torchvision beside a CPU torch, and ``import lightning`` dies."""
    assert not [line for line in REQUIRED if re.match(r"(timm|torchvision|torchaudio)\b", line)]


def test_no_callbacks_are_pushed_into_other_peoples_trainers():
    assert not [name for name in PROJECT["project"].get("entry-points", {}) if "callbacks_factory" in name]
    found = entry_points(group="lightning.pytorch.callbacks_factory")
    assert not [point for point in found if point.value.startswith("liegroup_attn")]


@pytest.mark.parametrize("model", [LanguageModel, TokenClassifier])
def test_hyperparameters_are_plain_values(model, tmp_path):
    """Anything else would break loading with weights_only."""
    options = {"momentum": 0.9, "manifold_learning_rate": 0.1}
    hyperparameters = dict(model({"module": "LieAttention"}, width=8, depth=1, num_heads=2, **options).hparams)
    torch.save(hyperparameters, tmp_path / "h.pt")
    assert torch.load(tmp_path / "h.pt", weights_only=True) == hyperparameters


def test_geoopts_deprecation_is_named_in_the_settings():
    assert "ignore::DeprecationWarning:geoopt" in PROJECT["tool"]["pytest"]["ini_options"]["filterwarnings"]
