"""The contract: where a position acts, on tokens, or on queries and keys; ``bias`` has those on the scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from liegroup_attn.checks import check_shape
from liegroup_attn.errors import DtypeError, ShapeError
from liegroup_attn.resettable import Resettable
from liegroup_attn.tensors import fits, values_visible, without_autocast

__all__ = ["AbsoluteEncoding", "PositionalEncoding", "RotationEncoding", "grid_positions"]


class PositionalEncoding(Resettable, ABC):
    """What all encodings share: positions are checked once, here, and computed with in at least float32.

    Positions are (..., N) on one axis and (..., N, P) on P axes; integers, or float32 and float64 where ``fractional``.
    Nothing made from them is cached or cast by ``.to(torch.bfloat16)``, which would merge 4096 positions into 769.
    """

    axes = 1  # P
    fractional = True  # whether positions between integers mean something
    negative = True  # whether positions below 0 mean something
    relative = True  # whether attention sees positions through their differences alone, as a law that tests measure
    causal_only = False  # whether it means something under a causal mask alone

    def coordinates(self, positions: Tensor | None, tokens: torch.Size, like: Tensor) -> Tensor:
        """Positions as numbers to compute with.

        Args:
            positions: (..., N), or (..., N, P) on several axes; None counts tokens from 0.
            tokens: (..., N), what positions must broadcast to.
            like: a tensor of the device, whose float64 asks for float64.

        Returns:
            (..., N, P), float32 or float64.

        Raises:
            ShapeError: positions that do not fit, or None on several axes.
            DtypeError: positions in half precision, bool, or not integers where these are needed.
            ValueError: positions below 0 (looked at on CPU) where these mean nothing.
        """
        name = type(self).__name__
        if positions is None:
            if self.axes > 1:
                raise ShapeError(
                    f"positions: expected (..., N, {self.axes}) for {name} on {self.axes} axes, got None; give them, e.g. "
                    "grid_positions(8, 8)"
                )
            positions = torch.arange(tokens[-1], device=like.device)
        allowed = (torch.float32, torch.float64) if self.fractional else ()
        if positions.dtype == torch.bool or positions.is_complex():
            raise DtypeError(f"positions: expected integers, got {positions.dtype}; count tokens with torch.arange")
        if positions.is_floating_point() and positions.dtype not in allowed:
            either = "integers, float32 or float64" if self.fractional else "integers"
            raise DtypeError(
                f"positions: expected {either} for {name}, got {positions.dtype}; "
                + ("half precision merges neighbours" if self.fractional else "round them, or take a rotary encoding")
            )
        if self.axes > 1 and (positions.dim() < 2 or positions.size(-1) != self.axes):
            raise ShapeError(
                f"positions: expected (..., N, {self.axes}) for {name} on {self.axes} axes, got {tuple(positions.shape)}; "
                "one number per token and axis"
            )
        shape = positions.shape[:-1] if self.axes > 1 else positions.shape
        if not fits(shape, tokens):
            axis = f" (and {self.axes} axes)" if self.axes > 1 else ""
            raise ShapeError(
                f"positions: expected a shape broadcastable to {tuple(tokens)}{axis}, got {tuple(positions.shape)}; one per token"
            )
        if not self.negative and positions.numel() and values_visible(positions) and int(positions.min()) < 0:
            raise ValueError(
                f"positions: expected numbers ≥ 0 for {name}, got {int(positions.min())}; count from the first token"
            )
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        numbers = positions.to(wide)
        return numbers if self.axes > 1 else numbers.unsqueeze(-1)


class AbsoluteEncoding(PositionalEncoding):
    """A vector per position is added to the tokens, once, before the first layer: a translation of feature space.

    Args:
        embed_dim: C.
    """

    relative = False

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        if embed_dim < 1:
            raise ShapeError(f"embed_dim: expected at least 1, got {embed_dim}; it is the model's width")
        self.embed_dim = embed_dim

    @abstractmethod
    def table(self, coordinates: Tensor) -> Tensor:
        """The vectors at coordinates (..., N, P): (..., N, C)."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Add each token its position's vector.

        Args:
            x: (..., N, C).
            positions: broadcastable to (..., N) or (..., N, P); default 0 … N − 1.

        Returns:
            (..., N, C), dtype of ``x``.

        Raises:
            ShapeError, DtypeError, ValueError: see ``coordinates``; or another width.
        """
        check_shape("x", x, least_rank=2, remedy="give (..., tokens, width)")
        if x.size(-1) != self.embed_dim:
            raise ShapeError(f"x: expected width {self.embed_dim}, got shape {tuple(x.shape)}; match embed_dim")
        with without_autocast(x):
            vectors = self.table(self.coordinates(positions, x.shape[:-1], x))
            return (x.to(vectors.dtype) + vectors).to(x.dtype)


class RotationEncoding(PositionalEncoding):
    """A matrix R(position) acts on every query and key: scores are ⟨R(x)q, R(y)k⟩.

    Where ``relative``, R(x)ᵀR(y) = R(y − x), and scores know the difference alone.

    Args:
        head_width: D.
        num_heads: number of heads with parameters of their own; None where heads share one R. Query heads are a multiple
            of it: each group shares the R of its key head.
        axes: P, numbers a position has.
    """

    def __init__(self, head_width: int, num_heads: int | None = None, axes: int = 1) -> None:
        super().__init__()
        if num_heads is not None and num_heads < 1:
            raise ShapeError(f"num_heads: expected at least 1, got {num_heads}; one R per key head")
        if axes < 1:
            raise ShapeError(f"axes: expected at least 1, got {axes}; 2 for images")
        self.head_width = head_width
        self.num_heads = num_heads
        self.axes = axes

    @abstractmethod
    def act(self, x: Tensor, coordinates: Tensor) -> Tensor:
        """R(coordinates) x.

        Args:
            x: (..., N, D), or (..., H, N, D) where heads have an R of their own; float32 or float64.
            coordinates: broadcastable to (..., N, P), dtype of ``x``.

        Returns:
            The shape of ``x``.
        """

    def act_on_keys(self, x: Tensor, coordinates: Tensor) -> Tensor:
        """What acts on keys where it isn't R itself."""
        return self.act(x, coordinates)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Let positions act, as on a query.

        Args:
            x: (..., N, D), or (..., H, N, D) where heads have an R of their own.
            positions: broadcastable to (..., N) or (..., N, P); default 0 … N − 1.

        Returns:
            The shape and dtype of ``x``.

        Raises:
            ShapeError, DtypeError, ValueError: see ``coordinates``; or another width or number of heads.
        """
        self._check("x", x)
        with without_autocast(x):
            coordinates = self.coordinates(positions, x.shape[:-1], x)
            return x if not x.size(-2) else self.act(x.to(coordinates.dtype), coordinates).to(x.dtype)

    def rotate(self, query: Tensor, key: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Let positions act on queries and keys of the same tokens.

        Args:
            query: (..., H, N, D).
            key: (..., H_kv, N, D).
            positions: broadcastable to (..., 1, N) or (..., 1, N, P); default 0 … N − 1.

        Returns:
            Queries and keys.

        Raises:
            ShapeError, DtypeError, ValueError: as ``forward``.
        """
        self._check("query", query)
        self._check("key", key)
        if query.size(-2) != key.size(-2):
            raise ShapeError(
                f"key: expected the query's {query.size(-2)} tokens, got {key.size(-2)}; rotate each with its own tokens and take "
                "rotate(query, query)[0], rotate(key, key)[1]"
            )
        with without_autocast(query):
            coordinates = self.coordinates(positions, query.shape[:-1], query)
            return self.act_both(query, key, coordinates) if query.size(-2) else (query, key)

    def act_both(self, query: Tensor, key: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys, checked; to be overridden where both share work."""
        turned = self.act(query.to(coordinates.dtype), coordinates)
        return turned.to(query.dtype), self.act_on_keys(key.to(coordinates.dtype), coordinates).to(key.dtype)

    def matrix(self, positions: Tensor) -> Tensor:
        """R as matrices, to look at; attention never forms them.

        Args:
            positions: (N,) or (N, P).

        Returns:
            (N, D, D), or (H, N, D, D) where heads have an R of their own; float64.

        Raises:
            ShapeError, DtypeError, ValueError: see ``coordinates``.
        """
        tokens = positions.size(0)
        eye = torch.eye(self.head_width, dtype=torch.float64, device=positions.device)
        columns = eye.unsqueeze(1).expand(-1, tokens, -1)  # one column at all positions: (D, N, D)
        if self.num_heads is not None:
            columns = columns.unsqueeze(1).expand(-1, self.num_heads, -1, -1)  # (D, H, N, D)
        return self(columns, positions).movedim(0, -1)  # (…, N, D, D)

    def per_head(self, parameter: Tensor, x: Tensor) -> Tensor:
        """A parameter (G, ...) with one entry per key head, repeated for the heads of x (..., H, N, D), in its dtype."""
        heads = x.size(-3)
        wide = parameter.to(x.dtype)
        return wide if heads == len(parameter) else wide.repeat_interleave(heads // len(parameter), 0)

    def _check(self, name: str, x: Tensor) -> None:
        least = 2 if self.num_heads is None else 3
        remedy = "give (..., tokens, width)" if self.num_heads is None else "give (..., heads, tokens, width)"
        check_shape(name, x, least_rank=least, remedy=remedy)
        if x.size(-1) != self.head_width:
            raise ShapeError(f"{name}: expected width {self.head_width}, got shape {tuple(x.shape)}; match head_width")
        if self.num_heads is not None and (x.size(-3) < self.num_heads or x.size(-3) % self.num_heads):
            raise ShapeError(
                f"{name}: expected a multiple of {self.num_heads} heads, got shape {tuple(x.shape)}; match num_heads"
            )


def grid_positions(*sizes: int, device: torch.device | str | None = None) -> Tensor:
    """Positions of a grid's cells, in reading order.

    Args:
        sizes: of the axes, e.g. rows and columns.
        device: of the result.

    Returns:
        (product of sizes, number of sizes), integers.

    Raises:
        ShapeError: no size, or one < 1.

    Example:
        >>> grid_positions(2, 2).tolist()
        [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    if not sizes or min(sizes) < 1:
        raise ShapeError(f"sizes: expected numbers ≥ 1, got {sizes}; give rows and columns, e.g. grid_positions(8, 8)")
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in sizes)).view(-1, len(sizes))


def along_axes(coordinates: Tensor, frequencies: Tensor) -> Tensor:
    """Σ_p x_p f_p, (..., N, P), (..., P, F) → (..., N, F): products summed, not a matmul, since TF32 would merge far positions."""
    angles = coordinates[..., :1] * frequencies[..., :1, :]
    for p in range(1, coordinates.size(-1)):
        angles = angles + coordinates[..., p : p + 1] * frequencies[..., p : p + 1, :]
    return angles


def check_sizes(**sizes: int | Sequence[int]) -> None:
    """Raise ShapeError unless every named size is an integer ≥ 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ShapeError(f"{name}: expected an integer from 1, got {size!r}; change it")
