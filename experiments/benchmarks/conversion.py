"""What a conversion costs while time is frozen at 0, what it costs when time passes, and what watching costs."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmarks.measure import time_in_turn
from liegroup_attn.nn import convert_attention

__all__ = [
    "CONVERSIONS",
    "FROZEN",
    "MODELS",
    "PLAIN",
    "STEPS",
    "WATCHING",
    "time_conversions",
    "time_monitor",
    "why_no_model",
]

PLAIN, FROZEN = "as it was", "converted, time frozen at 0"
CONVERSIONS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    FROZEN: {"learn_time": False, "learn_rates": False},
    "converted, fixed clock, max_time 1": {},
    "converted, exponential clock": {"clock": "ExponentialClock"},
}
STEPS = 100
WATCHING = ("a training step", "a training step that GeneratorMonitor looks at")
BATCH, TOKENS, WIDTH, DEPTH, HEADS = 8, 256, 256, 4, 8


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": HEADS, "n_positions": TOKENS, "vocab_size": 256}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **still))


def _inputs(name: str) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    if name == "GPT2LMHeadModel":
        return torch.randint(256, (BATCH, TOKENS), generator=rng)
    return torch.randn(BATCH, TOKENS, WIDTH, generator=rng)


MODELS: dict[str, Callable[[], nn.Module]] = {"nn.TransformerEncoder": _encoder, "GPT2LMHeadModel": _gpt2}


def why_no_model(name: str) -> str | None:
    """Why a model cannot be built here."""
    needs = {"GPT2LMHeadModel": "transformers"}.get(name)
    return f"{needs} is not installed" if needs and importlib.util.find_spec(needs) is None else None


def time_conversions(name: str, repeats: int, seconds: float, device: str) -> dict[str, Any]:
    """Seconds of one training step of AdamW, of each kind in turn."""
    torch.manual_seed(0)
    plain, x = MODELS[name]().to(device), _inputs(name).to(device)
    calls = {}
    for row, options in CONVERSIONS.items():
        model = copy.deepcopy(plain)
        if options is not None:
            convert_attention(model, **options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)  # so that time stays near 0 where it is learned
        calls[row] = partial(_step, model, x, optimizer)
    return {"rows": time_in_turn(calls, repeats, seconds, device)}


def _step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    out = model(x)
    (out if isinstance(out, Tensor) else out.logits).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def time_monitor(repeats: int, seconds: float, device: str) -> dict[str, Any]:
    """Seconds of a training step, and of one that the monitor looks at, in turn.

    A look every ``STEPS`` steps costs their difference once in ``STEPS`` steps: so little that two whole fits would have
    to be timed to a percent.
    """
    from liegroup_attn.lightning.numbers import CHEAP
    from liegroup_attn.lightning.watch import Watch

    torch.manual_seed(0)
    model, x = _encoder().to(device), _inputs("nn.TransformerEncoder").to(device)
    convert_attention(model, time=0.5)
    step = partial(_step, model, x, torch.optim.AdamW(model.parameters(), lr=1e-6))

    def watched() -> None:
        watch = Watch(model, sequences=2, max_tokens=128, names=CHEAP)  # GeneratorMonitor's defaults
        step()
        watch.close()
        watch.numbers()

    return {"rows": time_in_turn(dict(zip(WATCHING, (step, watched), strict=True)), repeats, seconds, device)}
