"""Matrices that the tests of the algebra share; float64."""

import math

import torch

D = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rate_matrix(*shape: int, size: float = 1.0, seed: int = 0) -> torch.Tensor:
    """(*shape, n): a batch of rate matrices, exit rates about ``size``."""
    n = shape[-1]
    rates = size * torch.rand(*shape, n, generator=seeded(seed), dtype=D) / max(1, n - 1)
    rates = rates * (1 - torch.eye(n, dtype=D))
    return rates - torch.diag_embed(rates.sum(-1))


def algebra_element(*shape: int, size: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Zero row sums, any signs."""
    X = size * torch.randn(*shape, shape[-1], generator=seeded(seed), dtype=D)
    return X - torch.diag_embed(X.sum(-1))


def square_matrix(*shape: int, size: float = 1.0, seed: int = 0) -> torch.Tensor:
    return size * torch.randn(*shape, shape[-1], generator=seeded(seed), dtype=D)


def rotation(angle: float) -> torch.Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=D)


def jordan(value: float, n: int, above: float = 1.0) -> torch.Tensor:
    return value * torch.eye(n, dtype=D) + above * torch.diag(torch.ones(n - 1, dtype=D), 1)


def sink(n: int) -> torch.Tensor:
    """Every token jumps to token 0: a column n times as heavy as a row."""
    Q = -3 * torch.eye(n, dtype=D)
    Q[:, 0] = 3
    Q[0] = 1 / (n - 1)
    Q[0, 0] = -1
    return Q
