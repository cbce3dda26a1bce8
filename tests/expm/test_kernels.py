"""The optional Triton kernels: their checks in a process of their own, the compiler, and a life without Triton."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from liegroup_attn.expm.kernels import kernels_available

ROOT = Path(__file__).parents[2]
HERE = importlib.util.find_spec("triton") is not None
triton = pytest.mark.skipif(not HERE, reason="no Triton")


def _python(*arguments, **environment):
    """Triton decides at its import whether it interprets, and another test may have imported it: a new process."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=clean | {"PYTHONPATH": str(ROOT)} | environment,
    )


@triton
@pytest.mark.parametrize("chosen", ["resolvents-random-17", pytest.param("", id="all", marks=pytest.mark.slow)])
def test_kernel_checks(chosen):
    """Triton's interpreter takes a minute over all; every run looks at one."""
    how = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    run = _python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/expm/kernel_checks.py", "-k", chosen, **how)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@triton
@pytest.mark.slow
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
    run = _python("-c", code, TRITON_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.split()) == 4


@triton
def test_compiled_kernels_refuse_a_cpu():
    code = (
        "import torch; from liegroup_attn.expm.kernels.jumps import causal_jumps_triton as f;"
        "q = torch.zeros(1, 4, 16); f(q, q, None, q, stages=1, implicit=False, scale=1.0)"
    )
    run = _python("-c", code)
    assert "RuntimeError: query: expected a tensor on a GPU, got cpu" in run.stderr


@pytest.mark.parametrize("there", [True, False])
def test_available_says_why_not(there):
    """Neither the package nor the question needs Triton."""
    if there and not HERE:
        pytest.skip("no Triton")
    code = (
        f"import sys; there = {there}\n"
        "if not there: sys.modules['triton'] = None\n"
        "import liegroup_attn, liegroup_attn.expm\n"
        "from liegroup_attn.expm.kernels import kernels_available\n"
        "assert there == (kernels_available() == (True, None)), kernels_available()\n"
        "assert there or 'pip install triton' in kernels_available()[1]"
    )
    run = _python("-c", code)
    assert run.returncode == 0, run.stderr
    assert kernels_available()[0] == HERE
