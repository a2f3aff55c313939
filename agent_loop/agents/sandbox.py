"""Where an agent works: it sees the machine, and may change train.py.

Hidden are what scores (prepared data, the records of all nights) and git's own folders; writable are the worktree, of
which the driver takes train.py alone, the hand-over folder, a private /tmp, and what the user allows besides. There is
no network unless it is asked for.

With bubblewrap (L3) hidden folders are empty, and all of the worktree but train.py is read-only. With Landlock alone
(L2, L1) opening what is hidden is refused, and other files that changed in the worktree are found afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotloop.harness.data.dataset import BUILT_IN
from hotloop.harness.data.readers import kind_of
from hotloop.harness.errors import HotloopError, SandboxError, UsageError
from hotloop.harness.paths import import_root, project_root
from hotloop.harness.sandbox.bounds import score
from hotloop.harness.sandbox.bubblewrap import argv_of, namespaces, private_folder, read_only_proc
from hotloop.harness.sandbox.entry import BOOT
from hotloop.harness.sandbox.launch import Launch, first_to_go
from hotloop.harness.sandbox.policy import Sandbox
from hotloop.harness.sandbox.process import ProcessTree, tail
from hotloop.harness.sandbox.visible import around
from hotloop.harness.text import one_line

__all__ = ["AgentSandbox", "everything_but", "outermost", "text_of", "try_sandbox"]

_SCRATCH_BYTES = 4 << 30
FILE_BYTES = 64 << 20  # of any file that an agent writes, what it prints among them
TRY_S = 60.0
_ELSE = "see: hotloop doctor; another level is --sandbox L1"
# Services that do things in the user's name for whoever can reach their socket.
_SERVICES = ("/run/user", "/run/dbus", "/run/docker.sock", "/run/containerd", "/run/podman", "/run/systemd/private")


@dataclass(frozen=True)
class AgentSandbox:
    """Where an agent's program runs: what it sees, may change and may reach.

    Attributes:
        hidden: folders that the agent must not see: data, runs, git's. What lies in another of them is left out.
        writable: what it may change besides the worktree: a client's own folder of settings, say.
        network: whether it may reach anything beyond this machine's memory.
        programs: folders of what it runs, which stay visible where they lie below /tmp.
    """

    base: Sandbox
    hidden: tuple[Path, ...]
    writable: tuple[Path, ...] = ()
    network: bool = False
    programs: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", outermost(self.hidden))
        for path in self.writable:
            if not path.exists():
                raise UsageError(f"--agent-write {path}: there is no such file or folder")
            for hidden in self.hidden:
                if path.resolve().is_relative_to(hidden) or hidden.is_relative_to(path.resolve()):
                    raise UsageError(f"--agent-write {path} would give the agent {hidden}; choose another folder")

    def launch(self, argv: list[str], worktree: Path, handover: Path, env: dict[str, str]) -> Launch:
        """Raises SandboxError or UsageError (a program that is not there)."""
        program = shutil.which(argv[0])
        if program is None:
            raise UsageError(f"the agent {argv[0]!r} cannot be started: no such program; see --command")
        argv = [program, *argv[1:]]
        launch = Launch([], dict(env), cwd=worktree)
        if self.base.level == 3:
            self._bubblewrap(argv, worktree, handover, launch)
        elif self.base.level > 0:
            self._landlock(argv, worktree, handover, launch)
        else:
            launch.argv = [*self._boot({"exec": argv})]
        if self.base.level < 3:
            launch.argv = first_to_go(launch.argv)
        launch.folders += (worktree, handover, *(p for p in self.writable if p.is_dir()))
        return launch

    def _bubblewrap(self, argv: list[str], worktree: Path, handover: Path, launch: Launch) -> None:
        bwrap = self.base.bwrap
        args = [*namespaces(bwrap), "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", *read_only_proc()]
        if not self.base.own_uid:  # an ordinary user needs a namespace to do any of this
            args += ["--unshare-user"]
        if not self.network:
            args += ["--unshare-net"]
        # A private /tmp hides what the user keeps there; what is needed of it comes back.
        args += private_folder(bwrap, "/tmp", _SCRATCH_BYTES)
        needs = (sys.prefix, str(project_root()), import_root(), os.path.dirname(argv[0]), *map(str, self.programs))
        for needed in dict.fromkeys(needs):
            if Path(needed).is_relative_to("/tmp"):
                args += ["--ro-bind", needed, needed]
        out_of_sight = outermost((*self.hidden, *map(Path, _SERVICES)))
        for hidden in out_of_sight:
            if hidden.is_dir():
                args += ["--tmpfs", str(hidden)]
            elif hidden.exists():
                args += ["--ro-bind", "/dev/null", str(hidden)]
        for path in (worktree, handover, *self.writable):
            args += ["--bind", str(path.resolve()), str(path.resolve())]
        for entry in sorted(worktree.iterdir()):
            if entry.name == ".git":
                args += ["--ro-bind", "/dev/null", str(entry)]
            elif entry.name != "train.py" and not entry.is_symlink():
                args += ["--ro-bind", str(entry), str(entry)]
        for hidden in out_of_sight:
            if hidden.is_dir():
                args += ["--remount-ro", str(hidden)]
        launch.env["TMPDIR"] = "/tmp"
        boot = self._boot({"exec": argv, "seccomp": True, "network": self.network})
        launch.argv = argv_of(args, launch, str(worktree)) + boot

    def _landlock(self, argv: list[str], worktree: Path, handover: Path, launch: Launch) -> None:
        tmp = Path(tempfile.mkdtemp(prefix="hotloop-agent-"))
        launch.ended.callback(shutil.rmtree, tmp, ignore_errors=True)
        launch.env["TMPDIR"], launch.folders = str(tmp), (tmp,)
        read = everything_but(set(self.hidden))
        write = [str(worktree), str(handover), str(tmp), *(str(p.resolve()) for p in self.writable)]
        write += [f"/dev/{n}" for n in ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts")]
        config = {
            "exec": argv, "seccomp": True, "network": self.network, "landlock": True, "read": read, "write": write,
            "supervise": True,
        }  # fmt: skip
        launch.argv = self._boot(config)

    def _boot(self, config: dict[str, Any]) -> list[str]:
        whole: dict[str, Any] = {
            "module": None, "exec": None, "fds": [], "parent": os.getpid(), "uid": None, "reads_all": False,
            "supervise": self.base.level < 3, "landlock": False, "seccomp": False, "network": True,
            "metadata": False, "cuda": False, "model": False, "settings": [], "file_bytes": FILE_BYTES,
            "memory_bytes": None, "processes": None, "score": score(os.getpid()),
        }  # fmt: skip
        return [sys.executable, "-I", "-B", "-c", BOOT, import_root(), json.dumps(whole | config)]


def text_of(data: Path, source: str) -> list[Path]:
    """Where the text of prepared data can be read: downloaded beside it, half prepared, or at its source.

    Args:
        data: the prepared folder.
        source: as its manifest has it: a name, or a path. Of a folder that holds the project or the interpreter, which
            an agent needs, only the files of text.
    """
    found = [data.parent / "climbmix-shards", *data.parent.glob(f".{data.name}.tmp-*")]
    given = Path(source).resolve()
    if source in BUILT_IN or not given.exists():
        return found
    if any(Path(needed).resolve().is_relative_to(given) for needed in (project_root(), sys.prefix, "/usr/bin")):
        return found + [p for p in given.rglob("*") if kind_of(p) is not None]
    return [*found, given]


def outermost(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Each path once, and none that lies in another: what is hidden cannot be hidden again."""
    kept: list[Path] = []
    for path in sorted({p.resolve() for p in paths}, key=lambda p: len(p.parts)):
        if not any(path.is_relative_to(outer) for outer in kept):
            kept.append(path)
    return tuple(kept)


def try_sandbox(sandbox: AgentSandbox, folder: Path) -> None:
    """Start one that does nothing, laid out in `folder` as for an agent's turn. Raises SandboxError with the reason."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="sandbox-") as name:
        worktree, handover = Path(name) / "worktree", Path(name) / "handover"
        for made in (worktree, handover):
            made.mkdir()
        (worktree / "train.py").touch()
        log = Path(name) / "log"
        try:
            with ProcessTree(sandbox.launch(["true"], worktree, handover, dict(os.environ)), log) as process:
                code = process.wait(TRY_S)
        except (HotloopError, OSError) as e:
            raise SandboxError(f"no agent can start in its sandbox: {one_line(str(e), 300)}; {_ELSE}") from None
        if code != 0:
            words = one_line(" ".join(tail(log, 3)), 200) or "it said nothing"
            how = f"did not start in {TRY_S:.0f} s" if code is None else f"ended with {code}"
            raise SandboxError(
                f"no agent can start in its sandbox: a program that does nothing {how} ({words}); {_ELSE}"
            )


def everything_but(hidden: set[Path]) -> list[str]:
    """The shortest list of paths that covers the file system without `hidden`: Landlock can only allow."""
    return around(["/"], hidden)[0]
