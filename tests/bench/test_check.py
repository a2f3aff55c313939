"""`make gpu-check`: its parts, their order and times, what is gone on with, and each part for real on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hotloop import prepare as prep
from hotloop.bench import results
from hotloop.bench.check import command as check
from hotloop.bench.check import parts
from hotloop.bench.check.parts import PARTS, Bench, Part
from hotloop.bench.cli import main
from hotloop.harness.proof.operators import OPERATORS
from hotloop.harness.tuning.notes import UNFINISHED
from tests.harness.conftest import TINY

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"device": "cpu", "cpu_figures": True, "torch": "2", "copy_bytes_per_s": 1e9, "matrix_flops_per_s": 1e9}
# TINY with an optimizer of ours, so that there is a kernel to choose.
ADAM = """
class Adam(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self):
        params = self.param_groups[0]["params"]
        for p in params:
            if not self.state[p]:
                self.state[p].update(m=torch.zeros_like(p), v=torch.zeros_like(p))
        ms, vs = ([self.state[p][k] for p in params] for k in "mv")
        rates = torch.tensor([[0.01, 0.9, 0.99, 1e-8, 0.5, 0.5]] * len(params))
        kernels.adamw_(params, [p.grad for p in params], ms, vs, rates)
"""
TRAIN = (
    TINY.replace("from torch import nn\n", "from torch import nn\nfrom hotloop import kernels\n")
    .replace("    def step", "    optimizer = Adam(model.parameters(), {})\n    def step")
    .replace("        loss.backward()\n", "        loss.backward()\n        optimizer.step()\n")
    .replace("p -= lr * p.grad\n", "pass\n")
    .replace("restore=(model,)", "restore=(model, optimizer)")
    .replace("def build_model", f"{ADAM}\ndef build_model")  # last: it has a step too
)


@pytest.fixture
def train(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(TRAIN)
    return path


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Parts a, b and c, whose results are given: name -> (exit status, page); what was run is under `ran`."""
    given: dict[str, Any] = {"a": (0, "page a"), "b": (0, "page b"), "c": (0, "page c"), "ran": []}

    def part(name: str) -> Part:
        def run(bench: Bench, limit_s: float) -> tuple[int, str]:
            given["ran"].append((name, round(limit_s)))
            if isinstance(given[name], BaseException):
                raise given[name]
            code, page = given[name]
            return code, page

        return Part(name, 100.0, run, "words", named=name == "c")

    monkeypatch.setattr(check, "PARTS", {name: part(name) for name in "abc"})
    monkeypatch.setattr(check, "_asked", lambda *_: FACTS)
    return given


def checked(train: Path, tmp_path: Path, *flags: Any, **more: Any) -> tuple[int, dict[str, Any], list[str]]:
    said: list[str] = []
    code = check.main(train, None, tmp_path / "out", *flags, device="cpu", say=said.append, **more)
    (path,) = (tmp_path / "out" / "cpu").glob("*.json")
    assert path.with_suffix(".md").exists()
    return code, json.loads(path.read_text())["hotloop"], said


def test_a_part_that_fails_stops_no_other_and_each_is_run_once(
    train: Path, tmp_path: Path, scripted: dict[str, Any]
) -> None:
    scripted["a"] = (3, "page a")
    code, found, said = checked(train, tmp_path)
    assert code == 1 and scripted["ran"] == [("a", 1000), ("b", 1000)]  # c only where it is named
    assert found["failed"] == {"a": 3}
    assert list(found["pages"]) == ["a", "b"]
    assert any('once more with AGAIN=1 PART="a"' in line for line in said)
    scripted["a"] = (0, "mended")
    assert checked(train, tmp_path)[0] == 1  # what is done is not done again
    assert checked(train, tmp_path, ["a"])[0] == 1
    assert len(scripted["ran"]) == 2
    code, found, _ = checked(train, tmp_path, ["a"], again=True)
    assert code == 0 and found["failed"] == {} and found["pages"]["a"] == "mended"
    assert checked(train, tmp_path, ["c"])[1]["pages"]["c"] == "page c"


def test_it_goes_on_after_a_kill_in_one_file(train: Path, tmp_path: Path, scripted: dict[str, Any]) -> None:
    scripted["b"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        checked(train, tmp_path)
    (path,) = (tmp_path / "out" / "cpu").glob("*.json")
    assert list(json.loads(path.read_text())["hotloop"]["pages"]) == ["a"]
    scripted["b"] = (UNFINISHED, "so far")
    code, found, said = checked(train, tmp_path)
    assert code == UNFINISHED and "left: b; the same command goes on" in said
    scripted["b"] = (0, "whole")
    code, found, _ = checked(train, tmp_path)  # the same file: `checked` finds one
    assert code == 0 and found["pages"]["b"] == "whole"
    assert [name for name, _ in scripted["ran"]] == ["a", "b", "b", "b"]


def test_what_is_out_of_time_is_tried_again_and_then_fails(
    train: Path, tmp_path: Path, scripted: dict[str, Any]
) -> None:
    scripted["a"] = (124, "so far")
    assert [checked(train, tmp_path)[0] for _ in range(4)] == [UNFINISHED, UNFINISHED, 1, 1]
    assert [name for name, _ in scripted["ran"]] == ["a", "b", "a", "a"]


def test_a_part_that_goes_on_is_repeated_before_the_next(
    train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripted: dict[str, Any]
) -> None:
    """What comes after the selection runs with what it chose."""
    codes = iter([UNFINISHED, 124, UNFINISHED, UNFINISHED, 0])

    def run(bench: Bench, limit_s: float) -> tuple[int, str]:
        scripted["ran"].append(("a", round(limit_s)))
        return next(codes), "page"

    monkeypatch.setitem(check.PARTS, "a", Part("a", 100.0, run, "words", goes_on=True))
    assert checked(train, tmp_path)[0] == 0
    assert [name for name, _ in scripted["ran"]] == ["a"] * 5 + ["b"]


def test_no_part_is_begun_that_may_not_end_in_time(train: Path, tmp_path: Path, scripted: dict[str, Any]) -> None:
    said: list[str] = []
    code = check.main(train, None, tmp_path / "out", minutes=1.0, device="cpu", say=said.append)
    assert code == UNFINISHED and scripted["ran"] == []
    assert any("a may take 1000 s" in line for line in said)


def test_another_train_py_begins_anew(train: Path, tmp_path: Path, scripted: dict[str, Any]) -> None:
    checked(train, tmp_path)
    train.write_text(TRAIN + "\n# changed\n")
    said: list[str] = []
    check.main(train, None, tmp_path / "out", device="cpu", say=said.append)
    assert "another train.py" in said[0]
    assert [name for name, _ in scripted["ran"]] == ["a", "b", "a", "b"]
    check.main(train, None, tmp_path / "out", device="cpu", again=True, say=said.append)
    assert len(scripted["ran"]) == 6


def test_what_stops_the_rest_comes_first_and_each_part_fits_into_ten_minutes() -> None:
    order = list(PARTS)
    assert order[:3] == ["doctor", "sandbox", "tests"]
    assert order.index("kernels") < order.index("tune") < order.index("step") < order.index("run")
    assert order.index("run") + 1 == order.index("replay")
    assert all(p.limit_s < 600 or p.named for p in PARTS.values())
    makefile = (ROOT / "Makefile").read_text()
    assert "bench check $(if $(DATA),--data $(DATA)) $(foreach part,$(PART),--part $(part))" in makefile


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_command_of_every_part_is_one_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """The very command lines of a GPU and of a trial, taken apart by the parsers that would take them."""
    from hotloop.agent_loop import cli

    taken: list[str] = []

    def take(command: list[str], limit_s: float, log: Path, *_: Any, **__: Any) -> tuple[int, float]:
        assert 0 < limit_s <= 1200
        log.write_text("")
        if command[1:3] == ["-m", "pytest"]:
            assert all((ROOT / word).exists() for word in command if word.startswith("tests/"))
            return 0, 0.0
        if "hotloop.bench.sandbox" in command[-1]:
            compile(command[-1], "-c", "exec")
            return 0, 0.0
        words = ["bench", *command[3:]] if command[1:3] == ["-m", "hotloop.bench"] else command[3:]
        if words[0] == "prepare":  # which has a parser of its own
            taken.append("prepare")
            return 0, 0.0
        args = cli._parser().parse_args(words)
        taken.append(" ".join(words[:2] if words[0] == "bench" else words[:1]))
        return (1, 0.0) if args.verb == "run" else (0, 0.0)  # no record to read

    monkeypatch.setattr(parts, "call", take)
    timed: list[str] = []
    monkeypatch.setattr(parts, "run_kernels", lambda out, limit_s, log, names, *_: timed.extend(names) or 0)
    facts = {"run": {"number": 0, "data": "x"}}
    bench = Bench(device, ROOT / "train.py", tmp_path, None, lambda _: None, facts)
    for part in PARTS.values():
        part.run(bench, part.limit_s)
    assert timed if device == "cpu" else set(timed) == OPERATORS.keys() - {"attention"}
    assert {"doctor", "run", "replay", "prepare", "tune"} <= set(taken)
    assert {f"bench {p}" for p in ("step", "baseline", "overheads")} <= set(taken)


@pytest.mark.timeout(1800)  # a bound for a busy machine: it starts thirty processes that import torch
def test_each_part_for_real_at_a_minute_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but those with tests of their own (`run`, `replay`: what `experiment` calls) and `tests`, which skips all."""
    pytest.importorskip("triton")
    from pydoc_data.topics import topics

    monkeypatch.setenv("HOTLOOP_DATA", str(tmp_path / "cache"))
    folder = tmp_path / "text"
    folder.mkdir()
    for number, name in enumerate(sorted(topics)[:60]):
        (folder / f"{number}.txt").write_text(topics[name])
    caps = {"train": 300, "val": 16, "holdout": 8}
    prep.prepare(str(folder), seq_len=256, vocab_size=320, out=tmp_path / "data", max_rows=caps)
    named = ["doctor", "sandbox", "kernels", "tune", "step", "experiment"]
    command = ["check", "--device", "cpu", "--train", str(train), "--data", str(tmp_path / "data")]
    command += ["--out", str(tmp_path / "out"), *(word for part in named for word in ("--part", part))]
    code = main(command)
    out = capsys.readouterr().out
    assert code == 0, out
    (path,) = (tmp_path / "out" / "cpu").glob("*.json")
    result = results.read(path)
    pages = result.extra["pages"]
    assert list(pages) == named
    assert {r.operator for r in result.rows} == {"residual"}
    assert "threads" in result.extra["tuned"]["chosen"] and "(CPU figures), preset laptop" in pages["tune"]
    assert "CPU figures" in pages["step"]
    assert "    identical\n" in pages["experiment"]
