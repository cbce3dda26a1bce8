"""Functions of generators and transition matrices, and torchmetrics classes; the only door to torchmetrics.

Perplexity and plain accuracy are torchmetrics' own.
"""

from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from liegroup_attn.algebra import exit_rates, expected_hops
from liegroup_attn.metrics.bits import BitsPerByte
from liegroup_attn.metrics.by_depth import AccuracyByDepth
from liegroup_attn.metrics.functional import (
    attention_entropy,
    bits_per_byte,
    row_stochasticity_error,
)

__all__ = [
    "AccuracyByDepth",
    "BitsPerByte",
    "MulticlassAccuracy",
    "Perplexity",
    "attention_entropy",
    "bits_per_byte",
    "exit_rates",
    "expected_hops",
    "row_stochasticity_error",
]
