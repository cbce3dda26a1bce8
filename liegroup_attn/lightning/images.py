"""A LightningModule for images: classification of patches."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from liegroup_attn.errors import ShapeError
from liegroup_attn.lightning.modules import Trained
from liegroup_attn.metrics import MulticlassAccuracy
from liegroup_attn.positional import grid_positions

__all__ = ["ImageClassifier"]


class ImageClassifier(Trained):
    """A Transformer on the patches of an image, whose mean over patches is classified.

    Args:
        attention: recipe, e.g. ``{"module": "LieMixer", "generator": {"module": "RateMatrix", "num_tokens": 16}}``.
        num_patches: N, a square grid where ``encoding`` has two axes.
        patch_values: F, numbers of a patch.
        num_classes: of an image.
        width: C, model width.
        depth: number of blocks.
        num_heads: H.
        mlp_ratio: hidden width of the feed-forward layer over C.
        places: every place has a learned embedding; null (default): if there is no ``encoding``.
        encoding: recipe of the positions of patches: on two axes (``AxialRotary``, ``MixedRotary``, or with ``axes: 2``) their
            rows and columns, else their places in reading order; null (default) for none beside the embeddings.
        **options: those of ``Trained``.

    Batches are ``{"tokens": (B, N, F), "labels": (B,)}``. Logs ``train/loss``; loss and accuracy for validation and test.

    Example:
        >>> import torch
        >>> model = ImageClassifier({"module": "LieAttention"}, width=16, num_heads=2)
        >>> model(torch.zeros(3, 16, 4)).shape
        torch.Size([3, 10])

    Source: [Dosovitskiy2021]_.
    """

    def __init__(
        self,
        attention: dict[str, Any],
        num_patches: int = 16,
        patch_values: int = 4,
        num_classes: int = 10,
        width: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        *,
        mlp_ratio: float = 2.0,
        places: bool | None = None,
        encoding: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(mlp_ratio=mlp_ratio, encoding=encoding, **options)
        self.embedding = nn.Linear(patch_values, width)
        self.num_patches = num_patches
        places = encoding is None if places is None else places
        self.places = nn.Embedding(num_patches, width) if places else None
        self.transformer = self.new_transformer(width, depth, num_heads, attention)
        self._grid()  # checks
        self.head = nn.Linear(width, num_classes)
        self.validation_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, tokens: Tensor) -> Tensor:
        """Class scores, (B, N, F) → (B, number of classes)."""
        wanted = self.num_patches, self.embedding.in_features
        if tokens.dim() != 3 or tokens.shape[1:] != wanted:
            raise ShapeError(
                f"tokens: expected (batch, {wanted[0]} patches, {wanted[1]} values), got {tuple(tokens.shape)}; set "
                "num_patches and patch_values as the data has them"
            )
        x = self.embedding(tokens)
        if self.places is not None:
            x = x + self.places.weight
        grid = self._grid()
        positions = None if grid is None else grid_positions(*grid, device=x.device)
        return self.head(self.transformer(x, positions=positions).mean(1))

    def _grid(self) -> tuple[int, int] | None:
        """Number of rows and of columns, if these are what positions are."""
        if self.transformer.axes == 1:
            return None
        side = math.isqrt(self.num_patches)
        if side**2 != self.num_patches or self.transformer.axes != 2:
            raise ShapeError(
                f"num_patches: expected a square number and positions on 1 or 2 axes, got {self.num_patches} and "
                f"{self.transformer.axes}; change num_patches or encoding"
            )
        return side, side

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch["tokens"]).float(), batch["labels"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "validation", self.validation_accuracy)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_accuracy)

    def _evaluate(self, batch: dict[str, Tensor], stage: str, accuracy: MulticlassAccuracy) -> None:
        scores = self(batch["tokens"]).float()
        accuracy.update(scores, batch["labels"])
        loss = F.cross_entropy(scores, batch["labels"])
        self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=len(scores), sync_dist=True)
        self.log(f"{stage}/accuracy", accuracy, prog_bar=True, batch_size=len(scores))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Most probable class of every image, (B,)."""
        return self(batch["tokens"]).argmax(-1)
