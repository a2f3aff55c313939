"""What of this machine's files a child gets to see: the system, the interpreter and the code, a GPU's device files.

And what it must not find there: the text that scores are made on.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hotloop.harness.data.dataset import BUILT_IN, Dataset
from hotloop.harness.data.packages import copies_below
from hotloop.harness.paths import import_root, project_root

if TYPE_CHECKING:
    from hotloop.harness.sandbox.policy import Sandbox

__all__ = [
    "ETC",
    "SYSTEM",
    "around",
    "device_nodes",
    "exposed",
    "exposed_text",
    "hidden_text",
    "python_and_code",
    "readable_text",
]

DEV = "/dev"
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/nix/store")
ETC = (
    "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/passwd", "/etc/group",
    "/etc/nsswitch.conf", "/etc/localtime", "/etc/os-release",
)  # fmt: skip


def python_and_code() -> list[str]:
    """The interpreter with its packages, and the sealed code: what a child imports. And CUDA, where settings say."""
    root = project_root()
    paths = [sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix)]
    paths += [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")]
    paths += [str(root / name) for name in ("harness", "kernels", "prepare.py")]
    paths.append(f"{import_root()}/hotloop")
    for variable in ("CUDA_HOME", "LD_LIBRARY_PATH"):
        paths += [p for p in os.environ.get(variable, "").split(":") if p.startswith("/") and p != "/"]
    return [p for p in dict.fromkeys(paths) if p != "/usr" and not p.startswith("/usr/")]


@functools.cache
def hidden_text() -> tuple[str, ...]:
    """Every copy of the built-in text that lies in what a child may read; no child may read these."""
    return tuple(copies_below([*(p for p in SYSTEM if not os.path.islink(p)), *python_and_code()]))


def around(paths: Iterable[str], hidden: Iterable[str | Path]) -> tuple[list[str], list[str]]:
    """Paths that cover `paths` but nothing `hidden`, and the folders in between, which may be listed and no more.

    Landlock can only allow, so a folder that holds something hidden is allowed entry by entry.
    """
    without = {Path(os.path.realpath(p)) for p in hidden}
    above = {parent for p in without for parent in p.parents}
    found, listed = dict[str, None](), dict[str, None]()

    def walk(path: Path) -> None:
        if path in without:
            return
        if path not in above:
            found[str(path)] = None
            return
        listed[str(path)] = None
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if not entry.is_symlink():  # where it leads is what counts
                    walk(Path(entry.path))

    for path in paths:
        walk(Path(os.path.realpath(path)))
    return list(found), list(listed)


def device_nodes(device: str, only: str = "", caps: Sequence[str] = ()) -> list[str]:
    """What a child on a device needs of /dev; with `only` that one GPU's file (and its part's) and no other's.

    dxg is the GPU of WSL2. The files of nvidia-caps are the rights to the parts of a divided GPU (MIG), which their own
    modes guard.
    """
    if device != "cuda":
        return []
    nodes = [only, *caps] if only else glob.glob(f"{DEV}/nvidia[0-9]*") + glob.glob(f"{DEV}/nvidia-caps/*")
    shared = [f"{DEV}/{name}" for name in ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "dxg")]
    return list(dict.fromkeys(sorted(nodes) + [p for p in shared if os.path.exists(p)]))


def exposed(path: Path) -> bool:
    """Whether children can read `path`, because it lies in a folder that they need."""
    return _below(path, *_readable())


def _readable() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The real paths that children can read below, and those below these that they cannot."""
    whole = (*SYSTEM, *ETC, *python_and_code())
    return tuple(os.path.realpath(p) + "/" for p in whole), tuple(os.path.realpath(p) + "/" for p in hidden_text())


def _below(path: Path, shown: tuple[str, ...], hidden: tuple[str, ...]) -> bool:
    real = os.path.realpath(path) + "/"
    return real.startswith(shown) and not real.startswith(hidden)


def exposed_text(dataset: Dataset) -> Path | None:
    """A file that a dataset was made of and that children can read; None where there is none any more, or never was."""
    if dataset.source in BUILT_IN:
        return None
    source = Path(dataset.source)
    folder = source if source.is_dir() else source.parent
    files = (folder / name for name in dataset.manifest["text"]["files"])
    readable = _readable()  # once: there may be very many files
    return next((f for f in files if _below(f, *readable) and f.exists()), None)


def readable_text(source: str, sandbox: Sandbox) -> str:
    """Why train.py may have read the text that it is scored on, so that its scores prove nothing; empty where not."""
    if sandbox.level == 0:
        return "at sandbox level L0 train.py can read the text that it is scored on"
    if source == "stdlib":
        return "the text is Python's own library, which train.py can read; prepare another one (--source)"
    return ""
