"""Rotations of pairs: every fast path is the plain formula, in values and in every derivative; others' RoPE is ours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from liegroup_attn.positional import PairRotation, RotaryEncoding, turn_pairs
from liegroup_attn.positional.pairs import LAYOUTS

layouts = pytest.mark.parametrize("layout", LAYOUTS)


def plain(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """The formula, pair by pair."""
    half = x.size(-1) // 2
    first = range(half) if layout == "half_split" else range(0, 2 * half, 2)
    step = half if layout == "half_split" else 1
    out: list[Tensor] = [x[..., 0]] * (2 * half)
    for pair, i in enumerate(first):
        a, b, c, s = x[..., i], x[..., i + step], cos[..., pair], sin[..., pair]
        out[i], out[i + step] = a * c - b * s, a * s + b * c
    return torch.stack(out, -1)


def inputs(shape: tuple[int, ...] = (2, 3, 5, 8), seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    angles = torch.randn(shape[-2], shape[-1] // 2, generator=rng, dtype=torch.float64)
    return x, angles.cos(), angles.sin()


VIEWS = {
    "contiguous": lambda x: x,
    "transposed heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slice at an odd address": lambda x: torch.nn.functional.pad(x, (1, 1))[..., 1:-1],
    "odd rows": lambda x: torch.nn.functional.pad(x, (0, 1))[..., :-1],
    "width not last in memory": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
}


@layouts
@pytest.mark.parametrize("view", VIEWS)
def test_values_and_gradients_are_those_of_the_formula(layout, view):
    """Wherever x lies in memory; gradients of x and of the angles' cos and sin."""
    leaves = [t.requires_grad_() for t in inputs()]
    x, cos, sin = VIEWS[view](leaves[0]), *leaves[1:]
    got, expected = turn_pairs(x, cos, sin, layout), plain(x, cos, sin, layout)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    for a, b in zip(*(torch.autograd.grad(out, leaves, upstream) for out in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@layouts
def test_derivatives_of_every_order_and_kind(layout):
    leaves = [t.requires_grad_() for t in inputs((2, 3, 4))]

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return turn_pairs(x, cos, sin, layout)

    torch.autograd.gradcheck(turn, leaves, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(turn, leaves)


@layouts
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_vmap_over_any_dimension(layout, dim):
    x, cos, sin = inputs((2, 3, 4))
    many = torch.stack([x, 2 * x, x - 1], dim)
    got = torch.vmap(lambda x: turn_pairs(x, cos, sin, layout), in_dims=dim)(many)
    expected = torch.stack([plain(one, cos, sin, layout) for one in many.unbind(dim)])
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@layouts
def test_half_precision_is_turned_in_float32_and_cast_back(layout):
    x = inputs((2, 3, 5000, 8))[0].bfloat16()
    rotary = RotaryEncoding(8, layout=layout)
    for turned in rotary.rotate(x, x):
        assert torch.equal(turned, rotary(x.float()).bfloat16())


@layouts
def test_mixed_types_are_promoted(layout):
    x, cos, sin = inputs()
    got = turn_pairs(x.float(), cos, sin, layout)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, plain(x.float().double(), cos, sin, layout), atol=1e-12, rtol=1e-12)


@layouts
@pytest.mark.parametrize("view", ["contiguous", "slice at an odd address"])
def test_compiled_is_eager(layout, view):
    leaf, cos, sin = (t.requires_grad_() for t in inputs())
    x = VIEWS[view](leaf)
    compiled = torch.compile(turn_pairs, backend="aot_eager", fullgraph=True)
    got, expected = compiled(x, cos, sin, layout), turn_pairs(x, cos, sin, layout)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    for a, b in zip(*(torch.autograd.grad(out.sin().sum(), (x, cos, sin)) for out in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


class Learned(PairRotation):
    """Angles that learn."""

    def __init__(self, layout: str) -> None:
        super().__init__(8, layout=layout)
        self.rates = torch.nn.Parameter(torch.linspace(0.1, 1.0, 4, dtype=torch.float64))

    def angles(self, coordinates: Tensor, x: Tensor) -> Tensor:
        return coordinates * self.rates


@layouts
def test_a_compiled_encoding_is_eager(layout):
    """Queries, keys, and gradients of both and of the angles."""
    encoding = Learned(layout)
    leaves = [*(inputs(seed=seed)[0].requires_grad_() for seed in (0, 1)), encoding.rates]
    found = []
    for rotate in (encoding.rotate, torch.compile(encoding.rotate, backend="aot_eager", fullgraph=True)):
        outs = rotate(*leaves[:2])
        found.append([*outs, *torch.autograd.grad(sum(out.sin().sum() for out in outs), leaves)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


def test_rotary_embedding_torch_turns_as_we_do():
    reason = "rotary-embedding-torch is not installed; it is in the extra bench"
    theirs = pytest.importorskip("rotary_embedding_torch", reason=reason).RotaryEmbedding(16)
    x = inputs((2, 3, 40, 16))[0].float()
    ours = RotaryEncoding(16, layout="interleaved")(x)
    torch.testing.assert_close(theirs.rotate_queries_or_keys(x), ours, atol=1e-5, rtol=1e-5)


def test_x_transformers_turns_as_we_do():
    theirs = pytest.importorskip("x_transformers.x_transformers", reason="x-transformers is not installed")
    x = inputs((2, 3, 40, 16))[0].float()
    freqs, scale = theirs.RotaryEmbedding(16).forward_from_seq_len(40)
    ours = RotaryEncoding(16, layout="interleaved")(x)
    torch.testing.assert_close(theirs.apply_rotary_pos_emb(x, freqs, scale), ours, atol=1e-5, rtol=1e-5)
