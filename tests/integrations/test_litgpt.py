"""LitGPT: converted models against the plain ones, exact decoding, what is kept and what is refused."""

import pytest
import torch
from guest_checks import (
    check_causality,
    check_gradients,
    check_modes,
    check_report,
    check_restored,
    check_state_dict,
    check_time_zero,
    golden,
)

from experiments.drop_in.guest_cases import LIT_CASES, flows, gpt, moving, tokens

pytest.importorskip("litgpt.model", reason="litgpt is not installed")

from litgpt.model import CausalSelfAttention, MultiheadLatentAttention, do_softcapping

from liegroup_attn.errors import CacheError, MaskError
from liegroup_attn.nn import convert_attention, restore_attention

each = pytest.mark.parametrize("case", LIT_CASES, ids=str)
CASES = {case.name: case for case in LIT_CASES}
CACHED = [case for case in LIT_CASES if case.name != "gemma-window"]


@each
def test_time_zero_changes_nothing(case):
    check_time_zero(case)


@each
def test_everything_learns(case):
    check_gradients(case)


@each
def test_one_function_in_all_modes(case):
    check_modes(case)


@each
def test_no_future_leak(case):
    check_causality(case)


@each
def test_save_and_load(case):
    check_state_dict(case)


@each
def test_restore(case):
    check_restored(case, CausalSelfAttention)


@each
def test_report(case):
    check_report(case, CausalSelfAttention)


@pytest.mark.parametrize("name", ["pythia", "llama", "gemma", "gemma-window"])
def test_golden(name):
    """S exp(tQ) V by SciPy: scale, capped scores, window."""
    model = CASES[name].converted(0.7, tol=1e-12)
    attention = model.transformer.h[0].attn
    q, k, v = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).unbind()
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
    mask = None
    if name == "gemma-window":
        hidden = hidden | torch.ones(7, 7, dtype=torch.bool).tril(-4)
        mask = torch.zeros(1, 1, 7, 7, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    out = attention.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
    gemma = name.startswith("gemma")
    scores = q @ k.mT / (5 if gemma else 8) ** 0.5
    scores = do_softcapping(scores, 0.5) if gemma else scores
    wanted = golden(attention.lie, scores.masked_fill(hidden, -torch.inf), v)
    torch.testing.assert_close(out.detach(), wanted, atol=1e-9, rtol=1e-9)


def decode(model, x, pieces, maxp1=True):
    """Logits of ``x`` by a cache, given in pieces."""
    found, start = [], 0
    for length in pieces:
        stop = start + length
        found.append(model(x[:, start:stop], torch.arange(start, stop), stop if maxp1 else None))
        start = stop
    return torch.cat(found, 1)


@pytest.mark.parametrize("case", CACHED, ids=str)
@pytest.mark.parametrize("clock", [None, "ExponentialClock()"])
@pytest.mark.parametrize("maxp1", [True, False])
def test_decoding_is_exact(case, clock, maxp1):
    """A cache computes what a forward without it does; it starts anew for another prompt, and can go back."""
    model, x = case.converted(0.7, clock=clock), tokens()
    with torch.no_grad():
        wanted = model(x)
        model.set_kv_cache(batch_size=2, dtype=torch.float64)
        for pieces in ((4, 1, 2, 1, 1), (1,) * 9, (9,)):
            torch.testing.assert_close(decode(model, x, pieces, maxp1), wanted)
        again = model(x[:, 5:7], torch.arange(5, 7), 7 if maxp1 else None)
        torch.testing.assert_close(again, wanted[:, 5:7])
        other = tokens(length=6).flip(1)
        torch.testing.assert_close(decode(model, other, (3, 3), maxp1), model(other))


def test_decoding_can_fail():
    """Softmax over a cache is another function of the flow's model: the test above would see it."""
    model, x = CASES["llama"].converted(0.7), tokens()
    with torch.no_grad():
        wanted = model(x)
        for flow in flows(model):
            flow.time.zero_()
        model.set_kv_cache(batch_size=2, dtype=torch.float64)
        assert not torch.allclose(decode(model, x, (4, 5)), wanted, atol=1e-3)


def test_a_cache_of_nothing_is_refused():
    model, x = CASES["llama"].converted(0.7), tokens()
    with torch.no_grad():
        model.set_kv_cache(batch_size=2, dtype=torch.float64)
        with pytest.raises(CacheError, match="from position 0"):
            model(x[:, 4:5], torch.tensor([4]), 5)
        decode(model, x, (4,))
        model.set_kv_cache(batch_size=2, dtype=torch.float64)  # a new one
        with pytest.raises(CacheError, match="from position 0"):
            model(x[:, 4:5], torch.tensor([4]), 5)
        decode(model, x, (4,))
        with pytest.raises(CacheError, match="from position 0"):  # a gap
            model(x[:, 6:7], torch.tensor([6]), 7)
        with pytest.raises(CacheError, match="successive"):
            model(x[:, 4:6], torch.tensor([5, 7]), 8)
        with pytest.raises(CacheError, match="all items"):
            model(x[:, 4:5], torch.tensor([[4], [3]]), 5)
        model.clear_kv_cache()
        assert model(x).isfinite().all()


def test_time_that_starts_after_the_prompt_is_refused():
    """At time 0 nothing is kept, so nothing can be continued."""
    model, x = CASES["llama"].converted(), tokens()
    with torch.no_grad():
        model.set_kv_cache(batch_size=2, dtype=torch.float64)
        decode(model, x, (4,))
        moving(model)
        with pytest.raises(CacheError, match="from position 0"):
            model(x[:, 4:5], torch.tensor([4]), 5)


def test_hops_of_replaced_tokens_are_not_gone_on_from():
    """A call at time 0 writes other keys and keeps no hops: those of before are of other tokens."""
    model, x, other = CASES["llama"].converted(0.7), tokens(), tokens().flip(1)
    times = [flow.time.clone() for flow in flows(model)]
    with torch.no_grad():
        model.set_kv_cache(batch_size=2, dtype=torch.float64)
        decode(model, x, (4,))
        for flow in flows(model):
            flow.time.zero_()
        decode(model, other, (4,))
        for flow, time in zip(flows(model), times, strict=True):
            flow.time.copy_(time)
        with pytest.raises(CacheError, match="from position 0"):
            model(other[:, 4:5], torch.tensor([4]), 5)
        torch.testing.assert_close(decode(model, other, (4, 5)), model(other))


@pytest.mark.parametrize(
    "change", [{"time_scale": 0.5}, {"max_time": 3.0}, {"tol": 1e-2}, {"first_hop": False}], ids=str
)
def test_a_cache_does_not_go_on_with_other_settings(change):
    model, x = CASES["llama"].converted(0.7, clock="ExponentialClock()"), tokens()
    with torch.no_grad():
        model.set_kv_cache(batch_size=2, dtype=torch.float64)
        decode(model, x, (4,))
        for flow in flows(model):
            for name, value in change.items():
                setattr(flow, name, value)
        with pytest.raises(CacheError, match="settings"):
            model(x[:, 4:5], torch.tensor([4]), 5)
        torch.testing.assert_close(decode(model, x, (4, 5)), model(x))
    restore_attention(model)
    assert not any(hasattr(module, "lie_settings") or hasattr(module, "hops") for module in model.modules())


@pytest.mark.parametrize("case", [c for c in CACHED if c.name != "gemma"], ids=str)
def test_decoding_at_time_zero_is_litgpts(case):
    plain, lie, x = case.model().double(), case.converted(), tokens()
    with torch.no_grad():
        for model in (plain, lie):
            model.set_kv_cache(batch_size=2, dtype=torch.float64)
        assert torch.equal(decode(lie, x, (4, 1, 4)), decode(plain, x, (4, 1, 4)))
    torch.testing.assert_close(decode(lie, x, (4, 1, 4)).detach(), decode(plain, x, (4, 1, 4)).detach())


def test_a_window_is_refused():
    """As a mask by default; in a cache once it forgets tokens."""
    model, x = CASES["gemma-window"].model().double(), tokens()
    convert_attention(model)
    with pytest.raises(MaskError, match="allow_open_mask=True"):
        model(x)
    moving(model)
    wanted = model(x[:, :4]).detach()
    with torch.no_grad():
        model.set_kv_cache(batch_size=2, dtype=torch.float64)
        torch.testing.assert_close(decode(model, x[:, :4], (3, 1)), wanted)
        with pytest.raises(CacheError, match="window"):
            model(x[:, 4:5], torch.tensor([4]), 5)


def test_window_by_window():
    """Layers with a window can stay as they are."""
    model = CASES["gemma-window"].model()
    report = convert_attention(model, exclude="transformer.h.0.*")
    assert report.converted == ["transformer.h.1.attn"]
    assert moving(model)(tokens()).isfinite().all()


def test_latent_attention_is_kept():
    latent = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, qk_head_dim=8)
    model = gpt(rotary_percentage=1.0, latent_attention=latent)
    first = model.transformer.h[0]
    assert type(first.attn) is MultiheadLatentAttention
    first.attn = CausalSelfAttention(gpt().config, 0)
    report = convert_attention(model)
    assert report.converted == ["transformer.h.0.attn"]
    assert report.kept == {"transformer.h.1.attn": "multi-head latent attention is not converted"}
    restore_attention(model)


def test_lora_is_kept():
    lora = pytest.importorskip("litgpt.lora", reason="litgpt.lora needs more packages")
    config = lora.Config(block_size=16, padded_vocab_size=23, n_layer=1, n_head=4, n_embd=32, lora_r=2)
    model = torch.nn.ModuleList([CausalSelfAttention(config, 0), lora.CausalSelfAttention(config, 0)])
    report = convert_attention(model)
    assert report.converted == ["0"]
    assert "subclass" in report.kept["1"]
