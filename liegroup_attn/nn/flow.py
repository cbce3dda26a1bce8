"""What a drop-in learns: for how long values flow in each head, and at which rate each token jumps."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liegroup_attn.clocks import Clock, FixedClock, clock_from
from liegroup_attn.errors import GeneratorError
from liegroup_attn.expm import Automatic, CausalSweep, MatrixExp, Method
from liegroup_attn.expm.base import hops_for
from liegroup_attn.functional import expm_multiply
from liegroup_attn.generators import SoftmaxGenerator
from liegroup_attn.nn.timed import Constant, Timed
from liegroup_attn.tensors import differentiated, of_heads, pick, values_visible

__all__ = ["LieFlow"]


class LieFlow(Timed):
    """Mixing of values that starts as softmax attention and can learn to be more: S·E[exp(τQ)]V, one time a head.

    It takes queries, keys and values of any attention, so it is what ``convert_attention`` puts into other people's
    modules. The time starts at exactly 0, where the result is softmax attention and the gradient by the time is not
    0: the first derivative is S·Q·V. It is a plain parameter, for any optimizer, and what a step moves out of
    [0, max_time] is put back by the next forward in training. Where that cannot be (compiled, frozen), what counts is
    the nearest time inside, and a gradient passes where descent leads back.

    Args:
        num_heads: H.
        head_width: D, of the values.
        time: initial t per head, in [0, max_time].
        max_time: upper end of the learned time; it fixes the number of hops before data is seen.
        learn_time: learn t per head; else it stays as it is (a buffer).
        learn_rates: learn jump rates per token and head, ρ = σ(w·v + b) of the token's value. Their gradient is 0 while
            time is 0.
        rate: initial ρ, in (0, 1); used only with ``learn_rates``, else ρ = 1.
        first_hop: the query first jumps to a token, then the chain runs. Without it, time 0 is no mixing at all.
        clock: law of the time, or its name such as "ErlangClock(3)"; None is fixed.
        tol: largest probability of hops beyond those computed, for the fixed clock; resolvents are exact.
        allow_open_mask: accept masks that are not transitively closed and let exp(tQ) fill them.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        GeneratorError: time outside [0, max_time], rate outside (0, 1), a name of no clock.

    Example:
        >>> q = k = v = torch.randn(1, 2, 5, 8)
        >>> flow = LieFlow(2, 8)
        >>> mixed, _ = flow(q, k, v, is_causal=True)
        >>> torch.allclose(mixed, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-6)
        True

    Source: docs/mathematics, "Clocks and the first hop".
    """

    time: Tensor
    max_time: float = Constant()  # type: ignore[assignment]
    tol: float = Constant()  # type: ignore[assignment]

    def __init__(
        self,
        num_heads: int,
        head_width: int,
        *,
        time: float = 0.0,
        max_time: float = 1.0,
        learn_time: bool = True,
        learn_rates: bool = True,
        rate: float = 0.5,
        first_hop: bool = True,
        clock: Clock | str | None = None,
        tol: float = 1e-3,
        allow_open_mask: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= time <= max_time or not 0 < max_time < math.inf:
            raise GeneratorError(
                f"time: expected 0 ≤ time ≤ max_time < inf, got time={time}, max_time={max_time}; raise max_time"
            )
        if not 0 < rate < 1:
            raise GeneratorError(f"rate: expected 0 < rate < 1, got {rate}; start near 1 for fast tokens")
        if not 0 < tol < 1:
            raise GeneratorError(f"tol: expected a probability in (0, 1), got {tol}; choose 1e-3 or smaller")
        self.num_heads, self.head_width = num_heads, head_width
        self.max_time, self.tol = max_time, tol
        self.first_hop, self.allow_open_mask = first_hop, allow_open_mask
        self.clock: Clock = clock_from(clock) if isinstance(clock, str) else clock or FixedClock()
        self.learn_rates = learn_rates
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        # In one dimension: loops that initialize weights take matrices.
        start = torch.full((num_heads,), float(time), **where)
        if learn_time:
            self.time = nn.Parameter(start)
        else:
            self.register_buffer("time", start)
        if learn_rates:
            self.rate_weight = nn.Parameter(torch.zeros(num_heads, head_width, **where))
            self.rate_bias = nn.Parameter(torch.full((num_heads,), math.log(rate / (1 - rate)), **where))

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.num_heads}, {self.head_width}, max_time={self.max_time:g}, first_hop={self.first_hop}, clock={self.clock}"

    def flow_time(self) -> Tensor:
        """t per head as used, (H, 1): the learned time in [0, max_time] × ``time_scale``."""
        compiled = torch.compiler.is_compiling()
        if self.training and torch.is_grad_enabled() and isinstance(self.time, nn.Parameter) and not compiled:
            self.time.data.clamp_(0.0, self.max_time)
        inside: Tensor = pick(_Inside, _InsideForwardAD).apply(self.time, self.max_time).unsqueeze(-1)
        return inside if self.time_scale == 1 else inside * self.time_scale

    def is_still(self) -> bool:
        """Whether no time passes and no derivative by it is wanted, so that this is softmax attention and nothing else.

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

    def jump_rates(self, value: Tensor) -> Tensor | None:
        """ρ per token.

        Args:
            value: (B, H_kv, N, D).

        Returns:
            (B, H, N) in (0, 1), or None for 1.
        """
        if not self.learn_rates:
            return None
        groups = value.size(1)
        weight = self.rate_weight.view(groups, -1, self.head_width)  # (H_kv, H / H_kv, D)
        found = torch.einsum("bgnd,grd->bgrn", value, weight.to(value.dtype)).flatten(1, 2)  # (B, H, N)
        return (found + self.rate_bias.to(value.dtype).unsqueeze(-1)).sigmoid()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        score_bias: Tensor | None = None,
        need_weights: bool = False,
        closed: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix values over tokens.

        Args:
            query: (B, H, N, E).
            key: (B, H_kv, N, E), the same tokens.
            value: (B, H_kv, N, D).
            attn_mask: broadcastable to (B, H, N, N), bool (True = takes part) or float (added to the scores).
            dropout_p: as in ``lie_attention``; with ``need_weights`` of an entry of the mixing matrix.
            is_causal: lower-triangular mask.
            scale: of the scores; default 1/√E.
            score_bias: finite numbers added to the scores, broadcastable to (B, H, N, N).
            need_weights: return the mixing matrix, too.
            closed: the mask is known to be transitively closed: do not look.

        Returns:
            (B, H, N, D), and what multiplied the values, (B, H, N, N), or None.

        Raises:
            MaskError, ShapeError, DtypeError, GeneratorError: as ``lie_attention``.
        """
        still = self.is_still()
        rates = None if still else self.jump_rates(value)

        def mix(values: Tensor, drop: float) -> Tensor:
            generator = SoftmaxGenerator(
                query,
                of_heads(key, self.num_heads),
                jump_rates=rates,
                score=score_bias,
                visible=attn_mask,
                is_causal=is_causal,
                scale=scale,
                dropout_p=drop,
                allow_open_mask=closed or still or self.allow_open_mask,
            )
            flow: dict[str, Any] = {"clock": self.clock, "first_hop": self.first_hop, "method": self._method(attn_mask)}
            return expm_multiply(
                generator, of_heads(values, self.num_heads), 0.0 if still else self.flow_time(), **flow
            )

        if not need_weights:
            return mix(value, dropout_p), None
        eye = torch.eye(value.size(-2), dtype=value.dtype, device=value.device)
        weights = mix(eye.expand(len(value), self.num_heads, -1, -1), 0.0)
        weights = F.dropout(weights, dropout_p) if dropout_p else weights
        return weights @ value.repeat_interleave(self.num_heads // value.size(1), 1), weights

    def generator(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        score_bias: Tensor | None = None,
    ) -> SoftmaxGenerator:
        """Q of a call with these arguments; a mask that is not closed is taken as it is.

        Returns:
            The generator on (B, H, N, N).
        """
        return SoftmaxGenerator(
            query,
            key.repeat_interleave(self.num_heads // key.size(1), 1),
            jump_rates=self.jump_rates(value),
            visible=attn_mask,
            is_causal=is_causal,
            scale=scale,
            score=score_bias,
            allow_open_mask=True,
        )

    @property
    def kept_width(self) -> int:
        """How many numbers a cache keeps of a token and head, beside its key and value."""
        return (self.clock.resolvents or self._terms() + self.first_hop) * self.head_width

    def extend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        past: Tensor,
        attn_mask: Tensor | None = None,
        *,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mix values of new tokens with all before them, given what earlier calls kept: exact decoding.

        Args:
            query: (B, H, N, E), of the new tokens.
            key: (B, H_kv, P + N, E), of all tokens.
            value: (B, H_kv, N, D), of the new tokens.
            past: (B, H, P, ``kept_width``), what was kept of the earlier tokens.
            attn_mask: broadcastable to (B, H, N, P + N), on top of causality.
            scale: of the scores; default 1/√E.

        Returns:
            (B, H, N, D), and what to keep of the new tokens, (B, H, N, ``kept_width``).
        """
        generator = SoftmaxGenerator(
            query,
            of_heads(key, self.num_heads),
            jump_rates=self.jump_rates(value),
            visible=attn_mask,
            is_causal=True,
            scale=scale,
            past=past.size(-2),
            allow_open_mask=True,
        )
        sweep = CausalSweep(max_terms=self._terms())
        values = of_heads(value, self.num_heads)
        return sweep.extend(generator, values, past, self.flow_time(), self.clock, self.first_hop)

    def _terms(self) -> int:
        """K by the longest time and ``tol``, once and for all: no wait for a GPU, and caches stay valid."""
        return hops_for(self.clock, self.max_time * self.time_scale, self.tol)

    def _method(self, attn_mask: Tensor | None) -> Method:
        if self.clock.resolvents is not None and attn_mask is not None:
            return MatrixExp()  # exact as the causal sweep is: a causal mask may come as a mask, and be decoded
        return Automatic(self.tol, self.max_time * self.time_scale, streams=True)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        time = destination[f"{prefix}time"]
        if not keep_vars and not time.is_meta and bool(((time < 0) | (time > self.max_time)).any()):
            # The last step may have moved it out; what is saved is what the next forward would use.
            destination[f"{prefix}time"] = time.clamp(0.0, self.max_time)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        time = state_dict.get(f"{prefix}time")
        if time is not None and not time.is_meta and not bool((time <= 1.01 * self.max_time).all()):  # bf16 rounds
            args[-1].append(
                f"{prefix}time: expected values in [0, max_time={self.max_time:g}], got up to {float(time.max()):g}; "
                "convert with the max_time it was trained with"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Inside(torch.autograd.Function):
    """x kept in [0, upper]; a gradient passes inside, and outside where descent leads back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, upper: float) -> Tensor:
        return x.clamp(0.0, upper)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.upper = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        further = ((x < 0) & (grad > 0)) | ((x > ctx.upper) & (grad < 0))
        return grad.masked_fill(further, 0), None


class _InsideForwardAD(_Inside):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangent.masked_fill((x < 0) | (x > ctx.upper), 0)
