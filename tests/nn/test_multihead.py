"""LieMultiheadAttention: torch's contract at time 0, the true mixing matrix after, and no way around it (pitfalls 9, 10)."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import module_db

from liegroup_attn import DenseGenerator, ExponentialClock, transition_matrix
from liegroup_attn.errors import DtypeError, MaskError, NestedTensorError, ShapeError
from liegroup_attn.nn import LieFlow, LieMultiheadAttention, convert_attention

B, N, C, H = 3, 7, 16, 4
INFO = next(info for info in module_db if info.module_cls is nn.MultiheadAttention)


def pair(**options) -> tuple[nn.MultiheadAttention, LieMultiheadAttention]:
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(C, H, **options)
    ours = LieMultiheadAttention(C, H, **options)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    return theirs, ours


def moved(module: nn.Module, time: float = 0.8) -> nn.Module:
    """Every flow inside away from its start."""
    torch.manual_seed(2)
    for flow in module.modules():
        if isinstance(flow, LieFlow):
            with torch.no_grad():
                flow.time.copy_(time * torch.linspace(0.5, 1.2, flow.num_heads))
                flow.rate_weight.normal_()
    return module


def padding(batch: int = B) -> torch.Tensor:
    """True = ignored, as torch has it: the last two of the second item."""
    mask = torch.zeros(batch, N, dtype=torch.bool)
    mask[1, -2:] = True
    return mask


def causal(kind: str = "float") -> torch.Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(N)
    return mask if kind == "float" else mask < 0


MASKS = {
    "none": {},
    "padding": {"key_padding_mask": padding()},
    "float padding": {"key_padding_mask": torch.zeros(B, N).masked_fill(padding(), -torch.inf)},
    "causal": {"attn_mask": causal("bool")},
    "float causal": {"attn_mask": causal()},
    "causal hint": {"attn_mask": causal(), "is_causal": True},
    "causal hint, padding": {"attn_mask": causal("bool"), "is_causal": True, "key_padding_mask": padding()},
    "both": {"attn_mask": causal("bool"), "key_padding_mask": padding()},
    "float both": {"attn_mask": causal(), "key_padding_mask": torch.zeros(B, N).masked_fill(padding(), -torch.inf)},
    "bias": {"attn_mask": torch.randn(N, N, generator=torch.Generator().manual_seed(0))},
    "one a head": {"attn_mask": causal().expand(B * H, N, N)},
}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@masks
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_time_0_is_torchs_module(mask, batch_first, average):
    theirs, ours = pair(batch_first=batch_first)
    x = torch.randn(B, N, C) if batch_first else torch.randn(N, B, C)
    for training, grad, need in itertools.product([True, False], [True, False], [True, False]):
        theirs.train(training)
        ours.train(training)
        with torch.set_grad_enabled(grad):
            options = {"need_weights": need, "average_attn_weights": average, **mask}
            expected, expected_weights = theirs(x, x, x, **options)
            found, weights = ours(x, x, x, **options)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert (weights is None) == (not need)
        if need:
            torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=1e-5)


def test_unbatched():
    theirs, ours = pair()
    x = torch.randn(N, C)
    for options in ({}, {"key_padding_mask": padding()[1]}, {"attn_mask": causal()}):
        for found, expected in zip(ours(x, x, x, **options), theirs(x, x, x, **options), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("training", [True, False])
def test_torchs_own_table_of_inputs(training):
    """Every constructor and forward of the ModuleInfo battery, with bias_kv, zero_attn, kdim and unbatched inputs."""
    count = 0
    arguments = {"device": "cpu", "dtype": torch.float64, "requires_grad": True, "training": training}
    for given in INFO.module_inputs_func(INFO, **arguments):
        made, called = given.constructor_input, given.forward_input
        theirs = nn.MultiheadAttention(*made.args, **made.kwargs, dtype=torch.float64).train(training)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="add_(bias_kv|zero_attn) makes S other than square")
            ours = LieMultiheadAttention(*made.args, **made.kwargs, dtype=torch.float64).train(training)
        ours.load_state_dict(theirs.state_dict(), strict=False)
        results = zip(ours(*called.args, **called.kwargs), theirs(*called.args, **called.kwargs), strict=True)
        for found, expected in results:
            assert (found is None) == (expected is None)
            if found is not None:
                count += 1
                torch.testing.assert_close(found, expected, equal_nan=True)
    assert count > 100


@masks
def test_weights_are_what_multiplies_the_values(mask):
    """The rows sum to 1, and weights · values, projected, are the output; with and without them it is the same."""
    ours = moved(LieMultiheadAttention(C, H, batch_first=True))
    x = torch.randn(B, N, C)
    found, weights = ours(x, x, x, average_attn_weights=False, **mask)
    without, _ = ours(x, x, x, need_weights=False, **mask)
    _, mean = ours(x, x, x, **mask)
    value = (
        nn.functional.linear(x, ours.v_proj_weight, ours.in_proj_bias[2 * C :]).unflatten(-1, (H, -1)).transpose(1, 2)
    )
    by_hand = ours.out_proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(without, by_hand, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(mean, weights.mean(1))
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, N))
    assert weights.min() >= 0
    if "key_padding_mask" in mask:
        assert not weights[1, :, :, -2:].any()  # exactly 0
    if mask.get("attn_mask", x).shape[-2:] == (N, N) and mask["attn_mask"].dtype == torch.bool:
        assert not weights.triu(1).any()


@pytest.mark.parametrize("clock", [None, ExponentialClock()])
def test_away_from_0_it_is_the_formula(clock):
    ours = moved(LieMultiheadAttention(C, H, batch_first=True, clock=clock, tol=1e-9)).double()
    x = torch.randn(B, N, C, dtype=torch.float64)
    _, weights = ours(x, x, x, average_attn_weights=False)
    q, k, v = nn.functional.linear(x, ours.in_proj_weight, ours.in_proj_bias).unflatten(-1, (3, H, -1)).unbind(2)
    chain = torch.einsum("bnhd,bmhd->bhnm", q, k).div(2.0).softmax(-1)  # √(C / H) = 2
    rho = (torch.einsum("bnhd,hd->bhn", v, ours.lie.rate_weight) + ours.lie.rate_bias[:, None]).sigmoid()
    flow = DenseGenerator(rho[..., None] * (chain - torch.eye(N)))
    expected = chain @ transition_matrix(flow, ours.lie.flow_time(), clock=clock)
    torch.testing.assert_close(weights, expected, atol=1e-8, rtol=0)


def test_pitfall_9_no_fused_path_goes_around_it(monkeypatch):
    """Bare, in an encoder layer, in an encoder with padding, in a decoder layer, in {train, eval} × {grad, no grad,
    inference}: our flow is what mixes, and what is computed is the same."""
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", None)
    monkeypatch.setattr(torch, "_native_multi_head_attention", None)
    x, pad = torch.randn(B, N, C), padding()
    layer = nn.TransformerEncoderLayer(C, H, 32, dropout=0.0, batch_first=True)
    mine = copy.deepcopy(layer)
    mine.self_attn = LieMultiheadAttention(C, H, batch_first=True)
    places = {
        "bare": (LieMultiheadAttention(C, H, batch_first=True), lambda m: m(x, x, x, key_padding_mask=pad)[0]),
        "layer": (layer, lambda m: m(x, src_key_padding_mask=pad)),
        "set by hand": (mine, lambda m: m(x, src_key_padding_mask=pad)),
        "encoder": (nn.TransformerEncoder(layer, 2), lambda m: m(x, src_key_padding_mask=pad)),
        "encoder by hand": (
            nn.TransformerEncoder(mine, 2, enable_nested_tensor=False),
            lambda m: m(x, src_key_padding_mask=pad),
        ),
        "causal encoder": (nn.TransformerEncoder(layer, 2), lambda m: m(x, mask=causal(), is_causal=True)),
        "decoder layer": (
            nn.TransformerDecoderLayer(C, H, 32, dropout=0.0, batch_first=True),
            lambda m: m(x, x, tgt_mask=causal(), memory_key_padding_mask=pad),
        ),
    }
    for name, (module, call) in places.items():
        convert_attention(module)
        moved(module)
        seen = []
        hooks = [
            m.register_forward_hook(lambda *_, seen=seen: seen.append(1))
            for m in module.modules()
            if isinstance(m, LieFlow)
        ]
        expected = call(module.train())
        assert len(seen) == len(hooks) > 0, name
        modes = itertools.product([True, False], [torch.enable_grad, torch.no_grad, torch.inference_mode])
        for k, (training, mode) in enumerate(modes, 2):
            with mode():
                found = call(module.train(training))
            assert len(seen) == k * len(hooks), name
            keep = ~pad.unsqueeze(-1)
            torch.testing.assert_close(found * keep, expected * keep, msg=name)
        for hook in hooks:
            hook.remove()


def test_pitfall_9_a_nested_tensor_is_refused_and_the_converted_encoder_makes_none():
    layer = nn.TransformerEncoderLayer(C, H, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1)
    assert encoder.use_nested_tensor
    convert_attention(encoder)
    assert not encoder.use_nested_tensor
    by_hand = nn.TransformerEncoder(layer, 1).eval()
    by_hand.layers[0].self_attn = LieMultiheadAttention(C, H, batch_first=True)
    with torch.no_grad(), pytest.raises(NestedTensorError, match="enable_nested_tensor=False"):
        by_hand(torch.randn(B, N, C), src_key_padding_mask=padding().flip(0))


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_pitfall_10_other_keys_leave_softmax_attention(option):
    """They make S other than square: said by a warning, exact as torch's, and with a time an error."""
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(C, H, **{option: True})
    with pytest.warns(UserWarning, match=option):
        ours = LieMultiheadAttention(C, H, **{option: True})
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(N, B, C)
    torch.testing.assert_close(ours(x, x, x), theirs(x, x, x))
    with pytest.raises(ShapeError, match=option):
        LieMultiheadAttention(C, H, time=0.5, **{option: True})


def test_pitfall_10_is_causal_needs_its_mask_as_in_torch():
    x = torch.randn(N, B, C)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        LieMultiheadAttention(C, H)(x, x, x, is_causal=True)


def test_across_different_tokens():
    """Softmax attention while time is 0, torch's own; an error once it is not, also for as many tokens."""
    theirs, ours = pair(batch_first=True)
    x, memory = torch.randn(B, N, C), torch.randn(B, N + 2, C)
    torch.testing.assert_close(ours(x, memory, memory), theirs(x, memory, memory))
    same_size = torch.randn(B, N, C)
    torch.testing.assert_close(ours(x, same_size, same_size), theirs(x, same_size, same_size))
    moved(ours)
    # Two views of one tensor, too: whether they are the same tokens, compiled graphs and torch.func could not tell.
    for key in (memory, same_size, x.clone(), x.view(B, N, C)):
        with pytest.raises(ShapeError, match="pass one tensor as both"):
            ours(x, key, key)
    other = torch.randn(B, N, C)
    assert not torch.allclose(ours(x, x, other)[0], ours(x, x, x)[0])  # other values of the same tokens


def test_widths_of_keys_and_values_of_their_own():
    torch.manual_seed(1)
    theirs, ours = nn.MultiheadAttention(C, H, kdim=5, vdim=6), LieMultiheadAttention(C, H, kdim=5, vdim=6)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    x, key, value = torch.randn(4, B, C), torch.randn(N, B, 5), torch.randn(N, B, 6)
    torch.testing.assert_close(ours(x, key, value), theirs(x, key, value))


def test_a_row_whose_targets_are_all_ignored_keeps_its_value():
    ours = LieMultiheadAttention(C, H, batch_first=True)
    x, ignore = torch.randn(B, N, C), torch.zeros(B, N, dtype=torch.bool)
    ignore[0] = True
    value = nn.functional.linear(x, ours.v_proj_weight, ours.in_proj_bias[2 * C :])
    for time in (0.0, 0.8):
        moved(ours, time)
        for need in (True, False):
            found, weights = ours(x, x, x, key_padding_mask=ignore, need_weights=need)
            torch.testing.assert_close(found[0], ours.out_proj(value[0]))
            assert found.isfinite().all()
            if need:
                torch.testing.assert_close(weights[0], torch.eye(N))


def test_no_leak_of_future_or_padding():
    ours = moved(LieMultiheadAttention(C, H, batch_first=True))
    x = torch.randn(B, N, C)
    later, padded = x.clone(), x.clone()
    later[:, 5:] += 1.0
    padded[1, -2:] += 1.0
    options = {"attn_mask": causal(), "key_padding_mask": padding(), "need_weights": False}
    torch.testing.assert_close(ours(x, x, x, **options)[0][:, :5], ours(later, later, later, **options)[0][:, :5])
    found, changed = (ours(y, y, y, key_padding_mask=padding())[0] for y in (x, padded))
    assert torch.equal(found[1, :-2], changed[1, :-2])
    assert torch.equal(found[[0, 2]], changed[[0, 2]])


def test_open_masks():
    window = ~(torch.ones(N, N, dtype=torch.bool).tril() & torch.ones(N, N, dtype=torch.bool).triu(-2))
    x = torch.randn(B, N, C)
    ours = LieMultiheadAttention(C, H, batch_first=True)
    with pytest.raises(MaskError, match="allow_open_mask"):
        ours(x, x, x, attn_mask=window)
    filled = moved(LieMultiheadAttention(C, H, batch_first=True, allow_open_mask=True))
    _, weights = filled(x, x, x, attn_mask=window)
    assert weights[:, 6, 0].min() > 0  # by way of others
    assert not weights.triu(1).any()
    with pytest.raises(MaskError, match="attn_mask: expected"):
        ours(x, x, x, attn_mask=torch.zeros(N, N + 1))


def test_every_parameter_has_a_gradient():
    ours = moved(LieMultiheadAttention(C, H, batch_first=True))
    x = torch.randn(B, N, C)
    ours(x, x, x)[0].square().sum().backward()
    idle = [name for name, p in ours.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle
    start = LieMultiheadAttention(C, H, batch_first=True)
    start(x, x, x, need_weights=False)[0].square().sum().backward()
    assert start.lie.time.grad.all()


def test_names_of_parameters():
    theirs, ours = pair()
    keys = ours.state_dict().keys()
    assert keys - theirs.state_dict().keys() == {"lie.time", "lie.rate_weight", "lie.rate_bias"}
    assert theirs.state_dict().keys() < keys
    assert isinstance(ours, nn.MultiheadAttention)
    for i, part in enumerate((ours.q_proj_weight, ours.k_proj_weight, ours.v_proj_weight)):
        assert torch.equal(part, theirs.in_proj_weight[i * C : (i + 1) * C])


def test_storage():
    ours = moved(LieMultiheadAttention(C, H, batch_first=True))
    x = torch.randn(B, N, C)
    expected = ours(x, x, x)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    loaded = LieMultiheadAttention(C, H, batch_first=True)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (loaded, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(other(x, x, x), expected, rtol=0, atol=0)
    ours._reset_parameters()
    assert not torch.equal(ours.in_proj_weight, loaded.in_proj_weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_autocast(dtype):
    wide = moved(LieMultiheadAttention(C, H, batch_first=True))
    x = torch.randn(B, N, C)
    expected = wide(x, x, x, key_padding_mask=padding())[0]
    narrow = copy.deepcopy(wide).to(dtype)
    y = x.to(dtype)
    found = narrow(y, y, y, key_padding_mask=padding())[0]
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)
    if dtype != torch.float64:
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(wide(x, x, x)[0].float(), wide(x, x, x)[0].float())
            encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(C, H, 32, batch_first=True), 1).eval()
            convert_attention(encoder)
            assert encoder(x, mask=causal(), src_key_padding_mask=padding()).isfinite().all()


@pytest.mark.parametrize("time", [0.0, 0.8])
def test_compile_and_checkpointing(time):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(C, H, 32, dropout=0.0, batch_first=True), 2)
    convert_attention(encoder)
    moved(encoder, time)
    x = torch.randn(B, N, C)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        encoder.train(training)
        torch.testing.assert_close(
            compiled(x, src_key_padding_mask=padding()), encoder(x, src_key_padding_mask=padding())
        )
    layer = encoder.layers[0].train()
    layer(x).sum().backward()
    expected = layer.self_attn.lie.time.grad.clone()
    encoder.zero_grad()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(layer.self_attn.lie.time.grad, expected)


def test_masks_that_torch_refuses_are_refused():
    """Integers would be added to the scores, and a transposed mask would be read as another one."""
    ours, x = LieMultiheadAttention(C, H, batch_first=True, time=0.5), torch.randn(B, N, C)
    with pytest.raises(DtypeError, match=r"key_padding_mask: expected torch\.bool"):
        ours(x, x, x, key_padding_mask=padding().long())
    with pytest.raises(DtypeError, match=r"attn_mask: expected torch\.bool"):
        ours(x, x, x, attn_mask=causal("bool").long())
    with pytest.raises(MaskError, match="key_padding_mask: expected"):
        ours(x, x, x, key_padding_mask=padding().T.contiguous())


def test_a_call_across_in_training_says_that_it_does_not_learn():
    ours, x = LieMultiheadAttention(C, H, batch_first=True), torch.randn(B, N, C)
    with pytest.warns(UserWarning, match="no gradient"):
        ours(x, x + 0, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(x, x, x)
        ours.eval()(x, x + 0, x)


@pytest.mark.parametrize("low", [-1e4, -1e9])
def test_masks_that_hide_by_a_large_number_do_not_leak(low):
    x = torch.randn(B, N, C)
    window = torch.ones(N, N, dtype=torch.bool).tril() & torch.ones(N, N, dtype=torch.bool).triu(-2)
    ours = LieMultiheadAttention(C, H, batch_first=True, time=0.5)
    with pytest.raises(MaskError, match="transitively closed"):
        ours(x, x, x, attn_mask=torch.zeros(N, N).masked_fill(~window, low))
    closed = torch.zeros(N, N).masked_fill(causal("bool"), low)
    torch.testing.assert_close(ours(x, x, x, attn_mask=closed), ours(x, x, x, attn_mask=causal()))
