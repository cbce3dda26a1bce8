"""Lie attention as a layer: learned times on their manifold, rates from the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liegroup_attn.clocks import Clock, FixedClock
from liegroup_attn.errors import CacheError, GeneratorError, MaskError
from liegroup_attn.expm import Automatic, CausalSweep, HopMethod, Method
from liegroup_attn.expm.base import hops_for
from liegroup_attn.functional import expm_multiply
from liegroup_attn.generators import DenseGenerator, Generator, HeadMixture, SoftmaxGenerator
from liegroup_attn.generators.dense import restricted
from liegroup_attn.manifolds import OpenInterval, PositiveVectors, StochasticMatrices, hold
from liegroup_attn.masks import taking_part
from liegroup_attn.nn.attention import SelfAttention
from liegroup_attn.nn.cache import AttentionCache
from liegroup_attn.nn.learned import LearnedGenerator, check_heads
from liegroup_attn.nn.timed import Constant, Timed
from liegroup_attn.positional import BiasEncoding
from liegroup_attn.tensors import of_heads

__all__ = ["LieAttention", "scale_time"]


class LieAttention(Timed, SelfAttention):
    """Lie attention: values flow along the generator Q made from the scores, for a learned time.

    Args:
        embed_dim: C, model width.
        num_heads: H, divides C.
        time: initial t per head, in (0, max_time).
        max_time: upper end of the learned time; it fixes the number of hops before data is seen. Default 2 · time.
        learn_time: learn t per head, on the manifold ``OpenInterval(max_time)``.
        learn_rates: learn jump rates per token and head, ρ = σ(w·x + b). They are functions of the data, not
            parameters with a constraint, hence free parameters behind a sigmoid.
        rate: initial ρ, in (0, 1); used only with ``learn_rates``, else ρ = 1.
        first_hop: the query first jumps to a token, then the chain runs; with t → 0 this is softmax attention.
        clock: law of the time; None is fixed (Poisson hops), ``ExponentialClock()`` the resolvent.
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
        tol: largest probability of hops beyond those computed.
        method: how exp(tQ)V is computed. None chooses by clock, size and the hops that ``max_time`` and ``tol`` ask for,
            see ``expm.Automatic``.
        allow_open_mask: accept masks that are not transitively closed and let exp(tQ) fill them; skips the check.
        **options: those of ``SelfAttention``.

    Raises:
        GeneratorError: time outside (0, max_time), rate outside (0, 1), position_rate not positive, an unknown bias_as.

    Example:
        >>> from liegroup_attn import ExponentialClock
        >>> layer = LieAttention(16, 2, is_causal=True, first_hop=True, clock=ExponentialClock())
        >>> layer(torch.zeros(1, 5, 16)).shape
        torch.Size([1, 5, 16])

    Source: docs/mathematics.
    """

    time: Tensor
    max_time: float = Constant()  # type: ignore[assignment]
    tol: float = Constant()  # type: ignore[assignment]
    position_rate: Tensor
    head_weights: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        time: float = 1.0,
        max_time: float | None = None,
        learn_time: bool = True,
        learn_rates: bool = True,
        rate: float = 0.5,
        first_hop: bool = False,
        clock: Clock | None = None,
        rate_fn: Callable[[Tensor], Tensor] | None = None,
        plus: LearnedGenerator | None = None,
        bias_as: str = "scores",
        position_rate: float = 0.5,
        ordered: bool = False,
        mix_heads: bool = False,
        tol: float = 1e-3,
        method: Method | None = None,
        allow_open_mask: bool = False,
        **options: object,
    ) -> None:
        super().__init__(embed_dim, num_heads, **options)
        max_time = 2 * time if max_time is None else max_time
        if not 0 < time < max_time or not math.isfinite(max_time):
            raise GeneratorError(
                f"time: expected 0 < time < max_time < inf, got time={time}, max_time={max_time}; raise max_time"
            )
        if not 0 < rate < 1:
            raise GeneratorError(f"rate: expected 0 < rate < 1, got {rate}; start near 1 for fast tokens")
        self.max_time = max_time
        self.first_hop = first_hop
        self.clock = clock
        self.rate_fn = rate_fn
        self._add(plus, ordered, mix_heads)
        self._place_bias(bias_as, position_rate)
        self.tol = tol
        self.method = method
        self.allow_open_mask = allow_open_mask
        start = torch.full((num_heads,), float(time))  # in one dimension: loops that initialize weights take matrices
        if learn_time:
            self.time = hold(self, "time", start, OpenInterval(max_time))
        else:
            self.register_buffer("time", start)
        if learn_rates:
            # Zero weights draw no random numbers, so softmax attention under the same seed starts identical.
            self.rate_weight = nn.Parameter(torch.zeros(num_heads, embed_dim))
            self.rate_bias = nn.Parameter(torch.full((num_heads,), math.log(rate / (1 - rate))))
        self.learn_rates = learn_rates

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
            hold(self, "head_weights", torch.full((h, h), 0.1 / h) + 0.9 * torch.eye(h), StochasticMatrices())

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
            hold(self, "position_rate", torch.full((self.num_heads,), float(position_rate)), PositiveVectors())

    def extra_repr(self) -> str:  # noqa: D102
        switches = f"first_hop={self.first_hop}, clock={self.clock}, max_time={self.max_time:g}"
        return f"{super().extra_repr()}, {switches}"

    def jump_rates(self, x: Tensor) -> Tensor | None:
        """ρ per token.

        Args:
            x: (B, N, C).

        Returns:
            (B, H, N) in (0, 1), or None for 1.
        """
        if not self.learn_rates:
            return None
        return F.linear(x, self.rate_weight, self.rate_bias).sigmoid().transpose(1, 2)

    def generator(self, x: Tensor, attn_mask: Tensor | None = None, positions: Tensor | None = None) -> Generator:
        """Q of the layer's input (with ``rate_fn=None``), all that is added included; with ``ordered`` without ``plus``.

        Args:
            x: (B, N, C).
            attn_mask: as in ``forward``.
            positions: as in ``forward``.

        Returns:
            The generator on (B, H, N, N).

        Raises:
            GeneratorError: the layer has a rate_fn.
        """
        if self.rate_fn is not None:
            raise GeneratorError("rate_fn: expected None for a jump chain, got a rate function; use mixing_matrix")
        query, key, _, attn_mask, bias = self._inputs(x, positions, attn_mask)
        return self._generator(x, query, key, attn_mask, bias)[0]

    def _added(self, num_tokens: int, bias: Tensor | None, attn_mask: Tensor | None) -> Generator | None:
        """What is added to the generator of the scores: learned, of positions, both or neither."""
        added = None if self.plus is None else self.plus(num_tokens)
        if bias is None or self.bias_as == "scores":
            return added
        bias = bias.expand(*bias.shape[:-2], num_tokens, num_tokens)  # it may have one row or column for all
        # Before the softmax: what a mask hides has no share in the rates of what it leaves.
        hidden = torch.zeros(num_tokens, num_tokens, dtype=torch.bool, device=bias.device)
        if self.is_causal:
            hidden = torch.ones_like(hidden).triu(1)
        if attn_mask is not None:
            hidden = hidden | ~taking_part(attn_mask)
        alone = hidden.all(-1, keepdim=True)
        chain = torch.where(hidden & ~alone, -torch.inf, bias).softmax(-1) * ~alone
        of_positions = DenseGenerator.from_rates(self.position_rate[:, None, None].to(bias.dtype) * chain)
        of_positions.is_causal = self.is_causal
        return of_positions if added is None else added + of_positions

    def _chain(
        self, x: Tensor, query: Tensor, key: Tensor, attn_mask: Tensor | None, bias: Tensor | None = None
    ) -> SoftmaxGenerator:
        return SoftmaxGenerator(
            query,
            of_heads(key, self.num_heads),
            jump_rates=self.jump_rates(x),
            visible=attn_mask,
            is_causal=self.is_causal,
            score=bias,
            dropout_p=self.dropout if self.training else 0.0,
            allow_open_mask=self.allow_open_mask,
        )

    def flows(self, x: Tensor, positions: Tensor | None = None) -> dict[str, tuple[Generator, Tensor]]:  # noqa: D102
        if self.rate_fn is not None:
            return {}
        first = {"Q": (self.generator(x, positions=positions), self.flow_time())}
        if self.plus is None or not self.ordered:
            return first
        return first | {"Q₊": (self.plus(x.size(-2)), self.flow_time())}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        time = state_dict.get(f"{prefix}time")
        if time is not None and not time.is_meta and not bool(((time >= 0) & (time <= self.max_time)).all()):
            args[-1].append(
                f"{prefix}time: expected values in (0, max_time={self.max_time:g}), got up to {float(time.max()):g}; "
                "load it into a layer with the max_time it was trained with"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def flow_time(self) -> Tensor:
        """t per head as used, (H, 1): learned time × ``time_scale``."""
        return self.time.unsqueeze(-1) * self.time_scale

    def mix(  # noqa: D102
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        bias: Tensor | None = None,
    ) -> Tensor:
        generator, plus = self._generator(x, query, key, attn_mask, bias)
        value = of_heads(value, self.num_heads)
        if plus is not None:
            how = Automatic(self.tol) if self.method is None else self.method
            value = expm_multiply(plus, value, self.flow_time(), clock=self.clock, method=how)
        flow: dict[str, Any] = {"clock": self.clock, "first_hop": self.first_hop, "method": self._method()}
        return expm_multiply(generator, value, self.flow_time(), **flow)

    def _generator(
        self, x: Tensor, query: Tensor, key: Tensor, attn_mask: Tensor | None, bias: Tensor | None
    ) -> tuple[Generator, Generator | None]:
        """Q, and what is flowed along before."""
        chain = self._chain(x, query, key, attn_mask, bias if self.bias_as == "scores" else None)
        generator: Generator = chain if self.rate_fn is None else chain.with_rates(self.rate_fn)
        if self.head_weights is not None:
            generator = HeadMixture(generator, self.head_weights)
        plus = self._added(x.size(-2), bias, attn_mask)
        plus = None if plus is None else restricted(plus, chain.visible)
        if plus is None or self.ordered:
            return generator, plus
        return generator + plus, None

    @property
    def can_cache(self) -> bool:  # noqa: D102
        alone = self.rate_fn is self.plus is self.head_weights is None and self.bias_as == "scores"
        return super().can_cache and alone

    def cached_values(self, dtype: torch.dtype) -> tuple[int, int, torch.dtype]:  # noqa: D102
        kept = torch.float64 if dtype == torch.float64 else torch.float32  # half precision would round each hop
        clock = self.clock or FixedClock()
        jumps = clock.resolvents
        if jumps is None:
            # Once and for all, whatever the time becomes: one hop at least, so that there is something to keep.
            jumps = max(1, self._sweep().count_hops(self.flow_time(), dtype, clock)) + self.first_hop
        return self.num_heads, jumps * self.head_width, kept

    def cache_settings(self) -> tuple[object, ...]:  # noqa: D102
        return self.time_scale, self.max_time, self.tol, repr(self.clock), self.first_hop, repr(self.method)

    def extend(  # noqa: D102
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: AttentionCache,
        bias: Tensor | None = None,
    ) -> Tensor:
        past = cache.length
        stop = past + key.size(-2)
        cache.keys[:, :, past:stop] = key
        keys = cache.keys[:, :, :stop]
        hops = cache.values.size(-1) // self.head_width - self.first_hop
        generator = SoftmaxGenerator(
            query,
            of_heads(keys, self.num_heads),
            jump_rates=self.jump_rates(x),
            is_causal=True,
            score=bias,
            past=past,
            allow_open_mask=True,
        )
        mixed, kept = CausalSweep(max_terms=max(1, hops)).extend(
            generator,
            of_heads(value, self.num_heads),
            cache.values[:, :, :past],
            self.flow_time(),
            self.clock or FixedClock(),
            self.first_hop,
        )
        cache.append(key, kept)
        return mixed

    def _sweep(self) -> CausalSweep:
        """The sweep that computes on new tokens what ``forward`` computes on all."""
        rates = self.encoding if self.bias_as == "rates" else None
        added = {"rate_fn": self.rate_fn, "plus": self.plus, "mix_heads": self.head_weights, "bias_as='rates'": rates}
        if got := [name for name, value in added.items() if value is not None]:
            raise CacheError(
                f"cache: expected a layer without {got[0]}, got one with it; only the jump chain of one head is swept, "
                "generate with use_cache=False"
            )
        clock = self.clock or FixedClock()
        if clock.resolvents is not None:
            return CausalSweep()
        if self.method is None:
            return CausalSweep(max_terms=hops_for(clock, self.max_time * self.time_scale, self.tol))
        if isinstance(self.method, HopMethod):
            return CausalSweep(self.method.tol, self.method.max_terms)
        return CausalSweep()  # to the rounding unit

    def _method(self) -> Method | None:
        if self.method is not None or self.rate_fn is not None:  # the rates of a rate_fn are not known before data is
            return self.method
        if (
            self.plus is not None and not self.ordered
        ) or self.bias_as == "rates":  # its rates are learned without bound
            return Automatic(self.tol)
        return Automatic(self.tol, self.max_time * self.time_scale, streams=True)


def scale_time(module: nn.Module, factor: float) -> int:
    """Run every Lie attention, mixer and converted attention in a module for ``factor`` times its learned time: depth as a test-time knob.

    Args:
        module: any module; nothing in it is retrained.
        factor: ≥ 0, relative to the learned time; 1 restores it.

    Returns:
        How many layers were set.

    Raises:
        GeneratorError: negative or non-finite factor, or no Lie attention inside.

    Example:
        >>> scale_time(LieAttention(8, 2), 4.0)
        1
    """
    if not (factor >= 0 and math.isfinite(factor)):
        raise GeneratorError(f"factor: expected 0 ≤ factor < inf, got {factor}; the flow runs forward only")
    layers = [m for m in module.modules() if isinstance(m, Timed)]
    if not layers:
        raise GeneratorError(
            "module: expected a LieAttention, LieMixer or converted attention inside, got none; only these have a time"
        )
    for layer in layers:
        layer.time_scale = float(factor)
    return len(layers)
