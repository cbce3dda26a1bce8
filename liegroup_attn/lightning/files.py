"""Files that are whole or as they were: how they are written, and what is said of one that cannot be read."""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO

__all__ = ["AtomicCheckpointIO", "CheckedLoading", "check_checkpoint", "draft", "unusable"]


@contextmanager
def draft(path: str | Path) -> Iterator[Path]:
    """A place beside ``path`` to write to; what is there moves to ``path`` at the end, unless something was raised.

    Args:
        path: of the file wanted; its folder is made.

    Raises:
        OSError: full disk, read-only folder, a folder of that name …, of its own kind and in one sentence; what was at
            ``path`` before is as it was.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")  # the same file system, or the move would be a copy
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise type(error)(unusable(path, error)) from error


def unusable(path: Any, error: OSError) -> str:
    """What to say of a file that the system would not open, read or write."""
    reason = (error.strerror or str(error)).lower()
    return f"{path}: expected a file that can be read and written, got: {reason}; make room, or choose another path"


def check_checkpoint(path: Any) -> None:
    """Raise unless a local path is a file in the format of checkpoints; a look at its end, not at what it holds.

    Raises:
        ValueError: nothing there, a folder, cut short, or of another format.
    """
    if not isinstance(path, str | os.PathLike) or "://" in str(path):
        return
    if not os.path.isfile(path):
        _refuse(path, "a folder" if os.path.isdir(path) else "nothing there")
    if not zipfile.is_zipfile(path):  # the directory of a zip file is at its end
        _refuse(path, "a file that is cut short or no checkpoint")


def _refuse(path: Any, got: str, cause: Exception | None = None) -> NoReturn:
    raise ValueError(
        f"checkpoint: expected a whole one, got {path}, {got}; take another one, or delete it to start anew"
    ) from cause


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are written beside their place and moved there: a full disk or a kill leaves the last one whole.

    Lightning writes to the temporary folder, and where that is another file system moves by copying. A local checkpoint
    that cannot be written or read ends in one sentence with its name. Remote ones are left to Lightning.

    Raises:
        OSError: on saving, see ``draft``.
        ValueError: on loading, no whole checkpoint of a Trainer.

    Example:
        >>> trainer = L.Trainer(accelerator="cpu", logger=False, plugins=AtomicCheckpointIO())
        >>> type(trainer.strategy.checkpoint_io).__name__
        'AtomicCheckpointIO'
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()  # torch's own writer hides that the disk is full
        torch.save(checkpoint, content)
        with draft(path) as part:
            part.write_bytes(content.getbuffer())

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        check_checkpoint(path)
        try:
            found = super().load_checkpoint(path, *args, **options)
        except OSError as error:
            raise type(error)(unusable(path, error)) from error
        except Exception as error:  # whatever torch makes of damaged bytes
            named = re.search(r"GLOBAL \S+", str(error))
            reason = f"a value that is not plain, {named[0]}" if named else re.split(r"\. |\n", str(error))[0]
            _refuse(path, f"which does not load ({reason})", error)
        if not isinstance(found, dict) or "state_dict" not in found:
            _refuse(path, "which holds no state_dict")
        return found


class CheckedLoading(L.LightningModule):
    """Base whose ``load_from_checkpoint`` says in one sentence what is no checkpoint."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **options: Any) -> Any:
        """See ``LightningModule.load_from_checkpoint``."""
        check_checkpoint(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **options)
