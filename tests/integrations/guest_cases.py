"""Tiny models of x-transformers and LitGPT, and what every one of them must satisfy; the libraries are imported late."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import Tensor, nn

from liegroup_attn.nn import LieFlow, convert_attention, restore_attention

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


# What every case must satisfy.


def check_time_zero(case: Case) -> None:
    """Outputs do not change, in training as in eval."""
    x, plain, lie = tokens(), case.model().double(), case.converted()
    with torch.no_grad():
        wanted = plain(x)
    torch.testing.assert_close(lie(x).detach(), wanted)
    with torch.no_grad():
        torch.testing.assert_close(lie(x), wanted)
    assert not torch.allclose(moving(lie)(x), wanted, atol=1e-3), "a flow without effect"


def check_gradients(case: Case) -> None:
    """Every parameter of a flow learns, and time from 0 on."""
    for time, learning in ((None, {"time"}), (0.7, {"time", "rate_weight", "rate_bias"})):
        model = case.converted(time)
        model(tokens()).square().sum().backward()
        for flow in flows(model):
            got = {name for name, p in flow.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
            assert got == learning


def check_modes(case: Case) -> None:
    """Train == eval == no_grad."""
    model = case.converted(0.7)
    wanted = model.train()(tokens()).detach()
    torch.testing.assert_close(model.eval()(tokens()).detach(), wanted)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), wanted)


def check_causality(case: Case) -> None:
    """Later tokens do not show, unless they may."""
    model, x = case.converted(0.7), tokens()
    other = x.clone()
    other[:, -3:] = (other[:, -3:] + 1) % VOCABULARY
    with torch.no_grad():
        same = torch.allclose(model(x)[:, :-3], model(other)[:, :-3], atol=1e-9)
    assert same == case.causal


def check_state_dict(case: Case) -> None:
    """What is saved can be loaded, into a model converted in the same way."""
    model, other = case.converted(0.7), case.converted()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(other(tokens()), model(tokens()))
        torch.testing.assert_close(copy.deepcopy(model)(tokens()), model(tokens()))


def check_restored(case: Case, attention: type[nn.Module]) -> None:
    """The original is back: classes, keys and outputs."""
    plain, model = case.model().double(), case.converted(0.7)
    converted = [name for name, module in model.named_modules() if isinstance(module, attention)]
    assert restore_attention(model).converted == converted
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(model(tokens()), plain(tokens()))


def check_report(case: Case, attention: type[nn.Module]) -> None:
    """Each attention has its row, a second conversion says so, and example_inputs finds all of them called."""
    model = case.model()
    names = [name for name, module in model.named_modules() if isinstance(module, attention)]
    report = convert_attention(model, example_inputs=(tokens(),), **case.options)
    assert len(names) == 2
    assert report.converted == names
    assert not report.kept
    again = convert_attention(model, **case.options)
    assert [layer.outcome for layer in again.layers] == ["already converted"] * 2
    with pytest.raises(TypeError):
        convert_attention(case.model(), no_such_option=1)


def golden(flow: LieFlow, scores: Tensor, value: Tensor) -> Tensor:
    """S exp(t diag(ρ) (S − I)) V by SciPy, from scores (B, H, N, N) with −inf where hidden and values (B, H, N, D)."""
    out = np.empty(value.shape)
    for b, h in np.ndindex(*value.shape[:2]):
        s, v = scores[b, h].detach().double().numpy(), value[b, h].detach().double().numpy()
        hops = np.exp(s - s.max(-1, keepdims=True))
        hops /= hops.sum(-1, keepdims=True)
        rho = 1 / (1 + np.exp(-(v @ flow.rate_weight[h].detach().numpy() + float(flow.rate_bias[h].detach()))))
        time = float(flow.time.detach()[h, 0])
        out[b, h] = hops @ expm(time * rho[:, None] * (hops - np.eye(len(s)))) @ v
    return torch.from_numpy(out)
