"""What is trained: somebody else's models as they come, their data, and how long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
from torch import Tensor, nn

from liegroup_attn.lightning import ByteCorpus, RandomForests

__all__ = ["TASKS", "Bytes", "Forests", "Task"]

GPT2 = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}
ENCODER = {"width": 64, "layers": 1, "heads": 4}
NODES = {"num_nodes": 24, "max_depth": 11}


class Bytes(nn.Module):
    """Hugging Face's GPT-2 on bytes, tokens in and logits out."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        self.gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=256, **GPT2, **still))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N) → (B, N, 256)."""
        return self.gpt2(input_ids=tokens, use_cache=False).logits


class Forests(nn.Module):
    """PyTorch's Transformer encoder on a set of (node, parent) pairs; which node is each one's root?"""

    def __init__(self, vocab_size: int = 48) -> None:
        super().__init__()
        width, heads = ENCODER["width"], ENCODER["heads"]
        self.node, self.parent = nn.Embedding(vocab_size, width), nn.Embedding(vocab_size, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, ENCODER["layers"], nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, 2) → (B, N, V)."""
        return self.head(self.encoder(self.node(tokens[..., 0]) + self.parent(tokens[..., 1])))


class _BytePairs(ByteCorpus):
    """Batches (tokens, targets), as ``FineTune`` takes them."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch["tokens"], batch["targets"]) if isinstance(batch, dict) else batch


class _ForestPairs(RandomForests):
    """Batches (tokens, roots); one test, of forests as deep as in training."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch["tokens"], batch["labels"]) if isinstance(batch, dict) else batch

    def test_dataloader(self) -> Any:
        return super().test_dataloader()[0]


class Task(NamedTuple):
    """A model, its data and its protocol.

    Args:
        title: in words.
        build: the model, with softmax.
        data: seed, training examples, corpus, path → data module.
        setting: what the result files say of it; ``max_time`` is that of the conversion.
        unit: of the loss.
        accuracy: whether accuracy is measured, too.
    """

    title: str
    build: Callable[[], nn.Module]
    data: Callable[[int, int, str, str | None], L.LightningDataModule]
    setting: dict[str, Any]
    unit: str
    accuracy: bool


def _bytes(seed: int, examples: int, corpus: str, path: str | None) -> L.LightningDataModule:
    sizes: dict[str, Any] = {"context": GPT2["n_positions"], "batch_size": 16, "eval_windows": 128}
    return _BytePairs(corpus, path=path, seed=seed, train_windows=examples, **sizes)


def _forests(seed: int, examples: int, corpus: str, path: str | None) -> L.LightningDataModule:
    return _ForestPairs(seed=seed, train_size=examples, batch_size=64, val_size=1024, test_size=2048, **NODES)


TASKS = {
    "text": Task(
        "GPT-2 on Shakespeare",
        Bytes,
        _bytes,
        {
            "pretrain_steps": 400,
            "steps": 150,
            "batch_size": 16,
            "learning_rate": {"pretrain": 1e-3, "after": 3e-4, "lie": 1e-2},
            "max_time": 2.0,
            "model": {"name": "GPT2LMHeadModel", "vocab_size": 256, **GPT2},
        },
        "nats per byte",
        False,
    ),
    "forests": Task(
        "a Transformer encoder on random forests",
        Forests,
        _forests,
        {
            "pretrain_steps": 600,
            "steps": 600,
            "batch_size": 64,
            "learning_rate": {"pretrain": 1e-2, "after": 3e-3, "lie": 3e-2},
            "max_time": 8.0,
            "model": {"name": "nn.TransformerEncoder", **ENCODER},
        },
        "nats per node",
        True,
    ),
}
