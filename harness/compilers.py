"""The C compiler and headers that Triton needs at its first launch, and the packages that have them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

__all__ = ["missing"]

# Package manager -> how to install with it, a compiler with its C library, the headers of this Python.
_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
_PACKAGES = {
    "apt-get": ("apt-get install", "gcc libc6-dev", f"python{_VERSION}-dev"),
    "dnf": ("dnf install", "gcc glibc-devel", f"python{_VERSION}-devel"),
    "zypper": ("zypper install", "gcc glibc-devel", f"python{_VERSION.replace('.', '')}-devel"),
    "pacman": ("pacman -S", "gcc", "python"),
    "apk": ("apk add", "gcc musl-dev", "python3-dev"),
}
LIMIT_S = 60.0


def missing() -> str:
    """What Triton would miss here, and how to install it, in one line; empty where it can build.

    It looks for a compiler as Triton does (CC, gcc, clang), and has it build a file that includes Python.h.
    """
    install, compiler, headers = next(
        (v for k, v in _PACKAGES.items() if shutil.which(k)), ("install", "gcc", "Python.h")
    )
    wanted = os.environ.get("CC")
    cc = shutil.which(wanted) if wanted else shutil.which("gcc") or shutil.which("clang")
    if cc is None:
        what = f"CC names {wanted!r}, which is not there" if wanted else "there is no C compiler (gcc or clang)"
        return f"{what}; Triton builds a C file at its first launch: {install} {compiler}"
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").is_file():
        return f"there is no Python.h in {include}; Triton builds a C file that includes it: {install} {headers}"
    with tempfile.TemporaryDirectory(prefix="hotloop-cc-") as folder:
        source = Path(folder) / "probe.c"
        source.write_text("#include <Python.h>\nint probe(void) { return Py_IsInitialized(); }\n")
        argv = [cc, str(source), "-shared", "-fPIC", "-I", str(include), "-o", f"{folder}/probe.so"]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT_S)
        except (OSError, subprocess.TimeoutExpired) as e:
            return f"{cc} does not work ({e}); {install} {compiler}"
    if done.returncode == 0:
        return ""
    words = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
    return f"{cc} cannot build a file that includes Python.h ({words}): {install} {compiler} {headers}"
