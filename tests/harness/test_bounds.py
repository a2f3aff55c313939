"""What a process tree takes of the machine, and what ends it before the kernel must choose whom to end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hotloop.harness.paths import project_root
from hotloop.harness.sandbox import bounds, process
from hotloop.harness.sandbox.bounds import Bounds, headroom, limited_cgroups, size_of, tree_bytes
from hotloop.harness.sandbox.launch import first_to_go
from hotloop.harness.sandbox.policy import Policy, Sandbox
from hotloop.harness.sandbox.process import ProcessTree
from tests import needs
from tests.needs import at

MIB = 1 << 20


def cgroup(folder: Path, limit: str, used: int, files: int, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"), 2: ("memory.max", "memory.current", "")}
    most, now, prefix = names[version]
    (folder / most).write_text(limit + "\n")
    (folder / now).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{prefix}active_file {files}\n{prefix}inactive_file 0\nshmem 5\n")


def test_the_limits_of_all_cgroups_above_are_found(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "self"
    cgroup(root, "max", 0, 0, 2)
    cgroup(root / "a", str(3 << 30), 2 << 30, 1 << 30, 2)
    cgroup(root / "a" / "b", "max", 0, 0, 2)
    own.write_text("0::/a/b\n")
    found = limited_cgroups(root, own)
    assert found == [(root / "a", 3 << 30)]
    # What is left of it: the pages of files can be dropped, shared memory cannot.
    assert headroom(found) == min(headroom(), 2 << 30)
    assert bounds.floor_bytes(found) <= (3 << 30) // 20


def test_version_1_and_the_path_of_a_container_are_understood(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "self"
    cgroup(root / "memory", str(2 << 30), 1 << 30, 0, 1)
    cgroup(root / "memory" / "mine", str((1 << 63) - 4096), 0, 0, 1)  # no limit, as version 1 says it
    own.write_text("4:memory:/mine\n0::/\n1:cpu:/x\n")
    assert limited_cgroups(root, own) == [(root / "memory", 2 << 30)]
    own.write_text("4:cpu,memory:/docker/0123\n")  # the host's path, which is not mounted here
    assert limited_cgroups(root, own) == [(root / "memory", 2 << 30)]
    assert headroom([(root / "memory", 2 << 30)]) == min(headroom(), 1 << 30)
    assert limited_cgroups(root, tmp_path / "nothing") == []


@pytest.fixture
def holder() -> Iterator[Callable[[str], int]]:
    """Starts a Python that runs a line, says so, and waits; gives its pid."""
    started: list[subprocess.Popen[str]] = []

    def hold(code: str) -> int:
        text = f"import mmap, os, sys, time\n{code}\nprint(flush=True)\ntime.sleep(60)"
        p = subprocess.Popen([sys.executable, "-I", "-S", "-c", text], stdout=subprocess.PIPE, text=True)
        started.append(p)
        assert p.stdout is not None
        p.stdout.readline()
        return p.pid

    yield hold
    for p in started:
        p.kill()
        p.wait()
        assert p.stdout is not None
        p.stdout.close()


HOLD = {
    "private memory": "x = bytearray(b'x') * (64 << 20)",
    "shared memory without a name": "m = mmap.mmap(-1, 64 << 20); m.write(bytes(64 << 20))",
    "a memfd that nothing maps": "fd = os.memfd_create('x'); [os.write(fd, bytes(1 << 20)) for _ in range(64)]",
}  # fmt: skip


@pytest.mark.parametrize("kind", HOLD)
def test_memory_of_each_kind_is_counted(kind: str, holder: Callable[[str], int]) -> None:
    bare, full = tree_bytes([holder("")]), tree_bytes([holder(HOLD[kind])])
    assert 63 * MIB < full - bare < 80 * MIB


def test_what_two_processes_share_is_counted_once_where_it_matters(holder: Callable[[str], int]) -> None:
    first = holder(HOLD["private memory"] + "\nother = os.fork()\nif other == 0: time.sleep(60)")
    both = [first, *process.descendants(first)]
    assert len(both) == 2
    assert tree_bytes(both) > 126 * MIB
    assert tree_bytes(both, most=100 * MIB) < 100 * MIB
    assert tree_bytes(both, most=20 * MIB) > 63 * MIB


def test_files_are_counted_until_they_are_too_many(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "sparse").touch()
    os.truncate(tmp_path / "a" / "sparse", 1 << 40)
    assert size_of(tmp_path) < MIB
    (tmp_path / "b").write_bytes(os.urandom(2 * MIB))
    assert 2 * MIB <= size_of(tmp_path) < 3 * MIB
    assert size_of(tmp_path, uid=os.getuid() + 1) == 0
    for n in range(64):  # empty ones cost something too
        (tmp_path / "a" / str(n)).touch()
    assert size_of(tmp_path / "a") >= 64 * 1024


def run(sandbox: Sandbox, code: str, folder: Path, device: str = "cuda", most: Bounds | None = None) -> ProcessTree:
    """`code` in the sandbox of a child, until it ends or is ended."""
    policy = Policy("", folder / "run", device=device)
    (folder / "run").mkdir()
    launch = sandbox.launch(policy, [], {"PATH": os.environ["PATH"]})
    config = json.loads(launch.argv[-1])
    config["exec"] = [sys.executable, "-I", "-S", "-c", "import os, time\n" + code + "\ntime.sleep(30)"]
    launch.argv[-1] = json.dumps(config)
    with ProcessTree(launch, folder / "log.txt", most or policy.bounds) as tree:
        tree.wait(25.0)
    return tree


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_what_goes_first_is_said_before_it_starts_and_its_environment_is_what_it_was(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    argv = first_to_go(["sh", "-c", "cat /proc/$$/oom_score_adj; tr '\\0' '\\n' </proc/$$/environ"])
    env = {"PATH": os.environ["PATH"], "A": "x"}
    done = subprocess.run([shell, *argv[1:]], env=env, capture_output=True, text=True, check=True)
    score, *found = done.stdout.split()
    assert score == str(bounds.FIRST)
    assert dict(line.split("=", 1) for line in found) == env


SPARE = """
def spare():
    try:
        with open('/proc/self/oom_score_adj', 'w') as f: f.write('0')
    except OSError:
        print('REFUSED', flush=True)
        os._exit(0)
    print('DONE', flush=True)
    time.sleep(30)
"""
WAYS = {
    "itself": "spare()",
    "a process of its own": "if os.fork() == 0:\n    os.setsid()\n    spare()\nos.wait()\nos._exit(0)",
}


@pytest.mark.parametrize("number", [at(3), at(2), at(1)])
@pytest.mark.parametrize("way", WAYS)
def test_who_asks_to_be_spared_is_refused_or_ended(tmp_path: Path, number: int, way: str) -> None:
    """On CUDA, where files in /proc must be writable; the kernel refuses it where root could fix the score."""
    tree = run(needs.sandbox(number), SPARE + WAYS[way], tmp_path)
    said = (tmp_path / "log.txt").read_text()
    if said == "DONE\n":
        assert tree.fault == "it made itself one of those that the system spares when memory runs out"
    else:
        assert (said, tree.fault, tree.returncode) == ("REFUSED\n", "", 0)


def test_a_log_and_files_are_bounded_while_they_grow(tmp_path: Path) -> None:
    sandbox = needs.sandbox(1)
    (tmp_path / "a").mkdir()
    endless = run(sandbox, "while True: print('x' * 4096)", tmp_path / "a", "cpu", Bounds(log=MIB))
    assert endless.fault == "its log grew beyond 1 MiB"
    (tmp_path / "b").mkdir()
    code = "for n in range(10**6): open(os.environ['TMPDIR'] + f'/{n}', 'w').close()"
    many = run(sandbox, code, tmp_path / "b", "cpu", Bounds(files=MIB))
    assert many.fault == "its files grew beyond 1 MiB"


def test_memory_under_way_in_a_socket_ends_it_before_the_machine_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process maps it or has a descriptor of it; only what is left of the machine's memory tells."""
    left = headroom()
    if left < 3 << 30:
        pytest.skip("too little memory to take some")
    monkeypatch.setattr(process, "floor_bytes", lambda _: left - (1 << 30))
    code = (
        "import array, socket\n"
        "for n in range(32):\n"
        "    a, b = socket.socketpair(); fd = os.memfd_create('x')\n"
        "    for _ in range(64): os.write(fd, bytes(1 << 20))\n"
        "    a.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [fd]))]); os.close(fd)\n"
        "    globals()[f's{n}'] = (a, b)"
    ).replace(
        "import array, socket",
        "import sys; sys.path += __import__('sysconfig').get_paths().values()\nimport array, socket",
    )
    tree = run(needs.sandbox(3), code, tmp_path)
    assert (tree.fault_status, tree.fault.split(":")[0]) == ("oom", "memory ran out")


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A cgroup of 2 GiB to join; only root can make one, and not in every container."""
    v1 = Path("/sys/fs/cgroup/memory")
    folder = (v1 if v1.is_dir() else Path("/sys/fs/cgroup")) / f"hotloop-test-{os.getpid()}"
    limit = "memory.limit_in_bytes" if v1.is_dir() else "memory.max"
    try:
        folder.mkdir()
    except OSError as e:
        pytest.skip(f"no cgroup can be made here: {e}")
    try:
        (folder / limit).write_text(str(2 << 30))
    except OSError as e:
        folder.rmdir()
        pytest.skip(f"no cgroup can be limited here: {e}")
    yield folder
    for _ in range(100):
        try:
            folder.rmdir()
            break
        except OSError:
            time.sleep(0.1)


DRIVER = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
Path({cgroup!r}, "cgroup.procs").write_text(str(os.getpid()))
from tests.harness.test_bounds import SPARE, run
from hotloop.harness.sandbox.levels import best
code = SPARE.replace("os._exit(0)", "return").replace("time.sleep(30)", "") + '''
spare()
for n in range(64):
    fd = os.memfd_create("x")
    for _ in range(64): os.write(fd, bytes(1 << 20))
time.sleep(30)
'''
tree = run(best({level}), code, Path({folder!r}))
print(tree.fault_status, tree.fault)
"""


@pytest.mark.parametrize("number", [at(3), at(1)])
def test_the_driver_lives_where_a_child_fills_the_cgroup_of_both(
    small_cgroup: Path, tmp_path: Path, number: int
) -> None:
    """The child asks to be spared, and hides what it takes in memfds that nothing maps."""
    needs.sandbox(number)
    code = DRIVER.format(root=str(project_root()), cgroup=str(small_cgroup), level=number, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    assert done.stdout.split()[0] in ("oom", "crash")
    assert "memory ran out" in done.stdout or "spares when memory runs out" in done.stdout
