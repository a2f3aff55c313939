"""AdamW's loads are as wide as its tensors allow, and its tables do not make the host wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hotloop.kernels.optimizer import adamw
from tests import warm

# Sixteen elements a thread: four loads of 128 bits of fp32, two of bf16, of each of p, g, m, v; all but g are stored.
COUNT = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hotloop.kernels.optimizer import adamw
case, = adamw.compile_cases()
assert case.constants["BLOCK"] // (32 * case.options["num_warps"]) == 16
signature = case.signature | dict.fromkeys(case.constants, "constexpr")
source = ASTSource(fn=case.function, signature=signature, constexprs=case.constants)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=case.options).asm
tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
    f.write(made["cubin"])
    f.flush()
    sass = subprocess.run([tool, "-sass", f.name], capture_output=True, text=True, check=True).stdout
patterns = (r"ld\\.global\\S*\\.v4", r"st\\.global\\S*\\.v4"), (r"LDG\\S*\\.128", r"STG\\S*\\.128")
for text, (loads, stores) in zip((made["ptx"], sass), patterns):
    found = len(re.findall(loads, text)), len(re.findall(stores, text))
    assert found == (4 * (4 + 2), 3 * (4 + 2)), found
"""


def test_aligned_tensors_are_read_and_written_in_128_bits() -> None:
    pytest.importorskip("triton")
    warm.output(COUNT, HOTLOOP_KERNELS="triton")


@pytest.mark.parametrize(("dtype", "plain", "wide"), [(torch.float32, 0, 2), (torch.bfloat16, 1, 3)])
def test_a_tensor_is_aligned_when_all_that_belongs_to_it_is(dtype: torch.dtype, plain: int, wide: int) -> None:
    assert adamw.kind_of(dtype, 4096, (64, 128, 256, 1024)) == wide
    assert adamw.kind_of(dtype, 4104, (64, 128, 256, 1024)) == plain
    for odd in range(4):
        assert adamw.kind_of(dtype, 4096, tuple(64 + 8 * (i == odd) for i in range(4))) == plain


def test_tables_go_to_a_gpu_from_pinned_memory_and_only_when_they_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Host:
        def to(self, device: torch.device, non_blocking: bool = False) -> str:
            asked.append((device.type, non_blocking))
            return "table"

    def tensor(values: Any, dtype: torch.dtype, pin_memory: bool = False) -> Host:
        asked.append(pin_memory)
        return Host()

    monkeypatch.setattr(torch, "tensor", tensor)
    adamw.addresses.cache_clear()
    for numbers in (((1, 2), (3, 4)), ((1, 2), (3, 4)), ((1, 2), (3, 5)), ((1, 2), (3, 4))):
        assert adamw.addresses(numbers, torch.device("cuda", 0)) == "table"
    adamw.addresses.cache_clear()
    assert asked == [True, ("cuda", True)] * 2


def test_tensors_that_begin_anywhere_are_updated_alike() -> None:
    """Each of the kernel's four ways, through the interpreter."""
    pytest.importorskip("triton")
    script = """
import torch
from hotloop import kernels
from hotloop.kernels import reference
from hotloop.kernels.optimizer.adamw import kind_of
torch.manual_seed(0)
kinds = set()
for dtype in (torch.float32, torch.bfloat16):
    for first in (0, 1):
        lists = [[torch.rand(4128, dtype=torch.float32).to(dtype)[first : first + 4112]] for _ in range(4)]
        kinds.add(kind_of(dtype, 4112, tuple(t[0].data_ptr() for t in lists)))
        hyper = torch.tensor([[0.01, 0.8, 0.95, 1e-10, 0.2, 0.05]])
        truth = [[t.double() for t in ts] for ts in lists]
        reference.adamw_(*truth, hyper.double())
        kernels.adamw_(*lists, hyper)
        unit = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-21
        for ours, true in zip(lists, truth):
            assert ((ours[0].double() - true[0]).abs() <= unit * true[0].abs() + 1e-6).all(), (dtype, first)
assert kinds == {0, 1, 2, 3}, kinds
"""
    warm.output(script, HOTLOOP_KERNELS="adamw_", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
