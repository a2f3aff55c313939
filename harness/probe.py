"""What a sandbox really stops: a child in it tries, and says how far it came.

`probe(sandbox)` gives name -> stopped. The attempts are made on canaries that the parent put up for them: a file, a
listener on the loopback address, an abstract socket, a process, a descriptor that a daemon would keep open.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import SandboxError
from harness.wire import Closed, Malformed, TimedOut, Wire

if TYPE_CHECKING:
    from harness.sandbox import Sandbox

__all__ = ["MUST", "child_main", "probe"]

_FILES = ("reading the user's files", "writing the user's files", "changing their modes")
_OTHERS = ("reading another process's memory", "tracing another process", "signalling another process")
_NETWORK = ("TCP", "UDP", "sockets with a path")
_STORES = ("System V shared memory", "kernel keyrings")
_MACHINE = ("writing kernel settings", "new namespaces", "a daemon that stays")
# What each level promises. Abstract sockets and signals need Landlock's ABI 6 where no namespace stops them.
MUST: dict[int, tuple[str, ...]] = {
    3: (*_FILES, *_OTHERS, *_NETWORK, "abstract sockets", *_STORES, *_MACHINE, "seeing other processes"),
    2: (*_FILES, *_OTHERS, *_NETWORK, *_STORES, *_MACHINE),
    1: (*_FILES, *_OTHERS[:2], *_NETWORK, *_STORES, *_MACHINE),
    0: (),
}


def probe(sandbox: Sandbox) -> dict[str, bool]:
    """Run one probing child; whether each attempt was stopped.

    Raises:
        SandboxError: no child can be started in this sandbox.
    """
    from harness.process import Child, tail
    from harness.sandbox import Policy

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hotloop-probe-")))
        canary = folder / "canary"
        canary.write_text("secret")
        canary.chmod(0o644)
        folder.chmod(0o755)
        tcp, udp = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
        unix, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        for s in (tcp, udp, unix, abstract):
            stack.enter_context(s)
        tcp.bind(("127.0.0.1", 0))
        udp.bind(("127.0.0.1", 0))
        unix.bind(str(folder / "socket"))
        (folder / "socket").chmod(0o777)
        abstract.bind(f"\0hotloop-probe-{os.getpid()}")
        for s in (tcp, unix, abstract):
            s.listen()
        other = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"], stdin=subprocess.DEVNULL
        )
        stack.callback(other.wait)
        stack.callback(other.kill)
        kept, keep = os.pipe()
        stack.callback(os.close, kept)
        log = folder / "log.txt"
        with Child(sandbox, Policy("harness.probe", folder / "run"), [keep], log, 1) as child:
            os.close(keep)
            try:
                child.wire.send(
                    "hello", canary=str(canary), tcp=tcp.getsockname()[1], udp=udp.getsockname()[1],
                    unix=str(folder / "socket"), abstract=abstract.getsockname().decode(), other=other.pid,
                )  # fmt: skip
                answer = child.wire.recv(20.0)
            except (Closed, Malformed, TimedOut):
                lines = [line for line in tail(log) if line.strip()]  # the last says what, those before it where
                raise SandboxError(f"a child could not be started ({lines[-1] if lines else 'no answer'})") from None
            child.kill()
        if not isinstance(answer.get("stopped"), dict):
            raise SandboxError("the probe gave no answer")
        stopped = {str(k): bool(v) for k, v in answer["stopped"].items()}
        stopped[_MACHINE[2]] = bool(select.select([kept], [], [], 0.5)[0])  # readable: nobody holds the other end
        stopped[_FILES[1]] &= canary.read_text() == "secret"
        return stopped


# In the child.


def child_main(wire: Wire, descriptors: list[int]) -> None:
    hello = wire.recv()
    stopped = {name: _stopped(attempt) for name, attempt in _attempts(hello).items()}
    _daemon()
    wire.send("probed", stopped=stopped)
    wire.recv()


def _stopped(attempt: Callable[[], Any]) -> bool:
    try:
        attempt()
    except OSError:
        return True
    return False


def _attempts(hello: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    other = hello["other"]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long

    def call(result: int) -> None:
        if result == -1:
            raise OSError(ctypes.get_errno(), "refused")

    def tcp() -> None:
        with socket.create_connection(("127.0.0.1", hello["tcp"]), timeout=2):
            pass

    def udp() -> None:
        with socket.socket(type=socket.SOCK_DGRAM) as s:
            s.sendto(b"x", ("127.0.0.1", hello["udp"]))

    def unix(address: str) -> None:
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(address)

    def chmod() -> None:
        os.chmod(hello["canary"], 0o600)

    def keyring() -> None:
        import platform

        number = {"x86_64": 250, "aarch64": 219}[platform.machine()]
        call(libc.syscall(number, 0, -3, 1))  # KEYCTL_GET_KEYRING_ID of the session, made where missing

    def kernel_setting() -> None:
        with open("/proc/sys/kernel/core_pattern", "r+") as f:
            f.readline()

    return {
        _FILES[0]: lambda: Path(hello["canary"]).read_bytes(),
        _FILES[1]: lambda: Path(hello["canary"]).write_text("changed"),
        _FILES[2]: chmod,
        _OTHERS[0]: lambda: open(f"/proc/{other}/mem", "rb").close(),
        _OTHERS[1]: lambda: call(libc.ptrace(16, other, 0, 0)),  # PTRACE_ATTACH
        _OTHERS[2]: lambda: os.kill(other, signal.SIGCONT),
        "seeing other processes": lambda: Path(f"/proc/{other}/cmdline").read_bytes(),
        _NETWORK[0]: tcp,
        _NETWORK[1]: udp,
        _NETWORK[2]: lambda: unix(hello["unix"]),
        "abstract sockets": lambda: unix(hello["abstract"]),
        _STORES[0]: lambda: call(libc.shmget(0, 4096, 0o1600)),
        _STORES[1]: keyring,
        _MACHINE[0]: kernel_setting,
        _MACHINE[1]: lambda: call(libc.unshare(0x10000000)),  # CLONE_NEWUSER
    }


def _daemon() -> None:
    """A process of its own session that nobody waits for, with every descriptor kept."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
    os.waitpid(pid, 0)
