"""Finite input of any size: the limit or the library's own error, never NaN, never values that were not mixed.

Every method, clock and kind of generator on a chain of two states, whose mixing matrix is known: with rates a, b and
π = (b, a)/(a + b), P = 1π + φ((a + b)t)(I − 1π), φ the Laplace transform of the clock's law.
"""

import itertools
import math

import pytest
import torch
from covering import covering

import liegroup_attn as la
from liegroup_attn.errors import ConvergenceError, GeneratorError
from liegroup_attn.expm import CausalSweep, LowRank, MatrixExp, ScalingSquaring, TriangularSolve, Uniformization

CLOCKS = {
    "fixed": (la.FixedClock(), lambda x: math.exp(-x)),
    "exponential": (la.ExponentialClock(), lambda x: 1 / (1 + x)),
    "erlang": (la.ErlangClock(3), lambda x: (1 + x / 3) ** -3),
}
METHODS = {
    "automatic": None,
    "matrix_exp": MatrixExp(),
    "hops": Uniformization(),
    "formed": Uniformization(formed=True),
    "squaring": ScalingSquaring(),
    "low_rank": LowRank(),
    "sweep": CausalSweep(),
    "triangular": TriangularSolve(),
}
SIZES = [0.0, 1e-45, 1e-30, 1e-8, 1.0, 100.0, 2.0**24, 1e10, 1e18, 1e36, 1e300]
# Rates × time: either of any size beside the other of size 1, and both so that their product is about 1, or is not.
PAIRS = [
    *((size, 1.0) for size in SIZES),
    *((1.0, size) for size in SIZES),
    *((1e-30, 1e30), (1e18, 1e-18), (1e36, 1e36), (1e-45, 1e45), (1e-45, 1e-45)),
]
DTYPES = {"float32": torch.float32, "float64": torch.float64}
GENERATORS = ("dense", "rates", "sum", "scaled", "softmax", "rated", "causal", "low_rank")


def _generator(kind, size, dtype):
    """The generator whose rates are ``size`` times those of a small one, and these two rates; None if it has no size."""
    if kind in ("dense", "rates", "sum", "scaled"):
        a, b = 1.0, 2.0
        # What overflows is no finite input, and below its least normal number a dtype has no digits.
        if not torch.finfo(dtype).tiny <= max(size, 1.0 - bool(size)) <= torch.finfo(dtype).max / 16:
            return None
        rates = torch.tensor([[0.0, a], [b, 0.0]], dtype=dtype)
        if kind == "scaled":
            return la.DenseGenerator.from_rates(rates) * size, a * size, b * size
        rates = rates * size
        if kind == "dense":
            found = la.DenseGenerator(torch.tensor([[-a, a], [b, -b]], dtype=dtype) * size)
        else:
            found = la.DenseGenerator.from_rates(rates)
        return (0.5 * found + 0.5 * found if kind == "sum" else found), *rates.flatten()[1:3].tolist()
    if kind == "low_rank":
        left, right = torch.tensor([[1.0], [1.0]], dtype=dtype), torch.tensor([[1.0], [3.0]], dtype=dtype)
        return la.LowRankGenerator(left, right, jump_rate=size), 0.75 * size, 0.25 * size
    if kind != "rated" and size != 1.0:
        return None
    if (kind == "rated" and 0 < size < 1e-30) or size > 1:  # ρ, within [0, 1]; gradients of less leave float32
        return None
    query = torch.tensor([[1.0], [-2.0]], dtype=dtype)
    rho = torch.full((2,), size if kind == "rated" else 1.0, dtype=dtype)
    scores = query @ query.mT
    chain = (
        scores.masked_fill(torch.ones(2, 2).triu(1).bool(), -math.inf).softmax(-1)
        if kind == "causal"
        else scores.softmax(-1)
    )
    found = la.SoftmaxGenerator(query, query, jump_rates=rho, is_causal=kind == "causal")
    return found, float(rho[0] * chain[0, 1]), float(rho[1] * chain[1, 0])


def _mixing(a, b, time, phi):
    total = a + b
    pi = torch.tensor([b / total, a / total], dtype=torch.float64) if total else torch.tensor([1.0, 0.0])
    x = total * time
    return pi + phi(x) * (torch.eye(2, dtype=torch.float64) - pi) if x else torch.eye(2, dtype=torch.float64)


CASES = [
    case
    for case in itertools.product(GENERATORS, CLOCKS, METHODS, DTYPES)
    if not (case[2] == "low_rank" and case[0] != "low_rank")
    and not (case[2] in ("sweep", "triangular") and case[0] != "causal")
]


@pytest.mark.parametrize(("kind", "clock", "method", "precision"), covering(CASES, strength=3))
def test_mixing_is_right_or_refused_at_any_size(kind, clock, method, precision):
    (law, phi), dtype = CLOCKS[clock], DTYPES[precision]
    atol = 2e-5 if dtype == torch.float32 else 1e-8
    reached = 0
    for size, span in PAIRS:
        made = _generator(kind, size, dtype)
        if made is None:
            continue
        generator, a, b = made
        time = torch.tensor(span, dtype=torch.float64, requires_grad=True)
        value = torch.eye(2, dtype=dtype, requires_grad=True)
        try:
            found = la.expm_multiply(generator, value, time, clock=law, method=METHODS[method])
        except (GeneratorError, ConvergenceError):
            continue
        where = f"rates × {size:g}, time {span:g}"
        right = _mixing(a, b, span, phi)
        torch.testing.assert_close(found.double(), right, atol=atol, rtol=0, msg=lambda m: f"{where}: {m}")  # noqa: B023
        # Thousands of hops walk away from 1: by nothing in float64, and over fused kernels, which stay in float32.
        allowed = max(
            4e-5 * (method == "hops"), 8 * max(1.0, math.log2(max(size * span, 1.0))) * torch.finfo(dtype).eps, 1e-12
        )
        assert (found.double().sum(-1) - 1).abs().max() <= allowed, where
        for gradient in torch.autograd.grad(found[0, 0], (time, value), allow_unused=True):
            assert gradient is None or gradient.isfinite().all(), where
        reached += 1
    assert reached > 5 or (method, clock) in (
        ("squaring", "exponential"),
        ("squaring", "erlang"),
        ("triangular", "fixed"),
    )
