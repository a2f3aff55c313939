"""The pieces of the sandbox, and the choice among its levels."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop.harness.errors import DeviceError, SandboxError, TrialError
from hotloop.harness.gpu import between_runs, nvml
from hotloop.harness.gpu.devices import gpus_at
from hotloop.harness.paths import project_root
from hotloop.harness.preflight import lint
from hotloop.harness.sandbox import landlock, levels, seccomp
from hotloop.harness.sandbox.levels import best
from hotloop.harness.sandbox.policy import Policy, Sandbox
from hotloop.harness.sandbox.probe import MUST
from hotloop.harness.sandbox.probe_cuda import probe_cuda
from hotloop.harness.sandbox.process import Child
from hotloop.harness.sandbox.visible import device_nodes, exposed
from hotloop.harness.sandbox.wire import Closed
from hotloop.harness.training.budget import Budget
from hotloop.harness.training.session import Session, SessionConfig
from tests.harness.fake_nvml import H100, FakeNvml
from tests.needs import at, sandbox

ROOT = project_root()


def restricted(code: str, setup: str) -> subprocess.CompletedProcess[str]:
    """A Python that restricts itself with `setup` and then runs `code`."""
    text = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom hotloop.harness.sandbox import landlock, seccomp\n"
    text += f"{setup}\n{code}"
    return subprocess.run([sys.executable, "-I", "-c", text], capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(landlock.abi() < 1, reason="this kernel has no Landlock")
def test_landlock_allows_what_is_listed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("read", "write", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    setup = f"landlock.restrict(['/usr', '/lib', {str(tmp_path / 'read')!r}], [{str(tmp_path / 'write')!r}])"
    tries = {
        "read what is readable": (f"open({str(tmp_path / 'read/file')!r})", True),
        "write what is readable": (f"open({str(tmp_path / 'read/file')!r}, 'a')", False),
        "write what is writable": (f"open({str(tmp_path / 'write/new')!r}, 'w')", True),
        "read what is closed": (f"open({str(tmp_path / 'closed/file')!r})", False),
        "list what is closed": (f"__import__('os').listdir({str(tmp_path / 'closed')!r})", False),
        "rename out of what is closed": (
            f"__import__('os').rename({str(tmp_path / 'closed/file')!r}, {str(tmp_path / 'write/file2')!r})", False),
    }  # fmt: skip
    for name, (code, works) in tries.items():
        done = restricted(code, setup)
        assert (done.returncode == 0) == works, (name, done.stderr)
        assert works or "Permission" in done.stderr or "Invalid cross-device" in done.stderr, (name, done.stderr)


@pytest.mark.skipif(not seccomp.supported(), reason="this machine's system calls are not known")
@pytest.mark.parametrize(
    ("code", "works"),
    [
        ("import socket; socket.socket()", False),
        ("import socket; socket.socket(socket.AF_UNIX)", False),
        ("import socket; a, b = socket.socketpair(); a.send(b'x'); assert b.recv(1) == b'x'", True),
        ("import subprocess; subprocess.run(['true'], check=True)", True),
        ("import threading; t = threading.Thread(target=print); t.start(); t.join()", True),
        ("import os; os.chmod('/tmp', 0o777)", False),
        ("import resource, os; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)", False),
        ("import resource; resource.getrlimit(resource.RLIMIT_NOFILE)", True),
        ("import fcntl; fcntl.ioctl(0, 0x5412, b'x')", False),
        ("import os; os.unshare(0x10000000) if hasattr(os, 'unshare') else 1 / 0", False),
        ("import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)", False),
        ("import socket; socket.socketpair()[0].bind('\\0hotloop-name')", False),
        ("import os; os.preadv(os.open('/etc/passwd', 0), [bytearray(4)], 0, os.RWF_NOWAIT)", False),
        ("import os; os.preadv(os.open('/etc/passwd', 0), [bytearray(4)], 0)", True),
        ("import os; os.posix_fadvise(os.open('/etc/passwd', 0), 0, 0, os.POSIX_FADV_WILLNEED)", True),
        ("import fcntl; fcntl.fcntl(open('/etc/passwd'), fcntl.F_SETLEASE, fcntl.F_RDLCK)", False),
        ("import fcntl; fcntl.flock(open('/etc/passwd'), fcntl.LOCK_SH)", True),
        ("import ctypes; assert ctypes.CDLL(None).prctl(4, 0, 0, 0, 0) == 0, 'not permitted'", False),
    ],
)
def test_seccomp_refuses_its_list_and_leaves_the_rest(code: str, works: bool) -> None:
    done = restricted(code, "seccomp.restrict(metadata=True, model=True)")
    assert (done.returncode == 0) == works, done.stderr
    assert works or re.search("not permitted|not supported|ZeroDivision", done.stderr), done.stderr


@pytest.mark.skipif(not seccomp.supported(), reason="this machine's system calls are not known")
@pytest.mark.parametrize("flags", ["0", "socket.SOCK_CLOEXEC", "socket.SOCK_NONBLOCK"])
@pytest.mark.parametrize(
    ("code", "works"),
    [
        ("s = make(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.bind('\\0hotloop-' + str(os.getpid())); s.listen()", True),
        ("s = make(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect('\\0hotloop-nobody')", False),
        ("make(socket.AF_UNIX, socket.SOCK_STREAM)", False),
        ("make(socket.AF_UNIX, socket.SOCK_DGRAM)", False),
        ("make(socket.AF_INET, socket.SOCK_STREAM)", False),
        ("make(socket.AF_NETLINK, socket.SOCK_RAW)", False),
        ("make(socket.AF_INET, socket.SOCK_SEQPACKET)", False),
    ],
)
def test_of_all_sockets_cuda_may_make_the_one_that_libcuda_listens_on(code: str, works: bool, flags: str) -> None:
    make = f"import os, socket\ndef make(family, kind): return socket.socket(family, kind | {flags})\n"
    done = restricted(make + code, "seccomp.restrict(cuda=True, model=True)")
    assert (done.returncode == 0) == works, done.stderr
    assert works or "Errno 1]" in done.stderr, done.stderr
    assert restricted(make + code, "seccomp.restrict(model=True)").returncode != 0


def test_pages_that_are_to_be_dropped_stay(tmp_path: Path) -> None:
    """It says that it did, so that no compiler fails; a page that a read brought in is still there."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 16))
    code = (
        f"import mmap, os; fd = os.open({str(path)!r}, 0); os.fsync(fd)\n"
        "os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)\n"
        "m = mmap.mmap(fd, 0, prot=mmap.PROT_READ); sum(m[::4096]); m.madvise(21); m.madvise(20)"
    )
    done = restricted(code, "seccomp.restrict(model=True)")
    assert done.returncode == 0, done.stderr
    assert os.preadv(os.open(path, os.O_RDONLY), [bytearray(1 << 16)], 0, os.RWF_NOWAIT) == 1 << 16


def test_the_numbers_of_system_calls_are_those_of_the_headers() -> None:
    headers = {
        0: Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        1: Path("/usr/include/asm-generic/unistd.h"),
    }
    found = False
    for column, path in headers.items():
        if not path.exists():
            continue
        found = True
        numbers = {name: int(n) for name, n in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())}
        tables = (seccomp.REFUSED, seccomp.REFUSED_METADATA, seccomp.REFUSED_NETWORK, seccomp.REFUSED_MODEL)
        for name, pair in (item for table in tables for item in table.items()):
            number = pair[column]
            assert number is None or numbers.get(name, number) == number, (name, path)
    if not found:
        pytest.skip("no kernel headers here")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("metadata", [False, True])
@pytest.mark.parametrize("cuda", [False, True])
def test_the_filter_decides_each_call_as_its_table_says(machine: str, metadata: bool, cuda: bool) -> None:
    """The program, run by an interpreter of BPF written here."""
    code = seccomp.program(machine, metadata=metadata, cuda=cuda, model=True)
    steps = [struct.unpack_from("=HBBI", code, 8 * i) for i in range(len(code) // 8)]
    arch = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    column = 0 if machine == "x86_64" else 1

    def verdict(number: int, *args: int, arch: int = arch) -> int:
        data = struct.pack("=IIQ6Q", number, arch, 0, *args, *[0] * (6 - len(args)))
        at, word = 0, 0
        while True:
            kind, yes, no, k = steps[at]
            if kind == 0x06:
                return k
            if kind == 0x20:
                (word,) = struct.unpack_from("=I", data, k)
                at += 1
            elif kind == 0x54:
                word, at = word & k, at + 1
            else:
                hit = {0x15: word == k, 0x35: word >= k}[kind]
                at += 1 + (yes if hit else no)

    allow, eperm, enosys, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    for name, pair in seccomp.REFUSED.items():
        if pair[column] is not None:
            assert verdict(pair[column]) == eperm, name
    for name, pair in seccomp.REFUSED_METADATA.items():
        if pair[column] is not None:
            assert verdict(pair[column]) == (eperm if metadata else allow), name
    for name, pair in seccomp.REFUSED_NETWORK.items():
        assert verdict(pair[column], 1, 5) == (allow if cuda and name != "connect" else eperm), name
    for name, pair in seccomp.REFUSED_MODEL.items():
        if pair[column] is not None:
            assert verdict(pair[column]) == eperm, name
    call = {
        "read": (0, 63), "clone": (56, 220), "clone3": (435, 435), "socket": (41, 198), "socketpair": (53, 199),
        "prlimit64": (302, 261), "ioctl": (16, 29), "execve": (59, 221), "memfd_create": (319, 279),
        "fadvise64": (221, 223), "madvise": (28, 233), "fcntl": (72, 25), "preadv2": (327, 286), "prctl": (157, 167),
    }  # fmt: skip
    number = {name: pair[column] for name, pair in call.items()}
    for name in ("read", "execve", "memfd_create", "fadvise64", "madvise", "fcntl", "preadv2", "prctl"):
        assert verdict(number[name]) == allow
    assert verdict(number["socket"], 1, 5 | 0x80000 | 0x800) == (allow if cuda else eperm)
    for family, kind in ((1, 1), (1, 2), (2, 1), (2, 5), (16, 3), (40, 5)):
        assert verdict(number["socket"], family, kind) == eperm
    for family, kind in ((1, 1), (1, 5), (1, 1 | 0x80000)):
        assert verdict(number["socketpair"], family, kind) == allow
    for family, kind in ((1, 2), (1, 3), (2, 1)):
        assert verdict(number["socketpair"], family, kind) == eperm
    assert verdict(number["fadvise64"], 3, 0, 0, 4) == verdict(number["madvise"], 0, 0, 21) == 0x00050000
    assert verdict(number["fcntl"], 3, 1024) == verdict(number["prctl"], 4) == eperm
    assert verdict(number["preadv2"], 3, 0, 0, 0, 0, 8 | 1) == 0x0005005F
    assert verdict(number["socket"]) == eperm
    assert verdict(number["clone3"]) == enosys
    assert verdict(number["clone"], 0x3D0F00) == allow  # a thread
    assert verdict(number["clone"], 0x10000011) == eperm  # a user namespace
    assert verdict(number["prlimit64"], 0) == allow
    assert verdict(number["prlimit64"], 1) == eperm
    assert verdict(number["ioctl"], 0, 0x5401) == allow
    assert verdict(number["ioctl"], 0, 0x5412) == eperm
    assert verdict(0, arch=0x40000003) == kill  # another architecture's numbers
    if machine == "x86_64":
        assert verdict(0x40000000) == enosys


def test_every_level_that_works_here_stops_what_it_promises() -> None:
    found = best(unsafe=True)
    assert found.level >= 1 or os.environ.get("CI") != "true", found.missing
    assert all(found.probes[name] for name in MUST[found.level])
    recorded = found.as_dict()
    assert json.loads(json.dumps(recorded)) == recorded


def test_a_level_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    best.cache_clear()
    monkeypatch.setattr(levels.shutil, "which", lambda _: None)
    monkeypatch.setattr(landlock, "abi", lambda: 0)
    try:
        with pytest.raises(SandboxError, match=r"no sandbox works .*bubblewrap is not installed.*--unsafe-no-sandbox"):
            best()
        assert best(unsafe=True).level == 0
        with pytest.raises(SandboxError, match="the sandbox level L3 does not work"):
            best(3)
    finally:
        best.cache_clear()


def test_a_level_whose_probe_finds_a_hole_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    real = levels.probe
    best.cache_clear()
    monkeypatch.setattr(levels, "probe", lambda s, d: real(s, d) | ({"UDP": False} if s.level > 1 else {}))
    try:
        found = best()
        assert found.level == 1
        assert any("did not stop: UDP" in why for why in found.missing.values())
    finally:
        best.cache_clear()


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("level", [at(3), at(2), at(1)])
def test_a_sandbox_adds_at_most_a_fifth_of_a_second_to_a_start(tmp_path: Path, level: int) -> None:
    """Processor time, which a busy machine hardly changes, of a child without torch; medians against no sandbox."""
    best_one = sandbox(level)

    def start(s: Sandbox) -> float:
        began = _processor_s()
        child = Child(s, Policy("tests.harness.hello", tmp_path), [], tmp_path / "log", 1)
        with child, pytest.raises(Closed):  # the module is not there: it ends as soon as it was looked for
            child.wire.recv(10)
        return _processor_s() - began

    inside = sorted(start(best_one) for _ in range(7))[3]
    without = sorted(start(best(0)) for _ in range(7))[3]
    assert inside - without < 0.2, (inside, without)


def test_data_that_a_child_could_read_is_refused(tmp_path: Path) -> None:
    assert exposed(Path(sys.prefix) / "data")
    assert exposed(Path("/usr/share/data"))
    assert not exposed(tmp_path)


class Driver:
    """What clear_memory needs of libcuda: a device with some free memory."""

    def __init__(self, free: int, broken: str = "") -> None:
        self.free, self.broken = free, broken
        self.held: dict[int, int] = {}
        self.cleared: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda *_: 1 if name == self.broken else 0

    def cuMemAlloc_v2(self, pointer: Any, size: Any) -> int:
        if size.value > self.free:
            return 2
        self.free -= size.value
        pointer._obj.value = len(self.held) + 1
        self.held[pointer._obj.value] = size.value
        return 0

    def cuMemsetD8_v2(self, pointer: Any, value: Any, size: Any) -> int:
        assert value.value == 0
        self.cleared[pointer.value] = size.value
        return 0

    def cuMemFree_v2(self, pointer: Any) -> int:
        self.free += self.held.pop(pointer.value)
        return 0


def test_all_free_memory_of_a_gpu_is_cleared_and_given_back() -> None:
    driver = Driver((5 << 30) + (3 << 20) + 5)
    assert between_runs.clear_memory(driver) == (5 << 30) + (3 << 20)
    assert sum(driver.cleared.values()) == (5 << 30) + (3 << 20)
    assert driver.held == {}
    with pytest.raises(DeviceError, match="cuInit failed"):
        between_runs.clear_memory(Driver(1 << 30, "cuInit"))


def test_a_gpu_that_somebody_else_uses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[int] = []
    monkeypatch.setattr(between_runs, "clear", lambda _: cleared.append(1))
    monkeypatch.setattr(between_runs, "others", lambda _: ["4242 python"])
    between_runs.fresh("cpu")
    with pytest.raises(DeviceError, match="4242 python"):
        between_runs.fresh("cuda", wait_s=0.0)
    monkeypatch.setattr(between_runs, "others", lambda _: [])
    between_runs.fresh("cuda")
    assert cleared == [1]


def test_a_gpu_that_is_not_there_cannot_be_cleared() -> None:
    if nvml.cards():
        pytest.skip("there is one")
    with pytest.raises(DeviceError, match=r"could not be cleared \(.*libcuda"):
        between_runs.clear()


def test_a_sandbox_in_which_cuda_does_not_work_is_not_taken() -> None:
    if nvml.cards():
        pytest.skip("there is a GPU")
    with pytest.raises(SandboxError, match="CUDA does not work in it"):
        probe_cuda(best(unsafe=True))
    with pytest.raises(SandboxError, match=r"no sandbox works on this machine .*CUDA does not work"):
        best(device="cuda")


def test_weights_and_text_in_a_source_are_refused_and_code_is_not() -> None:
    assert lint.problem((ROOT / "train.py").read_bytes()) == ""
    for source in (b"x = '" + b"a" * 40_000 + b"'", b"x = [" + b"1," * 3000 + b"]", b"# " + b"a" * 40_000,
                   b"x = 0x" + b"f" * 2000, b"x = b'" + b"a" * 40_000 + b"'", b"x = 1\n" * 30_000):  # fmt: skip
        assert lint.problem(source) != ""
    assert lint.problem(b"def f(:") == ""  # for others to say


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
names = st.sampled_from(["bytes", "depth", "flops_per_token", "peak_mb", "rows", "seq_len", "flops", "loss", "step"])


@given(st.dictionaries(names, values))
@settings(max_examples=300, deadline=None)
def test_whatever_a_trainer_says_is_a_status_or_a_sane_number(message: dict[str, Any]) -> None:
    from hotloop.harness.settings import PRESETS, Spec

    preset = PRESETS["laptop"]
    session = Session(SessionConfig(
        source=b"", spec=Spec("laptop", "cpu", 1, 64, 256), preset=preset, rows=np.zeros((1, 257), np.uint16),
        budget=Budget(preset.budget), folder=Path(), threads=1, sandbox=Sandbox(0),
    ))  # fmt: skip
    for call in (
        lambda: session._shape(message),
        lambda: session._log(message, 0.0),
        lambda: session._count(message, "bytes", 100),
        lambda: session._number(message, "peak_mb"),
    ):
        try:
            call()
        except TrialError as e:
            assert e.status in ("invalid", "nan")
            assert len(e.reason) < 200


# ---- one of several GPUs


@pytest.fixture
def two_gpus(gpus: FakeNvml) -> FakeNvml:
    """Two GPUs, the second of them in use."""
    gpus.says(H100, H100 | {"uuid": "GPU-bb", "minor": 1, "apps": [[4242, "python"]]})
    return gpus


def test_a_child_of_one_gpu_gets_that_one_and_no_other(two_gpus: FakeNvml, tmp_path: Path) -> None:
    first, second = gpus_at([0, 1])
    assert (first.node, second.node, second.uuid) == ("/dev/nvidia3", "/dev/nvidia1", "GPU-bb")
    with pytest.raises(DeviceError, match="there is no GPU 7; nvidia-smi shows 0, 1"):
        gpus_at([7])
    nodes = device_nodes("cuda", first.node)
    assert nodes[0] == "/dev/nvidia3" and not any(n in nodes for n in ("/dev/nvidia0", "/dev/nvidia1"))
    caps = ("/dev/nvidia-caps/nvidia-cap21", "/dev/nvidia-caps/nvidia-cap22")
    assert set(caps) < set(device_nodes("cuda", first.node, caps))  # those of its slice, and of no other
    one = dataclasses.replace(Sandbox(0), gpu=second)
    for device, visible in (("cuda", "GPU-bb"), ("cpu", None)):
        launch = one.launch(Policy("hotloop.harness.sandbox.probe", tmp_path / "run", device=device), [], {})
        assert launch.env.get("CUDA_VISIBLE_DEVICES") == visible
        launch.started.close()
        launch.ended.close()


def test_who_computes_is_asked_of_that_gpu_alone(two_gpus: FakeNvml) -> None:
    first, second = gpus_at([0, 1])
    assert between_runs.others(first) == between_runs.others() == []
    assert between_runs.others(second) == ["4242 python"]
