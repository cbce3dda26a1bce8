"""The flow of a drop-in, whose time starts at 0."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from liegroup_attn.expm import MatrixExp, Method
from liegroup_attn.generators import Generator, SoftmaxGenerator
from liegroup_attn.nn.flow import Flow
from liegroup_attn.options import takes_options_of
from liegroup_attn.tensors import pick

__all__ = ["LieFlow"]


class LieFlow(Flow):
    """The flow of a drop-in: it starts as softmax attention and can learn to be more.

    The time starts at exactly 0, where the result is softmax attention and the gradient by the time is not
    0: the first derivative is S·Q·V. It is a plain parameter, for any optimizer, and what a step moves out of
    [0, max_time] is put back by the next forward in training. Where that cannot be (compiled, frozen), what counts is
    the nearest time inside, and a gradient passes where descent leads back. The gradient by the rates is 0 while time is 0.

    Args:
        num_heads: H.
        head_width: D, of the values, which rates are made from.
        time: initial t per head, in [0, max_time].
        max_time: upper end of the learned time; it fixes the number of hops before data is seen.
        **options: those of ``Flow``.

    Raises:
        GeneratorError: time outside [0, max_time]; see ``Flow``.

    Example:
        >>> q = k = v = torch.randn(1, 2, 5, 8)
        >>> flow = LieFlow(2, 8)
        >>> mixed = flow(flow.generator(q, k, v, is_causal=True), v)
        >>> softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.allclose(mixed, softmax, atol=1e-6)
        True

    Source: docs/mathematics, "Clocks and the first hop".
    """

    width: int
    still_possible = True

    @takes_options_of(Flow, without=("method",))  # of a drop-in plain values alone: configurations hold them
    def __init__(
        self,
        num_heads: int,
        head_width: int,
        *,
        time: float = 0.0,
        max_time: float = 1.0,
        first_hop: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(num_heads, head_width, time=time, max_time=max_time, first_hop=first_hop, **options)

    def _hold_time(self, start: Tensor) -> None:
        self.time = nn.Parameter(start)

    def flow_time(self) -> Tensor:
        """t per head as used, (H, 1): the learned time in [0, max_time] × ``time_scale``."""
        compiled = torch.compiler.is_compiling()
        if self.training and torch.is_grad_enabled() and isinstance(self.time, nn.Parameter) and not compiled:
            self.time.data.clamp_(0.0, self.max_time)
        inside: Tensor = pick(_Inside, _InsideForwardAD).apply(self.time, self.max_time).unsqueeze(-1)
        return inside if self.time_scale == 1 else inside * self.time_scale

    def mixing(self, generator: Generator, value: Tensor) -> Tensor:
        """What would multiply the values without dropout, (B, H, N, N)."""
        generator = copy(generator)
        generator.dropout_p = 0.0
        eye = torch.eye(value.size(-2), dtype=value.dtype, device=value.device)
        found: Tensor = self(generator, eye.expand(len(value), self.num_heads, -1, -1))
        return found

    @property
    def kept_width(self) -> int:
        """How many numbers a cache keeps of a token and head, beside its key and value."""
        return self.num_kept(self.time.dtype) * self.width

    def _method(self, generator: Generator) -> Method:
        masked = isinstance(generator, SoftmaxGenerator) and generator.has_mask and not generator.is_causal
        if self.method is None and self.clock.resolvents is not None and masked:
            return MatrixExp()  # exact as the causal sweep is: a causal mask may come as a mask, and be decoded
        return super()._method(generator)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        time = destination[f"{prefix}time"]
        if not keep_vars and not time.is_meta and bool(((time < 0) | (time > self.max_time)).any()):
            # The last step may have moved it out; what is saved is what the next forward would use.
            destination[f"{prefix}time"] = time.clamp(0.0, self.max_time)

    def _may_be(self, time: Tensor) -> bool:
        return bool((time <= 1.01 * self.max_time).all())  # bf16 rounds


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
