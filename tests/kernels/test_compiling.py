"""Kernels compiled ahead in other processes, for a card that is not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hotloop.kernels.compiling import Facts

ROOT = Path(__file__).resolve().parents[2]
PREAMBLE = """
import json, os, sys
import torch
from hotloop.kernels import compiling, tuning
from hotloop.kernels.gemm import weight_gradient
from hotloop.kernels.compiling import Launch, compile_all, recorded, without_driver
FINE = weight_gradient.default_config(False) | {"ROWS": 32, "COLUMNS": 32, "DEPTH": 32, "num_warps": 2}
def launches(**config):
    with tuning.trial("weight_gradient", FINE | config), recorded() as found:
        torch.ops.hotloop.weight_gradient(*inputs)
    return found
inputs = [torch.zeros(4096, 64, dtype=torch.bfloat16) for _ in range(2)]
if __name__ == "__main__":
    without_driver(90)
"""


def run(tmp_path: Path, body: str) -> dict:  # type: ignore[type-arg]
    pytest.importorskip("triton")
    script = tmp_path / "script.py"  # a file, since the pool's processes import it
    script.write_text(PREAMBLE + "".join(f"    {line}\n" for line in body.strip().splitlines()))
    env = os.environ | {
        "HOTLOOP_KERNELS": "triton",
        "PYTHONPATH": str(ROOT),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict = json.loads(done.stdout.splitlines()[-1])  # type: ignore[type-arg]
    return found


def test_a_real_pool_compiles_what_would_be_launched_and_a_launch_finds_it(tmp_path: Path) -> None:
    """A fine configuration, one that spills, one that needs more shared memory than a block gets, one that does not
    compile, and a compiler that takes its process with it; the keys of the cache are those of a real launch.
    """
    (tmp_path / "fatal.py").write_text("import os\nclass K:\n    def preload(self, data): os._exit(9)\nkernel = K()\n")
    (tmp_path / "endless.py").write_text(
        "class K:\n    def preload(self, data):\n        while True: pass\nkernel = K()\n"
    )
    found = run(tmp_path, """
sets = {
    "fine": launches(), "same": launches(), "spills": launches(ROWS=64, COLUMNS=128, num_warps=1),
    "shared": launches(ROWS=64, COLUMNS=64, DEPTH=128, num_warps=4, num_stages=9),
}
fine = sets["fine"][0]
broken, fatal = fine._replace(data=fine.data.replace('"*bf16"', '"*none"')), Launch("fatal", "kernel", "")
facts = compile_all([x for found in sets.values() for x in found] + [broken, fatal], 90, 2)
hits = []
from triton import knobs
from triton.runtime.jit import JITFunction
knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
was = JITFunction.run
JITFunction.run = lambda self, *args, warmup=False, **kwargs: was(self, *args, warmup=True, **kwargs)  # not launched
with tuning.trial("weight_gradient", FINE):
    torch.ops.hotloop.weight_gradient(*inputs)
if not (pid := os.fork()):  # one that does not end
    compiling._compile(Launch("endless", "kernel", ""), 1)
print(json.dumps({
    "ended": os.WTERMSIG(os.waitpid(pid, 0)[1]),
    "names": [x.function for x in sets["fine"]], "same": sets["fine"] == sets["same"], "hits": hits,
    "count": len(facts),
    "facts": {name: [facts[x].refusal(232_448) for x in found] for name, found in sets.items()},
    "errors": [facts[broken].error, facts[fatal].error],
}))
""")  # fmt: skip
    assert found["names"] == ["_weight_gradient_kernel", "_sum_parts_kernel"]
    assert found["same"]  # a launch that was compiled is told all the same
    assert found["count"] == 3 + 1 + 2  # each once
    assert found["facts"]["fine"] == found["facts"]["same"] == ["", ""]
    assert found["facts"]["spills"][0].startswith("spills: ")
    assert found["facts"]["shared"][0].endswith("bytes of shared memory; a block gets 232,448")
    assert found["errors"][0] and found["errors"][1] == "the compiler ended its process, or did not end"
    assert found["hits"] == [True, True]
    assert found["ended"] == signal.SIGALRM


def test_what_is_not_worth_a_launch() -> None:
    assert Facts(128, 0, 1000).refusal(1000) == ""
    assert Facts(128, 0, 1001).refusal(1000) == "1,001 bytes of shared memory; a block gets 1,000"
    assert Facts(255, 8, 1000).refusal(1000) == "spills: 8 bytes of stack"
    assert Facts(error="ValueError: x").refusal(1000) == "does not compile: ValueError: x"
