"""Data modules whose examples are pure functions of (seed, index), and a loader that resumes between two batches."""

from liegroup_attn.lightning.data.corpus import ByteCorpus
from liegroup_attn.lightning.data.digits import Digits
from liegroup_attn.lightning.data.forests import RandomForests
from liegroup_attn.lightning.data.loader import ResumableLoader

__all__ = ["ByteCorpus", "Digits", "RandomForests", "ResumableLoader"]
