"""What the laws do not say of single biases."""

import torch

from liegroup_attn.positional import T5Bias


def test_t5_buckets_by_hand():
    d = torch.tensor([0, 1, 7, 8, 16, 32, 64, 128, -1, -8])
    assert T5Bias(2, is_causal=False).buckets(d).tolist() == [0, 1, 7, 8, 10, 12, 14, 15, 17, 24]
