"""The generator Q as a linear operator: what it does to values, its matrix, and a bound on its rates."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from liegroup_attn.algebra import is_rate_matrix
from liegroup_attn.errors import DtypeError, GeneratorError, ShapeError, check_shape
from liegroup_attn.rates import check_finite, prepare_mask

__all__ = ["DenseGenerator", "Generator", "SoftmaxGenerator"]


class Generator(ABC):
    """A rate matrix Q on N tokens, known by what it does: Q_ij ≥ 0 for i ≠ j, rows sum to 0.

    Rows are sources and columns are targets; Q acts on the token axis of values (..., N, D).
    """

    num_states: int
    is_causal: bool = False

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
        if generator.device.type == "cpu" and not torch.compiler.is_compiling():
            ok, reason = is_rate_matrix(generator)
            if not ok:
                raise GeneratorError(
                    f"generator: {reason}; build it from nonnegative rates with DenseGenerator.from_rates(R)"
                )
        self.num_states = n
        self._matrix = _at_least_float32(generator)
        self._rates: Tensor | None = None

    @classmethod
    def from_rates(cls, rates: Tensor) -> DenseGenerator:
        """Q = R − diag(R1) from rates R ≥ 0; R_ii drops out of Q and enters only the jump chain S = R / R1.

        Args:
            rates: (..., N, N), ≥ 0. A zero row keeps its value.

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
        check_finite("rates", rates)
        rates = _at_least_float32(rates)
        if rates.size(-1) != rates.size(-2):
            return cls(rates)  # raises
        off_diagonal = rates - torch.diag_embed(rates.diagonal(dim1=-2, dim2=-1))
        generator = cls(off_diagonal - torch.diag_embed(off_diagonal.sum(-1)))
        generator._rates = rates
        return generator

    def apply(self, value: Tensor) -> Tensor:  # noqa: D102
        return _product(self._matrix, value)

    def jump(self, value: Tensor) -> Tensor:  # noqa: D102
        return _product(self.jump_chain(), value)

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
        return exit_rates.amax(-1, keepdim=True)


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
        if not 0 <= dropout_p < 1:
            raise GeneratorError(f"dropout_p: expected 0 ≤ dropout_p < 1, got {dropout_p}; choose a probability")
        check_finite("query", query)
        check_finite("key", key)
        batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        self.num_states = n
        self.is_causal = is_causal
        self.query, self.key = query, key
        self.scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
        self.dropout_p = dropout_p
        self.jump_rates = _check_jump_rates(jump_rates, torch.Size([*batch, n]), query)
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

    def scores(self, scale: float | None = None) -> Tensor:
        """scale · q kᵀ plus a float mask, (..., N, N), float32 or float64; −inf or anything where masked."""
        with torch.autocast(self.query.device.type, enabled=False):
            query, key = _at_least_float32(self.query), _at_least_float32(self.key)
            scores = (self.scale if scale is None else scale) * (query @ key.mT)
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


def _check_jump_rates(jump_rates: Tensor | float | None, shape: torch.Size, like: Tensor) -> Tensor | None:
    if jump_rates is None:
        return None
    rates = torch.as_tensor(jump_rates, device=like.device)
    rates = rates.to(like.dtype) if not isinstance(jump_rates, Tensor) else rates
    check_shape("jump_rates", rates, least_rank=0, remedy="give ρ per token")
    try:
        fits = torch.broadcast_shapes(rates.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ShapeError(
            f"jump_rates: expected a shape broadcastable to {tuple(shape)}, got {tuple(rates.shape)}; "
            "give one rate per token, or (heads, 1) for one per head"
        )
    rates = rates if rates.dim() else rates.unsqueeze(0)
    if rates.device.type == "cpu" and not torch.compiler.is_compiling():
        inspected = rates.detach()
        low, high = (float(inspected.min()), float(inspected.max())) if rates.numel() else (0.0, 0.0)
        if not (low >= 0 and high <= 1):
            raise GeneratorError(
                f"jump_rates: expected ρ in [0, 1], got [{low:g}, {high:g}]; pass it through a sigmoid and let time carry the scale"
            )
    return rates
