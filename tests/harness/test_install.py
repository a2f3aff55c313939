"""tools/install.py: what pip is asked for on which machine. pip is a stand-in; nothing is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from types import ModuleType

import pytest

from hotloop.harness.gpu.devices import Signs
from hotloop.harness.gpu.toolchain import Build
from hotloop.harness.paths import project_root


class Machine:
    """What is installed on a machine, and what its indexes give.

    Attributes:
        gives: requirement of torch -> the build that pip then installs; what is not there fails.
    """

    def __init__(self) -> None:
        self.torch, self.triton = "", ""
        self.build: Build | None = None
        self.gives: dict[str, Build] = {}
        self.asked: list[str] = []

    def version(self, name: str) -> str:
        found = {"torch": self.torch, "triton": self.triton}[name]
        if not found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    def pip(self, *args: str) -> bool:
        self.asked.append(" ".join(args))
        torch = next((a for a in args if a.startswith("torch=")), "")
        if not torch:
            return True
        if torch not in self.gives:
            return False
        self.build = self.gives[torch]
        self.torch = self.build.version
        self.triton = next(a for a in args if a.startswith("triton=")).removeprefix("triton==")
        return True


NOTHING = Signs()


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", project_root() / "tools" / "install.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def on(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    def make(driver: str = "", found: Signs = NOTHING, arch: str = "x86_64") -> Machine:
        machine = Machine()
        monkeypatch.setattr(tool, "pip", machine.pip)
        monkeypatch.setattr(tool, "torch_build", lambda: machine.build)
        monkeypatch.setattr(tool.importlib.metadata, "version", machine.version)
        monkeypatch.setattr(tool, "driver_version", lambda: driver)
        monkeypatch.setattr(tool, "signs", lambda: found)
        monkeypatch.setattr(tool.platform, "machine", lambda: arch)
        return machine

    return make


CPU, CUDA13 = Build("2.13.0+cpu"), Build("2.13.0", "13.0")
CU126, CU128 = Build("2.13.0+cu126", "12.6"), Build("2.11.0+cu128", "12.8")
REST = ["-r requirements/lock.txt", "--no-deps --no-build-isolation -e ."]


@pytest.mark.parametrize(
    ("driver", "gives", "asked"),
    [
        ("", {"torch==2.13.0+cpu": CPU}, ["torch==2.13.0+cpu triton==3.7.1"]),
        # PyTorch's own index is out of reach.
        ("", {"torch==2.13.0": CUDA13},
         ["torch==2.13.0+cpu triton==3.7.1",
          "--extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu triton==3.7.1",
          "torch==2.13.0 triton==3.7.1"]),
        ("580.65.06", {"torch===2.13.0": CUDA13}, ["torch===2.13.0 triton==3.7.1"]),
        # A mirror that gives a CPU build all the same: PyTorch's own index is asked.
        ("580.65.06", {"torch===2.13.0": CPU, "torch==2.13.0+cu130": Build("2.13.0+cu130", "13.0")},
         ["torch===2.13.0 triton==3.7.1",
          "--extra-index-url https://download.pytorch.org/whl/cu130 torch==2.13.0+cu130 triton==3.7.1"]),
        ("550.54.14", {"torch==2.13.0+cu126": CU126},
         ["--extra-index-url https://download.pytorch.org/whl/cu126 torch==2.13.0+cu126 triton==3.7.1"]),
        ("570.86.15", {"torch==2.11.0+cu128": CU128},
         ["--extra-index-url https://download.pytorch.org/whl/cu128 torch==2.11.0+cu128 triton==3.6.0"]),
    ],
)  # fmt: skip
def test_the_build_that_fits_is_installed(
    tool: ModuleType, on: Callable[..., Machine], driver: str, gives: dict[str, Build], asked: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    machine = on(driver)
    machine.gives = gives
    assert tool.main([]) == 0
    assert ("no index gave the CPU build" in capsys.readouterr().out) == (gives == {"torch==2.13.0": CUDA13})
    assert machine.asked == asked + REST
    # What fits is left alone.
    machine.asked.clear()
    assert tool.main([]) == 0
    assert machine.asked == REST


def test_a_cpu_build_on_a_machine_with_a_gpu_is_replaced_or_refused(
    tool: ModuleType, on: Callable[..., Machine], capsys: pytest.CaptureFixture[str]
) -> None:
    machine = on("580.65.06")
    machine.torch, machine.triton, machine.build = "2.13.0+cpu", "3.7.1", CPU
    machine.gives = {"torch===2.13.0": CPU, "torch==2.13.0+cu130": CPU}
    assert tool.main([]) == 1
    assert "torch 2.13.0+cpu is a build for CPUs" in capsys.readouterr().err
    assert len(machine.asked) == 2 and REST[0] not in machine.asked
    machine.asked.clear()
    assert tool.main(["--cpu"]) == 0  # which is asked for
    assert machine.asked == REST


def test_a_build_for_a_newer_driver_is_replaced(tool: ModuleType, on: Callable[..., Machine]) -> None:
    machine = on("550.54.14")
    machine.torch, machine.triton, machine.build = "2.13.0", "3.7.1", CUDA13
    machine.gives = {"torch==2.13.0+cu126": CU126}
    assert tool.main([]) == 0
    assert machine.build == CU126


@pytest.mark.parametrize(
    ("driver", "found", "arch", "words"),
    [
        ("470.256.02", Signs(module=True), "x86_64", "update it to 580"),
        ("550.54.14", Signs(module=True), "aarch64", "on Arm needs driver 580"),
        ("", Signs(pci=True), "x86_64", "install NVIDIA's driver, 580 or newer"),
        ("", Signs(wsl=True), "x86_64", "driver on Windows"),
        ("580.65.06", Signs(module=True), "x86_64", "could not be installed; see pip's words"),
    ],
)  # fmt: skip
def test_what_cannot_be_installed_is_one_line(
    tool: ModuleType, on: Callable[..., Machine], capsys: pytest.CaptureFixture[str], driver: str, found: Signs,
    arch: str, words: str,
) -> None:  # fmt: skip
    on(driver, found, arch)
    assert tool.main([]) == 1
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1


def test_an_image_is_built_without_its_gpu(tool: ModuleType, on: Callable[..., Machine]) -> None:
    machine = on()
    machine.gives = {"torch===2.13.0": CUDA13}
    assert tool.main(["--driver", "580"]) == 0
    assert machine.build == CUDA13


def test_headers_and_compiler_are_asked_for_where_there_is_a_gpu(
    tool: ModuleType, on: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool, "header_trouble", lambda: "Python.h is not in /usr/include; install it: ...")
    for driver, lines in (("580.65.06", 1), ("", 0)):
        machine = on(driver)
        machine.gives = {"torch===2.13.0": CUDA13, "torch==2.13.0+cpu": CPU}
        assert tool.main([]) == 0
        err = capsys.readouterr().err
        assert len(err.splitlines()) == lines and err.count("Python.h is not in") == lines


def test_other_systems_are_refused(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool.sys, "platform", "darwin")
    assert tool.main([]) == 1
    assert capsys.readouterr().err == "hotloop: it needs Linux (on Windows: WSL2), and this is darwin\n"
