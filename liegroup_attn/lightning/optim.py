"""Riemannian Adam and SGD with decoupled decay; on free parameters they are torch's AdamW and SGD."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import geoopt
import torch
from torch import Tensor
from torch.optim import Optimizer

from liegroup_attn.lightning.refusals import check_group, check_step, refuse_compilation, refuse_ignored
from liegroup_attn.manifolds import FlatManifold, ManifoldTensor

__all__ = ["RiemannianAdamW", "RiemannianSGD", "is_riemannian"]

_EUCLIDEAN = geoopt.Euclidean()
_MOMENTA = {"exp_avg", "momentum_buffer"}


class _Decoupled(geoopt.optim.mixin.OptimMixin):
    """What both Riemannian optimizers share: decoupled decay, and refusing what geoopt would silently ignore."""

    _own: str  # an option that only this optimizer's groups have
    _ours: Mapping[str, Any] = {}  # defaults that torch's constructor does not know; a copy has them in its defaults
    _stabilize: int | None = None  # geoopt's, for the same

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see ``torch.optim.Optimizer.add_param_group``."""
        self.defaults.update(self._ours)
        refuse_ignored(self.defaults | param_group)
        param_group.setdefault("stabilize", self.defaults["stabilize"])
        super().add_param_group(param_group)
        try:
            check_group(param_group)  # after: torch makes a list of whatever the parameters come in
        except ValueError:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, a pickle or a loaded state: ``step`` is an integer, momenta on flat manifolds are chart vectors."""
        super().__setstate__(state)
        for group in self.param_groups:
            for point in group["params"]:
                own = self.state.get(point, {})
                if "step" in own:
                    own["step"] = int(own["step"])
                if "chart" not in group and isinstance(_manifold(point), FlatManifold):
                    own |= {name: _manifold(point).push(point.detach(), own[name]) for name in _MOMENTA & own.keys()}
            group["chart"] = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, so that a resumed run is bitwise the uninterrupted one.

        States of before momenta were chart vectors are converted, at the values of the parameters: load those first.
        """
        # Not strict: torch refuses another number of groups.
        for group, own in zip(state_dict["param_groups"], self.param_groups, strict=False):
            if missing := [name for name in ("decay", self._own) if name not in group]:
                raise ValueError(
                    f"state_dict: expected the groups of {type(self).__name__}, got some without {missing[0]}; it is the "
                    "state of another optimizer, load it there"
                )
            refuse_ignored(group)
            check_group(group | {"params": own["params"]})
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def stabilize_group(self, group: dict[str, Any]) -> None:
        """Project the points of a group that have a gradient; what does not move stays bit by bit.

        Momenta are left to the next transport: geoopt puts them through ``proju``, which on the canonical Stiefel
        manifold is no projection but doubles what of them lies in the span of the frame.
        """
        for point in group["params"]:
            if isinstance(point, ManifoldTensor) and point.grad is not None:
                point.proj_()

    def _begin(self, closure: Callable[[], Any] | None) -> Any:
        """The closure's loss, then decay."""
        if torch.compiler.is_compiling():
            refuse_compilation()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, _ in moving:
            check_step(parameter, parameter.grad)
        for parameter, group in moving:
            if group["decay"]:
                parameter.mul_(1 - group["lr"] * group["decay"])
        return loss


def _manifold(point: Tensor) -> geoopt.Manifold:
    return point.manifold if isinstance(point, ManifoldTensor) else _EUCLIDEAN


def _gradient(manifold: geoopt.Manifold, point: Tensor) -> Tensor:
    """In the chart of a flat manifold, which is an isometry, elsewhere the Riemannian one."""
    flat = isinstance(manifold, FlatManifold)
    return (manifold.chart_gradient if flat else manifold.egrad2rgrad)(point, point.grad)


def _go(manifold: geoopt.Manifold, point: Tensor, step: Tensor, momentum: Tensor | None = None) -> None:
    """Move a point, and its momentum with it; in a chart transport leaves momenta as they are. ``step`` is used up."""
    if isinstance(manifold, FlatManifold):
        point.copy_(manifold.move(point, step))
    elif momentum is None:
        point.copy_(manifold.retr(point, step))
    else:
        there, carried = manifold.retr_transp(point, step, momentum)
        point.copy_(there)
        momentum.copy_(carried)


class RiemannianAdamW(_Decoupled, geoopt.optim.RiemannianAdam):
    """Riemannian Adam with decoupled weight decay; on free parameters it is ``torch.optim.AdamW``.

    On a ``FlatManifold`` it is Adam in the chart, where its moments are kept; elsewhere a step is retracted and the
    first moment transported.

    geoopt's own ``weight_decay`` is an L2 penalty inside the gradient and it ignores ``decoupled_weight_decay``:
    comparing it with AdamW would compare two optimizers. It also reloads ``step`` as a float32 tensor.

    Args:
        params: parameters or groups; ``decay`` per group is the decoupled weight decay.
        lr: learning rate.
        betas: as in Adam.
        eps: as in Adam.
        decay: default decoupled weight decay; leave it 0 for parameters on a manifold.
        stabilize: project manifold parameters every so many steps, None never; in float32 rotations drift by some 1e-7 per step.
        **options: refused by name: ``amsgrad``, ``maximize``, ``foreach``, ``fused``, ``weight_decay`` …

    Raises:
        ValueError: decay negative, or on a parameter that lives on a manifold; stabilize < 1; an option that geoopt would
            ignore; in a step, a sparse gradient.
        DtypeError: in a step, a parameter on a manifold in half precision, or a complex one.

    Source: [Becigneul2019]_, [Loshchilov2019]_, [Kochurov2020]_.
    """

    _own = "betas"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decay: float = 0.0,
        stabilize: int | None = 5,
        **options: Any,
    ) -> None:
        refuse_ignored(options)
        self._ours = {"decay": decay, "stabilize": stabilize, "chart": True}
        super().__init__(params, lr=lr, betas=betas, eps=eps, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see ``torch.optim.Optimizer.step``."""
        loss = self._begin(closure)
        for group in self.param_groups:
            due = [self._move(point, group) for point in group["params"] if point.grad is not None]
            if group["stabilize"] is not None and any(steps % group["stabilize"] == 0 for steps in due):
                self.stabilize_group(group)
        return loss

    def _move(self, point: Tensor, group: dict[str, Any]) -> int:
        """One parameter, in place where it can be: beside temporaries the arithmetic is cheap. Gives its steps so far."""
        manifold, state, (beta1, beta2) = _manifold(point), self.state[point], group["betas"]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(point), "exp_avg_sq": torch.zeros_like(point)}
        state["step"] += 1
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        gradient = _gradient(manifold, point)
        flat = manifold if isinstance(manifold, FlatManifold) else None
        if point.is_complex():  # as torch does: two real numbers, each with its own size
            point, gradient, mean, square = map(torch.view_as_real, (point, gradient, mean, square))
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2)
        if flat and flat.by_entry:
            square.addcmul_(gradient, gradient, value=1 - beta2)
        else:
            squares = flat.chart_squares(gradient) if flat else manifold.component_inner(point, gradient)
            square.add_(squares, alpha=1 - beta2)
        # New memory costs more than the arithmetic, and a gradient by the chart is new and has done its duty.
        used_up = flat and gradient.data_ptr() != point.grad.data_ptr()  # type: ignore[union-attr]
        size = torch.div(square, 1 - beta2 ** state["step"], out=gradient if used_up else None)
        size.sqrt_().add_(group["eps"])
        step = torch.div(mean, size, out=size).mul_(-group["lr"] / (1 - beta1 ** state["step"]))
        _go(manifold, point, step, mean)
        return state["step"]


class RiemannianSGD(_Decoupled, geoopt.optim.RiemannianSGD):
    """Riemannian SGD with momentum and decoupled weight decay; on free parameters it is ``torch.optim.SGD``.

    Momentum is a chart vector on a ``FlatManifold``; elsewhere it is a tangent vector and transported along with the
    point. It starts as the first gradient, as in torch; geoopt's starts (1 + momentum − dampening) times as large, and with a Euclidean gradient.

    Args:
        params: parameters or groups; ``decay`` per group is the decoupled weight decay.
        lr: learning rate.
        momentum: factor of the old direction, ≥ 0.
        dampening: the new gradient enters with 1 − dampening.
        nesterov: look ahead; needs momentum and no dampening.
        decay: default decoupled weight decay; leave it 0 for parameters on a manifold.
        stabilize: project manifold parameters every so many steps, None never; in float32 rotations drift by some 1e-7 per step.
        **options: refused by name: ``maximize``, ``foreach``, ``fused``, ``differentiable``, ``weight_decay``.

    Raises:
        ValueError: decay negative, or on a parameter that lives on a manifold; stabilize < 1; an option that would be
            ignored; in a step, a sparse gradient.
        DtypeError: in a step, a parameter on a manifold in half precision, or a complex one.

    Example:
        >>> x = geoopt.ManifoldParameter(torch.tensor([1.0, 0.0]), manifold=geoopt.Sphere())
        >>> optimizer = RiemannianSGD([x], lr=1.0)
        >>> x.grad = torch.tensor([5.0, -1.0])
        >>> optimizer.step()
        >>> x.detach()
        tensor([0.7071, 0.7071])

    Source: [Bonnabel2013]_, [Kochurov2020]_.
    """

    _own = "momentum"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        decay: float = 0.0,
        stabilize: int | None = 5,
        **options: Any,
    ) -> None:
        refuse_ignored(options)
        self._ours = {"decay": decay, "stabilize": stabilize, "chart": True}
        super().__init__(params, lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see ``torch.optim.Optimizer.step``."""
        loss = self._begin(closure)
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for point in group["params"]:
                if point.grad is not None:
                    self._move(point, group)
            if group["stabilize"] is not None and group["step"] % group["stabilize"] == 0:
                self.stabilize_group(group)
        return loss

    def _move(self, point: Tensor, group: dict[str, Any]) -> None:
        manifold, momentum, state = _manifold(point), group["momentum"], self.state[point]
        gradient = _gradient(manifold, point)
        if not momentum:
            _go(manifold, point, -group["lr"] * gradient)
            return
        if "momentum_buffer" in state:
            state["momentum_buffer"].mul_(momentum).add_(gradient, alpha=1 - group["dampening"])
        else:
            state["momentum_buffer"] = gradient.clone()
        velocity = state["momentum_buffer"]
        direction = gradient + momentum * velocity if group["nesterov"] else velocity
        _go(manifold, point, -group["lr"] * direction, velocity)


def is_riemannian(optimizer: Optimizer) -> bool:
    """Whether an optimizer moves manifold parameters along their manifolds: one of ours or of geoopt's."""
    return isinstance(optimizer, geoopt.optim.mixin.OptimMixin)
