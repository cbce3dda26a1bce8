"""Callbacks: exact resumption, and a monitor of what only this attention has."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from liegroup_attn.clocks import ExponentialClock
from liegroup_attn.errors import ShapeError
from liegroup_attn.metrics import attention_entropy, exit_rates, expected_hops, row_stochasticity_error
from liegroup_attn.nn import SelfAttention, SoftmaxAttention
from liegroup_attn.plots import plot_matrices

__all__ = ["ExactResume", "GeneratorMonitor", "diagnose", "layer_inputs", "matrices"]


class ExactResume(L.Callback):
    """Keep random number generators in the checkpoint, so that a resumed run equals the uninterrupted one.

    Lightning's checkpoints carry no generator states: dropout would draw other masks after a resume. States are stored as
    tensors and lists and load under ``weights_only=True``. A ``DataLoader`` draws from torch's generator when it starts,
    at other times in a resumed run: give yours ``generator=torch.Generator()``, as those of this library have.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        version, internal, gauss = random.getstate()
        name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "python": [version, list(internal), gauss],
            "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # As late as can be: new loaders and a sanity check draw numbers before this, and a run that resumes in
        # mid-epoch never comes to on_train_epoch_start.
        if self._restored is None:
            return
        state, self._restored = self._restored, None
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002


class GeneratorMonitor(L.Callback):
    """Log what only this attention has, on a fixed batch after each validation; draw it when training ends.

    For layer i it logs ``lie/i/time`` (mean over heads), ``lie/i/exit_rate`` (mean −Q_ii), ``lie/i/expected_hops`` (mean
    number of moves, the first hop included), ``lie/i/entropy`` (nats, of the mixing matrix) and ``lie/i/row_error``
    (how far the mixing matrix as executed is from row-stochastic). Softmax layers log entropy and row error.

    Cost: one forward pass and, per layer, dense N×N matrices of ``sequences`` sequences per validation.

    Args:
        sequences: how many sequences of the first validation batch to look at.
        max_tokens: look at no more than the first so many tokens; at all where the model takes no fewer.
        figures: draw S, Q and P(t) of the first sequence when training ends, under ``<log_dir>/figures``.

    Example:
        >>> GeneratorMonitor(sequences=1).sequences
        1
    """

    def __init__(self, sequences: int = 2, max_tokens: int = 128, figures: bool = True) -> None:
        self.sequences = sequences
        self.max_tokens = max_tokens
        self.figures = figures
        self._tokens: Tensor | None = None

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._tokens is None and isinstance(batch, dict) and "tokens" in batch:
            self._tokens = batch["tokens"][: self.sequences].clone()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._tokens is None or trainer.sanity_checking:
            return
        with trainer.precision_plugin.forward_context():  # as executed, under autocast too
            found = [diagnose(layer, x) for layer, x in self._inputs(pl_module, self._tokens)]
        for i, numbers in enumerate(found):
            pl_module.log_dict({f"lie/{i}/{name}": v for name, v in numbers.items()}, sync_dist=True)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        log_dir = trainer.log_dir  # a collective: every process has to ask
        if not self.figures or self._tokens is None or not trainer.is_global_zero or log_dir is None:
            return
        folder = Path(log_dir) / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        for i, (layer, x) in enumerate(self._inputs(pl_module, self._tokens)):
            figure, _ = plot_matrices(matrices(layer, x[:1]))
            figure.savefig(folder / f"layer_{i}.png", dpi=150)

    def _inputs(self, model: torch.nn.Module, tokens: Tensor) -> list[tuple[SelfAttention, Tensor]]:
        try:
            return layer_inputs(model, tokens[:, : self.max_tokens])
        except ShapeError:  # made for so many tokens: places of an image, a learned matrix
            return layer_inputs(model, tokens)


def layer_inputs(model: torch.nn.Module, tokens: Tensor) -> list[tuple[SelfAttention, Tensor]]:
    """Every attention layer of a model with the input it gets for these tokens, in the order of their calls.

    Args:
        model: called as ``model(tokens)``, in eval mode and without gradients.
        tokens: its input.

    Returns:
        Pairs (layer, (B, N, C)).
    """
    seen: list[tuple[SelfAttention, Tensor]] = []
    hooks = [
        m.register_forward_pre_hook(lambda module, args: seen.append((module, args[0].detach())))
        for m in model.modules()
        if isinstance(m, SelfAttention)
    ]
    try:
        with _evaluating(model), torch.no_grad():
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@torch.no_grad()
def diagnose(layer: SelfAttention, x: Tensor) -> dict[str, float]:
    """The monitor's numbers for one layer and its input (B, N, C)."""
    with _evaluating(layer):
        mixing = layer.mixing_matrix(x).float()
        found = {
            "entropy": float(attention_entropy(mixing).mean()),
            "row_error": float(row_stochasticity_error(mixing).max()),
        }
        flows = [
            (generator.dense(), time.float()) for generator, time in layer.flows(x).values()
        ]  # (…, H, N, N), (H, 1)
        if flows:
            exponential = isinstance(getattr(layer, "clock", None), ExponentialClock)
            hops = [expected_hops(q, t.squeeze(-1), exponential=exponential).mean() for q, t in flows]
            found["time"] = float(flows[0][1].mean())
            found["exit_rate"] = float(sum(exit_rates(q).mean() for q, _ in flows))
            found["expected_hops"] = float(sum(hops)) + float(getattr(layer, "first_hop", False))
    return found


@torch.no_grad()
def matrices(layer: SelfAttention, x: Tensor, head: int = 0) -> dict[str, Tensor]:
    """S, Q and the mixing matrix of one head for the first sequence of x (B, N, C); the last alone for softmax.

    An ordered product has two generators, Q and Q₊.
    """
    with _evaluating(layer):
        found, x = {}, x[:1]
        eye = torch.eye(x.size(1), dtype=x.dtype, device=x.device).expand(1, layer.num_heads, -1, -1)
        for name, (generator, _) in layer.flows(x).items():
            dense = generator.dense().expand(1, layer.num_heads, -1, -1)
            if name == "Q":
                found["S"] = generator.jump(eye)[0, head]
            found[name] = dense[0, head]
        name = "softmax" if isinstance(layer, SoftmaxAttention) else "P(t)"
        return {key: m.float().cpu() for key, m in {**found, name: layer.mixing_matrix(x)[0, head]}.items()}


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
