"""The probe of CUDA without a GPU: its kernel compiles and computes, what is missing and what fails is named."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hotloop.harness.errors import DeviceError, SandboxError
from hotloop.harness.gpu import nvml, toolchain
from hotloop.harness.paths import project_root
from hotloop.harness.sandbox import probe_cuda
from hotloop.harness.sandbox.levels import best
from hotloop.harness.sandbox.policy import Sandbox

pytestmark = pytest.mark.skipif(bool(nvml.cards()), reason="there is a GPU: tests/kernels/test_gpu.py has the real one")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(project_root())!r})\n{code}"
    env = os.environ | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)


def test_its_kernel_computes_in_the_interpreter_and_compiles_for_gpus() -> None:
    pytest.importorskip("triton")
    code = "from hotloop.harness.sandbox.probe_kernel import compute; print(repr(compute('cpu')))"
    assert python(code, TRITON_INTERPRET="1").stdout == "''\n"
    code = (
        "from triton.backends.compiler import GPUTarget\n"
        "from triton.compiler import ASTSource, compile\n"
        "from hotloop.harness.sandbox.probe_kernel import add_one_kernel\n"
        "kinds = {'x_ptr': '*fp32', 'out_ptr': '*fp32', 'n': 'i32', 'BLOCK': 'constexpr'}\n"
        "source = ASTSource(add_one_kernel, kinds, {'BLOCK': 1024})\n"
        "for capability in (80, 90): print(len(compile(source, target=GPUTarget('cuda', capability, 32)).asm['cubin']))"
    )
    done = python(code)
    assert done.returncode == 0 and all(int(n) > 500 for n in done.stdout.split()), done.stderr


def test_what_is_missing_is_said_before_a_child_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "missing", lambda: "there is no Python.h")
    with pytest.raises(SandboxError, match=r"^there is no Python\.h$"):
        probe_cuda.probe_cuda(Sandbox(0))
    best.cache_clear()
    try:
        with pytest.raises(DeviceError, match=r"^there is no Python\.h$"):
            best(device="cuda")
    finally:
        best.cache_clear()


def test_a_failure_names_what_the_sandbox_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hotloop.harness.sandbox.rehearsal.rehearse", lambda _: {"names of its threads": "Permission denied"}
    )
    monkeypatch.setattr(toolchain, "missing", lambda: "")
    with pytest.raises(
        SandboxError, match=r"CUDA does not work in it \(.*libcuda.*refused there: names of its threads"
    ):
        probe_cuda.probe_cuda(best(unsafe=True))
