"""Attention's shapes in the table of operators, and its errors."""

from __future__ import annotations

import pytest
import torch

from hotloop.harness.proof.accuracy import check
from hotloop.harness.proof.operators import OPERATORS
from hotloop.kernels import attend, reference


def test_every_shape_that_is_timed_has_a_key_that_calls_find() -> None:
    plan = attend.Plan("", ("torch", "triton"), {}, {}, {}, "cuda")
    for sizes in OPERATORS["attention"].shapes.values():
        key = attend.ranking_key(sizes["K"], sizes["T"], sizes["W"])
        ranked = attend._ranked(plan._replace(ranking={key: ["triton", "torch"]}), sizes["K"], sizes["T"], sizes["W"])
        assert ranked[:2] == ["triton", "torch"]


@pytest.mark.parametrize("wrong", [None, "out", "gradient"])
def test_an_error_in_one_head_shows_when_fp64_goes_head_by_head(wrong: str | None) -> None:
    op = OPERATORS["attention"]
    torch.manual_seed(0)
    args = op.make(op.shapes["odd"], torch.float32, torch.device("cpu"))

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        out = reference.attention(q, k, v, window)
        scale = torch.ones(out.shape[2], 1)
        scale[3] = 1.01
        return out * scale if wrong == "out" else out * scale - (out * (scale - 1)).detach() if wrong else out

    errors = {e.what: e.fine for e in check(op, args, ours)}
    assert errors["out 0"] == (wrong != "out")
    assert errors["gradient 2"] == (wrong is None)
