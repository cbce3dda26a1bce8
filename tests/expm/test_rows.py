"""Sweeps over rows: what acts on scores and who sees whom, against the formed chain, in values and every derivative."""

import itertools

import pytest
import torch
from covering import covering

import liegroup_attn as la
from liegroup_attn.errors import DtypeError, GeneratorError, MaskError, ShapeError
from liegroup_attn.generators import SoftmaxGenerator
from liegroup_attn.positional import FIRE, ALiBi, CoPE, ForgettingGate, T5Bias
from liegroup_attn.scores import Bias, Differences, Score, SoftCap, TensorBias
from liegroup_attn.visible import Allowed, Causal, Documents, Everything, Padding, Window

B, H, N, E, D, C = 2, 2, 9, 3, 2, 4
BLOCK = 4  # rows: two blocks, and a rest


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def encoded(make):
    """A score and its leaves, from an encoding with all that it learns away from its start."""
    torch.manual_seed(0)
    encoding = make().double()
    parameters = list(encoding.parameters())
    with torch.no_grad():
        for i, p in enumerate(parameters):
            p.add_(0.1 * normal(*p.shape, seed=i).abs())
    x = normal(B, N, C, seed=7).requires_grad_()
    of_tokens = [x] if isinstance(encoding, ForgettingGate) else []
    return lambda query, key: encoding.score(x, query, key), of_tokens + parameters


def given(*shape: int):
    leaf = normal(*shape, seed=5).requires_grad_()
    return lambda query, key: leaf, [leaf]


def capped():
    bias = normal(H, N, N, seed=5).requires_grad_()
    return lambda query, key: SoftCap(1.5) | TensorBias(bias) | SoftCap(2.0), [bias]


class Tanh(Score):
    """Autograd saves what it gives, which nothing may write into."""

    def act(self, scores, start, leaves):
        return scores.tanh()


# name -> (query, key) -> score, and the tensors that it learns by
SCORES = {
    "none": (lambda q, k: None, []),
    "tanh": (lambda q, k: Tanh(), []),
    "soft cap": (lambda q, k: SoftCap(1.5), []),
    "tensor": given(H, N, N),
    "tensor, one row": given(B, 1, 1, N),
    "tensor, one column": given(N, 1),
    "cap, tensor, cap": capped(),
    "alibi": encoded(lambda: ALiBi(H)),
    "fire": encoded(lambda: FIRE(H, hidden=3, threshold=4.0)),
    "t5": encoded(lambda: T5Bias(H, is_causal=True, num_buckets=4, max_distance=8)),
    "forgetting": encoded(lambda: ForgettingGate(C, H)),
    "cope": encoded(lambda: CoPE(H, E, max_positions=4, std=1.0)),
}
KEPT = torch.arange(N) < torch.tensor([[N], [N - 3]])
OPEN = torch.ones(N, N, dtype=torch.bool).triu(-2)
VISIBLE = {
    "causal": lambda: Causal(),
    "window": lambda: Causal() & Window(3),
    "documents": lambda: Causal() & Documents((torch.arange(N) // torch.tensor([[3], [5]]))[:, None]),
    "padding, left": lambda: Padding(KEPT.flip(-1)[:, None]) & Causal(),
    "padding, right": lambda: Causal() & Padding.of_lengths(torch.tensor([[N], [N - 3]]), N),
    "mask": lambda: Causal() & Allowed(OPEN),
    "all": lambda: Everything() & Window(5) & Documents(torch.arange(N) // 5) & Causal() & Padding(KEPT[:, None]),
}
CLOCKS = {"fixed": None, "exponential": la.ExponentialClock(), "erlang": la.ErlangClock(2)}
ROWS = [row for row in itertools.product(SCORES, VISIBLE, CLOCKS, (False, True))]
FEW = [row for row in ROWS if row[0] not in ("none",) or row[1] != "causal"]


class Case:
    def __init__(self, score: str, visible: str, clock: str, first_hop: bool) -> None:
        self.query, self.key = (normal(B, H, N, E, seed=s).requires_grad_() for s in (1, 2))
        self.value = normal(B, H, N, D, seed=3).requires_grad_()
        self.rates = normal(B, H, N, seed=4).sigmoid().requires_grad_()
        self.time = torch.tensor([[0.7], [1.9]], dtype=torch.float64, requires_grad=True)
        self.visible, self.clock, self.first_hop = VISIBLE[visible](), CLOCKS[clock], first_hop
        self.score, self.leaves = SCORES[score]

    @property
    def inputs(self):
        return [self.query, self.key, self.value, self.rates, self.time]

    def generator(self, query=None, key=None, rates=None):
        query, key = self.query if query is None else query, self.key if key is None else key
        rates = self.rates if rates is None else rates
        return SoftmaxGenerator(
            query, key, score=self.score(query, key), visible=self.visible, jump_rates=rates, allow_open_mask=True
        )

    def solve(self, method, query=None, key=None, value=None, rates=None, time=None):
        value, time = self.value if value is None else value, self.time if time is None else time
        generator = self.generator(query, key, rates)
        return la.expm_multiply(generator, value, time, clock=self.clock, first_hop=self.first_hop, method=method)


def sweep() -> la.CausalSweep:
    return la.CausalSweep(max_terms=30, block_size=BLOCK)


@pytest.mark.parametrize(("score", "visible", "clock", "first_hop"), covering(ROWS, strength=3))
def test_a_sweep_is_the_formed_chain(score, visible, clock, first_hop):
    case = Case(score, visible, clock, first_hop)
    upstream = normal(B, H, N, D, seed=9)
    found = []
    for method in (sweep(), la.MatrixExp()):
        out = case.solve(method)
        grads = torch.autograd.grad(out, [*case.inputs, *case.leaves], upstream)
        found.append([out, *grads])
    for ours, formed in zip(*found, strict=True):
        torch.testing.assert_close(ours, formed, atol=1e-10, rtol=1e-10)
    for grad in found[0][6:]:
        assert grad.abs().sum() > 0


@pytest.mark.parametrize(("score", "visible", "clock", "first_hop"), covering(FEW))
def test_second_derivatives(score, visible, clock, first_hop):
    case = Case(score, visible, clock, first_hop)

    def turned(method):
        out = case.solve(method)
        leaves = [*case.inputs, *case.leaves]
        first = torch.autograd.grad(out, leaves, normal(B, H, N, D, seed=9), create_graph=True)
        total = sum((g * normal(*g.shape, seed=11 + i)).sum() for i, g in enumerate(first))
        return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    for ours, formed in zip(turned(sweep()), turned(la.MatrixExp()), strict=True):
        torch.testing.assert_close(ours, formed, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(("score", "visible", "clock", "first_hop"), covering(FEW))
def test_forward_mode(score, visible, clock, first_hop):
    case = Case(score, visible, clock, first_hop)
    inputs = [x.detach() for x in case.inputs]
    pushes = tuple(normal(*x.shape, seed=20 + i) for i, x in enumerate(inputs))
    ours, formed = (
        torch.func.jvp(lambda *x, m=method: case.solve(m, *x), tuple(inputs), pushes)[1]
        for method in (sweep(), la.MatrixExp())
    )
    torch.testing.assert_close(ours, formed, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("score", SCORES)
def test_forward_mode_by_leaves(score):
    case = Case(score, "documents", "exponential", True)
    generator = case.generator()
    if not any(leaf.requires_grad for leaf in generator.leaves):
        pytest.skip("nothing to differentiate by")
    with torch.autograd.forward_ad.dual_level():
        tangents = [normal(*leaf.shape, seed=40 + i) for i, leaf in enumerate(generator.leaves)]
        duals = [
            torch.autograd.forward_ad.make_dual(x.detach(), t) for x, t in zip(generator.leaves, tangents, strict=True)
        ]
        generator.score.leaves = generator.leaves = tuple(duals)
        if hasattr(generator.score, "parts"):
            for part in generator.score.parts:
                part.leaves, duals = tuple(duals[: len(part.leaves)]), duals[len(part.leaves) :]
        ours, formed = (
            torch.autograd.forward_ad.unpack_dual(
                la.expm_multiply(generator, case.value, case.time, clock=case.clock, first_hop=True, method=method)
            ).tangent
            for method in (sweep(), la.MatrixExp())
        )
    torch.testing.assert_close(ours, formed, atol=1e-9, rtol=1e-9)
    assert ours.abs().sum() > 0


@pytest.mark.parametrize(("score", "visible"), covering(itertools.product(SCORES, VISIBLE)))
def test_vmap_is_a_loop(score, visible):
    case = Case(score, visible, "exponential", True)
    inputs = [torch.stack([x.detach(), x.detach().flip(0) / 2]) for x in case.inputs]

    def loss(*x):
        return case.solve(sweep(), *x).square().sum()

    every = torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))
    together = torch.func.vmap(every)(*inputs)
    for i in range(2):
        for one, all_ in zip(every(*(x[i] for x in inputs)), together, strict=True):
            torch.testing.assert_close(all_[i], one)


@pytest.mark.parametrize("score", SCORES)
def test_compiles_into_one_graph(score):
    torch._dynamo.reset()
    case = Case(score, "all", "exponential", True)

    def call(query, key, value):
        generator = case.generator(query, key)
        return la.expm_multiply(generator, value, 1.3, clock=case.clock, first_hop=True, method=sweep())

    upstream = normal(B, H, N, D, seed=9)
    inputs = [case.query, case.key, case.value]
    known = [x for x in (*inputs, *case.leaves) if x.requires_grad]
    found = []
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        out = run(*inputs)
        grads = torch.autograd.grad(out, known, upstream, retain_graph=True, allow_unused=True)
        found.append([out, *grads])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain)
    torch._dynamo.reset()
    with torch.no_grad():  # Dynamo then goes another way
        torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs), found[0][0])


@pytest.mark.parametrize(("score", "visible"), covering(itertools.product(SCORES, VISIBLE)))
def test_rows_are_those_of_the_matrix(score, visible):
    case = Case(score, visible, "fixed", False)
    generator = case.generator()
    chain = generator.jump_chain()
    for start, stop in ((0, 1), (2, 7), (0, N), (N - 1, N)):
        rows = generator.rows(start, stop)
        assert rows.shape == (B, H, stop - start, stop)
        torch.testing.assert_close(rows, chain[..., start:stop, :stop], atol=1e-12, rtol=0)
    torch.testing.assert_close(generator.jump(case.value), chain @ case.value, atol=1e-12, rtol=0)
    ones = torch.ones(N, dtype=torch.float64)
    torch.testing.assert_close(chain.sum(-1), ones.expand(B, H, N))


@pytest.mark.parametrize("score", ["soft cap", "tensor", "cap, tensor, cap"])
@pytest.mark.parametrize("visible", [Everything(), Window(3), Documents(torch.arange(N) // 4)], ids=str)
def test_without_causality_hops_take_them_too(score, visible):
    case = Case(score, "causal", "fixed", True)
    made = case.score(case.query, case.key)
    generator = SoftmaxGenerator(case.query, case.key, score=made, visible=visible, jump_rates=case.rates)
    assert not generator.is_causal
    for clock in CLOCKS.values():
        found = [
            la.expm_multiply(generator, case.value, 1.3, clock=clock, first_hop=True, method=method)
            for method in (
                la.MatrixExp(),
                la.Uniformization(max_terms=60),
                la.Uniformization(max_terms=60, formed=True),
            )
        ]
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], atol=1e-8, rtol=0)
    torch.testing.assert_close(generator.rows(2, 5), generator.jump_chain()[..., 2:5, :])


def test_memory_of_a_bias_by_blocks_is_linear():
    """No tensor of N×N entries a head is kept between forward and backward."""
    n, sizes = 64, []
    query, key, value = (normal(1, 2, n, E, seed=s).requires_grad_() for s in (1, 2, 3))
    encoding = T5Bias(2, is_causal=True).double()
    generator = SoftmaxGenerator(query, key, score=encoding.score(normal(1, n, C), query, key), is_causal=True)

    def note(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        la.expm_multiply(generator, value, 1.0, clock=la.ExponentialClock(), method=la.CausalSweep(block_size=8))
    assert sizes
    assert max(sizes) < n * n


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("visible", [*VISIBLE, "by head"])
def test_the_first_tokens_of_the_first_items(score, visible):
    """What a monitor looks at: leaves and masks with a batch in front are cut, those of heads are not."""
    case = Case(score, "causal", "fixed", False)
    by_head = torch.ones(H, N, N, dtype=torch.bool).tril()
    by_head[1] = torch.eye(N, dtype=torch.bool)
    seen = Causal() & Allowed(by_head) if visible == "by head" else VISIBLE[visible]()
    found = case.score(case.query, case.key)
    whole = SoftmaxGenerator(
        case.query, case.key, score=found, visible=seen, jump_rates=case.rates, allow_open_mask=True
    )
    few = whole.first(1, 5)
    torch.testing.assert_close(few.dense(), whole.dense()[:1, :, :5, :5])
    torch.testing.assert_close(few.jump_chain(), whole.jump_chain()[:1, :, :5, :5])
    torch.testing.assert_close(few.rows(1, 4), whole.rows(1, 4)[:1])


def test_what_jumps_share_is_formed_with_the_gradients_that_are_wanted():
    case = Case("t5", "causal", "fixed", True)
    generator = case.generator()
    hops = la.Uniformization(max_terms=3)
    with torch.no_grad():
        la.expm_multiply(generator, case.value, 1.0, method=hops)
    (grad,) = torch.autograd.grad(la.expm_multiply(generator, case.value, 1.0, method=hops).sum(), generator.leaves[1])
    assert grad.abs().sum() > 0


def test_a_window_is_not_charged_to_a_mask_beside_it():
    lower = torch.ones(N, N, dtype=torch.bool).tril()
    SoftmaxGenerator(Q, Q, visible=Window(2) & Allowed(lower))
    with pytest.raises(MaskError, match="transitively closed"):
        SoftmaxGenerator(Q, Q, visible=Window(2) & Allowed(lower.triu(-1)))


def test_without_time_the_batch_is_that_of_both():
    generator = SoftmaxGenerator(Q.expand(3, H, N, E), Q)
    assert la.expm_multiply(generator, Q[0, 0], 0.0).shape == la.expm_multiply(generator, Q[0, 0], 1.0).shape


class Halved(Score):
    def act(self, scores, start, leaves):
        return scores[..., ::2]


class Late(Bias):
    def rows(self, start, stop, columns, leaves):
        return torch.zeros(stop - start, columns, 1)


Q = normal(1, H, N, E)
REFUSED = {
    "a score that changes the shape": (
        lambda: SoftmaxGenerator(Q, Q, score=Halved()).rows(0, 2),
        ShapeError,
        "leave a",
    ),
    "a score that is none": (lambda: SoftmaxGenerator(Q, Q, score=3.0), DtypeError, "SoftCap"),
    "rows out of range": (lambda: SoftmaxGenerator(Q, Q).rows(3, N + 1), ShapeError, "start < stop"),
    "rows of a matrix out of range": (
        lambda: la.DenseGenerator(torch.zeros(2, 2)).rows(1, 1),
        ShapeError,
        "start < stop",
    ),
    "no rows": (lambda: SoftmaxGenerator(Q, Q).rows(2, 2), ShapeError, "start < stop"),
    "rows of the past": (
        lambda: SoftmaxGenerator(Q[..., 4:, :], Q, is_causal=True, past=4).rows(2, 5),
        ShapeError,
        "queries of",
    ),
    "leaves on another device": (
        lambda: SoftmaxGenerator(Q, Q, score=Differences(torch.zeros(N, device="meta"))),
        GeneratorError,
        "move it",
    ),
    "ids on another device": (
        lambda: SoftmaxGenerator(Q, Q, visible=Documents(torch.zeros(N, dtype=torch.long, device="meta"))),
        GeneratorError,
        "move it",
    ),
    "an open mask": (
        lambda: SoftmaxGenerator(Q, Q, visible=Causal() & Allowed(torch.ones(N, N, dtype=torch.bool).triu(-1))),
        MaskError,
        "allow_open_mask",
    ),
    "ids of other tokens": (
        lambda: SoftmaxGenerator(Q, Q, visible=Documents(torch.zeros(N + 1, dtype=torch.long))),
        MaskError,
        "beside heads",
    ),
    "ids that are no numbers": (lambda: Documents(torch.zeros(N)), DtypeError, "whole numbers"),
    "padding that is no mask": (lambda: Padding(torch.zeros(N)), DtypeError, "of_lengths"),
    "a window of nothing": (lambda: Window(0), MaskError, "the token itself"),
    "a window between numbers": (lambda: Window(1.5), MaskError, "whole number"),
    "a cap that is none": (lambda: SoftCap(None), GeneratorError, "positive"),
    "lengths that are no tensor": (lambda: Padding.of_lengths([1, 2], 3), DtypeError, "whole numbers"),
    "a float where bool is read": (lambda: Allowed(torch.zeros(N, N)), MaskError, "torch.bool"),
    "a mask with one axis": (lambda: Allowed(torch.ones(N, dtype=torch.bool)), MaskError, "rows, columns"),
    "one id for all": (
        lambda: SoftmaxGenerator(Q, Q, visible=Documents(torch.zeros(1, 1, 1, dtype=torch.long))),
        MaskError,
        "an entry a token",
    ),
    "a class for an object": (lambda: SoftmaxGenerator(Q, Q, visible=Causal), DtypeError, r"such as Causal\(\)"),
    "a bias of other tokens": (
        lambda: SoftmaxGenerator(Q, Q, score=TensorBias(torch.ones(N, N + 1))),
        MaskError,
        "one number per query",
    ),
    "differences of other tokens": (
        lambda: SoftmaxGenerator(Q, Q, score=SoftCap(1.0) | Differences(torch.ones(N + 1))),
        ShapeError,
        "make it for these",
    ),
    "positions of other tokens": (
        lambda: SoftmaxGenerator(Q, Q, score=ALiBi(H).score(Q, Q[..., :4, :], Q[..., :4, :])),
        ShapeError,
        "make it for these",
    ),
    "a NaN in a bias": (
        lambda: SoftmaxGenerator(Q, Q, score=TensorBias(torch.full((N, N), torch.nan))),
        GeneratorError,
        "finite",
    ),
    "a shape that hops would broadcast": (
        lambda: SoftmaxGenerator(Q, Q, score=Halved()).jump_chain(),
        ShapeError,
        "leave a",
    ),
    "a past that is none": (lambda: SoftmaxGenerator(Q, Q, past=-1), ShapeError, "whole number from 0"),
    "a flow of new rows alone": (
        lambda: la.expm_multiply(SoftmaxGenerator(Q[..., 4:, :], Q, is_causal=True, past=4), Q[..., 4:, :]),
        GeneratorError,
        "Flow.extend",
    ),
    "a cap of nothing": (lambda: SoftCap(0.0), GeneratorError, "positive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


def test_what_is_visible_can_be_read():
    assert repr(Causal() & Window(4) & Padding(KEPT)) == "Causal() & Window(4) & Padding()"


@pytest.mark.parametrize("score", ["tensor", "cap, tensor, cap", "forgetting"])
@pytest.mark.parametrize("plus", [False, True])
def test_recomputation_finds_what_the_forward_found(score, plus):
    """A mask for the kernels that hops share is formed before, be it learned or not."""
    case = Case(score, "all", "fixed", True)
    rates = la.DenseGenerator.from_rates(normal(N, N, seed=8).abs())
    found = []
    for options in ({}, {"recompute": True}):
        for method in (la.Uniformization(max_terms=5, **options), la.CausalSweep(max_terms=5, **options)):
            if plus and isinstance(method, la.CausalSweep):
                continue
            generator = case.generator() + rates if plus else case.generator()
            time = normal(H, N, seed=9).abs()
            out = la.expm_multiply(generator, case.value, time, first_hop=True, method=method)
            found.append(torch.autograd.grad(out.square().sum(), [case.query, case.value, *case.leaves]))
    for others in found[1:]:
        for ours, first in zip(others, found[0], strict=True):
            torch.testing.assert_close(ours, first)
