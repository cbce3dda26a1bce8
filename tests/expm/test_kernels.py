"""Triton kernels against a dense float64 formula: on a GPU if there is one, else interpreted in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from liegroup_attn.errors import DtypeError, GeneratorError, ShapeError
from liegroup_attn.expm.kernels import kernels_available

triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
kernels = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (INTERPRETED or DEVICE == "cuda"),
    reason="no Triton, or no GPU: then test_interpreted runs these",
)

ROOT = Path(__file__).parents[2]
SWEEPS = {"one hop": (False, 1), "hops": (False, 3), "resolvent": (True, 1), "resolvents": (True, 2)}


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
    from liegroup_attn.expm.kernels.jumps import causal_jumps_triton

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


@kernels
@pytest.mark.parametrize("n", [1, 2, 17, 63, 64, 100])
@pytest.mark.parametrize("sweep", list(SWEEPS))
@pytest.mark.parametrize("onward", ["one", "random", "large"])
def test_values_and_gradients(n, sweep, onward):
    implicit, stages = SWEEPS[sweep]
    if onward == ("one" if implicit else "large"):
        pytest.skip("not defined")
    ours, exact = _both(_problem(n, onward=onward), stages=stages, implicit=implicit, scale=0.3)
    assert max(_error(ours, exact)) < 2e-5


@kernels
@pytest.mark.parametrize(("e", "d", "stages", "n"), [(128, 16, 2, 130), (64, 64, 1, 70), (32, 128, 5, 40)])
@pytest.mark.parametrize("implicit", [False, True])
def test_widths_and_blocks(e, d, stages, n, implicit):
    """All widths; three and more blocks of 32 and of 16 rows."""
    ours, exact = _both(_problem(n, e=e, d=d), stages=stages, implicit=implicit, scale=e**-0.5)
    assert max(_error(ours, exact)) < 2e-5


@kernels
@pytest.mark.parametrize("implicit", [False, True])
def test_time_zero(implicit):
    """No time: the jumps are S V, and the gradient of the time is that of the definition."""
    ours, exact = _both(_problem(20, onward="zero"), stages=2, implicit=implicit, scale=0.3)
    assert max(_error(ours, exact)) < 2e-5


@kernels
def test_long_times_keep_the_digits_of_small_gradients():
    """Tokens that almost keep to themselves for a long time: their gradients come out of small differences."""
    query, key, onward, value = _problem(40, onward="large")
    with torch.no_grad():
        query.mul_(3), key.copy_(query)
    ours, exact = _both([query, key, onward, value], stages=2, implicit=True, scale=0.3)
    for a, b in zip(ours[1:3], exact[1:3], strict=True):
        assert float((a - b).abs().max()) < 1e-3 * float(b.abs().max())


@kernels
@pytest.mark.parametrize("sweep", list(SWEEPS))
def test_extreme_scores(sweep):
    """Scores of ±1e4 and more: finite, and averages stay within the values."""
    implicit, stages = SWEEPS[sweep]
    tensors = _problem(70, spread=100.0, onward="large" if implicit else "random")
    ours, exact = _both(tensors, stages=stages, implicit=implicit, scale=1.0)
    assert all(bool(torch.isfinite(t).all()) for t in ours)
    assert float(ours[0].abs().max()) <= float(tensors[3].detach().abs().max()) * (1 + 1e-5)
    assert max(_error(ours[:1], exact[:1])) < 2e-2  # float32 scores of 1e4 are off by 1e-3


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sweep", list(SWEEPS))
def test_half_precision(dtype, sweep):
    """The exact formula takes the same rounded inputs, so what is left is TF32 and the rounding of gradients."""
    implicit, stages = SWEEPS[sweep]
    tensors = _problem(70, dtype=dtype)
    ours, exact = _both(tensors, stages=stages, implicit=implicit, scale=0.3)
    assert ours[0].dtype == torch.float32
    assert [t.dtype for t in ours[1:]] == [t.dtype for t in tensors]
    assert max(_error(ours, exact)) < 1e-2


@kernels
def test_strides_and_missing_gradients():
    """Views are taken as they are, and what needs no gradient gets none."""
    from liegroup_attn.expm.kernels.jumps import causal_jumps_triton

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


@kernels
def test_the_past_does_not_see_the_future():
    from liegroup_attn.expm.kernels.jumps import causal_jumps_triton

    tensors = [t.detach() for t in _problem(70)]
    knobs = {"stages": 2, "implicit": True, "scale": 0.3}
    whole = causal_jumps_triton(*tensors, **knobs)
    start = causal_jumps_triton(*(t[:, :66] for t in tensors), **knobs)
    assert torch.equal(whole[:, :66], start)


@kernels
def test_no_batch():
    from liegroup_attn.expm.kernels.jumps import causal_jumps_triton

    tensors = [t.detach()[:0].requires_grad_() for t in _problem(5)]
    jumps = causal_jumps_triton(*tensors, stages=2, implicit=False, scale=0.3)
    assert jumps.shape == (0, 5, 64)
    jumps.sum().backward()


@kernels
def test_differentiates_once():
    from liegroup_attn.expm.kernels.jumps import causal_jumps_triton

    tensors = _problem(5)
    jumps = causal_jumps_triton(*tensors, stages=1, implicit=False, scale=0.3)
    (grad,) = torch.autograd.grad(jumps.square().sum(), tensors[3], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@kernels
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
    from liegroup_attn.expm.kernels.jumps import causal_jumps_triton

    good = {name: torch.zeros(2, 5, 16) for name in ("query", "key", "value")}
    knobs = {"onward": torch.zeros(2, 5), "stages": 1, "implicit": False, "scale": 1.0}
    with pytest.raises(error, match=match):
        causal_jumps_triton(**(good | knobs | change))


@triton
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_interpreted():
    """Triton decides at its import whether it interprets, and another test may have imported it: a new process."""
    if DEVICE == "cuda":
        pytest.skip("the tests above ran on the GPU")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@triton
@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("implicit", [False, True])
def test_kernels_compile(implicit, tmp_path):
    """Down to machine code, without a GPU: the interpreter lets pass what the compiler does not."""
    code = f"""
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from liegroup_attn.expm.kernels import sweeps

known = dict(E=16, D=16, STAGES=3, BLOCK=16, IMPLICIT={implicit}, PRECISION="tf32")
if not {implicit}:
    known |= dict(onward=None, d_onward=None)
for name in sweeps.__all__:
    names = getattr(sweeps, name).arg_names
    kinds = dict(n="i32", scale="fp32") | dict.fromkeys(known, "constexpr")
    kinds = {{a: kinds.get(a, "*bf16" if a in ("query", "key", "d_query", "d_key") else "*fp32") for a in names}}
    source = ASTSource(getattr(sweeps, name), kinds, {{(names.index(a),): v for a, v in known.items() if a in names}})
    print(len(compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]))
"""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.split()) == 4


@triton
@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels do run on a CPU")
def test_compiled_kernels_refuse_a_cpu():
    code = (
        "import torch; from liegroup_attn.expm.kernels.jumps import causal_jumps_triton as f;"
        "q = torch.zeros(1, 4, 16); f(q, q, None, q, stages=1, implicit=False, scale=1.0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "RuntimeError: query: expected a tensor on a GPU, got cpu" in run.stderr


@pytest.mark.parametrize("there", [True, False])
def test_available_says_why_not(there):
    """Neither the package nor the question needs Triton."""
    if there and importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton")
    code = (
        f"import sys; there = {there}\n"
        "if not there: sys.modules['triton'] = None\n"
        "import liegroup_attn, liegroup_attn.expm\n"
        "from liegroup_attn.expm.kernels import kernels_available\n"
        "assert there == (kernels_available() == (True, None)), kernels_available()\n"
        "assert there or 'pip install triton' in kernels_available()[1]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert kernels_available()[0] == (importlib.util.find_spec("triton") is not None)
