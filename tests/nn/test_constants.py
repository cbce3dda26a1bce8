"""Numbers that a module keeps: constants of a compiled graph, saved where they change the output."""

import pytest
import torch

import liegroup_attn as la
from liegroup_attn.expm import Uniformization
from liegroup_attn.nn import (
    LieAttention,
    LieFlow,
    LieMixer,
    LieMultiheadAttention,
    RateMatrix,
    SoftmaxAttention,
    Transformer,
    convert_attention,
    scale_time,
)

N, C, H = 6, 16, 2
X = torch.randn(1, N, C, generator=torch.Generator().manual_seed(0))


def converted():
    model = SoftmaxAttention(C, H, is_causal=True)
    convert_attention(model, time=0.5)
    return model


TIMED = {
    "lie": lambda: LieAttention(C, H, is_causal=True),
    "mixer": lambda: LieMixer(C, H, RateMatrix(H, num_tokens=N)),
    "converted": converted,
    "transformer": lambda: Transformer(C, 2, H, {"module": "LieAttention"}, is_causal=True),
}
# Two modules that differ in one number, compiled one after the other.
UNLIKE = {
    "max_time": lambda k: LieAttention(C, H, is_causal=True, max_time=2.0 + k),
    "max_time, not causal": lambda k: LieAttention(C, H, max_time=2.0 + 30 * k),
    "tol": lambda k: LieAttention(C, H, is_causal=True, tol=(1e-3, 1e-5, 1e-6)[k]),
    "resolvent": lambda k: LieAttention(C, H, max_time=2.0 + k, clock=la.ErlangClock(1 + k)),
    "tol of a method": lambda k: LieAttention(
        C, H, method=Uniformization(tol=(1e-3, 1e-5, 1e-6)[k], formed=True), is_causal=True
    ),
    "hops of a method": lambda k: LieAttention(C, H, method=Uniformization(max_terms=3 + k, formed=True)),
    "multi-head": lambda k: LieMultiheadAttention(C, H, time=0.5, max_time=1.0 + k, batch_first=True),
    "scaled": lambda k: (lambda layer: (scale_time(layer, 1.0 + k), layer)[1])(LieAttention(C, H, is_causal=True)),
}


def _output(module, run=None):
    run = module if run is None else run
    found = run(X, X, X) if isinstance(module, LieMultiheadAttention) else run(X)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("make", UNLIKE.values(), ids=UNLIKE.keys())
def test_a_number_of_a_module_is_a_constant_of_its_graph(make, dynamic):
    torch._dynamo.reset()
    for k in range(3):  # the second value is what makes a symbol of a float
        module = make(k).eval()
        fast = torch.compile(module, backend="eager", dynamic=dynamic)
        torch.testing.assert_close(_output(module, fast), _output(module))


@pytest.mark.parametrize("make", TIMED.values(), ids=TIMED.keys())
def test_scaled_time_is_compiled_anew_and_saved(make):
    torch._dynamo.reset()
    layer = make().eval()
    fast, plain = torch.compile(layer, backend="eager"), _output(layer)
    torch.testing.assert_close(_output(layer, fast), plain)
    keys = layer.state_dict().keys()
    scale_time(layer, 0.5)
    torch.testing.assert_close(_output(layer, fast), _output(layer))
    assert not torch.allclose(_output(layer), plain)
    again = make().eval()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(_output(again), _output(layer))
    scale_time(layer, 1.0)
    assert layer.state_dict().keys() == keys  # what never was scaled is saved as ever
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(_output(again), plain)


def test_a_part_of_a_state_says_nothing_of_the_factor():
    layer = LieAttention(C, H)
    scale_time(layer, 3.0)
    layer.load_state_dict({"q_proj.weight": layer.q_proj.weight}, strict=False)
    assert layer.flow.time_scale == 3.0


@pytest.mark.parametrize("max_time", [1.0, 0.03, 0.001])
def test_second_derivatives_by_a_time_of_0_do_not_ask_for_how_long_it_may_be(max_time):
    q, k, v = (
        torch.randn(1, H, N, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(3)
    )
    second = []
    for longest in (max_time, 2.0):
        flow = LieFlow(H, 4, max_time=longest, first_hop=False).double()
        (first,) = torch.autograd.grad(flow(flow.generator(q, k, v), v).square().sum(), flow.time, create_graph=True)
        second.append(torch.autograd.grad(first.sum(), flow.time)[0])
    torch.testing.assert_close(*second)


def test_times_that_were_saved_as_columns_are_loaded():
    for old in (LieAttention(C, H), LieFlow(H, C // H, time=0.5)):
        state = {key: x.unsqueeze(-1) if key.endswith("time") else x for key, x in old.state_dict().items()}
        new = type(old)(*((C, H) if isinstance(old, LieAttention) else (H, C // H)))
        new.load_state_dict(state)
        one, other = (m.flow if isinstance(m, LieAttention) else m for m in (new, old))
        assert torch.equal(one.flow_time(), other.flow_time())


def test_loops_over_matrices_leave_times_alone():
    model = torch.nn.ModuleList(make() for make in TIMED.values())
    before = {name: p.clone() for name, p in model.named_parameters() if name.endswith("time")}
    for parameter in model.parameters():
        if parameter.dim() > 1 and not hasattr(parameter, "manifold"):
            torch.nn.init.xavier_uniform_(parameter)
    assert len(before) == 4
    assert all(torch.equal(dict(model.named_parameters())[name], x) for name, x in before.items())


OF_FLOW = ("time", "max_time", "clock", "first_hop", "tol", "method", "learn_rates", "rate_weight", "rate_bias")


def test_what_moved_into_the_flow_is_still_the_layers_with_a_warning():
    layer, mixer = LieAttention(C, H), LieMixer(C, H, RateMatrix(H, num_tokens=N))
    for name in (*OF_FLOW, "time_scale", "allow_open_mask"):
        with pytest.warns(
            FutureWarning, match=f"^{name} will go in the next release; write layer.flow.{name}$"
        ) as told:
            found = getattr(layer, name)
        own = getattr(layer.flow, name)
        assert found is own or found == own
        assert [warning.filename for warning in told] == [__file__]
    for name, arguments in (("flow_time", ()), ("jump_rates", (X,))):
        with pytest.warns(FutureWarning, match=f"write layer.flow.{name}$"):
            found = getattr(layer, name)(*arguments)
        assert torch.equal(found, getattr(layer.flow, name)(*arguments))
    for one in (layer, mixer):
        with pytest.warns(FutureWarning, match=r"write layer.flow.time_scale$"):
            one.time_scale = 2.0
        assert one.flow.time_scale == 2.0
    with pytest.raises(AttributeError, match="tiem"):
        _ = layer.tiem


def of_before(state, prefix=""):
    """The state of a layer as it was written before there were flows: its own keys, times as columns."""
    old = {key.replace(f"{prefix}flow.", prefix): x for key, x in state.items()}
    return {key: x.unsqueeze(-1) if key == f"{prefix}time" else x for key, x in old.items()}


@pytest.mark.parametrize("options", [{}, {"learn_time": False}, {"learn_rates": False}], ids=str)
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_states_of_before_there_were_flows_are_loaded(options, factor):
    torch.manual_seed(1)
    layer = LieAttention(C, H, is_causal=True, **options)
    with torch.no_grad():
        layer.flow.time.copy_(torch.tensor([0.4, 1.6]))
        for p in layer.flow.parameters():
            if not hasattr(p, "manifold"):
                p.normal_()
    scale_time(layer, factor)
    for make, prefix in ((lambda m: m, ""), (lambda m: torch.nn.ModuleDict({"attention": m}), "attention.")):
        state = of_before(make(layer).state_dict(), prefix)
        assert state[f"{prefix}time"].shape == (H, 1)
        assert not [key for key in state if ".flow." in key or key.startswith("flow.")]
        given = dict(state)
        new = LieAttention(C, H, is_causal=True, **options)
        make(new).load_state_dict(state)
        assert state.keys() == given.keys()  # what was given stays as it was
        assert torch.equal(new(X), layer(X))
        assert new.flow.time_scale == factor
        assert type(new.flow.time) is type(LieAttention(C, H, **options).flow.time)
        assert new.state_dict().keys() == layer.state_dict().keys()


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_the_state_of_a_mixer_of_before_is_loaded(factor):
    torch.manual_seed(1)
    layer, new = (LieMixer(C, H, RateMatrix(H, num_tokens=N)) for _ in range(2))
    scale_time(layer, factor)
    state = of_before(layer.state_dict())
    del state["time"]  # it had none
    assert ("time_scale" in state) == (factor != 1)
    new.load_state_dict(state)
    assert torch.equal(new(X), layer(X))
    assert new.flow.time_scale == factor


def test_a_state_without_a_parameter_of_the_flow_is_refused():
    state = of_before(LieAttention(C, H).state_dict())
    for name in ("time", "rate_weight", "rate_bias"):
        part = {key: x for key, x in state.items() if key != name}
        with pytest.raises(RuntimeError, match=rf'Missing key.*"flow.{name}"'):
            LieAttention(C, H).load_state_dict(part)
