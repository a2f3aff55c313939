"""What libcuda and the compilers ask for is granted at every level, each grant is needed, the rest stays refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hotloop.harness.paths import project_root
from hotloop.harness.sandbox import landlock, policy, seccomp, visible
from hotloop.harness.sandbox.policy import Policy, Sandbox
from hotloop.harness.sandbox.rehearsal import NEEDS, REFUSED, rehearse
from hotloop.harness.sandbox.visible import device_nodes
from tests.needs import at, sandbox

NODES = ("nvidiactl", "nvidia0", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-caps/nvidia-cap21", "dxg")
GRANTS = [(need.name, grant) for need in NEEDS for grant in need.grants]


@pytest.fixture
def dev(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stand-in device files."""
    folder = tmp_path_factory.mktemp("dev")
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)  # for a child with a uid of its own
    for name in NODES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
        (folder / name).chmod(0o666)
    monkeypatch.setattr(visible, "DEV", str(folder))
    return folder


@pytest.mark.parametrize("number", [at(3), at(2), at(1)])
def test_what_cuda_needs_is_granted_and_what_it_must_not_have_is_refused(dev: Path, number: int) -> None:
    assert rehearse(sandbox(number)) == {}


def test_in_a_user_namespace_as_well(dev: Path) -> None:
    assert rehearse(Sandbox(3, bwrap=sandbox(3).bwrap)) == {}


@pytest.mark.parametrize("gone", NODES)
def test_a_device_that_is_not_handed_in_is_missed(dev: Path, gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fewer(device: str, only: str = "") -> list[str]:
        return [n for n in device_nodes(device, only) if n != f"{dev}/{gone}"]

    monkeypatch.setattr(policy, "device_nodes", fewer)
    named = {name for name, grant in GRANTS if grant == f"device {gone}"}
    assert set(rehearse(sandbox(3))) == named != set()


def test_one_gpu_of_several_gets_its_own_file_and_what_all_share(dev: Path) -> None:
    (dev / "nvidia1").touch()
    caps = [f"{dev}/{name}" for name in NODES if name.startswith("nvidia-caps")]  # of its part, where it is divided
    found = device_nodes("cuda", f"{dev}/nvidia0", caps)
    assert f"{dev}/nvidia0" in found
    assert set(found) == {f"{dev}/{name}" for name in NODES}
    assert f"{dev}/nvidia1" in device_nodes("cuda")
    assert device_nodes("cpu") == []


# Each grant of the table is taken away from a process at L1 (with what L2 adds for workers), in a fork
# of one interpreter; which attempts fail then is printed.
TAKE_AWAY = """
import json, os, resource, sys, tempfile
sys.path.insert(0, {root!r})
from hotloop.harness.sandbox import landlock, rehearsal, seccomp, visible
import ctypes, struct

config = json.loads({config!r})
visible.DEV = {dev!r}
os.environ["TMPDIR"] = tempfile.tempdir = {scratch!r}
NUMBERS = {numbers!r}

def refuse(number):
    code = b"".join(struct.pack("=HBBI", *s) for s in (
        (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)))
    buffer = ctypes.create_string_buffer(code, len(code))
    whole = struct.pack("@HP", 4, ctypes.addressof(buffer))
    assert ctypes.CDLL(None, use_errno=True).syscall(NUMBERS["seccomp"], 1, 0, whole) == 0

def below(path, folder):
    return os.path.realpath(path) == folder or os.path.realpath(path).startswith(folder + "/")

def attempt(need, grant):
    kind, _, name = grant.partition(" ")
    read, write = list(config["read"]), [*config["write"], *(["/dev/shm"] if need.workers else [])]
    settings = ["/proc" if need.workers else f"/proc/{{os.getpid()}}/task"]
    if kind == "read":
        read = [p for p in read if not below(p, name)]
    elif kind == "write":
        gone = {scratch!r} if name == "TMPDIR" else name
        write = [p for p in write if p != gone]
        read = [p for p in read if p != gone]
    elif kind == "device":
        write = [p for p in write if p != f"{{visible.DEV}}/{{name}}"]
    elif kind == "settings":
        settings = []
    elif kind == "limit":
        resource.setrlimit(getattr(resource, name), (1 << 37, 1 << 37))
    landlock.restrict(read, write, settings=settings)
    seccomp.restrict(metadata=True, cuda=True, model=True)
    if kind == "call":
        refuse(NUMBERS[name])
    return rehearsal._failure(need.attempt)

for need in rehearsal.NEEDS:
    for grant in (*need.grants, ""):
        pid = os.fork()
        if pid == 0:
            os._exit(1 if attempt(need, grant) else 0)
        print(json.dumps([need.name, grant, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]))
"""
NUMBERS = {  # on x86_64, on aarch64
    "seccomp": (317, 277), "socket": (41, 198), "setsockopt": (54, 208), "bind": (49, 200), "listen": (50, 201),
    "accept4": (288, 242), "memfd_create": (319, 279), "get_mempolicy": (239, 236), "eventfd2": (290, 19),
    "pipe2": (293, 59), "poll": (7, 73), "prctl": (157, 167), "execve": (59, 221), "flock": (73, 32),
}  # fmt: skip


@pytest.mark.skipif(landlock.abi() < 1 or not seccomp.supported(), reason="no Landlock or seccomp here")
def test_each_grant_is_missed_when_it_is_taken_away(dev: Path, tmp_path: Path) -> None:
    launch = Sandbox(1).launch(Policy("hotloop.harness.sandbox.rehearsal", tmp_path, device="cuda"), [], {})
    try:
        config = launch.argv[-1]
        scratch = str(launch.folders[0])
        column = int(os.uname().machine == "aarch64")
        code = TAKE_AWAY.format(
            root=str(project_root()), config=config, dev=str(dev), scratch=scratch,
            numbers={name: pair[column] for name, pair in NUMBERS.items()},
        )  # fmt: skip
        done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=120)
    finally:
        launch.started.close()
        launch.ended.close()
    assert done.returncode == 0, done.stderr
    found = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    wanted = [(need.name, grant, int(bool(grant))) for need in NEEDS for grant in (*need.grants, "")]
    assert found == wanted


def test_every_grant_and_every_refusal_is_told_in_the_documents() -> None:
    text = " ".join((project_root() / "docs" / "integrity.md").read_text().split())
    for need in NEEDS:
        assert need.source
        assert f"| {need.name} | {need.source} |" in text, need.name
    for name in REFUSED:
        assert name in text, name
