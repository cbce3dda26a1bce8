"""The models of the table, each behind one small contract; tiny, with random weights, no network."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from liegroup_attn.nn import SoftmaxAttention, Transformer, convert_attention

__all__ = [
    "CONVERSION",
    "CUT",
    "PADS",
    "PROMPT",
    "TOKENS",
    "Subject",
    "of_liegroup_attn",
    "of_torch",
    "state_dict_reloaded",
]

TOKENS, CUT, PADS = 9, 6, 3  # N; from where tokens change; how many of the second item's first are padding
PROMPT, NEW, VOCABULARY = 5, 8, 64
WIDTH, HEADS = 32, 4

CONVERSION: dict[str, Any] = {"max_time": 2.0}  # of every conversion

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model and how it is used.

    Args:
        name: of its class.
        library: where it comes from.
        build: makes it, in eval mode, without dropout.
        inputs: arguments of a forward, always the same; ``changed`` from token ``CUT`` on ("later") or in the padding
            ("padding"), ``padded`` with a mask of the padding.
        run: model, inputs → (B, N, ·) or (B, ·).
        reload: model → the same, saved, made anew and loaded.
        causal: whether later tokens are hidden.
        pads: whether it takes a padding mask.
        generate: model, whether with a cache → (tokens, and scores of them if there are any); None if it does not generate.
        options: of the conversion.
    """

    name: str
    library: str
    build: Callable[[], nn.Module]
    inputs: Callable[..., Inputs]
    run: Callable[[nn.Module, Inputs], Tensor]
    reload: Callable[[nn.Module], nn.Module]
    causal: bool = True
    pads: bool = True
    generate: Callable[[nn.Module, bool], tuple[Tensor, Tensor | None]] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same weights each time, away from small initial values at which attention is uniform."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = build().eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
        return model

    return make


def state_dict_reloaded(build: Callable[[], nn.Module], options: dict[str, Any]) -> Callable[[nn.Module], nn.Module]:
    """By way of ``torch.save`` and a fresh conversion."""

    def reload(model: nn.Module) -> nn.Module:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        fresh = build()
        convert_attention(fresh, **CONVERSION, **options)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        return fresh.eval()

    return reload


def features(changed: str = "", padded: bool = False) -> Inputs:
    """(2, N, C) and a padding mask, torch's way: True = ignored."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS, WIDTH, generator=rng)
    other = torch.randn(2, TOKENS, WIDTH, generator=rng)  # in another direction, since norms do not see a shift
    if changed == "later":
        x[:, CUT:] = other[:, CUT:]
    if changed == "padding":
        x[1, :PADS] = other[1, :PADS]
    ignored = torch.zeros(2, TOKENS, dtype=torch.bool)
    ignored[1, :PADS] = padded  # on the left, where a causal mask hides nothing of it
    return {"x": x, "ignored": ignored if padded else None}


def tokens(changed: str = "", padded: bool = False) -> Inputs:
    """(2, N) integers; ``keep`` says True for what is no padding."""
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, TOKENS), generator=rng)
    if changed == "later":
        ids[:, CUT:] = 3 + (ids[:, CUT:] + 7) % (VOCABULARY - 3)
    if changed == "padding":
        ids[1, :PADS] = 3 + (ids[1, :PADS] + 7) % (VOCABULARY - 3)
    keep = torch.ones(2, TOKENS, dtype=torch.bool)
    keep[1, :PADS] = not padded
    return {"ids": ids, "keep": keep if padded else None}


def prompt() -> Tensor:
    """(2, PROMPT) integers."""
    return torch.randint(3, VOCABULARY, (2, PROMPT), generator=torch.Generator().manual_seed(2))


def of_torch() -> list[Subject]:
    """PyTorch's own modules."""
    causal = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    layer: dict[str, Any] = {"dim_feedforward": 48, "dropout": 0.0, "batch_first": True}

    def encoder_layer(**more: Any) -> nn.TransformerEncoderLayer:
        return nn.TransformerEncoderLayer(WIDTH, HEADS, **{**layer, **more})

    def decode(m: Any, i: Inputs) -> Tensor:
        return m(i["x"], memory(), tgt_mask=causal, tgt_key_padding_mask=i["ignored"])

    rows: list[tuple[str, Callable[[], nn.Module], Callable[[Any, Inputs], Tensor], bool]] = [
        (
            "MultiheadAttention",
            lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
            lambda m, i: m(*[i["x"]] * 3, attn_mask=causal, key_padding_mask=i["ignored"])[0],
            True,
        ),
        ("TransformerEncoderLayer", encoder_layer, lambda m, i: m(i["x"], src_key_padding_mask=i["ignored"]), False),
        (
            "TransformerEncoder",
            lambda: nn.TransformerEncoder(encoder_layer(), 2),
            lambda m, i: m(i["x"], src_key_padding_mask=i["ignored"]),
            False,
        ),
        (
            "TransformerEncoder, pre-norm, causal",
            lambda: nn.TransformerEncoder(encoder_layer(norm_first=True), 2, enable_nested_tensor=False),
            lambda m, i: m(i["x"], mask=causal, src_key_padding_mask=i["ignored"]),
            True,
        ),
        ("TransformerDecoderLayer", lambda: nn.TransformerDecoderLayer(WIDTH, HEADS, **layer), decode, True),
        (
            "TransformerDecoder",
            lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, **layer), 2),
            decode,
            True,
        ),
        (
            "Transformer",
            lambda: nn.Transformer(WIDTH, HEADS, 1, 1, **layer),
            lambda m, i: m(memory(), i["x"], tgt_mask=causal, tgt_key_padding_mask=i["ignored"]),
            True,
        ),
    ]
    found = []
    for name, build, run, hidden in rows:
        made = seeded(build)
        found.append(Subject(name, "torch.nn", made, features, run, state_dict_reloaded(made, {}), hidden))
    return found


def memory() -> Tensor:
    """What a decoder reads, always the same."""
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))


class _Language(nn.Module):
    """Embedding, this library's Transformer, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.transformer = Transformer(WIDTH, 2, HEADS, is_causal=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.transformer(self.embedding(ids)))


def of_liegroup_attn() -> list[Subject]:
    """This library's own."""
    attention = seeded(lambda: SoftmaxAttention(WIDTH, HEADS, num_kv_heads=2))
    language = seeded(_Language)

    def generate(m: Any, cached: bool) -> tuple[Tensor, Tensor]:
        scores: list[Tensor] = []

        def head(x: Tensor) -> Tensor:
            scores.append(m.head(x)[:, -1])
            return m.head(x)

        parts = {"embedding": m.embedding, "head": head}
        found = m.transformer.generate(prompt(), NEW, **parts, temperature=0.0, use_cache=cached)
        return found, torch.stack(scores, 1)

    def mask(inputs: Inputs) -> Tensor | None:
        return None if inputs["ignored"] is None else ~inputs["ignored"][:, None, None]

    return [
        Subject(
            "SoftmaxAttention",
            "liegroup_attn",
            attention,
            features,
            lambda m, i: m(i["x"], mask(i)),
            state_dict_reloaded(attention, {}),
            causal=False,
        ),
        Subject(
            "Transformer",
            "liegroup_attn",
            language,
            tokens,
            lambda m, i: m(i["ids"]),
            state_dict_reloaded(language, {}),
            pads=False,
            generate=generate,
        ),
    ]
