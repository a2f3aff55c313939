"""Landlock: which files a process may touch from now on, by three system calls of Linux (5.13 and newer).

An ordinary process restricts itself and everything that it starts, for ever. What the running kernel cannot restrict
is left out: `abi()` says how far it goes (4 adds TCP, 6 signals and abstract sockets).
Source: the kernel's Documentation/userspace-api/landlock.rst.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

__all__ = ["abi", "restrict"]

# The same numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_PR_SET_NO_NEW_PRIVS = 38

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV  # the rest mean something on folders only
# All rights over files that each ABI knows.
_ALL_FS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_ALL_TCP = 0b11  # bind, connect
_ALL_SCOPES = 0b11  # abstract sockets, signals


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def abi() -> int:
    """The kernel's Landlock ABI; 0 where it has none or it is switched off."""
    return max(0, int(_libc().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_FLAG))))


def restrict(
    read: Iterable[str],
    write: Iterable[str],
    *,
    listed: Iterable[str] = (),
    settings: Iterable[str] = (),
    network: bool = False,
) -> int:
    """Allow this thread and its future children nothing but these paths; returns the ABI in force.

    Args:
        read: files and folders (with all below) to read and execute. What does not exist is passed over.
        write: the same, to change as well.
        listed: folders of which names may be seen, those of all folders below included.
        settings: files there already (all below, for folders) may be written to as well; none may be made or removed.
        network: leave TCP and abstract sockets alone.

    Raises:
        OSError: the kernel refuses; nothing was restricted.
    """
    version = abi()
    if version < 1:
        raise OSError(38, "the kernel has no Landlock")
    libc = _libc()
    fs = _ALL_FS[max(k for k in _ALL_FS if k <= version)]
    tcp = _ALL_TCP if version >= 4 and not network else 0
    scopes = _ALL_SCOPES if version >= 6 and not network else (0b10 if version >= 6 else 0)
    fields = [fs] + [tcp] * (version >= 4) + [scopes] * (version >= 6)
    attr = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = _checked(libc.syscall(_CREATE_RULESET, attr, ctypes.c_size_t(len(attr)), ctypes.c_uint32(0)))
    try:
        for paths, rights in (
            (read, _READ),
            (write, fs),
            (listed, _READ_DIR),
            (settings, _WRITE_FILE | _TRUNCATE),
        ):
            for path in paths:
                _allow(libc, ruleset, path, rights & fs)
        _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        _checked(libc.syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0)))
    finally:
        os.close(ruleset)
    return version


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _OF_FILES
        attr = struct.pack("=Qi", rights, fd)
        _checked(libc.syscall(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_PATH_BENEATH), attr, ctypes.c_uint32(0)))
    finally:
        os.close(fd)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
