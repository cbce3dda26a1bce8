"""Data modules whose examples are pure functions of (seed, index), and a loader that resumes between two batches."""

from liegroup_attn.lightning.data.corpus import ByteCorpus
from liegroup_attn.lightning.data.digits import Digits
from liegroup_attn.lightning.data.forests import RandomForests
from liegroup_attn.lightning.data.loader import ResumableLoader
from liegroup_attn.lightning.data.paml import generator_from, read_generator, read_paml
from liegroup_attn.lightning.data.transitions import TransitionCounts, read_counts, simulate_counts

__all__ = [
    "ByteCorpus",
    "Digits",
    "RandomForests",
    "ResumableLoader",
    "TransitionCounts",
    "generator_from",
    "read_counts",
    "read_generator",
    "read_paml",
    "simulate_counts",
]
