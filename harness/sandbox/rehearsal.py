"""What libcuda and the compilers on top of it are known to ask of the kernel, rehearsed in a sandbox without a GPU.

`NEEDS` is the list of what a child on CUDA is allowed for their sake, each with the public trace or report that it is
known from, and what grants it; `REFUSED` what such a child must still be refused. `rehearse(sandbox)` has a child try
all of it. Device files may be stand-ins: they show that a driver's files can be opened and not that they answer (ioctl
and mmap on them stay unproven).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import multiprocessing
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hotloop.harness.errors import SandboxError
from hotloop.harness.sandbox import visible
from hotloop.harness.sandbox.policy import Policy, Sandbox
from hotloop.harness.sandbox.process import Child, tail
from hotloop.harness.sandbox.wire import Closed, Malformed, TimedOut, Wire

__all__ = ["NEEDS", "REFUSED", "Need", "child_main", "refused_needs", "rehearse"]

LIMIT_S = 60.0
_ARENA_BYTES = 1 << 40  # addresses that are reserved for all memory of all GPUs; more than any machine has
_PR_SET_NAME = 15


class Need(NamedTuple):
    """One thing that is asked for.

    Attributes:
        source: a public trace or report.
        grants: what allows it: `call NAME`, `read PATH`, `write PATH`, `settings PATH`, `device NAME`, `limit NAME`.
            Without any one of them the attempt fails.
        attempt: raises OSError where it is refused.
        workers: what compile processes beside the trainer need; at L1 there are none.
    """

    name: str
    source: str
    grants: tuple[str, ...]
    attempt: Callable[[], Any]
    workers: bool = False


def _listen() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        s.bind(f"\0cuda-uvmfd-{os.stat('/proc/self/ns/pid').st_ino}-{os.getpid()}")
        s.listen(16)
        s.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # nobody is there
            s.accept()


def _name_threads() -> None:
    """The way of drivers from 570 on: not prctl, which may only name the thread that calls it."""
    failed: list[OSError] = []

    def name() -> None:
        try:
            with open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as f:
                f.write("cuda-rehearsal")
        except OSError as e:
            failed.append(e)

    name()
    thread = threading.Thread(target=name)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _name_threads_of_a_worker() -> None:
    code = (
        "import threading\n"
        "def name(): open(f'/proc/self/task/{threading.get_native_id()}/comm', 'w').write('worker')\n"
        "name()\n"
        "threading.excepthook = lambda e: __import__('os')._exit(1)\n"
        "t = threading.Thread(target=name); t.start(); t.join()"
    )
    _run([sys.executable, "-I", "-S", "-c", code])


def _read(*paths: str) -> Callable[[], None]:
    """Read what is there; a file that a machine lacks is no refusal (`rehearse` compares what each side finds)."""

    def attempt() -> None:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.listdir(path) if os.path.isdir(path) else open(path, "rb").close()

    return attempt


def _open_device(*names: str) -> Callable[[], None]:
    def attempt() -> None:
        for name in names:
            os.close(os.open(f"{visible.DEV}/{name}", os.O_RDWR | os.O_CLOEXEC))

    return attempt


def _memory_file() -> None:
    fd = os.memfd_create("cuda", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        mmap.mmap(fd, mmap.PAGESIZE).close()
    finally:
        os.close(fd)


def _policy() -> None:
    mode, mask = ctypes.c_int(), (ctypes.c_ulong * 16)()
    number = {"x86_64": 239, "aarch64": 236}[os.uname().machine]
    _call(number, ctypes.byref(mode), mask, ctypes.c_ulong(1024), None, ctypes.c_ulong(0))


def _reserve() -> None:
    libc = _libc()
    libc.mmap.restype = ctypes.c_void_p
    private, anonymous, no_reserve, fixed = 0x02, 0x20, 0x4000, 0x10
    flags = private | anonymous | no_reserve
    at = libc.mmap(None, ctypes.c_size_t(_ARENA_BYTES), 0, flags, -1, ctypes.c_long(0))
    if at == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "no addresses")
    try:
        part = libc.mmap(ctypes.c_void_p(at), ctypes.c_size_t(1 << 21), 3, flags | fixed, -1, ctypes.c_long(0))
        if part == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "no memory at an address of its own choice")
    finally:
        libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(_ARENA_BYTES))


def _wake() -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    ends = os.pipe2(os.O_CLOEXEC)
    try:
        os.write(ends[1], b"x")
        os.eventfd_write(fd, 1)
        poll = select.poll()
        for one in (fd, ends[0]):
            poll.register(one, select.POLLIN)
        if len(poll.poll(1000)) != 2:
            raise OSError(110, "not woken")
    finally:
        for one in (fd, *ends):
            os.close(one)


def _scratch(call: Callable[[Path], Any]) -> Callable[[], None]:
    def attempt() -> None:
        with tempfile.TemporaryDirectory() as folder:
            call(Path(folder))

    return attempt


def _lock(folder: Path) -> None:
    with open(folder / "lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _compile(folder: Path) -> None:
    """A program written, made executable and run, as ptxas, gcc and ldconfig are."""
    script = folder / "compiler"
    # Made executable as it is made: at L1 modes cannot be changed.
    with open(os.open(script, os.O_WRONLY | os.O_CREAT, 0o700), "w") as f:
        f.write("#!/bin/sh\necho compiled >result\nmv result kernel.cubin\n")
    _run([str(script)], cwd=folder)
    (folder / "kernel.cubin").rename(folder / "kernel")


def _semaphore() -> None:
    multiprocessing.get_context("spawn").Lock()


_OF_DRIVER = ("/proc/driver/nvidia/params", "/proc/driver/nvidia-uvm", "/proc/driver/nvidia/gpus",
              "/proc/driver/nvidia/capabilities", "/proc/devices", "/proc/modules")  # fmt: skip
_OF_SYSTEM = ("/proc/self/status", "/proc/self/maps", "/proc/meminfo", "/proc/cpuinfo", "/proc/sys/vm/mmap_min_addr",
              "/proc/sys/vm/overcommit_memory")  # fmt: skip
_OF_BUSES = ("/sys/devices/system/node", "/sys/devices/system/cpu/online", "/sys/bus/pci/devices", "/sys/module",
             "/sys/devices/system/memory/block_size_bytes")  # fmt: skip
_NONO = "nolabs-ai/nono"
_SNAPD = "snapd's interface opengl (unix bind, listen type=seqpacket addr=@cuda-uvmfd-*)"
NEEDS = (
    Need("a socket to hand descriptors to peers", _SNAPD,
         ("call socket", "call setsockopt", "call bind", "call listen", "call accept4"), _listen),
    Need("names of its threads", f"{_NONO} pull 673: driver 570.211, A100", ("settings /proc/self/task",),
         _name_threads),
    Need("names of a worker's threads", f"{_NONO} issue 924: driver 580; a process started by the first",
         ("settings /proc",), _name_threads_of_a_worker, workers=True),
    Need("what the driver tells of itself", f"{_NONO} pull 673; google/gvisor issue 11069 (nvidia-modprobe, MIG)",
         ("read /proc",), _read(*_OF_DRIVER)),
    Need("what the system tells of itself", "snapd's interface opengl; NVIDIA/cuda-checkpoint issue 10",
         ("read /proc",), _read(*_OF_SYSTEM)),
    Need("processors, memory and buses", f"intel/libva issue 575 (node); snapd's interface opengl; {_NONO} issue 658",
         ("read /sys",), _read(*_OF_BUSES)),
    Need("the GPU", "intel/libva issue 575", ("device nvidiactl", "device nvidia0"),
         _open_device("nvidiactl", "nvidia0")),
    Need("its managed memory", f"{_NONO} pull 652: driver 570 fails without nvidia-uvm-tools",
         ("device nvidia-uvm", "device nvidia-uvm-tools"), _open_device("nvidia-uvm", "nvidia-uvm-tools")),
    Need("a part of a divided GPU", "NVIDIA's guide to MIG: /dev/nvidia-caps; google/gvisor issue 11069",
         ("device nvidia-caps/nvidia-cap21",), _open_device("nvidia-caps/nvidia-cap21")),
    Need("the GPU of WSL2", "NVIDIA's guide to CUDA on WSL: /dev/dxg", ("device dxg",), _open_device("dxg")),
    Need("memory files", "NVIDIA/OpenShell issue 1696: driver 570.169, error 304", ("call memfd_create",),
         _memory_file),
    Need("the memory policy", "intel/libva issue 575; NVIDIA/cuda-checkpoint issue 10", ("call get_mempolicy",),
         _policy),
    Need("addresses beyond any memory", "google/gvisor issue 10331 (MAP_FIXED in a range of its own)",
         ("limit RLIMIT_AS",), _reserve),
    Need("events and pipes", "google/gvisor issue 9827 (the descriptors of a process on CUDA)",
         ("call eventfd2", "call pipe2", "call poll"), _wake),
    Need("thread names by prctl", "torch and Triton name their pools' threads", ("call prctl",),
         lambda: _done(_libc().prctl(_PR_SET_NAME, b"rehearsal", 0, 0, 0))),
    Need("compilers, linker and ldconfig", "triton: runtime/build.py, backends/nvidia (ptxas, ldconfig -p)",
         ("call execve", "read /usr", "write TMPDIR"), _scratch(_compile)),
    Need("locks on files of its own", "torch: _inductor/codecache.py (FileLock)", ("call flock",), _scratch(_lock)),
    Need("semaphores of a pool of compilers", "torch: _inductor/compile_worker", ("write /dev/shm",), _semaphore,
         workers=True),
)  # fmt: skip


def _connect() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.connect("\0hotloop-rehearsal")


def _datagrams() -> None:
    for s in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM):
        s.close()


def _number(name: str, *args: Any) -> Callable[[], None]:
    def attempt() -> None:
        from hotloop.harness.sandbox.seccomp import REFUSED, REFUSED_MODEL

        number = (REFUSED | REFUSED_MODEL)[name][os.uname().machine == "aarch64"]
        _call(number, *args)

    return attempt


REFUSED: dict[str, Callable[[], Any]] = {
    "connecting its kind of socket": _connect,
    "a stream socket": lambda: socket.socket(socket.AF_UNIX).close(),
    "an internet socket": lambda: socket.socket().close(),
    "a netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
    "datagrams": _datagrams,
    "the file of another GPU": _open_device("nvidia7"),
    "the kernel's settings": lambda: open("/proc/sys/kernel/core_pattern", "w").close(),
    "reading another process": _number("process_vm_readv", 1, None, 0, None, 0, 0),
    "tracing": _number("ptrace", 16, 1, 0, 0),
    "counters of the processor": _number("perf_event_open", None, 0, -1, -1, 0),
    "programs in the kernel": _number("bpf", 0, None, 0),
    "handling faults of pages": _number("userfaultfd", 0),
    "rings of system calls": _number("io_uring_setup", 1, None),
    "keyrings": _number("keyctl", 0, -3, 1),
    "namespaces": _number("unshare", 0x10000000),
    "mounts": _number("mount", None, None, None, 0, None),
    "modules": _number("init_module", None, 0, None),
    "which pages are in memory": _number("mincore", None, 0, None),
    "watches on files": _number("inotify_init1", 0),
}


def rehearse(sandbox: Sandbox) -> dict[str, str]:
    """Have a child on CUDA try everything; name -> what went wrong, for each need not met and each refusal missing.

    Raises:
        SandboxError: no child can be started.
    """

    with tempfile.TemporaryDirectory(prefix="hotloop-rehearsal-") as folder:
        log = Path(folder) / "log.txt"
        policy = Policy("hotloop.harness.sandbox.rehearsal", Path(folder) / "run", device="cuda")
        with Child(sandbox, policy, [], log, 1) as child:
            try:
                there = [p for p in (*_OF_DRIVER, *_OF_SYSTEM, *_OF_BUSES) if os.path.exists(p)]
                absent = [n.name for n in NEEDS if not all(map(_is_there, n.grants))]
                child.wire.send(
                    "hello", dev=visible.DEV, workers=sandbox.level != 1, there=there, absent=absent, other=os.getpid()
                )
                found = child.wire.recv(LIMIT_S).get("found")
            except (Closed, Malformed, TimedOut):
                words = " ".join(" ".join(tail(log, 3)).split())[-200:]
                raise SandboxError(f"the rehearsal did not end ({words or 'no answer'})") from None
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {"answer": "none"}


def refused_needs(sandbox: Sandbox) -> dict[str, str]:
    """The needs that a child in this sandbox was refused -> how; to explain why CUDA does not work there."""
    try:
        found = rehearse(sandbox)
    except SandboxError as e:
        return {"everything": str(e)}
    return {need.name: found[need.name] for need in NEEDS if need.name in found}


def _is_there(grant: str) -> bool:
    """Whether this machine has it at all; only devices may be missing."""
    kind, _, name = grant.partition(" ")
    return kind != "device" or os.path.exists(f"{visible.DEV}/{name}")


def child_main(wire: Wire, descriptors: list[int]) -> None:
    hello = wire.recv()
    visible.DEV = hello["dev"]
    found = {}
    for need in NEEDS:
        if need.name in hello["absent"] or (need.workers and not hello["workers"]):
            continue
        if wrong := _failure(need.attempt):
            found[need.name] = wrong
    found |= {path: "it is not there" for path in hello["there"] if not os.path.exists(path)}
    other = f"/proc/{hello['other']}"
    others = {
        f"writing to {name} of another process": lambda name=name: open(f"{other}/{name}", "w").close()
        for name in ("comm", "oom_score_adj", "coredump_filter", "task/" + other[6:] + "/comm")
    }
    for name, attempt in (REFUSED | others).items():
        if not _failure(attempt):
            found[name] = "it is not refused"
    wire.send("rehearsed", found=found)
    wire.recv()


def _failure(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except (OSError, subprocess.SubprocessError) as e:
        return str(e) or type(e).__name__
    return ""


def _run(argv: list[str], cwd: Path | None = None) -> None:
    subprocess.run(argv, cwd=cwd, check=True, capture_output=True, timeout=LIMIT_S)


def _done(result: int) -> None:
    if result == -1:
        raise OSError(ctypes.get_errno(), "refused")


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def _call(number: int | None, *args: Any) -> None:
    _done(_libc().syscall(ctypes.c_long(number or -1), *args))
