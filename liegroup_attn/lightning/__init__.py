"""Training with Lightning: modules, data modules, optimizer, callbacks and the command line."""

from liegroup_attn.lightning.build import build_optimizer, warmup_cosine
from liegroup_attn.lightning.callbacks import ExactResume, GeneratorMonitor
from liegroup_attn.lightning.conversion import LieConversion, load_converted
from liegroup_attn.lightning.convert_callback import ConvertAttention
from liegroup_attn.lightning.data import ByteCorpus, Digits, RandomForests
from liegroup_attn.lightning.files import AtomicCheckpointIO
from liegroup_attn.lightning.finetune import FineTune
from liegroup_attn.lightning.guard import ManifoldGuard
from liegroup_attn.lightning.images import ImageClassifier
from liegroup_attn.lightning.modules import LanguageModel, TokenClassifier
from liegroup_attn.lightning.optim import RiemannianAdamW, RiemannianSGD
from liegroup_attn.lightning.precision import ManifoldPrecision
from liegroup_attn.lightning.sharding import replicate

__all__ = [
    "AtomicCheckpointIO",
    "ByteCorpus",
    "ConvertAttention",
    "Digits",
    "ExactResume",
    "FineTune",
    "GeneratorMonitor",
    "ImageClassifier",
    "LanguageModel",
    "LieConversion",
    "ManifoldGuard",
    "ManifoldPrecision",
    "RandomForests",
    "RiemannianAdamW",
    "RiemannianSGD",
    "TokenClassifier",
    "build_optimizer",
    "load_converted",
    "replicate",
    "warmup_cosine",
]
