"""The calls whose values and gradients tests/test_recorded.py keeps: each a function of choices, its inputs sines of their place."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import CLOCKS, MASKS, METHODS, RATE_FNS
from torch import Tensor, nn

import liegroup_attn as la
from liegroup_attn.expm import Automatic
from liegroup_attn.generators import Generator, HeadMixture
from liegroup_attn.manifolds import declared
from liegroup_attn.nn import (
    LieAttention,
    LieFlow,
    LieMixer,
    LieMultiheadAttention,
    RateMatrix,
    RateScores,
    RelativeRates,
    SkewScores,
    SoftmaxAttention,
    SpectralScores,
    SymmetricScores,
    Transformer,
    convert_attention,
    scale_time,
)
from liegroup_attn.positional import (
    FIRE,
    ALiBi,
    AxialBlocks,
    AxialRotary,
    CayleyString,
    CirculantString,
    CoPE,
    DependentBlocks,
    DynamicNTK,
    FoldedRotary,
    ForgettingGate,
    LieRotary,
    LinearScaling,
    Llama3Scaling,
    LongRoPE,
    MixedRotary,
    PlaneRotary,
    RotaryEncoding,
    T5Bias,
    XPos,
    YaRN,
    grid_positions,
)

Choice = SimpleNamespace  # axis → choice
B, H, N, D = 2, 2, 7, 4
C = H * D


# --- the only places that say how a mask, a bias or a second generator is spelled


def attend(
    *inputs: Tensor,
    bias: Tensor | None = None,
    plus: Generator | None = None,
    weights: Tensor | None = None,
    open_mask: bool = False,
    **knobs: Any,
) -> Tensor:
    return la.lie_attention(
        *inputs, score_bias=bias, plus=plus, head_weights=weights, allow_open_mask=open_mask, **knobs
    )


def softmax_generator(
    query: Tensor, key: Tensor, mask: Tensor | None = None, bias: Tensor | None = None, **knobs: Any
) -> la.SoftmaxGenerator:
    return la.SoftmaxGenerator(query, key, attn_mask=mask, score_bias=bias, **knobs)


# --- numbers


def wave(name: str, *shape: int) -> Tensor:
    """Numbers in [−1, 1] by name and place; chirped, since plain sines in a row make matrices of rank 2."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return (zlib.crc32(name.encode()) % 1000 + 0.7 * k + 0.013 * k * k).sin().view(shape)


class Leaves(dict[str, Tensor]):
    """Inputs that are differentiated, by name."""

    def __call__(self, name: str, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        return self.setdefault(name, (low + (high - low) * (wave(name, *shape) + 1) / 2).requires_grad_())


@torch.no_grad()
def filled(module: nn.Module) -> dict[str, Tensor]:
    """The parameters by the last part of their names, in float64 and inside their domains."""
    seen: Counter[str] = Counter()
    home, named = declared(module.double().eval()), {}
    for path, parameter in module.named_parameters():
        *owner, name = path.split(".")
        if name in ("weight", "bias"):  # which of them, says the module
            name = ".".join([*owner[-1:], name])
        seen[name] += 1
        if seen[name] > 1:
            name += f" {seen[name]}"
        start = wave(name, *parameter.shape)
        if path in home:
            parameter.copy_(home[path].projx(0.6 + 0.4 * start))
        else:
            parameter.copy_(0.5 + 0.3 * start if name.startswith("time") else 0.5 * start)
        named[name] = parameter
    return named


def computed(outputs: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs, and gradients of their sum under fixed weights."""
    loss = sum(
        ((out * wave(name, *out.shape)).sum() for name, out in outputs.items() if out.requires_grad), wave("", 1)
    )
    found = {name: out.detach() for name, out in outputs.items()}
    if leaves and loss.requires_grad:
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        found |= {f"∂{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return found


def mask_of(name: str, leaf: Leaves | None = None) -> tuple[Tensor | None, bool]:
    if name == "causal documents":
        return MASKS["block"](B, H, N, torch.float64)[0], True
    if name == "causal, right padding":
        return MASKS["key padding"](B, H, N, torch.float64)[0], True
    if name == "open":
        return torch.ones(N, N, dtype=torch.bool).tril(1).triu(-1), False
    mask, is_causal = MASKS[name](B, H, N, torch.float64)
    if mask is not None and mask.is_floating_point():  # its pattern alone: its numbers are random
        numbers = wave("mask", *mask.shape) if leaf is None else leaf("mask", *mask.shape)
        mask = torch.where(mask.isfinite(), numbers, mask)
    return mask, is_causal


ALL_MASKS = (
    "causal",
    *(name for name in MASKS if name != "causal"),
    "causal documents",
    "causal, right padding",
    "open",
)
ALL_METHODS = {name: case.method for name, case in METHODS.items()} | {
    "four terms": la.Uniformization(max_terms=4),
    "streams": Automatic(1e-9, 8.0, streams=True),
}


# --- functions


def time_of(name: str, leaf: Leaves) -> Tensor | float:
    if name in ("0.75", "90", "0"):
        return float(name)
    if name == "0, learned":
        return leaf.setdefault("time", torch.zeros(H, 1, dtype=torch.float64, requires_grad=True))
    shape = {"per head": (H, 1), "per row": (H, N), "several": (3, 1, 1, 1)}[name]
    return leaf("time", *shape, low=0.3, high=1.6)


def rho_of(name: str, leaf: Leaves) -> Tensor | float | None:
    return leaf("ρ", B, H, N, low=0.1, high=0.9) if name == "per token" else None if name == "none" else float(name)


def plus_of(name: str, leaf: Leaves) -> Generator | None:
    if name == "none":
        return None
    if name == "dense":
        return la.DenseGenerator.from_rates(leaf("plus", H, N, N, low=0.1, high=0.8))
    if name == "offsets":
        return la.DenseGenerator.from_offsets(leaf("plus", H, N - 1, low=0.1, high=0.8))
    return la.LowRankGenerator(la.elu_plus_one(leaf("left", H, N, 3)), la.elu_plus_one(leaf("plus", H, N, 3)))


def attention(c: Choice) -> dict[str, Tensor]:
    if c.time == "0" and c.method != "default":
        raise ValueError("without time no method is asked")
    leaf, kv = Leaves(), 1 if c.heads == "grouped" else H
    inputs = leaf("query", B, H, N, D), leaf("key", B, kv, N, D), leaf("value", B, kv, N, 3)
    attn_mask, is_causal = mask_of(c.mask, leaf)
    out = attend(
        *inputs,
        attn_mask=attn_mask,
        is_causal=is_causal,
        enable_gqa=kv != H,
        scale=None if c.scale == "default" else float(c.scale),
        time=time_of(c.time, leaf),
        jump_rates=rho_of(c.rho, leaf),
        first_hop=c.hop == "yes",
        clock=CLOCKS[c.clock].clock,
        rate_fn=RATE_FNS[c.rates].rate_fn,
        bias=None if c.bias == "none" else leaf("bias", H, N, N),
        plus=plus_of(c.plus, leaf),
        weights=None if c.weights == "none" else leaf("weights", H, H, low=0.1, high=0.9),
        method=ALL_METHODS[c.method],
        open_mask=c.mask == "open",
    )
    return computed({"out": out}, leaf)


def across(c: Choice) -> dict[str, Tensor]:
    """Softmax attention to other tokens."""
    leaf = Leaves()
    allowed = torch.arange(N - 2) <= torch.arange(N)[:, None]
    attn_mask = {
        "none": None,
        "bool": allowed,
        "empty row": allowed & (torch.arange(N) != 2)[:, None],
        "float": leaf("mask", N, N - 2),
    }[c.mask]
    inputs = leaf("query", B, H, N, D), leaf("key", B, H, N - 2, D), leaf("value", B, H, N - 2, 3)
    extra = None if c.bias == "none" else leaf("bias", H, N, N - 2)
    return computed({"out": attend(*inputs, attn_mask=attn_mask, time=0.0, first_hop=True, bias=extra)}, leaf)


def _features(leaf: Leaves) -> tuple[Tensor, Tensor]:
    return la.elu_plus_one(leaf("left", B, H, N, 3)), la.elu_plus_one(leaf("right", B, H, N, 3))


def _scored(leaf: Leaves, **knobs: Any) -> la.SoftmaxGenerator:
    return softmax_generator(leaf("query", B, H, N, D), leaf("key", B, H, N, D), **knobs)


def _rates(leaf: Leaves) -> la.DenseGenerator:
    return la.DenseGenerator.from_rates(leaf("rates", H, N, N, low=0.0, high=1.0))


def _scored_ρ(leaf: Leaves) -> la.SoftmaxGenerator:
    mask, rho = mask_of("fully masked row")[0], leaf("ρ", B, H, N, low=0.1, high=0.9)
    return _scored(leaf, jump_rates=rho, mask=mask, bias=leaf("bias", H, N, N))


GENERATORS: dict[str, Callable[[Leaves], Generator]] = {
    "softmax": _scored,
    "softmax, causal": lambda leaf: _scored(leaf, is_causal=True),
    "softmax, all": _scored_ρ,
    "dense": lambda leaf: la.DenseGenerator(_rates(leaf).dense()),
    "rates": _rates,
    "rates, ρ": lambda leaf: la.DenseGenerator.from_rates(
        leaf("rates", H, N, N, low=0.0, high=1.0), jump_rates=leaf("ρ", N, low=0.1, high=0.9)
    ),
    "offsets": lambda leaf: la.DenseGenerator.from_offsets(
        leaf("past", H, N - 1, low=0.0), leaf("future", H, N - 1, low=0.0)
    ),
    "offsets, causal": lambda leaf: la.DenseGenerator.from_offsets(leaf("past", H, N - 1, low=0.0)),
    "low rank": lambda leaf: la.LowRankGenerator(*_features(leaf), jump_rate=leaf("λ", H, 1, low=0.5, high=2.0)),
    "low rank, ρ": lambda leaf: la.LowRankGenerator(*_features(leaf), jump_rate=leaf("λ", N, low=0.5, high=2.0)),
    "low rank, causal": lambda leaf: la.LowRankGenerator(*_features(leaf), is_causal=True),
    "sum": lambda leaf: _scored(leaf) + _rates(leaf),
    "sum, causal": lambda leaf: _scored(leaf, is_causal=True) + GENERATORS["offsets, causal"](leaf),
    "sum of three": lambda leaf: sum((_scored(leaf), _rates(leaf), GENERATORS["low rank"](leaf))),
    "scaled": lambda leaf: 1.5 * _scored(leaf),
    "scaled, ρ": lambda leaf: _rates(leaf) * leaf("factor", N, low=0.0, high=2.0),
    "mixture": lambda leaf: HeadMixture(_scored(leaf), leaf("weights", H, H, low=0.0, high=1.0)),
    "mixture of a sum": lambda leaf: HeadMixture(
        _scored_ρ(leaf) + _rates(leaf), leaf("weights", H, H, low=0.0, high=1.0)
    ),
}


def flow(c: Choice) -> dict[str, Tensor]:
    leaf = Leaves()
    q, when, law = GENERATORS[c.generator](leaf), time_of(c.time, leaf), CLOCKS[c.clock].clock
    if c.method == "matrix":
        return computed({"P": la.transition_matrix(q, when, clock=law)}, leaf)
    out = la.expm_multiply(q, leaf("value", B, H, N, 3), when, clock=law, method=ALL_METHODS[c.method])
    return computed({"out": out}, leaf)


def generator(c: Choice) -> dict[str, Tensor]:
    leaf = Leaves()
    q, value = GENERATORS[c.generator](leaf), leaf("value", B, H, N, 3)
    outputs = {"Q": q.dense(), "QV": q.apply(value), "SV": q.jump(value), "λ": q.jump_intensities()}
    return computed(outputs | {"Λ": torch.as_tensor(q.rate_bound(), dtype=torch.float64)}, leaf)


# --- layers

_half = {"layout": "half_split"}
ENCODINGS: dict[str, Callable[..., Any]] = {
    "none": lambda kv, causal: None,
    "rotary": lambda kv, causal: RotaryEncoding(D, **_half),
    "alibi": lambda kv, causal: ALiBi(H),
    "t5": lambda kv, causal: T5Bias(H, is_causal=causal, num_buckets=8, max_distance=16),
    "fire": lambda kv, causal: FIRE(H, hidden=4, threshold=3.0),
    "forgetting": lambda kv, causal: ForgettingGate(C, H),
    "cope": lambda kv, causal: CoPE(H, D, max_positions=5),
    "rotary, interleaved, partial": lambda kv, causal: RotaryEncoding(
        D, layout="interleaved", base=9.0, rotary_width=2
    ),
    "rotary, linear": lambda kv, causal: RotaryEncoding(D, **_half, scaling=LinearScaling(factor=4.0)),
    "rotary, dynamic": lambda kv, causal: RotaryEncoding(
        D, **_half, scaling=DynamicNTK(factor=4.0, original_length=N - 2)
    ),
    "rotary, yarn": lambda kv, causal: RotaryEncoding(D, **_half, scaling=YaRN(factor=4.0, original_length=64)),
    "rotary, longrope": lambda kv, causal: RotaryEncoding(
        D, **_half, scaling=LongRoPE(short_factor=[1.0, 1.5], long_factor=[1.0, 3.0], original_length=N - 2)
    ),
    "rotary, llama3": lambda kv, causal: RotaryEncoding(
        D,
        **_half,
        scaling=Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=64),
    ),
    "xpos": lambda kv, causal: XPos(D, **_half),
    "axial": lambda kv, causal: AxialRotary(D, **_half, axes=2),
    "mixed": lambda kv, causal: MixedRotary(D, kv, **_half, axes=2),
    "folded": lambda kv, causal: FoldedRotary(torch.ones(kv, D // 2, 1)),
    "lie": lambda kv, causal: LieRotary(D, kv, axes=2, block=4),
    "lie, planes": lambda kv, causal: LieRotary(D, kv, block=2),
    "axial blocks": lambda kv, causal: AxialBlocks(D, kv, axes=2, block=2),
    "dependent blocks": lambda kv, causal: DependentBlocks(D, kv, axes=2, block=4),
    "cayley": lambda kv, causal: CayleyString(D, kv),
    "circulant": lambda kv, causal: CirculantString(D, kv, axes=2),
    "planes": lambda kv, causal: PlaneRotary(D, kv, num_planes=2),
}
SCORES: dict[str, Callable[..., Any]] = {
    "two": lambda width, heads: None,
    "spectral": SpectralScores,
    "skew": SkewScores,
    "rates": RateScores,
    "symmetric": SymmetricScores,
}


def learned(name: str, causal: bool) -> Any:
    if name.startswith("relative"):
        return RelativeRates(H, 3, is_causal=causal)
    if name.startswith("matrix"):
        return RateMatrix(H, N, is_causal=causal)
    return None if name == "none" else RelativeRates(H, 3, is_causal=causal) + RateMatrix(H, N, is_causal=causal)


def seen(layer: Any, parameters: dict[str, Tensor], mask: Tensor | None) -> dict[str, Tensor]:
    """What a layer of this library makes of some tokens."""
    leaf = Leaves()
    x, encoding = leaf("x", B, N, C), getattr(layer, "encoding", None)
    where = {"positions": grid_positions(N, 1)} if encoding is not None and encoding.axes > 1 else {}
    with torch.no_grad():  # their gradients are made by what makes the output's
        outputs = {"mixing": layer.mixing_matrix(x, mask, **where)}
        for name, (q, time) in layer.flows(x, **where).items():
            outputs |= {name: q.dense(), f"time of {name}": time}
    return computed({"out": layer(x, mask, **where)} | outputs, leaf | parameters)


def lie(c: Choice) -> dict[str, Tensor]:
    attn_mask, causal = mask_of(c.mask)
    kv = 1 if c.heads == "grouped" else H
    layer = LieAttention(
        C,
        H,
        num_kv_heads=kv,
        is_causal=causal,
        encoding=ENCODINGS[c.encoding](kv, causal),
        scores=SCORES[c.scores](C, H),
        bias=c.heads == "grouped",
        first_hop=c.hop == "yes",
        clock=CLOCKS[c.clock].clock,
        rate_fn=RATE_FNS[c.rates].rate_fn,
        plus=learned(c.plus, causal),
        ordered="ordered" in c.plus,
        mix_heads=c.weights != "none",
        bias_as=c.bias_as,
        learn_time="time" in c.learn,
        learn_rates="ρ" in c.learn,
        method=ALL_METHODS[c.method],
        allow_open_mask=c.mask == "open",
    )
    scale_time(layer, float(c.longer))
    return seen(layer, filled(layer), attn_mask)


def softmax(c: Choice) -> dict[str, Tensor]:
    attn_mask, causal = mask_of(c.mask)
    kv = 1 if c.heads == "grouped" else H
    layer = SoftmaxAttention(C, H, num_kv_heads=kv, is_causal=causal, encoding=ENCODINGS[c.encoding](kv, causal))
    return seen(layer, filled(layer), attn_mask)


def converted(c: Choice) -> dict[str, Tensor]:
    attn_mask, causal = mask_of(c.mask)
    kv = 1 if c.heads == "grouped" else H
    layer = SoftmaxAttention(C, H, num_kv_heads=kv, is_causal=causal, encoding=ENCODINGS[c.encoding](kv, causal))
    convert_attention(
        layer,
        clock=CLOCKS[c.clock].clock,
        first_hop=c.hop == "yes",
        learn_time="time" in c.learn,
        learn_rates="ρ" in c.learn,
        allow_open_mask=c.mask == "open",
    )
    parameters = filled(layer)
    set_time(layer, float(c.time))
    scale_time(layer, float(c.longer))
    return seen(layer, parameters, attn_mask)


def mixer(c: Choice) -> dict[str, Tensor]:
    layer = LieMixer(
        C, H, learned(c.plus, c.mask == "causal"), clock=CLOCKS[c.clock].clock, method=ALL_METHODS[c.method], bias=True
    )
    scale_time(layer, float(c.longer))
    return seen(layer, filled(layer), None)


@torch.no_grad()
def set_time(model: nn.Module, time: float) -> None:
    for module in model.modules():
        if isinstance(module, LieFlow):
            module.time.fill_(time)


def multihead(c: Choice) -> dict[str, Tensor]:
    layer = LieMultiheadAttention(
        C,
        H,
        bias=c.layout != "tokens first",
        batch_first=c.layout == "batch first",
        clock=CLOCKS[c.clock].clock,
        first_hop=c.hop == "yes",
        learn_rates="ρ" in c.learn,
    )
    parameters = filled(layer)
    set_time(layer, float(c.time))
    leaf = Leaves()
    x = leaf("x", *{"batch first": (B, N, C), "tokens first": (N, B, C), "no batch": (N, C)}[c.layout])
    ahead = ~torch.ones(N, N, dtype=torch.bool).tril()
    items = 1 if c.layout == "no batch" else B
    attn_mask = {
        "none": None,
        "causal": ahead,
        "hint": ahead,
        "float": leaf("mask", N, N) if c.mask == "float" else None,
        "per head": ahead.expand(items * H, N, N),
    }[c.mask]
    late = torch.arange(N) >= torch.tensor([[N - 2], [N]])  # (B, N)
    ignored = {"none": None, "bool": late, "float": torch.where(late, -torch.inf, wave("padding", B, N))}[c.padding]
    if ignored is not None and c.layout == "no batch":
        ignored = ignored[0]
    out, mixing = layer(
        x,
        x,
        x,
        key_padding_mask=ignored,
        need_weights=c.weights != "none",
        attn_mask=attn_mask,
        average_attn_weights=c.weights == "mean",
        is_causal=c.mask == "hint",
    )
    return computed({"out": out} | ({} if mixing is None else {"mixing": mixing}), leaf | parameters)


def decode(c: Choice) -> dict[str, Tensor]:
    knobs: dict[str, Any] = {"clock": CLOCKS[c.clock].clock, "first_hop": c.hop == "yes", "learn_rates": "ρ" in c.learn}
    kv = 1 if c.heads == "grouped" else H
    own: dict[str, Any] = {"num_kv_heads": kv, "is_causal": True, "encoding": ENCODINGS[c.encoding](kv, True)}
    if c.kind == "lie":
        layer: Any = LieAttention(C, H, **own, **knobs, method=ALL_METHODS[c.method])
    else:
        layer = SoftmaxAttention(C, H, **own)
        if c.kind != "softmax":
            convert_attention(layer, **knobs)
    filled(layer)
    if c.kind.startswith("converted"):
        set_time(layer, float(c.kind.split()[1]))
    x = wave("x", B, N, C)
    with torch.no_grad():
        cache = layer.new_cache(B, N)
        parts = [layer(part, cache=cache) for part in x.split([int(size) for size in c.chunks.split("+")], 1)]
        if c.then == "crop":
            cache.crop(3)
            parts.append(layer(x[:, -2:], cache=cache))
        if c.then == "reorder":
            cache.crop(N - 1)
            cache.reorder([1, 0, 1])
            parts.append(layer(x[[1, 0, 1], -1:], cache=cache))
        return {f"chunk {i}": part for i, part in enumerate(parts)}


RECIPES: dict[str, dict[str, Any]] = {
    "softmax": {"attention": {"module": "SoftmaxAttention", "scores": "SkewScores"}},
    "lie": {"attention": {"module": "LieAttention", "first_hop": True, "clock": "ErlangClock", "clock_shape": 2}},
    "streams": {"attention": {"module": "LieAttention", "plus": "RelativeRates", "max_distance": 3}, "streams": 2},
    "absolute": {
        "attention": {"module": "LieAttention"},
        "encoding": {"module": "LearnedEncoding", "num_positions": 9},
    },
    "sinusoidal": {"attention": {"module": "SoftmaxAttention"}, "encoding": {"module": "SinusoidalEncoding"}},
    "mixer": {"attention": {"module": "LieMixer", "generator": "RateMatrix", "num_tokens": N}, "encoding": None},
}


def transformer(c: Choice) -> dict[str, Tensor]:
    model = Transformer(C, 1, H, is_causal=c.mask == "causal", mlp_ratio=1.0, **RECIPES[c.recipe])
    if c.converts != "no":
        convert_attention(model)
    parameters, leaf = filled(model), Leaves()
    out = model(leaf("x", B, N, C))
    return computed({"out": out}, leaf | parameters)


def torch_layer(c: Choice) -> dict[str, Tensor]:
    """nn.TransformerEncoderLayer, converted."""
    model = nn.TransformerEncoderLayer(C, H, C, dropout=0.0, batch_first=True)
    convert_attention(model)
    parameters, leaf = filled(model), Leaves()
    set_time(model, float(c.time))
    ahead = ~torch.ones(N, N, dtype=torch.bool).tril()
    out = model(leaf("x", B, N, C), src_mask=ahead if c.mask == "causal" else None)
    return computed(
        {"out": out}, leaf | {name: p for name, p in parameters.items() if name.startswith(("time", "rate"))}
    )


# --- other people's models


def _llama() -> tuple[nn.Module, dict[str, Any]]:
    hf = pytest.importorskip("transformers")
    sizes = dict(vocab_size=9, hidden_size=C, intermediate_size=C, num_hidden_layers=1, head_dim=D)
    heads = dict(num_attention_heads=H, num_key_value_heads=1, max_position_embeddings=16)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads)), {}


def _gemma() -> tuple[nn.Module, dict[str, Any]]:
    hf = pytest.importorskip("transformers")
    sizes = dict(vocab_size=9, hidden_size=C, intermediate_size=C, num_hidden_layers=1, head_dim=D)
    heads = dict(num_attention_heads=H, num_key_value_heads=1, max_position_embeddings=16)
    capped = dict(attn_logit_softcapping=2.0, query_pre_attn_scalar=D, sliding_window=4)
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**sizes, **heads, **capped)), {"allow_open_mask": True}


def _t5() -> tuple[nn.Module, dict[str, Any]]:
    hf = pytest.importorskip("transformers")
    sizes = dict(vocab_size=9, d_model=C, d_kv=D, d_ff=C, num_layers=1, num_heads=H, dropout_rate=0.0)
    return hf.T5EncoderModel(hf.T5Config(**sizes, relative_attention_num_buckets=8)), {}


def _x_transformers(**options: Any) -> tuple[nn.Module, dict[str, Any]]:
    x = pytest.importorskip("x_transformers")
    layers = x.Decoder(dim=C, depth=1, heads=H, attn_dim_head=D, ff_mult=1, **options)
    return x.TransformerWrapper(num_tokens=9, max_seq_len=16, attn_layers=layers), {}


def _litgpt(**options: Any) -> tuple[nn.Module, dict[str, Any]]:
    pytest.importorskip("litgpt.model")
    from litgpt.config import Config
    from litgpt.model import GPT

    sizes = dict(block_size=16, vocab_size=9, padded_vocab_size=9, n_layer=1, n_head=H, n_embd=C)
    return GPT(Config(**sizes, **options)), {}


GUESTS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "llama": _llama,
    "gemma": _gemma,
    "t5": _t5,
    "x, alibi": lambda: _x_transformers(alibi_pos_bias=True),
    "x, clamped": lambda: _x_transformers(attn_softclamp_logits=True, attn_kv_heads=1),
    "litgpt": lambda: _litgpt(rotary_percentage=0.5, bias=True),
    "litgpt, capped": lambda: _litgpt(n_query_groups=1, attention_logit_softcapping=0.5, bias=False),
}
GUEST_CLOCKS = ("FixedClock", "ExponentialClock", "ErlangClock(2)")


def _guest(name: str, time: str, clock: str) -> tuple[Any, dict[str, Tensor]]:
    model, options = GUESTS[name]()
    convert_attention(model, clock=clock, **options)
    parameters = filled(model)
    set_time(model, float(time))
    return model, {key: p for key, p in parameters.items() if key.split(" ")[0] in ("time", "rate_weight", "rate_bias")}


def _shown(out: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        if hasattr(out, name):
            return getattr(out, name)
    return out


TOKENS = torch.arange(B * N).view(B, N) ** 2 % 9


def guest(c: Choice) -> dict[str, Tensor]:
    model, parameters = _guest(c.guest, c.time, c.clock)
    kept = torch.arange(N) >= torch.tensor([[2], [0]])
    kept = kept.flip(-1) if c.padding == "right" else kept
    masked: dict[str, Tensor] = {}
    if c.padding != "none":
        if c.guest.startswith("litgpt"):
            raise ValueError("LitGPT takes no mask")
        masked = {"mask": kept} if c.guest.startswith("x") else {"attention_mask": kept.long()}
    return computed({"logits": _shown(model(TOKENS, **masked))}, parameters)


def guest_decode(c: Choice) -> dict[str, Tensor]:
    model, _ = _guest(c.guest, c.time, c.clock)
    sizes = [int(size) for size in c.chunks.split("+")]
    with torch.no_grad():
        cache = pytest.importorskip("transformers").DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in TOKENS.split(sizes, 1)]
    return {f"chunk {i}": part for i, part in enumerate(parts)}


CALLS: dict[str, Callable[[Choice], dict[str, Tensor]]] = {
    "attention": attention,
    "across": across,
    "flow": flow,
    "generator": generator,
    "lie": lie,
    "softmax": softmax,
    "converted": converted,
    "mixer": mixer,
    "multihead": multihead,
    "decode": decode,
    "transformer": transformer,
    "torch layer": torch_layer,
    "guest": guest,
    "guest decode": guest_decode,
}
