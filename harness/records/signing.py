"""Signed records: with a key that only the driver reads, nobody else can write a night that verifies.

The key is an Ed25519 seed in `$HOTLOOP_KEY` or `~/.config/hotloop/key`, readable by its owner alone. Where it exists
every record is signed; the public half stands in each entry, so that anyone can check it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hotloop.harness.errors import UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = ["Signer", "key_path", "load_signer", "make_key", "verified"]


class Signer:
    """Signs with one key; `public` is the hexadecimal public half."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = key.public_key().public_bytes_raw().hex()

    def sign(self, digest: str) -> str:
        return self._key.sign(bytes.fromhex(digest)).hex()


def _ed25519() -> Any:
    """The library, imported only where there is a key: a machine that only measures need not have it."""
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise UsageError("signed records need the package cryptography; run: make install") from None
    return ed25519


def key_path() -> Path:
    return Path(os.environ.get("HOTLOOP_KEY") or Path.home() / ".config" / "hotloop" / "key")


def load_signer() -> Signer | None:
    """The user's signer; None without a key.

    Raises:
        UsageError: the key cannot be read, is none, or others may read it.
    """
    path = key_path()
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        if "HOTLOOP_KEY" in os.environ:
            raise UsageError(f"there is no key at {path}; make one with: hotloop keygen") from None
        return None
    except OSError as e:
        raise UsageError(f"the key {path} cannot be read: {e.strerror}") from None
    with open(fd, "rb") as f:
        if os.fstat(fd).st_mode & 0o077:
            raise UsageError(f"others may read the key {path}; run: chmod 600 {path}")
        try:
            return Signer(_ed25519().Ed25519PrivateKey.from_private_bytes(bytes.fromhex(f.read(200).decode().strip())))
        except ValueError:
            raise UsageError(f"{path} holds no key; move it away and run: hotloop keygen") from None


def make_key() -> Signer:
    """Write a new key. Raises UsageError where one exists: nights signed with it could not be continued."""
    path = key_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    key = _ed25519().Ed25519PrivateKey.generate()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise UsageError(f"there is a key at {path} already; it is left as it is") from None
    with open(fd, "w") as f:
        f.write(key.private_bytes_raw().hex() + "\n")
    return Signer(key)


def verified(public: str, signature: str, digest: str) -> bool:
    ed25519 = _ed25519()
    from cryptography.exceptions import InvalidSignature

    try:
        ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(
            bytes.fromhex(signature), bytes.fromhex(digest)
        )
    except (InvalidSignature, ValueError):
        return False
    return True
