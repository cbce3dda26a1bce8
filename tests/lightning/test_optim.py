"""One optimizer for every variant: AdamW step for step on free parameters, Riemannian Adam on manifolds."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import geoopt
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liegroup_attn.errors import DtypeError
from liegroup_attn.lightning import LanguageModel, RiemannianAdamW, RiemannianSGD, build_optimizer, warmup_cosine
from liegroup_attn.lightning.guard import checked
from liegroup_attn.manifolds import (
    ManifoldParameter,
    ManifoldTensor,
    OpenInterval,
    RateMatrices,
    SpecialOrthogonal,
    hold,
)
from liegroup_attn.nn import LieAttention, Transformer


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range, schedule=None) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 5, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(module(x), torch.randint(3, (4,), generator=generator)).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


# AdamW on free parameters


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95)])
@pytest.mark.parametrize("rate", [1e-3, 3e-2])
def test_on_free_parameters_it_is_adamw(decay, betas, rate):
    ours, theirs = net(), net()
    one = RiemannianAdamW(ours.parameters(), lr=rate, betas=betas, decay=decay)
    two = torch.optim.AdamW(theirs.parameters(), lr=rate, betas=betas, weight_decay=decay)
    for step in range(50):
        train(ours, one, range(step, step + 1))
        train(theirs, two, range(step, step + 1))
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (RiemannianAdamW, partial(torch.optim.AdamW, weight_decay=0.0)),
        (partial(RiemannianAdamW, decay=0.1), partial(torch.optim.AdamW, weight_decay=0.1)),
        (RiemannianSGD, torch.optim.SGD),
        (partial(RiemannianSGD, momentum=0.9), partial(torch.optim.SGD, momentum=0.9)),
    ],
)
def test_free_complex_parameters_too(ours, theirs):
    start = torch.randn(3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    one, two = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    for parameter, optimizer in ((one, ours([one], lr=0.1)), (two, theirs([two], lr=0.1))):
        for _ in range(5):
            optimizer.zero_grad()
            (parameter - 1j).abs().square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(one, two, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("manifold", [geoopt.manifolds.UpperHalf, geoopt.manifolds.BoundedDomain])
@pytest.mark.parametrize("new", [RiemannianAdamW, RiemannianSGD])
def test_complex_points_are_refused_for_what_they_are(manifold, new):
    point = ManifoldParameter(manifold(rank=2).random(2, 2), manifold=manifold(rank=2))
    before = point.detach().clone()
    point.abs().square().sum().backward()
    with pytest.raises(
        DtypeError, match=r"params: expected real points, got complex ones .*; give them an optimizer of geoopt"
    ):
        new([point], lr=0.1).step()
    assert torch.equal(point, before)
    theirs = geoopt.optim.RiemannianAdam([point], lr=1e-3)  # the remedy, under a guard as well
    theirs.step()
    assert list(checked(nn.ParameterDict({"point": point}), [theirs])) == ["point"]


def test_decay_is_not_geoopts_penalty():
    ours, theirs = net(), net()
    train(ours, RiemannianAdamW(ours.parameters(), lr=1e-2, decay=0.1), range(20))
    train(theirs, geoopt.optim.RiemannianAdam(theirs.parameters(), lr=1e-2, weight_decay=0.1), range(20))
    assert (ours[0].weight - theirs[0].weight).abs().max() > 1e-3


def test_both_kinds_of_optimizer_take_the_same_steps_in_a_model():
    """A variant with manifold parameters and one without: equal gradients give equal steps."""
    lie, softmax = (Transformer(8, 2, 2, recipe) for recipe in ({"module": "LieAttention"}, None))
    softmax.load_state_dict(lie.state_dict(), strict=False)
    optimizers = [build_optimizer(m, 1e-2, 0.1) for m in (lie, softmax)]
    assert [type(o) for o in optimizers] == [RiemannianAdamW, torch.optim.AdamW]
    others = dict(lie.named_parameters())
    for step in range(20):
        for name, parameter in softmax.named_parameters():
            generator = torch.Generator().manual_seed(step)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            others[name].grad = parameter.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for name, parameter in softmax.named_parameters():
        torch.testing.assert_close(others[name], parameter, atol=1e-6, rtol=1e-6)


def test_a_closure_is_called_once_with_gradients():
    module, calls = net(), []
    optimizer = RiemannianAdamW(module.parameters(), lr=1e-2, decay=0.1)

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        loss = module(torch.ones(2, 5)).square().sum()
        loss.backward()
        return loss

    before = module[0].weight.detach().clone()
    assert optimizer.step(closure) > 0
    assert calls == [True]
    assert not torch.equal(module[0].weight, before)


def test_parameters_without_a_gradient_stay():
    parameter = nn.Parameter(torch.ones(2, 2))
    RiemannianAdamW([parameter], lr=1.0, decay=0.5).step()
    assert torch.equal(parameter, torch.ones(2, 2))


# SGD

SGDS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampened": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.8, "nesterov": True},
}
sgds = pytest.mark.parametrize("options", SGDS.values(), ids=SGDS)


@sgds
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_on_free_parameters_it_is_sgd_with_decoupled_decay(options, decay):
    ours, theirs = net(), net()
    one = RiemannianSGD(ours.parameters(), lr=0.1, decay=decay, **options)
    two = torch.optim.SGD(theirs.parameters(), lr=0.1, **options)
    for step in range(50):
        train(ours, one, range(step, step + 1))
        old = [p.detach().clone() for p in theirs.parameters()]
        train(theirs, two, range(step, step + 1))
        with torch.no_grad():  # torch's SGD has no decoupled decay: it shrinks the parameter before the step
            for p, before in zip(theirs.parameters(), old, strict=True):
                p.sub_(0.1 * decay * before)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


@sgds
def test_on_a_manifold_it_is_sgd_in_the_chart(options):
    """On an isometric line the Riemannian gradient is the chart's, momentum is carried along unchanged."""
    line = OpenInterval(4.0)
    start = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    point, phi = ManifoldParameter(start.clone(), manifold=line), nn.Parameter(line.chart(start))
    one, two = RiemannianSGD([point], lr=0.05, **options), torch.optim.SGD([phi], lr=0.05, **options)
    best = torch.tensor([3.0, 0.1, 1.0], dtype=torch.float64)
    for _ in range(50):
        for optimizer, x in ((one, point), (two, phi)):
            optimizer.zero_grad()
            ((x if x is point else line.from_chart(x)) - best).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(line.chart(point).detach(), phi.detach(), atol=1e-8, rtol=0)


@sgds
def test_on_a_sphere_it_finds_an_eigenvector(options):
    matrix = torch.diag(torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64))
    x = ManifoldParameter(torch.full((3,), 3**-0.5, dtype=torch.float64), manifold=geoopt.Sphere())
    optimizer = RiemannianSGD([x], lr=0.05, **options)
    for _ in range(300):
        optimizer.zero_grad()
        (-(x @ matrix @ x)).backward()
        optimizer.step()
    torch.testing.assert_close(x.detach().abs(), torch.tensor([1.0, 0, 0], dtype=torch.float64), atol=1e-5, rtol=0)


def test_momentum_does_not_overflow():
    """As a tangent vector it would: carried from a rate of 1e19 to one of 1e-19."""
    point = ManifoldParameter(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]), manifold=RateMatrices(2))
    optimizer = RiemannianSGD([point], lr=1.0, momentum=0.9)
    for size in (-50.0, 50.0) * 3:
        point.grad = torch.tensor([[0.0, size], [0.0, 0.0]])
        optimizer.step()
        assert optimizer.state[point]["momentum_buffer"].isfinite().all()
        assert point.manifold.check_point_on_manifold(point)


@sgds
def test_a_loaded_sgd_continues_bitwise(options):
    whole = net()
    optimizer = RiemannianSGD(whole.parameters(), lr=0.1, decay=0.1, stabilize=3, **options)
    train(whole, optimizer, range(7))
    file = io.BytesIO()
    torch.save([whole.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    train(whole, optimizer, range(7, 20))
    resumed, states = net(), torch.load(file, weights_only=True)
    second = RiemannianSGD(resumed.parameters())
    resumed.load_state_dict(states[0])
    second.load_state_dict(states[1])
    train(resumed, second, range(7, 20))
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


# what geoopt would ignore

IGNORED = {
    "maximize": (True, "negate the loss"),
    "foreach": (True, "leave it out"),
    "fused": (True, "leave it out"),
    "capturable": (True, "leave it out"),
    "differentiable": (True, "leave it out"),
    "decoupled_weight_decay": (True, "use decay"),
    "weight_decay": (0.1, "use decay"),
}


@pytest.mark.parametrize("cls", [RiemannianAdamW, RiemannianSGD])
@pytest.mark.parametrize("option", IGNORED)
def test_ignored_options_are_refused_by_name(cls, option):
    value, remedy = IGNORED[option]
    message = rf"{option}: expected it off, got {value}; .*{remedy}"
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        cls([parameter], **{option: value})
    with pytest.raises(ValueError, match=message):
        cls([{"params": [parameter], option: value}])
    optimizer = cls([parameter])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], option: value})
    state = optimizer.state_dict()
    state["param_groups"][0][option] = value
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("cls", [RiemannianAdamW, RiemannianSGD])
def test_the_state_of_another_optimizer_is_refused(cls):
    module = net()
    other = torch.optim.AdamW(module.parameters(), weight_decay=0.0)
    with pytest.raises(ValueError, match=rf"state_dict: expected the groups of {cls.__name__}, got some without decay"):
        cls(module.parameters()).load_state_dict(other.state_dict())
    other, option = (RiemannianSGD, "betas") if cls is RiemannianAdamW else (RiemannianAdamW, "momentum")
    with pytest.raises(ValueError, match=f"got some without {option}; it is the state of another optimizer"):
        cls(module.parameters()).load_state_dict(other(module.parameters()).state_dict())


WRONG = {
    "stabilize": (0, r"stabilize: expected a number of steps ≥ 1 or None, got 0; None never projects"),
    "decay": (-1.0, r"decay: expected a number ≥ 0, got -1.0; 0 is no decay"),
    "decay on a manifold": (0.1, r"decay: expected 0 for parameters on a manifold, got 0.1; put them"),
}


@pytest.mark.parametrize("cls", [RiemannianAdamW, RiemannianSGD])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_refused_and_nothing_is_changed(cls, case):
    (value, message), option = WRONG[case], case.split()[0]

    def point() -> ManifoldParameter:
        return ManifoldParameter(torch.tensor([0.6, 0.8]), manifold=geoopt.Sphere())

    with pytest.raises(ValueError, match=message):
        cls([point()], **{option: value})
    optimizer = cls([point()])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": (p for p in [point()]), option: value})
    assert len(optimizer.param_groups) == 1
    state = optimizer.state_dict()
    state["param_groups"][0][option] = value
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0][option] != value


@pytest.mark.parametrize("cls", [RiemannianAdamW, RiemannianSGD])
def test_sparse_gradients_are_refused(cls):
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(
        ValueError, match=r"params: expected dense gradients, got one of layout torch\.sparse_coo; leave"
    ):
        cls(embedding.parameters()).step()


@pytest.mark.parametrize("cls", [RiemannianAdamW, RiemannianSGD])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float16, "16-true"), (torch.bfloat16, "bf16-true")])
def test_points_in_half_precision_are_refused(cls, dtype, precision):
    point = ManifoldParameter(torch.tensor([0.5, 0.5], dtype=dtype), manifold=OpenInterval(2.0))
    point.grad = torch.ones_like(point)
    with pytest.raises(DtypeError, match=rf'params: expected float32 or float64 .*ManifoldPrecision\("{precision}"'):
        cls([point]).step()


def test_an_option_that_nobody_has():
    parameter = nn.Parameter(torch.ones(2))
    for cls in (RiemannianAdamW, RiemannianSGD):
        with pytest.raises(TypeError, match="speed"):
            cls([parameter], speed=3)


@pytest.mark.parametrize("cls", [RiemannianAdamW, RiemannianSGD])
def test_a_compiled_step_is_refused(cls):
    """Compiled, geoopt's step forgets the manifolds and says nothing."""
    x = ManifoldParameter(torch.tensor([0.6, 0.8]), manifold=geoopt.Sphere())
    optimizer = cls([x], lr=0.1)
    x.grad = torch.tensor([1.0, 2.0])
    torch.compiler.reset()
    with pytest.raises(
        RuntimeError, match=r"expected a step that is not compiled, got torch\.compile.*compile the module"
    ):
        torch.compile(optimizer.step, backend="eager")()
    assert x.tolist() == pytest.approx([0.6, 0.8])
    optimizer.step()
    assert x.manifold.check_point_on_manifold(x)
    assert x.tolist() != pytest.approx([0.6, 0.8])


# manifolds


def test_on_a_manifold_it_is_adam_in_the_chart():
    """The interval is a line in its chart, and parallel transport there does nothing."""
    line = OpenInterval(4.0)
    start = torch.tensor([0.5, 2.0, 3.9], dtype=torch.float64)
    point, phi = ManifoldParameter(start.clone(), manifold=line), nn.Parameter(line.chart(start))
    one, two = RiemannianAdamW([point], lr=0.1), torch.optim.Adam([phi], lr=0.1)
    best = torch.tensor([3.0, 0.1, 1.0], dtype=torch.float64)
    for _ in range(50):
        for optimizer, x in ((one, point), (two, phi)):
            optimizer.zero_grad()
            ((x if x is point else line.from_chart(x)) - best).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(line.chart(point).detach(), phi.detach(), atol=1e-8, rtol=0)
    assert line.check_point_on_manifold(point)


def test_decay_on_a_manifold_is_refused():
    time, free = ManifoldParameter(torch.ones(2), manifold=OpenInterval(2.0)), nn.Parameter(torch.ones(2))
    message = r"decay: expected 0 for parameters on a manifold, got 0.1; put them in a group of their own"
    for arguments in ({"params": [time, free], "decay": 0.1}, {"params": [{"params": [time], "decay": 0.1}]}):
        with pytest.raises(ValueError, match=message):
            RiemannianAdamW(**arguments)
    RiemannianAdamW([{"params": [time], "decay": 0.0}, {"params": [free]}], decay=0.1)


@pytest.mark.parametrize("cls", [RiemannianAdamW, partial(RiemannianSGD, momentum=0.9)])
def test_a_tensor_on_a_manifold_is_a_point_too(cls):
    """geoopt's ManifoldTensor is no parameter of a module, but an optimizer may hold one."""
    ends = []
    for kind in (ManifoldParameter, partial(ManifoldTensor, requires_grad=True)):
        point = kind(torch.tensor([[-1.0, 1.0], [2.0, -2.0]]), manifold=RateMatrices(2))
        optimizer = cls([point], lr=0.1)
        for _ in range(6):
            point.grad = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
            optimizer.step()
        with pytest.raises(ValueError, match=r"decay: expected 0 for parameters on a manifold, got 0.1"):
            cls([point], decay=0.1)
        ends.append(point.detach().as_subclass(torch.Tensor))
    assert torch.equal(*ends)
    assert RateMatrices(2).check_point_on_manifold(ends[1])


@pytest.mark.parametrize("cls", [partial(RiemannianAdamW, lr=0.01), partial(RiemannianSGD, lr=0.1, momentum=0.9)])
@pytest.mark.parametrize("stabilize", [1, 5, 10])
def test_projections_leave_momentum_alone(cls, stabilize):
    """geoopt's would double part of it on the canonical Stiefel manifold: every fifth step was enough to diverge."""
    torch.manual_seed(0)
    target = torch.linalg.qr(torch.randn(5, 3, dtype=torch.float64)).Q
    ends = []
    for every in (stabilize, None):
        frame = ManifoldParameter(torch.eye(5, dtype=torch.float64)[:, :3].clone(), manifold=geoopt.Stiefel())
        optimizer = cls([frame], stabilize=every)
        for _ in range(200):
            optimizer.zero_grad()
            (frame * target).sum().neg().backward()
            optimizer.step()
        ends.append(frame.detach())
    torch.testing.assert_close(*ends, atol=1e-9, rtol=0)


CURVED = {"sphere": geoopt.Sphere(), "stiefel": geoopt.Stiefel(canonical=False), "rotations": SpecialOrthogonal(4)}


@pytest.mark.parametrize("cls", [partial(RiemannianAdamW, lr=0.3), partial(RiemannianSGD, lr=0.3, momentum=0.9)])
@pytest.mark.parametrize("manifold", CURVED.values(), ids=CURVED)
def test_momentum_goes_with_the_point(cls, manifold):
    """It is a direction from where the point has come to, no longer from where it was."""
    start = manifold.random(4, 4, dtype=torch.float64)
    point = ManifoldParameter(start.clone(), manifold=manifold)
    optimizer = cls([point], stabilize=None)
    point.grad = torch.randn(4, 4, dtype=torch.float64)
    before = manifold.egrad2rgrad(start, point.grad)
    optimizer.step()
    (momentum,) = (
        optimizer.state[point][name] for name in ("exp_avg", "momentum_buffer") if name in optimizer.state[point]
    )
    assert momentum.abs().max() > 0.01
    assert manifold.check_vector_on_tangent(point, momentum, atol=1e-9, rtol=1e-9)
    assert manifold.check_vector_on_tangent(start, before, atol=1e-9, rtol=1e-9)
    assert not manifold.check_vector_on_tangent(point, before, atol=1e-3, rtol=1e-3)


# groups


class Everything(nn.Module):
    def __init__(self, lie: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.attention = LieAttention(8, 2, bias=True) if lie else nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_groups():
    module = Everything(lie=True)
    optimizer = build_optimizer(module, 3e-3, 0.1)
    names = {id(p): name for name, p in module.named_parameters()}
    decays = {names[id(p)]: group["decay"] for group in optimizer.param_groups for p in group["params"]}
    decayed = {name for name, decay in decays.items() if decay}
    projections = {f"attention.{p}_proj.weight" for p in ("q", "k", "v", "out")}
    assert decayed == projections | {"attention.flow.rate_weight"}
    assert {decays[name] for name in decayed} == {0.1}
    assert set(decays) == {name for name, p in module.named_parameters() if p.requires_grad}
    assert type(optimizer) is RiemannianAdamW
    assert {group["lr"] for group in optimizer.param_groups} == {3e-3}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    on_manifold = [g for g in optimizer.param_groups if any(isinstance(p, ManifoldParameter) for p in g["params"])]
    assert [len(g["params"]) for g in on_manifold] == [1]

    plain = build_optimizer(Everything(lie=False), 3e-3, 0.1)
    assert type(plain) is torch.optim.AdamW
    assert [(len(g["params"]), g["weight_decay"]) for g in plain.param_groups] == [(1, 0.1), (4, 0.0)]


def test_a_model_has_every_parameter_once():
    model = LanguageModel({"module": "LieAttention"}, width=8, depth=2, num_heads=2)
    held = [id(p) for g in build_optimizer(model, 1e-3, 0.1).param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    tied = LanguageModel({"module": "LieAttention"}, width=8, depth=1, num_heads=2)
    tied.head.weight = tied.embedding.weight
    groups = build_optimizer(tied, 1e-3, 0.1).param_groups
    assert not any(g["decay"] for g in groups if any(p is tied.embedding.weight for p in g["params"]))


@pytest.mark.parametrize(
    "cls", [RiemannianSGD, partial(RiemannianSGD, momentum=0.9), partial(RiemannianAdamW, eps=1e-6)]
)
@pytest.mark.parametrize("lie", [True, False])
def test_an_optimizer_of_choice(cls, lie):
    optimizer = build_optimizer(Everything(lie), 3e-3, 0.1, optimizer=cls)
    assert type(optimizer) is getattr(cls, "func", cls)
    assert {group["lr"] for group in optimizer.param_groups} == {3e-3}
    assert [group["decay"] for group in optimizer.param_groups] == [0.1, 0.0, *([0.0] if lie else [])]
    for key, value in getattr(cls, "keywords", {}).items():
        assert {group[key] for group in optimizer.param_groups} == {value}


def test_only_our_optimizers_may_be_chosen():
    with pytest.raises(ValueError, match="optimizer: expected RiemannianSGD or RiemannianAdamW, got SGD; others know"):
        build_optimizer(Everything(lie=True), 1e-3, optimizer=torch.optim.SGD)


def test_a_learning_rate_for_manifolds():
    groups = build_optimizer(Everything(lie=True), 3e-3, manifold_learning_rate=0.5).param_groups
    assert [group["lr"] for group in groups] == [3e-3, 3e-3, 0.5]
    assert isinstance(groups[-1]["params"][0], ManifoldParameter)
    assert {g["lr"] for g in build_optimizer(Everything(lie=False), 3e-3, manifold_learning_rate=0.5).param_groups} == {
        3e-3
    }
    module = Everything(lie=True)
    start, optimizer = (
        module.attention.flow.time.detach().clone(),
        build_optimizer(module, 3e-3, manifold_learning_rate=0.0),
    )
    module.attention(torch.randn(1, 3, 8)).sum().backward()
    optimizer.step()
    assert module.attention.flow.time.grad.any()
    assert torch.equal(module.attention.flow.time, start)  # 0 keeps points as they are
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match="manifold_learning_rate: expected a number ≥ 0, got"):
            build_optimizer(net(), 1e-3, manifold_learning_rate=wrong)


def test_declared_parameters_that_became_plain_are_found():
    module = nn.Module()
    hold(module, "frame", torch.eye(3)[:, :2], geoopt.Stiefel())
    module.frame = nn.Parameter(module.frame.detach())
    optimizer = build_optimizer(module, 0.1, 0.5)
    assert type(optimizer) is RiemannianAdamW
    assert optimizer.param_groups[0]["params"][0] is module.frame
    module.frame.grad = torch.ones(3, 2)
    optimizer.step()
    assert module.frame.manifold.check_point_on_manifold(module.frame)


# state


@pytest.mark.parametrize("lie", [True, False])
def test_a_loaded_state_continues_bitwise(lie):
    def new() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        module = net()
        if lie:
            module.time = ManifoldParameter(torch.tensor([0.3, 1.7]), manifold=OpenInterval(2.0))
            forward = module.forward
            module.forward = lambda x: forward(x) * module.time.sum()
        optimizer = build_optimizer(module, 1e-2, 0.1)
        return module, optimizer, warmup_cosine(optimizer, 5, 50)

    whole, optimizer, schedule = new()
    train(whole, optimizer, range(13), schedule)
    file = io.BytesIO()
    torch.save([whole.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    train(whole, optimizer, range(13, 40), schedule)

    states = torch.load(file, weights_only=True)
    resumed, second, again = new()
    for target, state in zip((resumed, second, again), states, strict=True):
        target.load_state_dict(state)
    if lie:
        assert {type(state["step"]) for state in second.state.values()} == {int}
    train(resumed, second, range(13, 40), again)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_loaded_state_dict_is_not_changed():
    module = net()
    optimizer = RiemannianAdamW(module.parameters(), lr=1e-2)
    train(module, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    RiemannianAdamW(module.parameters()).load_state_dict(state)
    assert state["state"][0]["step"] == 3
    assert torch.equal(state["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


class Earlier(NamedTuple):
    """An optimizer whose momenta once were tangent vectors."""

    new: Callable[..., torch.optim.Optimizer]
    momentum: str


EARLIER = {
    "Adam": Earlier(partial(RiemannianAdamW, lr=0.1), "exp_avg"),
    "SGD": Earlier(partial(RiemannianSGD, lr=0.01, momentum=0.9), "momentum_buffer"),
}


def points(new: Callable[..., torch.optim.Optimizer]) -> tuple[nn.ParameterDict, torch.optim.Optimizer]:
    """On a flat manifold, on another, and free."""
    generator = torch.Generator().manual_seed(0)
    rates = RateMatrices(3).projx(1 + torch.rand(3, 3, generator=generator, dtype=torch.float64))
    held = nn.ParameterDict({"free": nn.Parameter(torch.ones(2, dtype=torch.float64))})
    held["rates"] = ManifoldParameter(rates, manifold=RateMatrices(3))
    held["frame"] = ManifoldParameter(torch.eye(4, dtype=torch.float64)[:, :2].clone(), manifold=geoopt.Stiefel())
    return held, new(held.parameters())


def pull(held: nn.ParameterDict, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        sum((point - torch.arange(point.numel()).view_as(point)).square().sum() for point in held.values()).backward()
        optimizer.step()


@pytest.mark.parametrize("case", EARLIER.values(), ids=EARLIER)
@pytest.mark.parametrize("marked", [True, False])
def test_momenta_that_were_tangent_vectors_are_converted(case, marked):
    (held, one), (again, two) = points(case.new), points(case.new)
    pull(held, one, 5)
    state = copy.deepcopy(one.state_dict())
    if not marked:
        for index, name in enumerate(held):
            if name == "rates":
                own = state["state"][index]
                own[case.momentum] = RateMatrices(3).lift(held["rates"].detach(), own[case.momentum].clone())
        for group in state["param_groups"]:
            del group["chart"]
    again.load_state_dict(held.state_dict())
    two.load_state_dict(state)
    assert all(group["chart"] for group in two.param_groups)
    for optimizer, module in ((one, held), (two, again)):
        pull(module, optimizer, 5)
    for name in held:
        torch.testing.assert_close(held[name].detach(), again[name].detach(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("case", EARLIER.values(), ids=EARLIER)
@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_continues_bitwise(case, way):
    held, optimizer = points(partial(case.new, stabilize=3))
    pull(held, optimizer, 5)
    again, second = way([held, optimizer])
    for module, own in ((held, optimizer), (again, second)):
        pull(module, own, 8)
        own.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        assert {group["stabilize"] for group in own.param_groups} == {3}
        assert {type(state["step"]) for state in own.state.values() if "step" in state} <= {int}
    for name in held:
        assert torch.equal(held[name], again[name]), name


# schedule

SCHEDULES = [
    # warm-up, total, floor, {step: factor}
    (4, 104, 0.1, {0: 1 / 5, 1: 2 / 5, 3: 4 / 5, 4: 1.0, 54: 0.55, 104: 0.1, 105: 0.1, 1000: 0.1}),
    (4, 104, 0.0, {4: 1.0, 29: (1 + math.sqrt(0.5)) / 2, 54: 0.5, 79: (1 - math.sqrt(0.5)) / 2, 104: 0.0}),
    (0, 10, 0.1, {0: 1.0, 5: 0.55, 10: 0.1}),
    (4, -1, 0.1, {0: 1 / 5, 4: 1.0, 1000: 1.0}),
    (4, math.inf, 0.1, {0: 1 / 5, 4: 1.0, 1000: 1.0}),
    (10, 5, 0.1, {0: 1 / 11, 9: 10 / 11, 10: 1.0, 11: 0.1}),  # shorter than its warm-up
]


@pytest.mark.parametrize(("warmup", "total", "floor", "expected"), SCHEDULES)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
def test_the_schedule(warmup, total, floor, expected):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup_cosine(optimizer, warmup, total, floor)
    rates = []
    for _ in range(max(expected) + 1):
        rates.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        schedule.step()
    for step, factor in expected.items():
        assert rates[step] == pytest.approx(factor, abs=1e-12), step
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_what_does_not_move_is_not_projected():
    """Projections round: a frozen point would drift."""
    frozen = ManifoldParameter(torch.linalg.qr(torch.randn(4, 2)).Q, manifold=geoopt.Stiefel(), requires_grad=False)
    moving = ManifoldParameter(torch.tensor([0.6, 0.8]), manifold=geoopt.Sphere())
    start, optimizer = frozen.detach().clone(), RiemannianAdamW([frozen, moving], lr=0.1, stabilize=1)
    for _ in range(20):
        moving.grad = torch.randn(2)
        optimizer.step()
    assert torch.equal(frozen, start)
