"""Supports: which transitions a learned rate matrix may have; always on the CPU, where values can be looked at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liegroup_attn.errors import DtypeError, GeneratorError, MaskError

__all__ = ["banded_support", "block_support", "causal_support"]


def causal_support(n: int) -> Tensor:
    """Every state reaches itself and earlier ones.

    Args:
        n: number of states, ≥ 1.

    Returns:
        (n, n) bool, lower triangular.

    Raises:
        GeneratorError: n < 1.

    Example:
        >>> causal_support(3).int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    return torch.ones(check_states(n), n, dtype=torch.bool, device="cpu").tril()


def banded_support(n: int, width: int) -> Tensor:
    """Every state reaches states at most ``width`` away; not closed unless ``width`` is 0 or at least n − 1.

    Args:
        n: number of states, ≥ 1.
        width: ≥ 0.

    Returns:
        (n, n) bool.

    Raises:
        GeneratorError: n < 1 or width < 0.

    Example:
        >>> banded_support(3, 1).int()
        tensor([[1, 1, 0],
                [1, 1, 1],
                [0, 1, 1]], dtype=torch.int32)
    """
    if isinstance(width, bool) or not isinstance(width, int) or width < 0:
        raise GeneratorError(f"width: expected an integer ≥ 0, got {width}; 1 is a birth-death chain")
    return torch.ones(check_states(n), n, dtype=torch.bool, device="cpu").tril(width).triu(-width)


def block_support(sizes: Sequence[int]) -> Tensor:
    """States in blocks; every state reaches its own block.

    Args:
        sizes: of the blocks, each ≥ 1; they add up to n.

    Returns:
        (n, n) bool.

    Raises:
        GeneratorError: no block, or an empty one.

    Example:
        >>> block_support([1, 2]).int()
        tensor([[1, 0, 0],
                [0, 1, 1],
                [0, 1, 1]], dtype=torch.int32)
    """
    if len(sizes) == 0:
        raise GeneratorError("sizes: expected at least one block, got none; one block of n states allows everything")
    lengths = torch.tensor([check_states(size) for size in sizes], device="cpu")
    block = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), lengths)
    return block[:, None] == block


def check_states(n: int) -> int:
    """n, or GeneratorError unless it is an integer ≥ 1."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise GeneratorError(f"n: expected an integer ≥ 1, got {n}; n is the number of states")
    return n


def check_support(n: int, support: Tensor | None) -> Tensor:
    """The allowed transitions: (n, n) bool on the CPU, False on the diagonal.

    Raises:
        GeneratorError: n < 1.
        DtypeError: not a bool tensor.
        MaskError: not (n, n), a row without any allowed target, or no transition at all for n ≥ 2.
    """
    eye = torch.eye(check_states(n), dtype=torch.bool, device="cpu")
    if support is None:
        return ~eye
    if not isinstance(support, Tensor) or support.dtype != torch.bool:
        got = support.dtype if isinstance(support, Tensor) else type(support).__name__
        raise DtypeError(f"support: expected a torch.bool tensor (True = transition allowed), got {got}; convert it")
    if support.shape != (n, n):
        raise MaskError(f"support: expected shape {(n, n)}, got {tuple(support.shape)}; all heads share one support")
    support = support.detach().cpu()
    empty = (~support.any(-1)).nonzero()
    if len(empty):
        raise MaskError(
            f"support: expected an allowed target in every row, got none in row {int(empty[0])}; "
            "set its diagonal to True if the token shall keep its value"
        )
    transitions = support & ~eye
    if n > 1 and not bool(transitions.any()):
        raise MaskError("support: expected at least one transition, got none; allow an entry off the diagonal")
    return transitions


def is_closed(transitions: Tensor) -> bool:
    """Whether several transitions lead only where one leads, or back."""
    hops = transitions.to(torch.float32)
    eye = torch.eye(len(transitions), dtype=torch.bool, device=transitions.device)
    return not bool(((hops @ hops > 0) & ~transitions & ~eye).any())
