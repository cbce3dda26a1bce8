"""Without values: modules made on the meta device, moved by ``to_empty`` and filled by ``reset_parameters``; shapes alone."""

import itertools

import pytest
import torch
from positional.positional_cases import CASES
from torch import nn

import liegroup_attn as la
from liegroup_attn.nn import (
    LieAttention,
    LieFlow,
    LieMixer,
    LieMultiheadAttention,
    RateMatrix,
    RateScores,
    RelativeRates,
    ResidualStreams,
    SkewScores,
    SoftmaxAttention,
    SpectralScores,
    SymmetricScores,
    Transformer,
)
from liegroup_attn.positional import ALiBi

C, H, N = 16, 2, 5
MODULES = {
    "lie": lambda: LieAttention(C, H, is_causal=True),
    "lie, all learned": lambda: LieAttention(C, H, plus=RelativeRates(H, 4), mix_heads=True),
    "positions as rates": lambda: LieAttention(C, H, is_causal=True, encoding=ALiBi(H), bias_as="rates"),
    "softmax": lambda: SoftmaxAttention(C, H),
    "mixer": lambda: LieMixer(C, H, RateMatrix(H, num_tokens=N)),
    "flow": lambda: LieFlow(H, C // H, time=0.3),
    "frozen flow": lambda: LieFlow(H, C // H, time=0.3, learn_time=False),
    "relative rates": lambda: RelativeRates(H, 4),
    "spectral scores": lambda: SpectralScores(C, H),
    "skew scores": lambda: SkewScores(C, H),
    "rate scores": lambda: RateScores(C, H),
    "symmetric scores": lambda: SymmetricScores(C, H),
    "streams": lambda: ResidualStreams(3, reads=1),
    "transformer": lambda: Transformer(C, 2, H, {"module": "LieAttention"}, is_causal=True, streams=2),
    "multi-head": lambda: LieMultiheadAttention(C, H, time=0.5),
    "multi-head, unlike widths": lambda: LieMultiheadAttention(C, H, kdim=3, vdim=5),
    **{f"encoding: {name}": case.build for name, case in CASES.items()},
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
def test_meta_then_empty_then_reset_is_a_fresh_module(make):
    with torch.device("meta"):
        module = make()
    module = module.to_empty(device="cpu")
    for x in itertools.chain(module.parameters(), module.buffers()):
        nn.init.constant_(x.data, 77.0)
    torch.manual_seed(0)
    module.apply(lambda part: part.reset_parameters() if hasattr(part, "reset_parameters") else None)
    for name, part in module.named_modules():  # each by itself: what is inside it was made by its own constructor
        own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        assert not own or hasattr(part, "reset_parameters"), name
        assert all(bool((x != 77).any()) for x in own), name
    fresh = make()
    assert module.state_dict().keys() == fresh.state_dict().keys()
    for (name, x), y in zip(module.state_dict().items(), fresh.state_dict().values(), strict=True):
        if torch.equal(y, make().state_dict()[name]):  # not random
            assert torch.equal(x, y), name
        else:
            assert 0.2 < float(x.std() / y.std()) < 5, name


@pytest.mark.parametrize(
    "name", [name for name in MODULES if name.startswith(("relative", "encoding: learned", "spectral"))]
)
def test_random_starts_are_those_of_the_constructor(name):
    torch.manual_seed(3)
    module = MODULES[name]()
    before = [x.clone() for x in module.parameters()]
    torch.manual_seed(3)
    module.reset_parameters()
    assert all(torch.equal(x, y) for x, y in zip(module.parameters(), before, strict=True))


def test_a_constructor_may_end_with_a_reset():
    class Mine(LieAttention):
        def __init__(self, width):
            super().__init__(width, 2, time=0.3)
            self.reset_parameters()

    assert torch.equal(Mine(8).flow.time, torch.full((2,), 0.3))


@pytest.mark.parametrize(
    "make",
    [MODULES[name] for name in ("lie", "positions as rates", "lie, all learned", "softmax", "mixer", "transformer")],
)
def test_layers_run_forward_and_backward_without_values(make):
    with torch.device("meta"):
        module, x = make(), torch.randn(2, N, C, requires_grad=True)
        found = module(x)
        found.sum().backward()
    assert found.shape == x.shape
    assert x.grad is not None
    assert x.grad.is_meta


@pytest.mark.parametrize("clock", [None, la.ExponentialClock(), la.ErlangClock(2)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("first_hop", [False, True], ids=["hop0", "hop1"])
def test_functions_run_forward_and_backward_without_values(clock, causal, first_hop):
    q, k, v = (torch.randn(2, H, N, 4, device="meta", requires_grad=True) for _ in range(3))
    time = torch.ones(H, 1, device="meta", requires_grad=True)
    for t in (0.0, 2.0, time):
        for mask in (None, torch.ones(2, 1, 1, N, dtype=torch.bool, device="meta")):
            found = la.lie_attention(q, k, v, mask, is_causal=causal, time=t, clock=clock, first_hop=first_hop)
            assert found.shape == v.shape
            found.sum().backward()
    assert la.transition_matrix(la.SoftmaxGenerator(q, k), time, clock=clock).shape == (2, H, N, N)


@pytest.mark.parametrize(
    "options", [{"kdim": 3}, {"vdim": 3}, {"add_bias_kv": True}, {"add_zero_attn": True}, {}], ids=str
)
def test_the_drop_in_is_made_on_meta_with_every_option(options):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # add_bias_kv and add_zero_attn stay softmax
        module = LieMultiheadAttention(C, H, device="meta", **options)
    assert all(p.is_meta for p in module.parameters())
