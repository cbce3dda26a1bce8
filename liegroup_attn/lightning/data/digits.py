"""Handwritten digits as sequences of patches: a fixed number of tokens, real images, no download."""

from __future__ import annotations

import hashlib

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from liegroup_attn.lightning.data.loader import ResumableLoader

__all__ = ["Digits"]

_SIDE, _MOST = 8, 16  # pixels a side; intensities 0 … 16
_SHUFFLE = 0  # the split is one and the same for every seed
_VAL = _TEST = 300


class Digits(L.LightningDataModule):
    """Name the digit of an 8×8 image; an item is ``{"tokens": (N, F), "labels": ()}``, one token a patch.

    The 1,797 images of the UCI test set of handwritten digits, as scikit-learn ships them: 1,197 train, 300 validate, 300
    test, by one fixed shuffle. A token is a patch, F = p² intensities from 0 to 1; tokens stand in raster order. Training example i is drawn with replacement, a pure function of (seed, i).

    Args:
        patch_size: p, divides 8: N = (8 / p)² tokens.
        batch_size: images a batch.
        train_size: draws a training epoch.
        seed: of the draws, ≥ 0.
        num_workers: loader processes, 0 for none.

    Raises:
        ValueError: a size is out of range.
        ModuleNotFoundError: scikit-learn is not installed.

    Example:
        >>> data = Digits(patch_size=2, batch_size=3)
        >>> data.setup()
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["tokens"].shape, batch["labels"].shape
        (torch.Size([3, 16, 4]), torch.Size([3]))

    Source: [Alpaydin1998]_.
    """

    num_classes = 10

    def __init__(
        self, patch_size: int = 2, batch_size: int = 64, train_size: int = 100_000, seed: int = 0, num_workers: int = 0
    ) -> None:
        super().__init__()
        for name, size in {"patch_size": patch_size, "batch_size": batch_size, "train_size": train_size}.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}; raise it")
        if _SIDE % patch_size:
            raise ValueError(f"patch_size: expected a divisor of {_SIDE}, got {patch_size}; take 1, 2, 4 or 8")
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}; choose another")
        self.save_hyperparameters(logger=False)
        self.patch_size, self.batch_size, self.train_size = patch_size, batch_size, train_size
        self.seed, self.num_workers = seed, num_workers
        self._splits: list[tuple[Tensor, Tensor]] = []
        self._sha256 = ""

    def setup(self, stage: str | None = None) -> None:
        if self._splits:
            return
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "Digits: expected scikit-learn, which ships the images, got none; pip install scikit-learn"
            ) from None
        found = load_digits()
        images, labels = found.images.astype(np.int64), found.target.astype(np.int64)  # (1797, 8, 8), (1797,)
        self._sha256 = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        order = np.random.default_rng(_SHUFFLE).permutation(len(images))
        for part in np.split(order, [len(order) - _VAL - _TEST, len(order) - _TEST]):
            tokens = _patches(torch.from_numpy(images[part]), self.patch_size)
            self._splits.append((tokens, torch.from_numpy(labels[part])))

    def facts(self) -> dict[str, str | int]:
        """Which images a result was made from."""
        self.setup()
        return {
            "source": "digits",
            "sha256": self._sha256,
            "train": len(self._splits[0][1]),
            "validation": len(self._splits[1][1]),
            "test": len(self._splits[2][1]),
        }

    def train_dataloader(self) -> ResumableLoader:
        """Draws from the training images, in an order fixed by the seed."""
        drawn = _Drawn(*self._splits[0], self.train_size, self.seed)
        return ResumableLoader(drawn, batch_size=self.batch_size, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """The validation images, once each."""
        return self._eval_loader(1)

    def test_dataloader(self) -> DataLoader:
        """The test images, once each."""
        return self._eval_loader(2)

    def predict_dataloader(self) -> DataLoader:
        """What the test sees."""
        return self._eval_loader(2)

    def _eval_loader(self, split: int) -> DataLoader:
        whole = _Images(*self._splits[split])
        generator = torch.Generator()  # see ResumableLoader
        return DataLoader(whole, batch_size=self.batch_size, num_workers=self.num_workers, generator=generator)


def _patches(images: Tensor, p: int) -> Tensor:
    """(B, 8, 8) → (B, N, p²), from 0 to 1."""
    side = _SIDE // p
    pixels = images.unflatten(1, (side, p)).unflatten(3, (side, p)).transpose(2, 3)  # (B, side, side, p, p)
    return pixels.flatten(3).flatten(1, 2).float() / _MOST


class _Images(Dataset):
    def __init__(self, tokens: Tensor, labels: Tensor) -> None:
        self.tokens, self.labels = tokens, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": self.tokens[index], "labels": self.labels[index]}


class _Drawn(_Images):
    """Images drawn with replacement."""

    def __init__(self, tokens: Tensor, labels: Tensor, size: int, seed: int) -> None:
        super().__init__(tokens, labels)
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.size:
            raise IndexError(f"expected an index in 0..{self.size - 1}, got {index}")
        return super().__getitem__(int(np.random.default_rng((self.seed, index)).integers(len(self.labels))))
