"""A profile: what one machine has proven and chosen of the implementations, as data.

    {"profile": {"depends": {...}, "packages": {...}, "selection": {...}, "configs": {...}, "measured": {...}, ...},
     "sha256": "..."}

    depends     what it holds for, name -> value: device, preset, versions, the kernels' sources; another value voids it
    packages    of others, run by what was chosen: distribution -> SHA-256 of its installed files
    selection   part -> implementation, of `kernels.dispatch.OPERATORS`; `threads` is a part too
    configs     kernel -> key -> launch configuration; measured: attention's order by shape
    table, whole, date    what was measured, for people

`hotloop tune` writes this machine's own, whole or not at all; `kernels/tuned/` ships others. The one of a machine with
other facts, a damaged one, and one whose packages are not what was proven is refused with its reason, and references
run. An agent's code never sees the file: the parent turns it into the environment that its children start with.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotloop.harness.data.dataset import cache_dir
from hotloop.harness.errors import DeviceError, SealError, UsageError
from hotloop.harness.files import write_whole
from hotloop.harness.gpu.nvml import Gpu
from hotloop.harness.machine import cpu_name, installed_hash, package_version
from hotloop.harness.paths import project_root
from hotloop.harness.records.chain import canonical
from hotloop.harness.records.seal import current_manifest
from hotloop.harness.sandbox.policy import Sandbox
from hotloop.harness.settings import Preset

__all__ = [
    "CHOSEN_BY_USER",
    "PACKAGES",
    "PASSED",
    "Machine",
    "Profile",
    "asked_otherwise",
    "enter",
    "facts",
    "find",
    "kept",
    "own_path",
    "read",
    "write",
]  # fmt: skip

# Implementations by others -> the distributions whose files run.
PACKAGES = {
    "flash2": ("flash-attn",),
    "flash3": ("flash_attn_3", "hotloop-flash3"),
    "flash4": ("flash-attn-4", "quack-kernels"),
    "cudnn": ("nvidia-cudnn-frontend",),
}
CHOSEN_BY_USER = ("HOTLOOP_KERNELS", "HOTLOOP_ATTENTION")
KEPT = "profile.json"
PASSED = "HOTLOOP_PROFILE"  # what `kernels.tuning` reads; where it is set, this program chose and not the user


@dataclass(frozen=True)
class Profile:
    """What was read from a profile's file, whole and undamaged; see the top of this file."""

    body: dict[str, Any]
    path: Path

    @property
    def sha256(self) -> str:
        return _digest(self.body)

    @property
    def selection(self) -> dict[str, str]:
        return dict(self.body["selection"])

    @property
    def threads(self) -> int | None:
        """CPU threads that it chose; None where it says nothing of them."""
        found = self.selection.get("threads")
        return int(found) if found else None

    def environment(self) -> dict[str, str]:
        """What children start with, so that what was chosen runs; nothing where that is what runs anyway."""
        anyway = {"step": "compiled" if self.body["depends"]["device"] == "cuda" else "eager"}
        chosen = {p: i for p, i in self.selection.items() if p not in ("threads", "attention") and anyway.get(p) != i}
        if not (chosen or self.body["configs"] or self.body["measured"]):
            return {}
        given = {k: self.body[k] for k in ("configs", "measured")} | {"sha256": self.sha256}
        return {
            "HOTLOOP_KERNELS": ",".join(["auto", *(f"{p}={i}" for p, i in sorted(chosen.items()))]),
            PASSED: canonical(given).decode(),
        }

    def refusal(self, here: Mapping[str, Any]) -> str:
        """Why it does not hold for a machine of these facts (see `facts`); empty where it does."""
        for name, was in self.body["depends"].items():
            if here.get(name) != was:
                return f"it was made with {name} {was}, and here it is {here.get(name, 'unknown')}"
        return self.changed_packages()

    def changed_packages(self) -> str:
        """Which package's installed files are not those that were proven, in words; empty for none."""
        for package, was in self.body["packages"].items():
            if installed_hash(package) != was:
                return f"the installed files of {package} are not those that it proved"
        return ""

    def verify(self) -> None:
        """Raises SealError where files of a package have changed: they are as read-only as the kernels."""
        if why := self.changed_packages():
            raise SealError(f"the profile {self.sha256[:12]} does not hold any more: {why}; run: hotloop tune")

    def as_record(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "selection": self.selection, "packages": self.body["packages"]}

    def keep(self, folder: Path) -> None:
        """Among an experiment's files, where a resumed night and a replay look for it: see `kept`."""
        write_whole(folder / KEPT, _text(self.body))


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(body)).hexdigest()


def _text(body: Mapping[str, Any]) -> str:
    return json.dumps({"profile": body, "sha256": _digest(body)}, indent=1, sort_keys=True) + "\n"


def facts(preset: Preset, device: str, gpu: Gpu | None) -> dict[str, Any]:
    """What a profile of this machine depends on; flat, JSON, and without an import of torch."""
    sealed = {k: v for k, v in current_manifest(project_root()).items() if re.fullmatch(r"kernels/.*\.py", k)}
    found = {
        "device": device,
        "preset": preset.name,
        "rows of a pass divided by": preset.batch_divisor,
        "torch": package_version("torch"),
        "kernels": hashlib.sha256(canonical(sealed)).hexdigest()[:16],
    }
    if device != "cuda" or gpu is None:
        return found | {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))}
    capability = ".".join(map(str, gpu.capability or ()))
    more = {"gpu": gpu.name, "compute capability": capability, "driver": gpu.driver}
    return found | more | {"triton": package_version("triton")}


def own_path(here: Mapping[str, Any]) -> Path:
    """Where this machine's own profile lies; one for each device and preset."""
    name = f"{here.get('gpu') or 'cpu ' + here['cpu']} {here['preset']}"
    return cache_dir() / "profiles" / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def read(path: Path) -> Profile:
    """Raises UsageError for what is no profile, or a damaged one."""
    try:
        found = json.loads(path.read_text())
        body = found["profile"]
        whole = found["sha256"] == _digest(body)
        for key in ("depends", "packages", "selection", "configs", "measured"):
            whole = whole and isinstance(body[key], dict)
    except OSError as e:
        raise UsageError(f"the profile {path} cannot be read: {e.strerror or e}") from None
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UsageError(f"the profile {path} is damaged")
    return Profile(body, path)


def write(path: Path, body: dict[str, Any]) -> Profile:
    write_whole(path, _text(body))
    return read(path)


def shipped() -> list[Profile]:
    return [read(p) for p in sorted((project_root() / "kernels" / "tuned").glob("*.json"))]


def asked_otherwise() -> str:
    """The variable by which the user chose implementations himself, who then gets no profile; empty for none."""
    if PASSED in os.environ:  # set by this program, for itself and its children
        return ""
    return next((name for name in CHOSEN_BY_USER if os.environ.get(name)), "")


def find(here: Mapping[str, Any]) -> tuple[Profile | None, str]:
    """(the profile that holds for a machine of these facts: its own, else a shipped one; a warning, or nothing)."""
    if asked_otherwise():
        return None, ""
    told = ""
    path = own_path(here)
    if path.exists():
        try:
            mine = read(path)
            if not (why := mine.refusal(here)):
                return mine, ""
            told = f"the profile {path} is not used: {why}; make a new one with: hotloop tune"
        except UsageError as e:
            told = f"{e}, and is not used; make a new one with: hotloop tune"
    return next((p for p in shipped() if not p.refusal(here)), None), told


def kept(folder: Path, sha256: str, here: Mapping[str, Any]) -> Profile | None:
    """The profile of a record; None for "".

    Args:
        folder: of its experiment.

    Raises:
        DeviceError: it is not there any more, or does not hold here now.
    """
    if not sha256:
        return None
    known = shipped()
    for path in (folder / KEPT, own_path(here)):
        with contextlib.suppress(UsageError):
            known.append(read(path))
    found = next((p for p in known if p.sha256 == sha256), None)
    why = f"it is not in {folder / KEPT}" if found is None else found.refusal(here)
    if why:
        raise DeviceError(
            f"{folder} was made under the profile {sha256[:12]}, and that does not hold here: {why}; scores would not "
            f"compare"
        )
    return found


def enter(profile: Profile | None) -> None:
    """Make this process's environment, and so that of every child, the profile's; or that of none."""
    if asked_otherwise():
        return
    for name in (*CHOSEN_BY_USER, PASSED):
        os.environ.pop(name, None)
    os.environ.update(profile.environment() if profile else {})


@dataclass(frozen=True)
class Machine:
    """What is tuned, and for what.

    Attributes:
        facts: what the profile depends on; see `facts`.
        threads: of the CPU that a trainer has by default.
    """

    preset: Preset
    device: str
    sandbox: Sandbox
    facts: dict[str, Any]
    threads: int

    @property
    def work(self) -> Path:
        """The folder of what was found so far."""
        return own_path(self.facts).with_suffix("")
