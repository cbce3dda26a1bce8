"""exp(tQ) by hops beside ``torch.matrix_exp`` and softmax attention: time, largest tensor, and the cost of the import.

Run with ``python -m experiments.benchmarks.speed``; prints a table and writes a JSON.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.results import write_json
from liegroup_attn import ExponentialClock, TriangularSolve, Uniformization, lie_attention

_IMPORTS = {"torch": "import torch", "liegroup_attn": "import torch, liegroup_attn"}


def softmax(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
    """Softmax attention by torch's fused kernel."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)


def plain_matrix_exp(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What one writes by hand: form S, exponentiate S − I, multiply."""
    chain = (query @ key.mT / query.size(-1) ** 0.5).softmax(-1)
    return torch.matrix_exp(chain - torch.eye(query.size(-2))) @ value


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "softmax, SDPA": softmax,
    "softmax, SDPA, causal": lambda q, k, v: softmax(q, k, v, is_causal=True),
    "exp(tQ), Uniformization, t = 1, tail 1e-3": lambda q, k, v: lie_attention(
        q, k, v, time=1.0, method=Uniformization(tol=1e-3)
    ),
    "exp(tQ), torch.matrix_exp": plain_matrix_exp,
    "exponential clock, TriangularSolve, causal": lambda q, k, v: lie_attention(
        q, k, v, is_causal=True, first_hop=True, clock=ExponentialClock(), method=TriangularSolve()
    ),
}
BASE, SLOW = "exp(tQ), Uniformization, t = 1, tail 1e-3", "exp(tQ), torch.matrix_exp"


class _Largest(TorchDispatchMode):
    """The largest number of elements any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return found


def measure(tokens: int, heads: int, width: int, repeats: int) -> dict[str, Any]:
    """Forward and backward of each method in turn, ``repeats`` times over, after one warm-up."""
    torch.manual_seed(0)
    qkv = [torch.randn(1, heads, tokens, width, requires_grad=True) for _ in range(3)]

    def step(method: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
        start = time.perf_counter()
        method(*qkv).sum().backward()
        return time.perf_counter() - start

    largest = {}
    for name, method in METHODS.items():  # also the warm-up
        with _Largest() as seen:
            step(method)
        largest[name] = seen.elements
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in track(range(repeats), "timing"):
        for name, method in METHODS.items():
            seconds[name].append(step(method))
    return {name: {"seconds": seconds[name], "largest_tensor": largest[name]} for name in METHODS}


def import_seconds(repeats: int) -> dict[str, list[float]]:
    """Seconds of ``import torch`` and of ``import torch, liegroup_attn`` in fresh processes, in turn."""
    found: dict[str, list[float]] = {name: [] for name in _IMPORTS}
    for _ in range(repeats):
        for name, code in _IMPORTS.items():
            timed = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
            printed = subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True).stdout
            found[name].append(float(printed))
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "speed.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    methods = measure(args.tokens, args.heads, args.width, args.repeats)
    imports = import_seconds(args.repeats)

    base = methods[BASE]["seconds"]
    print(f"forward + backward, N = {args.tokens}, {args.heads} heads, d = {args.width}, fp32, {args.threads} threads")
    print("| method | min s | median s | max s | time over Uniformization, median | largest tensor, elements |")
    print("|:--|--:|--:|--:|--:|--:|")
    for name, found in methods.items():
        s = found["seconds"]
        found["ratio"] = statistics.median(a / b for a, b in zip(s, base, strict=True))
        cells = [name, f"{min(s):.3f}", f"{statistics.median(s):.3f}", f"{max(s):.3f}", f"{found['ratio']:.2f}"]
        print(f"| {' | '.join([*cells, format(found['largest_tensor'], ',')])} |")
    extra = statistics.median(imports["liegroup_attn"]) - statistics.median(imports["torch"])
    print(f"\nimport liegroup_attn over import torch: {extra:+.3f} s (medians of {args.repeats})")
    print(f"torch.matrix_exp takes {methods[SLOW]['ratio']:.1f} times as long as Uniformization")
    write_json(
        args.output,
        {
            "tokens": args.tokens,
            "heads": args.heads,
            "width": args.width,
            "threads": args.threads,
            "torch": torch.__version__,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "methods": methods,
            "import_seconds": imports,
            "import_extra_seconds": extra,
        },
    )


if __name__ == "__main__":
    main()
