"""Probes: how well can a position, the order and the distance of two be read from vectors, and how local are these?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from liegroup_attn.positional import position_similarity

__all__ = ["locality", "probe_states", "probe_table", "ridge"]

FOLDS = 8  # of a table's positions
PAIRS = 32  # a window
NEAR, FAR = 2, (4, 8)  # tokens
CAUTION = 1.4


def ridge(x: Tensor, y: Tensor, independent: int | None = None) -> Callable[[Tensor], Tensor]:
    """Linear regression with an intercept, its penalty chosen by generalized cross-validation on what it is fitted to.

    Args:
        x: (S, F), features.
        y: (S,), targets.
        independent: how many of the S are, where rows are made from fewer vectors; default S.

    Returns:
        The fit, (M, F) → (M,).

    The score is Golub, Heath and Wahba's (Technometrics 21, 1979) with Kim and Gu's factor (J. R. Stat. Soc. B 66, 2004),
    without which it now and then fits noise where there are not many more samples than features.
    """
    mean, middle = x.mean(0), y.mean()
    u, s, vt = torch.linalg.svd(x - mean, full_matrices=False)
    along, total, samples = u.mT @ (y - middle), (y - middle).square().sum(), independent or len(y)
    best, weights = torch.inf, torch.zeros_like(mean)
    for penalty in torch.logspace(-8, 2, 41, dtype=x.dtype) * s[0].square().clamp(min=1e-30):
        kept = s.square() / (s.square() + penalty)
        freedom = 1 - CAUTION * float(1 + kept.sum()) / samples
        left = float(total - ((2 * kept - kept.square()) * along.square()).sum())
        if freedom > 0 and (score := max(left, 0.0) / freedom**2) < best:
            best, weights = score, vt.mT @ (kept / s.clamp(min=1e-30) * along)
    return lambda new: (new - mean) @ weights + middle


def probe_table(table: Tensor) -> dict[str, float]:
    """Read positions that the fit has not seen, nor their neighbours, from their vectors.

    What is left out are N/8 positions in a row: of a table that only knows its neighbourhood, nothing can be read there,
    while a direction along which positions lie in order goes on.

    Args:
        table: (N, C), one vector a position, N ≥ 3 · 8.

    Returns:
        ``r2`` and ``mae`` (tokens) of the position; ``order``, the share of pairs whose order is told by the
        sign of i − j as read from the difference of their vectors; ``distance_r2``, of |i − j| from the products of their entries.
    """
    table = table.double()
    n = len(table)
    if n < 3 * FOLDS:
        raise ValueError(f"table: expected at least {3 * FOLDS} positions, got {n}; three a fold")
    position = torch.arange(n, dtype=table.dtype)
    folds = torch.arange(n).tensor_split(FOLDS)
    seen: list[list[tuple[Tensor, Tensor]]] = [[], [], []]
    for fold in range(FOLDS):
        out, fit = folds[fold], torch.cat([*folds[:fold], *folds[fold + 1 :]])
        vectors = table - table[fit].mean(0)
        seen[0].append((ridge(vectors[fit], position[fit])(vectors[out]), position[out]))
        (i, j), (k, m) = (torch.cartesian_prod(part, part).T for part in (fit, out))
        (i, j), (k, m) = (i[i != j], j[i != j]), (k[k != m], m[k != m])
        apart, gap = (i - j).double(), (k - m).double()
        seen[1].append((ridge(vectors[i] - vectors[j], apart, len(fit))(vectors[k] - vectors[m]), gap))
        distance = ridge(vectors[i] * vectors[j], apart.abs(), len(fit))(vectors[k] * vectors[m])
        seen[2].append((distance, gap.abs()))
    return _scores(*((torch.cat([p for p, _ in part]), torch.cat([t for _, t in part])) for part in seen))


def probe_states(fit: Tensor, out: Tensor, seed: int = 0) -> dict[str, float]:
    """Read positions from hidden states of windows that the fit has not seen.

    Args:
        fit: (S, N, C), windows to fit.
        out: (T, N, C), windows to measure.
        seed: of the pairs, which are of one window each.

    Returns:
        As ``probe_table``.
    """
    middle = fit.double().mean((0, 1))
    fit, out = fit.double() - middle, out.double() - middle
    position = torch.arange(fit.size(1), dtype=torch.float64)
    absolute = ridge(fit.flatten(0, 1), position.repeat(len(fit)))(out.flatten(0, 1))
    generator = torch.Generator().manual_seed(seed)
    (a, b, apart), (c, d, gap) = (_pairs(states, generator) for states in (fit, out))
    order = ridge(a - b, apart)(c - d)
    distance = ridge(a * b, apart.abs())(c * d)
    return _scores((absolute, position.repeat(len(out))), (order, gap), (distance, gap.abs()))


def _pairs(states: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors of two different positions of a window each, and their i − j."""
    windows, n, _ = states.shape
    window = torch.arange(windows).repeat_interleave(PAIRS)
    i = torch.randint(n, window.shape, generator=generator)
    j = (i + torch.randint(1, n, window.shape, generator=generator)) % n
    return states[window, i], states[window, j], (i - j).double()


def _scores(
    absolute: tuple[Tensor, Tensor], order: tuple[Tensor, Tensor], distance: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """What is read is kept within the positions and distances that there are: a rare byte may send a fit far off."""
    (position, where), (gap, apart) = absolute, distance
    last = float(where.max())
    position, gap = position.clamp(0, last), gap.clamp(1, last)
    return {
        "r2": _r2(position, where),
        "mae": float((position - where).abs().mean()),
        "order": float((order[0] * order[1] > 0).double().mean()),
        "distance_r2": _r2(gap, apart),
    }


def _r2(found: Tensor, true: Tensor) -> float:
    return float(1 - (found - true).square().sum() / (true - true.mean()).square().sum())


def locality(table: Tensor) -> tuple[dict[str, float], Tensor, Tensor]:
    """How much more alike next neighbours are than positions a few steps on.

    Args:
        table: (N, C), one vector a position, N > 8.

    Returns:
        The numbers: ``near``, mean cosine at distances 1 and 2, ``beyond``, at 4 to 8, ``contrast``, near − beyond: small for a
        table along a line however steep, since cosines fall slowly there; ``far``, at N/4 and more; ``mass``, the share of |cosine| at distances 1 and 2 of that at all but 0, over the share of pairs (1: not local),
        and ``rows``, mean correlation of neighbouring rows of the map. Then mean cosine at distance 0 … N − 1, and the
        map (N, N).
    """
    similarity = position_similarity(table.double())
    n = len(similarity)
    if n <= FAR[1]:
        raise ValueError(f"table: expected at least {FAR[1] + 1} positions, got {n}; near and far must differ")
    gap = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    near, all_pairs = (gap >= 1) & (gap <= NEAR), gap >= 1
    curve = torch.stack([similarity.diagonal(d).mean() for d in range(n)])
    close, far = float(similarity[near].mean()), float(similarity[gap >= n // 4].mean())
    beyond = float(similarity[(gap >= FAR[0]) & (gap <= FAR[1])].mean())
    mass = similarity[near].abs().mean() / similarity[all_pairs].abs().mean().clamp(min=1e-30)
    rows = torch.corrcoef(similarity).diagonal(1).nan_to_num().mean()
    return (
        {
            "near": close,
            "beyond": beyond,
            "far": far,
            "contrast": close - beyond,
            "mass": float(mass),
            "rows": float(rows),
        },
        curve,
        similarity,
    )
