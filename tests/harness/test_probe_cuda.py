"""The probe of CUDA without a GPU: its kernel compiles and computes, what is missing and what fails is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import compilers, machine, probe_cuda
from harness.errors import SandboxError
from harness.sandbox import Sandbox, best
from harness.walls import project_root

pytestmark = pytest.mark.skipif(
    bool(machine.gpus()), reason="there is a GPU: tests/kernels/test_gpu.py has the real one"
)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(project_root())!r})\n{code}"
    env = os.environ | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)


def test_its_kernel_computes_in_the_interpreter_and_compiles_for_gpus() -> None:
    pytest.importorskip("triton")
    code = "from harness.probe_kernel import compute; print(repr(compute('cpu')))"
    assert python(code, TRITON_INTERPRET="1").stdout == "''\n"
    code = (
        "from triton.backends.compiler import GPUTarget\n"
        "from triton.compiler import ASTSource, compile\n"
        "from harness.probe_kernel import add_one_kernel\n"
        "kinds = {'x_ptr': '*fp32', 'out_ptr': '*fp32', 'n': 'i32', 'BLOCK': 'constexpr'}\n"
        "source = ASTSource(add_one_kernel, kinds, {'BLOCK': 1024})\n"
        "for capability in (80, 90): print(len(compile(source, target=GPUTarget('cuda', capability, 32)).asm['cubin']))"
    )
    done = python(code)
    assert done.returncode == 0 and all(int(n) > 500 for n in done.stdout.split()), done.stderr


def test_a_compiler_and_headers_that_are_there_are_no_fault() -> None:
    if os.environ.get("CI") != "true" and compilers.missing():
        pytest.skip(compilers.missing())
    assert compilers.missing() == ""


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """A PATH with these shell scripts alone."""
    for name, text in programs.items():
        path = tmp_path / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)


def test_no_compiler_is_named_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, apt_get="")
    said = compilers.missing()
    assert said.startswith("there is no C compiler (gcc or clang)")
    assert said.endswith(": apt-get install gcc libc6-dev")
    monkeypatch.setenv("CC", "nvc")
    assert compilers.missing().startswith("CC names 'nvc', which is not there")


def test_no_header_of_python_is_named_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, dnf="", gcc="exit 1")
    monkeypatch.setattr(compilers.sysconfig, "get_paths", lambda: {"include": str(tmp_path / "include")})
    major, minor = sys.version_info[:2]
    assert compilers.missing().endswith(f"that includes it: dnf install python{major}.{minor}-devel")
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    assert "cannot build a file that includes Python.h" in compilers.missing()


def test_what_is_missing_is_said_before_a_child_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "missing", lambda: "there is no Python.h")
    with pytest.raises(SandboxError, match=r"^there is no Python\.h$"):
        probe_cuda.probe_cuda(Sandbox(0))


def test_a_failure_names_what_the_sandbox_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.rehearsal.rehearse", lambda _: {"names of its threads": "Permission denied"})
    monkeypatch.setattr(compilers, "missing", lambda: "")
    with pytest.raises(
        SandboxError, match=r"CUDA does not work in it \(.*libcuda.*refused there: names of its threads"
    ):
        probe_cuda.probe_cuda(best(unsafe=True))
