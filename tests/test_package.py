"""The package as it is installed: a wheel, made from the sdist, beside another package that is named `kernels`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from hotloop.harness.paths import project_root
from tests.harness.conftest import tiny_source

Call = Callable[..., subprocess.CompletedProcess[str]]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "runs", "tests", "build", "dist", "*.egg-info")


def build(kind: str, folder: Path, out: Path) -> Path:
    code = f"import sys; from setuptools import build_meta as b; b.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=folder, check=True, capture_output=True, timeout=120)
    return next(out.glob("*.tar.gz" if kind == "sdist" else "*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, which is built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(project_root(), folder / "checkout", symlinks=True, ignore=LEFT_OUT)
    with tarfile.open(build("sdist", folder / "checkout", folder)) as sdist:
        sdist.extractall(folder / "sdist", filter="data")
    return build("wheel", next((folder / "sdist").iterdir()), folder)


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Call:
    """Calls a program of an environment with the wheel, with what this one has, and with a stand-in for `kernels`."""
    env = tmp_path_factory.mktemp("env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True, timeout=60)
    pip = [sys.executable, "-m", "pip", "--python", env / "bin/python"]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", wheel], check=True, timeout=120)
    site = next((env / "lib").glob("python*/site-packages"))
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))  # whose own .pth files are not read
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("THEIRS = True\n")
    home = env / "home"
    home.mkdir()
    settings = {k: v for k, v in os.environ.items() if not k.startswith(("HOTLOOP", "PYTHON"))} | {"HOME": str(home)}

    def call(program: str, *args: str | Path, cwd: Path = home) -> subprocess.CompletedProcess[str]:
        command = [env / "bin" / program, *args]
        return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, timeout=240)

    return call


def test_nothing_but_hotloop_is_at_the_top_level(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"hotloop"}
    assert {
        "hotloop/prepare.py", "hotloop/harness/seal.json", "hotloop/bench/gate/guard.cpp", "hotloop/kernels/dispatch.py"
    } <= set(names)  # fmt: skip


def test_each_kernels_is_imported_by_its_own_name(run: Call) -> None:
    code = "import kernels; from hotloop import kernels as ours; print(kernels.THEIRS, ours.__file__, ours.attention)"
    done = run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True ") and "site-packages/hotloop/kernels/" in done.stdout


def test_the_command_works_from_there(run: Call) -> None:
    doctor = run("hotloop", "doctor")
    lines = {line[:3].strip(): line for line in doctor.stdout.splitlines() if line[5:9] == "seal"}
    assert list(lines) == ["ok"], doctor.stdout + doctor.stderr
    assert "--source" in run("hotloop", "prepare", "--help").stdout
    assert run("python", "-m", "hotloop", "--help").returncode == 0


def test_a_train_py_is_run_outside_of_a_checkout(run: Call, tmp_path: Path) -> None:
    """Prepared, trained, scored and audited; the sandboxed processes find the code, and `kernels` is the others'."""
    from pydoc_data.topics import topics

    (tmp_path / "text.txt").write_text("\n\n".join(topics[name] for name in sorted(topics)[:60]))
    small = ["--preset", "laptop", "--device", "cpu"]
    data = ["--source", "text.txt", "--vocab-size", "320", "--out", "data"]
    prepared = run("hotloop", "prepare", *small, *data, cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    (tmp_path / "train.py").write_bytes(
        b"import kernels\nfrom hotloop import kernels as ours\nfrom hotloop.harness import Run\n"
        b"assert kernels.THEIRS and ours.attention\n" + tiny_source()
    )
    done = run("hotloop", "run", *small, "--data", "data", "--budget-tokens", "8192", "--threads", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "val_bpb:" in done.stdout
    (tmp_path / "train.py").write_bytes(b"import kernels\nfrom harness import Batch, Run\n" + tiny_source())
    old = run("hotloop", "run", *small, "--data", "data", cwd=tmp_path)
    assert old.returncode == 2
    assert old.stderr.count("\n") == 1 and "write: from hotloop.harness import Batch, Run, Spec, main" in old.stderr
