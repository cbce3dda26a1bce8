"""What can be wrong with an input; every message says expected, got and remedy."""

from __future__ import annotations

__all__ = [
    "CacheError",
    "ConvergenceError",
    "ConversionError",
    "DtypeError",
    "GeneratorError",
    "MaskError",
    "NestedTensorError",
    "ShapeError",
]


class ShapeError(ValueError):
    """A tensor has the wrong rank or size."""


class DtypeError(TypeError, ValueError):
    """A tensor has the wrong dtype, or dtypes are mixed."""


class MaskError(ValueError):
    """A mask has the wrong shape or dtype, or exp(tQ) would leak through it."""


class GeneratorError(ValueError):
    """Values that make no generator or no semigroup: negative rates, ρ outside [0, 1], time < 0, NaN."""


class NestedTensorError(ShapeError, AssertionError):
    """A nested tensor, which torch's own module takes in its fused path only and refuses by an AssertionError."""


class ConversionError(ValueError):
    """A model in which nothing can be converted, or which would go on with softmax attention."""


class CacheError(ValueError):
    """A cache of another layer, batch, dtype or time, or one that is full."""


class ConvergenceError(RuntimeError):
    """A method cannot reach its tolerance within its allowed terms."""
