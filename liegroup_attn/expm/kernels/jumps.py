"""Causal jumps by Triton: checks, launches, and their place in autograd. Importing this imports Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from liegroup_attn.errors import DtypeError, GeneratorError, ShapeError
from liegroup_attn.expm.kernels.sweeps import backward_sweep, forward_sweep, key_gradient, query_gradient

__all__ = ["causal_jumps_triton"]

_WIDTHS = (16, 32, 64, 128)
_MOST_HELD = 2048  # columns; 16 rows of them are half of the registers of a multiprocessor
_HALVES = (torch.float16, torch.bfloat16)
# Kernels become compiled or interpreted when they are defined; TRITON_INTERPRET=1 set later is too late.
_INTERPRETED = not isinstance(forward_sweep, triton.JITFunction)


def causal_jumps_triton(
    query: Tensor, key: Tensor, onward: Tensor | None, value: Tensor, *, stages: int, implicit: bool, scale: float
) -> Tensor:
    """What the jump chain S = causal softmax(scale · q kᵀ) gives at each stage, scores formed once for all stages.

    Experimental: compiled and run in Triton's interpreter, never run on a GPU yet.

    - explicit (hops): X₀ = V, J_m = S X_m, X_{m+1} = X_m + a∘(J_m − X_m), a = ``onward``; gives J₀ … J_{M−1}.
    - implicit (resolvents): X₀ = V, X_m = (I + diag(c)(I − S))⁻¹ X_{m−1}, c = ``onward``, J_m = S X_m; gives J₁ … J_M.
      Then X_m = (X_{m−1} + c∘J_m)/(1 + c).

    One program per chain walks the tokens in order: fast where B is at least the number of multiprocessors.
    Differentiable once. Half-precision queries: products in TF32, sums and iterates in float32.

    Args:
        query: (B, N, E), B heads of batch items, E one of 16, 32, 64, 128; float32, bfloat16 or float16.
        key: (B, N, E), dtype of the query.
        onward: (B, N), ≥ 0 (not checked), a ≤ 1 or c of any size; None means 1, explicit only.
        value: (B, N, D), D one of 16, 32, 64, 128; float32, bfloat16 or float16.
        stages: M ≥ 1, M·D ≤ 2048.
        implicit: resolvents rather than hops.
        scale: of the scores.

    Returns:
        (B, N, M·D) float32, stage m in columns [mD, (m+1)D).

    Raises:
        ShapeError: sizes that do not fit or that the kernels do not know.
        DtypeError: dtypes that the kernels do not know, or tensors on several devices.
        GeneratorError: stages < 1, implicit without ``onward``.
        RuntimeError: not on a GPU (and not in Triton's interpreter); double backward.

    Source: docs/mathematics, "exp(tQ)V without forming N×N", "Clocks and the first hop".
    """
    _check(query, key, onward, value, stages, implicit)
    onward = None if onward is None else onward.float()
    return _CausalJumps.apply(query, key, onward, value.float(), stages, implicit, float(scale))[0]


class _CausalJumps(torch.autograd.Function):
    """(jumps, iterates, peaks, totals, exits); all but the jumps are for the backward."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, onward: Tensor | None, value: Tensor, stages: int, implicit: bool, scale: float
    ) -> tuple[Tensor, ...]:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        onward = None if onward is None else onward.contiguous()
        b, n, d = value.shape
        jumps, iterates = (value.new_empty(b, n, stages * d) for _ in range(2))
        peaks, totals, exits = (value.new_empty(b, n) for _ in range(3))  # a log-sum-exp in one would lose digits
        if value.numel():
            with torch.cuda.device_of(query):
                forward_sweep[(b,)](
                    query, key, value, onward, iterates, jumps, peaks, totals, exits, n, scale,
                    D=d, IMPLICIT=implicit, **_tiling(query, d, stages),
                )  # fmt: skip
        return jumps, iterates, peaks, totals, exits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        query, key, onward, value, *ctx.knobs = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, onward, value, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        query, key, onward, value, jumps, iterates, peaks, totals, exits = ctx.saved_tensors
        stages, implicit, scale = ctx.knobs
        query, key, value, grad = query.contiguous(), key.contiguous(), value.contiguous(), grad.contiguous()
        onward = None if onward is None else onward.contiguous()
        b, n, d = value.shape
        wide, d_value = torch.empty_like(jumps), torch.empty_like(value)
        levels, stays = torch.empty_like(peaks), torch.empty_like(peaks)
        d_onward = None if onward is None else torch.empty_like(onward)
        d_query, d_key = (
            torch.empty_like(t) if needed else None
            for t, needed in zip((query, key), ctx.needs_input_grad[:2], strict=True)
        )
        if value.numel():
            tiling = _tiling(query, d, stages)
            blocks = (b, triton.cdiv(n, tiling["BLOCK"]))
            rows = (peaks, totals, levels, stays, wide, iterates)
            with torch.cuda.device_of(query):
                backward_sweep[(b,)](
                    query, key, value, onward, iterates, jumps, peaks, totals, exits, grad, wide, levels, stays,
                    d_value, d_onward, n, scale, D=d, IMPLICIT=implicit, **tiling,
                )  # fmt: skip
                if d_query is not None:
                    query_gradient[blocks](query, key, *rows, d_query, n, scale, D=d, **tiling)
                if d_key is not None:
                    key_gradient[blocks](query, key, *rows, d_key, n, scale, D=d, **tiling)
        return d_query, d_key, d_onward, d_value, None, None, None


def _tiling(query: Tensor, width: int, stages: int) -> dict[str, Any]:
    """Blocks as large as ptxas can hold without spilling much: all stages of a block of rows live in registers."""
    half = query.dtype in _HALVES
    held = width * stages
    return {
        "E": query.size(-1),
        "STAGES": stages,
        "BLOCK": 32 if held <= (512 if half else 256) else 16,
        "PRECISION": "tf32" if half else "ieee",
        "num_warps": 8,
        "num_stages": 2 if held <= 256 else 1,  # fetching ahead takes shared memory
    }


def _check(query: Tensor, key: Tensor, onward: Tensor | None, value: Tensor, stages: int, implicit: bool) -> None:
    for name, tensor in (("query", query), ("value", value)):
        if tensor.dim() != 3 or tensor.size(-1) not in _WIDTHS:
            raise ShapeError(
                f"{name}: expected (B, N, width) with a width of 16, 32, 64 or 128, got {tuple(tensor.shape)}; "
                "flatten batch and heads, pad the width with zeros"
            )
    if key.shape != query.shape:
        raise ShapeError(
            f"key: expected the query's shape {tuple(query.shape)}, got {tuple(key.shape)}; expand it to every head"
        )
    if value.shape[:2] != query.shape[:2]:
        raise ShapeError(
            f"value: expected (B, N, D) with the query's (B, N) = {tuple(query.shape[:2])}, got {tuple(value.shape)}; "
            "queries and values belong to the same tokens"
        )
    if onward is not None and onward.shape != query.shape[:2]:
        raise ShapeError(
            f"onward: expected (B, N) = {tuple(query.shape[:2])}, got {tuple(onward.shape)}; expand it to one per token"
        )
    if query.dtype not in (torch.float32, *_HALVES) or key.dtype != query.dtype:
        raise DtypeError(
            f"query, key: expected both float32, bfloat16 or float16, got {query.dtype} and {key.dtype}; convert them, "
            "or use the plain methods for float64"
        )
    for name, given in (("value", value), ("onward", onward)):
        if given is not None and given.dtype not in (torch.float32, *_HALVES):
            raise DtypeError(f"{name}: expected float32, bfloat16 or float16, got {given.dtype}; convert it")
    if stages < 1:
        raise GeneratorError(f"stages: expected at least 1, got {stages}; no jump needs no kernel")
    if stages * value.size(-1) > _MOST_HELD:
        raise ShapeError(
            f"stages: expected stages · D ≤ {_MOST_HELD}, got {stages} · {value.size(-1)}; use the plain methods"
        )
    if implicit and onward is None:
        raise GeneratorError("onward: expected (B, N) with implicit=True, got None; pass the time per token")
    if len({t.device for t in (query, key, value, onward) if t is not None}) > 1:
        raise DtypeError(
            f"query, key, onward, value: expected one device, got {query.device}, {key.device}, "
            f"{None if onward is None else onward.device}, {value.device}; move them together"
        )
    if not (query.is_cuda or _INTERPRETED):
        raise RuntimeError(
            f"query: expected a tensor on a GPU, got {query.device}; move it, or set TRITON_INTERPRET=1 before Triton is "
            "imported (slow, for tests)"
        )
