"""torch's compile caches know which kernels a backward pass was compiled for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hotloop.kernels import cache_key
from tests import warm

ROOT = Path(__file__).resolve().parents[2]


def test_the_fingerprint_knows_selection_sources_and_tuned_files(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    shutil.copytree(cache_key.FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    chosen = {"HOTLOOP_KERNELS": "mlp"}
    found = [cache_key.fingerprint(chosen, folder)]
    assert found[0] == cache_key.fingerprint(dict(chosen), folder)
    found.append(cache_key.fingerprint({"HOTLOOP_KERNELS": "mlp,linear"}, folder))
    (folder / "tuned").mkdir(exist_ok=True)
    for name in ("tuned/some-gpu.json", "reference.py", "block/mlp.py", "compiler.py"):
        with open(folder / name, "a") as f:
            f.write("\n")
        found.append(cache_key.fingerprint(chosen, folder))
    assert len(set(found)) == len(found)


CHOICES = {
    "kernels": "embedding.token_order(torch.zeros(3, dtype=torch.int64), 9)",
    "attention": "kernels.attention(*[torch.randn(1, 2, 1, 8)] * 3, 2)",
    "8 bits": "kernels.linear_fp8(torch.randn(2, 16), torch.randn(16, 16))",
    "record": "kernels.implementations()",
}


def test_whatever_chooses_marks_what_is_compiled_and_keeps_a_tag_that_is_there() -> None:
    script = (
        "import torch, kernels\n"
        "from torch.compiler import config\n"
        "from hotloop.kernels import attend, cache_key, dispatch, fp8\n"
        "from hotloop.kernels.head import embedding\n"
        "assert config.cache_key_tag == 'mine'\n"  # importing does nothing
        f"for name, choice in {CHOICES}.items():\n"
        "    config.cache_key_tag = 'mine'\n"
        "    for known in (dispatch._decided.clear, attend._plans.clear, fp8._decide.cache_clear,\n"
        "                  cache_key.mark.cache_clear):\n"
        "        known()\n"
        "    exec(choice)\n"
        "    assert config.cache_key_tag == f'mine hotloop-{cache_key.fingerprint()}', name\n"
    )
    warm.output(script, TORCH_COMPILE_CACHE_KEY_TAG="mine")


SCRIPT = """
import torch
from hotloop import kernels
from torch._dynamo.utils import counters
from hotloop.kernels import reference
from hotloop.kernels.gemm import weight_gradient
launched, parts = [], weight_gradient.parts
weight_gradient.parts = lambda *a: launched.append(a) or parts(*a)
torch.manual_seed(0)
x, a, b = (torch.randn(s, requires_grad=True) for s in ((8, 16), (32, 16), (16, 32)))
kernels.compile(lambda *args: reference.mlp_alone(*args).sum())(x, a, b).backward()
print(len(launched), counters["aot_autograd"]["autograd_cache_hit"])
"""


def test_two_selections_in_one_cache_run_their_own_backward_pass(tmp_path: Path) -> None:
    """The forward graph of both is the same; launches of the weight gradients' kernel are counted."""
    pytest.importorskip("triton")
    found = []
    for chosen in ("mlp", "mlp,linear", "mlp"):
        env = {"HOTLOOP_KERNELS": chosen, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        env |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        found.append(warm.output(SCRIPT, **env).split())
    assert found == [["0", "0"], ["2", "0"], ["0", "1"]]  # the third is the first again, from the cache
