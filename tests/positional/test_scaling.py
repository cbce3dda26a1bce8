"""Scaled frequencies against transformers' tables and hand-made numbers."""

import math

import pytest
import torch

from liegroup_attn.positional import DynamicNTK, LinearScaling, Llama3Scaling, LongRoPE, YaRN

W = 128
THETA = 500_000.0 ** (-torch.arange(0, W, 2, dtype=torch.float64) / W)
S, L = [1.0 + i / 64 for i in range(64)], [2.0 + i for i in range(64)]
KINDS = {
    "linear": (LinearScaling(4.0), {"factor": 4.0}),
    "dynamic": (DynamicNTK(4.0, 4096), {"factor": 4.0}),
    "yarn": (YaRN(4.0, 4096), {"factor": 4.0}),
    "longrope": (LongRoPE(S, L, 4096, 4.0), {"factor": 4.0, "short_factor": S, "long_factor": L}),
    "llama3": (Llama3Scaling(8.0, 1.0, 4.0, 4096), {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
}


@pytest.mark.parametrize("length", [100, 9000])
@pytest.mark.parametrize("kind", KINDS)
def test_as_transformers(kind, length):
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    ours, options = KINDS[kind]
    given = {"rope_type": kind, "rope_theta": 500_000.0, "original_max_position_embeddings": 4096, **options}
    config = LlamaConfig(head_dim=W, max_position_embeddings=4096, rope_parameters=given)
    golden, factor = rope.ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    got, own = ours.frequencies(THETA, 500_000.0, torch.full((1, 1), length - 1.0, dtype=torch.float64))
    torch.testing.assert_close(got.flatten(), golden.double(), rtol=2e-5, atol=0)
    assert own == pytest.approx(factor)


def test_llama_3_1_by_the_formula():
    got, _ = Llama3Scaling(8.0, 1.0, 4.0, 8192).frequencies(THETA, 500_000.0, torch.zeros(1, 1))
    for i in range(64):
        theta = 500_000.0 ** (-i / 64)
        wave = 2 * math.pi / theta
        smooth = (8192 / wave - 1) / 3
        golden = theta if wave < 2048 else theta / 8 if wave > 8192 else (1 - smooth) * theta / 8 + smooth * theta
        assert got[i].item() == pytest.approx(golden, rel=1e-12)


def test_factors_below_1():
    with pytest.raises(ValueError, match="factor: expected a number ≥ 1, got 0.5"):
        LinearScaling(0.5)
