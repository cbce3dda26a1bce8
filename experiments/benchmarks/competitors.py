"""What is timed: this library's methods and their competitors, each one function of (query, key, value).

A new competitor or method is one row of ``attention_rows`` or ``small_rows``. Names of the library are looked up when a
row runs, and ``needs`` says which ones may be absent, so that a row may stand here before its method does.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import liegroup_attn as la
from liegroup_attn.expm import uniformization

__all__ = ["BASE", "Row", "Run", "attention_rows", "jump_chain", "small_rows", "why_not"]

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
BASE = "softmax, SDPA"  # ratios are over this row
TOL = 1e-3
FAR = 2**15  # no limit within the benchmark
LONG = 2**14  # for what takes N² operations, forward and backward
NO_BACKWARD = 0


class Row(NamedTuple):
    """One line of a table."""

    run: Run
    computes: str  # name of its reference in values.REFERENCES
    forward: int = FAR  # largest N whose cost is within reach, alone …
    backward: int = LONG  # … and with the backward
    needs: tuple[str, ...] = ()  # modules, names of liegroup_attn, or their parameters as Name.parameter


def jump_chain(query: Tensor, key: Tensor) -> Tensor:
    """S = softmax(q kᵀ/√d), formed; at least float32, since matrix_exp of half precision is garbage."""
    wide = torch.promote_types(query.dtype, torch.float32)
    return ((query.to(wide) / query.size(-1) ** 0.5) @ key.to(wide).mT).softmax(-1)


def softmax(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
    """Softmax attention by torch's fused kernel."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)


def eager_softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention that forms N×N."""
    return (jump_chain(query, key) @ value.to(torch.promote_types(value.dtype, torch.float32))).to(value.dtype)


def matrix_exp(query: Tensor, key: Tensor, value: Tensor, time: float = 1.0) -> Tensor:
    """What one writes by hand: form S, exponentiate t(S − I), multiply."""
    chain = jump_chain(query, key)
    eye = torch.eye(chain.size(-1), dtype=chain.dtype, device=chain.device)
    return (torch.matrix_exp(time * (chain - eye)) @ value.to(chain.dtype)).to(value.dtype)


def dopri5(query: Tensor, key: Tensor, value: Tensor, tolerance: float) -> Tensor:
    """GRAND-l: dx/dt = (S − I)x from x = V, t from 0 to 1, by an adaptive Runge–Kutta solver.

    Source: arXiv 2106.10934.
    """
    from torchdiffeq import odeint

    chain = jump_chain(query, key)
    when = torch.tensor([0.0, 1.0], dtype=chain.dtype, device=chain.device)
    flow = odeint(
        lambda _, x: chain @ x - x, value.to(chain.dtype), when, method="dopri5", rtol=tolerance, atol=tolerance
    )
    return flow[-1].to(value.dtype)


def scipy_expm_multiply(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """SciPy's truncated Taylor series of exp(S − I)V, head by head; no backward."""
    from scipy.sparse.linalg import expm_multiply

    chain = jump_chain(query, key)
    generator = (chain - torch.eye(chain.size(-1), dtype=chain.dtype)).flatten(0, -3).numpy()
    values = value.to(chain.dtype).flatten(0, -3).numpy()
    mixed = [torch.from_numpy(expm_multiply(q, v)) for q, v in zip(generator, values, strict=True)]
    return torch.stack(mixed).view(value.shape).to(value.dtype)


def low_rank(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
    """exp(S − I)V with S linear attention of the features elu + 1: the closed form, or causal hops."""
    generator = la.LowRankGenerator(la.elu_plus_one(query), la.elu_plus_one(key), is_causal=is_causal)
    return la.expm_multiply(generator, value, method=la.Uniformization(TOL) if is_causal else la.LowRank())


def library(method: Callable[[], Any], **options: Any) -> Run:
    """A row of ``lie_attention``: what makes the method, and ``options`` of the call."""
    return lambda query, key, value: la.lie_attention(query, key, value, **options, method=method())


def attention_rows(tolerance: float) -> dict[str, Row]:
    """Rows of the part ``attention``; θ = t = 1.

    Args:
        tolerance: rtol and atol of dopri5.
    """
    causal: dict[str, Any] = {"is_causal": True}
    exponential: dict[str, Any] = {"is_causal": True, "first_hop": True, "clock": la.ExponentialClock()}
    ode = partial(dopri5, tolerance=tolerance)
    low = ("LowRankGenerator", "LowRank", "elu_plus_one")
    return {
        BASE: Row(softmax, "softmax"),
        "softmax, SDPA, causal": Row(partial(softmax, is_causal=True), "softmax, causal"),
        "softmax, eager": Row(eager_softmax, "softmax", 4096, 4096),
        "exp, torch.matrix_exp": Row(matrix_exp, "exp", 1024, 1024),
        "exp, dopri5 (GRAND-l)": Row(ode, "exp", 2048, 2048, ("torchdiffeq",)),
        "exp, SciPy expm_multiply": Row(scipy_expm_multiply, "exp", 2048, NO_BACKWARD, ("scipy",)),
        "exp, Uniformization": Row(library(lambda: la.Uniformization(TOL)), "exp"),
        "exp, Uniformization, formed S": Row(
            library(lambda: la.Uniformization(TOL, formed=True)), "exp", 4096, 4096, ("Uniformization.formed",)
        ),
        "exp, ScalingSquaring": Row(library(lambda: la.ScalingSquaring()), "exp", 2048, 2048, ("ScalingSquaring",)),
        "exp causal, Uniformization": Row(library(lambda: la.Uniformization(TOL), **causal), "exp, causal"),
        "exp causal, CausalSweep": Row(
            library(lambda: la.CausalSweep(TOL), **causal), "exp, causal", needs=("CausalSweep",)
        ),
        "first hop + exponential, CausalSweep": Row(
            library(lambda: la.CausalSweep(), **exponential), "resolvent", needs=("CausalSweep",)
        ),
        "first hop + exponential, TriangularSolve": Row(
            library(lambda: la.TriangularSolve(), **exponential), "resolvent", 4096, 4096
        ),
        "exp low rank, closed form": Row(low_rank, "low rank", backward=FAR, needs=low),
        "exp low rank, causal hops": Row(
            partial(low_rank, is_causal=True), "low rank, causal", backward=FAR, needs=low
        ),
    }


def formed_hops(order: float, **options: Any) -> Run:
    """Hops on a formed S in one order whatever their number: 0 hop by hop, inf as a polynomial of the matrix first."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with patch.object(uniformization, "HOP_OVER_PRODUCT", order):
            return la.lie_attention(query, key, value, **options, method=la.Uniformization(formed=True))

    return run


def small_rows(time: float) -> dict[str, Row]:
    """Rows of the part ``small``: every way to the same exp(tQ)V, to the rounding unit, and two to the resolvent; θ = ``time``."""
    exponential: dict[str, Any] = {"time": time, "clock": la.ExponentialClock()}
    rows = {
        "torch.matrix_exp": Row(partial(matrix_exp, time=time), "exp"),
        "ScalingSquaring": Row(library(lambda: la.ScalingSquaring(), time=time), "exp"),
        "formed S, hop by hop": Row(formed_hops(0.0, time=time), "exp"),
        "formed S, polynomial": Row(formed_hops(float("inf"), time=time), "exp"),
        "Uniformization, SDPA": Row(library(lambda: la.Uniformization(), time=time), "exp"),
        "method=None": Row(library(lambda: None, time=time), "exp"),
        "resolvent, solve": Row(library(lambda: la.MatrixExp(), **exponential), "resolvent"),
    }
    if time <= 4:  # the geometric law has a long tail
        rows["resolvent, formed S"] = Row(library(lambda: la.Uniformization(formed=True), **exponential), "resolvent")
    return rows


def why_not(row: Row, tokens: int, backward: bool, device: str) -> str | None:
    """Why a row is left out of a cell; None if it is not."""
    missing = [name for name in row.needs if not _exists(name)]
    if missing:
        return f"needs {', '.join(missing)}, not in this version or not installed"
    if backward and row.backward == NO_BACKWARD:
        return "has no backward"
    if tokens > (most := row.backward if backward else row.forward):
        return f"out of reach beyond N = {most}"
    if device != "cpu" and "scipy" in row.needs:
        return "runs on the CPU only"
    return None


def _exists(name: str) -> bool:
    owner, _, parameter = name.partition(".")
    if hasattr(la, owner):
        return not parameter or parameter in inspect.signature(getattr(la, owner)).parameters
    return importlib.util.find_spec(owner) is not None
