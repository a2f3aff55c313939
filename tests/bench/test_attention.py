"""What is kept of a measurement of attention backends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hotloop.bench.attention import ranking
from hotloop.bench.results import Row
from hotloop.harness.proof.accuracy import check
from hotloop.harness.proof.operators import OPERATORS
from hotloop.harness.tuning.configurations import tuned
from hotloop.kernels import attend, reference, tuning

FACTS = {"device": "NVIDIA H100", "capability": [9, 0], "multiprocessors": 132, "torch": "2.13.0", "host": "x"}


def row(implementation: str, ratio: float, shape: str = "baseline", way: str = "both", right: bool = True) -> Row:
    return Row("attention", shape, way, implementation, 100.0, 99.0, 101.0, ratio, 0.5, right)


def test_backends_are_ranked_by_what_they_gain_on_the_reference_of_their_own_rounds() -> None:
    rows = [
        row("torch", 2.0), row("hotloop", 2.5), row("eager", 9.0), row("cudnn", 9.0, right=False),
        row("flash3", 1.0), row("flash3", 9.0, way="forward"), row("torch", 1.5, "8k"),
    ]  # fmt: skip
    assert ranking(rows) == {"K=128 T=2048 W=1024": ["triton", "torch", "flash3"], "K=128 T=8192 W=8192": ["torch"]}


def test_what_does_not_repeat_is_no_choice_however_fast() -> None:
    varying = Row("attention", "baseline", "both", "cudnn", 9.0, 9.0, 9.0, 9.0, 0.9, True, 0.0, 1000, 3)
    assert ranking([row("torch", 2.0), varying]) == {"K=128 T=2048 W=1024": ["torch"]}


def test_where_the_reference_does_not_fit_the_time_decides() -> None:
    slow = Row("attention", "long", "both", "torch", 300.0, 299.0, 301.0, 0.0, 0.5, True)
    fast = Row("attention", "long", "both", "hotloop", 200.0, 199.0, 201.0, 0.0, 0.5, True)
    assert ranking([slow, fast]) == {"K=128 T=16384 W=16384": ["triton", "torch"]}


def test_a_gpus_file_keeps_what_another_command_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "tuned")
    with tuned(FACTS) as (path, body):
        body["configs"]["embedding"] = {"D=512": {"ROWS": 4}}
    with tuned(FACTS) as (path, body):
        body.setdefault("measured", {})["attention"] = {"K=128 T=2048 W=1024": ["triton"]}
    with pytest.raises(KeyError), tuned(FACTS) as (_, body):  # what fails leaves the file as it was
        _ = body.pop("configs")["no such kernel"]
    kept = json.loads(path.read_text())
    assert kept["configs"] == {"embedding": {"D=512": {"ROWS": 4}}}
    assert kept["measured"] == {"attention": {"K=128 T=2048 W=1024": ["triton"]}}
    assert (kept["gpu"], kept["versions"]) == ("NVIDIA H100", {"torch": "2.13.0"})


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
