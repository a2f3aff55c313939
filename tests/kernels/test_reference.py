"""The references against definitions written out in fp64, and the package's face."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from hotloop import kernels
from hotloop.kernels import operators, reference

B, T, H, K = 2, 37, 4, 16


def test_ours_is_the_package_that_is_imported_and_its_names_are_these() -> None:
    assert Path(kernels.__file__).resolve().parent == Path(__file__).resolve().parents[2] / "kernels"
    assert sorted(kernels.__all__) == [
        "KernelError", "adamw_", "attention", "compile", "compiled", "document_offsets", "implementations",
        "linear_fp8", "loss", "muon_",
    ]  # fmt: skip
    assert set(operators.__all__) == set(reference.__all__)
    assert set(kernels.implementations()) == set(reference.__all__) - {"mlp_alone"} | {"step"}


@pytest.mark.parametrize("length", [1, 2, T])
@pytest.mark.parametrize("window", [0, 1, 5, T - 2, T - 1, T, 10 * T])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention(length: int, window: int, groups: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(B, length, H, K, dtype=torch.float64)
    k, v = (torch.randn(B, length, groups, K, dtype=torch.float64) for _ in range(2))
    want = torch.empty_like(q)
    for b in range(B):
        for h in range(H):
            g = h * groups // H
            for i in range(length):
                low = max(0, i - window)
                scores = k[b, low : i + 1, g] @ q[b, i, h] / math.sqrt(K)
                want[b, i, h] = torch.softmax(scores, 0) @ v[b, low : i + 1, g]
    torch.testing.assert_close(kernels.attention(q, k, v, window), want)


def test_rope_turns_pairs_by_their_position_and_norms_the_head() -> None:
    torch.manual_seed(0)
    x = torch.randn(B, T, H, K, dtype=torch.float64)
    angle = torch.outer(torch.arange(T), 100.0 ** -(torch.arange(0, K, 2) / K)).double()
    y = reference.rope_norm(x, angle[:, None].cos(), angle[:, None].sin())
    pairs = torch.complex(x[..., : K // 2], x[..., K // 2 :]) * torch.exp(-1j * angle)[None, :, None, :]
    turned = torch.cat([pairs.real, pairs.imag], -1)
    torch.testing.assert_close(y, turned / (turned.square().mean(-1, keepdim=True) + 2.0**-23).sqrt())


def test_the_mlp_alone() -> None:
    x, w_fc, w_proj = torch.randn(3, 5, 8), torch.randn(11, 8), torch.randn(4, 11)
    want = (torch.clamp(x @ w_fc.T, min=0) ** 2) @ w_proj.T
    torch.testing.assert_close(reference.mlp_alone(x, w_fc, w_proj), want)
