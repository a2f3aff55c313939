"""What the compilers of a kept experiment made, so that the next one need not make it again.

    trainer: collect()      the files of its private compiler caches, before it is given its first real token
    parent:  Store.leave()  hashed and kept beside the experiment; `Store.settle` promotes it when its commit is kept
    parent:  Store.load()   checked against its manifest and against this machine, or set aside
    trainer: lay_out()      into its private caches, before train.py is imported

These files are code that an untrusted train.py made and that a later, equally untrusted one runs, in the same sandbox:
they may do what any train.py may do. Evaluators, the pre-flight and replays never get them. Nothing of the data can
be in them, because they arrive before the first real token is served. What a train.py carries as literals could be, so
a chain of caches made from caches has at most GENERATIONS links; then one is made from nothing again.

A pack is three parts: the SHA-256 of the second, 64 digits and a line feed; one line of JSON with `files`, a list of
[name, size, SHA-256], and what the parent says of it; the contents one after the other. Nothing here is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotloop.harness.records.chain import canonical
from hotloop.harness.records.model import PackFacts
from hotloop.harness.training.trainer import Setup

__all__ = ["GENERATIONS", "PACK", "Pack", "Store", "collect", "decode", "encode", "lay_out"]

GENERATIONS = 4
PACK = "compiled.pack"  # beside an experiment's other files, until it is decided
MOST_FILES = 50_000
FOLDERS = {"inductor": "TORCHINDUCTOR_CACHE_DIR", "triton": "TRITON_CACHE_DIR"}
_HEADER_BYTES = 16 << 20
_NAME = re.compile(r"(inductor|triton)(/(?!\.{1,2}(/|$))[\w.@+=,~-]{1,200}){1,12}", re.ASCII)


@dataclass(frozen=True)
class Pack:
    """A pack that was checked. `about`: `facts` and `generation`, where the parent made it."""

    data: bytes
    about: dict[str, Any]
    files: dict[str, memoryview]

    def recorded(self) -> PackFacts:
        """For the record."""
        return PackFacts(
            key=_key(self.about["facts"]), generation=self.about["generation"], files=len(self.files),
            bytes=len(self.data), sha256=hashlib.sha256(self.data).hexdigest(),
        )  # fmt: skip


def encode(files: dict[str, Any], **about: Any) -> bytes:
    """A pack of the files, name -> bytes."""
    names = sorted(files)
    listed = [[name, len(files[name]), hashlib.sha256(files[name]).hexdigest()] for name in names]
    header = canonical(about | {"files": listed})
    return b"".join([hashlib.sha256(header).hexdigest().encode(), b"\n", header, b"\n", *(files[n] for n in names)])


def decode(data: bytes, most: int) -> Pack:
    """Check a pack of at most `most` bytes. Raises ValueError with what is wrong."""
    if len(data) > most:
        raise ValueError(f"it is too large: more than {most} bytes")
    end = data.find(b"\n", 65, 65 + _HEADER_BYTES)
    if end < 0 or data[64:65] != b"\n" or hashlib.sha256(data[65:end]).hexdigest().encode() != data[:64]:
        raise ValueError("its list of files is damaged")
    try:
        header = json.loads(data[65:end])
        listed = [(str(name), int(size), str(digest)) for name, size, digest in header.pop("files")]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        raise ValueError("its list of files is none") from None
    if len(listed) > MOST_FILES:
        raise ValueError(f"it has {len(listed)} files; at most {MOST_FILES} are used")
    files: dict[str, memoryview] = {}
    at, view = end + 1, memoryview(data)
    for name, size, digest in listed:
        if not _NAME.fullmatch(name) or name in files or size < 0:
            raise ValueError(f"it has a file of a name or size that no cache has: {name[:60]!r}")
        content = view[at : at + size]
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"its {name} is damaged")
        files[name] = content
        at += size
    if at != len(data):
        raise ValueError(f"it ends with {len(data) - at} bytes of no file")
    return Pack(data, header, files)


# The trainer's side.


def collect(most: int) -> bytes:
    """This process's compiler caches, regular files only, as a pack; as one without files where that is too large."""
    files: dict[str, bytes] = {}
    total = 0
    for prefix, variable in FOLDERS.items():
        base = os.environ.get(variable, "")
        for root, _, names in os.walk(base) if base else ():
            for name in names:
                path = os.path.join(root, name)
                key = f"{prefix}/{os.path.relpath(path, base)}"
                if name.endswith(".lock") or not _NAME.fullmatch(key) or not stat.S_ISREG(os.lstat(path).st_mode):
                    continue
                with open(path, "rb") as f:
                    files[key] = f.read()
                total += len(files[key])
                if total > most or len(files) > MOST_FILES:
                    return encode({}, too_large=True)
    data = encode(files)
    return data if len(data) <= most else encode({}, too_large=True)


def lay_out(data: bytes) -> None:
    """Write the files of a pack that the parent sent into this process's compiler caches. Raises ValueError."""
    for name, content in decode(data, len(data)).files.items():
        prefix, _, rest = name.partition("/")
        path = Path(os.environ[FOLDERS[prefix]]) / rest
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


# The parent's side.


class Store:
    """The promoted packs of a night: one file for each device, set of versions and way to start a trainer."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def load(self, setup: Setup) -> tuple[Pack | None, str]:
        """What a trainer of this setup may be given, or None; and a line about what was set aside, where it was.

        Raises:
            SealError: the code is not what its seal says.
        """
        facts = _facts(setup)
        path = self.root / f"{_key(facts)}.pack"
        try:
            with open(path, "rb") as f:  # one byte more than may be tells that there are too many
                pack = decode(f.read(setup.limits.compiled_bytes + 1), setup.limits.compiled_bytes)
            if pack.about.get("facts") != facts:
                raise ValueError(f"it was made elsewhere ({_difference(pack.about.get('facts'), facts)})")
            if not isinstance(pack.about.get("generation"), int):
                raise ValueError("it does not say its generation")
        except FileNotFoundError:
            return None, ""
        except (ValueError, OSError) as e:
            with contextlib.suppress(OSError):
                os.replace(path, path.with_suffix(".set-aside"))
            return None, f"the compile cache {path} was set aside, {e}; what is needed is compiled again"
        return pack, ""

    def leave(self, pack: Pack, setup: Setup, given: Pack | None, folder: Path) -> tuple[Pack | None, str]:
        """Write down what a trainer sent, until its experiment is decided; None where it may not be promoted.

        Returns:
            The pack with what this machine is, and a line where it was too large.

        Raises:
            OSError: it cannot be written.
        """
        most = setup.limits.compiled_bytes
        generation = 1 + (given.about["generation"] if given else 0)
        if generation > GENERATIONS or not (pack.files or pack.about.get("too_large")):
            return None, ""
        data = encode(pack.files, facts=_facts(setup), generation=generation)
        if pack.about.get("too_large") or len(data) > most:
            return None, f"its compile cache is larger than {most} bytes and was not taken"
        (folder / PACK).write_bytes(data)
        return decode(data, most), ""

    def settle(self, folder: Path, left: PackFacts | None, kept: bool) -> None:
        """An experiment was decided: what it left takes the place of the last, or goes. May be done again.

        One that is kept and left nothing (it was the last link of a chain) takes the last away: the next pack is made
        from nothing.

        Args:
            left: the pack, as the record has it.

        Raises:
            OSError: a file cannot be moved or removed.
        """
        path = folder / PACK
        if kept and left:
            if path.exists():  # else this was done before
                self.root.mkdir(parents=True, exist_ok=True)
                os.replace(path, self.root / f"{left.key}.pack")
            return
        path.unlink(missing_ok=True)
        if kept:
            for old in self.root.glob("*.pack"):
                old.unlink(missing_ok=True)


def _facts(setup: Setup) -> dict[str, Any]:
    """Whatever compiled code depends on, as JSON has it."""
    facts = setup.facts()
    machine = facts["machine"]
    gpu = {k: v for k, v in (machine["gpu"] or {}).items() if k != "uuid"}  # a like card runs it as well
    found = {
        "device": gpu or machine["cpu"], "versions": machine["versions"], "packages": machine["packages"],
        "python": machine["python"], "os": machine["os"], "seal": facts["seal"], "threads": setup.threads,
        "sandbox": setup.sandbox.as_dict()["how"], "environment": facts["environment"],
    }  # fmt: skip
    return dict(json.loads(canonical(found)))


def _key(facts: Any) -> str:
    return hashlib.sha256(canonical(facts)).hexdigest()[:16]


def _difference(had: Any, have: dict[str, Any]) -> str:
    had = had if isinstance(had, dict) else {}
    names = [k for k in have if had.get(k) != have[k]]
    return "another " + ", ".join(names) if names else "with facts of its own"
