"""The record of a night: an append-only file of JSON lines, each with the hash of the one before.

    {"seq": 3, "time": "...", "kind": "experiment", "body": {...}, "prev": "<hash>", "hash": "<hash>"}

`hash` is the SHA-256 of the line's canonical JSON without `hash` and `signature`, so no line can be changed, dropped or
moved without breaking the chain. Where the user has a key (`harness.records.signing`) each entry names it as its
`signer` and carries the `signature` of its hash, so that nobody else can write the chain anew. A torn last line (the
process or the machine died while writing) is cut off when the file is opened; anything else that does not verify is an
error. The file carries a ballast beside it, freed when the disk is full, so that the experiment that has just ended can
still be recorded.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import gc
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from hotloop.harness.errors import DiskFullError, LockedError, RecordError
from hotloop.harness.records import heads
from hotloop.harness.records.signing import Signer, load_signer, verified

__all__ = ["FAILURES", "GENESIS", "OPEN_TEXT", "Chain", "Lock", "Outcome", "canonical", "version"]

GENESIS = "0" * 64
FAILURES = ("crash", "invalid", "overtime", "timeout", "oom", "nan", "raced")
BALLAST_BYTES = 1 << 20
OPEN_TEXT = "not safe against cheating"  # how the warning begins that train.py could read what it is scored on


@dataclass
class Outcome:
    """What the harness says of one experiment: the body of its `experiment` entry.

    `status` is `ok` or one of FAILURES; `reason` and `log_tail` say why. Scores are None unless ok.
    `ledger` holds the parent's seconds for start, import, compile, calibrate, train, submit, evaluate
    and audit. `start` says `how` the trainer was started, `cold` or (made ready ahead of time) `warm`; the seconds
    that the latter took meanwhile, `prepared_s`; and `because`, why not warm where that was wanted.
    `compiled` says of the compile cache which pack was `given`, which was `left`, and a `note` on what was refused.
    `conditions` says under which it ran (`harness.training.conditions`); `device_s` in it is the training by its
    device's clock, which is the trainer's word, and `device_wall_s` the same by the parent's.
    `val_bpb_reference` is val_bpb with the bytes that karpathy/autoresearch counts.
    `data` says of the prepared folder its source, packing, the share of the train split's tokens that is in rows, and
    how often the training went through the rows (`epochs`).
    `holdout_bpb` is never shown to an agent.
    """

    number: int
    tag: str
    kind: str  # baseline | repeat | experiment | replay | single
    commit: str
    parent: str
    description: str
    seed: int
    preset: str
    device: str
    source_sha256: str
    status: str = "crash"
    reason: str = ""
    log_tail: list[str] = field(default_factory=list)
    val_bpb: float | None = None
    val_bpb_reference: float | None = None
    holdout_bpb: float | None = None
    budget: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    steps: int = 0
    tokens_per_s: float = 0.0
    training_s: float = 0.0
    training_cpu_s: float = 0.0
    total_s: float = 0.0
    peak_mb: float = 0.0
    mfu_percent: float | None = None
    num_params: int = 0
    depth: int | None = None
    weights_sha256: str = ""
    curve: list[list[float]] = field(default_factory=list)  # [progress, loss] as the trainer said
    ledger: dict[str, float] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    compiled: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)  # see harness.training.conditions
    environment: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    seals: dict[str, str] = field(default_factory=dict)
    sandbox: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def profile(self) -> str:
        """The hash of the profile that it ran under; empty for none."""
        return str((self.environment.get("profile") or {}).get("sha256", ""))

    @property
    def repeatable(self) -> bool:
        """Whether its training was asked for results that repeat to the bit, as all were before there was a choice."""
        return bool(self.environment.get("repeatable", True))

    @property
    def fusions(self) -> str:
        """What the kernels' compiler pass found, as the trainer said: "mlp 8 of 8, ..."; empty where nothing was
        compiled.
        """
        told = self.environment.get("kernels", {})
        return str(told.get("fusions", "")) if isinstance(told, dict) else ""

    @property
    def open_text(self) -> str:
        """The warning that train.py could read the text that it was scored on; empty where it could not."""
        return next((w for w in self.conditions.get("warnings", []) if w.startswith(OPEN_TEXT)), "")

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> Outcome:
        """Raises RecordError for a body that another version wrote, with fields that are unknown here."""
        try:
            return cls(**body)
        except TypeError:
            known = {f.name: f for f in fields(cls)}
            unknown = ", ".join(sorted(set(body) - set(known)))
            missing = ", ".join(n for n in known if n not in body and known[n].default is MISSING
                                and known[n].default_factory is MISSING)  # fmt: skip
            what = f"has fields that this version does not know ({unknown})" if unknown else f"has no {missing}"
            versions = (body.get("environment") or {}).get("versions") or {}
            raise RecordError(
                f"the record of experiment {body.get('number', '?')} {what}: it was written by hotloop "
                f"{versions.get('hotloop', 'of another version')}, and this is {version()}; use the version that wrote "
                f"it, or a newer one"
            ) from None


def version() -> str:
    """Of hotloop, as it is installed; empty where it is not."""
    try:
        return importlib.metadata.version("hotloop")
    except importlib.metadata.PackageNotFoundError:
        return ""


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces; refuses NaN, so a record is always standard JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _digest(entry: dict[str, Any]) -> str:
    return hashlib.sha256(canonical({k: v for k, v in entry.items() if k not in ("hash", "signature")})).hexdigest()


def _digest_of_line(line: bytes, entry: dict[str, Any]) -> str:
    """The same of a line as `append` wrote it, without writing its JSON anew: most of the time of a long night's start.

    A hash cannot stand in the text that it is the hash of, so the first place where it is found is its own.
    """
    for key in ("hash", "signature"):
        if key in entry:
            line = line.replace(f',"{key}":"{entry[key]}"'.encode(), b"", 1)
    return hashlib.sha256(line).hexdigest()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Millions of new objects, none of them garbage: the collector would take longer than the parsing."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # nor at any later time
        if was:
            gc.enable()


class Chain:
    """An open record file. `entries` is what it holds; `append` adds one and returns it."""

    def __init__(self, path: Path, entries: list[dict[str, Any]], size: int, cut: int) -> None:
        self.path = path
        self.signer: Signer | None = None
        self.entries = entries
        self.cut_bytes = cut  # bytes of a torn last line that opening removed
        self._size = size

    @classmethod
    def read(cls, path: Path) -> Chain:
        """Verify a file without touching it. Raises RecordError where the chain is broken."""
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raw = b""
        except OSError as e:
            raise RecordError(f"{path} cannot be read: {e.strerror or e}") from None
        whole = raw.rfind(b"\n") + 1
        with _no_garbage_collection():
            entries = cls._entries(path, raw[:whole].splitlines())
        return cls(path, entries, whole, len(raw) - whole)

    @staticmethod
    def _entries(path: Path, lines: list[bytes]) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        prev = GENESIS
        for i, line in enumerate(lines):
            try:
                entry = json.loads(line)
                good = entry["seq"] == i and entry["prev"] == prev and entry["hash"] == _digest_of_line(line, entry)
            except (ValueError, KeyError, TypeError):
                good = False
            if not good:
                raise RecordError(
                    f"{path}: line {i + 1} does not continue the chain; it was changed after it was "
                    f"written. Restore the file from a copy, or start a new run tag"
                )
            entries.append(entry)
            if "signer" in entry and not verified(entry["signer"], str(entry.get("signature")), entry["hash"]):
                raise RecordError(f"{path}: the signature of line {i + 1} is wrong; it was not written by its signer")
            prev = entry["hash"]
        return entries

    @classmethod
    def open(cls, path: Path) -> Chain:
        """Verify a file, cut a torn last line off, and make it ready to append to.

        Raises:
            RecordError: the file is damaged, was signed by somebody else, or cannot be written.
            UsageError: there is a key that cannot be used.
        """
        chain = cls.read(path)
        if chain.entries and (reason := chain.shortened()):
            raise RecordError(
                f"{path}: {reason}. Restore the file, or start a new run tag; where it is as you want it, remove "
                f"{heads.place(path)}"
            )
        chain.signer = load_signer()
        have = {e.get("signer") for e in chain.entries}
        if have and have != {chain.signer.public if chain.signer else None}:
            whose = ", ".join(str(s)[:16] for s in have if s) or "nobody"
            raise RecordError(
                f"{path} was signed by {whose} and would go on signed by "
                f"{chain.signer.public[:16] if chain.signer else 'nobody'}; use the same key (HOTLOOP_KEY), or another "
                f"--tag"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as f:
                f.truncate(chain._size)
            chain._fill_ballast()
        except OSError as e:
            raise chain._write_error(e) from None
        return chain

    @property
    def head(self) -> str:
        return str(self.entries[-1]["hash"]) if self.entries else GENESIS

    def bodies(self, kind: str) -> list[dict[str, Any]]:
        return [e["body"] for e in self.entries if e["kind"] == kind]

    def append(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        """Write one entry and flush it to the disk.

        Raises:
            DiskFullError: no space was left. With ballast the entry has been written all the same
                (`error.written` is True); without, the file is as it was before the call.
            RecordError: the file cannot be written.
        """
        entry: dict[str, Any] = {
            "seq": len(self.entries),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "kind": kind,
            "body": body,
            "prev": self.head,
        }
        if self.signer:
            entry["signer"] = self.signer.public
        entry["hash"] = _digest(entry)
        if self.signer:
            entry["signature"] = self.signer.sign(entry["hash"])
        line = canonical(entry) + b"\n"
        try:
            self._write(line)
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._drop_ballast():
                raise self._write_error(e) from None
            try:
                self._write(line)
            except OSError as again:
                raise self._write_error(again) from None
            self._appended(entry)
            error = self._write_error(e)
            error.written = True  # type: ignore[attr-defined]
            raise error from None
        self._appended(entry)
        return entry

    def _appended(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        heads.remember(self.path, len(self.entries), entry["hash"])

    def shortened(self) -> str:
        """Why this is not the end of what was written here; empty where it is, or where nothing is known of it."""
        told = heads.remembered(self.path)
        if told is None:
            return ""
        entries, head = told
        if self.cut_bytes and entries == len(self.entries) + 1:
            return ""  # the torn line was the last one
        if entries <= len(self.entries) and (entries == 0 or self.entries[entries - 1]["hash"] == head):
            return ""
        return f"{entries} entries had been written and it has {len(self.entries)}, or others: it was cut or put back"

    def _write(self, line: bytes) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            try:
                os.lseek(fd, self._size, os.SEEK_SET)
                view = memoryview(line)
                while view:
                    view = view[os.write(fd, view) :]
                os.fsync(fd)
            except OSError:
                os.ftruncate(fd, self._size)
                raise
        finally:
            os.close(fd)
        self._size += len(line)

    @property
    def _ballast(self) -> Path:
        return self.path.with_name(self.path.name + ".ballast")

    def _fill_ballast(self) -> None:
        if not self._ballast.exists() or self._ballast.stat().st_size < BALLAST_BYTES:
            self._ballast.write_bytes(os.urandom(BALLAST_BYTES))  # random: no file system shrinks it

    def _drop_ballast(self) -> bool:
        try:
            self._ballast.unlink()
        except OSError:
            return False
        return True

    def _write_error(self, e: OSError) -> RecordError:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskFullError(
                f"the disk of {self.path.parent} is full; free some space and start the same command "
                f"again, it goes on where it was"
            )
        return RecordError(f"{self.path} cannot be written: {e.strerror or e}")


class Lock:
    """One writer a run tag. The lock is the kernel's, so it does not outlive its owner.

    Raises:
        LockedError: another process has it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(self._fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise LockedError(
                f"the run tag {path.parent.name} is in use by process {owner}; wait for it, stop it, or "
                f"give another --tag"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()
