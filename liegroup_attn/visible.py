"""Who sees whom, block of rows by block of rows: masks through which exp(tQ) does not leak."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from functools import reduce
from operator import and_
from typing import TypeAlias

import torch
from torch import Tensor

from liegroup_attn.errors import DtypeError, MaskError
from liegroup_attn.tensors import fits, of_items, split_by

__all__ = ["Allowed", "Causal", "Documents", "Everything", "Padding", "Visible", "Window"]


Seen: TypeAlias = Sequence[Tensor]
Device: TypeAlias = torch.device | None
Rows: TypeAlias = Tensor | None


class Visible(ABC):
    """Who sees whom: which targets take part in a row. ``a & b`` is what both allow.

    As a ``Score``, it holds no tensor but ``tensors``, which come by argument.

    Attributes:
        tensors: what rows are made from.
        is_causal: whether no row sees a later token.
        closed: whether it need not be looked at: several allowed hops lead only where one does, by its making, or (a
            window) are meant.
        own: whether every token sees itself, so that no row is empty.
    """

    tensors: tuple[Tensor, ...] = ()
    is_causal = False
    closed = True
    own = True
    rank = 2  # of a tensor (heads, tokens); further dimensions in front are a batch

    @abstractmethod
    def rows(self, start: int, stop: int, columns: int, tensors: Seen, device: Device = None) -> Rows:
        """Which of the first ``columns`` targets take part in rows start … stop.

        Args:
            start: the first row.
            stop: the row after the last.
            columns: how many targets.
            tensors: in the place of its own.
            device: of the result.

        Returns:
            Bool, broadcastable to (..., stop − start, columns); None if all do.
        """

    @property
    def parts(self) -> tuple[Visible, ...]:
        """Those of which it is what all allow."""
        return (self,)

    def check(self, scores_shape: torch.Size) -> None:
        """Raise MaskError unless its tensors fit scores (..., N, N): a number a token, if it has any."""
        rows = scores_shape[:-1]
        for tensor in self.tensors:
            if not fits(tensor.shape, rows) or tensor.size(-1) != rows[-1]:
                raise MaskError(
                    f"visible: expected {type(self).__name__} of a shape broadcastable to {tuple(rows)}, an entry a token, got "
                    f"{tuple(tensor.shape)}; index it as (batch, 1, token) beside heads"
                )

    def of_items(self, items: int) -> Visible:
        """The same for the first items of a batch (B, H)."""
        twin = copy(self)
        twin.tensors = of_items(self.tensors, items, self.rank)
        return twin

    def __and__(self, other: Visible) -> Visible:
        return _All(self, other) if isinstance(other, Visible) else NotImplemented

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Causal(Visible):
    """No token sees a later one.

    Example:
        >>> (Causal() & Window(2)).rows(0, 3, 3, ())
        tensor([[ True, False, False],
                [ True,  True, False],
                [False,  True,  True]])
    """

    is_causal = True

    def rows(self, start: int, stop: int, columns: int, tensors: Seen, device: Device = None) -> Rows:  # noqa: D102
        return torch.ones(stop - start, columns, dtype=torch.bool, device=device).tril(start)


class Window(Visible):
    """A token sees those fewer than ``width`` places away, itself among them. What several hops reach beyond is meant.

    Args:
        width: W ≥ 1.

    Raises:
        MaskError: less than 1.
    """

    def __init__(self, width: int) -> None:
        if not isinstance(width, int) or width < 1:
            raise MaskError(f"width: expected a whole number from 1, got {width!r}; 1 is the token itself")
        self.width = width

    def rows(self, start: int, stop: int, columns: int, tensors: Seen, device: Device = None) -> Rows:  # noqa: D102
        all_seen = torch.ones(stop - start, columns, dtype=torch.bool, device=device)
        return all_seen.tril(start + self.width - 1).triu(start - self.width + 1)

    def __repr__(self) -> str:
        return f"Window({self.width})"


class Documents(Visible):
    """Tokens see those of their own document.

    Args:
        ids: of each token's document, whole numbers broadcastable to (..., N): (B, 1, N) beside heads.

    Raises:
        DtypeError: not whole numbers.

    Example:
        >>> Documents(torch.tensor([0, 0, 1])).rows(1, 3, 3, [torch.tensor([0, 0, 1])])
        tensor([[ True,  True, False],
                [False, False,  True]])
    """

    def __init__(self, ids: Tensor) -> None:
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool or not ids.dim():
            got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise DtypeError(f"ids: expected whole numbers (..., N), got {got}; one document's number a token")
        self.tensors = (ids,)

    def rows(self, start: int, stop: int, columns: int, tensors: Seen, device: Device = None) -> Rows:  # noqa: D102
        (ids,) = tensors
        return ids[..., start:stop, None] == ids[..., None, :columns]


class Padding(Visible):
    """No token sees padding.

    Args:
        tokens: bool, broadcastable to (..., N): True takes part; (B, 1, N) beside heads.

    Raises:
        DtypeError: not bool.
    """

    own = False

    def __init__(self, tokens: Tensor) -> None:
        if not isinstance(tokens, Tensor) or tokens.dtype != torch.bool or not tokens.dim():
            got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise DtypeError(
                f"tokens: expected torch.bool (..., N), True = takes part, got {got}; Padding.of_lengths takes numbers of tokens"
            )
        self.tensors = (tokens,)

    @classmethod
    def of_lengths(cls, lengths: Tensor, num_tokens: int) -> Padding:
        """Padding behind sequences of these lengths, (...,) whole numbers; (B, 1) beside heads."""
        if not isinstance(lengths, Tensor) or lengths.is_floating_point():
            raise DtypeError(f"lengths: expected a tensor of whole numbers, got {lengths!r}; one length a sequence")
        return cls(torch.arange(num_tokens, device=lengths.device) < lengths.unsqueeze(-1))

    def rows(self, start: int, stop: int, columns: int, tensors: Seen, device: Device = None) -> Rows:  # noqa: D102
        return tensors[0][..., None, :columns]


class Allowed(Visible):
    """What a mask allows.

    Args:
        mask: bool (True = takes part), (..., N or 1, M or 1).
        reached: of a float mask, what it adds to the scores, which decides whom a softmax reaches; only a look for leaks asks.
        first: the token that its first row is of.
        closed: as in ``Visible``; a mask with one row for all, of padding, is.
    """

    own = False
    rank = 3

    def __init__(self, mask: Tensor, reached: Tensor | None = None, *, closed: bool = False, first: int = 0) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() < 2:
            raise MaskError(
                f"mask: expected torch.bool (..., rows, columns), True = takes part, got {_said(mask)}; visible=mask takes floats, too"
            )
        self.first = first
        self.tensors = (mask,)
        self.reached = reached
        self.closed = closed or mask.size(-2) == 1

    def check(self, scores_shape: torch.Size) -> None:  # noqa: D102
        if not fits(self.tensors[0].shape, scores_shape):
            raise MaskError(
                f"attn_mask: expected a shape broadcastable to {tuple(scores_shape)} with at least 2 dimensions, "
                f"got {tuple(self.tensors[0].shape)}; index it as (batch, 1, query, key) or (query, key)"
            )

    def rows(self, start: int, stop: int, columns: int, tensors: Seen, device: Device = None) -> Rows:  # noqa: D102
        (mask,) = tensors
        if mask.size(-2) > 1:
            mask = mask[..., start - self.first : stop - self.first, :]
        return mask[..., :columns]


class _All(Visible):
    def __init__(self, *given: Visible) -> None:
        self._parts = tuple(part for visible in given for part in visible.parts)
        self.tensors = tuple(tensor for part in self._parts for tensor in part.tensors)
        self.is_causal = any(part.is_causal for part in self._parts)
        self.closed, self.own = (all(getattr(part, name) for part in self._parts) for name in ("closed", "own"))

    @property
    def parts(self) -> tuple[Visible, ...]:
        return self._parts

    def of_items(self, items: int) -> Visible:
        return _All(*(part.of_items(items) for part in self._parts))

    def rows(self, start: int, stop: int, columns: int, tensors: Seen, device: Device = None) -> Rows:
        split = zip(self._parts, split_by((len(part.tensors) for part in self._parts), tensors), strict=True)
        found = [part.rows(start, stop, columns, own, device) for part, own in split]
        shown = [rows for rows in found if rows is not None]
        return reduce(and_, shown) if shown else None

    def check(self, scores_shape: torch.Size) -> None:
        for part in self._parts:
            part.check(scores_shape)

    def __repr__(self) -> str:
        return " & ".join(map(repr, self._parts)) or "Everything()"


class Everything(_All):
    """Every token sees every other."""

    def __init__(self) -> None:
        super().__init__()


def _said(mask: object) -> str:
    return f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
