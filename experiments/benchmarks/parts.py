"""The cells of the benchmark: what is measured as one, kept as one, and not measured twice."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch

from experiments.benchmarks import values
from experiments.benchmarks.competitors import TOL, Row, attention_rows, small_rows, why_not
from experiments.benchmarks.conversion import (
    CONVERSIONS,
    MODELS,
    WATCHING,
    time_conversions,
    time_monitor,
    why_no_model,
)
from experiments.benchmarks.measure import PHASES, Shape, make_call, make_inputs, peak_memory, time_in_turn
from experiments.benchmarks.positions import (
    FOLDED,
    KINDS,
    RIVALS,
    TRAINED,
    time_folded,
    time_rope,
    time_training,
    why_no_rival,
)
from liegroup_attn.manifolds import RateMatrices, hold

__all__ = ["PARTS", "Cell", "Options"]

Cells = dict[str, dict[str, Any]]
FORWARD, BOTH = PHASES
MOST_HEADED = 4096  # tokens; beyond, one head


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    tokens: tuple[int, ...] = tuple(2**power for power in range(7, 16))
    heads: int = 8
    width: int = 64
    repeats: int = 5
    seconds: float = 40.0
    threads: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    small_tokens: tuple[int, ...] = (16, 24, 32, 48, 64, 128)
    small_widths: tuple[int, ...] = (16, 64)
    small_times: tuple[float, ...] = (1.0, 4.0, 16.0)
    small_batch: int = 256
    context: int = 2048
    new_tokens: int = 256
    decode_width: int = 512
    step_heads: int = 64
    step_tokens: int = 128


@dataclass(frozen=True)
class Cell:
    """One setting and its rows; ``measure`` takes the cells measured before and gives row name → what was found."""

    key: str
    facts: dict[str, Any]
    rows: tuple[str, ...]
    measure: Callable[[Cells], dict[str, Any]]
    skipped: dict[str, str] = field(default_factory=dict)

    def finished(self, stored: dict[str, Any] | None) -> bool:
        """Whether these rows, no fewer and no more, were measured."""
        return stored is not None and set(stored["rows"]) == set(self.rows) and stored["skipped"] == self.skipped


def attention(options: Options) -> Iterator[Cell]:
    """Values at one N, then time over N."""
    yield _values(options)
    for tokens, phase in product(options.tokens, PHASES):
        kept, skipped = _split(attention_rows(TOL), tokens, phase, options)
        shape = _shape(tokens, options)
        facts = {"part": "attention", "tokens": tokens, "heads": shape.heads, "phase": phase}
        run = partial(_time_attention, kept, shape, phase, options)
        yield Cell(f"attention, N = {tokens}, {phase}", facts, kept, run, skipped)


def memory(options: Options) -> Iterator[Cell]:
    """Peak memory over N, one row a cell: each needs a process of its own."""
    yield _values(options)
    for tokens, phase in product(options.tokens[::-2][::-1], PHASES):  # every other N
        shape = _shape(tokens, options)
        facts = {"part": "memory", "tokens": tokens, "heads": shape.heads, "phase": phase}
        for name in _split(attention_rows(TOL), tokens, phase, options)[0]:
            run = partial(_peak, name, shape, phase, options)
            yield Cell(f"memory, N = {tokens}, {phase}, {name}", facts, (name,), run)


def small(options: Options) -> Iterator[Cell]:
    """Many small matrices: the grid to which the rule of ``method=None`` is fitted."""
    o = options
    for tokens in o.small_tokens:
        for width in o.small_widths:
            for time in o.small_times:
                kept, skipped = _split(small_rows(time), tokens, BOTH, o)
                facts = {"part": "small", "tokens": tokens, "heads": o.small_batch, "width": width, "time": time}
                shape = Shape(tokens, o.small_batch, width, o.device, o.dtype)
                run = partial(_time_small, kept, shape, time, o)
                yield Cell(f"small, N = {tokens}, d = {width}, θ = {time:g}", facts, kept, run, skipped)


DECODERS: dict[str, dict[str, Any]] = {
    "softmax": {"module": "SoftmaxAttention"},
    "first hop + exponential clock": {
        "module": "LieAttention",
        "first_hop": True,
        "clock": "ExponentialClock",
        "time": 0.5,
        "max_time": 1.0,
    },
    "exp, fixed clock, 5 hops": {"module": "LieAttention", "time": 0.5, "max_time": 1.0, "tol": TOL},
}


def decode(options: Options) -> Iterator[Cell]:
    """Seconds a token of ``LanguageModel.generate`` after a long prompt."""
    facts = {"part": "decode", "context": options.context, "width": options.decode_width}
    yield Cell(f"decode, context {options.context}", facts, tuple(DECODERS), lambda _: _time_decode(options))


PLAIN, ON_MANIFOLD = "AdamW, plain parameters", "RiemannianAdamW, RateMatrices"


def optimizer(options: Options) -> Iterator[Cell]:
    """Seconds of one optimizer step on a generator per head, on its manifold and as plain numbers."""
    facts = {"part": "optimizer", "heads": options.step_heads, "tokens": options.step_tokens}
    key = f"optimizer, {options.step_heads} heads of {options.step_tokens}×{options.step_tokens}"
    yield Cell(key, facts, (PLAIN, ON_MANIFOLD), lambda _: _time_steps(options))


def conversion(options: Options) -> Iterator[Cell]:
    """Seconds of a training step of other people's models, as they were and converted; and of watching them."""
    for model in MODELS:
        reason = why_no_model(model)
        facts = {"part": "conversion", "model": model}
        if reason is not None:
            yield Cell(f"conversion, {model}", facts, (), lambda _: {"rows": {}}, {model: reason})
        else:
            run = partial(_time_conversions, model, options)
            yield Cell(f"conversion, {model}", facts, tuple(CONVERSIONS), run)
    watch = partial(_time_monitor, options)
    yield Cell("monitor", {"part": "monitor"}, WATCHING, watch)


def _time_conversions(model: str, o: Options, cells: Cells) -> dict[str, Any]:
    return time_conversions(model, o.repeats, o.seconds, o.device)


def _time_monitor(o: Options, cells: Cells) -> dict[str, Any]:
    return time_monitor(o.repeats, o.seconds, o.device)


def positions(options: Options) -> Iterator[Cell]:
    """RoPE beside others' and beside a multiply-add; encodings in inference once folded, and in training."""
    reasons = {name: why_no_rival(name) for name in RIVALS}
    kept = tuple(name for name, reason in reasons.items() if reason is None)
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    for kind in KINDS:
        run = partial(_time_rope, kept, kind, options)
        yield Cell(f"RoPE, {kind}", {"part": "rope", "kind": kind}, kept, run, skipped)
    yield Cell("encodings, inference", {"part": "folded"}, tuple(FOLDED), partial(_time_folded, options))
    yield Cell("encodings, training", {"part": "training"}, tuple(TRAINED), partial(_time_training, options))


def _time_rope(names: tuple[str, ...], kind: str, o: Options, cells: Cells) -> dict[str, Any]:
    return time_rope(names, kind, o.repeats, o.seconds, o.device, o.dtype)


def _time_folded(o: Options, cells: Cells) -> dict[str, Any]:
    return time_folded(o.repeats, o.seconds, o.device, o.dtype)


def _time_training(o: Options, cells: Cells) -> dict[str, Any]:
    return time_training(o.repeats, o.seconds, o.device, o.dtype)


_IMPORTS = {"torch": "import torch", "torch, liegroup_attn": "import torch, liegroup_attn"}


def imports(options: Options) -> Iterator[Cell]:
    """Seconds of ``import torch`` and of ``import torch, liegroup_attn`` in fresh processes, in turn."""
    yield Cell("import", {"part": "import"}, tuple(_IMPORTS), lambda _: _time_imports(options.repeats))


PARTS: dict[str, Callable[[Options], Iterator[Cell]]] = {
    "attention": attention,
    "memory": memory,
    "small": small,
    "decode": decode,
    "optimizer": optimizer,
    "conversion": conversion,
    "positions": positions,
    "import": imports,
}


def _shape(tokens: int, o: Options) -> Shape:
    return Shape(tokens, o.heads if tokens <= MOST_HEADED else 1, o.width, o.device, o.dtype)


def _values(o: Options) -> Cell:
    kept, skipped = _split(attention_rows(TOL), values.TOKENS, FORWARD, o)
    shape = _shape(values.TOKENS, o)
    return Cell("values", {"part": "values"}, kept, lambda _: values.check_values(shape), skipped)


def _split(rows: dict[str, Row], tokens: int, phase: str, o: Options) -> tuple[tuple[str, ...], dict[str, str]]:
    reasons = {name: why_not(row, tokens, phase == BOTH, o.device) for name, row in rows.items()}
    kept = tuple(name for name, reason in reasons.items() if reason is None)
    return kept, {name: reason for name, reason in reasons.items() if reason is not None}


def _tolerance(cells: Cells) -> float:
    return cells["values"]["dopri5"]["tolerance"] if cells["values"]["dopri5"] else TOL


def _time_attention(names: tuple[str, ...], shape: Shape, phase: str, o: Options, cells: Cells) -> dict[str, Any]:
    inputs, rows = make_inputs(shape), attention_rows(_tolerance(cells))
    calls = {name: make_call(rows[name].run, inputs, phase == BOTH, rotary=True) for name in names}
    return {"rows": time_in_turn(calls, o.repeats, o.seconds, o.device)}


def _peak(name: str, shape: Shape, phase: str, o: Options, cells: Cells) -> dict[str, Any]:
    return {"rows": {name: peak_memory(name, shape, phase == BOTH, o.threads, _tolerance(cells))}}


def _time_small(names: tuple[str, ...], shape: Shape, time: float, o: Options, cells: Cells) -> dict[str, Any]:
    inputs, rows = make_inputs(shape), small_rows(time)
    calls = {name: make_call(rows[name].run, inputs, True, rotary=False) for name in names}
    return {"rows": time_in_turn(calls, o.repeats, o.seconds, o.device)}


def _time_decode(o: Options) -> dict[str, Any]:
    from liegroup_attn.lightning.modules import LanguageModel

    prompt = torch.randint(256, (1, o.context), generator=torch.Generator().manual_seed(0)).to(o.device)
    calls = {}
    for name, recipe in DECODERS.items():
        torch.manual_seed(0)
        model = LanguageModel(recipe, width=o.decode_width, depth=2, num_heads=8)
        model = model.to(o.device, getattr(torch, o.dtype)).eval()
        for count in (1, 1 + o.new_tokens):  # the difference leaves the prompt out
            calls[f"{name}/{count}"] = partial(model.generate, prompt, count, temperature=0.0)
    times = time_in_turn(calls, o.repeats, o.seconds, o.device)
    rows: dict[str, Any] = {}
    for name in DECODERS:
        first, all_ = times[f"{name}/1"], times[f"{name}/{1 + o.new_tokens}"]
        broken = [t["failed"] for t in (first, all_) if "failed" in t]
        pairs = [] if broken else zip(first["seconds"], all_["seconds"], strict=True)
        rows[name] = {"failed": broken[0]} if broken else {"seconds": [(b - a) / o.new_tokens for a, b in pairs]}
    return {"rows": rows}


def _time_steps(o: Options) -> dict[str, Any]:
    from liegroup_attn.lightning import RiemannianAdamW

    generator = torch.Generator().manual_seed(0)
    dtype = torch.promote_types(getattr(torch, o.dtype), torch.float32)  # manifold parameters are no narrower
    rates = torch.rand(o.step_heads, o.step_tokens, o.step_tokens, generator=generator, dtype=dtype).to(o.device) + 0.1
    grad = torch.randn(rates.shape, generator=generator, dtype=dtype).to(o.device)
    holder = torch.nn.Module()
    manifold = RateMatrices(o.step_tokens)
    calls = {}
    for name, parameter, kind in (
        (PLAIN, torch.nn.Parameter(rates.clone()), torch.optim.AdamW),
        (ON_MANIFOLD, hold(holder, "rates", manifold.projx(rates), manifold), RiemannianAdamW),
    ):
        parameter.grad = grad.clone()
        calls[name] = kind([parameter], lr=1e-3).step
    return {"rows": time_in_turn(calls, o.repeats, o.seconds, o.device)}


def _time_imports(repeats: int) -> dict[str, Any]:
    rows: dict[str, Any] = {name: {"seconds": []} for name in _IMPORTS}
    for _ in range(repeats):
        for name, code in _IMPORTS.items():
            timed = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
            printed = subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True).stdout
            rows[name]["seconds"].append(float(printed))
    return {"rows": rows}
