"""How often bytes occur and follow one another: what is known of a text without a model."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BYTES", "as_numbers", "log_frequencies"]

BYTES = 256
_PRIOR = 0.01  # of a count, for every byte


def as_numbers(text: bytes) -> Tensor:
    """(N,), int64."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def log_frequencies(given: Tensor, byte: Tensor | None = None, contexts: int = BYTES) -> Tensor:
    """Logarithms of smoothed relative frequencies.

    Args:
        given: (N,), bytes, or what stands before them, below ``contexts``.
        byte: (N,), what follows; None counts ``given`` itself.
        contexts: how many there are.

    Returns:
        log p(byte), (256,), or log p(byte | given), (contexts, 256).
    """
    if byte is None:
        counts = torch.bincount(given, minlength=BYTES).float().unsqueeze(0)
    else:
        counts = torch.bincount(given * BYTES + byte, minlength=contexts * BYTES).float().view(contexts, BYTES)
    logs = (counts + _PRIOR).log() - (counts.sum(-1, keepdim=True) + BYTES * _PRIOR).log()
    return logs.squeeze(0) if byte is None else logs
