"""A layer without queries and keys: values flow along a learned generator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liegroup_attn.clocks import Clock
from liegroup_attn.errors import MaskError
from liegroup_attn.expm import Automatic, Method
from liegroup_attn.generators import Generator
from liegroup_attn.nn.attention import SelfAttention
from liegroup_attn.nn.flow import Flow, OfFlow
from liegroup_attn.nn.learned import LearnedGenerator, check_heads
from liegroup_attn.nn.projections import Inputs
from liegroup_attn.nn.scores import BilinearScores

__all__ = ["LieMixer"]


class LieMixer(SelfAttention):
    """Values flow along a generator that does not depend on them: exp(Q)V, Q a parameter on its manifold.

    What an MLP-Mixer is to attention, with a mixing matrix that stays stochastic. The rates of Q carry the time.

    Args:
        embed_dim: C, model width.
        num_heads: H, divides C.
        generator: Q, H heads: ``RateMatrix`` for a fixed number of tokens, ``RelativeRates`` for any.
        clock: law of the time, mean 1; None is fixed.
        method: how exp(Q)V is computed; None chooses by the rates as they are, hence breaks the graph of
            ``torch.compile``; ``Uniformization(max_terms=K)`` does not look at them.
        dropout: probability of dropping an entry of exp(Q), in training.
        bias: of the two projections.

    Raises:
        ShapeError: a generator with another number of heads.

    Example:
        >>> import torch
        >>> from liegroup_attn.nn import RateMatrix
        >>> layer = LieMixer(16, 2, RateMatrix(2, num_tokens=5))
        >>> layer(torch.zeros(1, 5, 16)).shape
        torch.Size([1, 5, 16])

    Source: [Tolstikhin2021]_ (mixing by a learned matrix); docs/mathematics.
    """

    flow: Flow
    clock, method, time_scale = OfFlow(), OfFlow(), OfFlow()

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        generator: LearnedGenerator,
        *,
        clock: Clock | None = None,
        method: Method | None = None,
        dropout: float = 0.0,
        bias: bool = False,
    ) -> None:
        check_heads(generator, num_heads)
        super().__init__(embed_dim, num_heads, is_causal=generator.is_causal, dropout=dropout, bias=bias)
        self.learned = generator
        self.flow = Flow(num_heads, None, learn_time=False, learn_rates=False, clock=clock, method=method)

    def _make_scores(self, scores: BilinearScores | None, bias: bool) -> None:
        """None: there is nothing to score."""

    def _project(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        value = self._values(x)
        return value, value, value

    def _generator(self, inputs: Inputs, dropout_p: float = 0.0) -> Generator:
        if inputs.attn_mask is not None:
            raise MaskError(
                "attn_mask: expected None, got a mask; what a learned generator joins is its manifold's support"
            )
        generator: Generator = self.learned(inputs.value.size(-2))
        generator.dropout_p = dropout_p
        return generator

    def _method(self) -> Method | None:
        return Automatic() if self.flow.method is None else None

    def _why_no_cache(self) -> str | None:
        return "expected a layer with keys, got LieMixer; generate with use_cache=False"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        factor = state_dict.pop(f"{prefix}time_scale", None)  # before there were flows
        if factor is not None:
            state_dict[f"{prefix}flow.time_scale"] = factor
        super()._load_from_state_dict(state_dict, prefix, *args)
        state_dict.setdefault(f"{prefix}flow.time", torch.ones(self.num_heads))
