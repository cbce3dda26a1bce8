"""Sampling: from scores of the next token to the token, and on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from liegroup_attn.errors import GeneratorError, ShapeError

__all__ = ["check_sampling", "sample"]


def sample(
    scores: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: torch.Generator | None = None,
) -> Tensor:
    """Draw the next token.

    Args:
        scores: (B, V), unnormalized log-probabilities.
        temperature: ≥ 0, divides the scores; 0 takes the most probable token.
        top_k: draw among the k most probable only.
        top_p: draw among the fewest tokens whose probabilities sum to at least p only.
        rng: torch's global generator if None.

    Returns:
        (B, 1), integer.

    Raises:
        GeneratorError: temperature < 0, top_k < 1 or top_p outside (0, 1].

    Example:
        >>> sample(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0)
        tensor([[1]])

    Source: [Holtzman2020]_ (top-p).
    """
    check_sampling(temperature, top_k, top_p)
    scores = scores.float()
    if temperature == 0:
        return scores.argmax(-1, keepdim=True)
    ranked, order = (scores / temperature).sort(-1, descending=True)
    if top_k is not None:
        ranked[:, top_k:] = -torch.inf
    if top_p is not None:
        probability = ranked.softmax(-1)
        before = probability.cumsum(-1) - probability  # of all that are more probable
        ranked = ranked.masked_fill(before >= top_p, -torch.inf)
    drawn = torch.multinomial(ranked.softmax(-1), 1, generator=rng)
    return order.gather(-1, drawn)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise GeneratorError unless the knobs of ``sample`` make sense."""
    if not 0 <= temperature < float("inf"):
        raise GeneratorError(f"temperature: expected ≥ 0, got {temperature}; 0 takes the most probable token")
    if top_k is not None and top_k < 1:
        raise GeneratorError(f"top_k: expected at least 1, got {top_k}; None allows all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise GeneratorError(f"top_p: expected a probability in (0, 1], got {top_p}; None allows all tokens")


def continue_tokens(
    step: Callable[[Tensor], Tensor],
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    incremental: bool,
) -> Tensor:
    """Append tokens one by one: ``step`` takes tokens (all, or with ``incremental`` those it has not seen) to scores."""
    if tokens.dim() != 2 or tokens.size(1) == 0 or tokens.is_floating_point():
        raise ShapeError(
            f"tokens: expected integers (batch, at least 1), got {tokens.dtype} {tuple(tokens.shape)}; start from a newline byte"
        )
    if max_new_tokens < 0:
        raise GeneratorError(f"max_new_tokens: expected at least 0, got {max_new_tokens}; 0 returns the prompt")
    check_sampling(temperature, top_k, top_p)
    rng = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
    unseen = tokens
    for _ in range(max_new_tokens):
        new = sample(step(unseen), temperature=temperature, top_k=top_k, top_p=top_p, rng=rng)
        tokens = torch.cat([tokens, new], 1)
        unseen = new if incremental else tokens
    return tokens
