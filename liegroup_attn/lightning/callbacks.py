"""Callbacks: exact resumption; and by these names the monitor and what it looks at."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import torch

from liegroup_attn.lightning.diagnosis import diagnose, layer_inputs, matrices
from liegroup_attn.lightning.monitor import GeneratorMonitor

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
