"""Triton kernels against a dense float64 formula; ``test_kernels`` runs this file in a process of its own.

By hand: ``TRITON_INTERPRET=1 pytest tests/expm/kernel_checks.py``, or without the variable on a GPU.
"""

import os

import pytest
import torch

from liegroup_attn.errors import DtypeError, GeneratorError, ShapeError

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SWEEPS = {"one hop": (False, 1), "hops": (False, 3), "resolvent": (True, 1), "resolvents": (True, 2)}


def _kernels():
    from liegroup_attn.expm.kernels.jumps import causal_jumps_triton  # late: pytest reads this file for doctests

    return causal_jumps_triton


def _dense(query, key, onward, value, *, stages, implicit, scale):
    """The definition in float64, differentiated by autograd."""
    n = query.size(1)
    eye = torch.eye(n, dtype=torch.float64, device=query.device)
    later = torch.ones(n, n, dtype=torch.bool, device=query.device).triu(1)
    chain = (scale * query @ key.mT).masked_fill(later, -torch.inf).softmax(-1)
    rate = torch.ones_like(query[..., 0]) if onward is None else onward
    x, jumps = value, []
    for _ in range(stages):
        if implicit:
            x = torch.linalg.solve(eye + rate[..., None] * (eye - chain), x)
        jumps.append(chain @ x)
        if not implicit:
            x = x + rate[..., None] * (jumps[-1] - x)
    return torch.cat(jumps, -1)


def _problem(n, *, e=16, d=32, onward="random", dtype=torch.float32, spread=1.0):
    query, key = spread * torch.randn(2, 2, n, e)
    rate = {"one": None, "random": torch.rand(2, n), "large": 1e6 * torch.rand(2, n), "zero": torch.zeros(2, n)}[onward]
    tensors = [query.to(dtype), key.to(dtype), rate, torch.randn(2, n, d).to(dtype)]
    return [None if t is None else t.to(DEVICE).requires_grad_() for t in tensors]


def _both(tensors, **knobs):
    """(ours, exact): jumps, then the gradients of query, key, onward, value."""
    causal_jumps_triton = _kernels()
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    weights = torch.randn(*tensors[3].shape[:2], knobs["stages"] * tensors[3].size(-1), device=DEVICE)
    results = []
    for fn, inputs in ((causal_jumps_triton, tensors), (_dense, exact)):
        jumps = fn(*inputs, **knobs)
        wanted = [t for t in inputs if t is not None]
        grads = torch.autograd.grad(jumps, wanted, weights.to(jumps), allow_unused=True, materialize_grads=True)
        results.append([jumps.detach(), *grads])
    return results


def _error(ours, exact):
    """Largest error of each result, relative to the largest entry where that is above 1."""
    return [float((a - b).abs().max() / b.abs().max().clamp_min(1)) for a, b in zip(ours, exact, strict=True)]


@pytest.mark.parametrize("n", [1, 2, 17, 63, 64, 100])
@pytest.mark.parametrize(
    ("sweep", "onward"), [(s, o) for s in SWEEPS for o in ("random", "large" if SWEEPS[s][0] else "one")]
)
def test_values_and_gradients(n, sweep, onward):
    implicit, stages = SWEEPS[sweep]
    ours, exact = _both(_problem(n, onward=onward), stages=stages, implicit=implicit, scale=0.3)
    assert max(_error(ours, exact)) < 2e-5


@pytest.mark.parametrize(("e", "d", "stages", "n"), [(128, 16, 2, 100), (64, 64, 1, 70), (32, 128, 5, 40)])
@pytest.mark.parametrize("implicit", [False, True])
def test_widths_and_blocks(e, d, stages, n, implicit):
    """All widths; three and more blocks of 32 and of 16 rows."""
    ours, exact = _both(_problem(n, e=e, d=d), stages=stages, implicit=implicit, scale=e**-0.5)
    assert max(_error(ours, exact)) < 2e-5


@pytest.mark.parametrize("sweep", list(SWEEPS))
def test_long_ways(sweep):
    """Every token asks the one before it: in a long time all values come from the first, through every row."""
    implicit, stages = SWEEPS[sweep]
    n = 50
    query, key, onward, value = _problem(n, e=64, onward="large" if implicit else "random")
    with torch.no_grad():
        key.copy_(torch.eye(n, 64))
        query.copy_(8 * key.roll(1, -2))
    ours, exact = _both([query, key, onward, value], stages=stages, implicit=implicit, scale=2.0)
    errors = _error(ours, exact)
    assert max(errors[0], *errors[3:]) < 2e-5
    assert max(errors) < 1e-3  # scores that are sure of themselves have no gradient but the rounding of large terms


@pytest.mark.parametrize("implicit", [False, True])
def test_time_zero(implicit):
    """No time: the jumps are S V, and the gradient of the time is that of the definition."""
    ours, exact = _both(_problem(20, onward="zero"), stages=2, implicit=implicit, scale=0.3)
    assert max(_error(ours, exact)) < 2e-5


def test_long_times_keep_the_digits_of_small_gradients():
    """Tokens that almost keep to themselves for a long time: their gradients come out of small differences."""
    query, key, onward, value = _problem(40, onward="large")
    with torch.no_grad():
        query.mul_(3), key.copy_(query)
    ours, exact = _both([query, key, onward, value], stages=2, implicit=True, scale=0.3)
    for a, b in zip(ours[1:3], exact[1:3], strict=True):
        assert float((a - b).abs().max()) < 1e-3 * float(b.abs().max())


@pytest.mark.parametrize("sweep", list(SWEEPS))
def test_extreme_scores(sweep):
    """Scores of ±1e4 and more: finite, and averages stay within the values."""
    implicit, stages = SWEEPS[sweep]
    tensors = _problem(70, spread=100.0, onward="large" if implicit else "random")
    ours, exact = _both(tensors, stages=stages, implicit=implicit, scale=1.0)
    assert all(bool(torch.isfinite(t).all()) for t in ours)
    assert float(ours[0].abs().max()) <= float(tensors[3].detach().abs().max()) * (1 + 1e-5)
    assert max(_error(ours[:1], exact[:1])) < 2e-2  # float32 scores of 1e4 are off by 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sweep", list(SWEEPS))
def test_half_precision(dtype, sweep):
    """The exact formula takes the same rounded inputs, so what is left is TF32 and the rounding of gradients."""
    implicit, stages = SWEEPS[sweep]
    tensors = _problem(40, dtype=dtype)
    ours, exact = _both(tensors, stages=stages, implicit=implicit, scale=0.3)
    assert ours[0].dtype == torch.float32
    assert [t.dtype for t in ours[1:]] == [t.dtype for t in tensors]
    assert max(_error(ours, exact)) < 1e-2


def test_strides_and_missing_gradients():
    """Views are taken as they are, and what needs no gradient gets none."""
    causal_jumps_triton = _kernels()
    query, key, onward, value = _problem(18)
    plain = causal_jumps_triton(query, key, onward, value, stages=2, implicit=True, scale=0.3)
    views = [t.detach().mT.contiguous().mT for t in (query, key, onward, value)]
    views[3].requires_grad_()
    strided = causal_jumps_triton(*views, stages=2, implicit=True, scale=0.3)
    assert torch.equal(plain, strided)
    weights = torch.randn_like(plain)
    (expected,) = torch.autograd.grad(plain, value, weights)
    strided.mT.contiguous().backward(weights.mT)
    torch.testing.assert_close(views[3].grad, expected)
    assert all(view.grad is None for view in views[:3])


def test_the_past_does_not_see_the_future():
    causal_jumps_triton = _kernels()
    tensors = [t.detach() for t in _problem(70)]
    knobs = {"stages": 2, "implicit": True, "scale": 0.3}
    whole = causal_jumps_triton(*tensors, **knobs)
    start = causal_jumps_triton(*(t[:, :66] for t in tensors), **knobs)
    assert torch.equal(whole[:, :66], start)


def test_no_batch():
    causal_jumps_triton = _kernels()
    tensors = [t.detach()[:0].requires_grad_() for t in _problem(5)]
    jumps = causal_jumps_triton(*tensors, stages=2, implicit=False, scale=0.3)
    assert jumps.shape == (0, 5, 64)
    jumps.sum().backward()


def test_differentiates_once():
    causal_jumps_triton = _kernels()
    tensors = _problem(5)
    jumps = causal_jumps_triton(*tensors, stages=1, implicit=False, scale=0.3)
    (grad,) = torch.autograd.grad(jumps.square().sum(), tensors[3], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"query": torch.zeros(2, 5, 24)}, ShapeError, "width of 16, 32, 64 or 128"),
        ({"value": torch.zeros(5, 16)}, ShapeError, "value: expected"),
        ({"value": torch.zeros(2, 6, 16)}, ShapeError, "same tokens"),
        ({"key": torch.zeros(1, 5, 16)}, ShapeError, "key: expected"),
        ({"onward": torch.zeros(2, 1)}, ShapeError, "onward: expected"),
        ({"query": torch.zeros(2, 5, 16).double()}, DtypeError, "query, key: expected"),
        ({"value": torch.zeros(2, 5, 16).double()}, DtypeError, "value: expected"),
        ({"onward": None, "implicit": True}, GeneratorError, "implicit=True"),
        ({"stages": 0}, GeneratorError, "stages: expected"),
        ({"stages": 200}, ShapeError, "stages · D"),
    ],
)
def test_bad_input(change, error, match):
    causal_jumps_triton = _kernels()
    good = {name: torch.zeros(2, 5, 16) for name in ("query", "key", "value")}
    knobs = {"onward": torch.zeros(2, 5), "stages": 1, "implicit": False, "scale": 1.0}
    with pytest.raises(error, match=match):
        causal_jumps_triton(**(good | knobs | change))
