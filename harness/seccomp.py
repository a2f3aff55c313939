"""seccomp: system calls that a model's training never needs, refused by the kernel with EPERM.

A small classic-BPF program, built here and loaded for this process and all that it starts. It refuses what reaches
other processes, kernel-wide stores, namespaces, mounts, clocks and modules, and every socket but those that are
already open (socketpair stays). Everything else is allowed: torch, Triton, compilers and the NVIDIA driver use a wide
and changing set.
Source: the kernel's Documentation/userspace-api/seccomp_filter.rst; numbers from its syscall tables (a test compares
them with the system's headers).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

__all__ = ["REFUSED", "program", "restrict", "supported"]

# name -> number on x86_64, on aarch64; None where it does not exist.
REFUSED: dict[str, tuple[int | None, int | None]] = {
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
REFUSED_METADATA: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "utimensat": (280, 88), "futimesat": (261, None), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
}  # fmt: skip

_ARCH = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_CLONE, _CLONE3, _SOCKET, _PRLIMIT = (56, 220), (435, 435), (41, 198), (302, 261)
_IOCTL = (16, 29)
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C  # typing into the user's terminal
_NEW_NAMESPACES = 0x7E020080  # every CLONE_NEW* flag
_X32 = 0x40000000

# Classic BPF: load a word of seccomp_data, jump, return.
_LOAD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_AT_NUMBER, _AT_ARCH = 0, 4

_PR_SET_NO_NEW_PRIVS, _SET_MODE_FILTER, _SPEC_ALLOW = 38, 1, 4
_SECCOMP = (317, 277)


def supported() -> bool:
    return platform.machine() in _ARCH


def program(machine: str, *, network: bool = False, metadata: bool = False) -> bytes:
    """The filter, as an array of `struct sock_filter`.

    Args:
        machine: `x86_64` or `aarch64`.
        network: allow new sockets.
        metadata: also refuse changes of modes, owners, times and extended attributes.
    """
    column, arch = _ARCH[machine]
    code: list[tuple[int, int, int, int]] = []

    def op(kind: int, k: int, yes: int = 0, no: int = 0) -> None:
        code.append((kind, yes, no, k))

    def argument(i: int) -> int:  # the low word; both machines are little-endian
        return 16 + 8 * i

    op(_LOAD, _AT_ARCH)
    op(_JEQ, arch, 1, 0)
    op(_RET, _KILL)
    op(_LOAD, _AT_NUMBER)
    if machine == "x86_64":
        op(_JGE, _X32, 0, 1)
        op(_RET, _ERRNO | _ENOSYS)
    refused = REFUSED | (REFUSED_METADATA if metadata else {})
    numbers = [n[column] for n in refused.values()]
    if not network:
        numbers.append(_SOCKET[column])
    for number in numbers:
        if number is not None:
            op(_JEQ, number, 0, 1)
            op(_RET, _ERRNO | _EPERM)
    op(_JEQ, _CLONE3[column], 0, 1)  # its flags are behind a pointer; the C library falls back to clone
    op(_RET, _ERRNO | _ENOSYS)
    for number, i, test, value in (
        (_CLONE[column], 0, _JSET, _NEW_NAMESPACES),
        (_IOCTL[column], 1, _JEQ, _TIOCSTI),
        (_IOCTL[column], 1, _JEQ, _TIOCLINUX),
    ):
        op(_JEQ, number, 0, 4)
        op(_LOAD, argument(i))
        op(test, value, 0, 1)
        op(_RET, _ERRNO | _EPERM)
        op(_LOAD, _AT_NUMBER)
    op(_JEQ, _PRLIMIT[column], 0, 3)  # of oneself only
    op(_LOAD, argument(0))
    op(_JEQ, 0, 1, 0)
    op(_RET, _ERRNO | _EPERM)
    op(_RET, _ALLOW)
    return b"".join(struct.pack("=HBBI", *step) for step in code)


def restrict(*, network: bool = False, metadata: bool = False) -> None:
    """Load the filter for this process and everything that it starts; it cannot be taken back.

    Raises:
        OSError: the kernel refuses it, or the machine's architecture has no table here.
    """
    machine = platform.machine()
    if machine not in _ARCH:
        raise OSError(38, f"no system call table for {machine}")
    code = program(machine, network=network, metadata=metadata)
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    whole = Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    number = _SECCOMP[_ARCH[machine][0]]
    # SPEC_ALLOW: no speculation penalty for a process that has the machine to itself anyway.
    if (
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
        or libc.syscall(number, _SET_MODE_FILTER, _SPEC_ALLOW, ctypes.byref(whole)) != 0
    ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
