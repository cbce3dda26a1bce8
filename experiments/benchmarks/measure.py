"""Seconds of several calls in turn, and the peak memory of one call in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.benchmarks.competitors import Run, attention_rows
from liegroup_attn.positional import RotaryEncoding

__all__ = ["PHASES", "Shape", "describe", "make_call", "make_inputs", "peak_memory", "rotated", "time_in_turn"]

PHASES = ("forward", "forward_backward")
SHARPNESS = 3.0  # standard deviation of the scores, so that tokens do not all agree after one hop
LEAST_SECONDS = 0.01  # of one sample: fast calls are repeated within it
LEAST_ROUNDS = 3


class Shape(NamedTuple):
    """Size and kind of query, key and value; plain, so that another process can be told."""

    tokens: int
    heads: int  # batch × heads
    width: int
    device: str = "cpu"
    dtype: str = "float32"


def make_inputs(shape: Shape) -> list[Tensor]:
    """Query, key and value, (1, H, N, d), the same on every device."""
    generator = torch.Generator().manual_seed(0)
    size = (1, shape.heads, shape.tokens, shape.width)
    inputs = [torch.randn(size, generator=generator) for _ in range(3)]
    inputs[0].mul_(SHARPNESS)
    return [x.to(shape.device, getattr(torch, shape.dtype)) for x in inputs]


def rotated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """RoPE on query and key."""
    rotary = RotaryEncoding(query.size(-1), layout="half_split")
    return rotary(query), rotary(key), value


def make_call(run: Run, inputs: list[Tensor], backward: bool, rotary: bool) -> Callable[[], object]:
    """One step of work: forward without a graph, or forward and the gradients of query, key and value."""

    def mix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return run(*rotated(query, key, value)) if rotary else run(query, key, value)

    if not backward:
        return torch.no_grad()(lambda: mix(*inputs))
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    upstream = torch.ones_like(inputs[2])
    return lambda: torch.autograd.grad(mix(*leaves), leaves, upstream)


def time_in_turn(
    calls: Mapping[str, Callable[[], object]], repeats: int, budget: float, device: str
) -> dict[str, dict[str, Any]]:
    """Seconds a call, A, B, C, A, B, C, …, so that ratios of one round are of one moment.

    Args:
        calls: name → what to time; each is called once or twice first to warm up.
        repeats: rounds.
        budget: seconds after which fewer rounds are made, but at least 3 or ``repeats``.
        device: to wait for.

    Returns:
        name → ``{"seconds": one per round}``, or ``{"failed": why}``.
    """
    found: dict[str, dict[str, Any]] = {}
    inner: dict[str, int] = {}
    total = 0.0
    for name, call in calls.items():
        try:
            once = _seconds(call, 1, device)
            once = once if once > 1 else _seconds(call, 1, device)
        except Exception as problem:  # one row that breaks must not end an hour of measurement; the report names it
            found[name] = {"failed": describe(problem)}
            continue
        found[name] = {"seconds": []}
        inner[name] = math.ceil(LEAST_SECONDS / max(once, 1e-7))
        total += once * inner[name]
    rounds = min(repeats, max(LEAST_ROUNDS, int(budget / max(total, 1e-7))))
    for _ in range(rounds):
        for name, times in inner.items():
            found[name]["seconds"].append(_seconds(calls[name], times, device))
    return found


def describe(problem: BaseException) -> str:
    """An exception in one line."""
    return f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:200]}"


def _seconds(call: Callable[[], object], times: int, device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    _wait(device)
    return float(f"{(time.perf_counter() - start) / times:.5g}")


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def peak_memory(name: str, shape: Shape, backward: bool, threads: int, tolerance: float) -> dict[str, Any]:
    """Bytes that one call of a row of ``attention`` needs beyond its inputs, measured in a fresh process.

    Returns:
        ``{"bytes", "how"}``, or ``{"failed"}``.
    """
    asked = json.dumps([name, shape, backward, threads, tolerance])
    command = [sys.executable, "-m", "experiments.benchmarks.measure", asked]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the process ended with status {done.returncode}"]
        return {"failed": lines[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def _peak_here(name: str, shape: Shape, backward: bool, threads: int, tolerance: float) -> dict[str, Any]:
    torch.set_num_threads(threads)
    run = attention_rows(tolerance)[name].run
    make_call(run, make_inputs(shape._replace(tokens=16)), backward, rotary=True)()  # thread pools, lazy imports
    call = make_call(run, make_inputs(shape), backward, rotary=True)
    if shape.device != "cpu":
        before = torch.cuda.memory_allocated(shape.device)
        torch.cuda.reset_peak_memory_stats(shape.device)
        call()
        _wait(shape.device)
        return {"bytes": torch.cuda.max_memory_allocated(shape.device) - before, "how": "max_memory_allocated"}
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what the warm-up freed must not be at hand
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        before = _status("VmRSS")
    except OSError:
        before = _max_resident()
        call()
        return {"bytes": _max_resident() - before, "how": "ru_maxrss"}
    call()
    return {"bytes": _status("VmHWM") - before, "how": "VmHWM"}


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _max_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    row, size, both, cores, tolerance_given = json.loads(sys.argv[1])
    print(json.dumps(_peak_here(row, Shape(*size), both, cores, tolerance_given)))
