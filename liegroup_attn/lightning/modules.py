"""LightningModules: language modelling, and classification of every token."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from liegroup_attn.errors import ShapeError
from liegroup_attn.lightning.build import build_optimizer, warmup_cosine
from liegroup_attn.lightning.files import CheckedLoading
from liegroup_attn.lightning.optim import RiemannianSGD
from liegroup_attn.lightning.stored_flows import refuse_resume
from liegroup_attn.metrics import AccuracyByDepth, BitsPerByte, MulticlassAccuracy, Perplexity
from liegroup_attn.nn import Flow, LieAttention, SelfAttention, Transformer
from liegroup_attn.nn.recipe import ROPE, defaults_of, in_parts, with_defaults
from liegroup_attn.positional import PositionalEncoding

__all__ = ["TEST_SETS", "LanguageModel", "TokenClassifier", "Trained"]

TEST_SETS = ("test", "deeper")
_OLD = {"rotary_layout", "rotary_base"}  # hyperparameters of checkpoints written before encodings had recipes


class Trained(CheckedLoading):
    """What all share: a Transformer, one optimizer, one schedule, and hyperparameters that are plain values.

    Args:
        learning_rate: after warm-up; falls along a cosine to a tenth.
        weight_decay: decoupled, on matrices only.
        warmup_steps: of the linear rise.
        manifold_learning_rate: of parameters on a manifold, such as learned times; null is ``learning_rate``.
        momentum: null trains with Adam; a number ≥ 0 with SGD and this momentum.
        **transformer: those of ``nn.Transformer``.
    """

    hparams: Any

    def __init__(
        self,
        *,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 50,
        manifold_learning_rate: float | None = None,
        momentum: float | None = None,
        **transformer: Any,
    ) -> None:
        super().__init__()
        defaults = defaults_of(Transformer)  # saved as well: a checkpoint keeps its model when one of them changes
        self.save_hyperparameters({key: defaults[key] for key in defaults if key not in ("attention", "is_causal")})
        self.save_hyperparameters(ignore=list(_OLD))  # with the arguments of subclasses
        for key in _OLD & transformer.keys():
            del transformer[key]
        self._of_transformer = transformer

    def new_transformer(
        self, width: int, depth: int, num_heads: int, attention: dict[str, Any], *, is_causal: bool = False
    ) -> Transformer:
        """A Transformer with these sizes, and all else as the constructor was told."""
        return Transformer(width, depth, num_heads, attention, is_causal=is_causal, **self._of_transformer)

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
        before = [
            LieAttention.of_today(checkpoint.get("state_dict", {}), f"{name}.")
            for name, module in self.named_modules()
            if isinstance(module, LieAttention)
        ]
        if any(before):
            way, why = (
                f"load it with {type(self).__name__}.load_from_checkpoint",
                "has its states as they were before there were flows",
            )
            refuse_resume(getattr(self, "_trainer", None), checkpoint, way, why)
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


def _law(variant: Any) -> tuple[Any, ...]:
    """What a recipe computes that the names of its parameters do not tell."""
    full = with_defaults("attention", in_parts(variant), SelfAttention)
    part = full.get("plus") or full.get("generator") or {}
    manifold = part.get("manifold") if isinstance(part, Mapping) else None
    names = [
        one["module"] if isinstance(one, Mapping) else one for one in (full.get("scores"), manifold or "RateMatrices")
    ]
    own = {key: value for key, value in full.items() if key in defaults_of(Flow) and key != "method"}
    law = Flow(1, 1, **own).law if full["module"] in ("LieAttention", "LieMixer") else None
    told = [full.get(key) for key in ("module", "rate_fn", "ordered", "bias_as", "num_heads")]
    return *told, *names, law, _positions(variant)


def _positions(variant: Any) -> dict[str, Any] | None:
    """The encoding with its defaults, but for a scaling of frequencies: longer contexts may be read with other ones."""
    recipe = variant.get("encoding")
    if "encoding" not in variant and variant.get("rotary_layout"):
        recipe = ROPE | {"layout": variant["rotary_layout"], "base": variant["rotary_base"]}
    if recipe is None:
        return None
    full = with_defaults("encoding", recipe, PositionalEncoding)
    return {key: value for key, value in full.items() if key != "scaling"}


class LanguageModel(Trained):
    """A causal Transformer that predicts the next token; bytes by default.

    Args:
        attention: recipe, e.g. ``{"module": "LieAttention", "clock": "ExponentialClock"}``.
        vocab_size: number of tokens; 256 for bytes.
        width: C, model width.
        depth: number of blocks.
        num_heads: H.
        warmup_steps: of the linear rise.
        continuation: what ``predict`` does to its prompts: arguments of ``generate``, e.g. ``{"max_new_tokens": 64,
            "temperature": 0.8, "top_p": 0.9, "seed": 0}``; default 64 most probable tokens.
        **options: those of ``Trained``; ``encoding`` is RoPE by default.

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
        attention: dict[str, Any],
        vocab_size: int = 256,
        width: int = 128,
        depth: int = 2,
        num_heads: int = 4,
        *,
        warmup_steps: int = 100,
        continuation: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(warmup_steps=warmup_steps, **options)
        self.embedding = nn.Embedding(vocab_size, width)
        self.transformer = self.new_transformer(width, depth, num_heads, attention, is_causal=True)
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
        encoding: of positions; null (default), since tokens are a set.
        weight_decay: decoupled, on matrices only.
        **options: those of ``Trained``.

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
        attention: dict[str, Any],
        vocab_size: int = 48,
        num_fields: int = 2,
        report_depth: int = 28,
        width: int = 64,
        depth: int = 1,
        num_heads: int = 4,
        *,
        encoding: dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(encoding=encoding, weight_decay=weight_decay, **options)
        self.embeddings = nn.ModuleList(nn.Embedding(vocab_size, width) for _ in range(num_fields))
        self.transformer = self.new_transformer(width, depth, num_heads, attention)
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
