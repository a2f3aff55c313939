"""Tiles of the products: by the length of their sums."""

from __future__ import annotations

import json

import pytest
import torch

from hotloop.bench.gate.configurations import COMMITTED
from hotloop.kernels import tuning
from hotloop.kernels.architectures import ARCHITECTURES
from hotloop.kernels.block import mlp, qkv, residual, stream
from hotloop.kernels.gemm import product

BF16 = torch.bfloat16


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tuning, "config", lambda kernel, key: None)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("depth", "columns"), [(512, 128), (1024, 128), (1032, 256), (2048, 256)])
def test_short_sums_leave_room_for_a_second_program(depth: int, columns: int) -> None:
    configs = [
        mlp.launch_config(BF16, depth, 2048),
        residual.launch_config(BF16, depth),
        stream.launch_config(BF16, depth, 512),
    ]
    for config in configs:
        assert (config["ROWS"], config["COLUMNS"], config["DEPTH"], config["TMA"]) == (128, columns, 64, 1)
        assert (config["num_warps"], config["num_stages"]) == (8, 3)
    assert qkv.launch_config(128, BF16, depth)["HEADS"] == columns // 128
    assert qkv.launch_config(64, BF16, depth)["HEADS"] == 2
    assert mlp.persistent(configs[0])["PROGRAMS"] == 256 // columns


@pytest.mark.usefixtures("hopper")
def test_each_length_is_tuned_by_itself_and_persistent_programs_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(tuning, "config", lambda kernel, key: asked.append((kernel, key)))
    for width in (512, 2048):
        residual.launch_config(BF16, width)
        qkv.launch_config(128, BF16, width)
    assert asked == [
        ("residual", "16 bit short"), ("qkv", "K=128 16 bit short"),
        ("residual", "16 bit long"), ("qkv", "K=128 16 bit long"),
    ]  # fmt: skip
    for depth in (512, 2048):
        space = mlp.search_space(depth)
        assert mlp.default_config(depth) in space and mlp.persistent(mlp.default_config(depth)) in space
        assert stream.default_config(depth) in stream.search_space(depth)
        assert qkv.default_config(128, depth) in qkv.search_space(128, depth)


def test_two_programs_of_a_short_sum_fit_on_a_multiprocessor_of_an_h100() -> None:
    """65,536 registers and 233,472 bytes of shared memory, of which each program takes 1,024 more than it asks for."""
    kernels = ("block.qkv ", "block.mlp ", "block.residual ", "block.stream ")
    for version, table in json.loads(COMMITTED.read_text()).items():
        short = {
            name: facts
            for name, facts in table.items()
            if name.startswith(kernels) and "128x128x64 tma warps=8" in name and name.endswith("sm_90")
        }
        assert len(short) == 4 + 2 + 3 + 4, (version, sorted(short))
        for name, facts in short.items():
            assert 2 * 256 * facts["registers"] <= 65_536 and 2 * (facts["shared"] + 1024) <= 233_472, (version, name)
            assert not facts["stack"], (version, name)


def test_the_gate_is_given_every_default_once() -> None:
    found = product.shipped("mlp", mlp.default_config)
    every = tuple(ARCHITECTURES)
    assert [(c["COLUMNS"], cards) for c, cards in found] == [(128, every), (128, (90, 100)), (256, (90, 100))]
    assert len(product.shipped("qkv", lambda width, modern: qkv.default_config(64, width, modern))) == 2
