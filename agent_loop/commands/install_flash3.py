"""`hotloop install flash3`: FlashAttention 3 as others built it, checked file by file against a lock, as a package.

    {"repository": "kernels-community/flash-attn3", "revision": "<40 hex digits>",
     "folder": "build/<variant of torch, CUDA and platform>/flash_attn3", "files": {"<name>": "<its SHA-256>", ...}}

The lock is the user's: hotloop ships none, for it vouches for no file that it has not seen. Nothing is installed before
every file has its hash. They become a wheel, which pip installs without a network, so `pip uninstall hotloop-flash3`
takes it away and pip's list of hashes goes into every record. At run time nothing is fetched.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotloop.harness.errors import HotloopError, UsageError

__all__ = ["DISTRIBUTION", "Lock", "build", "install", "read_lock"]

DISTRIBUTION = "hotloop-flash3"
HUB = "https://huggingface.co"
INTERFACE = "flash_attn_interface.py"
MOST_BYTES = 4 << 30
TIMEOUT_S = 60.0
# What `kernels.attend.libraries` imports: the name that a build from source has too.
FRONT = "from hotloop_flash3.flash_attn_interface import _flash_attn_backward, _flash_attn_forward  # noqa: F401\n"


@dataclass(frozen=True)
class Lock:
    """What may be installed: files of one folder of one revision, name -> SHA-256."""

    repository: str
    revision: str
    folder: str
    files: dict[str, str]

    @property
    def version(self) -> str:
        """Of the package: the revision, and a digest of the hashes."""
        digest = hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()
        return f"3+{self.revision[:12]}.{digest[:12]}"


def read_lock(path: Path) -> Lock:
    """Raises UsageError with what is wrong with it."""
    try:
        found = json.loads(path.read_text())
        lock = Lock(found["repository"], found["revision"], found["folder"], dict(found["files"]))
    except OSError as e:
        raise UsageError(f"the lock {path} cannot be read: {e.strerror}") from None
    except (ValueError, TypeError, KeyError) as e:
        raise UsageError(
            f"{path} is no lock: {type(e).__name__}: {e}; agent_loop/commands/install_flash3.py shows its form"
        ) from None
    parts = {
        "repository": (lock.repository, r"[\w.-]+/[\w.-]+"),
        "revision": (lock.revision, r"[0-9a-f]{40}"),
        "folder": (lock.folder, r"(?!.*\.\.)[\w.-]+(/[\w.-]+)*"),
        **{f"name {name!r}": (name, r"(?!.*\.\.)[\w-][\w.-]*(/[\w-][\w.-]*)*") for name in lock.files},
        **{f"SHA-256 of {name}": (digest, r"[0-9a-f]{64}") for name, digest in lock.files.items()},
    }
    for what, (value, form) in parts.items():
        if not isinstance(value, str) or not re.fullmatch(form, value, re.ASCII):
            raise UsageError(f"{path}: {value!r} is no {what}; the lock names a commit, and each file by its SHA-256")
    if not {INTERFACE, "__init__.py"} <= lock.files.keys():
        raise UsageError(f"{path} lacks {INTERFACE} or __init__.py: its folder is no build of FlashAttention 3")
    return lock


def _content(lock: Lock, name: str, source: Path | None) -> bytes:
    """Of a file, from a folder or from the hub, if it is what the lock says. Raises HotloopError."""
    place = str(source / name) if source else f"{HUB}/{lock.repository}/resolve/{lock.revision}/{lock.folder}/{name}"
    try:
        if source:
            data = (source / name).read_bytes()
        else:
            with urllib.request.urlopen(place, timeout=TIMEOUT_S) as answer:
                data = answer.read(MOST_BYTES)
    except OSError as e:
        raise HotloopError(f"{place} cannot be had ({e}); a folder that has the files will do: --from FOLDER") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != lock.files[name]:
        raise HotloopError(
            f"{place} has the SHA-256 {digest}, not the lock's {lock.files[name]}; nothing was installed"
        )
    return data


def build(lock: Lock, source: Path | None, folder: Path) -> Path:
    """A wheel of the checked files in `folder`. Raises HotloopError for a file that is missing or is another."""
    files = {f"hotloop_flash3/{name}": _content(lock, name, source) for name in sorted(lock.files)}
    files[INTERFACE] = FRONT.encode()
    name = DISTRIBUTION.replace("-", "_")
    about = f"{name}-{lock.version}.dist-info"
    files[f"{about}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {lock.version}\n"
        f"Summary: {lock.repository} at {lock.revision}, {lock.folder}\n"
    ).encode()
    files[f"{about}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: hotloop\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{path},sha256={_urlsafe(data)},{len(data)}\n" for path, data in files.items())
    files[f"{about}/RECORD"] = f"{record}{about}/RECORD,,\n".encode()
    wheel = folder / f"{name}-{lock.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return wheel


def _urlsafe(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def install(lock: Lock, source: Path | None = None, pip: tuple[str, ...] = ()) -> str:
    """Build and install; returns the version. `pip`: further arguments of pip's.

    Raises:
        HotloopError: a file is missing or another, another FlashAttention 3 is installed, or pip fails.
    """
    if importlib.util.find_spec("flash_attn_interface") and not importlib.util.find_spec("hotloop_flash3"):
        raise HotloopError("another flash_attn_interface is installed, which hotloop takes; remove that one first")
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(lock, source, Path(folder))
        args = ("install", "--quiet", "--no-index", "--no-deps", "--force-reinstall", *pip, str(wheel))
        done: Any = subprocess.run([sys.executable, "-m", "pip", *args], capture_output=True, text=True)
    if done.returncode:
        raise HotloopError(f"pip did not install it: {' '.join(done.stderr.split())[-300:]}")
    return lock.version
