"""Training with Lightning: modules, data modules, optimizer, callbacks and the command line."""

from liegroup_attn.lightning.callbacks import ExactResume, GeneratorMonitor
from liegroup_attn.lightning.data import ByteCorpus, RandomForests, TransitionCounts
from liegroup_attn.lightning.modules import LanguageModel, TokenClassifier
from liegroup_attn.lightning.optim import RiemannianAdamW, build_optimizer, warmup_cosine
from liegroup_attn.lightning.rates import RateEstimator

__all__ = [
    "ByteCorpus",
    "ExactResume",
    "GeneratorMonitor",
    "LanguageModel",
    "RandomForests",
    "RateEstimator",
    "RiemannianAdamW",
    "TokenClassifier",
    "TransitionCounts",
    "build_optimizer",
    "warmup_cosine",
]
