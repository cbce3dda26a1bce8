"""Training with Lightning: modules, data modules, optimizer, callbacks and the command line."""

from liegroup_attn.lightning.callbacks import ExactResume, GeneratorMonitor
from liegroup_attn.lightning.data import ByteCorpus, Digits, RandomForests
from liegroup_attn.lightning.modules import ImageClassifier, LanguageModel, TokenClassifier
from liegroup_attn.lightning.optim import RiemannianAdamW, build_optimizer, warmup_cosine

__all__ = [
    "ByteCorpus",
    "Digits",
    "ExactResume",
    "GeneratorMonitor",
    "ImageClassifier",
    "LanguageModel",
    "RandomForests",
    "RiemannianAdamW",
    "TokenClassifier",
    "build_optimizer",
    "warmup_cosine",
]
