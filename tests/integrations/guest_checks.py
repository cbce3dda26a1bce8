"""What every case of x-transformers and LitGPT must satisfy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import Tensor, nn

from experiments.drop_in.guest_cases import VOCABULARY, Case, flows, moving, tokens
from liegroup_attn.nn import LieFlow, convert_attention, restore_attention


def check_time_zero(case: Case) -> None:
    """Outputs do not change, in training as in eval."""
    x, plain, lie = tokens(), case.model().double(), case.converted()
    with torch.no_grad():
        wanted = plain(x)
    torch.testing.assert_close(lie(x).detach(), wanted)
    with torch.no_grad():
        torch.testing.assert_close(lie(x), wanted)
    assert not torch.allclose(moving(lie)(x), wanted, atol=1e-3), "a flow without effect"


def check_gradients(case: Case) -> None:
    """Every parameter of a flow learns, and time from 0 on."""
    for time, learning in ((None, {"time"}), (0.7, {"time", "rate_weight", "rate_bias"})):
        model = case.converted(time)
        model(tokens()).square().sum().backward()
        for flow in flows(model):
            got = {name for name, p in flow.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
            assert got == learning


def check_modes(case: Case) -> None:
    """Train == eval == no_grad."""
    model = case.converted(0.7)
    wanted = model.train()(tokens()).detach()
    torch.testing.assert_close(model.eval()(tokens()).detach(), wanted)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), wanted)


def check_causality(case: Case) -> None:
    """Later tokens do not show, unless they may."""
    model, x = case.converted(0.7), tokens()
    other = x.clone()
    other[:, -3:] = (other[:, -3:] + 1) % VOCABULARY
    with torch.no_grad():
        same = torch.allclose(model(x)[:, :-3], model(other)[:, :-3], atol=1e-9)
    assert same == case.causal


def check_state_dict(case: Case) -> None:
    """What is saved can be loaded, into a model converted in the same way."""
    model, other = case.converted(0.7), case.converted()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(other(tokens()), model(tokens()))
        torch.testing.assert_close(copy.deepcopy(model)(tokens()), model(tokens()))


def check_restored(case: Case, attention: type[nn.Module]) -> None:
    """The original is back: classes, keys and outputs."""
    plain, model = case.model().double(), case.converted(0.7)
    converted = [name for name, module in model.named_modules() if isinstance(module, attention)]
    assert restore_attention(model).converted == converted
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(model(tokens()), plain(tokens()))


def check_report(case: Case, attention: type[nn.Module]) -> None:
    """Each attention has its row, a second conversion says so, and example_inputs finds all of them called."""
    model = case.model()
    names = [name for name, module in model.named_modules() if isinstance(module, attention)]
    report = convert_attention(model, example_inputs=(tokens(),), **case.options)
    assert len(names) == 2
    assert report.converted == names
    assert not report.kept
    again = convert_attention(model, **case.options)
    assert [layer.outcome for layer in again.layers] == ["already converted"] * 2
    with pytest.raises(TypeError):
        convert_attention(case.model(), no_such_option=1)


def golden(flow: LieFlow, scores: Tensor, value: Tensor) -> Tensor:
    """S exp(t diag(ρ) (S − I)) V by SciPy, from scores (B, H, N, N) with −inf where hidden and values (B, H, N, D)."""
    out = np.empty(value.shape)
    for b, h in np.ndindex(*value.shape[:2]):
        s, v = scores[b, h].detach().double().numpy(), value[b, h].detach().double().numpy()
        hops = np.exp(s - s.max(-1, keepdims=True))
        hops /= hops.sum(-1, keepdims=True)
        rho = 1 / (1 + np.exp(-(v @ flow.rate_weight[h].detach().numpy() + float(flow.rate_bias[h].detach()))))
        time = float(flow.time.detach()[h])
        out[b, h] = hops @ expm(time * rho[:, None] * (hops - np.eye(len(s)))) @ v
    return torch.from_numpy(out)
