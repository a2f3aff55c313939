"""Which torch fits which driver, and what is missing beside it: tables of plain values."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from hotloop.harness.gpu import toolchain
from hotloop.harness.gpu.toolchain import (
    TESTED,
    Build,
    build_trouble,
    compiler_package,
    compiler_trouble,
    compiles,
    driver_in,
    driver_version,
    header_package,
    header_trouble,
    installs,
    read_build,
    torch_build,
)

CU = toolchain.INDEX
UBUNTU = 'PRETTY_NAME="Ubuntu 24.04.3 LTS"\nNAME="Ubuntu"\nID=ubuntu\nID_LIKE=debian\n'
ROCKY = 'NAME="Rocky Linux"\nID="rocky"\nID_LIKE="rhel centos fedora"\n'


@pytest.mark.parametrize(
    ("driver", "machine", "found"),
    [
        ("580.65.06", "x86_64", ["torch===2.13.0", "torch==2.13.0+cu130"]),
        ("590.44.01", "x86_64", ["torch===2.13.0", "torch==2.13.0+cu130"]),
        ("580.65.06", "aarch64", ["torch==2.13.0+cu130", "torch===2.13.0"]),
        ("575.57.08", "x86_64", ["torch==2.11.0+cu128"]),
        ("570.86.15", "x86_64", ["torch==2.11.0+cu128"]),
        ("565.57.01", "x86_64", ["torch==2.13.0+cu126"]),
        ("550.54.14", "x86_64", ["torch==2.13.0+cu126"]),
        ("535.183.01", "x86_64", ["torch==2.13.0+cu126"]),
        ("525.60.13", "x86_64", ["torch==2.13.0+cu126"]),
    ],
)  # fmt: skip
def test_the_build_of_torch_follows_the_driver(driver: str, machine: str, found: list[str]) -> None:
    wanted = installs(driver, machine)
    assert [i.torch for i in wanted] == found
    for install in wanted:
        version = install.torch.lstrip("torch=").split("+")[0]
        assert install.triton == TESTED[version]
        # A build for another CUDA than PyPI's is only found where its index is named.
        assert install.index == (CU + install.torch.split("+")[1] if "+" in install.torch else "")
        # `==2.13.0` would take a `2.13.0+cpu` as well.
        assert "===" in install.torch or "+cu" in install.torch


@pytest.mark.parametrize(
    ("driver", "machine", "words"),
    [
        ("470.256.02", "x86_64", "update it to 580"), ("550.54.14", "aarch64", "on Arm needs driver 580"),
        ("", "x86_64", "not the version of a driver"), ("new", "x86_64", "not the version of a driver"),
        ("580.65.06", "ppc64le", "no torch with CUDA for ppc64le"),
    ],
)  # fmt: skip
def test_what_fits_nothing_is_said_in_a_line(driver: str, machine: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as e:
        installs(driver, machine)
    assert len(str(e.value).splitlines()) == 1


VERSION = "from typing import Optional\n\n__version__ = '{}'\ndebug = False\ncuda: Optional[str] = {}\nhip{} = {}\n"


def test_the_build_is_read_without_importing_torch() -> None:
    assert read_build(VERSION.format("2.13.0+cpu", "None", "", "None")) == Build("2.13.0+cpu")
    assert read_build(VERSION.format("2.13.0", "'13.0'", ": Optional[str]", "None")) == Build("2.13.0", "13.0")
    assert read_build(VERSION.format("2.11.0+rocm7.1", "None", ": Optional[str]", "'7.1.5'")) == Build(
        "2.11.0+rocm7.1", "", "7.1.5"
    )
    here = torch_build()
    assert here is not None and here.version.split("+")[0] in TESTED


@pytest.mark.parametrize(
    ("build", "driver", "cuda", "words"),
    [
        (Build("2.13.0", "13.0"), "580.65.06", 13000, ""),
        (Build("2.13.0", "13.0"), "580.65.06", None, ""),
        (Build("2.13.0", "13.0"), "", None, ""),  # nobody says; CUDA itself will
        (Build("2.13.0", "13.0"), "575.57.08", 12090, "needs driver 580 or newer, and this one is 575.57.08"),
        (Build("2.13.0", "13.0"), "535.183.01", None, "needs driver 580"),
        (Build("2.13.0", "13.0"), "535.183.01", 13000, ""),  # with NVIDIA's compatibility package
        (Build("2.11.0+cu128", "12.8"), "535.183.01", 12020, ""),
        (Build("2.11.0+cu128", "12.8"), "470.1", 11040, "needs driver 525"),
        (Build("2.13.0+cpu"), "580.65.06", 13000, "is a build for CPUs"),
        (None, "580.65.06", 13000, "not installed"),
    ],
)  # fmt: skip
def test_a_build_that_does_not_fit_is_told_before_it_fails(
    build: Build | None, driver: str, cuda: int | None, words: str
) -> None:
    said = build_trouble(build, driver, cuda)
    assert words in said and bool(said) == bool(words)
    if said:
        assert "tools/install.py" in said


def test_the_drivers_version_is_the_modules(tmp_path: Path) -> None:
    closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\nGCC version: 13"
    opened = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC version:  gcc 12.3.0"
    )
    assert [driver_in(t) for t in (closed, opened, "GCC version: 12.3.0", "")] == ["550.54.14", "570.86.15", "", ""]
    (tmp_path / "version").write_text(opened)
    assert driver_version(tmp_path / "version") == "570.86.15"


@pytest.mark.parametrize(
    ("prefix", "os_release", "words"),
    [
        ("/usr", UBUNTU, "apt-get install python3.12-dev"), ("/usr", "ID=debian\n", "python3.12-dev"),
        ("/usr", ROCKY, "dnf install python3-devel"), ("/usr", "ID=fedora\n", "dnf install python3-devel"),
        ("/usr", 'ID="opensuse-leap"\nID_LIKE="suse opensuse"\n', "zypper install python312-devel"),
        ("/usr", "", "python3-dev or python3-devel"), ("/opt/python", UBUNTU, "in /opt/python came without headers"),
        ("/root/.pyenv/versions/3.12.1", UBUNTU, "such as uv's or pyenv's"),
    ],
)  # fmt: skip
def test_the_package_of_pythons_headers_is_named(prefix: str, os_release: str, words: str) -> None:
    assert words in header_package(prefix, (3, 12), os_release)


def test_the_compilers_package_is_named() -> None:
    assert "build-essential" in compiler_package(UBUNTU)
    assert compiler_package(ROCKY) == "dnf install gcc"
    assert "gcc" in compiler_package("")


def test_headers_and_compiler_are_looked_for_as_triton_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert header_trouble() == compiler_trouble() == compiles() == ""
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    assert "CC=no-such-compiler -m64 is not a program" in compiler_trouble()
    monkeypatch.delenv("CC")
    broken = tmp_path / "gcc"
    broken.write_text("#!/bin/sh\necho 'try.c:2:10: fatal error: stdio.h: No such file' >&2; exit 1\n")
    broken.chmod(0o755)
    with monkeypatch.context() as m:
        m.setenv("PATH", str(tmp_path))
        assert compiler_trouble() == ""
        assert "cannot compile (try.c:2:10: fatal error: stdio.h: No such file); install: " in compiles()
        broken.unlink()
        assert compiler_trouble().startswith("there is no C compiler; install one: ")
    monkeypatch.setattr(toolchain, "_include", lambda: str(tmp_path))
    assert f"Python.h is not in {tmp_path}; " in header_trouble()
    assert os.path.exists(sys.base_prefix)
