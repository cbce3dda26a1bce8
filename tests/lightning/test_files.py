"""Checkpoints are whole or as they were, and one that is not ends in one sentence with its name, by whatever door."""

from __future__ import annotations

import io
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from liegroup_attn.lightning import AtomicCheckpointIO, FineTune, LanguageModel, LieConversion, load_converted
from liegroup_attn.lightning.cli import LieCLI, main
from liegroup_attn.lightning.files import draft
from liegroup_attn.nn import convert_attention

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file may grow beyond this many bytes: writes fail half-way, for root as well."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    return file.getvalue()


WHOLE = saved({"state_dict": {"weight": torch.arange(1000.0)}})
# What is there → what the sentence says it is.
DAMAGED: dict[str, tuple[bytes | None, str]] = {
    "nothing": (None, "nothing there"),
    "empty": (b"", "cut short or no checkpoint"),
    "first bytes": (WHOLE[:100], "cut short or no checkpoint"),
    "half": (WHOLE[: len(WHOLE) // 2], "cut short or no checkpoint"),
    "all but the last byte": (WHOLE[:-1], "cut short or no checkpoint"),
    "text": (b"hello\n" * 1000, "cut short or no checkpoint"),
    "damaged inside": (WHOLE[:70] + bytes(90) + WHOLE[160:], "does not load"),
    "another archive": (archive(), "does not load"),
    "a tensor": (saved(torch.zeros(3)), "holds no state_dict"),
    "bare weights": (saved({"weight": torch.zeros(3)}), "holds no state_dict"),
    "a path inside": (saved({"state_dict": {}, "where": Path("a")}), r"not plain, GLOBAL pathlib\."),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_whole_checkpoint_is_refused_by_name(name, tmp_path):
    content, words = DAMAGED[name]
    path = tmp_path / "last.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
    sentence = str(error.value)
    assert sentence.startswith(f"checkpoint: expected a whole one, got {path}, ")
    assert sentence.endswith("; take another one, or delete it to start anew")
    assert "\n" not in sentence


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=rf"checkpoint: expected a whole one, got {tmp_path}, a folder; take another"):
        AtomicCheckpointIO().load_checkpoint(tmp_path)


class Plain(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)


class Converted(LieConversion, Plain): ...


def resume(path: Path) -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, plugins=AtomicCheckpointIO(), enable_checkpointing=False)
    trainer.validate(Boring(), torch.utils.data.DataLoader([0.0]), ckpt_path=path, verbose=False)


def tuned(path: Path) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1)
    convert_attention(model)
    FineTune.load_from_checkpoint(path, model=model)


DOORS: dict[str, Callable[[Path], object]] = {
    "trainer": resume,
    "load_converted": lambda path: load_converted(Plain, path),
    "LieConversion": Converted.load_from_checkpoint,
    "FineTune": tuned,
    "LanguageModel": LanguageModel.load_from_checkpoint,
}


@pytest.mark.parametrize("name", ["nothing", "half", "text"])
@pytest.mark.parametrize("door", DOORS)
def test_every_door_says_so(door, name, tmp_path):
    content, words = DAMAGED[name]
    if content is not None:
        (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^checkpoint: expected a whole one, got .*x\.ckpt, .*{words}; take another"):
        DOORS[door](tmp_path / "x.ckpt")


# writing


class Boring(L.LightningModule):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(1, size)

    def training_step(self, batch, batch_idx):
        return self.layer(batch.float()[:, None]).sum()

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    io_, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io_.save_checkpoint({"state_dict": {"step": 1}}, path)
    with (
        small_disk(20_000),
        pytest.raises(OSError, match=rf"^{path}: expected a file .*; make room, or choose another"),
    ):
        io_.save_checkpoint({"state_dict": {"step": 2, "weight": torch.zeros(100_000)}}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert io_.load_checkpoint(path, weights_only=True) == {"state_dict": {"step": 1}}
    io_.save_checkpoint({"state_dict": {"step": 3}}, path)
    assert io_.load_checkpoint(path, weights_only=True) == {"state_dict": {"step": 3}}


def test_a_fit_on_a_full_disk_can_be_resumed(tmp_path):
    class Growing(L.Callback):
        def state_dict(self):
            return {"weight": torch.zeros(100_000 if trainer.global_step > 2 else 1)}

    keep = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=1)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        max_steps=4,
        plugins=AtomicCheckpointIO(),
        callbacks=[keep, Growing()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.DataLoader([1.0] * 8)
    with small_disk(50_000), pytest.raises(OSError, match=r"last\.ckpt: expected a file that can be read and written"):
        trainer.fit(Boring(), data)
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_write_that_is_stopped_leaves_what_was_there(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("before")

    def stopped() -> None:
        with draft(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("kept.txt", "before")]


@pytest.mark.parametrize("place", ["file/last.ckpt", "file/deeper/last.ckpt", "folder", "/proc/last.ckpt"])
def test_places_that_take_no_file(place, tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    path = tmp_path / place  # an absolute one stays as it is
    with pytest.raises(
        OSError, match=rf"^{path}: expected a file that can be read and written, got: [a-z ]+; make room"
    ):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, path)
    assert (tmp_path / "file").read_text() == "kept"
    assert list((tmp_path / "folder").iterdir()) == []


def test_storage_options_are_lightnings(tmp_path):
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "x.ckpt", storage_options={})


# the command line


def config(folder: Path, *more: str) -> list[str]:
    (folder / "text.txt").write_bytes(bytes(range(97, 123)) * 300)
    silent = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    model = {"width": 16, "depth": 1, "num_heads": 2, "attention": "{module: SoftmaxAttention}"}
    data = {"source": folder / "text.txt", "context": 16, "batch_size": 2, "train_windows": 4, "eval_windows": 2}
    given = [part for key, value in model.items() for part in (f"--model.{key}", str(value))]
    given = ["--model", "LanguageModel", *given, "--data", "ByteCorpus"]
    given += [part for key, value in data.items() for part in (f"--data.{key}", str(value))]
    return [*given, "--trainer.accelerator", "cpu", "--trainer.max_steps", "2", *silent, *more]


@pytest.mark.parametrize(
    "more", [[], ["--trainer.plugins+=ManifoldPrecision", "--trainer.plugins.precision", "bf16-true"]]
)
def test_the_command_line_writes_whole_checkpoints(more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = LieCLI(run=False, args=config(tmp_path, *more), save_config_callback=None)
    assert type(cli.trainer.strategy.checkpoint_io) is AtomicCheckpointIO


def test_the_command_line_leaves_ones_own_way_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = ["--trainer.plugins", "lightning.pytorch.plugins.AsyncCheckpointIO"]
    cli = LieCLI(run=False, args=config(tmp_path, *own), save_config_callback=None)
    assert type(cli.trainer.strategy.checkpoint_io).__name__ == "AsyncCheckpointIO"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["--ckpt_path", "half.ckpt"],
            "ValueError: checkpoint: expected a whole one, got half.ckpt, a file that is cut",
        ),
        (["--ckpt_path", "."], "ValueError: checkpoint: expected a whole one, got ., a folder; take another"),
        (["--trainer.default_root_dir", "file"], "file"),
        (["--trainer.default_root_dir", "/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_a_fit_ends_in_one_sentence(more, words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["liegroup-attn"])
    (tmp_path / "half.ckpt").write_bytes(WHOLE[:900])
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SystemExit) as stop:
        main(["fit", *config(tmp_path, *more)])
    err = capfd.readouterr().err
    assert stop.value.code == 1
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("liegroup-attn: ")
    assert words in last
    assert "; " in last
