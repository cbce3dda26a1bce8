"""Tiny models of x-transformers and LitGPT; the libraries are imported late."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from liegroup_attn.nn import LieFlow, convert_attention

VOCABULARY, TOKENS = 23, 9


@dataclass(frozen=True)
class Case:
    """A model.

    Args:
        name: of the variant.
        build: makes it, from the generator's present state.
        causal: whether later tokens are hidden.
        options: of the conversion.
    """

    name: str
    build: Callable[[], nn.Module]
    causal: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def model(self) -> nn.Module:
        """The plain model, the same each time."""
        torch.manual_seed(0)
        return self.build()

    def converted(self, time: float | None = None, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
        """With a flow in each attention; with a time, also rates that differ by token."""
        model = self.model().to(dtype)
        convert_attention(model, **{**self.options, **options})
        return model if time is None else moving(model, time)


def moving(model: nn.Module, time: float = 0.7) -> nn.Module:
    """Let time pass, and rates differ by token."""
    torch.manual_seed(1)
    with torch.no_grad():
        for flow in flows(model):
            flow.time.fill_(time)
            flow.rate_weight.normal_()
    return model


def flows(model: nn.Module) -> list[LieFlow]:
    """All of a model's flows."""
    return [module for module in model.modules() if isinstance(module, LieFlow)]


def tokens(batch: int = 2, length: int = TOKENS) -> Tensor:
    """Tokens, the same each time."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


def x_transformer(kind: str = "Decoder", **options: Any) -> nn.Module:
    """A TransformerWrapper of two layers; ``options`` are those of its AttentionLayers."""
    import x_transformers

    layers = getattr(x_transformers, kind)(**{**dict(dim=16, depth=2, heads=4, attn_dim_head=8, ff_mult=1), **options})
    return x_transformers.TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=32, attn_layers=layers).eval()


def _x(name: str, kind: str = "Decoder", **options: Any) -> Case:
    lie = {"allow_open_mask": True} if "attn_max_attend_past" in options else {}
    return Case(f"{kind}-{name}", lambda: x_transformer(kind, **options), kind == "Decoder", lie)


X_CASES = (
    _x("plain"),
    _x("plain", "Encoder"),
    _x("flash", attn_flash=True),
    _x("flash", "Encoder", attn_flash=True),
    _x("grouped", attn_kv_heads=2, rotary_pos_emb=True),
    _x("grouped-flash-alibi", attn_kv_heads=2, attn_flash=True, alibi_pos_bias=True),
    _x("one-head-wide-values", "Encoder", attn_one_kv_head=True, attn_value_dim_head=5, rel_pos_bias=True),
    _x("alibi", alibi_pos_bias=True),
    _x("clamped", attn_softclamp_logits=True, attn_logit_softclamp_value=0.5),
    _x("clamped-residual", "Encoder", attn_softclamp_logits=True, residual_attn=True, attn_kv_heads=2),
    _x("residual", residual_attn=True),
    _x("qk-norm-value-residual", attn_qk_norm=True, add_value_residual=True),
    _x("window", attn_max_attend_past=3),
)


def gpt(**options: Any) -> nn.Module:
    """A GPT of LitGPT with two layers; ``options`` are those of its Config."""
    from litgpt.config import Config
    from litgpt.model import GPT

    sizes = dict(block_size=32, vocab_size=VOCABULARY, padded_vocab_size=VOCABULARY, n_layer=2, n_head=4, n_embd=32)
    return GPT(Config(**{**sizes, **options})).eval()


_PYTHIA = dict(rotary_percentage=0.25, parallel_residual=True, bias=True)
_LLAMA = dict(
    rotary_percentage=1.0,
    parallel_residual=False,
    bias=False,
    norm_class_name="RMSNorm",
    mlp_class_name="LLaMAMLP",
    intermediate_size=32,
    n_query_groups=2,
)
_GEMMA = dict(
    **{**_LLAMA, "mlp_class_name": "GemmaMLP"},
    scale_embeddings=True,
    attention_scores_scalar=5,
    attention_logit_softcapping=0.5,
    final_logit_softcapping=30.0,
    post_attention_norm=True,
    post_mlp_norm=True,
    sliding_window_indices=[1, 0],
)
LIT_CASES = (
    Case("pythia", lambda: gpt(**_PYTHIA)),
    Case("llama", lambda: gpt(**_LLAMA)),
    Case("one-group", lambda: gpt(**{**_LLAMA, "n_query_groups": 1})),
    Case("gemma", lambda: gpt(**_GEMMA, sliding_window_size=16)),
    Case("gemma-window", lambda: gpt(**_GEMMA, sliding_window_size=4), options={"allow_open_mask": True}),
)
