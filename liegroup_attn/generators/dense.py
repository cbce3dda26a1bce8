"""A generator given by its matrix, or by rates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from liegroup_attn.algebra import is_rate_matrix
from liegroup_attn.checks import check_finite, check_jump_rates, check_shape
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.generators.base import Generator
from liegroup_attn.tensors import at_least_float32, product, values_visible
from liegroup_attn.visible import Causal, Visible

__all__ = ["DenseGenerator", "restricted"]


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

    formed = True

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
        matrix = at_least_float32(generator)
        if matrix.dtype != generator.dtype:  # rows that sum to 0 in half precision do not in float32
            rest = matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))
            matrix = rest - torch.diag_embed(rest.sum(-1))
        self._hold(matrix)

    def _hold(self, matrix: Tensor, rates: Tensor | None = None, rho: Tensor | None = None) -> None:
        self.num_states, self.batch_shape = matrix.size(-1), matrix.shape[:-2]
        self._matrix, self._rates, self._rho = matrix, rates, rho

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
        check_finite("rates, or their sum", at_least_float32(rates).sum(-1))
        if values_visible(rates) and float(rates.detach().min()) < 0:
            raise GeneratorError(
                f"rates: expected nonnegative numbers, got {float(rates.detach().min()):g}; use a rate function such as softplus"
            )
        rates = at_least_float32(rates)
        rho = check_jump_rates(jump_rates, rates.shape[:-1], rates, True)
        off_diagonal = rates - torch.diag_embed(rates.diagonal(dim1=-2, dim2=-1))
        matrix = off_diagonal - torch.diag_embed(off_diagonal.sum(-1))
        generator = cls.__new__(cls)
        generator._hold(matrix if rho is None else rho.unsqueeze(-1).to(matrix.dtype) * matrix, rates, rho)
        return generator

    @classmethod
    def from_offsets(cls, past: Tensor, future: Tensor | None = None) -> DenseGenerator:
        """The Toeplitz generator Q_ij = r(i − j): rates that depend on the distance alone.

        Args:
            past: (..., N − 1), ≥ 0: rate to the token 1, 2, … places back.
            future: (..., N − 1), ≥ 0: rate to the token 1, 2, … places ahead; None makes Q causal.

        Returns:
            The generator on N tokens.

        Raises:
            ShapeError: ``future`` has another shape than ``past``.
            GeneratorError: negative or non-finite rates (CPU).

        Example:
            >>> DenseGenerator.from_offsets(torch.tensor([1.0, 0.5])).dense()
            tensor([[ 0.0000,  0.0000,  0.0000],
                    [ 1.0000, -1.0000,  0.0000],
                    [ 0.5000,  1.0000, -1.5000]])
        """
        check_shape("past", past, least_rank=1, remedy="give (..., N − 1)")
        if future is not None and future.shape != past.shape:
            raise ShapeError(
                f"future: expected past's shape {tuple(past.shape)}, got {tuple(future.shape)}; one rate per distance"
            )
        ahead = torch.zeros_like(past) if future is None else future
        n, itself = past.size(-1) + 1, past.new_zeros(*past.shape[:-1], 1)
        by_offset = torch.cat([ahead.flip(-1), itself, past], -1)  # (..., 2N − 1)
        place = torch.arange(n, device=past.device)
        generator = cls.from_rates(by_offset[..., place[:, None] - place + n - 1])
        generator.is_causal = future is None
        return generator

    def apply(self, value: Tensor) -> Tensor:  # noqa: D102
        return product(self._matrix, value)

    def hop(self, value: Tensor) -> Tensor:  # noqa: D102
        return value + product(self.unit(), value)

    def jump(self, value: Tensor) -> Tensor:  # noqa: D102
        chain = self.jump_chain()
        return product(F.dropout(chain, self.dropout_p) if self.dropout_p else chain, value)

    def inflow(self, value: Tensor) -> Tensor:  # noqa: D102
        # Not by S, which is the constant I where all rates are 0 and would hide their derivative.
        rates = self._chain_rates() if self._rho is None else self._rho.unsqueeze(-1) * self._chain_rates()
        wide = value.to(torch.promote_types(rates.dtype, value.dtype))
        return product(F.dropout(rates, self.dropout_p) if self.dropout_p else rates, wide)

    def jump_chain(self) -> Tensor:
        """S as a matrix (..., N, N): normalized rates, a row without rates jumps to itself."""
        rates = self._chain_rates()
        total = rates.sum(-1, keepdim=True)
        eye = torch.eye(self.num_states, dtype=rates.dtype, device=rates.device)
        return torch.where(total > 0, rates / total.where(total > 0, 1), eye)

    def _chain_rates(self) -> Tensor:
        """Rates of which S is the normalization, (..., N, N): those given, or the matrix' own without its diagonal."""
        if self._rates is not None:
            return self._rates
        return self._matrix - torch.diag_embed(self._matrix.diagonal(dim1=-2, dim2=-1))

    def jump_intensities(self) -> Tensor:  # noqa: D102
        total = self._chain_rates().sum(-1)
        return total if self._rho is None else self._rho.to(total.dtype) * total

    def dense(self) -> Tensor:  # noqa: D102
        return self._matrix.clone()

    def rate_bound(self) -> Tensor:  # noqa: D102
        exit_rates = -self._matrix.detach().diagonal(dim1=-2, dim2=-1)
        bound = exit_rates.amax(-1, keepdim=True)
        return bound.where(bound > 0, 1)  # any bound will do for Q = 0, but its gradient needs hops


def restricted(generator: Generator, visible: Visible) -> Generator:
    """The generator without the rates that lead to what is hidden: what is added to a masked chain must not leak.

    Args:
        generator: R on N tokens.
        visible: who sees whom.

    Returns:
        It as it is, where nothing of it is hidden; else its rates, formed.

    Example:
        >>> from liegroup_attn.visible import Causal
        >>> restricted(DenseGenerator(torch.tensor([[-1.0, 1.0], [1.0, -1.0]])), Causal()).dense()
        tensor([[ 0.,  0.],
                [ 1., -1.]])
    """
    if not isinstance(generator, Generator):
        got = type(generator).__name__
        raise GeneratorError(f"plus: expected a Generator, got {got}; wrap a matrix in DenseGenerator(Q)")
    if generator.is_causal and all(isinstance(part, Causal) for part in visible.parts):
        return generator
    n = generator.num_states
    like = generator.jump_intensities()
    allowed = visible.rows(0, n, n, visible.tensors, like.device)
    if allowed is None:
        return generator
    eye = torch.eye(n, dtype=like.dtype, device=like.device)
    rates = generator.inflow(eye.expand(*generator.batch_shape, -1, -1))  # with those of jumps back to their own token
    if not visible.own:  # a row without a target keeps its value
        allowed = allowed & allowed.any(-1, keepdim=True)
    kept = DenseGenerator.from_rates(rates.masked_fill(~allowed, 0))
    kept.is_causal = visible.is_causal
    return kept
