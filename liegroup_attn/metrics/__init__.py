"""Functions of generators and transition matrices, and torchmetrics classes; the only door to torchmetrics.

Every measure is a pure function, one number per matrix or row, and a class that takes its mean, or its worst, over all
updates and processes. Perplexity and plain accuracy are torchmetrics' own.
"""

from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from liegroup_attn.algebra import (
    detailed_balance_residual,
    exit_rates,
    expected_hops,
    mixing_time,
    spectral_gap,
    stationary_distribution,
)
from liegroup_attn.metrics.bits import BitsPerByte
from liegroup_attn.metrics.by_depth import AccuracyByDepth
from liegroup_attn.metrics.chains import stationary_mass
from liegroup_attn.metrics.functional import (
    attention_entropy,
    bits_per_byte,
    row_stochasticity_error,
)
from liegroup_attn.metrics.mixing import distance_to_softmax, effective_rank, sink_mass
from liegroup_attn.metrics.of_generators import (
    DetailedBalanceResidual,
    ExpectedHops,
    MixingTime,
    SpectralGap,
    StationaryMass,
)
from liegroup_attn.metrics.of_mixing import (
    AttentionEntropy,
    DistanceToSoftmax,
    EffectiveRank,
    RowStochasticityError,
    SinkMass,
)
from liegroup_attn.metrics.off_manifold_distance import OffManifoldDistance

__all__ = [
    "AccuracyByDepth",
    "AttentionEntropy",
    "BitsPerByte",
    "DetailedBalanceResidual",
    "DistanceToSoftmax",
    "EffectiveRank",
    "ExpectedHops",
    "MixingTime",
    "MulticlassAccuracy",
    "OffManifoldDistance",
    "Perplexity",
    "RowStochasticityError",
    "SinkMass",
    "SpectralGap",
    "StationaryMass",
    "attention_entropy",
    "bits_per_byte",
    "detailed_balance_residual",
    "distance_to_softmax",
    "effective_rank",
    "exit_rates",
    "expected_hops",
    "mixing_time",
    "row_stochasticity_error",
    "sink_mass",
    "spectral_gap",
    "stationary_distribution",
    "stationary_mass",
]
