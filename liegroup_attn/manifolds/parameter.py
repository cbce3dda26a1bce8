"""Parameters that stay on their manifold, whatever is loaded into their module."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import geoopt
import torch
from geoopt import ManifoldParameter
from torch import Tensor, nn

from liegroup_attn.checks import check_shape
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.manifolds.checks import off_manifold
from liegroup_attn.tensors import without_autocast

__all__ = ["declared", "hold", "restore"]

_DECLARED = "_declared_manifolds"  # in a module's __dict__: name of the parameter → manifold
_TOLERANCE = 1e-5  # geoopt's


def hold(module: nn.Module, name: str, point: Tensor, manifold: geoopt.Manifold) -> ManifoldParameter:
    """Register a parameter of a module that lives on a manifold, and declare it on the module.

    The declaration outlives what turns a ManifoldParameter into a plain one: after ``load_state_dict``, also with
    ``assign=True``, the parameter is on its manifold again, and ``restore`` mends the rest. Loaded values that are off the
    manifold are projected, with a warning unless rounding explains it; NaN is refused. A zero where the manifold is open
    is off it, however near: from there no step would move it.

    Args:
        module: gets the parameter.
        name: of the parameter in the module; a parameter of this name is replaced.
        point: (..., the manifold's dimensions), the initial value; copied. Off the manifold it is projected with a
            warning. A meta tensor is taken as it is.
        manifold: on which it lives.

    Returns:
        The parameter.

    Raises:
        DtypeError: the point is not floating point.
        ShapeError: the manifold has no points of this shape.
        GeneratorError: NaN or inf.

    Example:
        >>> module = nn.Module()
        >>> axis = hold(module, "axis", torch.tensor([0.6, 0.8]), geoopt.Sphere())
        >>> axis is module.axis, type(axis).__name__
        (True, 'ManifoldParameter')
        >>> declared(module)
        {'axis': Sphere manifold}

    Source: [Kochurov2020]_.
    """
    check_shape(name, point, least_rank=0, remedy="give a point of the manifold")
    fits, reason = manifold.check_point(point, explain=True)
    if not fits:
        raise ShapeError(
            f"{name}: expected a point of {manifold}, got shape {tuple(point.shape)}: {reason}; put the manifold's "
            "dimensions last"
        )
    point = point.detach().clone(memory_format=torch.contiguous_format)
    if not point.is_meta:
        if not bool(torch.isfinite(point).all()):
            raise GeneratorError(f"{name}: expected finite entries, got NaN or inf; start from a point of {manifold}")
        point = _settle(name, point, manifold).to(point.dtype)
    parameter = _as_manifold_parameter(nn.Parameter(point), manifold)
    module.register_parameter(name, parameter)
    if _DECLARED not in module.__dict__:
        module.__dict__[_DECLARED] = {}
        module.register_load_state_dict_pre_hook(_settle_loaded)
        module.register_load_state_dict_post_hook(_restore_loaded)
    module.__dict__[_DECLARED][name] = manifold
    return parameter


def declared(module: nn.Module) -> dict[str, geoopt.Manifold]:
    """What ought to be on a manifold in a module and its submodules: full dotted name → manifold."""
    return {name: manifold for name, _, _, manifold in _declarations(module)}


def restore(module: nn.Module) -> list[str]:
    """Make declared parameters that have become plain ones ManifoldParameters again, in place.

    They are the same objects afterwards, so an optimizer that holds them sees their manifold. Values are left alone.

    Args:
        module: with its submodules.

    Returns:
        The full names that were mended.

    Raises:
        GeneratorError: something else than a parameter of this process stands in the place of one, such as a DTensor.

    Example:
        >>> module = nn.Module()
        >>> axis = hold(module, "axis", torch.tensor([0.6, 0.8]), geoopt.Sphere())
        >>> module.axis = nn.Parameter(axis.detach())
        >>> restore(module), type(module.axis).__name__
        (['axis'], 'ManifoldParameter')
    """
    mended = []
    for name, owner, own, manifold in _declarations(module):
        parameter = owner._parameters.get(own)
        if isinstance(parameter, ManifoldParameter):
            continue
        if type(parameter) is not nn.Parameter:
            raise GeneratorError(
                f"{name}: expected a parameter on {manifold}, got {type(parameter).__name__}; keep it out of what "
                "shards or reparametrizes the module, for fully_shard with ignored_params"
            )
        _as_manifold_parameter(parameter, manifold)
        mended.append(name)
    return mended


def _declarations(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, geoopt.Manifold]]:
    """Full name, owner, name in the owner and manifold."""
    for prefix, owner in module.named_modules():
        for name, manifold in owner.__dict__.get(_DECLARED, {}).items():
            yield f"{prefix}.{name}" if prefix else name, owner, name, manifold


def _as_manifold_parameter(parameter: nn.Parameter, manifold: geoopt.Manifold) -> ManifoldParameter:
    # In place: whoever holds the parameter, an optimizer for one, goes on holding the one in the module.
    changed: Any = parameter
    changed.__class__ = ManifoldParameter
    changed.manifold = manifold
    return changed


@torch.no_grad()
def _settle(name: str, point: Tensor, manifold: geoopt.Manifold) -> Tensor:
    """The point, or its projection in at least float32; with a warning unless rounding of its dtype explains it.

    A zero rate is next to nothing away from a positive one, but no step would ever move it: it is not for the distance
    alone to decide.
    """
    wide = point.to(torch.promote_types(point.dtype, torch.float32))  # decompositions do not run in half precision
    distance = float(off_manifold(wide, manifold))
    if distance <= _TOLERANCE and manifold.check_point_on_manifold(wide):
        return point  # bit by bit, so that a resumed run is the uninterrupted one
    rounding = max(_TOLERANCE, 2 * torch.finfo(point.dtype).eps if point.is_floating_point() else 0.0)
    ok, reason = manifold.check_point_on_manifold(wide, explain=True, atol=rounding, rtol=rounding)
    if not ok or not distance <= rounding:
        because = "" if reason is None else f": {reason}"
        warnings.warn(
            f"{name}: expected a point of {manifold}, got one that is {distance:.2g} off; it was projected, look for "
            f"what moved it{because}",
            UserWarning,
            stacklevel=3,
        )
    with without_autocast(wide):
        return manifold.projx(wide)


def _has_values(loaded: Any) -> bool:
    """Whether a tensor's numbers are in its own memory: not in that of tensors it is made of, as a DTensor's."""
    # What holds its numbers elsewhere takes part in torch's dispatch.
    plain = isinstance(loaded, Tensor) and type(loaded).__torch_dispatch__ is Tensor.__torch_dispatch__
    return plain and not loaded.is_meta


def _settle_loaded(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    *messages: list[str],
) -> None:
    """Before values are loaded: put them on their manifolds, or refuse them and keep the parameter's own."""
    for name, manifold in module.__dict__[_DECLARED].items():
        key, own = prefix + name, module._parameters.get(name)
        loaded: Any = state_dict.get(key)
        if not _has_values(loaded):
            continue  # missing, without values, or no tensor of this process
        loaded = loaded.detach().as_subclass(Tensor)  # torch assigns no ManifoldTensor
        if own is None or loaded.shape != own.shape:
            continue  # torch refuses it
        if bool(torch.isfinite(loaded).all()):
            settled = _settle(key, loaded, manifold)
            state_dict[key] = settled.to(loaded.dtype) if metadata.get("assign_to_params_buffers") else settled
        else:
            messages[-1].append(
                f"{key}: expected finite values, got NaN or inf; take a checkpoint from before the run diverged"
            )
            state_dict[key] = own.detach()


def _restore_loaded(module: nn.Module, incompatible: Any) -> None:
    """After values are loaded: assign=True and swapping put plain parameters in the place of the others."""
    for name, manifold in module.__dict__[_DECLARED].items():
        parameter = module._parameters.get(name)
        if type(parameter) is nn.Parameter:
            _as_manifold_parameter(parameter, manifold)
