"""One run: train a model, probe it as it started and as it ended."""

from __future__ import annotations

import datetime
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from experiments.position_study.counts import counted
from experiments.position_study.model import PositionModel
from experiments.position_study.probes import locality, probe_states, probe_table
from experiments.provenance import code_hash, device_name
from liegroup_attn.lightning import ByteCorpus

__all__ = ["ENCODINGS", "MIXINGS", "ROLES", "corpus_of", "train"]

ROLES = {"encoder": False, "decoder": True}  # name → is_causal
MIXINGS: dict[str, Any] = {
    "softmax": {"module": "SoftmaxAttention"},
    "first_hop": {"module": "LieAttention", "first_hop": True, "clock": "ExponentialClock"},
}
ENCODINGS: dict[str, dict[str, Any]] = {
    "learned": {"module": "LearnedEncoding", "std": 1.0},  # as large as bytes' vectors; num_positions is the context
    "sinusoidal": {"module": "SinusoidalEncoding"},
    "rotary": {"module": "RotaryEncoding", "layout": "half_split"},
}


def corpus_of(setting: dict[str, Any], path: str | None, seed: int = 0) -> ByteCorpus:
    """The text; training windows by seed, all others the same for every run."""
    return ByteCorpus(
        setting["corpus"],
        path=path,
        context=setting["context"],
        batch_size=setting["batch_size"],
        train_windows=setting["steps"] * setting["batch_size"],
        eval_windows=setting["eval_windows"],
        seed=seed,
    )


def train(
    mixing: str, role: str, encoding: str, seed: int, setting: dict[str, Any], path: str | None, threads: int
) -> dict[str, Any]:
    """All that the result file of one run says. Runs in a process of its own."""
    L.seed_everything(seed, verbose=False)
    data = corpus_of(setting, path, seed)
    data.prepare_data()
    data.setup("fit")
    more = {"num_positions": setting["context"]} if encoding == "learned" else {}
    model = PositionModel(
        MIXINGS[mixing],
        ENCODINGS[encoding] | more,
        ROLES[role],
        **{name: setting[name] for name in ("width", "depth", "num_heads", "learning_rate", "warmup_steps")},
        seed=seed,
    )
    windows = [torch.cat([b["tokens"] for b in loader]) for loader in (data.val_dataloader(), data.test_dataloader())]
    found: dict[str, Any] = {"untrained": _probe(model, windows, keep_map=False)}
    with tempfile.TemporaryDirectory() as logs, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=setting["steps"],
            logger=CSVLogger(logs),
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            gradient_clip_val=1.0,
        )
        start = time.process_time()
        trainer.fit(model, data)
        seconds = time.process_time() - start
        (last,) = L.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
        ).validate(model, data, verbose=False)
    return {
        "mixing": mixing,
        "role": role,
        "encoding": encoding,
        "seed": seed,
        "setting": setting,
        "hardware": {"name": device_name(torch.device("cpu")), "threads": threads},
        "versions": {name: version(name) for name in ("torch", "lightning", "numpy")},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "code": code_hash(),
        "experiment_code": code_hash(Path(__file__).parent),
        "data": data.facts(),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "cpu_seconds": round(seconds, 2),
        "validation_loss": last["validation/loss"],
        "counts": counted(data, ROLES[role]),
        **found,
        "trained": _probe(model, windows, keep_map=encoding == "learned"),
    }


def _probe(model: PositionModel, windows: list[Tensor], *, keep_map: bool) -> dict[str, Any]:
    """Table and hidden states; fitted on windows of validation, measured on windows of test."""
    fit, out = (model.states(tokens) for tokens in windows)
    found: dict[str, Any] = {"layers": [_short(probe_states(a, b)) for a, b in zip(fit, out, strict=True)]}
    table = model.table(windows[0].size(1))
    if table is None:
        return found | {"table": None}
    numbers, curve, similarity = locality(table)
    found["table"] = _short(probe_table(table) | numbers) | {"curve": [round(x, 4) for x in curve.tolist()]}
    if keep_map:
        found["table"]["map"] = [[round(x, 3) for x in row] for row in similarity.tolist()]
    return found


def _short(numbers: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in numbers.items()}
