"""What a GPU needs beside its driver: a build of torch that fits it, Python's headers and a C compiler.

Triton compiles a small C file against Python.h when it first launches a kernel. Nothing here imports more than the
standard library, for tools/install.py asks before anything is installed; what decides is in functions of plain values.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "TESTED", "Build", "Install", "build_trouble", "compiler_package", "compiler_trouble", "compiles", "driver_in",
    "driver_version", "header_package", "header_trouble", "installs", "missing", "read_build", "torch_build",
]  # fmt: skip

# Pairs of torch and triton that belong together and are tested. The first is what gets installed.
TESTED = {"2.13.0": "3.7.1", "2.11.0": "3.6.0"}
LIMIT_S = 60.0  # for a compiler
INDEX = "https://download.pytorch.org/whl/"
# The oldest driver for the CUDA of a build, by its major version (NVIDIA's minor version compatibility).
LEAST_DRIVER = {13: 580, 12: 525, 11: 450}
MAKE_FIT = f"{sys.executable} tools/install.py"


@dataclass(frozen=True)
class Build:
    """What torch was built for: `cuda` and `hip` (AMD) versions, empty where it was not."""

    version: str
    cuda: str = ""
    hip: str = ""


@dataclass(frozen=True)
class Install:
    """What pip is asked for; `index` is an extra one, empty for those that are configured."""

    torch: str
    triton: str
    index: str = ""


def read_build(text: str) -> Build:
    """From the text of torch/version.py."""
    found = dict(re.findall(r"^(\w+)\s*(?::[^=]*)?=\s*['\"]([^'\"]*)['\"]", text, re.MULTILINE))
    return Build(found.get("__version__", "unknown"), found.get("cuda", ""), found.get("hip") or found.get("rocm", ""))


def torch_build() -> Build | None:
    """Of the torch that is installed, without importing it; None without one."""
    try:
        path = importlib.metadata.distribution("torch").locate_file("torch/version.py")
        return read_build(Path(str(path)).read_text())
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None


def build_trouble(build: Build | None, driver: str, cuda: int | None = None) -> str:
    """Why this torch cannot use a GPU with this driver, and the cure; empty where it can.

    Args:
        driver: its version; empty where it is not known.
        cuda: the newest CUDA that the driver's library offers, such as 12040; None where it is not known. It may be
            newer than the driver, where NVIDIA's compatibility package is installed.
    """
    if build is None:
        return f"torch is not installed; run: {MAKE_FIT}"
    if not build.cuda:
        return f"torch {build.version} is a build for CPUs; run: {MAKE_FIT}"
    major = int(build.cuda.split(".")[0])
    least = LEAST_DRIVER.get(major, 0)
    fits = cuda // 1000 >= major if cuda else _major(driver) is None or (_major(driver) or 0) >= least
    if fits:
        return ""
    return (
        f"torch {build.version} is a build for CUDA {build.cuda}, which needs driver {least} or newer, and this one is "
        f"{driver or 'older'}; update the driver, or take a build that fits: {MAKE_FIT}"
    )


def _major(driver: str) -> int | None:
    number = driver.split(".")[0]
    return int(number) if number.isdigit() else None


def installs(driver: str, machine: str) -> list[Install]:
    """The builds of torch for a GPU with this driver, in the order in which they are to be tried.

    `===` takes that very version: `==2.13.0` would also take a `2.13.0+cpu` that some index offers.

    Args:
        driver: such as 570.86.15.
        machine: x86_64 or aarch64.

    Raises:
        ValueError: there is none; one line with the cure.
    """
    version = _major(driver)
    (torch, triton), (older, older_triton) = TESTED.items()
    if version is None:
        raise ValueError(f"{driver!r} is not the version of a driver, such as 580.65.06")
    if machine not in ("x86_64", "aarch64"):
        raise ValueError(f"there is no torch with CUDA for {machine}")
    own = Install(f"torch=={torch}+cu130", triton, INDEX + "cu130")
    if version >= 580:
        # On Arm what PyPI offers has been a build for CPUs, so the index that says its CUDA comes first.
        plain = Install(f"torch==={torch}", triton)
        return [plain, own] if machine == "x86_64" else [own, plain]
    if machine != "x86_64":
        raise ValueError(f"torch with CUDA on Arm needs driver 580 or newer, and this one is {driver}; update it")
    if version >= 570:  # the first that knows Blackwell, which CUDA 12.6 does not
        return [Install(f"torch=={older}+cu128", older_triton, INDEX + "cu128")]
    if version >= LEAST_DRIVER[12]:
        return [Install(f"torch=={torch}+cu126", triton, INDEX + "cu126")]
    raise ValueError(f"no tested torch works with driver {driver}; update it to 580 or newer (525 at the least)")


def driver_in(text: str) -> str:
    """The version in /proc/driver/nvidia/version; empty where there is none."""
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d+(?:\.\d+)+)", text)
    return found.group(1) if found else ""


def driver_version(proc: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The NVIDIA driver's version, of the kernel module, or (as in WSL) of its library; empty without one."""
    try:
        if found := driver_in(proc.read_text()):
            return found
    except OSError:
        pass
    for name in ("libnvidia-ml.so.1", "/usr/lib/wsl/lib/libnvidia-ml.so.1"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        text = ctypes.create_string_buffer(80)
        if library.nvmlInit_v2() == 0 and library.nvmlSystemGetDriverVersion(text, 80) == 0:
            return text.value.decode()
    return ""


def header_trouble() -> str:
    """Why Triton would not find Python.h, and the cure; empty where it is there."""
    folder = _include()
    if (Path(folder) / "Python.h").exists():
        return ""
    return f"Python.h is not in {folder}; {header_package(sys.base_prefix, sys.version_info[:2], _os_release())}"


def _include() -> str:
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # as Triton asks on Debian
    return sysconfig.get_paths(scheme=scheme)["include"]


def header_package(prefix: str, version: tuple[int, int], os_release: str) -> str:
    """What to install for Python.h.

    Args:
        prefix: of the interpreter, below any virtual environment.
        os_release: the text of /etc/os-release.
    """
    number = f"{version[0]}.{version[1]}"
    if prefix != "/usr":
        return f"the Python in {prefix} came without headers; take one that has them, such as uv's or pyenv's"
    family = _family(os_release)
    if family == "debian":
        return f"install it: apt-get install python{number}-dev (or python3-dev, for the system's own Python)"
    if family == "fedora":
        return f"install it: dnf install python3-devel (or python{number}-devel, where that is not the system's own)"
    if family == "suse":
        return f"install it: zypper install python{version[0]}{version[1]}-devel"
    return f"install the headers of Python {number} (a package called python3-dev or python3-devel)"


def missing() -> str:
    """What Triton would miss here when it first launches a kernel, and how to install it; empty where it can build."""
    return header_trouble() or compiler_trouble() or compiles()


def compiler_trouble() -> str:
    """Why Triton would not find a C compiler, and the cure; empty where there is one."""
    asked = os.environ.get("CC")
    if asked:
        words = asked.split()
        return "" if words and shutil.which(words[0]) else f"CC={asked} is not a program; unset it or name a C compiler"
    if shutil.which("gcc") or shutil.which("clang"):
        return ""
    return f"there is no C compiler; install one: {compiler_package(_os_release())}"


def compiles() -> str:
    """Try it: why a file that includes Python.h cannot be compiled and linked; empty where it can."""
    compiler = (os.environ.get("CC") or shutil.which("gcc") or "clang").split()
    with tempfile.TemporaryDirectory(prefix="hotloop-") as folder:
        source = Path(folder) / "try.c"
        source.write_text("#include <Python.h>\nint probe(void) { return Py_IsInitialized(); }\n")
        flags = ["-shared", "-fPIC", f"-I{_include()}", "-o", f"{folder}/try.so"]
        try:
            done = subprocess.run([*compiler, str(source), *flags], capture_output=True, text=True, timeout=LIMIT_S)
        except (OSError, subprocess.TimeoutExpired) as e:
            return f"{compiler[0]} does not work ({e}); install: {compiler_package(_os_release())}"
    if done.returncode == 0:
        return ""
    words = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given").strip()
    return f"{compiler[0]} cannot compile ({words[:120]}); install: {compiler_package(_os_release())}"


def compiler_package(os_release: str) -> str:
    """The command that installs a C compiler with the headers of the C library."""
    return {
        "debian": "apt-get install build-essential (or gcc and libc6-dev)",
        "fedora": "dnf install gcc",
        "suse": "zypper install gcc",
        "arch": "pacman -S gcc",
    }.get(_family(os_release), "gcc, by your system's package manager")


def _family(os_release: str) -> str:
    names = re.findall(r"^ID(?:_LIKE)?=[\"']?([^\"'\n]*)", os_release, re.MULTILINE)
    known = {
        "debian": "debian", "ubuntu": "debian", "fedora": "fedora", "rhel": "fedora", "centos": "fedora",
        "amzn": "fedora", "suse": "suse", "opensuse": "suse", "arch": "arch",
    }  # fmt: skip
    return next((known[n] for words in names for n in words.split() if n in known), "")


def _os_release() -> str:
    try:
        return Path("/etc/os-release").read_text()
    except OSError:
        return ""
