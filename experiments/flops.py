"""Floating-point operations, counted alike for every variant and method."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_flops", "flops_per_step"]

aten = torch.ops.aten


def count_flops(call: Callable[[], object]) -> int:
    """Operations of a call: two a multiply-add, matrix products and solves only.

    Attention is counted as its two products over the full N×N square (a causal kernel may skip half). torch's counter
    sees nothing in ``matrix_exp``, inverses and solves, so their formulas are given here.

    Args:
        call: what to count, with its backward if that shall count.

    Returns:
        Operations.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def flops_per_step(model: L.LightningModule, batch: dict[str, Tensor]) -> int:
    """Count forward and backward of one batch, alike for every variant.

    Args:
        model: a LightningModule whose ``training_step`` takes the batch.
        batch: as its data module makes it.

    Returns:
        Operations per step.
    """

    def step() -> None:
        loss = model.training_step(batch, 0)
        assert isinstance(loss, Tensor)
        loss.backward()

    log = model.log
    try:
        model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        return count_flops(step)
    finally:
        model.log = log  # type: ignore[method-assign]
        model.zero_grad()


def _matrix_exp(matrix: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Products of torch's degree-18 Taylor scheme (5) and one per squaring; the norm decides their number."""
    n, batch = matrix.size(-1), matrix.shape[:-2].numel()
    norm = float(torch.linalg.matrix_norm(matrix.detach(), 1).max()) if matrix.numel() else 0.0
    reach = 1.09 if matrix.dtype == torch.float64 else 3.01
    squarings = max(0, math.ceil(math.log2(norm / reach))) if norm > 0 else 0
    return batch * (5 + squarings) * 2 * n**3


def _solve_triangular(matrix: Tensor, right: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    n = matrix.size(-1)
    return matrix.shape[:-2].numel() * n * n * right.size(-1)


def _solve(matrix: Tensor, right: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """LU, then two triangular solves."""
    n = matrix.size(-1)
    return matrix.shape[:-2].numel() * (2 * n**3 // 3 + 2 * n * n * right.size(-1))


def _lu_solve(factors: Tensor, pivots: Tensor, right: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Two triangular solves."""
    return factors.shape[:-2].numel() * 2 * factors.size(-1) ** 2 * right.size(-1)


def _inverse(matrix: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return matrix.shape[:-2].numel() * 2 * matrix.size(-1) ** 3


_FORMULAS = {
    aten.linalg_matrix_exp: _matrix_exp,
    aten.linalg_solve_triangular: _solve_triangular,
    aten._linalg_solve_ex: _solve,
    aten.linalg_lu_solve: _lu_solve,
    aten.linalg_inv_ex: _inverse,
}
for _formula in _FORMULAS.values():
    setattr(_formula, "_get_raw", True)  # noqa: B010  # the counter then passes tensors, not shapes
