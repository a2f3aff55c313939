"""What a sandbox is started with: each argument is there, for a probe sees only what all of them stop together."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hotloop.harness.sandbox.policy import Policy, Sandbox
from hotloop.harness.sandbox.uids import free_uid
from hotloop.harness.sandbox.visible import hidden_text
from hotloop.harness.settings import PRESETS

DEVICES = {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"}


def launched(sandbox: Sandbox, folder: Path, device: str = "cpu") -> tuple[list[str], dict[str, Any], dict[str, str]]:
    """bubblewrap's part of the command line, the configuration of the child, and its environment."""
    policy = Policy.of("hotloop.harness.training.child", folder, b"x = 1", device, PRESETS["laptop"].limits)
    launch = sandbox.launch(policy, [], {"LANG": "C.UTF-8"})
    launch.started.close()
    launch.ended.close()
    boot = launch.argv.index("-I")
    return launch.argv[: boot - 1], json.loads(launch.argv[-1]), launch.env


def pairs(argv: list[str], flag: str) -> list[str]:
    return [argv[i + 1] for i, word in enumerate(argv) if word == flag]


def test_what_bubblewrap_is_given(tmp_path: Path) -> None:
    argv, config, _ = launched(Sandbox(3, bwrap="bwrap"), tmp_path)
    assert {
        "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--unshare-user",
        "--die-with-parent", "--new-session",
    } <= set(argv)  # fmt: skip
    assert pairs(argv, "--cap-drop") == ["ALL"]
    assert "--cap-add" not in argv
    assert [p for p in pairs(argv, "--tmpfs") if p not in hidden_text()] == ["/tmp", "/dev/shm"]
    assert set(hidden_text()) <= {*pairs(argv, "--remount-ro"), *argv}
    assert pairs(argv, "--dev-bind") == []
    assert not {"--bind", "--bind-try", "--share-net", "--dev-bind-try"} & set(argv)
    assert not {p for p in pairs(argv, "--ro-bind") if p in ("/", "/etc", "/home", "/root", "/var", "/run", "/sys")}
    assert (config["supervise"], set(config["write"])) == (False, {"/tmp", "/dev/shm", *DEVICES})


@pytest.mark.parametrize("level", [3, 1])
def test_what_a_child_gives_up_for_itself(tmp_path: Path, level: int) -> None:
    _, config, env = launched(Sandbox(level, bwrap="bwrap"), tmp_path)
    limits = PRESETS["laptop"].limits
    assert config["landlock"] and config["seccomp"] and not config["network"] and not config["reads_all"]
    assert config["metadata"] == (level == 1)
    assert config["supervise"] == (level < 3)
    assert config["file_bytes"] == limits.file_bytes
    assert config["processes"] >= limits.processes
    assert config["memory_bytes"]
    assert set(env) - {"LANG", "TORCHINDUCTOR_COMPILE_THREADS"} == {
        "HOME", "TMPDIR", "USER", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH"
    }  # fmt: skip


def test_without_namespaces_it_writes_to_its_scratch_folder_and_to_nothing_else(tmp_path: Path) -> None:
    _, config, _ = launched(Sandbox(1), tmp_path)
    assert set(config["write"]) == {str(tmp_path / "scratch"), *DEVICES}
    assert not {"/", "/root", "/home", "/tmp", "/etc", "/dev", "/var"} & set(config["read"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a child another uid")
def test_a_uid_that_a_process_has_is_passed_over() -> None:
    """That of a child in a container, whose locks are not seen here."""
    with free_uid() as uid:
        pass
    with subprocess.Popen(["sleep", "100"], user=uid) as stranger:
        with free_uid() as other:
            assert other != uid
        stranger.kill()
