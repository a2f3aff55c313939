"""The record of a night: an append-only file of JSON lines, each with the hash of the one before.

    {"seq": 3, "time": "...", "kind": "decision", "version": 2, "body": {...}, "prev": "<hash>", "hash": "<hash>"}

`hash` is the SHA-256 of the line's canonical JSON without `hash` and `signature`, so no line can be changed, dropped or
moved without breaking the chain. Where the user has a key (`harness.records.signing`) each entry names it as its
`signer` and carries the `signature` of its hash, so that nobody else can write the chain anew. A torn last line (the
process or the machine died while writing) is cut off when the file is opened; anything else that does not verify is an
error. The file carries a ballast beside it, freed when the disk is full, so that the experiment that has just ended can
still be recorded.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from hotloop.harness.errors import DiskFullError, LockedError, RecordError, UsageError
from hotloop.harness.records import heads
from hotloop.harness.records.earlier import Version1
from hotloop.harness.records.model import KINDS, VERSION, Body, Kind, Outcome, hotloop_version
from hotloop.harness.records.signing import Signer, load_signer, verified
from hotloop.harness.text import one_line

__all__ = ["GENESIS", "Chain", "Entry", "Lock", "canonical"]

GENESIS = "0" * 64
BALLAST_BYTES = 1 << 20
_NAMES = {body: kind for kind, body in KINDS.items()}
_B = TypeVar("_B", bound=msgspec.Struct)


class _Line(msgspec.Struct):
    """An entry as it stands in the file."""

    seq: int
    time: str
    kind: str
    body: dict[str, Any]
    prev: str
    hash: str
    version: int = 1
    signer: str | None = None
    signature: str | None = None


class Entry(msgspec.Struct, frozen=True):
    """One entry: what was recorded, when (UTC, ISO 8601), its hash, and who signed it."""

    time: str
    body: Body
    hash: str
    version: int = VERSION
    signer: str | None = None


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces; refuses NaN, so a record is always standard JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _digest_of_line(raw: bytes, line: _Line) -> str:
    """The hash of a line as `append` wrote it, without writing its JSON anew.

    A hash cannot stand in the text that it is the hash of, so the first place where it is found is its own.
    """
    for key, value in (("hash", line.hash), ("signature", line.signature)):
        if value is not None:
            raw = raw.replace(f',"{key}":"{value}"'.encode(), b"", 1)
    return hashlib.sha256(raw).hexdigest()


def _json(raw: bytes) -> Any:
    """Raises ValueError, RecursionError."""
    try:
        return msgspec.json.decode(raw)
    except msgspec.DecodeError:
        return json.loads(raw)  # half a surrogate, which only this takes


def _body(line: _Line, version1: Version1) -> Body:
    """Raises ValueError, KeyError or TypeError for what this version does not know."""
    if line.version == 1:
        return version1.read(line.kind, line.body)
    if line.version != VERSION:
        raise ValueError(f"version {line.version} of the records")
    body: Body = msgspec.convert(line.body, KINDS[line.kind])
    return body


def _writer(body: dict[str, Any]) -> str:
    try:
        return one_line(str(body["environment"]["versions"]["hotloop"]), 40)
    except (KeyError, TypeError):
        return "of another version"


class Chain:
    """An open record file. `entries` is what it holds; `append` adds one and returns it."""

    def __init__(self, path: Path, entries: list[Entry], size: int, cut: int) -> None:
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
        return cls(path, cls._entries(path, raw[:whole].splitlines()), whole, len(raw) - whole)

    @staticmethod
    def _entries(path: Path, lines: list[bytes]) -> list[Entry]:
        entries: list[Entry] = []
        prev, version1 = GENESIS, Version1()
        for i, raw in enumerate(lines):
            try:
                line = msgspec.convert(_json(raw), _Line)
                good = (line.seq, line.prev, line.hash) == (i, prev, _digest_of_line(raw, line))
            except (ValueError, RecursionError):
                good = False
            if not good:
                raise RecordError(
                    f"{path}: line {i + 1} does not continue the chain; it was changed after it was "
                    f"written. Restore the file from a copy, or start a new run tag"
                )
            if line.signer is not None and not verified(line.signer, str(line.signature), line.hash):
                raise RecordError(f"{path}: the signature of line {i + 1} is wrong; it was not written by its signer")
            try:
                body = _body(line, version1)
            except (ValueError, KeyError, TypeError) as e:
                raise RecordError(
                    f"{path}: line {i + 1}, of the kind {one_line(line.kind, 40)}, was written by hotloop "
                    f"{_writer(line.body)}, and this is {hotloop_version()}, which cannot read it "
                    f"({one_line(str(e), 200)}); use the version that wrote it, or a newer one"
                ) from None
            entries.append(Entry(line.time, body, line.hash, line.version, line.signer))
            prev = line.hash
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
        have = {e.signer for e in chain.entries}
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
        return self.entries[-1].hash if self.entries else GENESIS

    def bodies(self, of: type[_B]) -> list[_B]:
        """What was recorded of one type, in order."""
        return [e.body for e in self.entries if isinstance(e.body, of)]

    def outcome(self, number: int) -> Outcome:
        """Of an experiment by its number. Raises UsageError, with the numbers that there are."""
        outcomes = {o.run.number: o for o in reversed(self.bodies(Outcome)) if o.run.kind != Kind.REPLAY}
        if number in outcomes:
            return outcomes[number]
        known = f"it has {min(outcomes)} to {max(outcomes)}" if outcomes else "it has none"
        raise UsageError(f"{self.path.parent} has no experiment {number}; {known}")

    def append(self, body: Body) -> Entry:
        """Write one entry and flush it to the disk; on a full disk in the place of the ballast.

        Raises:
            DiskFullError: no space was left, ballast included; the file is as it was before the call.
            RecordError: the file cannot be written.
        """
        entry: dict[str, Any] = {
            "seq": len(self.entries),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "kind": _NAMES[type(body)],
            "version": VERSION,
            "body": msgspec.to_builtins(body),
            "prev": self.head,
        }
        if self.signer:
            entry["signer"] = self.signer.public
        entry["hash"] = hashlib.sha256(canonical(entry)).hexdigest()
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
        made = Entry(entry["time"], body, entry["hash"], VERSION, entry.get("signer"))
        self.entries.append(made)
        heads.remember(self.path, len(self.entries), made.hash)
        return made

    def shortened(self) -> str:
        """Why this is not the end of what was written here; empty where it is, or where nothing is known of it."""
        told = heads.remembered(self.path)
        if told is None:
            return ""
        entries, head = told
        if self.cut_bytes and entries == len(self.entries) + 1:
            return ""  # the torn line was the last one
        if entries <= len(self.entries) and (entries == 0 or self.entries[entries - 1].hash == head):
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
