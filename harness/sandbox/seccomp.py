"""seccomp: system calls that a model's training never needs, refused by the kernel with EPERM.

A small classic-BPF program, built here and loaded for this process and all that it starts. It refuses what reaches
other processes, kernel-wide stores, namespaces, mounts, clocks and modules, and every socket but those that are
already open (socketpair stays, but for datagrams, which need no connection). On CUDA the one kind of socket that
libcuda makes is allowed. Everything else is allowed: torch, Triton, compilers and the NVIDIA driver use a wide and
changing set.
Source: the kernel's Documentation/userspace-api/seccomp_filter.rst; numbers from its syscall tables (a test compares
them with the system's headers).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from typing import NamedTuple

__all__ = [
    "REFUSED",
    "REFUSED_METADATA",
    "REFUSED_MODEL",
    "REFUSED_NETWORK",
    "RULES",
    "program",
    "restrict",
    "supported",
]

Numbers = tuple[int | None, int | None]  # on x86_64, on aarch64; None where it does not exist

REFUSED: dict[str, Numbers] = {
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "perf_event_open": (298, 241),
    # stores that outlive a process
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195),
    "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192),
    "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "mq_open": (240, 180), "mq_unlink": (241, 181),
    # namespaces, mounts, other ways to a file
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    # the machine
    "bpf": (321, 280), "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60), "syslog": (103, 116),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162), "vhangup": (153, 58), "personality": (135, 92),
    "iopl": (172, None), "ioperm": (173, None),
}  # fmt: skip
# Refused where the files are the user's own and only Landlock guards them, which does not cover these.
REFUSED_METADATA: dict[str, Numbers] = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "utimensat": (280, 88), "futimesat": (261, None), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
}  # fmt: skip

# Refused where there is to be no network. On CUDA `socket` is a rule below, and all but `connect` are allowed.
REFUSED_NETWORK: dict[str, Numbers] = {
    "connect": (42, 203), "socket": (41, 198), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242),
}  # fmt: skip
# Refused to a model, not to an agent's programs: what finds traces that another process left on files that both may
# only read (pages in memory, watches).
REFUSED_MODEL: dict[str, Numbers] = {
    "mincore": (27, 232), "cachestat": (451, 451), "inotify_init": (253, None), "inotify_init1": (294, 26),
}  # fmt: skip


class Rule(NamedTuple):
    """Answer `errno` where argument & mask is one of `values` (or, with `inside` false, none of them).

    Errno 0 says that it was done, and does nothing.
    """

    call: Numbers
    argument: int
    mask: int
    values: tuple[int, ...]
    inside: bool
    errno: int


_EPERM, _ENOSYS, _EOPNOTSUPP = 1, 38, 95
_ALL = 0xFFFFFFFF
_KIND = _ALL & ~(0x80000 | 0x800)  # of a socket, without SOCK_CLOEXEC and SOCK_NONBLOCK
_AF_UNIX, _STREAM, _SEQPACKET = 1, 1, 5
_NEW_NAMESPACES = 0x7E020080  # every CLONE_NEW* flag
_SOCKET, _SOCKETPAIR, _PREADV2, _PWRITEV2 = (41, 198), (53, 199), (327, 286), (328, 287)
RULES: dict[str, tuple[Rule, ...]] = {
    "all": (
        Rule((56, 220), 0, _NEW_NAMESPACES, (0,), False, _EPERM),  # clone
        Rule((16, 29), 1, _ALL, (0x5412, 0x541C), True, _EPERM),  # ioctl: typing into the user's terminal
        Rule((302, 261), 0, _ALL, (0,), False, _EPERM),  # prlimit64 of oneself only
    ),
    "network": (  # a datagram needs no connection to reach a name; the other kinds do
        Rule(_SOCKETPAIR, 0, _ALL, (_AF_UNIX,), False, _EPERM),
        Rule(_SOCKETPAIR, 1, _KIND, (_STREAM, _SEQPACKET), False, _EPERM),
    ),
    "cuda": (  # libcuda binds a name and listens, to hand a descriptor to peers
        Rule(_SOCKET, 0, _ALL, (_AF_UNIX,), False, _EPERM),
        Rule(_SOCKET, 1, _KIND, (_SEQPACKET,), False, _EPERM),
    ),
    "model": (
        Rule((72, 25), 1, _ALL, (1024, 1026), True, _EPERM),  # fcntl: F_SETLEASE, F_NOTIFY
        Rule((221, 223), 3, _ALL, (4,), True, 0),  # fadvise64: POSIX_FADV_DONTNEED
        Rule((28, 233), 2, _ALL, (20, 21), True, 0),  # madvise: MADV_COLD, MADV_PAGEOUT
        Rule(_PREADV2, 5, 8, (0,), False, _EOPNOTSUPP),  # RWF_NOWAIT
        Rule(_PWRITEV2, 5, 8, (0,), False, _EOPNOTSUPP),
        Rule((157, 167), 0, _ALL, (4,), True, _EPERM),  # prctl: PR_SET_DUMPABLE would hide its memory from the parent
    ),
}

_ARCH = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_CLONE3 = (435, 435)
_X32 = 0x40000000

# Classic BPF: load a word of seccomp_data, and, jump, return.
_LOAD, _AND, _JEQ, _JGE, _RET = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_AT_NUMBER, _AT_ARCH, _AT_ARGUMENTS = 0, 4, 16  # of each the low word; both machines are little-endian

_PR_SET_NO_NEW_PRIVS, _SET_MODE_FILTER, _SPEC_ALLOW = 38, 1, 4
_SECCOMP = (317, 277)


def supported() -> bool:
    return platform.machine() in _ARCH


def program(
    machine: str, *, network: bool = False, metadata: bool = False, cuda: bool = False, model: bool = False
) -> bytes:
    """The filter, as an array of `struct sock_filter`.

    Args:
        machine: `x86_64` or `aarch64`.
        network: allow new sockets.
        metadata: also refuse changes of modes, owners, times and extended attributes.
        cuda: allow the socket that libcuda listens on, and no connection.
        model: also refuse what could tell a model what another one did to files that both may only read.
    """
    column, arch = _ARCH[machine]
    code: list[tuple[int, int, int, int]] = []

    def op(kind: int, k: int, yes: int = 0, no: int = 0) -> None:
        code.append((kind, yes, no, k))

    op(_LOAD, _AT_ARCH)
    op(_JEQ, arch, 1, 0)
    op(_RET, _KILL)
    op(_LOAD, _AT_NUMBER)
    if machine == "x86_64":
        op(_JGE, _X32, 0, 1)
        op(_RET, _ERRNO | _ENOSYS)
    # The rules first: these calls are made often, and the others' verdicts the kernel keeps in a table.
    chosen = {"all": True, "network": not network, "cuda": cuda and not network, "model": model}
    rules = [rule for name, wanted in chosen.items() if wanted for rule in RULES[name]]
    for call in dict.fromkeys(rule.call for rule in rules):
        body: list[tuple[int, int, int, int]] = []
        for rule in (r for r in rules if r.call == call):
            body += [(_LOAD, 0, 0, _AT_ARGUMENTS + 8 * rule.argument), (_AND, 0, 0, rule.mask)]
            for left in reversed(range(len(rule.values))):  # a hit skips the tests left, and the answer or not
                miss = int(rule.inside and left == 0)
                body.append((_JEQ, left + (not rule.inside), miss, rule.values[-1 - left]))
            body.append((_RET, 0, 0, _ERRNO | rule.errno))
        number = call[column]
        assert number is not None
        op(_JEQ, number, 0, len(body) + 1)
        code += body
        op(_RET, _ALLOW)
    refused = REFUSED | (REFUSED_METADATA if metadata else {}) | (REFUSED_MODEL if model else {})
    if not network:
        refused |= {"connect": REFUSED_NETWORK["connect"]} if cuda else REFUSED_NETWORK
    for number in (n[column] for n in refused.values()):
        if number is not None:
            op(_JEQ, number, 0, 1)
            op(_RET, _ERRNO | _EPERM)
    op(_JEQ, _CLONE3[column], 0, 1)  # its flags are behind a pointer; the C library falls back to clone
    op(_RET, _ERRNO | _ENOSYS)
    op(_RET, _ALLOW)
    return b"".join(struct.pack("=HBBI", *step) for step in code)


def restrict(*, network: bool = False, metadata: bool = False, cuda: bool = False, model: bool = False) -> None:
    """Load the filter for this process and everything that it starts; it cannot be taken back.

    Raises:
        OSError: the kernel refuses it, or the machine's architecture has no table here.
    """
    machine = platform.machine()
    if machine not in _ARCH:
        raise OSError(38, f"no system call table for {machine}")
    code = program(machine, network=network, metadata=metadata, cuda=cuda, model=model)
    buffer = ctypes.create_string_buffer(code, len(code))

    class _Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    whole = _Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    number = _SECCOMP[_ARCH[machine][0]]
    # SPEC_ALLOW: no speculation penalty for a process that has the machine to itself anyway.
    if (
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
        or libc.syscall(number, _SET_MODE_FILTER, _SPEC_ALLOW, ctypes.byref(whole)) != 0
    ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
