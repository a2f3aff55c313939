"""Rows 20 and 22 of docs/integrity.md: only a GPU can show them. `make gpu-check` runs this."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hotloop.harness.gpu import between_runs, nvml
from hotloop.harness.gpu.devices import chosen
from hotloop.harness.sandbox.levels import best
from hotloop.harness.sandbox.policy import Policy
from hotloop.harness.sandbox.process import Child

pytestmark = pytest.mark.skipif(not nvml.cards(), reason="no GPU")

FILL = """
import torch
free, _ = torch.cuda.mem_get_info()
blocks = [torch.full((1 << 28,), 0x5A5A5A5A, dtype=torch.int32, device='cuda') for _ in range(int(free * 0.8) >> 30)]
torch.cuda.synchronize()
print(len(blocks))
"""
LOOK = """
import torch
free, _ = torch.cuda.mem_get_info()
found = 0
blocks = [torch.empty(1 << 28, dtype=torch.int32, device='cuda') for _ in range(int(free * 0.8) >> 30)]
for b in blocks: found += int((b == 0x5A5A5A5A).sum())
print(found)
"""


def of(code: str) -> int:
    env = os.environ | {"CUDA_VISIBLE_DEVICES": chosen().uuid}  # the one that is cleared
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=env)
    return int(done.stdout)


def test_nothing_of_a_process_is_left_in_gpu_memory() -> None:
    assert of(FILL) > 0
    between_runs.fresh("cuda")
    assert of(LOOK) == 0


def test_a_process_that_a_child_left_on_the_gpu_is_gone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Child(
        best(device="cuda", gpu=chosen()),
        Policy("hotloop.harness.sandbox.probe_cuda", tmp_path, device="cuda"),
        [],
        log,
        1,
    ) as child:
        assert child.wire.recv(120.0)["kind"] == "works"
        child.kill()
    between_runs.fresh("cuda")  # raises where something computes there still
