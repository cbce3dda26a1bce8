"""The tables that the axioms run over. A new clock, method, mask or rate function is one row here.

``combinations`` gives few of the rows that go together, in which every two values meet; ``problem`` makes the inputs of
one; ``golden`` is what must come out: SciPy and NumPy in float64, written from the definition and sharing nothing with
the library.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from covering import covering

import liegroup_attn as la
from liegroup_attn.generators import HeadMixture
from liegroup_attn.generators.dense import restricted

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
WIDE = (torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)
SIZES = (1, 2, 63, 64)
LARGE = 1000


# --- clocks ---------------------------------------------------------------------------------------------------


class ClockCase(NamedTuple):
    clock: Any  # what the caller passes
    golden: Callable  # tQ (..., N, N) -> mixing matrix, NumPy float64
    plain: Callable  # the same in plain torch, any dtype


CLOCKS = {
    "fixed": ClockCase(None, scipy.linalg.expm, torch.matrix_exp),
    "exponential": ClockCase(
        la.ExponentialClock(),
        lambda flow: np.linalg.inv(np.eye(flow.shape[-1]) - flow),
        lambda flow: torch.linalg.inv(torch.eye(flow.size(-1), dtype=flow.dtype) - flow),
    ),
    "erlang": ClockCase(
        la.ErlangClock(3),
        lambda flow: np.linalg.matrix_power(np.linalg.inv(np.eye(flow.shape[-1]) - flow / 3), 3),
        lambda flow: torch.linalg.matrix_power(
            torch.linalg.inv(torch.eye(flow.size(-1), dtype=flow.dtype) - flow / 3), 3
        ),
    ),
}
RESOLVENTS = ("exponential", "erlang")
FIRST_HOP = (False, True)


# --- masks ----------------------------------------------------------------------------------------------------


def _bool(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def _key_padding(batch: int, n: int) -> torch.Tensor:
    """(B, 1, 1, N): item b ends b·n/3 tokens early; token 0 always takes part."""
    length = torch.tensor([max(1, n - b * max(1, n // 3)) for b in range(batch)])
    return (torch.arange(n) < length[:, None])[:, None, None, :]


def _block(n: int) -> torch.Tensor:
    block = torch.arange(n) * 3 // n
    return block[:, None] == block[None, :]


def _prefix(n: int) -> torch.Tensor:
    return _bool(n, n).tril() | (torch.arange(n) < max(1, n // 3))


def _fully_masked_row(n: int) -> torch.Tensor:
    mask = _bool(n, n)
    mask[n // 2] = False
    return mask


def _all_masked_item(batch: int, n: int) -> torch.Tensor:
    mask = _bool(batch, 1, 1, n)
    mask[-1] = False
    return mask


def _padding_rows(batch: int, n: int) -> torch.Tensor:
    keep = _key_padding(batch, n)
    return keep & keep.mT


def _bias(heads: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(heads, n, n, dtype=torch.float64).to(dtype)


# name -> (batch, heads, n, dtype) -> (attn_mask, is_causal)
MASKS: dict[str, Callable] = {
    "none": lambda b, h, n, dtype: (None, False),
    "causal": lambda b, h, n, dtype: (None, True),
    "causal, left padding": lambda b, h, n, dtype: (_key_padding(b, n).flip(-1), True),
    "causal mask": lambda b, h, n, dtype: (_bool(n, n).tril(), False),
    "key padding": lambda b, h, n, dtype: (_key_padding(b, n), False),
    "padding rows": lambda b, h, n, dtype: (_padding_rows(b, n), False),
    "block": lambda b, h, n, dtype: (_block(n), False),
    "prefix": lambda b, h, n, dtype: (_prefix(n), False),
    "fully masked row": lambda b, h, n, dtype: (_fully_masked_row(n), False),
    "all-masked item": lambda b, h, n, dtype: (_all_masked_item(b, n), False),
    "float bias": lambda b, h, n, dtype: (_bias(h, n, dtype), False),
    "float causal": lambda b, h, n, dtype: (
        _bias(h, n, dtype).masked_fill(~_bool(n, n).tril(), -torch.inf),
        False,
    ),
    "float, empty row": lambda b, h, n, dtype: (
        _bias(h, n, dtype).masked_fill(~_fully_masked_row(n), -torch.inf),
        False,
    ),
}
BIASES = ("float bias", "float causal", "float, empty row")


def allowed_targets(n: int, attn_mask: torch.Tensor | None, is_causal: bool) -> np.ndarray:
    """Bool, broadcastable to (..., N, N): which targets a row may jump to."""
    allowed = np.tril(np.ones((n, n), dtype=bool)) if is_causal else np.ones((n, n), dtype=bool)
    if attn_mask is None:
        return allowed
    mask = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf
    return mask.numpy() & allowed


# --- rate functions -------------------------------------------------------------------------------------------


class RateCase(NamedTuple):
    rate_fn: Callable | None
    golden: Callable | None


RATE_FNS = {
    "jump chain": RateCase(None, None),
    "exponential": RateCase(la.exponential, np.exp),
    "softplus": RateCase(la.softplus, lambda s: np.logaddexp(0, s)),
    "squared relu": RateCase(la.squared_relu, lambda s: np.maximum(s, 0) ** 2),
}


# --- methods --------------------------------------------------------------------------------------------------


class Combination(NamedTuple):
    clock: str = "fixed"
    first_hop: bool = False
    method: str = "default"
    mask: str = "none"
    rates: str = "jump chain"

    def __str__(self) -> str:
        return "-".join(str(part) if not isinstance(part, bool) else f"hop{int(part)}" for part in self)


class MethodCase(NamedTuple):
    method: Any
    suits: Callable[[Combination], bool]
    takes_rows: Callable[[Combination], bool] = lambda c: True  # whether one time per query row is possible


def _causal(c: Combination) -> bool:
    return c.mask == "causal" and c.rates == "jump chain"


METHODS = {
    "default": MethodCase(None, lambda c: True),
    "matrix exp": MethodCase(la.MatrixExp(), lambda c: True),
    "uniformization": MethodCase(la.Uniformization(), lambda c: True),
    "formed hops": MethodCase(la.Uniformization(formed=True), lambda c: True),
    "triangular": MethodCase(
        la.TriangularSolve(),
        lambda c: c.clock in RESOLVENTS and c.mask in ("causal", "causal, left padding"),
        lambda c: False,
    ),
    "recomputed hops": MethodCase(
        la.Uniformization(formed=True, recompute=True),
        lambda c: c.mask in ("none", "float bias") and c.rates == "jump chain",
    ),
    "recomputed sweep": MethodCase(
        la.CausalSweep(block_size=3, recompute=True), _causal, lambda c: c.clock not in RESOLVENTS
    ),
    "sweep": MethodCase(la.CausalSweep(block_size=5), _causal, lambda c: c.clock not in RESOLVENTS),
    "squaring": MethodCase(la.ScalingSquaring(), lambda c: c.clock == "fixed", lambda c: False),
    "low rank": MethodCase(la.LowRank(), lambda c: False),  # for another generator: tests/test_low_rank.py
}


def combinations(
    clock: Any = tuple(CLOCKS),
    first_hop: Any = FIRST_HOP,
    method: Any = tuple(METHODS),
    mask: Any = tuple(MASKS),
    rates: Any = tuple(RATE_FNS),
    per_row: bool = False,
    strength: int = 2,
) -> list[Any]:
    """A covering table of the valid combinations; each argument narrows its column to the rows named.

    With ``per_row`` of those that take one time per query row; with ``strength=3`` every triple of values occurs.
    """

    def valid(c: Combination) -> bool:
        row = METHODS[c.method]
        return row.suits(c) and (row.takes_rows(c) or not per_row)

    every = itertools.starmap(Combination, itertools.product(clock, first_hop, method, mask, rates))
    return covering(filter(valid, every), strength, str)


# --- one problem ----------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    knobs: dict[str, Any]  # everything that the golden reference needs too
    method: Any

    def solve(self, **changes: Any) -> torch.Tensor:
        return la.lie_attention(
            self.query, self.key, self.value, method=self.method, **library_knobs(self.knobs | changes)
        )

    def golden(self, **changes: Any) -> np.ndarray:
        return golden(self.query, self.key, self.value, **(self.knobs | changes))

    def mixing(self, **changes: Any) -> torch.Tensor:
        """The mixing matrix itself: V = I sent through."""
        n = self.query.size(-2)
        eye = torch.eye(n, dtype=self.value.dtype).expand(*self.query.shape[:-2], n, n)
        return self._replace(value=eye).solve(**changes)

    def allowed(self) -> np.ndarray:
        n = self.query.size(-2)
        return np.broadcast_to(
            allowed_targets(n, self.knobs["attn_mask"], self.knobs["is_causal"]), (*self.query.shape[:-1], n)
        )


def library_knobs(knobs: dict[str, Any]) -> dict[str, Any]:
    """Names of table rows → what ``lie_attention`` takes."""
    return knobs | {"clock": CLOCKS[knobs["clock"]].clock, "rate_fn": RATE_FNS[knobs["rate_fn"]].rate_fn}


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    score: Any = None,
    plus: Any = None,
    weights: torch.Tensor | None = None,
    allow_open_mask: bool = False,
    **knobs: Any,
) -> torch.Tensor:
    """``lie_attention`` with what only generators take: what acts on scores, R in Q + R, a mixture over heads."""
    flow = {name: knobs.pop(name) for name in ("time", "clock", "first_hop", "method") if name in knobs}
    rate_fn = knobs.pop("rate_fn", None)
    chain = la.SoftmaxGenerator(query, key, score=score, visible=attn_mask, allow_open_mask=allow_open_mask, **knobs)
    generator = chain if rate_fn is None else chain.with_rates(rate_fn)
    generator = generator if weights is None else HeadMixture(generator, weights)
    generator = generator if plus is None else generator + restricted(plus, chain.visible)
    return la.expm_multiply(generator, value, **flow)


def problem(
    c: Combination,
    n: int,
    dtype: torch.dtype = torch.float64,
    *,
    time: Any = 1.3,
    jump_rates: bool = True,
    batch: int = 2,
    heads: int = 2,
    width: int = 3,
    value_width: int = 2,
) -> Problem:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    attn_mask, is_causal = MASKS[c.mask](batch, heads, n, dtype)
    knobs = {
        "attn_mask": attn_mask,
        "is_causal": is_causal,
        "time": time,
        "jump_rates": torch.rand(batch, heads, n, dtype=torch.float64).to(dtype) if jump_rates else None,
        "first_hop": c.first_hop,
        "clock": c.clock,
        "rate_fn": c.rates,
    }
    query, key = normal(batch, heads, n, width), normal(batch, heads, n, width)
    return Problem(query, key, normal(batch, heads, n, value_width), knobs, METHODS[c.method].method)


# --- references -----------------------------------------------------------------------------------------------


def to_numpy(tensor: Any) -> Any:
    return tensor.detach().to(torch.float64).numpy() if isinstance(tensor, torch.Tensor) else tensor


def golden_chain(
    query: torch.Tensor,
    key: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    rate_fn: str = "jump chain",
) -> tuple[np.ndarray, np.ndarray]:
    """Jump chain S and generator Q for ρ = 1, from the definition. (..., N, N) each."""
    q, k = to_numpy(query), to_numpy(key)
    n = q.shape[-2]
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ np.swapaxes(k, -1, -2))
    allowed = np.broadcast_to(allowed_targets(n, attn_mask, is_causal), scores.shape)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        bias = to_numpy(attn_mask)
        scores = scores + np.where(np.isfinite(bias), bias, 0)
    if rate_fn == "jump chain":
        highest = np.max(scores, axis=-1, keepdims=True, where=allowed, initial=-1e300)
        rates = np.where(allowed, np.exp(np.where(allowed, scores - highest, 0)), 0)
    else:
        rates = np.where(allowed, RATE_FNS[rate_fn].golden(scores), 0)
    total = rates.sum(-1, keepdims=True)
    chain = np.where(total > 0, rates / np.where(total > 0, total, 1), np.eye(n))
    if rate_fn == "jump chain":
        return chain, chain - np.eye(n)
    return chain, rates - total * np.eye(n)


def golden_mixing(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    time: Any,
    jump_rates: torch.Tensor | None = None,
    first_hop: bool = False,
    clock: str = "fixed",
    **scores: Any,
) -> np.ndarray:
    """[S] E[exp(τQ)], Q = diag(ρ)(S − I) or diag(ρ)(R − diag(R1)); a time per row is taken row by row."""
    chain, generator = golden_chain(query, key, **scores)
    if jump_rates is not None:
        generator = to_numpy(jump_rates)[..., None] * generator
    law, when = CLOCKS[clock].golden, np.asarray(to_numpy(time), dtype=np.float64)
    n = chain.shape[-1]
    if when.ndim and when.shape[-1] > 1:  # row i of exp(t_i Q)
        mixing = np.stack([law(when[..., i, None, None] * generator)[..., i, :] for i in range(n)], axis=-2)
    else:
        mixing = law((when[..., None] if when.ndim else when) * generator)
    return chain @ mixing if first_hop else mixing


def golden(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **knobs: Any) -> np.ndarray:
    return golden_mixing(query, key, **knobs) @ to_numpy(value)


def plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    time: Any,
    jump_rates: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    first_hop: bool = False,
    clock: str = "fixed",
    rate_fn: str = "jump chain",
) -> torch.Tensor:
    """What somebody would write in five lines of torch, in the inputs' dtype: the yardstick of float32 error."""
    n = query.size(-2)
    eye = torch.eye(n, dtype=query.dtype)
    allowed = torch.tensor(allowed_targets(n, attn_mask, is_causal))
    scores = query @ key.mT / query.size(-1) ** 0.5
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.masked_fill(attn_mask == -torch.inf, 0)
    empty = ~allowed.any(-1, keepdim=True)
    if rate_fn == "jump chain":
        chain = torch.where(empty, eye, scores.masked_fill(~(allowed | empty), -torch.inf).softmax(-1))
        generator = chain - eye
    else:
        rates = RATE_FNS[rate_fn].rate_fn(scores).masked_fill(~allowed, 0)
        total = rates.sum(-1, keepdim=True)
        chain = torch.where(total > 0, rates / total.where(total > 0, 1), eye)
        generator = rates - torch.diag_embed(total.squeeze(-1))
    if jump_rates is not None:
        generator = jump_rates.unsqueeze(-1) * generator
    when = torch.as_tensor(time, dtype=query.dtype)
    mixed = CLOCKS[clock].plain((when[..., None] if when.dim() else when) * generator) @ value
    return chain @ mixed if first_hop else mixed


# --- comparisons ----------------------------------------------------------------------------------------------


def worst(difference: Any) -> float:
    return float(np.abs(difference).max()) if np.size(difference) else 0.0


def assert_as_exact_as(
    ours: torch.Tensor, plain: torch.Tensor, golden: Any, factor: float = 2.0, dtype: torch.dtype = torch.float32
) -> None:
    """err(ours) ≤ factor · err(plain torch in the same dtype), with assert_close's floors."""
    rtol, atol = {torch.float32: (1.3e-6, 1e-5), torch.float64: (1e-7, 1e-7)}[dtype]
    golden = to_numpy(golden)
    error, allowance = worst(to_numpy(ours) - golden), worst(to_numpy(plain) - golden)
    assert error <= factor * allowance + atol + rtol * worst(golden), (
        f"error {error:.2e}, plain torch's {allowance:.2e}, factor {factor}"
    )


def assert_stochastic(mixing: torch.Tensor, norm: float) -> None:
    """Entries ≥ 0 exactly, rows sum to 1 within 8 · eps · max(1, log₂‖tQ‖)."""
    assert torch.isfinite(mixing).all()
    assert mixing.min() >= 0, f"lowest entry {mixing.min():.1e}"
    tolerance = 8 * torch.finfo(mixing.dtype).eps * max(1.0, np.log2(norm) if norm > 0 else 1.0)
    off = float((mixing.double().sum(-1) - 1).abs().max())
    assert off <= tolerance, f"rows sum to 1 within {off:.1e}, tolerance {tolerance:.1e}"


def sdpa(*args: Any, **knobs: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(*args, **knobs)
