"""Models of Hugging Face Transformers after a conversion: the same at time 0, a causal chain after, exact when decoded."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch

hf = pytest.importorskip("transformers")

from hf_cases import BY_NAME, CASES, DECODERS, LLAMA  # noqa: E402

import liegroup_attn.integrations.transformers as lie  # noqa: E402
from liegroup_attn.errors import CacheError, ConversionError, GeneratorError, MaskError  # noqa: E402
from liegroup_attn.integrations.transformers.loading import flowing  # noqa: E402
from liegroup_attn.nn import convert_attention, restore_attention  # noqa: E402
from liegroup_attn.nn.flow import LieFlow  # noqa: E402

CAUSAL = tuple(case for case in CASES if case.kind == "causal")
PADDED = tuple(case for case in CASES if case.kind in ("causal", "masked", "seq2seq"))
CLOCKS = ("FixedClock", "ExponentialClock", "ErlangClock(2)")


def converted(case, time=0.0, seed=0, changes=None, **options):
    """A converted model at a time, with rates that differ by token."""
    model = case.build(seed, **(changes or {}))
    report = convert_attention(model, **{**case.options, **options})
    if time:
        set_time(model, time)
    return model, report


def set_time(model, time):
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, module in flowing(model):
            flow = module.lie
            flow.time.copy_(time * torch.linspace(0.5, 1, flow.num_heads, dtype=flow.time.dtype).unsqueeze(-1))
            if flow.learn_rates:
                flow.rate_weight.copy_(0.3 * torch.randn(flow.rate_weight.shape, generator=draw))


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    apart = float((a - b).abs().max())
    assert apart <= tolerance, apart


# --- the table: every model, every property


@pytest.mark.parametrize("case", CASES, ids=str)
def test_time_0_is_the_model_as_it_was(case):
    plain = case.build()
    expected = logits(plain, **case.inputs())
    model, report = converted(case)
    assert len(report.converted) == case.layers
    assert len(report.kept) == case.crossing
    assert all("cross-attention" in reason for reason in report.kept.values())
    close(logits(model, **case.inputs()), expected)
    close(model(**case.inputs()).logits.detach(), expected)  # the way with a gradient forms other products


@pytest.mark.parametrize("case", CASES, ids=str)
def test_time_does_something(case):
    at_0, _ = converted(case)
    later, _ = converted(case, 0.8)
    assert float((logits(at_0, **case.inputs()) - logits(later, **case.inputs())).abs().max()) > 1e-3


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_parameter_learns(case):
    for time in (0.0, 0.7):
        model, _ = converted(case, time)
        model(**case.inputs()).logits.square().mean().backward()
        for name, module in flowing(model):
            assert (module.lie.time.grad.abs() > 0).any(), (name, "time", time)
            if time:
                assert (module.lie.rate_weight.grad.abs() > 0).any(), name
                assert (module.lie.rate_bias.grad.abs() > 0).any(), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_train_eval_and_no_grad_are_one(case):
    model, _ = converted(case, 0.7)
    in_eval = model(**case.inputs()).logits.detach()
    close(logits(model, **case.inputs()), in_eval, 2e-5)
    model.train()
    torch.manual_seed(0)
    close(model(**case.inputs()).logits.detach(), in_eval, 2e-5)


@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_no_token_sees_the_future(case):
    for options in ({}, {"clock": "ExponentialClock"}):
        model, _ = converted(case, 0.8, **options)
        ids = case.inputs()["input_ids"]
        other = ids.clone()
        other[:, 4:] = (other[:, 4:] + 7) % 60 + 3
        before, after = model(input_ids=ids).logits.detach(), model(input_ids=other).logits.detach()
        close(before[:, :4], after[:, :4])
        assert float((before[:, 4:] - after[:, 4:]).abs().max()) > 1e-3


@pytest.mark.parametrize("case", PADDED, ids=str)
def test_padding_is_not_seen(case):
    """PITFALLS 23: without a mask function of its own name padding leaks. Right padding; its tokens change nothing."""
    model, _ = converted(case, 0.8)
    inputs = case.inputs()
    ids, mask = inputs["input_ids"], torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    other = ids.clone()
    other[1, 4:] = (other[1, 4:] + 7) % 60 + 3
    kept = {key: value for key, value in inputs.items() if key != "input_ids"}
    for run in (logits, lambda m, **x: m(**x).logits.detach()):
        a = run(model, input_ids=ids, attention_mask=mask, **kept)
        b = run(model, input_ids=other, attention_mask=mask, **kept)
        free = run(model, input_ids=other, **kept)
        shown = slice(None) if case.kind == "seq2seq" else slice(0, 4)
        assert torch.isfinite(a).all()
        close(a[:, shown], b[:, shown])
        if case.kind != "causal":
            assert float((b[1] - free[1]).abs().max()) > 1e-3  # the mask is what hides them


@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_left_padding_is_a_shorter_text(case):
    model, _ = converted(case, 0.8)
    ids = case.inputs(1, 5)["input_ids"]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(8) >= 3).long().unsqueeze(0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    extra = {} if case.name == "opt" else {"position_ids": positions}
    for run in (logits, lambda m, **x: m(**x).logits.detach()):
        found = run(model, input_ids=padded, attention_mask=mask, **extra)
        assert torch.isfinite(found).all()
        close(found[:, 3:], run(model, input_ids=ids), 2e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_checkpoints_come_back(case, tmp_path):
    model, _ = converted(case, 0.8, clock="ExponentialClock", max_time=2.0)
    model.save_pretrained(tmp_path)
    back, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert back.config._attn_implementation == "lie"
    assert [name for name, _ in flowing(back)] == [name for name, _ in flowing(model)]
    assert all(str(module.lie.clock) == "ExponentialClock()" for _, module in flowing(back))
    close(logits(back.eval(), **case.inputs()), logits(model, **case.inputs()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_can_be_taken_back(case):
    model = case.build()
    before, implementation, keys = logits(model, **case.inputs()), model.config._attn_implementation, set(model.state_dict())
    convert_attention(model, **case.options)
    assert set(model.state_dict()) != keys
    report = restore_attention(model)
    assert len(report.converted) == case.layers
    assert set(model.state_dict()) == keys
    assert model.config._attn_implementation == implementation
    assert not hasattr(model.config, "lie_attention")
    assert not any(module._forward_pre_hooks for module in model.modules())
    close(logits(model, **case.inputs()), before, 0)


# --- decoding


def steps(model, case, ids, cuts, cache, **extra):
    """Logits of a text handed over in pieces."""
    found = []
    given = {k: v for k, v in case.inputs(len(ids)).items() if k != "input_ids" and not k.startswith("decoder")}
    if case.kind != "causal":
        encoder = model.get_encoder()
        source = given if case.kind == "speech" else {"input_ids": case.inputs(len(ids))["input_ids"]}
        extra["encoder_outputs"] = encoder(**source)
    name = "input_ids" if case.kind == "causal" else "decoder_input_ids"
    for piece in ids.split(cuts, 1):
        out = model(**{name: piece}, cache=cache, use_cache=True, **extra)
        found.append(out.logits)
    return torch.cat(found, 1)


def new_cache(model, case):
    cache = hf.DynamicCache(config=model.config)
    return cache if case.kind == "causal" else hf.EncoderDecoderCache(cache, hf.DynamicCache(config=model.config))


def whole(model, case, ids, **extra):
    return steps(model, case, ids, [ids.size(1)], None, **extra)


@torch.no_grad()
@pytest.mark.parametrize("case", DECODERS, ids=str)
def test_25_cached_decoding_is_recomputation(case):
    """PITFALLS 25: a step hands over one query and no earlier ones; prefill, chunks and steps equal one forward."""
    for clock in CLOCKS if case.name in ("llama", "gemma2", "t5") else CLOCKS[:2]:
        model, _ = converted(case, 0.8, clock=clock)
        ids = case.inputs(2, 12)["decoder_input_ids" if case.kind != "causal" else "input_ids"]
        expected = whole(model, case, ids)
        n = ids.size(1)
        for cuts in ([5, 3] + [1] * (n - 8), [1] * n):
            close(steps(model, case, ids, cuts, new_cache(model, case)), expected, 1e-4)


@pytest.mark.parametrize("case", DECODERS, ids=str)
def test_25_generate_is_exact(case):
    """Greedy and beam search with a cache and without one give the same tokens and the same scores."""
    model, _ = converted(case, 0.8)
    inputs = case.inputs(2, 6)
    inputs = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
    if case.kind == "causal":
        inputs["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    how = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_scores": True, "pad_token_id": 0}
    for beams in (1, 3):
        found = [model.generate(**inputs, **how, num_beams=beams, use_cache=cached) for cached in (True, False)]
        assert torch.equal(found[0].sequences, found[1].sequences), beams
        for a, b in zip(found[0].scores, found[1].scores, strict=True):
            shown = a > -1e8
            close(a[shown], b[b > -1e8], 1e-4)
        if beams > 1:
            close(found[0].sequences_scores, found[1].sequences_scores, 1e-4)
