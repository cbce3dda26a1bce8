"""What can be wrong with an input, each with a type of its own; every message says expected, got and remedy."""

from __future__ import annotations

from torch import Tensor

__all__ = ["ConvergenceError", "DtypeError", "GeneratorError", "MaskError", "ShapeError", "check_shape"]


class ShapeError(ValueError):
    """A tensor has the wrong rank or size."""


class DtypeError(TypeError, ValueError):
    """A tensor has the wrong dtype, or dtypes are mixed."""


class MaskError(ValueError):
    """A mask has the wrong shape or dtype, or exp(tQ) would leak through it."""


class GeneratorError(ValueError):
    """Values that make no generator or no semigroup: negative rates, ρ outside [0, 1], time < 0, NaN."""


class ConvergenceError(RuntimeError):
    """A method cannot reach its tolerance within its allowed terms."""


def check_shape(name: str, tensor: Tensor, *, least_rank: int, remedy: str) -> None:
    """Raise unless ``tensor`` is a floating-point tensor with at least ``least_rank`` dimensions.

    Args:
        name: the argument's name, for the message.
        tensor: any object; everything but a tensor is refused.
        least_rank: smallest number of dimensions.
        remedy: what the caller should do, as an imperative.

    Raises:
        DtypeError: not a floating-point tensor.
        ShapeError: too few dimensions.

    Example:
        >>> import torch
        >>> check_shape("value", torch.zeros(3), least_rank=2, remedy="add a token axis")
        Traceback (most recent call last):
        ...
        liegroup_attn.errors.ShapeError: value: expected at least 2 dimensions, got shape (3,); add a token axis
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise DtypeError(f"{name}: expected a floating-point tensor, got {got}; convert it with .to(torch.float32)")
    if tensor.dim() < least_rank:
        raise ShapeError(
            f"{name}: expected at least {least_rank} dimensions, got shape {tuple(tensor.shape)}; {remedy}"
        )
