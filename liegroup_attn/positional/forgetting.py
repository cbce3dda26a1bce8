"""The forgetting gate: scores fall by what the tokens in between forget."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from liegroup_attn.errors import ShapeError
from liegroup_attn.positional.alibi import ALiBi
from liegroup_attn.positional.base import check_sizes
from liegroup_attn.positional.bias import BiasEncoding
from liegroup_attn.scores import Differences, Score
from liegroup_attn.tensors import at_least_float32, without_autocast

__all__ = ["ForgettingGate"]


class ForgettingGate(BiasEncoding):
    """Σ log f_l over j < l ≤ i is added to the scores, f_l = σ(w·x_l + b) the gate of token l: ALiBi whose slope is learned
    from the context.

    Its position is Σ log f_l up to the token; sums are made in float64, since their differences count. w starts at 0 and b so
    that −log f are ALiBi's slopes, hence the gate starts as ALiBi (the paper draws both).

    Means something under a causal mask alone; ``positions`` do not enter, so packed documents need a mask.

    Args:
        embed_dim: C.
        num_heads: H.

    Raises:
        ShapeError: sizes < 1.

    Example:
        >>> gate = ForgettingGate(4, 2)
        >>> x, q = torch.zeros(1, 3, 4), torch.zeros(1, 2, 3, 2)
        >>> torch.allclose(gate(x, q, q).tril(), ALiBi(2)(x, q, q).tril())
        True

    Source: [Lin2025]_.
    """

    contextual = True
    causal_only = True

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__(num_heads)
        check_sizes(embed_dim=embed_dim)
        self.embed_dim = embed_dim
        self.weight = nn.Parameter(torch.zeros(num_heads, embed_dim))
        slopes = ALiBi(num_heads).slopes()
        self.bias = nn.Parameter(-slopes.expm1().log().to(torch.get_default_dtype()))

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.embed_dim}, {self.num_heads}"

    def between(self, here: Tensor, there: Tensor, *leaves: Tensor) -> Tensor:  # noqa: D102
        raise NotImplementedError("between: expected tokens beside positions; call the encoding with x")

    def accumulated(self, x: Tensor) -> Tensor:
        """Σ log f_l over l ≤ i.

        Args:
            x: (B, N, C).

        Returns:
            (B, H, N), float64.

        Raises:
            ShapeError: another width.
        """
        if x.size(-1) != self.embed_dim:
            raise ShapeError(f"x: expected width {self.embed_dim}, got shape {tuple(x.shape)}; match embed_dim")
        gates = F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return F.logsigmoid(gates).double().cumsum(-2).mT

    def of_tokens(self, x: Tensor, query: Tensor, key: Tensor, coordinates: Tensor) -> Tensor:  # noqa: D102
        position = self.accumulated(x)
        return (position.unsqueeze(-1) - position.unsqueeze(-2)).tril().to(x.dtype)

    def score(self, x: Tensor, query: Tensor, key: Tensor, positions: Tensor | None = None) -> Score:  # noqa: D102
        self._coordinates(query, positions)
        with without_autocast(query):
            return Differences(self.accumulated(at_least_float32(x)))
