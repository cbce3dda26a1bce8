"""Lie attention as a layer: learned times on their manifold, rates from the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from liegroup_attn import manifolds
from liegroup_attn.errors import GeneratorError, MaskError
from liegroup_attn.expm import Automatic, Method
from liegroup_attn.functional import expm_multiply
from liegroup_attn.generators import DenseGenerator, Generator, HeadMixture, SoftmaxGenerator
from liegroup_attn.generators.dense import restricted
from liegroup_attn.nn.attention import SelfAttention
from liegroup_attn.nn.flow import Flow, OfFlow
from liegroup_attn.nn.learned import LearnedGenerator, check_heads
from liegroup_attn.nn.projections import Inputs
from liegroup_attn.options import options_of, takes_options_of
from liegroup_attn.positional import BiasEncoding
from liegroup_attn.tensors import of_heads
from liegroup_attn.visible import Visible

__all__ = ["LieAttention"]


class LieAttention(SelfAttention):
    """Lie attention: values flow along the generator Q made from the scores, for a learned time.

    Args:
        embed_dim: C, model width.
        num_heads: H, divides C.
        rate_fn: scores → rates; None is the jump chain.
        plus: a learned generator that is added to Q, or flowed along before with ``ordered``: ``RelativeRates`` for
            positions, ``RateMatrix`` for a fixed number of tokens. Its rates are per unit of the layer's time; how many
            hops they take is looked at in each call (a wait for a GPU), and K then depends on the number of tokens,
            unless ``method`` says so.
        bias_as: what a ``BiasEncoding`` biases: "scores" (log-rates, before the jump chain), or "rates": its own jump chain
            ρ₊(softmax(bias) − I), ρ₊ > 0 learned per head, is added to Q.
        position_rate: ρ₊ at the start.
        ordered: the product exp(tQ)exp(tQ₊) instead of exp(t(Q + Q₊)): first along ``plus``, then along Q.
        mix_heads: every head flows along Σ_h w_gh Q_h each head a relation; the rows of w > 0 sum to 1
            (``StochasticMatrices``) and w starts near the identity.
        **options: those of ``Flow`` (time, rates, first hop, clock, tol, method), rates being made from x, and those of
            ``SelfAttention``.

    Raises:
        GeneratorError: position_rate not positive, an unknown bias_as; see ``Flow``.

    Example:
        >>> from liegroup_attn import ExponentialClock
        >>> layer = LieAttention(16, 2, is_causal=True, clock=ExponentialClock(), time=2.0)
        >>> layer(torch.zeros(1, 5, 16)).shape
        torch.Size([1, 5, 16])

    Source: docs/mathematics.
    """

    flow: Flow
    position_rate: Tensor
    head_weights: Tensor | None
    time, max_time, time_scale, flow_time, rate_weight, rate_bias = (OfFlow() for _ in range(6))
    first_hop, clock, tol, method, learn_rates, jump_rates, allow_open_mask = (OfFlow() for _ in range(7))

    @takes_options_of(Flow, SelfAttention, without=("device", "dtype"))
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        rate_fn: Callable[[Tensor], Tensor] | None = None,
        plus: LearnedGenerator | None = None,
        bias_as: str = "scores",
        position_rate: float = 0.5,
        ordered: bool = False,
        mix_heads: bool = False,
        **options: Any,
    ) -> None:
        of_flow = {name: options.pop(name) for name in options_of(Flow) if name in options}
        super().__init__(embed_dim, num_heads, **options)
        self.flow = Flow(num_heads, embed_dim, **of_flow)
        self.rate_fn = rate_fn
        self._add(plus, ordered, mix_heads)
        self._place_bias(bias_as, position_rate)

    def _declare(self) -> None:
        # Times and rates came first before they were a flow's: optimizers know no names.
        self.register_module("flow", None)

    def _add(self, plus: LearnedGenerator | None, ordered: bool, mix_heads: bool) -> None:
        if plus is not None:
            check_heads(plus, self.num_heads)
            if self.is_causal and not plus.is_causal:
                raise MaskError("plus: expected a causal generator beside is_causal=True, got one that leads ahead")
        elif ordered:
            raise GeneratorError("ordered: expected False without plus, got True; a product needs two generators")
        self.plus, self.ordered = plus, ordered
        if not mix_heads:
            self.head_weights = None
        else:
            h = self.num_heads
            # Rows sum to 1: time alone carries the scale, and the hops stay as many.
            manifolds.hold(
                self, "head_weights", torch.full((h, h), 0.1 / h) + 0.9 * torch.eye(h), manifolds.StochasticMatrices()
            )

    def _place_bias(self, bias_as: str, position_rate: float) -> None:
        if bias_as not in ("scores", "rates"):
            raise GeneratorError(
                f"bias_as: expected 'scores' or 'rates', got {bias_as!r}; say where the encoding's bias acts"
            )
        if not 0 < position_rate < math.inf:
            raise GeneratorError(
                f"position_rate: expected a positive number, got {position_rate}; a rate of 0 has no gradient"
            )
        self.bias_as = bias_as
        if bias_as == "rates":
            if not isinstance(self.encoding, BiasEncoding) or self.ordered:
                raise GeneratorError(
                    "bias_as: expected a BiasEncoding and ordered=False beside 'rates', got "
                    f"{type(self.encoding).__name__} and ordered={self.ordered}; give encoding=ALiBi(…), or RelativeRates by plus"
                )
            manifolds.hold(
                self, "position_rate", torch.full((self.num_heads,), float(position_rate)), manifolds.PositiveVectors()
            )

    def _generator(self, inputs: Inputs, dropout_p: float = 0.0) -> Generator:
        chain, generator = self._alone(inputs, dropout_p)
        plus = None if self.ordered else self._added(inputs, chain.visible)
        return generator if plus is None else generator + restricted(plus, chain.visible)

    def _alone(self, inputs: Inputs, dropout_p: float = 0.0) -> tuple[SoftmaxGenerator, Generator]:
        """The chain of the scores, and what rates and heads make of it."""
        scored = inputs if self.bias_as == "scores" else inputs._replace(score=None)
        chain = super()._generator(scored, dropout_p)
        assert isinstance(chain, SoftmaxGenerator)
        generator: Generator = chain if self.rate_fn is None else chain.with_rates(self.rate_fn)
        return chain, generator if self.head_weights is None else HeadMixture(generator, self.head_weights)

    def _added(self, inputs: Inputs, visible: Visible) -> Generator | None:
        """What is added to the generator of the scores: learned, of positions, both or neither."""
        n = inputs.query.size(-2)
        added = None if self.plus is None else self.plus(n)
        if inputs.score is None or self.bias_as == "scores":
            return added
        # Before the softmax: what a mask hides has no share in the rates of what it leaves.
        bias = inputs.score.formed(n, n)
        bias = bias.expand(*bias.shape[:-2], n, n)  # it may have one row or column for all
        allowed = visible.rows(0, n, n, visible.tensors, bias.device)
        if allowed is None:
            chain = bias.softmax(-1)
        else:
            alone = ~allowed.any(-1, keepdim=True)
            chain = torch.where(allowed | alone, bias, -torch.inf).softmax(-1) * ~alone
        of_positions = DenseGenerator.from_rates(self.position_rate[:, None, None].to(bias.dtype) * chain)
        of_positions.is_causal = self.is_causal
        return of_positions if added is None else added + of_positions

    def _features(self, inputs: Inputs) -> Tensor:
        return inputs.x

    def flows(self, x: Tensor, positions: Tensor | None = None) -> dict[str, tuple[Generator, Tensor]]:  # noqa: D102
        if self.rate_fn is not None:  # its chain is another
            return {}
        first = super().flows(x, positions)
        if self.plus is None or not self.ordered:
            return first
        return first | {"Q₊": (self.plus(x.size(-2)), self.flow.flow_time())}

    def _mix(self, inputs: Inputs, value: Tensor) -> Tensor:
        if self.plus is not None and self.ordered:
            plus: Generator = self.plus(value.size(-2))
            if inputs.attn_mask is not None:
                plus = restricted(plus, self._alone(inputs)[0].visible)
            flow = self.flow
            how = Automatic(flow.tol) if flow.method is None else flow.method
            value = of_heads(value, self.num_heads)
            value = expm_multiply(plus, value, flow.flow_time(), clock=flow.clock, method=how)
        return super()._mix(inputs, value)

    def _method(self) -> Method | None:
        if self.flow.method is not None:
            return None
        if self.rate_fn is not None:  # its rates are not known before data is
            return Automatic()
        alone = (self.plus is None or self.ordered) and self.bias_as == "scores"
        if self.head_weights is not None and alone:  # whose rows sum to 1
            return self.flow.for_bounded_rates()
        return None

    def _why_no_cache(self) -> str | None:
        rates = self.encoding if self.bias_as == "rates" else None
        added = {"rate_fn": self.rate_fn, "plus": self.plus, "mix_heads": self.head_weights, "bias_as='rates'": rates}
        got = next((name for name, value in added.items() if value is not None), None)
        alone = f"expected a layer without {got}, got one with it; only the jump chain of one head is swept, generate with use_cache=False"
        return super()._why_no_cache() or (alone if got else None)

    @staticmethod
    def of_today(state_dict: dict[str, Any], prefix: str) -> bool:
        """Rename, in place, what was a layer's before there were flows, and columns that are rows now; whether shapes or the order
        of parameters are others, too, which an optimizer's states would not survive."""
        old = [name for name in ("time", "rate_weight", "rate_bias", "time_scale") if f"{prefix}{name}" in state_dict]
        for name in old:
            state_dict[f"{prefix}flow.{name}"] = state_dict.pop(f"{prefix}{name}")
        names = [f"{prefix}{name}" for name in ("flow.time", "position_rate")]
        columns = [name for name in names if isinstance(x := state_dict.get(name), Tensor) and x.dim() == 2]
        for name in columns:
            state_dict[name] = state_dict[name].squeeze(-1)
        between = [name for name in ("head_weights", "position_rate") if f"{prefix}{name}" in state_dict]
        return bool(columns or (old and between))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.of_today(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
