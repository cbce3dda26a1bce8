"""LieFlow: softmax at time 0, the formula in float64, the projected time, rates, and decoding with what it keeps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import liegroup_attn as la
from liegroup_attn.clocks import clock_from
from liegroup_attn.errors import GeneratorError, MaskError, ShapeError
from liegroup_attn.nn import (
    Flow,
    LieAttention,
    LieFlow,
    LieMixer,
    LieMultiheadAttention,
    RelativeRates,
    SoftmaxAttention,
    scale_time,
)
from liegroup_attn.options import options_of

B, H, N, D = 2, 4, 9, 6
CLOCKS = ("FixedClock", "ExponentialClock", "ErlangClock(2)")
clocks = pytest.mark.parametrize("clock", CLOCKS)


def inputs(kv_heads: int = H, dtype: torch.dtype = torch.float64, n: int = N) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    return [torch.randn(B, heads, n, D, generator=rng, dtype=dtype) for heads in (H, kv_heads, kv_heads)]


def moved(dtype: torch.dtype = torch.float64, **options) -> LieFlow:
    """A flow away from its start: every head has its own time, every token its own rates."""
    torch.manual_seed(5)
    flow = LieFlow(H, D, **{"max_time": 2.0, "tol": 1e-14, **options}).to(dtype)
    with torch.no_grad():
        flow.time.copy_(torch.linspace(0.2, 1.7, H))
        if flow.learn_rates:
            flow.rate_weight.normal_()
            flow.rate_bias.normal_()
    return flow


def attend(flow: LieFlow, q, k, v, attn_mask=None, need_weights=False, **options):
    """Values that have flowed; with ``need_weights`` beside what would multiply them."""
    generator = flow.generator(q, k, v, visible=attn_mask, **options)
    mixed = flow(generator, v)
    return (mixed, flow.mixing(generator, v)) if need_weights else mixed


class Attention(torch.nn.Module):
    """``attend`` as a module, for ``functional_call``: rates are parameters of what makes the generator."""

    def __init__(self, flow: LieFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, q, k, v):
        return attend(self.flow, q, k, v)


def padded(n: int = N) -> torch.Tensor:
    """(B, 1, N, N), causal with three pads on the left of the second item, as batches of prompts have them."""
    mask = torch.ones(B, 1, n, n, dtype=torch.bool).tril()
    mask[1, :, :, :3] = False
    return mask


def golden(flow: LieFlow, q, k, v, allowed: np.ndarray, scale: float) -> np.ndarray:
    """(B, H, N, N) by SciPy in float64, from the definition."""
    group = H // k.size(1)
    q, k, v = q.numpy(), k.repeat_interleave(group, 1).numpy(), v.repeat_interleave(group, 1).numpy()
    scores = np.where(allowed, scale * q @ k.swapaxes(-1, -2), -np.inf)
    lost = ~np.broadcast_to(allowed, scores.shape).any(-1)
    scores[lost] = np.where(np.eye(N, dtype=bool), 0, -np.inf)[np.nonzero(lost)[-1]]
    chain = np.exp(scores - scores.max(-1, keepdims=True))
    chain /= chain.sum(-1, keepdims=True)
    rho = np.ones((B, H, N))
    if flow.learn_rates:
        weight, bias = flow.rate_weight.detach().numpy(), flow.rate_bias.detach().numpy()
        rho = 1 / (1 + np.exp(-(np.einsum("bhnd,hd->bhn", v, weight) + bias[:, None])))
    flow_matrix = flow.time.detach().numpy()[:, None, None] * rho[..., None] * (chain - np.eye(N))
    s = flow.clock.resolvents
    if s is None:
        mixing = scipy.linalg.expm(flow_matrix)
    else:
        mixing = np.linalg.matrix_power(np.linalg.inv(np.eye(N) - flow_matrix / s), s)
    return chain @ mixing if flow.first_hop else mixing


@clocks
@pytest.mark.parametrize("first_hop", [True, False])
@pytest.mark.parametrize("kv_heads", [H, 2, 1])
@pytest.mark.parametrize("mask", ["none", "causal", "padded"])
def test_the_formula(clock, first_hop, kv_heads, mask):
    flow = moved(clock=clock, first_hop=first_hop)
    q, k, v = inputs(kv_heads)
    allowed = {"none": np.ones((N, N), bool), "causal": np.tril(np.ones((N, N), bool)), "padded": padded().numpy()}
    expected = golden(flow, q, k, v, allowed[mask], 0.3)
    attn_mask = padded() if mask == "padded" else None
    mixed = attend(flow, q, k, v, attn_mask, is_causal=mask == "causal", scale=0.3)
    also, weights = attend(flow, q, k, v, attn_mask, is_causal=mask == "causal", scale=0.3, need_weights=True)
    wide = v.repeat_interleave(H // kv_heads, 1).numpy()
    np.testing.assert_allclose(weights.detach().numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(mixed.detach().numpy(), expected @ wide, atol=1e-12)
    np.testing.assert_allclose(also.detach().numpy(), expected @ wide, atol=1e-12)


@clocks
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("learn_time", [True, False])
def test_time_0_is_softmax_attention(clock, grad, learn_time):
    flow = LieFlow(H, D, clock=clock, learn_time=learn_time)
    q, k, v = inputs(dtype=torch.float32)
    with torch.set_grad_enabled(grad):
        for options in ({}, {"is_causal": True}, {"attn_mask": padded()[:1]}):
            expected = F.scaled_dot_product_attention(q, k, v, **options)
            torch.testing.assert_close(attend(flow, q, k, v, **options), expected, atol=1e-6, rtol=0)


def test_no_hop_is_taken_where_no_time_passes(monkeypatch):
    """Frozen or without gradients, one kernel call does it; where a gradient is wanted, hops are needed."""
    calls = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    q, k, v = inputs(dtype=torch.float32)
    frozen, learned = LieFlow(H, D, learn_time=False), LieFlow(H, D)
    attend(frozen, q, k, v)
    assert calls == [1]
    with torch.no_grad():
        attend(learned, q, k, v)
    assert calls == [1, 1]
    assert frozen.is_still()
    assert not learned.is_still()
    with torch.no_grad():
        frozen.time.data.fill_(0.5)  # a change that no version counter sees
    assert not frozen.is_still()
    assert not torch.allclose(attend(frozen, q, k, v), kernel(q, k, v))


@clocks
def test_the_gradient_by_time_at_0_is_that_of_the_formula(clock):
    """d/dt S·E[exp(τQ)]V = S·Q·V at t = 0, whatever the clock; rates have none there."""
    flow = LieFlow(H, D, clock=clock).double()
    q, k, v = inputs()
    upstream = torch.randn(B, H, N, D, dtype=torch.float64)
    attend(flow, q, k, v).backward(upstream)
    chain = (q @ k.mT / math.sqrt(D)).softmax(-1)
    expected = (upstream * (chain @ (0.5 * (chain @ v - v)))).sum((0, 2, 3))
    torch.testing.assert_close(flow.time.grad.squeeze(-1), expected, atol=1e-10, rtol=0)
    assert expected.abs().min() > 1e-3
    assert not flow.rate_weight.grad.any()


@clocks
def test_gradients(clock):
    flow = moved(clock=clock, tol=1e-6)
    tensors = [x[:1, :, :4].requires_grad_() for x in inputs()]
    attention = Attention(flow)
    names = [name for name, _ in attention.named_parameters()]

    def run(q, k, v, *parameters):
        return torch.func.functional_call(attention, dict(zip(names, parameters, strict=True)), (q, k, v))

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
        torch.autograd.gradcheck(run, (*tensors, *flow.parameters()), check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize(
    ("stored", "used", "towards_less", "towards_more"),
    [(-0.1, 0.0, 0.0, -1.0), (0.0, 0.0, 1.0, -1.0), (0.7, 0.7, 1.0, -1.0), (2.0, 2.0, 1.0, -1.0), (2.3, 2.0, 1.0, 0.0)],
)
def test_time_is_kept_inside_by_projection(stored, used, towards_less, towards_more):
    """Descent that leads back in passes; what leads further out does not."""
    flow = LieFlow(1, 2, max_time=2.0).eval()
    with torch.no_grad():
        flow.time.fill_(stored)
    assert float(flow.flow_time().detach()) == pytest.approx(used)
    for upstream, expected in ((1.0, towards_less), (-1.0, towards_more)):
        flow.time.grad = None
        flow.flow_time().backward(torch.full((1, 1), upstream))
        assert float(flow.time.grad) == expected


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop])
def test_a_plain_optimizer_finds_the_time_and_comes_back_from_0(optimizer):
    """What drives the time below 0 for a while does not lose it."""
    torch.manual_seed(0)
    flow = LieFlow(1, D, max_time=4.0, learn_rates=False)
    q, k, v = (x[:, :1] for x in inputs(dtype=torch.float32))
    steps = optimizer(flow.parameters(), lr=0.02, weight_decay=0.0)
    wanted = la.lie_attention(q, k, v, time=1.5, first_hop=True)

    def descend(target, count):
        for _ in range(count):
            steps.zero_grad()
            (attend(flow, q, k, v) - target).square().mean().mul(100).backward()
            steps.step()

    away = 2 * F.scaled_dot_product_attention(q, k, v) - wanted  # to the other side of time 0
    descend(away, 20)
    assert float(flow.flow_time().detach()) == 0
    descend(wanted, 400)
    assert float(flow.flow_time().detach()) == pytest.approx(1.5, abs=0.3)


@clocks
@pytest.mark.parametrize("first_hop", [True, False])
@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("mask", ["causal", "padded", "window", "bias"])
def test_decoding_with_what_is_kept_equals_recomputation(clock, first_hop, kv_heads, mask):
    flow = moved(clock=clock, first_hop=first_hop, allow_open_mask=True, tol=1e-3)
    q, k, v = inputs(kv_heads)
    ones = torch.ones(N, N, dtype=torch.bool)
    attn_mask = {
        "causal": ones.tril().expand(B, 1, N, N),
        "padded": padded(),
        "window": (ones.tril() & ones.triu(-2)).expand(B, 1, N, N),
        "bias": torch.randn(B, H, N, N, dtype=torch.float64).masked_fill(~ones.tril(), -torch.inf),
    }[mask]
    # What a mask says of later tokens does not count: they are hidden in any case.
    ahead = attn_mask | ~ones.tril() if mask != "bias" else attn_mask.masked_fill(~ones.tril(), 0)
    with torch.no_grad():
        expected = attend(flow, q, k, v, attn_mask)
        for given in (None,) if mask == "causal" else (attn_mask, ahead):
            past, found = q.new_zeros(B, H, 0, flow.kept_width), []
            for start, stop in ((0, 4), (4, 5), (5, 8), (8, 9)):
                rows = None if given is None else given[:, :, start:stop, :stop]
                new, values = q[:, :, start:stop], v[:, :, start:stop]
                generator = flow.generator(new, k[:, :, :stop], values, visible=rows, is_causal=True, past=start)
                mixed, kept = flow.extend(generator, values, past)
                past = torch.cat([past, kept], 2)
                found.append(mixed)
            torch.testing.assert_close(torch.cat(found, 2), expected, atol=1e-12, rtol=0)


def test_an_open_mask_is_refused_once_time_may_pass():
    window = torch.ones(N, N, dtype=torch.bool).tril().triu(-2)
    q, k, v = inputs(dtype=torch.float32)
    flow = LieFlow(H, D)
    with pytest.raises(MaskError, match="transitively closed"):
        attend(flow, q, k, v, window)
    with torch.no_grad():  # nothing leaks without a hop
        torch.testing.assert_close(attend(flow, q, k, v, window), F.scaled_dot_product_attention(q, k, v, window))
    assert attend(LieFlow(H, D, allow_open_mask=True), q, k, v, window).isfinite().all()


def test_dropout_has_the_right_mean_and_acts_on_weights_that_are_asked_for():
    flow, (q, k, v) = moved(torch.float32, tol=1e-3), inputs(dtype=torch.float32)
    with torch.no_grad():
        expected = attend(flow, q, k, v)
        draws = torch.stack([attend(flow, q, k, v, dropout_p=0.2) for _ in range(600)])
        x = torch.randn(B, N, H * D)
        _, weights = LieMultiheadAttention(H * D, H, 0.5, time=0.5, batch_first=True)(
            x, x, x, average_attn_weights=False
        )
    assert (draws.mean(0) - expected).abs().max() < 6 * float(draws.std(0).max()) / math.sqrt(600)
    assert draws.std(0).min() > 0
    assert 0.3 < float((weights == 0).float().mean()) < 0.7


def test_scale_time_runs_it_longer():
    flow, (q, k, v) = moved(), inputs()
    before = attend(flow, q, k, v)
    assert scale_time(flow, 2.0) == 1
    twice = moved()
    with torch.no_grad():
        twice.time.mul_(2)
        twice.max_time *= 2
    torch.testing.assert_close(attend(flow, q, k, v), attend(twice, q, k, v), atol=1e-10, rtol=0)
    scale_time(flow, 0.0)
    torch.testing.assert_close(attend(flow, q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-10, rtol=0)
    assert not torch.allclose(before, attend(flow, q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    wide, half = moved(torch.float32, tol=1e-3), moved(torch.float32, tol=1e-3).to(dtype)
    q, k, v = inputs(dtype=torch.float32)
    found = attend(half, *(x.to(dtype) for x in (q, k, v)), is_causal=True)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), attend(wide, q, k, v, is_causal=True), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("clock", [None, "ExponentialClock"])
@pytest.mark.parametrize("time", [0.0, 0.7])
def test_compile(clock, time):
    flow, (q, k, v) = LieFlow(H, D, clock=clock, time=time), inputs(dtype=torch.float32)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(flow, q, k, v, is_causal=True), attend(flow, q, k, v, is_causal=True))


def test_clocks_by_name():
    for name in CLOCKS:
        assert str(clock_from(str(clock_from(name)))) == str(clock_from(name))
        assert str(LieFlow(1, 1, clock=name).clock) == str(clock_from(name))
    for wrong in ("Erlang", "ErlangClock", "ErlangClock()", "FixedClock(2)", "fixed", "ErlangClock(0)"):
        with pytest.raises(GeneratorError):
            clock_from(wrong)


@pytest.mark.parametrize(
    "options",
    [
        {"time": -0.1},
        {"time": 2.0},
        {"max_time": math.inf},
        {"max_time": 0.0},
        {"rate": 1.0},
        {"tol": 0.0},
        {"clock": "no"},
    ],
)
def test_bad_options(options):
    with pytest.raises(GeneratorError, match=r"expected .*, got .*; \w"):
        LieFlow(2, 4, **options)


def test_a_longer_time_than_it_knows_is_not_loaded():
    long = LieFlow(2, 4, time=8.0, max_time=8.0)
    with pytest.raises(RuntimeError, match="max_time=1"):
        LieFlow(2, 4).load_state_dict(long.state_dict())
    short = LieFlow(2, 4, max_time=8.0)
    short.load_state_dict(long.state_dict())
    assert torch.equal(short.time, long.time)


@clocks
def test_forward_mode_at_time_0_is_not_silently_0(clock):
    """Pitfall 11: a time that is a dual number wants a derivative, too."""
    flow, (q, k, v) = LieFlow(H, D, clock=clock).double(), inputs()
    start = torch.zeros(H, dtype=torch.float64)

    def run(time):
        return torch.func.functional_call(Attention(flow), {"flow.time": time}, (q, k, v))

    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(run, (start,), (torch.ones_like(start),))
        expected = torch.func.jacrev(run)(start).sum(-1)
    torch.testing.assert_close(tangent, expected)
    assert tangent.abs().max() > 0.1


def test_what_a_step_moved_out_is_saved_inside():
    flow = LieFlow(2, 4, time=0.25, max_time=0.25)
    with torch.no_grad():
        flow.time.copy_(torch.tensor([0.4, -0.1]))
    saved = flow.state_dict()
    assert saved["time"].flatten().tolist() == [0.25, 0.0]
    LieFlow(2, 4, max_time=0.25).load_state_dict(saved)
    inside = LieFlow(2, 4, time=0.5)
    assert inside.state_dict()["time"].data_ptr() == inside.time.data_ptr()  # as ever, where nothing is to be done


def test_modules_made_on_the_meta_device_are_filled():
    flow = LieFlow(2, 4, time=0.3, rate=0.25, device="meta").to_empty(device="cpu")
    flow.reset_parameters()
    fresh = LieFlow(2, 4, time=0.3, rate=0.25).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in flow.state_dict().items())


WRONG = {
    "a typo": (lambda: LieAttention(8, 2, tiem=1.0), TypeError, r"LieAttention: .*got \['tiem'\]; did you mean time\?"),
    "a dtype of the flow alone": (lambda: LieAttention(8, 2, dtype=torch.float64), TypeError, r"got \['dtype'\]"),
    "a method in a drop-in": (lambda: LieFlow(2, 4, method=la.MatrixExp()), TypeError, r"got \['method'\]"),
    "rates of nothing": (lambda: Flow(2, None), ShapeError, "learn_rates=False"),
}


@pytest.mark.parametrize("name", WRONG)
def test_options_that_are_none(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()


def test_signatures_show_every_option():
    """An option of a flow stands in ``Flow`` alone, and is seen wherever it may be given."""
    flow = options_of(Flow).keys()
    assert options_of(LieAttention).keys() >= flow - {"device", "dtype"}
    assert options_of(LieFlow).keys() == flow - {"method"}
    assert {"num_kv_heads", "encoding"} <= options_of(LieAttention).keys() & options_of(SoftmaxAttention).keys()


def test_a_mixer_of_before_is_read_into_a_model_without_values():
    with torch.device("meta"):
        layer = LieMixer(8, 2, RelativeRates(2, max_distance=3))
    state = {k: torch.ones(v.shape) for k, v in layer.state_dict().items() if k != "flow.time"}
    layer.load_state_dict(state, assign=True)
    assert layer(torch.randn(1, 5, 8)).shape == (1, 5, 8)
