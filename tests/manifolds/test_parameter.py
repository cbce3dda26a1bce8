"""hold: a declared parameter is on its manifold after whatever replaces, loads or moves it."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import NamedTuple

import geoopt
import pytest
import torch
from torch import nn

from liegroup_attn.errors import DtypeError, GeneratorError, ShapeError
from liegroup_attn.lightning import build_optimizer
from liegroup_attn.manifolds import (
    DoublyBalancedRateMatrices,
    FlatRateMatrices,
    ManifoldParameter,
    ManifoldTensor,
    OpenInterval,
    PositiveVectors,
    RateMatrices,
    ReversibleRateMatrices,
    SpecialOrthogonal,
    StochasticMatrices,
    banded_support,
    block_support,
    causal_support,
    declared,
    hold,
    off_manifold,
    restore,
)


class Place(NamedTuple):
    """A manifold, a point on it, and one that is off by ``distance``."""

    manifold: geoopt.Manifold
    on: torch.Tensor
    off: torch.Tensor
    distance: float


# The projections by hand: 3/5 and 4/5 of the circle; the identity of 2I; the number of the same size.
PLACES = {
    "sphere": Place(geoopt.Sphere(), torch.tensor([0.6, 0.8]), torch.tensor([3.0, 4.0]), 3.2 / 4),
    "stiefel": Place(geoopt.Stiefel(), torch.eye(3)[:, :2], 2 * torch.eye(3)[:, :2], 1 / 2),
    "interval": Place(OpenInterval(4.0), torch.tensor([[1.0], [3.9]]), torch.tensor([[1.0], [-3.0]]), 2.0),
}
places = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


def holder(place: Place) -> nn.Module:
    """The parameter two levels down, beside a free one."""
    root = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Module()))
    hold(root[1][0], "point", place.on, place.manifold)
    return root


NAME = "1.0.point"


def assert_held(root: nn.Module, place: Place) -> None:
    """A ManifoldParameter on the declared manifold, and an optimizer moves it along it."""
    parameter = dict(root.named_parameters())[NAME]
    assert type(parameter) is ManifoldParameter
    assert parameter.requires_grad
    assert parameter.manifold is declared(root)[NAME]
    assert type(parameter.manifold) is type(place.manifold)
    assert parameter.manifold.check_point_on_manifold(parameter)
    before = parameter.detach().clone()
    parameter.grad = torch.randn(parameter.shape, dtype=parameter.dtype, generator=torch.Generator().manual_seed(0))
    build_optimizer(root, 0.1).step()
    assert parameter.manifold.check_point_on_manifold(parameter)
    assert not torch.equal(before, parameter)


@contextlib.contextmanager
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# registration


@places
def test_a_point_is_registered_as_it_is(place):
    with silent():
        root = holder(place)
    assert torch.equal(root[1][0].point, place.on)
    assert root[1][0].point.data_ptr() != place.on.data_ptr()
    assert list(declared(root)) == [NAME]
    assert [name for name, p in root.named_parameters() if isinstance(p, ManifoldParameter)] == [NAME]
    assert restore(root) == []
    assert_held(root, place)


@places
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_point_off_the_manifold_is_projected_and_says_how_far(place, dtype):
    module = nn.Module()
    with pytest.warns(UserWarning, match=rf"point: expected a point of .*, got one that is {place.distance:.2g} off"):
        hold(module, "point", place.off.to(dtype), place.manifold)
    assert module.point.dtype == dtype
    assert off_manifold(module.point, place.manifold) <= 2 * torch.finfo(dtype).eps


@places
def test_half_precision_rounding_is_no_news(place):
    with silent():
        hold(nn.Module(), "point", place.on.bfloat16(), place.manifold)


RATES = torch.tensor([[-1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
EDGES = {
    "rates": (RateMatrices(3), RATES, "leave the transition out of the support, or use FlatRateMatrices"),
    "reversible": (ReversibleRateMatrices(3), RATES, "start from a positive rate"),
    "balanced": (DoublyBalancedRateMatrices(3), RATES, "start from a positive rate"),
    "positive": (PositiveVectors(), torch.tensor([1.0, 0.0]), "start from a number inside"),
    "interval": (OpenInterval(4.0), torch.tensor([0.0, 4.0]), "start from a number inside"),
    "stochastic": (StochasticMatrices(), torch.tensor([[1.0, 0.0]]), "start from positive entries"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("edge", EDGES)
def test_zeros_that_no_step_would_move_are_told(edge, dtype):
    """Next to nothing away from a point of the manifold, but never to leave."""
    manifold, point, remedy = EDGES[edge]
    module = nn.Module()
    with pytest.warns(UserWarning, match=f"x: expected a point of .* off; it was projected, .*: .*{remedy}"):
        hold(module, "x", point.to(dtype), manifold)
    assert dtype == torch.bfloat16 or manifold.check_point_on_manifold(module.x)
    with pytest.warns(UserWarning, match=f"x: .*{remedy}"):
        module.load_state_dict({"x": point.to(dtype)})
    with silent():
        hold(nn.Module(), "x", RATES, FlatRateMatrices(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("assign", [False, True])
def test_what_was_trained_loads_in_silence(edge, dtype, assign):
    manifold, point, _ = EDGES[edge]
    shape = (2, 3, 3) if point.shape == (3, 3) else (2, *point.shape)
    module = nn.Module()
    torch.manual_seed(0)
    with silent():
        hold(module, "x", manifold.random(*shape), manifold)
        module.load_state_dict({"x": module.x.detach().to(dtype)}, assign=assign)


@places
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_none_are_refused(place, bad):
    point = place.on.clone()
    point.view(-1)[1] = bad
    with pytest.raises(GeneratorError, match="point: expected finite entries, got NaN or inf; start from"):
        hold(nn.Module(), "point", point, place.manifold)


def test_wrong_shapes_and_dtypes_are_refused():
    with pytest.raises(ShapeError, match=r"frame: expected a point of Stiefel.*, got shape \(2, 3\): .*; put the"):
        hold(nn.Module(), "frame", torch.ones(2, 3), geoopt.Stiefel())
    with pytest.raises(ShapeError, match=r"axis: expected a point of Sphere.*, got shape \(\)"):
        hold(nn.Module(), "axis", torch.ones(()), geoopt.Sphere())
    with pytest.raises(DtypeError, match="axis: expected a floating-point tensor"):
        hold(nn.Module(), "axis", torch.ones(3, dtype=torch.long), geoopt.Sphere())


def test_several_parameters_and_one_that_is_held_anew():
    module = nn.Linear(2, 2)
    hold(module, "weight", torch.eye(2), geoopt.Stiefel())
    hold(module, "time", torch.ones(3), OpenInterval(2.0))
    hold(module, "time", torch.ones(3), OpenInterval(8.0))
    found = declared(module)
    assert list(found) == ["weight", "time"]
    assert found["time"].upper == 8.0
    assert len(module._load_state_dict_pre_hooks) == len(module._load_state_dict_post_hooks) == 1


# what copies, moves and converts


def through_pickle(root):
    return pickle.loads(pickle.dumps(root))


def through_torch_save(root):
    file = io.BytesIO()
    torch.save(root, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def reloaded(root, assign=False):
    file = io.BytesIO()
    torch.save(root.state_dict(), file)
    file.seek(0)
    new = copy.deepcopy(root)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(0.5)
    new.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    return new


def swapped(root):
    """What sharded and quantized models turn on."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return reloaded(root)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def on_meta(root):
    """Built without storage, then filled: the usual way for large models."""
    new = copy.deepcopy(root).to("meta")
    new.load_state_dict(root.state_dict(), assign=True)
    return new


def emptied(root):
    new = copy.deepcopy(root).to("meta").to_empty(device="cpu")
    new.load_state_dict(root.state_dict())
    return new


COPIES: dict[str, Callable] = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "torch.save": through_torch_save,
    "load": reloaded,
    "assign": lambda root: reloaded(root, assign=True),
    "swap": swapped,
    "to": lambda root: root.to(torch.float64).to("cpu").float(),
    "meta": on_meta,
    "to_empty": emptied,
    "deepcopy, assign": lambda root: reloaded(copy.deepcopy(root), assign=True),
    "pickle, assign": lambda root: reloaded(through_pickle(root), assign=True),
}


@places
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_it_survives(place, copied):
    root = holder(place)
    with silent():
        new = copied(root)
    for name, value in root.state_dict().items():
        assert torch.equal(new.state_dict()[name], value), name
    assert_held(new, place)


@places
def test_a_copy_has_a_declaration_of_its_own(place):
    root = holder(place)
    new = copy.deepcopy(root)
    hold(new[1][0], "another", torch.ones(2), OpenInterval(2.0))
    assert list(declared(root)) == [NAME]
    off = {name: value * 5 for name, value in new.state_dict().items()}
    with pytest.warns(UserWarning, match="off; it was projected"):
        new.load_state_dict(off)
    assert torch.equal(root[1][0].point, place.on)


def test_built_on_the_meta_device():
    with torch.device("meta"):
        module = nn.Module()
        hold(module, "axis", torch.ones(3), geoopt.Sphere())
    assert type(module.axis) is ManifoldParameter
    module.load_state_dict({"axis": torch.tensor([0.0, 0.6, 0.8])}, assign=True)
    assert type(module.axis) is ManifoldParameter
    assert module.axis.tolist() == pytest.approx([0.0, 0.6, 0.8])


META = {
    "rates": lambda: RateMatrices(3),
    "causal": lambda: RateMatrices(3, causal_support(3)),
    "banded": lambda: FlatRateMatrices(3, banded_support(3, 1)),
    "blocks": lambda: ReversibleRateMatrices(3, block_support([2, 1])),
    "reversible": lambda: ReversibleRateMatrices(3),
    "balanced": lambda: DoublyBalancedRateMatrices(3),
    "flat": lambda: FlatRateMatrices(3),
    "stochastic": StochasticMatrices,
    "positive": PositiveVectors,
    "interval": lambda: OpenInterval(2.0),
    "rotations": lambda: SpecialOrthogonal(3),
}


@pytest.mark.parametrize("family", META)
def test_families_are_built_on_the_meta_device(family):
    with torch.device("meta"):
        module = nn.Module()
        manifold = META[family]()
        hold(module, "Q", torch.empty(3, 3), manifold)
        assert manifold.projx(torch.empty(2, 3, 3)).is_meta
    assert module.Q.is_meta
    point = META[family]().random(3, 3)
    module.to_empty(device="cpu").load_state_dict({"Q": point})
    assert restore(module) in ([], ["Q"])
    assert type(module.Q) is ManifoldParameter
    assert torch.equal(module.Q, point)
    step = torch.zeros_like(module.Q).detach()
    torch.testing.assert_close(module.Q.manifold.retr(module.Q.detach(), step), point.as_subclass(torch.Tensor))


# what is loaded

loads = pytest.mark.parametrize("assign", [False, True])


@places
@loads
def test_loaded_values_off_the_manifold_are_projected_with_a_warning(place, assign):
    root = holder(place)
    state = {**root.state_dict(), NAME: place.off}
    with pytest.warns(UserWarning, match=rf"{NAME}: expected a point of .*, got one that is {place.distance:.2g} off"):
        root.load_state_dict(state, assign=assign)
    torch.testing.assert_close(root[1][0].point.detach(), place.manifold.projx(place.off))
    assert torch.equal(state[NAME], place.off)
    assert_held(root, place)


@places
@loads
def test_loaded_rounding_is_silent(place, assign):
    root = holder(place)
    with silent():
        root.load_state_dict({name: v.bfloat16() for name, v in root.state_dict().items()}, assign=assign)
    assert off_manifold(root[1][0].point, place.manifold) <= (2**-7 if assign else 1e-6)


def test_loaded_whole_numbers():
    root = holder(PLACES["sphere"])
    with pytest.warns(UserWarning, match="one that is 0.75 off"):
        root.load_state_dict({**root.state_dict(), NAME: torch.tensor([0, 4])})
    assert root[1][0].point.tolist() == [0.0, 1.0]


@places
@loads
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_loaded_nan_is_refused(place, assign, bad):
    root = holder(place)
    state = root.state_dict()
    state[NAME] = torch.full_like(place.on, bad)
    with pytest.raises(RuntimeError, match=f"{NAME}: expected finite values, got NaN or inf; take a checkpoint from"):
        root.load_state_dict(state, assign=assign)
    assert torch.equal(root[1][0].point, place.on)


def test_other_faults_are_torchs():
    root = holder(PLACES["sphere"])
    with pytest.raises(RuntimeError, match=f"size mismatch for {NAME}"):
        root.load_state_dict({**root.state_dict(), NAME: torch.ones(3)})
    with pytest.raises(RuntimeError, match=f'Missing key.*"{NAME}"'):
        root.load_state_dict(nn.Sequential(nn.Linear(2, 2)).state_dict())
    with pytest.raises(RuntimeError, match=r"expected torch\.Tensor"):
        root.load_state_dict({**root.state_dict(), NAME: [0.6, 0.8]})


@places
@loads
def test_tensors_of_other_manifolds_are_numbers_like_others(place, assign):
    root = holder(place)
    state = {**root.state_dict(), NAME: ManifoldTensor(place.off.clone(), manifold=geoopt.Euclidean())}
    with pytest.warns(UserWarning, match=rf"{NAME}: expected a point of .*, got one that is {place.distance:.2g} off"):
        root.load_state_dict(state, assign=assign)
    assert_held(root, place)
    point = place.manifold.random(*place.on.shape)
    with silent():
        root.load_state_dict({**root.state_dict(), NAME: point}, assign=assign)
    assert torch.equal(root[1][0].point, point)
    assert_held(root, place)


def test_a_parameter_of_another_manifold_leaves_it_behind():
    """state_dict(keep_vars=True) holds parameters themselves."""
    other, root = nn.Module(), nn.Module()
    hold(other, "x", torch.tensor([0.6, 0.8]), OpenInterval(1.0))
    hold(root, "x", torch.tensor([1.0, 0.0]), geoopt.Sphere())
    root.load_state_dict(other.state_dict(keep_vars=True), assign=True)
    assert isinstance(root.x.manifold, geoopt.Sphere)
    assert isinstance(other.x.manifold, OpenInterval)


# what restore mends


def overwritten(root):
    root[1][0].point = nn.Parameter(root[1][0].point.detach())


def emptied_only(root):
    root.to("meta").to_empty(device="cpu")
    root[1][0].point.data.fill_(0.5)


def converted_with_a_flag(root):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        root.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@places
@pytest.mark.parametrize("spoil", [overwritten, emptied_only, converted_with_a_flag])
def test_restore_mends_in_place(place, spoil):
    root = holder(place)
    spoil(root)
    plain = root[1][0].point
    assert type(plain) is nn.Parameter
    assert restore(root) == [NAME]
    assert restore(root) == []
    assert root[1][0].point is plain
    assert type(plain) is ManifoldParameter
    assert plain.manifold is declared(root)[NAME]


def test_restore_refuses_what_it_cannot_mend():
    root = holder(PLACES["sphere"])
    root[1][0].point = None
    with pytest.raises(GeneratorError, match=f"{NAME}: expected a parameter on Sphere manifold, got NoneType; keep it"):
        restore(root)


def test_nothing_declared():
    assert declared(nn.Linear(2, 2)) == {}
    assert restore(nn.Linear(2, 2)) == []


# distance


@places
def test_the_distance(place):
    assert float(off_manifold(place.on, place.manifold)) <= 1e-7
    assert float(off_manifold(place.off, place.manifold)) == pytest.approx(place.distance)
    assert off_manifold(place.off.double(), place.manifold).dtype == torch.float64
    half = off_manifold(place.off.bfloat16(), place.manifold)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(place.distance, rel=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(off_manifold(place.off, place.manifold)) == pytest.approx(place.distance)
    assert off_manifold(torch.full_like(place.on, math.nan), place.manifold).isnan()


def test_the_distance_of_nothing():
    assert off_manifold(torch.ones(0, 3, 2), geoopt.Stiefel()) == 0
