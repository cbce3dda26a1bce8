"""Callbacks: exact resumption; and by these names the monitor and what it looks at."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import SequentialSampler

from liegroup_attn.lightning.diagnosis import layer_inputs, matrices
from liegroup_attn.lightning.monitor import GeneratorMonitor
from liegroup_attn.lightning.numbers import diagnose

__all__ = ["ExactResume", "GeneratorMonitor", "diagnose", "layer_inputs", "matrices"]


class ExactResume(L.Callback):
    """Keep random number generators in the checkpoint, so that a resumed run equals the uninterrupted one.

    Lightning's checkpoints carry no generator states: dropout would draw other masks after a resume. States are stored as
    tensors and lists and load under ``weights_only=True``.

    Batches are the loader's affair. torch's ``DataLoader`` cannot resume: in mid-epoch Lightning starts it from its beginning,
    and with ``shuffle=True`` in another order; without a generator of its own it also draws from torch's when it starts.
    Training data come from ``data.ResumableLoader``, shuffled or not, as those of this library do; another loader is
    warned of when a fit resumes, but for one with ``state_dict`` and ``load_state_dict``, which is believed.
    (torchdata's ``StatefulDataLoader`` resumes in mid-epoch, not at an epoch's end.)
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
        _warn_of_loaders(trainer, batch_idx)
        state, self._restored = self._restored, None
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002


def _warn_of_loaders(trainer: L.Trainer, batch_idx: int) -> None:
    """In a resumed fit, at its first batch: of loaders whose batches are not those of the uninterrupted one."""
    for loader in CombinedLoader(trainer.train_dataloader).flattened:
        if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
            continue
        sampler = getattr(loader, "sampler", None)
        ordered = sampler is None or isinstance(sampler, SequentialSampler) or hasattr(sampler, "set_epoch")
        if batch_idx or not ordered or getattr(loader, "generator", loader) is None:
            rank_zero_warn(
                f"train_dataloader: expected one that resumes where it stopped, got {type(loader).__name__}, whose batches or "
                "random numbers are now others than in an uninterrupted fit; use liegroup_attn.lightning.data.ResumableLoader, "
                "which takes shuffle=True as well"
            )
            return
