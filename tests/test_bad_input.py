"""What a wrong call is told: the type of error, the words that name it, and always expected, got and a remedy."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

import liegroup_attn as la
from liegroup_attn.algebra import is_rate_matrix
from liegroup_attn.checks import check_shape
from liegroup_attn.errors import ConvergenceError, DtypeError, GeneratorError, MaskError, ShapeError

N, INF, NAN = 4, float("inf"), float("nan")
Q = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])


def qkv(*, query=(2, N, 3), key=(2, N, 3), value=(2, N, 5), dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for shape in (query, key, value)]


def spoiled(x, by):
    x = x.clone()
    x[..., 1, 0] = by
    return x


def attend(**knobs):
    """lie_attention on good inputs, with the knobs under test."""
    shapes = {k: knobs.pop(k) for k in ("query", "key", "value") if k in knobs}
    return lambda: la.lie_attention(*qkv(**shapes), **knobs)


def attend_to(q, k, v, **knobs):
    return lambda: la.lie_attention(q, k, v, **knobs)


def flow(*args, **knobs):
    return lambda: la.expm_multiply(*args, **knobs)


def generator(**knobs):
    q = torch.randn(2, N, 3)
    return lambda: la.SoftmaxGenerator(knobs.pop("query", q), knobs.pop("key", q), **knobs)


def causal_generator():
    q = torch.randn(2, N, 3)
    return la.SoftmaxGenerator(q, q, is_causal=True)


class Row(NamedTuple):
    call: object
    error: type
    words: tuple = ()


q32, k32, v32 = qkv()
WINDOW = torch.ones(N, N, dtype=torch.bool).tril().triu(-1)
STRICT = torch.ones(N, N, dtype=torch.bool).tril(-1)
dense = la.DenseGenerator(Q)
whole = torch.ones(2, N, 3, dtype=torch.long)

LIE_ATTENTION = {
    # ranks, widths, tokens, heads
    "query without tokens axis": Row(attend(query=(3,)), ShapeError, ("query", "2 dimensions")),
    "key without tokens axis": Row(attend(key=(3,)), ShapeError, ("key",)),
    "value without tokens axis": Row(attend(value=(3,)), ShapeError, ("value",)),
    "other tokens in the key": Row(attend(key=(2, 3, 3), value=(2, 3, 5)), ShapeError, ("key", "first_hop=True")),
    "other tokens, first hop, time": Row(
        attend(key=(2, 3, 3), value=(2, 3, 5), first_hop=True), ShapeError, ("time=0",)
    ),
    "other tokens, one head runs": Row(
        attend(key=(2, 3, 3), value=(2, 3, 5), first_hop=True, time=torch.tensor([[0.0], [1.0]])),
        ShapeError,
        ("time=0",),
    ),
    "other tokens in the value": Row(attend(value=(2, 3, 5)), ShapeError, ("value", "4", "3")),
    "other width in the key": Row(attend(key=(2, N, 2)), ShapeError, ("width", "3", "2")),
    "no width": Row(attend(query=(2, N, 0), key=(2, N, 0)), ShapeError, ("width",)),
    "fewer key heads": Row(
        attend(query=(1, 4, N, 3), key=(1, 2, N, 3), value=(1, 2, N, 3)), ShapeError, ("enable_gqa=True",)
    ),
    "heads that do not divide": Row(
        attend(query=(1, 4, N, 3), key=(1, 3, N, 3), value=(1, 3, N, 3), enable_gqa=True), ShapeError, ("divides",)
    ),
    "grouped heads without heads": Row(
        attend(query=(N, 3), key=(N, 3), value=(N, 3), enable_gqa=True), ShapeError, ("heads",)
    ),
    "other batch": Row(attend(query=(3, 2, N, 3), key=(2, 2, N, 3), value=(2, 2, N, 3)), ShapeError, ("batch",)),
    "no tokens": Row(attend(query=(2, 0, 3), key=(2, 0, 3), value=(2, 0, 5)), ShapeError, ("at least 1 token",)),
    # dtypes
    "mixed dtypes": Row(attend_to(q32, k32.double(), v32), DtypeError, ("float64", "float32")),
    "half value": Row(attend_to(q32, k32, v32.half()), DtypeError, ("float16",)),
    "integer query": Row(attend_to(whole, whole, whole), DtypeError, ("query", "int64")),
    "integer value": Row(attend_to(q32, k32, whole), DtypeError, ("value", "int64")),
    "complex query": Row(attend_to(q32.cfloat(), k32.cfloat(), v32.cfloat()), DtypeError, ("complex64",)),
    "list for a tensor": Row(attend_to([[1.0]], k32, v32), DtypeError, ("list",)),
    # values
    "NaN in the query": Row(attend_to(spoiled(q32, NAN), k32, v32), GeneratorError, ("query", "NaN")),
    "inf in the key": Row(attend_to(q32, spoiled(k32, INF), v32), GeneratorError, ("key", "inf")),
    "NaN in the key, first hop only": Row(
        attend_to(q32, spoiled(k32, NAN), v32, first_hop=True, time=0.0), GeneratorError, ("key",)
    ),
    # masks
    "mask too small": Row(attend(attn_mask=torch.ones(3, 3).bool()), MaskError, ("attn_mask", "(2, 4, 4)")),
    "mask with too many axes": Row(attend(attn_mask=torch.ones(5, 2, N, N).bool()), MaskError, ("broadcastable",)),
    "mask of one axis": Row(attend(attn_mask=torch.ones(N).bool()), MaskError, ("2 dimensions",)),
    "mask for another query": Row(
        attend(key=(2, 3, 3), value=(2, 3, 5), first_hop=True, time=0.0, attn_mask=torch.ones(N, N).bool()), MaskError
    ),
    "integer mask": Row(attend(attn_mask=torch.ones(N, N, dtype=torch.long)), DtypeError, ("int64", "bool")),
    "mask of another float": Row(attend(attn_mask=torch.zeros(N, N).double()), DtypeError, ("float64", "float32")),
    "list for a mask": Row(attend(attn_mask=[[True] * N] * N), (DtypeError, MaskError), ("attn_mask", "list")),
    "NumPy mask": Row(attend(attn_mask=np.ones((N, N), dtype=bool)), (DtypeError, MaskError), ("ndarray",)),
    "NaN in a mask": Row(attend(attn_mask=torch.full((N, N), NAN)), (MaskError, GeneratorError), ("NaN",)),
    "NaN in one entry of a mask": Row(
        attend(attn_mask=spoiled(torch.zeros(N, N), NAN)), (MaskError, GeneratorError), ("attn_mask", "NaN")
    ),
    "+inf in a mask": Row(
        attend(attn_mask=spoiled(torch.zeros(N, N), INF)), (MaskError, GeneratorError), ("attn_mask", "inf")
    ),
    "window, causal": Row(attend(attn_mask=WINDOW, is_causal=True), MaskError, ("token 2", "token 0")),
    "sliding window": Row(attend(attn_mask=WINDOW), MaskError, ("token 2", "token 0", "allow_open_mask=True")),
    "strictly causal": Row(attend(attn_mask=STRICT), MaskError, ("hidden from itself", "diagonal", "allow_open_mask")),
    "sliding window, float": Row(
        attend(attn_mask=torch.zeros(N, N).masked_fill(~WINDOW, -INF)), MaskError, ("allow_open_mask=True",)
    ),
    "sliding window, rate function": Row(
        attend(attn_mask=WINDOW, rate_fn=la.softplus), MaskError, ("allow_open_mask=True",)
    ),
    # time
    "negative time": Row(attend(time=-1.0), GeneratorError, ("time", "-1")),
    "infinite time": Row(attend(time=INF), GeneratorError, ("time", "inf")),
    "time NaN": Row(attend(time=NAN), GeneratorError, ("time", "nan")),
    "negative time in a tensor": Row(attend(time=torch.tensor([[1.0], [-0.5]])), GeneratorError, ("-0.5",)),
    "time NaN in a tensor": Row(attend(time=torch.tensor([[1.0], [NAN]])), GeneratorError, ("nan",)),
    "infinite time in a tensor": Row(attend(time=torch.tensor([[1.0], [INF]])), GeneratorError, ("inf",)),
    "time for other rows": Row(attend(time=torch.ones(3)), ShapeError, ("time", "(2, 4)", "(3,)", "(heads, 1)")),
    "time for other heads": Row(attend(time=torch.ones(3, 1)), ShapeError, ("time",)),
    "several times of another batch": Row(attend(time=torch.ones(5, 3, N)), ShapeError, ("time", "in front")),
    "time as text": Row(attend(time="long"), (DtypeError, GeneratorError), ("time",)),
    "complex time": Row(attend(time=torch.tensor(1j)), (DtypeError, GeneratorError), ("time",)),
    # jump rates
    "ρ above 1": Row(attend(jump_rates=torch.full((N,), 1.5)), GeneratorError, ("jump_rates", "1.5", "sigmoid")),
    "ρ below 0": Row(attend(jump_rates=-0.1), GeneratorError, ("jump_rates", "-0.1")),
    "ρ NaN": Row(attend(jump_rates=NAN), GeneratorError, ("jump_rates", "nan")),
    "ρ for other tokens": Row(attend(jump_rates=torch.ones(3)), ShapeError, ("jump_rates", "(2, 4)", "(3,)")),
    "ρ with too many axes": Row(attend(jump_rates=torch.ones(1, 2, 2, N)), ShapeError, ("jump_rates",)),
    "ρ in integers": Row(attend(jump_rates=torch.ones(N, dtype=torch.long)), DtypeError, ("jump_rates", "int64")),
    "ρ above 1, rate function": Row(attend(jump_rates=2.0, rate_fn=la.softplus), GeneratorError, ("jump_rates",)),
    # dropout
    "dropout below 0": Row(attend(dropout_p=-0.1), GeneratorError, ("dropout_p", "-0.1")),
    "dropout of all": Row(attend(dropout_p=1.0), GeneratorError, ("dropout_p", "1.0")),
    "dropout below 0, rate function": Row(
        attend(dropout_p=-0.1, rate_fn=la.softplus), GeneratorError, ("dropout_p", "-0.1")
    ),
    "dropout above 1, rate function": Row(
        attend(dropout_p=1.5, rate_fn=la.softplus), GeneratorError, ("dropout_p", "1.5")
    ),
    "dropout above 1, cross-attention": Row(
        attend(key=(2, 3, 3), value=(2, 3, 5), first_hop=True, time=0.0, dropout_p=1.5), GeneratorError, ("dropout_p",)
    ),
    # rate functions
    "negative rates": Row(attend(rate_fn=lambda s: s - 10), GeneratorError, ("negative", "rate")),
    "negative rate to itself": Row(
        attend(rate_fn=lambda s: torch.ones_like(s) - 1.5 * torch.eye(N), first_hop=True), GeneratorError, ("rate",)
    ),
    "infinite rates": Row(attend(rate_fn=lambda s: s * 0 + INF), GeneratorError, ("rates", "inf")),
    "rates NaN": Row(attend(rate_fn=lambda s: s * NAN), GeneratorError, ("rates", "NaN")),
    "rates of another shape": Row(attend(rate_fn=lambda s: s[..., :-1]), ShapeError, ("rate",)),
    "rates summed away": Row(attend(rate_fn=lambda s: s.exp().sum()), ShapeError, ("rate",)),
    "rates of another batch": Row(attend(rate_fn=lambda s: s.exp()[None].expand(3, 2, N, N)), ShapeError, ("rate",)),
    "rates by name": Row(attend(rate_fn="exp"), GeneratorError, ("rate_fn", "exp")),
    # clock and method objects
    "clock by name": Row(attend(clock="fixed"), GeneratorError, ("clock", "'fixed'")),
    "clock as class": Row(attend(clock=la.ExponentialClock), GeneratorError, ("clock", "ExponentialClock")),
    "clock by name, no time": Row(attend(clock="fixed", time=0.0), GeneratorError, ("clock",)),
    "falsy clock": Row(attend(clock=0), GeneratorError, ("clock",)),
    "method by name": Row(attend(method="krylov"), GeneratorError, ("method", "'krylov'")),
    "method as class": Row(attend(method=la.MatrixExp), GeneratorError, ("method", "MatrixExp")),
    "method by name, no time": Row(attend(method="krylov", time=0.0), GeneratorError, ("method",)),
    "method by name, dropout": Row(attend(method="krylov", dropout_p=0.1), GeneratorError, ("method",)),
    "falsy method": Row(attend(method=0), GeneratorError, ("method",)),
    # method and clock do not go together
    "triangular solve, fixed clock": Row(
        attend(method=la.TriangularSolve(), is_causal=True), GeneratorError, ("ExponentialClock()",)
    ),
    "triangular solve, not causal": Row(
        attend(method=la.TriangularSolve(), clock=la.ExponentialClock()), GeneratorError, ("is_causal=True",)
    ),
    "triangular solve, time per row": Row(
        attend(method=la.TriangularSolve(), clock=la.ExponentialClock(), is_causal=True, time=torch.ones(N)),
        ShapeError,
        ("time", "(4,)"),
    ),
    "triangular solve, not causal, dropout": Row(
        attend(method=la.TriangularSolve(), clock=la.ExponentialClock(), dropout_p=0.1), GeneratorError, ("is_causal",)
    ),
    "tolerance out of reach": Row(
        attend(method=la.Uniformization(tol=1e-6, max_terms=3), time=2.0), ConvergenceError, ("12", "3", "max_terms")
    ),
    "too long for hops": Row(attend(method=la.Uniformization(), time=1e6), ConvergenceError, ("MatrixExp()",)),
    "too long for geometric hops": Row(
        attend(method=la.Uniformization(), time=1e6, clock=la.ExponentialClock()), ConvergenceError, ("MatrixExp()",)
    ),
    "far too long for geometric hops": Row(
        attend(method=la.Uniformization(), time=1e18, clock=la.ExponentialClock()), ConvergenceError, ("MatrixExp()",)
    ),
}

VERBS = {
    "matrix for a generator": Row(flow(Q, torch.ones(2, 1)), GeneratorError, ("Tensor", "DenseGenerator")),
    "nothing for a generator": Row(flow(None, torch.ones(2, 1)), GeneratorError, ("NoneType",)),
    "value of other tokens": Row(flow(dense, torch.ones(3, 1)), ShapeError, ("value", "2 tokens", "(3, 1)")),
    "value without tokens axis": Row(flow(dense, torch.ones(2)), ShapeError, ("value",)),
    "integer value": Row(flow(dense, torch.ones(2, 1, dtype=torch.long)), DtypeError, ("value", "int64")),
    "value of another batch": Row(
        flow(la.DenseGenerator(Q.expand(3, 2, 2)), torch.ones(2, 2, 1)), ShapeError, ("value",)
    ),
    "negative time": Row(flow(dense, torch.ones(2, 1), -0.1), GeneratorError, ("time",)),
    "time NaN": Row(flow(dense, torch.ones(2, 1), NAN), GeneratorError, ("time",)),
    "time of another shape": Row(flow(dense, torch.ones(2, 1), torch.ones(3)), ShapeError, ("time", "(2,)", "(3,)")),
    "clock by name": Row(flow(dense, torch.ones(2, 1), clock="fixed"), GeneratorError, ("clock",)),
    "method by name": Row(flow(dense, torch.ones(2, 1), method="dense"), GeneratorError, ("method",)),
    "method as class": Row(flow(dense, torch.ones(2, 1), method=la.Uniformization), GeneratorError, ("method",)),
    "triangular solve of a matrix": Row(
        flow(dense, torch.ones(2, 1), clock=la.ExponentialClock(), method=la.TriangularSolve()), GeneratorError
    ),
    "triangular solve, time per row": Row(
        flow(
            causal_generator(),
            torch.ones(2, N, 1),
            torch.ones(N),
            clock=la.ExponentialClock(),
            method=la.TriangularSolve(),
        ),
        ShapeError,
        ("time", "jump_rates"),
    ),
    "transition of a tensor": Row(lambda: la.transition_matrix(Q), GeneratorError, ("Tensor", "DenseGenerator")),
    "transition, negative time": Row(lambda: la.transition_matrix(dense, -1.0), GeneratorError, ("time", "-1")),
    "transition, infinite time": Row(lambda: la.transition_matrix(dense, INF), GeneratorError, ("time", "inf")),
    "transition, time for other rows": Row(
        lambda: la.transition_matrix(dense, torch.ones(3)), ShapeError, ("time", "(3,)")
    ),
    "transition, clock by name": Row(lambda: la.transition_matrix(dense, clock="fixed"), GeneratorError, ("clock",)),
}

OBJECTS = {
    # dense generators
    "Q not square": Row(lambda: la.DenseGenerator(torch.zeros(2, 3)), ShapeError, ("square", "(2, 3)")),
    "Q without states": Row(lambda: la.DenseGenerator(torch.zeros(0, 0)), ShapeError, ("N ≥ 1",)),
    "Q a vector": Row(lambda: la.DenseGenerator(torch.zeros(2)), ShapeError, ("2 dimensions",)),
    "Q in integers": Row(lambda: la.DenseGenerator(Q.long()), DtypeError, ("int64",)),
    "Q a list": Row(lambda: la.DenseGenerator([[0.0]]), DtypeError, ("list",)),
    "Q with a negative rate": Row(lambda: la.DenseGenerator(-Q), GeneratorError, ("off-diagonal", "-1")),
    "Q with open rows": Row(lambda: la.DenseGenerator(Q + torch.eye(2)), GeneratorError, ("sum to 0", "from_rates")),
    "Q with NaN": Row(lambda: la.DenseGenerator(Q * NAN), GeneratorError, ("finite",)),
    "Q with inf": Row(lambda: la.DenseGenerator(torch.tensor([[-INF, INF], [0, 0]])), GeneratorError, ("finite",)),
    "rates below 0": Row(
        lambda: la.DenseGenerator.from_rates(torch.tensor([[0.0, -1.0], [1.0, 0.0]])), GeneratorError, ("rates", "-1")
    ),
    "rate to itself below 0": Row(
        lambda: la.DenseGenerator.from_rates(torch.tensor([[-0.5, 1.0], [1.0, 0.0]])), GeneratorError, ("rates", "-0.5")
    ),
    "infinite rates": Row(lambda: la.DenseGenerator.from_rates(torch.full((2, 2), INF)), GeneratorError, ("rates",)),
    "rates not square": Row(lambda: la.DenseGenerator.from_rates(torch.ones(2, 3)), ShapeError, ("square", "(2, 3)")),
    "rates in integers": Row(
        lambda: la.DenseGenerator.from_rates(torch.ones(2, 2, dtype=torch.long)), DtypeError, ("int64",)
    ),
    # softmax generators
    "other tokens": Row(
        generator(key=torch.ones(2, 3, 3)), ShapeError, ("key", "across tokens there is softmax attention")
    ),
    "other width": Row(generator(key=torch.ones(2, N, 2)), ShapeError, ("width",)),
    "other batch": Row(generator(key=torch.ones(3, N, 3)), ShapeError, ("key",)),
    "query a vector": Row(generator(query=torch.ones(3)), ShapeError, ("query",)),
    "key in half": Row(generator(key=torch.ones(2, N, 3).half()), DtypeError, ("float16",)),
    "key with NaN": Row(generator(key=torch.full((2, N, 3), NAN)), GeneratorError, ("key",)),
    "dropout of all": Row(generator(dropout_p=1.0), GeneratorError, ("dropout_p",)),
    "ρ above 1": Row(generator(jump_rates=1.1), GeneratorError, ("jump_rates", "1.1")),
    "window": Row(generator(visible=WINDOW), MaskError, ("allow_open_mask=True",)),
    # methods
    "tolerance above 1": Row(lambda: la.Uniformization(tol=2), GeneratorError, ("tol", "2")),
    "tolerance 0": Row(lambda: la.Uniformization(tol=0), GeneratorError, ("tol", "0")),
    "tolerance NaN": Row(lambda: la.Uniformization(tol=NAN), GeneratorError, ("tol", "nan")),
    "no terms": Row(lambda: la.Uniformization(max_terms=0), GeneratorError, ("max_terms", "0")),
    "negative terms": Row(lambda: la.Uniformization(tol=0.1, max_terms=-3), GeneratorError, ("max_terms", "-3")),
    # the helpers that other modules call
    "check_shape, no tensor": Row(
        lambda: check_shape("x", 3, least_rank=1, remedy="give a tensor"), DtypeError, ("x", "int")
    ),
    "check_shape, rank": Row(
        lambda: check_shape("x", torch.ones(3), least_rank=2, remedy="add a head axis"),
        ShapeError,
        ("add a head axis",),
    ),
    "is_rate_matrix, not square": Row(lambda: is_rate_matrix(torch.ones(2, 3)), ShapeError, ("square", "(2, 3)")),
    "is_rate_matrix, integers": Row(lambda: is_rate_matrix(torch.ones(2, 2).long()), DtypeError, ("int64",)),
}

TABLES = {"lie_attention": LIE_ATTENTION, "verbs": VERBS, "objects": OBJECTS}


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=f"{table}-{name}") for table, rows in TABLES.items() for name, row in rows.items()]
)
def test_message(row):
    with pytest.raises(row.error) as caught:
        row.call()
    message = str(caught.value)
    for word in ("expected", "got", *row.words):
        assert word in message, f"{word!r} is missing in: {message}"
    _, semicolon, remedy = message.rpartition(";")
    assert semicolon, f"no remedy in: {message}"
    assert len(remedy.split()) >= 2, f"no remedy in: {message}"


def test_every_error_is_one_that_callers_catch_already():
    """Shape, mask and value errors are ValueErrors, as torch users expect; a dtype error is a TypeError too."""
    for error in (ShapeError, MaskError, GeneratorError, DtypeError):
        assert issubclass(error, ValueError)
    assert issubclass(DtypeError, TypeError)
    assert issubclass(ConvergenceError, RuntimeError)


def test_mixed_dtypes_are_allowed_under_autocast():
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out = la.lie_attention(q, k.bfloat16(), v)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("time", [0, 1, True, np.float32(0.5), torch.tensor(1.0), torch.tensor([[1.0], [2.0]])])
def test_what_is_a_time(time):
    assert torch.isfinite(la.lie_attention(*qkv(), time=time)).all()
