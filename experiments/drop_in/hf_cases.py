"""Tiny Transformers models with random weights, one a family: two layers, width 32, 64 tokens; no network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf

COMMON = {
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 64,
}
LLAMA = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_dropout": 0.0,
}
SEQ2SEQ = {
    **COMMON,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
    "decoder_start_token_id": 1,
}
BERT = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@dataclass(frozen=True)
class Case:
    """A model's class, its configuration's class, and what is true of it."""

    name: str
    model: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    kind: str = "causal"  # causal, masked, image, seq2seq, speech
    layers: int = 2  # converted
    crossing: int = 0  # kept: cross-attention
    options: dict[str, Any] = field(default_factory=dict)  # of the conversion

    def __str__(self) -> str:
        return self.name

    def build(self, seed: int = 0, **changes: Any) -> Any:
        """The model, in eval mode."""
        torch.manual_seed(seed)
        model = getattr(hf, self.model)(getattr(hf, self.config)(**{**self.settings, **changes}))
        for parameter in model.parameters():  # away from the small initial values, at which attention is uniform
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    def inputs(self, batch: int = 2, tokens: int = 7, seed: int = 1) -> dict[str, Any]:
        """Arguments of a forward."""
        draw = torch.Generator().manual_seed(seed)
        if self.kind == "image":
            return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=draw)}
        ids = torch.randint(3, 64, (batch, tokens), generator=draw)
        if self.kind == "speech":
            features = torch.randn(batch, 8, 32, generator=draw)
            return {"input_features": features, "decoder_input_ids": ids}
        if self.kind == "seq2seq":
            decoder = torch.randint(3, 64, (batch, tokens - 2), generator=draw)
            return {"input_ids": ids, "decoder_input_ids": decoder}
        return {"input_ids": ids}


CASES = (
    Case(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            **COMMON,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    Case("llama", "LlamaForCausalLM", "LlamaConfig", LLAMA),
    Case("qwen2", "Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    Case("qwen3", "Qwen3ForCausalLM", "Qwen3Config", LLAMA),
    Case("mistral", "MistralForCausalLM", "MistralConfig", {**LLAMA, "sliding_window": None}),
    Case(
        "mistral window",
        "MistralForCausalLM",
        "MistralConfig",
        {**LLAMA, "sliding_window": 4},
        options={"allow_open_mask": True},
    ),
    Case(
        "opt",
        "OPTForCausalLM",
        "OPTConfig",
        {
            **COMMON,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "dropout": 0.0,
        },
    ),
    Case(
        "gemma2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**LLAMA, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, "sliding_window": 4},
        options={"allow_open_mask": True},
    ),
    Case(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**COMMON, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    Case("phi3", "Phi3ForCausalLM", "Phi3Config", {k: v for k, v in LLAMA.items() if k != "head_dim"}),
    Case("bert", "BertForMaskedLM", "BertConfig", BERT, "masked"),
    Case("roberta", "RobertaForMaskedLM", "RobertaConfig", BERT, "masked"),
    Case(
        "distilbert",
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {**COMMON, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0},
        "masked",
    ),
    Case(
        "modernbert",
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {
            **COMMON,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "local_attention": 6,
            "global_attn_every_n_layers": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        "masked",
        options={"allow_open_mask": True},
    ),
    Case(
        "vit",
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        "image",
    ),
    Case(
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 64,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "dropout_rate": 0.0,
            "eos_token_id": None,
        },
        "seq2seq",
        4,
        2,
    ),
    Case(
        "bart",
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **SEQ2SEQ,
            "forced_eos_token_id": None,
        },
        "seq2seq",
        4,
        2,
    ),
    Case(
        "whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **SEQ2SEQ,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 64,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        "speech",
        4,
        2,
    ),
)
BY_NAME = {case.name: case for case in CASES}
DECODERS = tuple(case for case in CASES if case.kind in ("causal", "seq2seq", "speech"))
