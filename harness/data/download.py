"""Shards over HTTP: in parallel, going on where a connection broke, each checked against its SHA-256.

Hugging Face tells the hash of a large file in `X-Linked-ETag`. What arrived is hashed and the hash kept beside it, so
that a shard that was damaged on the disk is found and fetched again. A server that is busy (429, 5xx) is waited for.
"""

from __future__ import annotations

import email.message
import errno
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from hotloop.harness.errors import DataError, UsageError

__all__ = ["download", "endpoint"]

HUGGING_FACE = "https://huggingface.co"
BUSY_S, BROKEN_S = 600.0, 15.0  # how long a busy server, and no network at all, are waited for
LONGEST_PAUSE_S = 120.0
_SHA256 = re.compile(r'(?:W/)?"?([0-9a-f]{64})"?')


def endpoint(mirror: str | None) -> str:
    """The server: --mirror, else HF_ENDPOINT, else Hugging Face. Raises UsageError for what is no http address."""
    url = mirror or os.environ.get("HF_ENDPOINT") or HUGGING_FACE
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", url):
        raise UsageError(f"{url!r} (--mirror, or HF_ENDPOINT) is no address such as https://huggingface.co")
    return url.rstrip("/")


def download(names: list[str], folder: Path, workers: int, base_url: str) -> dict[str, str]:
    """Have files in `folder`, fetching those that are not there or are damaged; name -> SHA-256.

    Raises:
        DataError: a file could not be had.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    folder.mkdir(parents=True, exist_ok=True)
    hashes: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, ThreadPoolExecutor(workers) as pool:
        jobs = {n: pool.submit(_have, n, folder, base_url, progress) for n in names}
        try:
            for name, job in jobs.items():
                hashes[name] = job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return hashes


def _have(name: str, folder: Path, base_url: str, progress: Any) -> str:
    path, note = folder / name, folder / f"{name}.sha256"
    if path.exists():
        found = _hash(path)
        if note.exists() and note.read_text().strip() == found:
            return found
        if note.exists():
            progress.console.print(f"{path} is damaged (its SHA-256 differs); fetching it again", highlight=False)
            path.unlink()
        else:  # from before hashes were kept: the server is asked
            os.replace(path, folder / f"{name}.part")
    found = _fetch(name, folder, base_url, progress)
    note.write_text(found + "\n")
    os.replace(folder / f"{name}.part", path)
    return found


def _hash(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Keeps the headers of the answers that led elsewhere: the file's hash is in the first."""

    def __init__(self) -> None:
        self.linked = ""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:  # fmt: skip
        self.linked = _told_hash(headers) or self.linked
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _told_hash(headers: email.message.Message) -> str:
    for name in ("X-Linked-ETag", "ETag"):
        if match := _SHA256.fullmatch(headers.get(name, "")):
            return match[1]
    return ""


class _Busy(Exception):
    """The server asks to come back later, after so many seconds where it says so."""

    def __init__(self, words: str, after_s: float | None) -> None:
        super().__init__(words)
        self.after_s = after_s


def _fetch(name: str, folder: Path, base_url: str, progress: Any) -> str:
    """Complete `name`.part; its SHA-256."""
    part, task = folder / f"{name}.part", progress.add_task(name, total=None)
    problem, waited, tries, patience = "", 0.0, 0, BROKEN_S
    while True:
        try:
            return _once(name, part, base_url, lambda **k: progress.update(task, **k))
        except _Busy as e:
            problem, patience, pause = str(e), BUSY_S, e.after_s or 2.0**tries
        except urllib.error.HTTPError as e:
            raise DataError(
                f"{base_url}/{name} cannot be had (HTTP {e.code} {e.reason}); is the address right? "
                f"See --mirror and HF_ENDPOINT"
            ) from None
        except (OSError, http.client.HTTPException) as e:
            if isinstance(e, OSError) and e.errno == errno.ENOSPC:
                raise DataError(
                    f"the disk of {folder} is full; free some space and run the same command again"
                ) from None
            problem, pause = str(getattr(e, "reason", None) or e), 2.0**tries
        pause = min(pause, LONGEST_PAUSE_S)
        if waited + pause > patience:
            break
        progress.update(task, description=f"{name} ({problem}; again in {pause:.0f} s)")
        time.sleep(pause)
        progress.update(task, description=name)
        waited, tries = waited + pause, tries + 1
    raise DataError(
        f"{name} could not be downloaded from {base_url} ({problem}; waited for {waited:.0f} s); check the network and "
        f"run the same command again, it goes on where it stopped, or try --mirror URL, or use text of your own: "
        f"--source PATH, or --source packages"
    )


def _once(name: str, part: Path, base_url: str, update: Callable[..., None]) -> str:
    """One attempt. Raises _Busy, HTTPError, or OSError where it is worth another one."""
    have = part.stat().st_size if part.exists() else 0
    redirects = _Redirects()
    opener = urllib.request.build_opener(redirects)
    request = urllib.request.Request(f"{base_url}/{name}", headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with opener.open(request, timeout=30) as answer:
            told = redirects.linked or _told_hash(answer.headers)
            if have and answer.status != 206:
                have = 0
            total = have + int(answer.headers.get("Content-Length", 0))
            update(total=total, completed=have)
            with open(part, "ab" if have else "wb") as f:
                while block := answer.read(1 << 20):
                    f.write(block)
                    have += len(block)
                    update(completed=have)
        if total and have < total:
            raise OSError(f"ended after {have} of {total} bytes")
    except urllib.error.HTTPError as e:
        e.close()
        if e.code == 416:  # nothing is behind what we have: all of it, or too much
            told = redirects.linked or _told_hash(e.headers)
            if e.headers.get("Content-Range") != f"bytes */{have}" and not told:
                part.unlink()
                raise OSError("what was there is longer than the file") from None
        elif e.code == 429 or e.code >= 500:
            after = e.headers.get("Retry-After", "")
            raise _Busy(f"HTTP {e.code} {e.reason}", float(after) if after.isdigit() else None) from None
        else:
            raise
    found = _hash(part)
    if (told and found != told) or not _is_parquet(part):
        part.unlink()
        raise OSError("what arrived is damaged: its SHA-256 differs" if told else "what arrived is no parquet file")
    return found


def _is_parquet(path: Path) -> bool:
    with open(path, "rb") as f:
        head = f.read(4)
        f.seek(max(0, path.stat().st_size - 4))
        return head == b"PAR1" == f.read(4)
