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
from typing import Any

from hotloop.harness.errors import SandboxError
from hotloop.harness.sandbox import landlock
from hotloop.harness.sandbox.policy import Policy, Sandbox
from hotloop.harness.sandbox.process import Child, tail
from hotloop.harness.sandbox.visible import hidden_text
from hotloop.harness.sandbox.wire import Closed, Malformed, TimedOut, Wire

__all__ = ["MUST", "child_main", "probe", "promised"]

_FILES = ("reading the user's files", "writing the user's files", "changing their modes")
_TEXT = "reading the built-in text"
_OTHERS = ("reading another process's memory", "tracing another process", "writing another process's settings",
           "signalling another process")  # fmt: skip
_NETWORK = ("TCP", "UDP", "sockets with a path", "datagrams through a pair of sockets")
_STORES = ("System V shared memory", "kernel keyrings")
_MACHINE = ("writing kernel settings", "new namespaces", "a daemon that stays")
_SCORE = "being spared when memory runs out"
# What each level promises. Abstract sockets and signals need Landlock's ABI 6 where no namespace stops them.
MUST: dict[int, tuple[str, ...]] = {
    3: (*_FILES, _TEXT, *_OTHERS, *_NETWORK, "abstract sockets", *_STORES, *_MACHINE, "seeing other processes"),
    2: (*_FILES, _TEXT, *_OTHERS, *_NETWORK, *_STORES, *_MACHINE),
    1: (*_FILES, _TEXT, *_OTHERS[:3], *_NETWORK, *_STORES, *_MACHINE),
    0: (),
}


def promised(sandbox: Sandbox, device: str) -> tuple[str, ...]:
    """What a child on `device` must be stopped from.

    One on CUDA must be able to write to its own files in /proc, its score for the kernel's killer among them; where
    nothing privileged fixed that, only the watch over memory is left (`harness.memory`).
    """
    return (*MUST[sandbox.level], *([_SCORE] if device == "cpu" and sandbox.level and landlock.abi() else []))


def probe(sandbox: Sandbox, device: str = "cpu") -> dict[str, bool]:
    """Run one probing child, with what one on `device` may do; whether each attempt was stopped.

    Raises:
        SandboxError: no child can be started in this sandbox.
    """

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hotloop-probe-")))
        canary = folder / "canary"
        canary.write_text("secret")
        canary.chmod(0o644)
        folder.chmod(0o755)
        tcp, udp = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
        unix, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        packets = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        for s in (tcp, udp, unix, abstract, packets, datagrams):
            stack.enter_context(s)
        tcp.bind(("127.0.0.1", 0))
        udp.bind(("127.0.0.1", 0))
        unix.bind(str(folder / "socket"))
        (folder / "socket").chmod(0o777)
        for s, name in ((abstract, "stream"), (packets, "packets"), (datagrams, "datagrams")):
            s.bind(f"\0hotloop-probe-{os.getpid()}-{name}")
        for s in (tcp, unix, abstract, packets):
            s.listen()
        other = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"], stdin=subprocess.DEVNULL
        )
        stack.callback(other.wait)
        stack.callback(other.kill)
        kept, keep = os.pipe()
        stack.callback(os.close, kept)
        log = folder / "log.txt"
        with Child(
            sandbox, Policy("hotloop.harness.sandbox.probe", folder / "run", device=device), [keep], log, 1
        ) as child:
            os.close(keep)
            try:
                child.wire.send(
                    "hello", canary=str(canary), tcp=tcp.getsockname()[1], udp=udp.getsockname()[1],
                    unix=str(folder / "socket"), other=other.pid, texts=hidden_text(),
                    **{name: s.getsockname().decode() for name, s in
                       (("abstract", abstract), ("packets", packets), ("datagrams", datagrams))},
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
        if device != "cpu" and not sandbox.own_uid:
            del stopped[_SCORE]  # see promised()
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

    def unix(address: str, kind: int = socket.SOCK_STREAM) -> None:
        with socket.socket(socket.AF_UNIX, kind) as s:
            s.connect(address)

    def abstract() -> None:
        with contextlib.suppress(OSError):
            unix(hello["packets"], socket.SOCK_SEQPACKET)
            return
        unix(hello["abstract"])

    def datagram() -> None:
        for s in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM):
            s.sendto(b"x", hello["datagrams"])

    def settings() -> None:
        for name in ("comm", "oom_score_adj", "coredump_filter", f"task/{other}/oom_score_adj"):
            with contextlib.suppress(OSError), open(f"/proc/{other}/{name}", "r+"):
                return
        raise OSError("refused")

    def score() -> None:
        with open("/proc/self/oom_score_adj", "w") as f:
            f.write("0")

    def chmod() -> None:
        os.chmod(hello["canary"], 0o600)

    def text() -> None:
        files = [os.path.join(d, n) for t in hello["texts"] for d, _, names in os.walk(t) for n in names]
        files += [os.path.join(t, "__init__.py") for t in hello["texts"]]  # also where the folder cannot be listed
        for path in files:
            with contextlib.suppress(OSError):
                Path(path).read_bytes()
                return
        raise OSError("none of it")

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
        _TEXT: text,
        _OTHERS[0]: lambda: open(f"/proc/{other}/mem", "rb").close(),
        _OTHERS[1]: lambda: call(libc.ptrace(16, other, 0, 0)),  # PTRACE_ATTACH
        _OTHERS[2]: settings,
        _OTHERS[3]: lambda: os.kill(other, signal.SIGCONT),
        "seeing other processes": lambda: Path(f"/proc/{other}/cmdline").read_bytes(),
        _NETWORK[0]: tcp,
        _NETWORK[1]: udp,
        _NETWORK[2]: lambda: unix(hello["unix"]),
        _NETWORK[3]: datagram,
        "abstract sockets": abstract,
        _STORES[0]: lambda: call(libc.shmget(0, 4096, 0o1600)),
        _STORES[1]: keyring,
        _MACHINE[0]: kernel_setting,
        _MACHINE[1]: lambda: call(libc.unshare(0x10000000)),  # CLONE_NEWUSER
        _SCORE: score,
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
