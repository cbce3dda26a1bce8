"""The generator Q as a linear operator: what it does to values, its matrix, and a bound on its rates."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from liegroup_attn.algebra import is_rate_matrix
from liegroup_attn.errors import (
    DtypeError,
    GeneratorError,
    ShapeError,
    check_dropout,
    check_finite,
    check_jump_rates,
    check_scale,
    check_shape,
    values_visible,
)
from liegroup_attn.rates import prepare_mask

__all__ = ["DenseGenerator", "Generator", "SoftmaxGenerator"]


class Generator(ABC):
    """A rate matrix Q on N tokens, known by what it does: Q_ij ≥ 0 for i ≠ j, rows sum to 0.

    Rows are sources and columns are targets; Q acts on the token axis of values (..., N, D).
    """

    num_states: int
    batch_shape: torch.Size
    is_causal: bool = False
    dropout_p: float = 0.0

    @abstractmethod
    def apply(self, value: Tensor) -> Tensor:
        """Q · value.

        Args:
            value: (..., N, D).

        Returns:
            (..., N, D), dtype of ``value``.
        """

    @abstractmethod
    def jump(self, value: Tensor) -> Tensor:
        """S · value, one jump of the jump chain.

        Args:
            value: (..., N, D).

        Returns:
            (..., N, D), dtype of ``value``.
        """

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix Q.

        Returns:
            (..., N, N), float32 or float64.
        """

    @abstractmethod
    def rate_bound(self) -> float | Tensor:
        """Λ with Λ ≥ every exit rate.

        Returns:
            A number, or (..., 1) for one bound per matrix.
        """

    def check(self, atol: float | None = None) -> tuple[bool, str | None]:
        """Say whether Q is a rate matrix; forms it, and on a GPU waits for it.

        Args:
            atol: absolute tolerance; default by dtype and size.

        Returns:
            ``(True, None)`` or ``(False, reason)``.
        """
        return is_rate_matrix(self.dense(), atol)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _product(matrix: Tensor, value: Tensor) -> Tensor:
    dtype = torch.promote_types(matrix.dtype, value.dtype)
    with torch.autocast(value.device.type, enabled=False):
        return (matrix.to(dtype) @ value.to(dtype)).to(value.dtype)


class DenseGenerator(Generator):
    """A generator given by its matrix.

    Args:
        generator: (..., N, N), off-diagonals ≥ 0, zero row sums; half precision is computed in float32.

    Raises:
        ShapeError: not square, or N = 0.
        GeneratorError: not a rate matrix (looked at on CPU only; elsewhere call ``check``).

    Example:
        >>> Q = DenseGenerator(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
        >>> Q.apply(torch.tensor([[1.0], [0.0]]))
        tensor([[-1.],
                [ 1.]])

    Source: [Norris1997]_, section 2.1.
    """

    def __init__(self, generator: Tensor) -> None:
        check_shape("generator", generator, least_rank=2, remedy="give square matrices (..., N, N)")
        n = generator.size(-1)
        if generator.size(-2) != n or n == 0:
            raise ShapeError(
                f"generator: expected square matrices (..., N, N) with N ≥ 1, got {tuple(generator.shape)}; "
                "queries and keys must be the same tokens"
            )
        if values_visible(generator):
            ok, reason = is_rate_matrix(generator)
            if not ok:
                raise GeneratorError(
                    f"generator: expected a rate matrix, got one of which {reason}; build it from nonnegative rates "
                    "with DenseGenerator.from_rates(R)"
                )
        matrix = _at_least_float32(generator)
        if matrix.dtype != generator.dtype:  # rows that sum to 0 in half precision do not in float32
            rest = matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))
            matrix = rest - torch.diag_embed(rest.sum(-1))
        self._hold(matrix, None)

    def _hold(self, matrix: Tensor, rates: Tensor | None) -> None:
        self.num_states, self.batch_shape = matrix.size(-1), matrix.shape[:-2]
        self._matrix, self._rates = matrix, rates

    @classmethod
    def from_rates(cls, rates: Tensor, *, jump_rates: Tensor | float | None = None) -> DenseGenerator:
        """Q = diag(ρ)(R − diag(R1)) from rates R ≥ 0; R_ii drops out of Q and enters only the jump chain S = R / R1.

        Args:
            rates: (..., N, N), ≥ 0. A zero row keeps its value.
            jump_rates: ρ, broadcastable to (..., N), in [0, 1]; None means 1.

        Returns:
            The generator.

        Raises:
            ShapeError: not square, or N = 0.
            GeneratorError: negative or non-finite rates (CPU).

        Example:
            >>> DenseGenerator.from_rates(torch.ones(2, 2)).dense()
            tensor([[-1.,  1.],
                    [ 1., -1.]])
        """
        check_shape("rates", rates, least_rank=2, remedy="give square matrices (..., N, N)")
        if rates.size(-1) != rates.size(-2) or rates.size(-1) == 0:
            raise ShapeError(
                f"rates: expected square matrices (..., N, N) with N ≥ 1, got {tuple(rates.shape)}; rates lead between "
                "the same tokens"
            )
        check_finite("rates", rates)
        if values_visible(rates) and float(rates.detach().min()) < 0:
            raise GeneratorError(
                f"rates: expected nonnegative numbers, got {float(rates.detach().min()):g}; use a rate function such as softplus"
            )
        rates = _at_least_float32(rates)
        rho = check_jump_rates(jump_rates, rates.shape[:-1], rates)
        off_diagonal = rates - torch.diag_embed(rates.diagonal(dim1=-2, dim2=-1))
        matrix = off_diagonal - torch.diag_embed(off_diagonal.sum(-1))
        generator = cls.__new__(cls)
        generator._hold(matrix if rho is None else rho.unsqueeze(-1).to(matrix.dtype) * matrix, rates)
        return generator

    def apply(self, value: Tensor) -> Tensor:  # noqa: D102
        return _product(self._matrix, value)

    def jump(self, value: Tensor) -> Tensor:  # noqa: D102
        chain = self.jump_chain()
        return _product(F.dropout(chain, self.dropout_p) if self.dropout_p else chain, value)

    def jump_chain(self) -> Tensor:
        """S as a matrix (..., N, N): normalized rates, a row without rates jumps to itself."""
        rates = self._rates
        if rates is None:
            rates = self._matrix - torch.diag_embed(self._matrix.diagonal(dim1=-2, dim2=-1))
        total = rates.sum(-1, keepdim=True)
        eye = torch.eye(self.num_states, dtype=rates.dtype, device=rates.device)
        return torch.where(total > 0, rates / total.where(total > 0, 1), eye)

    def dense(self) -> Tensor:  # noqa: D102
        return self._matrix

    def rate_bound(self) -> Tensor:  # noqa: D102
        exit_rates = -self._matrix.detach().diagonal(dim1=-2, dim2=-1)
        bound = exit_rates.amax(-1, keepdim=True)
        return bound.where(bound > 0, 1)  # any bound will do for Q = 0, but its gradient needs hops


class SoftmaxGenerator(Generator):
    """Q = diag(ρ)(S − I) with the jump chain S = softmax(scale · q kᵀ + mask); never forms N×N to act.

    One application is one ``scaled_dot_product_attention``, so its kernels, masks and memory apply.

    Args:
        query: (..., N, E).
        key: (..., N, E), same tokens as the query.
        jump_rates: ρ, broadcastable to (..., N), in [0, 1]; None means 1.
        attn_mask: broadcastable to (..., N, N), bool (True = takes part) or float (added to the scores), transitively
            closed. A row without an allowed target keeps its value.
        is_causal: lower-triangular mask.
        scale: of the scores; default 1/√E.
        dropout_p: probability of dropping an entry of S, drawn anew in each jump (``dense`` drops none).
        allow_open_mask: accept a mask that is not transitively closed; exp(tQ) then fills it.

    Raises:
        ShapeError: wrong rank, N = 0, or other tokens in the key than in the query.
        DtypeError: mixed dtypes.
        MaskError: see ``prepare_mask``.
        GeneratorError: NaN in query or key, ρ outside [0, 1] (CPU).

    Example:
        >>> q = torch.zeros(1, 2, 4)
        >>> SoftmaxGenerator(q, q).dense()
        tensor([[[-0.5000,  0.5000],
                 [ 0.5000, -0.5000]]])

    Source: docs/mathematics, "From scores to a generator".
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        *,
        jump_rates: Tensor | float | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        dropout_p: float = 0.0,
        allow_open_mask: bool = False,
    ) -> None:
        check_shape("query", query, least_rank=2, remedy="give (..., tokens, width)")
        check_shape("key", key, least_rank=2, remedy="give (..., tokens, width)")
        n = query.size(-2)
        if key.size(-2) != n or n == 0 or key.size(-1) != query.size(-1):
            raise ShapeError(
                f"key: expected the query's N ≥ 1 tokens and width {tuple(query.shape)}, got {tuple(key.shape)}; a generator "
                "needs queries and keys to be the same tokens (cross-attention has only first_hop=True, time=0)"
            )
        if query.dtype != key.dtype:
            raise DtypeError(f"key: expected {query.dtype} as the query, got {key.dtype}; convert one of them")
        if query.size(-1) == 0:
            raise ShapeError(
                f"query: expected a width of at least 1, got shape {tuple(query.shape)}; scores need features"
            )
        check_dropout(dropout_p)
        check_scale(scale)
        check_finite("query", query)
        check_finite("key", key)
        try:
            batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        except RuntimeError:
            raise ShapeError(
                f"key: expected a batch that broadcasts with the query's {tuple(query.shape)}, got {tuple(key.shape)}; "
                "give every query head a key head"
            ) from None
        self.num_states, self.batch_shape = n, batch
        self.is_causal = is_causal
        self.query, self.key = query, key
        self.scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
        self.dropout_p = dropout_p
        self.jump_rates = check_jump_rates(jump_rates, torch.Size([*batch, n]), query)
        self._mask = prepare_mask(attn_mask, is_causal, torch.Size([*batch, n, n]), query.dtype, allow_open_mask)

    def apply(self, value: Tensor) -> Tensor:  # noqa: D102
        moved = self.jump(value) - value
        return moved if self.jump_rates is None else self.jump_rates.unsqueeze(-1).to(value.dtype) * moved

    def jump(self, value: Tensor) -> Tensor:  # noqa: D102
        # Iterates may be wider than the scores' dtype; the kernels want one dtype, and S only averages.
        moved = F.scaled_dot_product_attention(
            self.query,
            self.key,
            value.to(self.query.dtype),
            attn_mask=self._mask.attn_mask,
            dropout_p=self.dropout_p,
            is_causal=self.is_causal,
            scale=self.scale,
        ).to(value.dtype)
        no_target = self._mask.no_target
        return moved if no_target is None else torch.where(no_target, value, moved)

    def scores(self) -> Tensor:
        """scale · q kᵀ plus a float mask, (..., N, N), float32 or float64; −inf or anything where masked."""
        with torch.autocast(self.query.device.type, enabled=False):
            query, key = _at_least_float32(self.query), _at_least_float32(self.key)
            scores = self.scale * (query @ key.mT)
            mask = self._mask.attn_mask
            return scores if mask is None or mask.dtype == torch.bool else scores + mask.to(scores.dtype)

    def masked(self) -> Tensor | None:
        """Which targets take no part, bool, broadcastable to (..., N, N); None means none."""
        if self.is_causal:
            return torch.ones(self.num_states, self.num_states, dtype=torch.bool, device=self.query.device).triu(1)
        return self._mask.masked()

    def jump_chain(self) -> Tensor:
        """S as a matrix (..., N, N), float32 or float64."""
        scores, masked, no_target = self.scores(), self.masked(), self._mask.no_target
        if masked is None:
            return scores.softmax(-1)
        eye = torch.eye(self.num_states, dtype=torch.bool, device=scores.device)
        if no_target is not None:  # such a row jumps to itself
            masked = torch.where(no_target, ~eye, masked)
        return scores.masked_fill(masked, -torch.inf).softmax(-1)

    def dense(self) -> Tensor:  # noqa: D102
        chain = self.jump_chain()
        moved = chain - torch.eye(self.num_states, dtype=chain.dtype, device=chain.device)
        return moved if self.jump_rates is None else self.jump_rates.unsqueeze(-1).to(chain.dtype) * moved

    def rate_bound(self) -> float:
        """1, whatever ρ: the number of hops is known from the time alone, before data is seen."""
        return 1.0
