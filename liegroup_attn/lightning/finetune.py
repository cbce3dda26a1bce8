"""FineTune: a converted model learns its flows, from labels, from a teacher, or from both."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liegroup_attn.errors import ConversionError
from liegroup_attn.lightning.build import build_optimizer, warmup_cosine
from liegroup_attn.lightning.files import CheckedLoading
from liegroup_attn.lightning.outputs import (
    counted,
    distillation,
    logits_of,
    part_of,
    shifted,
    shifts,
    takes,
    targets_of,
)
from liegroup_attn.lightning.stored_flows import check_laws, warn_of_rounded_flows
from liegroup_attn.nn import LieFlow, restore_attention

__all__ = ["FineTune"]


class FineTune(CheckedLoading):
    """Fine-tune a model that ``nn.convert_attention`` has converted, or distil a teacher into it.

    Batches are dicts, handed to model and teacher as keyword arguments (without ``labels`` where one takes none), or pairs
    (inputs, targets), of which they get the first. The model returns the logits, classes last, or a dict or object that has
    ``logits`` and perhaps ``loss``, as Transformers' models do. The loss is the model's own, else the cross-entropy of
    logits and targets (``ignore_index`` −100): override ``task_loss`` for another. With a teacher it is
    α·T²·KL(teacher ‖ student at temperature T) + (1 − α)·task loss, with α = 1 for batches without targets.

    With ``trainable="lie"`` all but the flows is frozen and stays in eval mode while they train: no dropout, no running
    statistics (nor gradient checkpointing where a model does it in training mode only). With "all" nothing is frozen that
    was not before, and training mode is as ever.

    Logs ``train/loss``, ``train/kl`` with a teacher, ``time/<module>`` (mean over heads), and for validation and test
    loss, kl, and what is apt: accuracy for one class an item, perplexity (exp of the task loss) for one a token. These
    are means over all items or tokens whose target is not −100, whatever batch they are in.

    Args:
        model: converted; no hyperparameter, so load with ``load_from_checkpoint(path, model=model)``, the model converted
            with the clock, first hop and max_time of the checkpoint: others are refused.
        trainable: "lie" or "all".
        teacher: frozen, in eval mode, in no checkpoint; "softmax" is a copy of the model with its flows taken out,
            made before anything is trained or loaded.
        alpha: weight of the teacher, in [0, 1].
        temperature: T > 0, of both distributions.
        learning_rate: of all but the flows.
        lie_learning_rate: of the flows, whose weight decay is 0.
        weight_decay: decoupled, on matrices only.
        warmup_steps: of the linear rise; a cosine to a tenth follows.
        shift_labels: the label of a token is what the one before has to predict, so that the teacher counts where the task
            does. None: where the model's own loss is used and its class is a ``…ForCausalLM`` or ``…LMHeadModel`` of
            Transformers. Say False for the few whose loss does not shift (``BartForCausalLM``), True for a model that
            does in another class; without a loss of its own the cross-entropy then shifts, too.

    Raises:
        ConversionError: no converted attention in the model; a checkpoint whose flows have another law.
        ValueError: an unknown word, alpha or temperature out of range; no loss and no targets.

    Example:
        >>> from liegroup_attn.nn import convert_attention
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1)
        >>> report = convert_attention(model)
        >>> tuner = FineTune(model, teacher="softmax", alpha=1.0)
        >>> [name for name, p in tuner.named_parameters() if p.requires_grad][0]
        'model.layers.0.self_attn.lie.time'

    Source: [Hinton2015]_.
    """

    hparams: Any

    def __init__(
        self,
        model: nn.Module,
        trainable: Literal["lie", "all"] = "lie",
        teacher: nn.Module | Literal["softmax"] | None = None,
        *,
        alpha: float = 0.5,
        temperature: float = 1.0,
        learning_rate: float = 1e-4,
        lie_learning_rate: float = 1e-2,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        shift_labels: bool | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model", "teacher"])
        _check(model, trainable, teacher, alpha, temperature)
        if teacher == "softmax":
            softmax = copy.deepcopy(model)
            restore_attention(softmax)
            teacher = softmax
        # In a list it is no submodule: not in state_dict, parameters or checkpoints, not wrapped by DDP.
        self._teacher = [teacher.requires_grad_(False).eval()] if isinstance(teacher, nn.Module) else []
        self.model = model
        self._sums: Tensor | None = None
        if trainable == "lie":
            flows = {id(p) for flow in _flows(model).values() for p in flow.parameters()}
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in flows)
        self.train(self.training)

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher."""
        return self._teacher[0] if self._teacher else None

    def train(self, mode: bool = True) -> FineTune:
        super().train(mode)
        if self.hparams.trainable == "lie":
            self.model.eval()
            for flow in _flows(self.model).values():
                flow.train(mode)  # what puts times back into [0, max_time]; dropout is its attention's
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FineTune:
        if self._teacher:
            self._teacher[0]._apply(fn, recurse)  # the teacher goes to whatever device the model goes
        super()._apply(fn, recurse)
        return self

    def forward(self, batch: Any) -> Any:
        """The model's output for a batch."""
        return self._call(self.model, batch)

    def task_loss(self, output: Any, logits: Tensor, targets: Tensor | None) -> Tensor | None:
        """Loss by targets, None without any: the output's own, else the cross-entropy."""
        own = part_of(output, "loss")
        if own is not None or targets is None:
            return own
        targets = shifted(targets) if self.hparams.shift_labels else targets
        return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, found, logits, _ = self._losses(batch)
        size = len(logits)
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        if "kl" in found:
            self.log("train/kl", found["kl"], batch_size=size)
        times = {f"time/{name}": flow.flow_time().detach().mean() for name, flow in _flows(self.model).items()}
        self.log_dict(times, batch_size=size)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "validation")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def on_fit_start(self) -> None:
        warn_of_rounded_flows(self)

    def on_validation_epoch_end(self) -> None:
        self._log_perplexity("validation")

    def on_test_epoch_end(self) -> None:
        self._log_perplexity("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lie_laws"] = self._laws()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_laws(checkpoint.get("lie_laws", {}), self._laws())

    def configure_optimizers(self) -> Any:
        h = self.hparams
        optimizer = build_optimizer(self, h.learning_rate, h.weight_decay, lie_learning_rate=h.lie_learning_rate)
        schedule = warmup_cosine(optimizer, h.warmup_steps, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _laws(self) -> dict[str, dict[str, Any]]:
        return {name: flow.law for name, flow in _flows(self.model).items()}

    def _call(self, model: nn.Module, batch: Any) -> Any:
        if not isinstance(batch, Mapping):
            return model(batch[0])
        return model(**{k: v for k, v in batch.items() if k != "labels" or takes(model, "labels")})

    def _losses(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor | None]:
        """The loss, its parts by name, the logits, and the targets at the tokens that predict them."""
        targets = targets_of(batch)
        output = self(batch)
        logits = logits_of(output)
        task = self.task_loss(output, logits, targets)
        targets = self._aligned(output, targets)
        found = {} if task is None else {"task": task}
        if self._teacher:
            with torch.no_grad():
                wanted = logits_of(self._call(self._teacher[0], batch))
            found["kl"] = distillation(logits, wanted, self.hparams.temperature, targets)
        if not found:
            raise ValueError(
                "batch: expected labels or a teacher, got neither; add labels, or targets as in (inputs, targets)"
            )
        alpha = self.hparams.alpha
        if task is None or ("kl" in found and alpha == 1):  # 0·task would be NaN without a target that counts
            return found["kl"], found, logits, targets
        loss = alpha * found["kl"] + (1 - alpha) * task if "kl" in found else task
        return loss, found, logits, targets

    def _aligned(self, output: Any, targets: Tensor | None) -> Tensor | None:
        """Targets of the tokens that predict them."""
        shift = self.hparams.shift_labels
        if shift is None:
            shift = part_of(output, "loss") is not None and shifts(self.model)
        return shifted(targets) if shift and targets is not None else targets

    def _evaluate(self, batch: Any, stage: str) -> None:
        loss, found, logits, targets = self._losses(batch)
        counts = counted(logits, targets)
        size = len(logits) if counts is None else int(counts.sum())
        if not size:  # nothing that counts: a mean over nothing
            loss, found = loss.new_zeros(()), {name: value.new_zeros(()) for name, value in found.items()}
        shared: dict[str, Any] = {"batch_size": size, "sync_dist": True}
        self.log(f"{stage}/loss", loss, prog_bar=True, **shared)
        if "kl" in found:
            self.log(f"{stage}/kl", found["kl"], **shared)
        if targets is not None and counts is not None and logits.dim() == 2:
            self.log(f"{stage}/accuracy", (logits.argmax(-1) == targets).sum() / max(size, 1), **shared)
        elif "task" in found and logits.dim() == 3:
            sums = torch.stack([found["task"].detach().double() * size, loss.new_tensor(size, dtype=torch.double)])
            self._sums = sums if self._sums is None else self._sums + sums

    def _log_perplexity(self, stage: str) -> None:
        if self._sums is not None:
            total, count = self.trainer.strategy.reduce(self._sums.float(), reduce_op="sum")
            self.log(f"{stage}/perplexity", (total / count).exp())
            self._sums = None


def _flows(model: nn.Module) -> dict[str, LieFlow]:
    """Path of the converted module → its flow."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, LieFlow)}
    return {name.rpartition(".")[0] or name: flow for name, flow in found.items()}


def _check(model: nn.Module, trainable: str, teacher: Any, alpha: float, temperature: float) -> None:
    if not _flows(model):
        raise ConversionError(
            f"model: expected one with converted attention, got a {type(model).__name__} without any; call "
            "liegroup_attn.nn.convert_attention(model) first"
        )
    if trainable not in ("lie", "all"):
        raise ValueError(f'trainable: expected "lie" or "all", got {trainable!r}; "lie" trains the flows alone')
    if not (teacher is None or teacher == "softmax" or isinstance(teacher, nn.Module)):
        raise ValueError(f'teacher: expected a module, "softmax" or None, got {teacher!r}; "softmax" copies the model')
    if teacher is model:
        raise ValueError('teacher: expected another module, got the model itself; "softmax" copies it')
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected 0 ≤ alpha ≤ 1, got {alpha}; 1 is the teacher alone")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected 0 < temperature < inf, got {temperature}; 1 leaves logits as they are")
