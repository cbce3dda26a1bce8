"""The Cramér–Rao bound: how well any unbiased estimator can do, from the Fisher information at the truth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liegroup_attn.algebra import dexp, stationary_distribution

__all__ = ["directions", "relative_bound"]


def directions(generator: Tensor, *, reversible: bool) -> Tensor:
    """Tangent vectors (m, n, n) that span the family at a generator.

    Args:
        generator: Q (n, n); in detailed balance if ``reversible``.
        reversible: the family s_ij π_j instead of all rate matrices.

    Returns:
        For all rate matrices the n(n − 1) single rates; else n(n − 1)/2 exchangeabilities and n frequencies (one more
        than the dimension: only the products count).
    """
    n = len(generator)
    eye = torch.eye(n, dtype=generator.dtype)
    single = eye[:, None, :, None] * (eye[None, :, None, :] - eye[:, None, None, :])  # [i, j] = e_i (e_j − e_i)ᵀ
    if not reversible:
        return single[~torch.eye(n, dtype=torch.bool)]
    rows, columns = torch.triu_indices(n, n, 1)
    there, back = (generator[i, j][:, None, None] for i, j in ((rows, columns), (columns, rows)))
    pairs = there * single[rows, columns] + back * single[columns, rows]  # along log s_ij
    into = (generator.T[..., None, None] * single.transpose(0, 1)).sum(1)  # along log π_j: all rates into j
    return torch.cat([pairs, into])


def relative_bound(generator: Tensor, times: Sequence[float], *, reversible: bool) -> float:
    """√(n tr Cov) / ‖Q‖ for n transitions: divided by √n it bounds the root mean square of ‖Q̂ − Q‖ / ‖Q‖.

    Transitions are divided evenly among the times and start from the stationary distribution.
    """
    tangents = directions(generator, reversible=reversible)
    pi = stationary_distribution(generator)
    information = torch.zeros(len(tangents), len(tangents), dtype=generator.dtype)
    for time in times:
        flow = (time * generator).expand_as(tangents)
        P = torch.matrix_exp(flow[:2].mT.contiguous()).mT[0]
        change = dexp(flow, time * tangents)  # (m, n, n), of P(t)
        information += torch.einsum("aij,bij,ij->ab", change, change, pi[:, None] / P) / len(times)
    flat = tangents.flatten(1)
    covariance = torch.linalg.pinv(information, hermitian=True)
    total = torch.einsum("ax,ab,bx->", flat, covariance, flat)
    return float(total.sqrt() / torch.linalg.matrix_norm(generator))
