"""Floating-point operations of one training step, counted alike for every variant."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["flops_per_step"]

aten = torch.ops.aten


def flops_per_step(model: L.LightningModule, batch: dict[str, Tensor]) -> int:
    """Count forward and backward of one batch: two operations a multiply-add, matrix products and solves only.

    Attention is counted as its two products over the full N×N square for every variant (a causal kernel may
    skip half). torch's counter sees nothing in ``matrix_exp`` and solves, so their formulas are given here.

    Args:
        model: a LightningModule whose ``training_step`` takes the batch.
        batch: as its data module makes it.

    Returns:
        Operations per step.
    """
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            aten.linalg_matrix_exp: _matrix_exp,
            aten.linalg_solve_triangular: _solve_triangular,
            aten._linalg_solve_ex: _solve,
        },
    )
    log = model.log
    try:
        model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        with counter, sdpa_kernel(SDPBackend.MATH):
            loss = model.training_step(batch, 0)
            assert isinstance(loss, Tensor)
            loss.backward()
    finally:
        model.log = log  # type: ignore[method-assign]
        model.zero_grad()
    return counter.get_total_flops()


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


for _formula in (_matrix_exp, _solve_triangular, _solve):
    setattr(_formula, "_get_raw", True)  # noqa: B010  # the counter then passes tensors, not shapes
