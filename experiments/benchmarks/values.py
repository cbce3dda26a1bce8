"""What every row must compute: float64 references by NumPy and SciPy, and the error against them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import liegroup_attn as la
from experiments.benchmarks.competitors import TOL, Row, attention_rows, dopri5, library, why_not
from experiments.benchmarks.measure import Shape, describe, make_inputs, rotated
from experiments.flops import count_flops

__all__ = ["REFERENCES", "TOKENS", "check_values", "error", "find_tolerance"]

TOKENS = 128
LADDER = tuple(digit * 10.0**-power for power in range(1, 7) for digit in (10, 5, 2))

Array = np.ndarray


def _chain(query: Array, key: Array, is_causal: bool = False) -> Array:
    scores = query @ key.swapaxes(-1, -2) / query.shape[-1] ** 0.5
    if is_causal:
        scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
    rates = np.exp(scores - scores.max(-1, keepdims=True))
    return rates / rates.sum(-1, keepdims=True)


def _linear_chain(query: Array, key: Array, is_causal: bool = False) -> Array:
    left, right = (np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (query, key))
    rates = left @ right.swapaxes(-1, -2)
    rates = np.tril(rates) if is_causal else rates
    return rates / rates.sum(-1, keepdims=True)


def _flow(chain: Array, value: Array) -> Array:
    from scipy.linalg import expm

    return expm(chain - np.eye(chain.shape[-1])) @ value


def _resolvent(chain: Array, value: Array) -> Array:
    """S(I − (S − I))⁻¹V."""
    return chain @ np.linalg.solve(2 * np.eye(chain.shape[-1]) - chain, value)


REFERENCES: dict[str, Callable[[Array, Array, Array], Array]] = {
    "softmax": lambda q, k, v: _chain(q, k) @ v,
    "softmax, causal": lambda q, k, v: _chain(q, k, True) @ v,
    "exp": lambda q, k, v: _flow(_chain(q, k), v),
    "exp, causal": lambda q, k, v: _flow(_chain(q, k, True), v),
    "resolvent": lambda q, k, v: _resolvent(_chain(q, k, True), v),
    "low rank": lambda q, k, v: _flow(_linear_chain(q, k), v),
    "low rank, causal": lambda q, k, v: _flow(_linear_chain(q, k, True), v),
}


def error(output: Tensor, reference: Array, value: Tensor) -> float:
    """Largest |output − reference| over its column's osc(V) = max − min: the norm in which tails are bounds."""
    spread = value.double().amax(-2, keepdim=True) - value.double().amin(-2, keepdim=True)
    return float(((output.double().cpu() - torch.from_numpy(reference)) / spread.cpu()).abs().max())


def find_tolerance(shape: Shape) -> dict[str, Any]:
    """The loosest tolerance of dopri5 at which it errs no more than hops with a tail of 1e-3.

    Returns:
        ``tolerance``, its ``error``, the ``library_error`` and the whole ``ladder``; if none will do, the tightest.
    """
    query, key, value = rotated(*make_inputs(shape))
    reference = REFERENCES["exp"](*(x.double().cpu().numpy() for x in (query, key, value)))
    allowed = error(library(lambda: la.Uniformization(TOL))(query, key, value), reference, value)
    ladder: dict[str, float] = {}
    for tolerance in LADDER:
        ladder[f"{tolerance:g}"] = error(dopri5(query, key, value, tolerance), reference, value)
        if ladder[f"{tolerance:g}"] <= allowed:
            break
    return {"tolerance": tolerance, "error": ladder[f"{tolerance:g}"], "library_error": allowed, "ladder": ladder}


def check_values(shape: Shape) -> dict[str, Any]:
    """Error of every row of the part ``attention``, and its operations forward and backward.

    Returns:
        ``dopri5`` (see ``find_tolerance``, None without torchdiffeq) and ``rows``: name → ``{"computes", "error",
        "flops"}`` or ``{"failed"}``; rows that ``why_not`` leaves out are not in it.
    """
    inputs = rotated(*make_inputs(shape))
    arrays = [x.double().cpu().numpy() for x in inputs]
    solver = find_tolerance(shape) if importlib.util.find_spec("torchdiffeq") else None
    found: dict[str, Any] = {}
    for name, row in attention_rows(solver["tolerance"] if solver else TOL).items():
        if why_not(row, shape.tokens, False, shape.device):
            continue
        try:
            with torch.no_grad():
                off = error(row.run(*inputs), REFERENCES[row.computes](*arrays), inputs[2])
            found[name] = {"computes": row.computes, "error": off, "flops": _flops(row, inputs)}
        except Exception as problem:  # as in time_in_turn
            found[name] = {"failed": describe(problem)}
    return {"dopri5": solver, "rows": found}


def _flops(row: Row, inputs: tuple[Tensor, ...]) -> int | None:
    if not row.backward:
        return None
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return count_flops(lambda: row.run(*leaves).sum().backward())
