"""LightningModules: language modelling, and classification of every token."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from liegroup_attn import positional
from liegroup_attn.errors import ShapeError
from liegroup_attn.lightning.build import build_optimizer, warmup_cosine
from liegroup_attn.lightning.files import CheckedLoading
from liegroup_attn.lightning.optim import RiemannianSGD
from liegroup_attn.metrics import AccuracyByDepth, BitsPerByte, MulticlassAccuracy, Perplexity
from liegroup_attn.nn import AttentionRecipe, Transformer
from liegroup_attn.nn.recipe import ROPE

__all__ = ["TEST_SETS", "LanguageModel", "TokenClassifier", "Trained"]

TEST_SETS = ("test", "deeper")


class Trained(CheckedLoading):
    """What all share: one optimizer, one schedule, and hyperparameters that are plain values."""

    hparams: Any

    def configure_optimizers(self) -> Any:
        h = self.hparams
        optimizer = build_optimizer(
            self,
            h.learning_rate,
            h.weight_decay,
            manifold_learning_rate=h.manifold_learning_rate,
            optimizer=None if h.momentum is None else partial(RiemannianSGD, momentum=h.momentum),
        )
        schedule = warmup_cosine(optimizer, h.warmup_steps, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Beside hyper_parameters, which load_from_checkpoint(attention=…) overwrites before anyone can compare.
        checkpoint["attention"] = self._variant()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = self.state_dict()
        own = {name: tensor.shape for name, tensor in state.items()}
        # Strategies that shard load the parameters by themselves.
        given = {name: tensor.shape for name, tensor in checkpoint.get("state_dict", state).items()}
        different = sorted(name for name in given | own if given.get(name) != own.get(name))
        own_variant = self._variant()
        stored = checkpoint.get("attention", own_variant)
        if different or _law(stored) != _law(own_variant):
            names = f" ({', '.join([*different[:3], '…'])})" if different else ""
            raise ValueError(
                f"checkpoint: expected the parameters of attention={own_variant}, got those of "
                f"attention={stored}; {len(different)} names or shapes differ{names}; it was trained with another variant, "
                "load it with that config"
            )

    def _variant(self) -> dict[str, Any]:
        more = ("num_heads", "encoding")
        return dict(self.hparams.attention) | {name: self.hparams[name] for name in more}


def _law(recipe: Any) -> tuple[Any, ...]:
    """What a recipe computes that the names of its parameters do not tell."""
    hop, clock = bool(recipe.get("first_hop")), (recipe.get("clock") or "FixedClock", recipe.get("clock_shape"))
    max_time = recipe.get("max_time") or 2 * (recipe.get("time") or 1.0)
    positions = recipe["num_heads"], _positions(recipe), recipe.get("bias_as") or "scores"
    learned = bool(recipe.get("ordered")), recipe.get("manifold") or "RateMatrices", recipe.get("scores")
    return recipe["module"], hop, clock, recipe.get("rate_fn"), max_time, *learned, *positions


def _positions(variant: Any) -> dict[str, Any] | None:
    """The encoding with its defaults, but for a scaling of frequencies: longer contexts may be read with other ones."""
    recipe = variant.get("encoding")
    if "encoding" not in variant and variant.get("rotary_layout"):  # written before encodings had recipes
        recipe = ROPE | {"layout": variant["rotary_layout"], "base": variant["rotary_base"]}
    if recipe is None:
        return None
    parameters = inspect.signature(getattr(positional, recipe["module"])).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return {key: value for key, value in (defaults | recipe).items() if key != "scaling"}


class LanguageModel(Trained):
    """A causal Transformer that predicts the next token; bytes by default.

    Args:
        attention: recipe, e.g. ``{"module": "LieAttention", "first_hop": True, "clock": "ExponentialClock"}``.
        vocab_size: number of tokens; 256 for bytes.
        width: C, model width.
        depth: number of blocks.
        num_heads: H.
        streams: residual streams, see ``nn.ResidualStreams``.
        mlp_ratio: hidden width of the feed-forward layer over C.
        dropout: on attention entries and residual branches, in training.
        encoding: recipe of the positions, e.g. ``{"module": "ALiBi"}``, see ``nn.build_encoding``; default RoPE; null for no
            positions.
        learning_rate: after warm-up; falls along a cosine to a tenth.
        weight_decay: decoupled, on matrices only.
        warmup_steps: of the linear rise.
        continuation: what ``predict`` does to its prompts: arguments of ``generate``, e.g. ``{"max_new_tokens": 64,
            "temperature": 0.8, "top_p": 0.9, "seed": 0}``; default 64 most probable tokens.
        manifold_learning_rate: of parameters on a manifold, such as learned times; null is ``learning_rate``.
        momentum: null trains with Adam; a number ≥ 0 with SGD and this momentum.

    Batches are ``{"tokens": (B, N), "targets": (B, N)}``. Logs ``train/loss`` and, for validation and test, loss
    (nats), perplexity and bits per byte.

    Example:
        >>> import torch
        >>> model = LanguageModel({"module": "LieAttention"}, width=16, depth=1, num_heads=2)
        >>> model(torch.zeros(1, 5, dtype=torch.long)).shape
        torch.Size([1, 5, 256])
    """

    def __init__(
        self,
        attention: AttentionRecipe,
        vocab_size: int = 256,
        width: int = 128,
        depth: int = 2,
        num_heads: int = 4,
        streams: int = 1,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        encoding: dict[str, Any] | None = dict(ROPE),  # noqa: B006
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 100,
        continuation: dict[str, Any] | None = None,
        manifold_learning_rate: float | None = None,
        momentum: float | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(vocab_size, width)
        self.transformer = Transformer(
            width,
            depth,
            num_heads,
            attention,
            is_causal=True,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
            encoding=encoding,
            streams=streams,
        )
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.validation_perplexity, self.test_perplexity = Perplexity(), Perplexity()
        self.validation_bits, self.test_bits = BitsPerByte(), BitsPerByte()

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token scores, (B, N) → (B, N, V)."""
        return self.head(self.transformer(self.embedding(tokens)))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch["tokens"]).flatten(0, 1).float(), batch["targets"].flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "validation", self.validation_perplexity, self.validation_bits)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_perplexity, self.test_bits)

    def _evaluate(self, batch: dict[str, Tensor], stage: str, perplexity: Perplexity, bits: BitsPerByte) -> None:
        scores = self(batch["tokens"]).float()
        perplexity.update(scores, batch["targets"])
        bits.update(scores, batch["targets"])
        loss = F.cross_entropy(scores.flatten(0, 1), batch["targets"].flatten())
        self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=len(scores), sync_dist=True)
        self.log(f"{stage}/perplexity", perplexity, batch_size=len(scores))
        self.log(f"{stage}/bits_per_byte", bits, batch_size=len(scores))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The batch's tokens continued by the hyperparameter ``continuation``, (B, N + max_new_tokens).

        Without ``use_cache`` in it, caches are used where every layer can keep one.
        """
        sampling = self.hparams.continuation or {"max_new_tokens": 64, "temperature": 0.0}
        return self.generate(batch["tokens"], **{"use_cache": self.transformer.can_cache, **sampling})

    def generate(self, tokens: Tensor, max_new_tokens: int, **sampling: Any) -> Tensor:
        """Continue prompts of equal length; arguments, errors and result as in ``nn.Transformer.generate``."""
        return self.transformer.generate(tokens, max_new_tokens, embedding=self.embedding, head=self.head, **sampling)


class TokenClassifier(Trained):
    """A bidirectional Transformer that assigns a class to every token of a set.

    A token is a tuple of integer fields; each field has an embedding table and a token is the sum of its fields'.

    Args:
        attention: recipe, e.g. ``{"module": "LieAttention", "time": 4.0}``.
        vocab_size: number of values of a field, and of classes.
        num_fields: F.
        report_depth: largest depth counted at test time.
        width: C, model width.
        depth: number of blocks.
        num_heads: H.
        streams: residual streams, see ``nn.ResidualStreams``.
        mlp_ratio: hidden width of the feed-forward layer over C.
        dropout: on attention entries and residual branches, in training.
        encoding: of positions; null (default), since tokens are a set.
        learning_rate: after warm-up; falls along a cosine to a tenth.
        weight_decay: decoupled, on matrices only.
        warmup_steps: of the linear rise.
        manifold_learning_rate: of parameters on a manifold, such as learned times; null is ``learning_rate``.
        momentum: null trains with Adam; a number ≥ 0 with SGD and this momentum.

    Batches are ``{"tokens": (B, N, F), "labels": (B, N), "depth": (B, N)}``. Logs ``train/loss``; loss and accuracy for
    validation; accuracy and accuracy by depth for each test set, the first named ``test``, the second ``deeper``.

    Example:
        >>> import torch
        >>> model = TokenClassifier({"module": "LieAttention"}, vocab_size=10, width=16, num_heads=2)
        >>> model(torch.zeros(1, 5, 2, dtype=torch.long)).shape
        torch.Size([1, 5, 10])
    """

    def __init__(
        self,
        attention: AttentionRecipe,
        vocab_size: int = 48,
        num_fields: int = 2,
        report_depth: int = 28,
        width: int = 64,
        depth: int = 1,
        num_heads: int = 4,
        streams: int = 1,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        encoding: dict[str, Any] | None = None,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 50,
        manifold_learning_rate: float | None = None,
        momentum: float | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embeddings = nn.ModuleList(nn.Embedding(vocab_size, width) for _ in range(num_fields))
        self.transformer = Transformer(
            width,
            depth,
            num_heads,
            attention,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
            encoding=encoding,
            streams=streams,
        )
        self.head = nn.Linear(width, vocab_size)
        self.validation_accuracy = MulticlassAccuracy(vocab_size, average="micro")
        self.test_by_depth = nn.ModuleList(AccuracyByDepth(report_depth) for _ in TEST_SETS)

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        for own, theirs in (("vocab_size", "vocab_size"), ("report_depth", "deep_depth")):
            wanted = getattr(data, theirs, None)
            if wanted is not None and self.hparams[own] < wanted:
                raise ValueError(
                    f"{own}: expected at least the data's {theirs}={wanted}, got {self.hparams[own]}; raise it in the model"
                )

    def forward(self, tokens: Tensor) -> Tensor:
        """Class scores, (B, N, F) → (B, N, V)."""
        if tokens.dim() != 3 or tokens.size(-1) != len(self.embeddings):
            raise ShapeError(
                f"tokens: expected (batch, tokens, {len(self.embeddings)} fields), got {tuple(tokens.shape)}; one column a field"
            )
        x = sum(table(tokens[..., f]) for f, table in enumerate(self.embeddings))
        return self.head(self.transformer(x))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch["tokens"]).flatten(0, 1).float(), batch["labels"].flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        scores = self(batch["tokens"]).float()
        self.log(
            "validation/loss",
            F.cross_entropy(scores.flatten(0, 1), batch["labels"].flatten()),
            batch_size=len(scores),
            sync_dist=True,
        )
        self.validation_accuracy.update(scores.flatten(0, 1), batch["labels"].flatten())
        self.log("validation/accuracy", self.validation_accuracy, prog_bar=True, batch_size=len(scores))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx >= len(TEST_SETS):
            raise ValueError(f"test sets: expected at most {len(TEST_SETS)}, got {dataloader_idx + 1}; drop the others")
        self._by_depth()[dataloader_idx].update(self(batch["tokens"]), batch["labels"], batch["depth"])

    def on_test_epoch_end(self) -> None:
        for name, metric in zip(TEST_SETS, self._by_depth(), strict=True):
            if not metric.update_called:
                continue
            self.log(f"{name}/accuracy", metric.overall(), add_dataloader_idx=False, sync_dist=True)
            for depth, accuracy in enumerate(metric.compute().tolist()):
                if accuracy == accuracy:  # NaN: no token so deep
                    self.log(f"{name}/accuracy_at_depth_{depth:02d}", accuracy, sync_dist=True)
            metric.reset()

    def _by_depth(self) -> list[AccuracyByDepth]:
        return [m for m in self.test_by_depth if isinstance(m, AccuracyByDepth)]

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Most probable class of every token, (B, N)."""
        return self(batch["tokens"]).argmax(-1)
