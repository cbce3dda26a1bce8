"""LightningModules as somebody else would have written them, and a task."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ITEMS, TOKENS, WORDS, CLASSES = 24, 6, 7, 3


class Classifier(L.LightningModule):
    """Knows nothing of Lie attention; built in ``__init__``."""

    def __init__(self, width: int = 8, depth: int = 2, dropout: float = 0.1, learning_rate: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.build()

    def build(self) -> None:
        h = self.hparams
        layer = nn.TransformerEncoderLayer(h.width, 2, 2 * h.width, dropout=h.dropout, batch_first=True)
        self.embedding = nn.Embedding(WORDS, h.width)
        self.encoder = nn.TransformerEncoder(layer, h.depth, enable_nested_tensor=False)
        self.head = nn.Linear(h.width, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(words)).mean(1))

    def training_step(self, batch, batch_idx: int) -> Tensor:
        words, labels = batch
        loss = F.cross_entropy(self(words), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.hparams.learning_rate)


class Late(Classifier):
    """Built in ``configure_model``, as for sharded training."""

    def build(self) -> None:
        self.encoder = None

    def configure_model(self) -> None:
        if self.encoder is None:
            super().build()


def loader(shuffle: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(WORDS, (ITEMS, TOKENS), generator=generator)
    return DataLoader(TensorDataset(words, words.sum(1) % CLASSES), batch_size=4, shuffle=shuffle, generator=generator)


def trainer(folder: Path, callbacks: list[L.Callback] = (), **options) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    fixed = {"accelerator": "cpu", "max_steps": 4, "default_root_dir": folder, "callbacks": list(callbacks)}
    return L.Trainer(**quiet | fixed | options)
