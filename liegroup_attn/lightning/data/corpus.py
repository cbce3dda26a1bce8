"""Bytes of text, cut into windows for next-byte prediction."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from liegroup_attn.lightning.data.loader import ResumableLoader
from liegroup_attn.lightning.data.text import PUBLIC, download, read_splits

__all__ = ["ByteCorpus"]


class ByteCorpus(L.LightningDataModule):
    """Next-byte prediction on a corpus of text; each item is ``{"tokens": (N,), "targets": (N,)}``, N = context.

    Sources and their splits, about 90 / 5 / 5 % of the bytes for training, validation and test:

    - ``"stdlib"``: the ``*.py`` files of the running Python's standard library, without tests and idlelib, in the
      order of their names' hashes, cut between files. It differs from Python to Python: report :meth:`facts`.
    - a folder: its text files (UTF-8, not hidden), alike. A file: cut in place.
    - ``"tinyshakespeare"``: the first 90 % train; of the last 10 %, by convention the validation set, we validate
      on the first half and test on the second.
    - ``"wikitext-2"``: the pinned source has no training file, so the first 90 % of ``valid.txt`` train, its last
      10 % validate and ``test.txt`` tests: the numbers are not comparable with published ones.

    Training window i starts at a byte drawn from ``seed``, a pure function of (seed, i); the other splits have
    evenly spaced windows that do not overlap.

    Args:
        source: ``"stdlib"``, ``"tinyshakespeare"``, ``"wikitext-2"``, or the path of a text file or folder.
        path: a local copy of a public corpus, file or folder, used instead of a download; its hash is checked too.
        cache_dir: folder for downloads, default ``~/.cache/liegroup_attn`` (below ``XDG_CACHE_HOME`` if set).
        context: bytes a window, ≥ 1.
        batch_size: windows a batch.
        train_windows: windows a training epoch; shorten epochs here rather than with ``limit_train_batches``.
        eval_windows: windows of validation and of test at most; fewer when no more fit.
        seed: of the training windows.
        num_workers: loader processes, 0 for none.
        max_bytes: keep about this many bytes of the corpus, the first of each split in proportion; default all.

    Raises:
        ValueError: a size is out of range, a hash is wrong, the corpus is too small.
        FileNotFoundError: there is no such file.
        ConnectionError: the download failed.

    Example:
        >>> data = ByteCorpus(__file__, context=8, batch_size=2)
        >>> data.setup()
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["tokens"].shape, bool((batch["tokens"][:, 1:] == batch["targets"][:, :-1]).all())
        (torch.Size([2, 8]), True)
    """

    vocab_size = 256

    def __init__(
        self,
        source: str = "stdlib",
        path: str | None = None,
        cache_dir: str | None = None,
        context: int = 256,
        batch_size: int = 16,
        train_windows: int = 100_000,
        eval_windows: int = 256,
        seed: int = 0,
        num_workers: int = 0,
        max_bytes: int | None = None,
    ) -> None:
        super().__init__()
        # Path objects would keep the checkpoint from loading with weights_only=True.
        source, path, cache_dir = str(source), path and str(path), cache_dir and str(cache_dir)
        sizes = {"context": context, "batch_size": batch_size, "train_windows": train_windows}
        for name, size in (sizes | {"eval_windows": eval_windows, "max_bytes": max_bytes}).items():
            if size is not None and size < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {size}; raise it")
        if path and source not in PUBLIC:
            raise ValueError(
                f"path: expected with one of the sources {sorted(PUBLIC)}, got source={source!r}; of a text of your own pass source={str(path)!r} alone"
            )
        self.save_hyperparameters(logger=False)
        self.source, self.path, self.max_bytes = source, path, max_bytes
        self.context, self.batch_size, self.num_workers = context, batch_size, num_workers
        self.train_windows, self.eval_windows, self.seed = train_windows, eval_windows, seed
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "liegroup_attn"
        self.folder = Path(cache_dir or cache).expanduser() / source  # where downloads lie
        self._splits: dict[str, bytes] = {}

    def prepare_data(self) -> None:
        """Download the corpus if it is public and not here yet."""
        if not self.path:
            download(self.source, self.folder)

    def setup(self, stage: str | None = None) -> None:
        """Read the corpus and cut it into splits, once."""
        if self._splits:
            return
        splits = read_splits(self.source, self.path or self.folder)
        if self.max_bytes is not None:
            total = sum(map(len, splits.values()))
            splits = {k: v[: len(v) * self.max_bytes // max(total, 1)] for k, v in splits.items()}
        for name, text in splits.items():
            if len(text) <= self.context:
                raise ValueError(
                    f"tiny corpus {self.source!r}: expected at least context + 1 = {self.context + 1}"
                    f" bytes for {name}, got {len(text)}; lower context, raise max_bytes or take a larger text"
                )
        self._splits = splits

    @property
    def corpus_sha256(self) -> str:
        """The hash of the bytes in use: training, validation and test, one after the other."""
        self.setup()
        return hashlib.sha256(b"".join(self._splits.values())).hexdigest()

    def facts(self) -> dict[str, str | int]:
        """What a result has to say about its corpus: source, hash, bytes in all and per split, Python's version."""
        sha256, sizes = self.corpus_sha256, {f"{k}_bytes": len(v) for k, v in self._splits.items()}
        python = {"python": platform.python_version()} if self.source == "stdlib" else {}
        return {"source": self.source, "sha256": sha256, "bytes": sum(sizes.values()), **sizes, **python}

    def train_dataloader(self) -> ResumableLoader:
        """Windows at random places, in an order fixed by the seed."""
        text = self._splits["train"]
        generator = torch.Generator().manual_seed(self.seed)
        starts = torch.randint(len(text) - self.context, (self.train_windows,), generator=generator)
        windows = _Windows(text, starts, self.context)
        return ResumableLoader(windows, batch_size=self.batch_size, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """Evenly spaced windows of the validation split."""
        return self._eval_loader("validation")

    def test_dataloader(self) -> DataLoader:
        """Evenly spaced windows of the test split."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """What the tests see."""
        return self.test_dataloader()

    def _eval_loader(self, split: str) -> DataLoader:
        text = self._splits[split]
        count = min(self.eval_windows, len(text) // (self.context + 1))
        starts = torch.arange(count) * (len(text) - self.context - 1) // max(count - 1, 1)
        windows = _Windows(text, starts, self.context)
        generator = torch.Generator()  # see ResumableLoader
        return DataLoader(windows, batch_size=self.batch_size, num_workers=self.num_workers, generator=generator)


class _Windows(Dataset):
    """Windows of context + 1 bytes at given starts."""

    def __init__(self, text: bytes, starts: Tensor, context: int) -> None:
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.starts, self.context = starts, context

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = int(self.starts[index])
        window = self.bytes[start : start + self.context + 1].long()  # (N + 1,)
        return {"tokens": window[:-1], "targets": window[1:]}
