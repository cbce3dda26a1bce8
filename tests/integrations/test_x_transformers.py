"""x-transformers: converted models against the plain ones, what is kept and why, what is refused."""

import copy

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

from experiments.drop_in.guest_cases import TOKENS, VOCABULARY, X_CASES, flows, moving, tokens, x_transformer

pytest.importorskip("x_transformers", reason="x-transformers is not installed")

from x_transformers import AutoregressiveWrapper, XTransformer
from x_transformers.x_transformers import Attention, AttentionPool

from liegroup_attn.errors import CacheError, ConversionError, GeneratorError, MaskError, ShapeError
from liegroup_attn.integrations.x_transformers import LieXAttention
from liegroup_attn.nn import convert_attention, restore_attention

each = pytest.mark.parametrize("case", X_CASES, ids=str)
CASES = {case.name: case for case in X_CASES}


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
    check_restored(case, Attention)


@each
def test_report(case):
    check_report(case, Attention)


@each
def test_no_padding_leak(case):
    """Padding on the right changes nothing, whatever it holds."""
    model, x = case.converted(0.7), tokens()
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[:, -3:] = False
    other = torch.where(mask, x, (x + 1) % VOCABULARY)
    with torch.no_grad():
        short = model(x[:, :-3])
        for padded in (x, other):
            torch.testing.assert_close(model(padded, mask=mask)[:, :-3], short)


@each
def test_attention_maps(case):
    """At time 0 x-transformers' own, later the rows of what mixes values; with flash none, as there."""
    plain, lie = case.model().double(), case.converted()
    with torch.no_grad():
        _, wanted = plain(tokens(), return_attn=True)
        _, got = lie(tokens(), return_attn=True)
        if wanted[0] is None:
            assert got == wanted
            return
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)  # theirs is a float32 softmax
        _, intermediates = plain(tokens(), return_intermediates=True)
        _, seen = lie(tokens(), return_intermediates=True)
        for one, other in zip(seen.attn_intermediates, intermediates.attn_intermediates, strict=True):
            torch.testing.assert_close(one.to_tuple(), other.to_tuple(), atol=1e-6, rtol=1e-6)
        _, moved = moving(lie)(tokens(), return_attn=True)
    for one, other in zip(moved, wanted, strict=True):
        torch.testing.assert_close(one.sum(-1), torch.ones_like(one[..., 0]))
        assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("clamp", [False, True])
def test_golden(flash, causal, clamp):
    """Grouped heads, a mask, a bias, clamped scores: S exp(tQ) V by SciPy."""
    if clamp and flash:
        pytest.skip("x-transformers clamps without flash only")
    attention = Attention(
        16, 8, heads=4, kv_heads=2, causal=causal, flash=flash, softclamp_logits=clamp, logit_softclamp_value=0.7
    ).double()
    convert_attention(attention, tol=1e-12)
    moving(attention)
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, h, 7, 8, dtype=torch.float64) for h in (4, 2, 2))
    bias = torch.randn(4, 7, 7, dtype=torch.float64)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 5:] = False
    out, _ = attention.attend(q, k, v, mask=mask[:, None, None], attn_bias=bias)
    keys, values = (torch.stack([x[:, h % 2] for h in range(4)], 1) for x in (k, v))
    scores = q @ keys.mT / 8**0.5 + bias
    scores = (scores / 0.7).tanh() * 0.7 if clamp else scores
    hidden = ~mask[:, None, None] | (torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else False)
    wanted = golden(attention.lie, scores.masked_fill(hidden, -torch.inf), values)
    torch.testing.assert_close(out.detach(), wanted, atol=1e-9, rtol=1e-9)


def test_grouped_heads_are_read_in_their_order():
    """Head h reads key head h mod H_kv; the other order is another function."""
    attention = Attention(16, 8, heads=4, kv_heads=2).double()
    convert_attention(attention)
    moving(attention)
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, h, 5, 8, dtype=torch.float64) for h in (4, 2, 2))
    out, _ = attention.attend(q, k, v)
    right, _ = attention.attend(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))
    wrong, _ = attention.attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    torch.testing.assert_close(out, right)
    assert not torch.allclose(out, wrong)


KEPT = {
    "inverted_attention": (dict(inverted_attention=True), "queries"),
    "pre_talking_heads": (dict(pre_talking_heads=True), "other heads"),
    "post_talking_heads": (dict(post_talking_heads=True), "sum to 1"),
    "pre_scale_post_talking_heads": (dict(pre_scale_post_talking_heads=True), "sum to 1"),
    "selective": (dict(selective=True, causal=True), "tokens between"),
    "cog_signed": (dict(cog_signed=True), "negative"),
    "l2_distance": (dict(l2_distance=True), "products"),
    "add_zero_kv": (dict(add_zero_kv=True), "not square"),
    "head_learned_sink": (dict(head_learned_sink=True), "sum to 1"),
    "use_cope": (dict(use_cope=True, causal=True), "all of its scores"),
    "num_mem_kv": (dict(num_mem_kv=2), "not square"),
    "attn_fn: sigmoid": (dict(sigmoid=True), "not a softmax"),
    "attn_fn: one_hot_straight_through": (dict(hard=True), "not a softmax"),
    "attn_fn: sparse_topk_attn": (dict(sparse_topk=2), "not a softmax"),
    "attn_fn: gumbel_softmax": (dict(gumbel_softmax=True), "not a softmax"),
    "attn_fn: relu": (dict(custom_attn_fn=torch.relu), "not a softmax"),
}


@pytest.mark.parametrize("name", KEPT)
def test_other_than_softmax_is_kept(name):
    options, why = KEPT[name]
    model = torch.nn.ModuleList([Attention(16, 8, heads=4), Attention(16, 8, heads=4, **options)])
    report = convert_attention(model)
    assert report.converted == ["0"]
    assert name in report.kept["1"]
    assert why in report.kept["1"]
    assert type(model[1]) is Attention


def test_every_switch_of_attend_is_known():
    """A setting that x-transformers gains is looked at by a person before it is trusted."""
    import inspect

    from x_transformers.attend import Attend

    known = set(
        [
            "self",
            "dropout",
            "causal",
            "heads",
            "pre_talking_heads",
            "post_talking_heads",
            "pre_scale_post_talking_heads",
            "sparse_topk",
            "sparse_topk_straight_through",
            "scale",
            "qk_norm",
            "l2_distance",
            "sigmoid",
            "gumbel_softmax",
            "gumbel_softmax_temp",
            "gumbel_softmax_hard",
            "cog_signed",
            "custom_attn_fn",
            "flash",
            "softclamp_logits",
            "logit_softclamp_value",
            "add_zero_kv",
            "head_learned_sink",
            "selective",
            "hard",
            "cope",
            "onnxable",
            "inverted_attention",
            "sdp_kwargs",
            "flash_pack_seq",
        ]
    )
    assert set(inspect.signature(Attend.__init__).parameters) <= known


def test_cross_attention_is_kept_where_it_stands():
    shifted = x_transformer(cross_attend=True, shift_tokens=1)  # wraps its layers
    assert all("layers.1." in name or "layers.4." in name for name in convert_attention(shifted).kept)
    assert len(flows(shifted)) == 2
    model = XTransformer(
        dim=16,
        enc_num_tokens=VOCABULARY,
        enc_depth=1,
        enc_heads=2,
        enc_max_seq_len=16,
        dec_num_tokens=VOCABULARY,
        dec_depth=1,
        dec_heads=2,
        dec_max_seq_len=16,
    ).double()
    report = convert_attention(model)
    assert report.converted == ["encoder.attn_layers.layers.0.1", "decoder.net.attn_layers.layers.0.1"]
    assert list(report.kept) == ["decoder.net.attn_layers.layers.1.1"]
    assert all("cross-attention" in why for why in report.kept.values())
    moving(model)
    assert model(tokens(), tokens()).isfinite()  # of equal lengths
    for alone in (AttentionPool(16, heads=2), Attention(16, 8, dim_context=12, heads=2)):
        with pytest.raises(ConversionError, match="cross-attention"):
            convert_attention(alone)


def test_an_unknown_cross_attention_is_not_taken_for_self_attention():
    """Of the same length: softmax while time is 0, refused after."""
    torch.manual_seed(0)
    attention = Attention(16, 8, heads=2).double()
    x, context = torch.randn(2, 2, 5, 16, dtype=torch.float64)
    wanted = attention(x, context).detach()
    convert_attention(attention)
    torch.testing.assert_close(attention(x, context).detach(), wanted)
    torch.testing.assert_close(attention(x, x), attention(x))
    moving(attention)
    with pytest.raises(ShapeError, match="context: expected None"):
        attention(x, context)
    assert attention(x).isfinite().all()  # the next call is its own again


def test_attn_delta_is_refused():
    attention = Attention(16, 8, heads=2).double()
    convert_attention(attention)
    moving(attention)
    with pytest.raises(GeneratorError, match="attn_delta"):
        attention(torch.randn(1, 5, 16, dtype=torch.float64), attn_delta=torch.zeros(1, 2, 5, 5))


def test_open_masks_are_refused():
    model = x_transformer(attn_max_attend_past=3)
    convert_attention(model)
    with pytest.raises(MaskError, match="allow_open_mask=True"):
        model(tokens())
    bias = torch.full((TOKENS, TOKENS), -torch.inf).triu(1) + torch.full((TOKENS, TOKENS), -torch.inf).tril(-2)
    attention = Attention(16, 8, heads=2)
    convert_attention(attention)
    with pytest.raises(MaskError, match="transitively closed"):
        attention(torch.randn(1, TOKENS, 16), attn_bias=torch.nan_to_num(bias, nan=-torch.inf))


def test_row_without_a_target_keeps_its_value():
    attention = Attention(16, 8, heads=2).double()
    convert_attention(attention)
    moving(attention)
    q = k = v = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    mask[:, 2] = False
    out, _ = attention.attend(q, k, v, mask=mask[None, None])
    torch.testing.assert_close(out[:, :, 2], v[:, :, 2])


@pytest.mark.parametrize("name", ["Decoder-grouped", "Decoder-alibi", "Decoder-clamped", "Decoder-residual"])
def test_generation(name):
    """Without a cache it recomputes; with one it is refused, unless time is 0."""
    model = CASES[name].converted()
    wrapped = AutoregressiveWrapper(model)
    prompt = tokens(length=4)
    plain = AutoregressiveWrapper(CASES[name].model().double())
    wanted = plain.generate(prompt, 5, temperature=0.0, cache_kv=False)
    for cache_kv in (False, True):
        assert torch.equal(wrapped.generate(prompt, 5, temperature=0.0, cache_kv=cache_kv), wanted)
    moving(model)
    x = prompt
    with torch.no_grad():
        for _ in range(5):
            x = torch.cat([x, model(x)[:, -1:].argmax(-1)], 1)
    assert torch.equal(wrapped.generate(prompt, 5, temperature=0.0, cache_kv=False), x[:, 4:])
    with pytest.raises(CacheError, match="cache_kv=False"):
        wrapped.generate(prompt, 5, temperature=0.0)


def test_memories_are_refused():
    model = CASES["Decoder-plain"].converted(0.7)
    mems = [torch.randn(2, 3, 16, dtype=torch.float64) for _ in flows(model)]
    with pytest.raises(CacheError, match="mems"):
        model.attn_layers(torch.randn(2, 5, 16, dtype=torch.float64), mems=mems)


def test_dropout_drops_in_training_only():
    attention = Attention(16, 8, heads=2, dropout=0.5).double()
    convert_attention(attention)
    moving(attention)
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    assert not torch.equal(attention.train()(x), attention(x))
    assert torch.equal(attention.eval()(x), attention(x))


def test_half_precision_and_subclasses():
    model = x_transformer(alibi_pos_bias=True).bfloat16()
    convert_attention(model)
    assert {p.dtype for flow in flows(model) for p in flow.parameters()} == {torch.bfloat16}
    assert moving(model)(tokens()).isfinite().all()

    class Other(Attention):
        pass

    both = torch.nn.ModuleList([Attention(16, 8, heads=2), Other(16, 8, heads=2)])
    report = convert_attention(both)
    assert "subclass" in report.kept["1"]
    assert type(copy.deepcopy(both)[0]) is LieXAttention
    restore_attention(both)
    assert type(both[0]) is Attention
