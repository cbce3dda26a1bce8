"""Models of Hugging Face Transformers after a conversion: the same at time 0, a causal chain after, exact when decoded."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch

hf = pytest.importorskip("transformers")

import liegroup_attn.integrations.transformers as lie  # noqa: E402
from experiments.drop_in.hf_cases import BY_NAME, CASES, DECODERS, LLAMA  # noqa: E402
from liegroup_attn.errors import CacheError, ConversionError, GeneratorError, MaskError  # noqa: E402
from liegroup_attn.integrations.transformers.loading import flowing  # noqa: E402
from liegroup_attn.nn import LieFlow, convert_attention, restore_attention  # noqa: E402

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
            flow.time.copy_(time * torch.linspace(0.5, 1, flow.num_heads, dtype=flow.time.dtype))
            if flow.learn_rates:
                flow.rate_weight.copy_(0.3 * torch.randn(flow.rate_weight.shape, generator=draw))


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    apart = float((a.detach() - b.detach()).abs().max())
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
def test_23_padding_is_not_seen(case):
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
    before, implementation, keys = (
        logits(model, **case.inputs()),
        model.config._attn_implementation,
        set(model.state_dict()),
    )
    convert_attention(model, **case.options)
    assert set(model.state_dict()) != keys
    report = restore_attention(model)
    assert len(report.converted) == case.layers
    assert set(model.state_dict()) == keys
    for config in (module.config for module in model.modules() if hasattr(module, "config")):
        assert config._attn_implementation == implementation
        assert not hasattr(config, "lie_attention")
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
    how = {
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "pad_token_id": 0,
    }
    for beams in (1, 3):
        found = [model.generate(**inputs, **how, num_beams=beams, use_cache=cached) for cached in (True, False)]
        assert torch.equal(found[0].sequences, found[1].sequences), beams
        for a, b in zip(found[0].scores, found[1].scores, strict=True):
            shown = a > -1e8
            close(a[shown], b[b > -1e8], 1e-4)
        if beams > 1:
            close(found[0].sequences_scores, found[1].sequences_scores, 1e-4)


# --- caches


def llama(time=0.8, **options):
    return converted(BY_NAME["llama"], time, **options)[0]


def ids_of(batch=2, tokens=10, seed=1):
    return BY_NAME["llama"].inputs(batch, tokens, seed)["input_ids"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral window", "gemma2"])
def test_a_cropped_cache_goes_on_exactly(name):
    case = BY_NAME[name]
    model, _ = converted(case, 0.8)
    ids, other = ids_of(2, 9, 1), ids_of(2, 9, 5)
    cache = hf.DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(input_ids=ids[:, :6], cache=cache, use_cache=True)
    cache.crop(0)
    model(input_ids=other[:, 6:9], cache=cache, use_cache=True)
    assert all(layer.lie_past.shape[:3] == (2, 4, layer.keys.size(2)) for layer in cache.layers)
    cache.crop(-2)
    text = torch.cat([ids[:, :6], other[:, 6:7], ids[:, 7:9]], 1)
    found = [model(input_ids=ids[:, i : i + 1], cache=cache, use_cache=True).logits for i in (7, 8)]
    close(torch.cat(found, 1), model(input_ids=text, use_cache=False).logits[:, 7:], 1e-4)


@torch.no_grad()
def test_a_recorded_window_goes_back_several_steps():
    model, _ = converted(BY_NAME["mistral window"], 0.8)
    ids = ids_of(2, 9)
    cache = hf.DynamicCache(config=model.config)
    cache.activate_past_recording()
    for part in ids[:, :8].split([5, 1, 1, 1], 1):
        model(input_ids=part, cache=cache, use_cache=True)
    cache.crop(-3)
    text = torch.cat([ids[:, :5], ids[:, 8:]], 1)
    found = model(input_ids=ids[:, 8:], cache=cache, use_cache=True).logits
    close(found, model(input_ids=text, use_cache=False).logits[:, 5:], 1e-4)


@torch.no_grad()
def test_a_window_keeps_the_iterates_of_its_tokens():
    model, _ = converted(BY_NAME["mistral window"], 0.8)
    cache = hf.DynamicCache(config=model.config)
    for i in range(8):
        model(input_ids=ids_of(2, 8)[:, i : i + 1], cache=cache, use_cache=True)
        assert all(layer.lie_past.size(2) == layer.keys.size(2) == min(i + 1, 3) for layer in cache.layers)
    for _, module in flowing(model):  # a step of softmax attention: nothing goes on from what was kept before it
        module.lie.time_scale = 0.0
    model(input_ids=ids_of(2, 1), cache=cache, use_cache=True)
    for _, module in flowing(model):
        module.lie.time_scale = 1.0
    with pytest.raises(CacheError, match="got none"):
        model(input_ids=ids_of(2, 1), cache=cache, use_cache=True)


@torch.no_grad()
def test_a_cache_moves_with_its_sequences():
    model = llama()
    ids = ids_of(2, 8)
    cache = hf.DynamicCache(config=model.config)
    model(input_ids=ids[:, :7], cache=cache, use_cache=True)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 3]))
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    text = ids[[1, 0, 1]]
    found = model(input_ids=text[:, 7:], cache=copy.deepcopy(cache), use_cache=True).logits
    close(found, model(input_ids=text, use_cache=False).logits[:, 7:], 1e-4)
    cache.reset()
    assert all(layer.lie_past is None for layer in cache.layers)
    close(
        model(input_ids=text, cache=cache, use_cache=True).logits, model(input_ids=text, use_cache=False).logits, 1e-4
    )


@torch.no_grad()
def test_assisted_decoding_is_greedy_decoding():
    model, helper = llama(), llama(0.3)
    helper.generation_config.num_assistant_tokens = 3
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids = ids_of(1, 5)
    assert torch.equal(model.generate(ids, **how, assistant_model=helper), model.generate(ids, **how, use_cache=False))


@torch.no_grad()
def test_a_cache_filled_at_time_0_does_not_go_on_later():
    model = llama(0.0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    ids = ids_of()
    cache = hf.DynamicCache(config=model.config)
    model(input_ids=ids[:, :8], cache=cache, use_cache=True)
    softmax = model(input_ids=ids[:, 8:9], cache=cache, use_cache=True).logits
    close(softmax, model(input_ids=ids[:, :9], use_cache=False).logits[:, 8:], 1e-4)
    set_time(model, 0.8)
    with pytest.raises(CacheError, match="iterates of its 9 tokens"):
        model(input_ids=ids[:, 9:], cache=cache, use_cache=True)


@torch.no_grad()
def test_a_cache_does_not_go_on_with_other_settings():
    model = llama()
    ids = ids_of()
    cache = hf.DynamicCache(config=model.config)
    model(input_ids=ids[:, :8], cache=cache, use_cache=True)
    for _, module in flowing(model):
        module.lie.tol = 0.5e-3
    with pytest.raises(CacheError, match="settings"):
        model(input_ids=ids[:, 8:9], cache=cache, use_cache=True)
    for _, module in flowing(model):  # a stretch at time 0 in between leaves nothing to go on from
        module.lie.tol, module.lie.time_scale = 1e-3, 0.0
    model(input_ids=ids[:, 8:9], cache=cache, use_cache=True)


def test_caches_that_cannot_keep_iterates_are_refused():
    model = llama()
    ids = ids_of()
    with pytest.raises(CacheError, match="expected a DynamicCache"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static", pad_token_id=0)
    still = llama(0.0)
    plain = BY_NAME["llama"].build()
    how = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    assert torch.equal(still.generate(ids, **how), plain.generate(ids, **how))


def test_a_forward_that_trains_may_come_with_a_cache():
    """``config.use_cache`` is True by default: such a forward keeps nothing, and nothing goes on from it."""
    model = llama()
    ids = ids_of()
    cache = hf.DynamicCache(config=model.config)
    with_cache = model(input_ids=ids[:, :8], cache=cache, use_cache=True).logits
    close(with_cache.detach(), model(input_ids=ids[:, :8], use_cache=False).logits.detach())
    with_cache.sum().backward()
    with pytest.raises(CacheError, match="a gradient"):
        model(input_ids=ids[:, 8:9], cache=cache, use_cache=True)
    with torch.no_grad(), pytest.raises(CacheError, match="iterates"):
        model(input_ids=ids[:, 8:9], cache=cache, use_cache=True)


@torch.no_grad()
def test_padding_in_a_cached_prompt():
    model = llama()
    ids = ids_of(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    cache = hf.DynamicCache(config=model.config)
    found = [
        model(input_ids=ids[:, a:b], attention_mask=mask[:, :b], cache=cache, use_cache=True).logits
        for a, b in ((0, 5), (5, 7), (7, 8), (8, 9))
    ]
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found = torch.cat(found, 1)
    assert torch.isfinite(found).all()
    close(found[mask.bool()], expected[mask.bool()], 1e-4)


# --- masks


def test_05_an_open_window_is_refused():
    """PITFALLS 5: exp(tQ) fills a sliding window; refused by default, by name of the layer, opened by name."""
    case = BY_NAME["mistral window"]
    model, _ = converted(case, 0.8, allow_open_mask=False)
    short, long = case.inputs(2, 4), case.inputs(2, 7)
    with torch.no_grad():  # nothing is hidden yet
        close(steps(model, case, short["input_ids"], [3, 1], new_cache(model, case)), logits(model, **short), 1e-4)
    assert torch.isfinite(logits(model, **short)).all()
    for run in (logits, lambda m, **x: m(**x).logits):
        with pytest.raises(MaskError, match=r"layer 0.*exclude"):
            run(model, **long)
    with torch.no_grad(), pytest.raises(MaskError, match="exclude"):
        model.generate(short["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
    still, _ = converted(case, allow_open_mask=False)
    close(logits(still, **long), logits(case.build(), **long))
    with pytest.raises(MaskError, match="exclude"):
        still(**long)  # learning leads through it
    bert, _ = converted(BY_NAME["modernbert"], 0.8, allow_open_mask=False)
    with pytest.raises(MaskError, match="exclude"):
        bert(**case.inputs(2, 9))
    local, report = converted(BY_NAME["modernbert"], 0.8, allow_open_mask=False, exclude="model.layers.1.attn")
    assert report.kept == {"model.layers.1.attn": "in exclude"}
    assert torch.isfinite(local(**case.inputs(2, 9)).logits).all()


def test_05_a_mask_of_ones_own_is_looked_at_and_nothing_is_kept_of_it(monkeypatch):
    model = llama()
    ids = ids_of(2, 6)
    looked = []
    from liegroup_attn.integrations.transformers import masks

    plain = masks.check_closed
    monkeypatch.setattr(masks, "check_closed", lambda mask: (looked.append(1), plain(mask)))
    model(input_ids=ids, attention_mask=torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]))
    assert not looked  # known by its making
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(2, -1)
    both = logits(model, input_ids=ids, position_ids=packed, use_cache=False)
    close(both[:, 3:], logits(model, input_ids=ids[:, 3:]), 2e-5)
    assert not looked
    blocks = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool().tril()[None, None]
    own = logits(model, input_ids=ids, position_ids=packed, attention_mask=blocks, use_cache=False)
    close(own, both, 2e-5)
    assert len(looked) == model.config.num_hidden_layers
    blocks[..., 2:5, :] = torch.ones(6, 6).tril().triu(-1).bool()[2:5]  # in place, into one that leaks
    with pytest.raises(MaskError, match="closed"):
        model(input_ids=ids, position_ids=packed, attention_mask=blocks, use_cache=False)
    window = torch.ones(6, 6).tril().triu(-1).bool()[None, None]
    with pytest.raises(MaskError, match="closed"):
        model(input_ids=ids, attention_mask=window, use_cache=False)


# --- weights, checkpointing, precision


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_attentions_is_the_mixing_matrix(case):
    model, _ = converted(case, 0.8)
    for time in (0.8, 0.0):
        set_time(model, time)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                out = model(**case.inputs(), output_attentions=True)
            close(out.logits.detach(), logits(model, **case.inputs()), 2e-5)
            found = out.attentions if case.kind in ("causal", "masked", "image") else out.decoder_attentions
            assert len(found) == 2
            for weights in found:
                assert weights.shape[:2] == (2, 4)
                close(weights.sum(-1).detach(), torch.ones(weights.shape[:3]))
                assert (weights >= -1e-6).all()
    plain, _ = converted(case)
    with torch.no_grad():
        reach = [model(**case.inputs(), output_attentions=True) for model in (plain, converted(case, 0.8)[0])]
    first = [out.attentions if hasattr(out, "attentions") else out.decoder_attentions for out in reach]
    assert float((first[0][0] - first[1][0]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gemma2"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name, reentrant):
    case = BY_NAME[name]
    for time in (0.0, 0.8):
        grads = []
        for checkpointing in (False, True):
            model, _ = converted(case, time)
            model.train()
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model(**case.inputs()).logits.square().mean().backward()
            grads.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys()
        for key, grad in grads[0].items():
            close(grads[1][key], grad, 1e-5)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_half_precision(name, tmp_path):
    case = BY_NAME[name]
    plain = case.build().to(torch.bfloat16)
    before = logits(plain, **case.inputs())
    convert_attention(plain)
    close(logits(plain, **case.inputs()), before, 0)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    model, _ = converted(case, 0.8)
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16}
    found = logits(back, **case.inputs())
    assert found.dtype == torch.bfloat16
    expected = logits(model, **case.inputs())
    assert float((found.float() - expected).abs().mean()) < 0.05 * float(expected.abs().mean()) + 0.02
    if case.kind == "causal":
        out = back.generate(case.inputs()["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert out.shape == (2, 10)


# --- loading


def test_heads_and_base_models_read_each_other(tmp_path):
    for name, base, path in (
        ("llama", hf.LlamaModel, "model"),
        ("bert", hf.BertModel, "bert"),
        ("gpt2", hf.GPT2Model, "transformer"),
    ):
        case = BY_NAME[name]
        model, _ = converted(case, 0.8)
        model.save_pretrained(tmp_path / name)
        part = base.from_pretrained(tmp_path / name).eval()
        assert len(list(flowing(part))) == 2
        with torch.no_grad():
            close(part(**case.inputs()).last_hidden_state, getattr(model, path)(**case.inputs()).last_hidden_state)
        part.save_pretrained(tmp_path / f"{name} base")
        whole_model, info = type(model).from_pretrained(tmp_path / f"{name} base", output_loading_info=True)
        assert not any("lie" in key for key in info["missing_keys"])
        found = getattr(whole_model.eval(), path)(**case.inputs()).last_hidden_state.detach()
        close(found, part(**case.inputs()).last_hidden_state.detach())


def test_a_plain_process_reads_it_after_register(tmp_path):
    """Importing registers, the library alone does not import it; registering twice is registering once; without transformers it says what to install."""
    model = llama()
    model.save_pretrained(tmp_path / "model")
    torch.save((ids_of(), logits(model, input_ids=ids_of())), tmp_path / "expected.pt")
    code = f"""
import sys
sys.modules["transformers"] = None
try:
    import liegroup_attn.integrations.transformers
except ImportError as error:
    assert 'pip install "liegroup-attn[transformers]"' in str(error)
else:
    raise SystemExit(1)
del sys.modules["transformers"]
import torch
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM, PreTrainedModel
plain = PreTrainedModel.post_init
import liegroup_attn, liegroup_attn.nn
assert "lie" not in AttentionInterface().valid_keys() and PreTrainedModel.post_init is plain
import liegroup_attn.integrations.transformers as t
assert "lie" in AttentionInterface().valid_keys() and PreTrainedModel.post_init is not plain
once = PreTrainedModel.post_init, PreTrainedModel.from_pretrained.__func__
t.register()
assert once == (PreTrainedModel.post_init, PreTrainedModel.from_pretrained.__func__)
ids, expected = torch.load({str(tmp_path / "expected.pt")!r})
path = {str(tmp_path / "model")!r}
model = AutoModelForCausalLM.from_pretrained(path).eval()
assert model.config._attn_implementation == "lie"
assert (model(ids).logits - expected).abs().max() < 1e-5
assert AutoModel.from_pretrained(path).layers[0].self_attn.lie.time.max() > 0.7
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_pickled_model_works_in_a_new_process(tmp_path):
    """Nothing but unpickling imports the integration there."""
    model = llama()
    torch.save((model, ids_of(), logits(model, input_ids=ids_of())), tmp_path / "all.pt")
    code = f"""
import sys, torch
import liegroup_attn
assert "transformers" not in sys.modules
model, ids, expected = torch.load({str(tmp_path / "all.pt")!r}, weights_only=False)
assert (model(ids).logits - expected).abs().max() < 1e-5
assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 12)
from liegroup_attn.nn import restore_attention
assert len(restore_attention(model).converted) == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_weights_start_at_softmax(tmp_path, dtype):
    """A configuration with flows and a checkpoint without: time 0 and the rates of the options, not whatever was in memory."""
    for name in ("llama", "t5", "bert"):
        case = BY_NAME[name]
        plain = case.build()
        expected = logits(plain, **case.inputs())
        model, _ = converted(case, rate=0.25, max_time=2.0)
        model.config.save_pretrained(tmp_path / name)
        plain.save_pretrained(tmp_path / f"{name} plain")
        config = hf.AutoConfig.from_pretrained(tmp_path / name)
        found = type(plain).from_pretrained(tmp_path / f"{name} plain", config=config, dtype=dtype).eval()
        assert len(list(flowing(found))) == case.layers
        for _, module in flowing(found):
            assert (module.lie.time == 0).all()
            assert (module.lie.rate_weight == 0).all()
            close(module.lie.rate_bias.float().sigmoid(), torch.full((4,), 0.25), 1e-2)
            assert module.lie.max_time == 2.0
        if dtype == torch.float32:
            close(logits(found, **case.inputs()), expected)


def test_models_of_several_parts(tmp_path):
    """Each part's configuration says what is in it, so that a part can be loaded alone."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**size, "vocab_size": 64, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = hf.CLIPModel(
        hf.CLIPConfig(text_config=text, vision_config={**size, "image_size": 16, "patch_size": 4}, projection_dim=16)
    ).eval()
    with pytest.raises(ConversionError, match="example_inputs"):
        convert_attention(model)
    assert model.config._attn_implementation == "sdpa"
    inputs = {"input_ids": ids_of(2, 6), "pixel_values": BY_NAME["vit"].inputs()["pixel_values"]}
    assert len(convert_attention(model, example_inputs=inputs).converted) == 4
    set_time(model, 0.8)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**inputs)
        close(hf.CLIPModel.from_pretrained(tmp_path).eval()(**inputs).logits_per_image, expected.logits_per_image)
        part = hf.CLIPTextModel.from_pretrained(tmp_path).eval()
        assert len(list(flowing(part))) == 2
        found = part(input_ids=inputs["input_ids"]).last_hidden_state
        close(found, expected.text_model_output.last_hidden_state)
    restore_attention(model)
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    assert all(config._attn_implementation == "sdpa" and not hasattr(config, "lie_attention") for config in configs)


def test_values_narrower_than_queries():
    """Latent attention: keys and values of other widths, one of which is all that is cached."""
    sizes = {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6,
        "n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2,
        "moe_intermediate_size": 16, "n_shared_experts": 1, "num_key_value_heads": 4, "head_dim": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    model = hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**{**LLAMA, **sizes})).eval()
    ids = ids_of(2, 8)
    before = logits(model, input_ids=ids)
    convert_attention(model)
    close(logits(model, input_ids=ids), before)
    set_time(model, 0.8)
    with torch.no_grad():
        cache = hf.DynamicCache(config=model.config)
        found = [model(input_ids=part, cache=cache, use_cache=True).logits for part in ids.split([5, 1, 1, 1], 1)]
    close(torch.cat(found, 1), logits(model, input_ids=ids, use_cache=False), 1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_it_compiles_in_one_graph(name):
    model, _ = converted(BY_NAME[name], 0.8)
    inputs = {**BY_NAME[name].inputs(), **({} if name == "bert" else {"use_cache": False})}
    torch._dynamo.reset()
    found = torch.compile(model, backend="eager", fullgraph=True)(**inputs).logits
    close(found.detach(), logits(model, **inputs), 2e-5)


def test_flows_that_fit_nowhere_are_told(tmp_path):
    model = llama()
    model.config.lie_attention["flows"][0]["layers"] = {"somewhere.else": [4, 8]}
    model.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=r"somewhere\.else"):
        hf.LlamaForCausalLM.from_pretrained(tmp_path)
    seq2seq, _ = converted(BY_NAME["t5"], 0.8)
    seq2seq.save_pretrained(tmp_path / "t5")
    with pytest.warns(UserWarning, match="2 of 4 converted layers"):
        encoder = hf.T5EncoderModel.from_pretrained(tmp_path / "t5")
    assert len(list(flowing(encoder))) == 2


def test_17_the_configuration_is_plain(tmp_path):
    """PITFALLS 17: names and numbers only, in config.json."""
    import json

    from liegroup_attn import ErlangClock

    model = llama(0.0, clock=ErlangClock(3), learn_rates=False)
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["lie_attention"]
    assert said["flows"][0]["options"] == {"clock": "ErlangClock(3)", "learn_rates": False}
    assert said["flows"][0]["layers"] == {f"model.layers.{i}.self_attn": [4, 8] for i in (0, 1)}


# --- what converts, and what does not


def test_24_models_that_do_not_call_are_refused():
    """PITFALLS 24: bloom and deberta take the name and go on with their own attention. They stay as they were."""
    small = {"vocab_size": 64, "hidden_size": 32}
    models = (
        hf.BloomForCausalLM(hf.BloomConfig(**small, n_layer=2, n_head=4)),
        hf.DebertaForMaskedLM(
            hf.DebertaConfig(**small, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
        ),
        hf.DebertaV2ForMaskedLM(
            hf.DebertaV2Config(**small, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
        ),
    )
    for model in models:
        model.eval()
        config, implementation = model.config, model.config._attn_implementation
        ids = ids_of()
        expected, keys = logits(model, input_ids=ids), set(model.state_dict())
        with pytest.raises(ConversionError, match=type(model).__name__):
            convert_attention(model)
        assert model.config is config
        assert config._attn_implementation == implementation
        assert not hasattr(config, "lie_attention")
        assert set(model.state_dict()) == keys
        close(logits(model, input_ids=ids), expected, 0)


def test_24_models_that_share_a_configuration_stay_apart():
    config = hf.LlamaConfig(**LLAMA)
    first, second = hf.LlamaForCausalLM(config), hf.LlamaForCausalLM(config)
    convert_attention(first)
    assert second.config is config
    assert config._attn_implementation == "sdpa"
    assert not hasattr(config, "lie_attention")
    assert first.config._attn_implementation == "lie"
    assert len({id(m.config) for m in first.modules() if hasattr(m, "config")}) == 1
    t5, _ = converted(BY_NAME["t5"])
    assert t5.encoder.config is not t5.decoder.config
    assert {m.config._attn_implementation for m in t5.modules() if hasattr(m, "config")} == {"lie"}


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gpt2", "vit", "whisper"])
def test_24_a_model_made_from_a_converted_models_configuration_stays_apart(name):
    """It has flows at time 0 and a configuration of its own, which its parts share as in any other model."""
    case = BY_NAME[name]
    model, _ = converted(case, 0.8)
    said, expected = copy.deepcopy(model.config.lie_attention), logits(model, **case.inputs())
    made = type(model)(model.config).eval()
    held = [module.config for module in made.modules() if hasattr(module, "config")]
    assert not {id(config) for config in held} & {id(m.config) for m in model.modules() if hasattr(m, "config")}
    assert len({id(config) for config in held}) == len({id(m.config) for m in model.modules() if hasattr(m, "config")})
    assert {config._attn_implementation for config in held} == {"lie"}
    assert len(list(flowing(made))) == case.layers
    restore_attention(made)
    logits(made, **case.inputs())
    assert model.config._attn_implementation == "lie"
    assert model.config.lie_attention == said
    close(logits(model, **case.inputs()), expected, 0)


def test_24_configurations_that_are_shared_all_the_same():
    """Restoring writes into a configuration of the model's own."""
    model = llama()
    ids, other = ids_of(), BY_NAME["llama"].build()
    expected = logits(model, input_ids=ids)
    convert_attention(other)
    for module in other.modules():
        if hasattr(module, "config"):
            module.config = model.config
    restore_attention(other)
    assert model.config._attn_implementation == "lie"
    close(logits(model, input_ids=ids), expected, 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_24_another_implementation_while_time_may_pass_is_refused(case):
    """PITFALLS 24: set_attn_implementation after the conversion would leave softmax attention, and no word of it."""
    model, _ = converted(case, 0.8)
    expected = logits(model, **case.inputs())
    model.set_attn_implementation("eager")
    with pytest.raises(
        ConversionError, match=r"\"lie\".*'eager'.*set_attn_implementation\(\"lie\"\).*restore_attention"
    ):
        logits(model, **case.inputs())
    assert not any("_lie_call" in vars(module) for module in model.modules())
    model.set_attn_implementation("lie")
    close(logits(model, **case.inputs()), expected, 0)
    model.set_attn_implementation("eager")
    set_time(model, 0.0)
    close(logits(model, **case.inputs()), logits(case.build(), **case.inputs()))  # softmax is what is meant
    with pytest.raises(ConversionError, match="restore_attention"):
        model(**case.inputs())  # time would not learn
    restore_attention(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model(**case.inputs())


def test_the_calls_are_counted(monkeypatch):
    """A layer that does not call is named, and all is undone."""
    case = BY_NAME["llama"]
    model = case.build()
    second = model.model.layers[1].self_attn

    def silent(self, hidden_states, **kwargs):
        return self.o_proj(hidden_states), None

    monkeypatch.setattr(second, "forward", silent.__get__(second))
    with pytest.raises(ConversionError, match=r"model\.layers\.1\.self_attn"):
        convert_attention(model)
    assert model.config._attn_implementation == "sdpa"
    report = convert_attention(model, exclude="model.layers.1.self_attn")
    assert report.converted == ["model.layers.0.self_attn"]


def test_an_attention_that_means_something_else_is_refused(monkeypatch):
    """Calls are made, but what is handed over is not what ``sdpa`` was."""
    model = BY_NAME["bert"].build()
    plain = type(model).forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda **x: plain(
            model, **{**x, "token_type_ids": (x["input_ids"] > 9).long() * (model.config._attn_implementation == "lie")}
        ),
    )
    with pytest.raises(ConversionError, match="outputs of before"):
        convert_attention(model, example_inputs=BY_NAME["bert"].inputs())


def test_converting_leaves_modes_and_random_states_alone():
    model = BY_NAME["gpt2"].build(resid_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()
    state = torch.get_rng_state()
    convert_attention(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.transformer.h[0].training
    assert model.transformer.h[1].attn.lie.training
    assert not model.transformer.h[0].attn.lie.training


def test_include_exclude_and_a_second_call():
    model = BY_NAME["llama"].build()
    report = convert_attention(model, include="model.layers.0.self_attn", max_time=2.0)
    assert report.converted == ["model.layers.0.self_attn"]
    assert report.kept == {"model.layers.1.self_attn": "not in include"}
    report = convert_attention(model, max_time=3.0)
    assert {layer.name[-11]: layer.outcome for layer in report.layers} == {"0": "already converted", "1": "converted"}
    assert [module.lie.max_time for _, module in flowing(model)] == [2.0, 3.0]
    assert len(model.config.lie_attention["flows"]) == 2


def test_a_failed_second_conversion_leaves_the_first_one_alone():
    """Only what the failed call converted is taken out again, of the modules and of the configurations."""
    task = torch.nn.ModuleDict({"net": BY_NAME["t5"].build(), "unused": torch.nn.MultiheadAttention(16, 2)})
    net = task["net"]
    task.forward = lambda **inputs: net(**inputs)
    convert_attention(task, include="net.encoder.block.0.*", max_time=2.0)
    set_time(net, 0.8)
    inputs = BY_NAME["t5"].inputs()
    expected, said = logits(net, **inputs), copy.deepcopy(net.config.lie_attention)
    part = copy.deepcopy(net.encoder.config.lie_attention)
    with pytest.raises(ConversionError, match="unused"):
        convert_attention(task, example_inputs=inputs)
    assert [path for path, _ in flowing(net)] == ["encoder.block.0.layer.0.SelfAttention"]
    assert net.config.lie_attention == said
    assert net.encoder.config.lie_attention == part
    assert not hasattr(net.decoder.config, "lie_attention")
    assert net.config._attn_implementation == "lie"
    close(logits(net, **inputs), expected, 0)
    restore_attention(task)
    assert net.config._attn_implementation == "sdpa"
    assert not any(hasattr(m.config, "lie_attention") for m in net.modules() if hasattr(m, "config"))


def test_a_model_inside_another_module():
    class Task(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = BY_NAME["bert"].build()
            self.own = torch.nn.MultiheadAttention(16, 2)

        def forward(self, x, ids):
            return self.own(x, x, x)[0], self.net(input_ids=ids).logits

    task, x = Task(), torch.randn(3, 5, 16)
    report = convert_attention(task, exclude="net.bert.encoder.layer.1.*", example_inputs=(x, ids_of()))
    assert report.converted == ["net.bert.encoder.layer.0.attention.self", "own"]
    assert set(restore_attention(task).converted) == set(report.converted)


def test_torchs_attention_inside_is_kept():
    """SigLIP's pooling head holds a torch.nn.MultiheadAttention, which never calls the attention function."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**sizes, image_size=16, patch_size=4)).eval()
    inputs = {"pixel_values": BY_NAME["vit"].inputs()["pixel_values"]}
    with torch.no_grad():
        before = model(**inputs).pooler_output
    report = convert_attention(model)
    ((path, reason),) = report.kept.items()
    assert path.endswith("head.attention")
    assert reason == "torch.nn.MultiheadAttention inside a Transformers model: convert it by hand"
    assert len(report.converted) == 2
    with torch.no_grad():
        close(model(**inputs).pooler_output, before)
    set_time(model, 0.8)
    with torch.no_grad():
        assert float((model(**inputs).pooler_output - before).abs().max()) > 1e-4
    convert_attention(model.get_submodule(path))
    outcomes = {layer.name: layer.outcome for layer in convert_attention(model).layers}
    assert set(outcomes.values()) == {"already converted"}
    assert len(outcomes) == 3


def test_attention_sinks_stay_softmax():
    torch.manual_seed(0)
    model = hf.GptOssForCausalLM(
        hf.GptOssConfig(**{**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 32})
    )
    with pytest.raises(ConversionError, match="s_aux"):
        convert_attention(model.eval())
    assert model.config._attn_implementation != "lie"
    flow = LieFlow(4, 8, time=0.5)
    module = torch.nn.Module()
    module.lie = flow
    q = torch.zeros(1, 4, 3, 8)
    with pytest.raises(GeneratorError, match="s_aux"):
        lie.lie_attention_forward(module, q, q, q, None, s_aux=torch.zeros(4))


def test_a_converted_model_can_be_copied():
    model = llama()
    twin = copy.deepcopy(model)
    ids = ids_of()
    close(logits(twin, input_ids=ids), logits(model, input_ids=ids), 0)
    set_time(model, 0.0)
    assert float((logits(twin, input_ids=ids) - logits(model, input_ids=ids)).abs().max()) > 1e-3
    assert len(restore_attention(twin).converted) == 2
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in twin.modules())


def test_output_attentions_in_the_configuration_is_refused():
    model = BY_NAME["bert"].build(attn_implementation="eager", output_attentions=True)
    with pytest.raises(ConversionError, match="each call"):
        convert_attention(model)


def test_learning_moves_time_away_from_0():
    torch.manual_seed(0)
    model, _ = converted(BY_NAME["gpt2"])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    ids = ids_of(8, 12)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(8):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert any((module.lie.time > 0).any() for _, module in flowing(model))
