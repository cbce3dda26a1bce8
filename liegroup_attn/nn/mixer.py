"""A layer without queries and keys: values flow along a learned generator."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.clocks import Clock
from liegroup_attn.errors import CacheError, MaskError
from liegroup_attn.expm import Method
from liegroup_attn.functional import expm_multiply
from liegroup_attn.generators import Generator
from liegroup_attn.nn.attention import SelfAttention
from liegroup_attn.nn.cache import AttentionCache
from liegroup_attn.nn.learned import LearnedGenerator, check_heads
from liegroup_attn.nn.scores import BilinearScores
from liegroup_attn.nn.timed import Timed

__all__ = ["LieMixer"]


class LieMixer(Timed, SelfAttention):
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
        >>> from liegroup_attn.nn import RateMatrix
        >>> layer = LieMixer(16, 2, RateMatrix(2, num_tokens=5))
        >>> layer(torch.zeros(1, 5, 16)).shape
        torch.Size([1, 5, 16])

    Source: [Tolstikhin2021]_ (mixing by a learned matrix); docs/mathematics.
    """

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
        self.clock = clock
        self.method = method

    def _make_scores(self, scores: BilinearScores | None, bias: bool) -> None:
        """None: there is nothing to score."""

    def _project(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        value = self._values(x)
        return value, value, value

    def mix(  # noqa: D102
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        bias: Tensor | None = None,
    ) -> Tensor:
        if attn_mask is not None:
            raise MaskError(
                "attn_mask: expected None, got a mask; what a learned generator joins is its manifold's support"
            )
        generator = self.learned(value.size(-2))
        if self.training and self.dropout:
            eye = torch.eye(value.size(-2), dtype=value.dtype, device=value.device)
            mixing = expm_multiply(generator, eye, self.time_scale, clock=self.clock, method=self.method)  # (H, N, N)
            dropped = torch.nn.functional.dropout(mixing.expand(len(x), *mixing.shape), self.dropout)
            return dropped @ value
        return expm_multiply(generator, value, self.time_scale, clock=self.clock, method=self.method)

    def flows(self, x: Tensor, positions: Tensor | None = None) -> dict[str, tuple[Generator, Tensor]]:  # noqa: D102
        time = torch.full((self.num_heads, 1), self.time_scale, device=x.device)
        return {"Q": (self.learned(x.size(-2)), time)}

    @property
    def can_cache(self) -> bool:  # noqa: D102
        return False

    def cached_values(self, dtype: torch.dtype) -> tuple[int, int, torch.dtype]:  # noqa: D102
        raise CacheError("cache: expected a layer with keys, got LieMixer; generate with use_cache=False")

    def extend(  # noqa: D102
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: AttentionCache,
        bias: Tensor | None = None,
    ) -> Tensor:
        raise CacheError("cache: expected a layer with keys, got LieMixer; generate with use_cache=False")
