"""Training with Lightning: modules, data modules, optimizer, callbacks and the command line."""

from liegroup_attn.lightning.callbacks import ExactResume, GeneratorMonitor
from liegroup_attn.lightning.data import ByteCorpus, RandomForests
from liegroup_attn.lightning.modules import LanguageModel, TokenClassifier
from liegroup_attn.lightning.optim import RiemannianAdamW, RiemannianSGD, build_optimizer, warmup_cosine

__all__ = [
    "ByteCorpus",
    "ExactResume",
    "GeneratorMonitor",
    "LanguageModel",
    "RandomForests",
    "RiemannianAdamW",
    "RiemannianSGD",
    "TokenClassifier",
    "build_optimizer",
    "warmup_cosine",
]
