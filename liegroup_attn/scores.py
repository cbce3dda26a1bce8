"""What acts on scores before the softmax, block of rows by block of rows: biases, soft caps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy

import torch
from torch import Tensor

from liegroup_attn.checks import check_finite
from liegroup_attn.errors import DtypeError, GeneratorError, MaskError, ShapeError
from liegroup_attn.tensors import fits, of_items, split_by

__all__ = ["Bias", "Differences", "PairBias", "Score", "SoftCap", "TensorBias"]


class Score(ABC):
    """What acts on a block of scores, and the tensors that it may be differentiated by.

    A sweep calls it on rows start … start + b and the columns it needs, forward and again in the backward; so it holds no
    tensor but ``leaves``, which come by argument: autograd, vmap and forward mode see them there. ``a | b`` acts by a,
    then by b.
    """

    leaves: tuple[Tensor, ...] = ()
    adds = False  # whether it adds what does not depend on the scores
    rank = 3  # of a leaf (heads, rows, columns); further dimensions in front are a batch

    @abstractmethod
    def act(self, scores: Tensor, start: int, leaves: Sequence[Tensor]) -> Tensor:
        """The scores as the softmax takes them.

        Args:
            scores: (..., b, M), rows from ``start`` and columns from 0.
            start: the first row.
            leaves: those of ``at``.

        Returns:
            The shape and dtype of ``scores``.
        """

    def at(self, leaves: Sequence[Tensor], start: int, stop: int) -> Sequence[Tensor]:
        """What rows start … stop need of the leaves."""
        return leaves

    def gather(self, leaves: Sequence[Tensor], pieces: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Gradients by the leaves from those by what blocks needed of them, block after block."""
        return [_sum(parts) for parts in zip(*pieces, strict=True)]

    def pull(self, scores: Tensor, start: int, leaves: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        """Gradients by the scores and by the leaves of a block."""
        found: tuple[Tensor, ...] = torch.func.vjp(lambda s, *t: self.act(s, start, t), scores, *leaves)[1](grad)
        return found

    def push(
        self, scores: Tensor, start: int, leaves: Sequence[Tensor], d_scores: Tensor, d_leaves: Sequence[Tensor]
    ) -> Tensor:
        """The tangent of a block."""
        # Twice in reverse: forward mode does not nest in itself.
        back = torch.func.vjp(lambda g: self.pull(scores, start, leaves, g), torch.zeros_like(scores))[1]
        found: Tensor = back((d_scores, *d_leaves))[0]
        return found

    def acted(self, scores: Tensor, start: int, leaves: Sequence[Tensor]) -> Tensor:
        """``act``; ShapeError if it does not leave the shape of a block as it was."""
        found = self.act(scores, start, leaves)
        if found.shape != scores.shape:
            raise ShapeError(
                f"score: expected {type(self).__name__} to leave a block of scores {tuple(scores.shape)} as it is, got "
                f"{tuple(found.shape)}; act entry by entry"
            )
        return found

    def check(self, scores_shape: torch.Size) -> None:  # noqa: B027
        """Raise unless its leaves fit scores (..., N, M)."""

    def of_items(self, items: int) -> Score:
        """The same for the first items of a batch (B, H)."""
        twin = copy(self)
        twin.leaves = of_items(self.leaves, items, self.rank)
        return twin

    def formed(self, rows: int, columns: int) -> Tensor:
        """What it adds, broadcastable to (..., rows, columns); of scores that ``adds``."""
        raise NotImplementedError

    def __or__(self, other: Score) -> Score:
        return _Then(self, other) if isinstance(other, Score) else NotImplemented


class Bias(Score):
    """A number per pair of tokens, added to the scores."""

    adds = True

    @abstractmethod
    def rows(self, start: int, stop: int, columns: int, leaves: Sequence[Tensor]) -> Tensor:
        """The bias of rows start … stop, broadcastable to (..., stop − start, columns)."""

    def formed(self, rows: int, columns: int) -> Tensor:  # noqa: D102
        return self.rows(0, rows, columns, self.leaves)

    def act(self, scores: Tensor, start: int, leaves: Sequence[Tensor]) -> Tensor:  # noqa: D102
        bias = self.rows(start, start + scores.size(-2), scores.size(-1), leaves)
        return scores + bias.to(scores.dtype)

    def pull(self, scores: Tensor, start: int, leaves: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        b, columns = scores.shape[-2:]

        def bias(*given: Tensor) -> Tensor:
            return self.rows(start, start + b, columns, given).to(scores.dtype).expand(scores.shape)

        return (grad, *torch.func.vjp(bias, *leaves)[1](grad)) if leaves else (grad,)


class TensorBias(Bias):
    """A bias that is formed, (..., N or 1, M or 1).

    Args:
        bias: floating point.
        first: the token that its first row is of.
    """

    def __init__(self, bias: Tensor, first: int = 0) -> None:
        self.first = first
        self.leaves = (bias,)

    def check(self, scores_shape: torch.Size) -> None:  # noqa: D102
        check_bias(self.leaves[0], scores_shape)

    def at(self, leaves: Sequence[Tensor], start: int, stop: int) -> Sequence[Tensor]:  # noqa: D102
        (bias,) = leaves
        if bias.size(-2) == 1:
            return [bias]
        return [bias[..., start - self.first : stop - self.first, :]]

    def formed(self, rows: int, columns: int) -> Tensor:  # noqa: D102
        return self.leaves[0][..., :rows, :columns]

    def rows(self, start: int, stop: int, columns: int, leaves: Sequence[Tensor]) -> Tensor:  # noqa: D102
        return leaves[0][..., : stop - start, :columns]

    def gather(self, leaves: Sequence[Tensor], pieces: Sequence[Sequence[Tensor]]) -> list[Tensor]:  # noqa: D102
        parts = [piece for (piece,) in pieces]
        return [_sum(parts) if leaves[0].size(-2) == 1 else torch.cat(parts, -2)]


class PairBias(Bias):
    """A function of two positions, computed where it is needed.

    Args:
        between: of here (..., b, 1), there (..., 1, M) and the parameters; gives (..., H, b, M).
        coordinates: of the tokens, (..., N, 1).
        parameters: of the function.
    """

    def __init__(self, between: Callable[..., Tensor], coordinates: Tensor, parameters: Sequence[Tensor]) -> None:
        self.between = between
        self.leaves = (coordinates, *parameters)

    def check(self, scores_shape: torch.Size) -> None:  # noqa: D102
        _check_tokens(self, self.leaves[0].size(-2), scores_shape)

    def rows(self, start: int, stop: int, columns: int, leaves: Sequence[Tensor]) -> Tensor:  # noqa: D102
        coordinates, *parameters = leaves
        return self.between(coordinates[..., start:stop, :], coordinates[..., :columns, :].mT, *parameters)


class Differences(Bias):
    """u_i − u_j of one number a token, subtracted in its own dtype; 0 for later tokens, which would only overflow.

    Args:
        u: (..., N).
    """

    rank = 2

    def __init__(self, u: Tensor) -> None:
        self.leaves = (u,)

    def check(self, scores_shape: torch.Size) -> None:  # noqa: D102
        _check_tokens(self, self.leaves[0].size(-1), scores_shape)

    def rows(self, start: int, stop: int, columns: int, leaves: Sequence[Tensor]) -> Tensor:  # noqa: D102
        (u,) = leaves
        return (u[..., start:stop, None] - u[..., None, :columns]).tril(start)


class SoftCap(Score):
    """cap · tanh(score / cap): no score is larger than the cap.

    Args:
        cap: > 0.

    Raises:
        GeneratorError: not positive and finite.

    Example:
        >>> SoftCap(2.0).act(torch.tensor([[0.0, 100.0]]), 0, ())
        tensor([[0., 2.]])
    """

    def __init__(self, cap: float) -> None:
        if not isinstance(cap, float | int) or not 0 < cap < math.inf:
            raise GeneratorError(f"cap: expected a positive number, got {cap}; None of it leaves scores as they are")
        self.cap: float = cap

    def act(self, scores: Tensor, start: int, leaves: Sequence[Tensor]) -> Tensor:  # noqa: D102
        return self.cap * (scores / self.cap).tanh()


class _Then(Score):
    def __init__(self, *parts: Score) -> None:
        self.parts: tuple[Score, ...] = tuple(
            q for part in parts for q in (part.parts if isinstance(part, _Then) else (part,))
        )
        self.leaves = tuple(leaf for part in self.parts for leaf in part.leaves)
        self.adds = all(part.adds for part in self.parts)

    def of_items(self, items: int) -> Score:
        return _Then(*(part.of_items(items) for part in self.parts))

    def check(self, scores_shape: torch.Size) -> None:
        for part in self.parts:
            part.check(scores_shape)

    def _split(self, leaves: Sequence[Tensor]) -> list[tuple[Score, Sequence[Tensor]]]:
        counts = (len(part.leaves) for part in self.parts)
        return list(zip(self.parts, split_by(counts, leaves), strict=True))

    def at(self, leaves: Sequence[Tensor], start: int, stop: int) -> Sequence[Tensor]:
        return [leaf for part, own in self._split(leaves) for leaf in part.at(own, start, stop)]

    def act(self, scores: Tensor, start: int, leaves: Sequence[Tensor]) -> Tensor:
        for part, own in self._split(leaves):
            scores = part.act(scores, start, own)
        return scores

    def formed(self, rows: int, columns: int) -> Tensor:
        return _sum([part.formed(rows, columns) for part in self.parts])

    def gather(self, leaves: Sequence[Tensor], pieces: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        split = [self._split(piece) for piece in pieces]
        found: list[Tensor] = []
        for i, (part, own) in enumerate(self._split(leaves)):
            found += part.gather(own, [blocks[i][1] for blocks in split])
        return found


def _check_tokens(score: Score, tokens: int, scores_shape: torch.Size) -> None:
    if tokens != scores_shape[-1]:
        raise ShapeError(
            f"score: expected {type(score).__name__} of {scores_shape[-1]} tokens, got {tokens}; make it for these queries and keys"
        )


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def read_score(score: Score | Tensor | None, scores_shape: torch.Size, first: int = 0) -> Score | None:
    """A score, or of a tensor that is added, whose first row is of the token ``first``; DtypeError if it is neither."""
    if score is None:
        return None
    if isinstance(score, Score):
        score.check(scores_shape)
        return score
    if isinstance(score, Tensor):
        return TensorBias(check_bias(score, scores_shape), first)
    raise DtypeError(
        f"score: expected a Score such as SoftCap(50.0), or a floating-point tensor to be added, got {type(score).__name__}; of "
        "a bias encoding take encoding.score(x, query, key)"
    )


def check_bias(score_bias: Tensor, scores_shape: torch.Size) -> Tensor:
    """It, or an error: finite numbers (looked at on CPU), broadcastable to (..., N, M); a mask hides, a bias does not."""
    if not isinstance(score_bias, Tensor) or not score_bias.is_floating_point():
        got = score_bias.dtype if isinstance(score_bias, Tensor) else type(score_bias).__name__
        raise DtypeError(f"score: expected a floating-point tensor, got {got}; what hides tokens is a mask")
    if score_bias.dim() < 2 or not fits(score_bias.shape, scores_shape):
        raise MaskError(
            f"score: expected a shape broadcastable to {tuple(scores_shape)} with at least 2 dimensions, got "
            f"{tuple(score_bias.shape)}; one number per query and key"
        )
    check_finite("score", score_bias)
    return score_bias
