"""Triton: causal sweeps over row blocks, forward and backward, and the gradient of the scores.

A program of a sweep owns one chain (a head of a batch item) and reads back what it wrote. Stage m of a wide tensor is
in columns [mD, (m+1)D). Products take float32: "ieee", or "tf32" for half-precision queries, whose q kᵀ TF32 holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["backward_sweep", "forward_sweep", "key_gradient", "query_gradient"]


@triton.jit
def _rows(base, at, n, WIDTH: tl.constexpr, STRIDE: tl.constexpr):
    """(BLOCK, WIDTH), zero past the last token."""
    where = at[:, None] * STRIDE + tl.arange(0, WIDTH)[None, :]
    return tl.load(base + where, mask=at[:, None] < n, other=0.0).to(tl.float32)


@triton.jit
def _put(base, at, n, tile, WIDTH: tl.constexpr, STRIDE: tl.constexpr):
    where = at[:, None] * STRIDE + tl.arange(0, WIDTH)[None, :]
    tl.store(base + where, tile.to(base.dtype.element_ty), mask=at[:, None] < n)


@triton.jit
def _rate(onward, at, n):
    """(BLOCK,), zero past the last token; None means 1."""
    if onward is None:
        return (at < n).to(tl.float32)
    else:
        return tl.load(onward + at, mask=at < n, other=0.0)


@triton.jit
def _nearest(x):
    """To the nearest TF32 number: the hardware cuts, and cut averages would shrink at every hop."""
    near = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, near, x)


@triton.jit
def _dot(a, b, plus, PRECISION: tl.constexpr):
    """plus + a @ b; None is zero."""
    if PRECISION == "tf32":
        return tl.dot(_nearest(a), _nearest(b), plus, input_precision="tf32")
    else:
        return tl.dot(a, b, plus, input_precision=PRECISION)


@triton.jit
def _scores(q, k, rows, cols, scale, PRECISION: tl.constexpr):
    s = scale * _dot(q, tl.trans(k), None, PRECISION)
    return tl.where(cols[None, :] <= rows[:, None], s, float("-inf"))


@triton.jit
def _chain(q, k, peak, total, rows, cols, scale, PRECISION: tl.constexpr):
    """A tile of S. Rows past the last token are not zero, but all that they meet is."""
    s = _scores(q, k, rows, cols, scale, PRECISION)
    return tl.exp(s - peak[:, None]) / total[:, None]


@triton.jit
def _zeros(BLOCK: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr):
    stages = ()
    for _ in tl.static_range(STAGES):
        stages = stages + (tl.zeros((BLOCK, D), tl.float32),)  # noqa: RUF005 - Triton knows no starred tuple
    return stages


@triton.jit
def _times(stages, factor, STAGES: tl.constexpr):
    scaled = ()
    for m in tl.static_range(STAGES):
        scaled = scaled + (stages[m] * factor[:, None],)  # noqa: RUF005
    return scaled


@triton.jit
def _plus(stages, tile, base, at, n, D: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):
    """stages + tile @ (the rows ``at`` of every stage)."""
    moved = ()
    for m in tl.static_range(STAGES):
        rows = _rows(base + m * D, at, n, D, STAGES * D)
        moved = moved + (_dot(tile, rows, stages[m], PRECISION),)  # noqa: RUF005
    return moved


@triton.jit
def _visits(diagonal, rate, exits, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """(I − L)⁻¹, L_ij = c_i S_ij / (1 + c_i e_i), j < i; its entries are probabilities: nothing cancels, nothing grows."""
    i = tl.arange(0, BLOCK)
    hop = tl.where(i[None, :] < i[:, None], diagonal * (rate / (1 + rate * exits))[:, None], 0.0)
    visits = hop + (i[None, :] == i[:, None]).to(tl.float32)
    for doubling in tl.static_range(1, 7):  # L is nilpotent: (I + L)(I + L²)(I + L⁴)… ends
        if 2**doubling < BLOCK:
            hop = _dot(hop, hop, None, PRECISION)
            visits = _dot(visits, hop, visits, PRECISION)
    return visits


@triton.jit
def forward_sweep(
    query, key, value, onward, iterates, jumps, peaks, totals, exits, n, scale,
    E: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr, IMPLICIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """From the first row block to the last: scores once per pair of blocks, applied to the iterates of all stages."""
    chain = tl.program_id(0).to(tl.int64) * n
    query += chain * E
    key += chain * E
    value += chain * D
    iterates += chain * D * STAGES
    jumps += chain * D * STAGES
    peaks += chain
    totals += chain
    exits += chain
    if onward is not None:
        onward += chain
    for start in range(0, n, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        q = _rows(query, rows, n, E, E)
        peak = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        earlier = _zeros(BLOCK, D, STAGES)
        for before in range(0, start, BLOCK):
            cols = before + tl.arange(0, BLOCK)
            s = _scores(q, _rows(key, cols, n, E, E), rows, cols, scale, PRECISION)
            higher = tl.maximum(peak, tl.max(s, 1))
            fade = tl.exp(peak - higher)
            p = tl.exp(s - higher[:, None])
            earlier = _plus(_times(earlier, fade, STAGES), p, iterates, cols, n, D, STAGES, PRECISION)
            total = total * fade + tl.sum(p, 1)
            peak = higher
        s = _scores(q, _rows(key, rows, n, E, E), rows, rows, scale, PRECISION)
        higher = tl.maximum(peak, tl.max(s, 1))
        fade = tl.exp(peak - higher)
        p = tl.exp(s - higher[:, None])
        leaving = total * fade + tl.sum(tl.where(rows[None, :] < rows[:, None], p, 0.0), 1)
        total = total * fade + tl.sum(p, 1)
        exit = leaving / total  # 1 − S_ii, as a sum
        earlier = _times(earlier, fade / total, STAGES)
        diagonal = p / total[:, None]
        tl.store(peaks + rows, higher, mask=rows < n)
        tl.store(totals + rows, total, mask=rows < n)
        tl.store(exits + rows, exit, mask=rows < n)

        x = _rows(value, rows, n, D, D)
        rate = _rate(onward, rows, n)
        if IMPLICIT:
            visits = _visits(diagonal, rate, exit, BLOCK, PRECISION)
        for m in tl.static_range(STAGES):
            if IMPLICIT:
                sent = (x + rate[:, None] * earlier[m]) / (1 + rate * exit)[:, None]
                x = _dot(visits, sent, None, PRECISION)
            j = _dot(diagonal, x, earlier[m], PRECISION)
            _put(iterates + m * D, rows, n, x, D, STAGES * D)
            _put(jumps + m * D, rows, n, j, D, STAGES * D)
            if not IMPLICIT:
                x += rate[:, None] * (j - x)
        tl.debug_barrier()  # later blocks read these iterates, by other threads of this program


@triton.jit
def backward_sweep(
    query, key, value, onward, iterates, jumps, peaks, totals, exits, grad, wide, levels, stays, d_value, d_onward,
    n, scale,
    E: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr, IMPLICIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """From the last row block to the first: ``wide`` = h, the gradient of what S gave, row sums, dV and d onward.

    ``levels`` is Σ_m ⟨h, J⟩, ``stays`` is Σ_m ⟨h, J − X⟩ (see ``_score_gradient``).
    """
    chain = tl.program_id(0).to(tl.int64) * n
    query += chain * E
    key += chain * E
    value += chain * D
    iterates += chain * D * STAGES
    jumps += chain * D * STAGES
    peaks += chain
    totals += chain
    exits += chain
    grad += chain * D * STAGES
    wide += chain * D * STAGES
    levels += chain
    stays += chain
    d_value += chain * D
    if onward is not None:
        onward += chain
        d_onward += chain
    blocks = tl.cdiv(n, BLOCK)
    for turn in range(0, blocks):
        start = (blocks - 1 - turn) * BLOCK
        at = start + tl.arange(0, BLOCK)
        k = _rows(key, at, n, E, E)
        back = _zeros(BLOCK, D, STAGES)  # Σ over later rows of Sᵀh
        for later in range(start + BLOCK, n, BLOCK):
            rows = later + tl.arange(0, BLOCK)
            peak = tl.load(peaks + rows, mask=rows < n, other=0.0)
            total = tl.load(totals + rows, mask=rows < n, other=1.0)
            tile = _chain(_rows(query, rows, n, E, E), k, peak, total, rows, at, scale, PRECISION)
            back = _plus(back, tl.trans(tile), wide, rows, n, D, STAGES, PRECISION)
        peak = tl.load(peaks + at, mask=at < n, other=0.0)
        total = tl.load(totals + at, mask=at < n, other=1.0)
        diagonal = _chain(_rows(query, at, n, E, E), k, peak, total, at, at, scale, PRECISION)
        rate = _rate(onward, at, n)
        exit = tl.load(exits + at, mask=at < n, other=0.0)
        pivot = 1 + rate * exit
        if IMPLICIT:
            visits = _visits(diagonal, rate, exit, BLOCK, PRECISION)
        w = tl.zeros((BLOCK, D), tl.float32)
        d_rate = tl.zeros((BLOCK,), tl.float32)
        level = tl.zeros((BLOCK,), tl.float32)
        stay = tl.zeros((BLOCK,), tl.float32)
        for m in tl.static_range(STAGES - 1, -1, -1):
            g = _rows(grad + m * D, at, n, D, STAGES * D)
            j = _rows(jumps + m * D, at, n, D, STAGES * D)
            x = _rows(iterates + m * D, at, n, D, STAGES * D)
            moved = j - x
            if IMPLICIT:
                previous = _rows(iterates + (m - 1) * D, at, n, D, STAGES * D) if m > 0 else _rows(value, at, n, D, D)
                # (1 + c)X = previous + cJ: past c = 1 this form of J − X is the one that does not cancel.
                long = rate[:, None] > 1
                moved = tl.where(long, (x - previous) / tl.where(long, rate[:, None], 1.0), moved)
                w = _dot(tl.trans(diagonal), g, back[m] + w, PRECISION)
                w = _dot(tl.trans(visits), w, None, PRECISION) / pivot[:, None]
            h = g + rate[:, None] * w
            d_rate += tl.sum(w * moved, 1)
            if not IMPLICIT:
                w += back[m] - rate[:, None] * w
                w = _dot(tl.trans(diagonal), h, w, PRECISION)
            level += tl.sum(h * j, 1)
            stay += tl.sum(h * moved, 1)
            _put(wide + m * D, at, n, h, D, STAGES * D)
        _put(d_value, at, n, w, D, D)
        tl.store(levels + at, level, mask=at < n)
        tl.store(stays + at, stay, mask=at < n)
        if onward is not None:
            tl.store(d_onward + at, d_rate, mask=at < n)
        tl.debug_barrier()  # earlier blocks read these h, by other threads of this program


@triton.jit
def _score_gradient(
    q, k, peaks, totals, levels, stays, wide, iterates, rows, cols, n, scale,
    D: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of S ∘ (dS − r), dS = Σ_m h_m X_mᵀ, r its row sums under S."""
    peak = tl.load(peaks + rows, mask=rows < n, other=0.0)
    total = tl.load(totals + rows, mask=rows < n, other=1.0)
    level = tl.load(levels + rows, mask=rows < n, other=0.0)
    stay = tl.load(stays + rows, mask=rows < n, other=0.0)
    tile = _chain(q, k, peak, total, rows, cols, scale, PRECISION)
    change = tl.zeros(tile.shape, tl.float32)
    for m in tl.static_range(STAGES):
        h = _rows(wide + m * D, rows, n, D, STAGES * D)
        x = _rows(iterates + m * D, cols, n, D, STAGES * D)
        change = _dot(h, tl.trans(x), change, PRECISION)
    # On the diagonal dS − r = −Σ⟨h, J − X⟩, known without the cancellation that a long time would make of it.
    return tile * tl.where(rows[:, None] == cols[None, :], -stay[:, None], change - level[:, None])


@triton.jit
def query_gradient(
    query, key, peaks, totals, levels, stays, wide, iterates, d_query, n, scale,
    E: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chain and row block."""
    chain = tl.program_id(0).to(tl.int64) * n
    start = tl.program_id(1) * BLOCK
    rows = start + tl.arange(0, BLOCK)
    q = _rows(query + chain * E, rows, n, E, E)
    total = tl.zeros((BLOCK, E), tl.float32)
    for before in range(0, start + BLOCK, BLOCK):
        cols = before + tl.arange(0, BLOCK)
        k = _rows(key + chain * E, cols, n, E, E)
        tile = _score_gradient(
            q, k, peaks + chain, totals + chain, levels + chain, stays + chain, wide + chain * D * STAGES,
            iterates + chain * D * STAGES, rows, cols, n, scale, D, STAGES, PRECISION,
        )  # fmt: skip
        total = _dot(tile, k, total, PRECISION)
    _put(d_query + chain * E, rows, n, scale * total, E, E)


@triton.jit
def key_gradient(
    query, key, peaks, totals, levels, stays, wide, iterates, d_key, n, scale,
    E: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chain and column block."""
    chain = tl.program_id(0).to(tl.int64) * n
    start = tl.program_id(1) * BLOCK
    cols = start + tl.arange(0, BLOCK)
    k = _rows(key + chain * E, cols, n, E, E)
    total = tl.zeros((BLOCK, E), tl.float32)
    for later in range(start, n, BLOCK):
        rows = later + tl.arange(0, BLOCK)
        q = _rows(query + chain * E, rows, n, E, E)
        tile = _score_gradient(
            q, k, peaks + chain, totals + chain, levels + chain, stays + chain, wide + chain * D * STAGES,
            iterates + chain * D * STAGES, rows, cols, n, scale, D, STAGES, PRECISION,
        )  # fmt: skip
        total = _dot(tl.trans(tile), q, total, PRECISION)
    _put(d_key + chain * E, cols, n, scale * total, E, E)
