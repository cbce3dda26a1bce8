"""A flow: for how long values run along a generator in each head, at which rate each token jumps, by which law."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liegroup_attn import manifolds
from liegroup_attn.clocks import Clock, FixedClock, clock_from
from liegroup_attn.deprecated import warn_of
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.expm import Automatic, CausalSweep, HopMethod, Method
from liegroup_attn.expm.base import hops_for
from liegroup_attn.functional import expm_multiply
from liegroup_attn.generators import Generator, SoftmaxGenerator
from liegroup_attn.nn.constant import Constant
from liegroup_attn.resettable import Resettable
from liegroup_attn.scores import Score
from liegroup_attn.tensors import differentiated, of_heads, values_visible
from liegroup_attn.visible import Visible

__all__ = ["Flow", "OfFlow", "scale_time"]


class Flow(Resettable):
    """Values run along a generator: E[exp(τQ)]V, one learned time a head; after a first hop S·E[exp(τQ)]V.

    What attention layers share, whoever wrote them: time, rates, clock, first hop, method, what a cache keeps, what a
    checkpoint must agree in. The time is a point of the manifold ``OpenInterval(max_time)``, never 0; ``LieFlow`` starts
    there.

    Args:
        num_heads: H.
        width: of the features that rates are made from; None without ``learn_rates``.
        time: initial t per head, in (0, max_time).
        max_time: upper end of the learned time; it fixes the number of hops before data is seen. Default 2 · time.
        learn_time: learn t per head; else it stays as it is (a buffer).
        learn_rates: learn jump rates per token and head, ρ = σ(w·x + b). They are functions of the data, not
            parameters with a constraint, hence free parameters behind a sigmoid.
        rate: initial ρ, in (0, 1); used only with ``learn_rates``, else ρ = 1.
        first_hop: the query first jumps to a token, then the chain runs. Without it, time 0 is no mixing at all.
        clock: law of the time, or its name such as "ErlangClock(3)"; None is fixed (Poisson hops).
        tol: largest probability of hops beyond those computed.
        method: how exp(tQ)V is computed. None chooses by clock, size and the hops that ``max_time`` and ``tol`` ask for,
            see ``expm.Automatic``.
        allow_open_mask: accept masks that are not transitively closed and let exp(tQ) fill them.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        GeneratorError: time outside its interval, rate outside (0, 1), tol outside (0, 1), a name of no clock.

    Example:
        >>> from liegroup_attn import SoftmaxGenerator
        >>> q = torch.randn(1, 2, 5, 8)
        >>> Flow(2, 8, clock="ExponentialClock")(SoftmaxGenerator(q, q, is_causal=True), q).shape
        torch.Size([1, 2, 5, 8])

    Source: docs/mathematics, "Clocks and the first hop".
    """

    time: Tensor
    max_time: float = Constant()  # type: ignore[assignment]
    tol: float = Constant()  # type: ignore[assignment]
    time_scale: float = Constant()  # type: ignore[assignment]
    still_possible = False  # whether time may be 0

    def __init__(
        self,
        num_heads: int,
        width: int | None,
        *,
        time: float = 1.0,
        max_time: float | None = None,
        learn_time: bool = True,
        learn_rates: bool = True,
        rate: float = 0.5,
        first_hop: bool = False,
        clock: Clock | str | None = None,
        tol: float = 1e-3,
        method: Method | None = None,
        allow_open_mask: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        max_time = 2 * time if max_time is None else max_time
        inside = 0 <= time <= max_time if self.still_possible else 0 < time < max_time
        if not inside or not 0 < max_time < math.inf:
            less = "≤" if self.still_possible else "<"
            raise GeneratorError(
                f"time: expected 0 {less} time {less} max_time < inf, got time={time}, max_time={max_time}; raise max_time"
            )
        if learn_rates and width is None:
            raise ShapeError(
                "width: expected that of the features that rates are made from, got None; pass learn_rates=False"
            )
        if not 0 < rate < 1:
            raise GeneratorError(f"rate: expected 0 < rate < 1, got {rate}; start near 1 for fast tokens")
        if not 0 < tol < 1:
            raise GeneratorError(f"tol: expected a probability in (0, 1), got {tol}; choose 1e-3 or smaller")
        self.num_heads, self.width = num_heads, width
        self.max_time, self.tol, self.time_scale = max_time, tol, 1.0
        self.first_hop, self.allow_open_mask = first_hop, allow_open_mask
        self.clock: Clock = clock_from(clock) if isinstance(clock, str) else clock or FixedClock()
        self.method, self.learn_rates = method, learn_rates
        # In one dimension: loops that initialize weights take matrices.
        start = torch.full((num_heads,), float(time), device=device, dtype=dtype)
        if learn_time:
            self._hold_time(start)
        else:
            self.register_buffer("time", start)
        if learn_rates:
            # Zero weights draw no random numbers, so softmax attention under the same seed starts identical.
            self.rate_weight = nn.Parameter(torch.zeros(num_heads, width or 0, device=device, dtype=dtype))
            logit = math.log(rate / (1 - rate))
            self.rate_bias = nn.Parameter(torch.full((num_heads,), logit, device=device, dtype=dtype))

    def _hold_time(self, start: Tensor) -> None:
        self.time = manifolds.hold(self, "time", start, manifolds.OpenInterval(self.max_time))

    @property
    def law(self) -> dict[str, object]:
        """What is computed that neither names nor values of parameters tell: what two models have to agree in."""
        return {**self._how, "clock": repr(self.clock), "max_time": self.max_time}

    @property
    def settings(self) -> tuple[object, ...]:
        """The law, and all else that what caches keep depends on besides tokens."""
        return *self.law.values(), self.time_scale, self.tol, repr(self.method)

    def extra_repr(self) -> str:  # noqa: D102
        return ", ".join([str(self.num_heads), str(self.width), *(f"{k}={v}" for k, v in self.law.items())])

    def flow_time(self) -> Tensor:
        """t per head as used, (H, 1): learned time × ``time_scale``."""
        return self.time.unsqueeze(-1) * self.time_scale

    def is_still(self) -> bool:
        """Whether no time passes and no derivative by it is wanted, so that at most the first hop is left.

        Looked at on a CPU, and elsewhere where the time is frozen: a GPU has to be waited for. Never under
        ``torch.compile``, which hops as often as ``max_time`` asks for.
        """
        time = self.time
        if differentiated(time) and (torch.is_grad_enabled() or not time.requires_grad):
            return False
        frozen_elsewhere = time.device.type not in ("cpu", "meta") and not time.requires_grad
        if not values_visible(time) and not (frozen_elsewhere and not torch.compiler.is_compiling()):
            return False
        return self.time_scale == 0 or bool((time.detach() <= 0).all())

    def is_softmax(self, *, by_value: bool = False) -> bool:
        """Whether this is softmax attention and nothing else; ``by_value`` whatever derivative is wanted."""
        return self.first_hop and (bool((self.time.detach() <= 0).all()) if by_value else self.is_still())

    def jump_rates(self, features: Tensor) -> Tensor | None:
        """ρ per token.

        Args:
            features: (B, N, width), or of each key head (B, H_kv, N, width).

        Returns:
            (B, H, N) in (0, 1), or None for 1.
        """
        if not self.learn_rates:
            return None
        if features.dim() == 3:
            return F.linear(features, self.rate_weight, self.rate_bias).sigmoid().transpose(1, 2)
        weight = self.rate_weight.view(features.size(1), -1, features.size(-1))  # (H_kv, H / H_kv, D)
        found = torch.einsum("bgnd,grd->bgrn", features, weight.to(features.dtype)).flatten(1, 2)  # (B, H, N)
        return (found + self.rate_bias.to(features.dtype).unsqueeze(-1)).sigmoid()

    def generator(
        self,
        query: Tensor,
        key: Tensor,
        features: Tensor,
        *,
        score: Score | Tensor | None = None,
        visible: Visible | Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        dropout_p: float = 0.0,
        closed: bool = False,
        past: int = 0,
    ) -> SoftmaxGenerator:
        """Q of a call: rates made from the features, a key head for every query head.

        Args:
            query: (B, H, N, E).
            key: (B, H_kv, N, E); with those of the ``past`` tokens before.
            features: as in ``jump_rates``.
            score: as in ``SoftmaxGenerator``, and so for all others but
            closed: what is visible is known to be closed: do not look.

        Returns:
            The generator on (B, H, N, N).
        """
        return SoftmaxGenerator(
            query,
            of_heads(key, self.num_heads),
            score=score,
            visible=visible,
            is_causal=is_causal,
            jump_rates=self.jump_rates(features),
            scale=scale,
            dropout_p=dropout_p,
            allow_open_mask=closed or past > 0 or self.allow_open_mask or self.is_still(),
            past=past,
        )

    def forward(self, generator: Generator, value: Tensor, method: Method | None = None) -> Tensor:
        """Let values flow.

        Args:
            generator: Q on (B, H, N, N) or what broadcasts to it.
            value: (B, H_kv, N, D).
            method: in the place of the flow's own.

        Returns:
            (B, H, N, D).

        Raises:
            ShapeError, DtypeError, GeneratorError: as ``expm_multiply``.
        """
        time = 0.0 if self.is_still() else self.flow_time()
        how = method or self._method(generator)
        return expm_multiply(generator, of_heads(value, self.num_heads), time, **self._how, method=how)

    @property
    def _how(self) -> dict[str, Any]:
        return {"clock": self.clock, "first_hop": self.first_hop}

    def extend(self, generator: SoftmaxGenerator, value: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Mix values of new tokens with all before them, given what earlier calls kept: exact decoding.

        Args:
            generator: of the new tokens, with the P before as its ``past``; causal.
            value: of the new tokens, (B, H_kv, N, D).
            past: (B, H, P, kept · D), what was kept of the earlier tokens.

        Returns:
            (B, H, N, D), and what to keep of the new tokens, (B, H, N, kept · D).
        """
        return CausalSweep().extend(generator, of_heads(value, self.num_heads), past, self.flow_time(), **self._how)

    def num_kept(self, dtype: torch.dtype) -> int:
        """How many vectors a cache keeps of a token and head, beside its key, of values of some dtype."""
        if self.clock.resolvents is not None:
            return self.clock.resolvents
        if self.method is None:  # no wait for a GPU, and caches stay valid
            hops = hops_for(self.clock, self.max_time * self.time_scale, self.tol)
        else:
            knobs = (self.method.tol, self.method.max_terms) if isinstance(self.method, HopMethod) else ()
            hops = max(1, CausalSweep(*knobs).count_hops(self.flow_time(), dtype, self.clock))
        return hops + self.first_hop

    def _method(self, generator: Generator) -> Method:
        if self.method is not None:
            return self.method
        if not isinstance(generator.rate_bound(), float):  # its rates are learned without bound
            return Automatic(self.tol)
        return self.for_bounded_rates()

    def for_bounded_rates(self) -> Method:
        """What rates of at most 1 take: as many hops as ``max_time`` asks for, so that no GPU is waited for."""
        return Automatic(self.tol, self.max_time * self.time_scale, streams=True)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.time_scale != 1:
            destination[f"{prefix}time_scale"] = torch.tensor(self.time_scale, dtype=torch.float64, device="cpu")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        factor = state_dict.pop(f"{prefix}time_scale", None)
        whole = {prefix + key for key in self.state_dict() if key != "time_scale"} <= state_dict.keys()
        if factor is not None or whole:  # a part, such as an adapter, says nothing of the time
            self.time_scale = 1.0 if factor is None else float(factor)
        time = state_dict.get(f"{prefix}time")
        if isinstance(time, Tensor) and not time.is_meta and not self._may_be(time):
            args[-1].append(
                f"{prefix}time: expected values from 0 to max_time={self.max_time:g}, got up to {float(time.max()):g}; load it into "
                "a layer with the max_time it was trained with, a converted model by that of the conversion"
            )
            return
        if isinstance(time, Tensor) and time.dim() == 2:
            state_dict[f"{prefix}time"] = time.squeeze(-1)  # it was a column once
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _may_be(self, time: Tensor) -> bool:
        """Whether these are times of such a flow."""
        return bool(((time >= 0) & (time <= self.max_time)).all())


def scale_time(module: nn.Module, factor: float) -> int:
    """Run every flow in a module for ``factor`` times its learned time: depth as a test-time knob.

    Args:
        module: any module; nothing in it is retrained.
        factor: ≥ 0, relative to the learned time; 1 restores it.

    Returns:
        How many flows were set.

    Raises:
        GeneratorError: negative or non-finite factor, or no flow inside.

    Example:
        >>> scale_time(Flow(2, 8), 4.0)
        1
    """
    if not (factor >= 0 and math.isfinite(factor)):
        raise GeneratorError(f"factor: expected 0 ≤ factor < inf, got {factor}; the flow runs forward only")
    flows = [m for m in module.modules() if isinstance(m, Flow)]
    if not flows:
        raise GeneratorError(
            "module: expected a LieAttention, LieMixer or converted attention inside, got none; only these have a time"
        )
    for flow in flows:
        flow.time_scale = float(factor)
    return len(flows)


class OfFlow:
    """An attribute of a layer that has moved into its flow: for one release, with a warning."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: type) -> Any:
        return self if layer is None else getattr(self._flow(layer), self.name)

    def __set__(self, layer: Any, value: Any) -> None:
        setattr(self._flow(layer, 5), self.name, value)

    def _flow(self, layer: Any, stacklevel: int = 4) -> Flow:
        warn_of(self.name, f"write layer.flow.{self.name}", stacklevel)
        flow: Flow = layer.flow
        return flow
