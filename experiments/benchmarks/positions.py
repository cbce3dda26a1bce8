"""What positions cost: RoPE beside others' and beside a multiply-add, and every encoding beside RoPE."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks.measure import time_in_turn
from liegroup_attn.positional import (
    FIRE,
    AbsoluteEncoding,
    ALiBi,
    AxialBlocks,
    BiasEncoding,
    CayleyString,
    CirculantString,
    CoPE,
    DependentBlocks,
    ForgettingGate,
    LearnedEncoding,
    LieRotary,
    MixedRotary,
    PlaneRotary,
    PositionalEncoding,
    RotaryEncoding,
    RotationEncoding,
    SinusoidalEncoding,
    T5Bias,
    XPos,
)

__all__ = [
    "CHAIN",
    "FOLDED",
    "KINDS",
    "OTHERS",
    "OURS",
    "RIVALS",
    "ROPE",
    "TRAINED",
    "time_folded",
    "time_rope",
    "time_training",
    "why_no_rival",
]

Both = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

KINDS = ("eager", "compiled")
BATCH, HEADS, TOKENS, WIDTH = 8, 8, 1024, 64  # of RoPE beside others'
SMALL = (8, 4, 256, 16)  # of encodings beside RoPE: batch, heads, N, D

CHAIN, ROPE = "multiply-add", "RotaryEncoding"
OURS = ("RotaryEncoding, half_split", "RotaryEncoding, interleaved")
OTHERS = ("x-transformers", "rotary-embedding-torch")


def _ours(layout: str) -> Both:
    return RotaryEncoding(WIDTH, layout=layout).rotate


def _x_transformers() -> Both:
    from x_transformers.x_transformers import RotaryEmbedding, apply_rotary_pos_emb

    rotary = RotaryEmbedding(WIDTH)

    def rotate(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        freqs, scale = rotary.to(query.device).forward_from_seq_len(query.size(-2))
        return apply_rotary_pos_emb(query, freqs, scale), apply_rotary_pos_emb(key, freqs, scale)

    return rotate


def _rotary_embedding_torch() -> Both:
    from rotary_embedding_torch import RotaryEmbedding

    rotary = RotaryEmbedding(WIDTH)

    def rotate(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        turn = rotary.to(query.device).rotate_queries_or_keys
        return turn(query), turn(key)

    return rotate


def _chain() -> Both:
    """x·a + b, a and b (N, 1, D/2) as cos and sin are: reads query, key and tables and writes as much as a rotation."""
    rng = torch.Generator().manual_seed(1)
    a, b = (torch.randn(TOKENS, 1, WIDTH // 2, generator=rng) for _ in range(2))

    def one(x: Tensor) -> Tensor:
        scale, shift = a.to(x.device), b.to(x.device)
        return (x.unflatten(-1, (2, -1)) * scale + shift).flatten(-2).to(x.dtype)

    return lambda query, key: (one(query), one(key))


RIVALS: dict[str, Callable[[], Both]] = {
    OURS[0]: lambda: _ours("half_split"),
    OURS[1]: lambda: _ours("interleaved"),
    OTHERS[0]: _x_transformers,
    OTHERS[1]: _rotary_embedding_torch,
    CHAIN: _chain,
}

_B, _H, _N, _D = SMALL

# Name → an encoding ready for inference, folded where it can be; RoPE first. One encoding, one row.
FOLDED: dict[str, Callable[[], RotationEncoding]] = {
    ROPE: lambda: RotaryEncoding(_D, layout="half_split"),
    "AxialBlocks, folded": lambda: AxialBlocks(_D, _H).fold()[1],
    "DependentBlocks, folded": lambda: DependentBlocks(_D, _H).fold()[1],
    "CayleyString, folded": lambda: CayleyString(_D, _H).fold()[1],
    "CirculantString, folded": lambda: CirculantString(_D, _H).fold()[1],
    "PlaneRotary, folded": lambda: PlaneRotary(_D, _H, num_planes=_D // 2).fold()[1],
}

# Name → an encoding as it is trained; RoPE first. One encoding, one row.
TRAINED: dict[str, Callable[[], PositionalEncoding]] = {
    ROPE: lambda: RotaryEncoding(_D, layout="half_split"),
    "RotaryEncoding, interleaved": lambda: RotaryEncoding(_D, layout="interleaved"),
    "SinusoidalEncoding": lambda: SinusoidalEncoding(_H * _D),
    "LearnedEncoding": lambda: LearnedEncoding(_H * _D, _N),
    "LieRotary": lambda: LieRotary(_D, _H),
    "AxialBlocks": lambda: AxialBlocks(_D, _H),
    "DependentBlocks": lambda: DependentBlocks(_D, _H),
    "CayleyString": lambda: CayleyString(_D, _H),
    "CirculantString": lambda: CirculantString(_D, _H),
    "PlaneRotary": lambda: PlaneRotary(_D, _H, num_planes=_D // 2),
    "MixedRotary": lambda: MixedRotary(_D, _H, axes=1, layout="half_split"),
    "XPos": lambda: XPos(_D, layout="half_split"),
    "ALiBi": lambda: ALiBi(_H),
    "T5Bias": lambda: T5Bias(_H, is_causal=True),
    "FIRE": lambda: FIRE(_H),
    "ForgettingGate": lambda: ForgettingGate(_H * _D, _H),
    "CoPE": lambda: CoPE(_H, _D),
}


def why_no_rival(name: str) -> str | None:
    """Why a row of RoPE cannot be built here."""
    module = name.replace("-", "_")
    missing = name in OTHERS and importlib.util.find_spec(module) is None
    return f"{name} is not installed" if missing else None


def turned(query: Tensor, layout: str) -> Tensor:
    """RoPE as complex products in float64: what all rows are held to."""
    x = query.double()
    pairs = torch.stack(x.chunk(2, -1), -1) if layout == "half_split" else x.unflatten(-1, (-1, 2))
    width, tokens = x.size(-1), x.size(-2)
    rates = 10_000.0 ** (-torch.arange(0, width, 2, device=x.device).double() / width)
    angles = torch.arange(tokens, device=x.device).double().unsqueeze(-1) * rates
    moved = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles))
    return torch.cat(moved.unbind(-1), -1) if layout == "half_split" else moved.flatten(-2)


def time_rope(names: Iterable[str], kind: str, repeats: int, seconds: float, device: str, dtype: str) -> dict[str, Any]:
    """Seconds of forward and backward of query and key, and how far each rotation is off."""
    query, key = _random((BATCH, HEADS, TOKENS, WIDTH), 2, device, dtype)
    calls, errors = {}, {}
    for name in names:
        run = RIVALS[name]()
        if kind == "compiled":
            torch._dynamo.reset()  # the functions share code; each row is compiled as if alone
            run = torch.compile(run, dynamic=False)
        if name != CHAIN:
            expected = turned(query.detach(), "half_split" if name == OURS[0] else "interleaved")
            errors[name] = float((run(query, key)[0].detach().double() - expected).abs().max())
        calls[name] = _backward(partial(run, query, key), [query, key])
        calls[name]()  # compiled now, before the next row resets
    rows = time_in_turn(calls, repeats, seconds, device)
    least = 1e-3 if dtype == "float32" else 1e-9 if dtype == "float64" else 0.1
    for name, error in errors.items():
        wrong = {"failed": f"off by {error:.1e}: it computes something else"}
        rows[name] = rows[name] | {"error": error} if error <= least else wrong
    return {"rows": rows}


def time_folded(repeats: int, seconds: float, device: str, dtype: str) -> dict[str, Any]:
    """Seconds of ``rotate`` without a graph."""
    query, key = _random(SMALL, 2, device, dtype)
    calls = {}
    for name, build in FOLDED.items():
        torch.manual_seed(0)
        encoding = build().to(device).eval()
        calls[name] = torch.no_grad()(partial(encoding.rotate, query, key))
    return {"rows": time_in_turn(calls, repeats, seconds, device)}


def time_training(repeats: int, seconds: float, device: str, dtype: str) -> dict[str, Any]:
    """Seconds of forward and backward of what an encoding does, wherever it acts."""
    query, key = _random(SMALL, 2, device, dtype)
    (x,) = _random((_B, _N, _H * _D), 1, device, dtype)
    calls = {}
    for name, build in TRAINED.items():
        torch.manual_seed(0)
        encoding = build().to(device)
        calls[name] = _backward(_act(encoding, x, query, key), [x, query, key, *encoding.parameters()])
    return {"rows": time_in_turn(calls, repeats, seconds, device)}


def _act(encoding: PositionalEncoding, x: Tensor, query: Tensor, key: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    if isinstance(encoding, RotationEncoding):
        return lambda: encoding.rotate(query, key)
    if isinstance(encoding, BiasEncoding):
        return lambda: (encoding(x, query, key),)
    if isinstance(encoding, AbsoluteEncoding):
        return lambda: (encoding(x),)
    raise TypeError(f"encoding: expected one of three kinds, got {type(encoding).__name__}; add its call here")


def _random(size: tuple[int, ...], count: int, device: str, dtype: str) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    made = [torch.randn(size, generator=rng).to(device, getattr(torch, dtype)) for _ in range(count)]
    return [x.requires_grad_() for x in made]


def _backward(run: Callable[[], tuple[Tensor, ...]], leaves: list[Tensor]) -> Callable[[], object]:
    """A call of forward and backward; a bias without parameters has no backward."""
    upstream = [torch.ones_like(out) for out in run()]

    def both() -> object:
        outs = run()
        if not any(out.requires_grad for out in outs):
            return outs
        return torch.autograd.grad(outs, leaves, upstream, allow_unused=True)

    return both
