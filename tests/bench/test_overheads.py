"""An experiment's time beside its training: what the records add up to, and two short nights for real."""

from __future__ import annotations

from pathlib import Path

import pytest

from hotloop import prepare as prep
from hotloop.bench import overheads
from hotloop.bench.check.parts import PARTS
from hotloop.bench.cli import main
from hotloop.bench.overheads import Ran, figures, page, per_hour, read
from hotloop.harness.records.chain import Chain
from hotloop.harness.records.model import Compiled, Ledger, PackFacts, Start, Status
from tests.builders import make_decision, make_outcome, make_run
from tests.harness.conftest import TINY

LEDGER = {
    "start": 2.0, "import_": 1.0, "compile": 14.0, "calibrate": 5.0, "train": 300.0, "submit": 0.5, "evaluate": 4.0,
    "audit": 3.0,
}  # fmt: skip
PACK = PackFacts("k", 1, 1, 1, "s")


def run(
    number: int, warm: bool = False, given: bool = False, status: Status = Status.OK, idle: float | None = 0.5,
    **ledger: float,
) -> Ran:  # fmt: skip
    took = Ledger(**LEDGER | ledger)
    return Ran(make_outcome(
        make_run(number), preset="h100", device="cuda", status=status, ledger=took, total_s=sum(took.seconds()) + 1.5,
        start=Start("warm" if warm else "cold"), compiled=Compiled(PACK if given else None),
    ), idle)  # fmt: skip


def found(*runs: Ran) -> dict[str, tuple[float | None, int, bool]]:
    told = figures(runs)
    return {f.what.split(",")[0] + (" ahead" if "ahead" in f.what else ""): (f.found, f.runs, f.good) for f in told}


def test_each_target_is_told_by_the_runs_that_can() -> None:
    told = found(
        run(0, compile=70.0), run(1, warm=True, given=True, start=0.1, compile=2.0),
        run(2, warm=True, given=True, start=0.2, compile=6.0, audit=9.0), run(3, status=Status.CRASH, compile=500.0),
    )  # fmt: skip
    assert told["start to the first real batch ahead"] == (pytest.approx((8.1 + 12.2) / 2), 2, True)
    assert told["compile without a cache"] == (70.0, 1, False)
    assert told["evaluation and audit"] == (7.0, 3, True)
    assert told["submission"] == (0.5, 3, True)
    assert told["experiments an hour ahead"][1] == 2
    assert told["experiments an hour"][1] == 1


def test_experiments_an_hour_are_those_of_five_minutes_whatever_was_trained() -> None:
    """29.5 s in the phases, 1.5 s in none, 0.5 s of waiting: 31.5 s beside the training."""
    for train in (10.0, 300.0):
        assert per_hour([run(0, train=train)]) == pytest.approx(3600 / 331.5)
    slow, fast = found(run(0, warm=True, idle=10.0)), found(run(0, warm=True, idle=0.0, compile=1.0, calibrate=1.0))
    assert not slow["experiments an hour ahead"][2]
    assert fast["experiments an hour ahead"] == (pytest.approx(3600 / 314), 1, False)  # 11.46, and 11.6 are wanted
    assert found(run(0, warm=True, idle=0.0, compile=0.0, calibrate=0.0, evaluate=1.0))["experiments an hour ahead"][2]


def test_the_page_marks_what_was_missed_on_a_gpu_alone() -> None:
    text = page(figures([run(0, idle=None, compile=70.0)]), True)
    assert "| compile without a cache, s | <= 60 | 70.00 | 1 | FAIL |" in text
    assert "| submission, s | <= 1 | 0.50 | 1 | ok |" in text
    assert "| experiments an hour, next trainer made ahead | >= 11.6 | not measured | 0 |  |" in text
    on_cpu = page(figures([run(0, idle=None, compile=70.0)]), False)
    assert "FAIL" not in on_cpu and "CPU figures" in on_cpu


def test_records_of_several_nights_keep_their_own_pauses(tmp_path: Path) -> None:
    paths = []
    for night, idle in (("a", 1.0), ("b", 2.0)):
        chain = Chain.open(tmp_path / night / "records.jsonl")
        for number in range(2):
            chain.append(run(number).outcome)
            chain.append(make_decision(make_run(number), "discard", idle_s=idle + number))
        chain.append(run(2).outcome)  # not decided yet
        paths.append(chain.path)
    assert [r.idle_s for r in read(paths)] == [1.0, 2.0, None, 2.0, 3.0, None]


def test_a_missed_target_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for tag, submit in (("good", 0.5), ("slow", 1.5)):
        Chain.open(tmp_path / "runs" / tag / "records.jsonl").append(run(0, submit=submit).outcome)
    assert main(["overheads", "good", "--page", "page.md"]) == 0
    assert (tmp_path / "page.md").read_text() in capsys.readouterr().out
    assert main(["overheads", "slow"]) == 1
    assert main(["overheads", "none"]) == 2
    assert "there is no night at runs/none" in capsys.readouterr().err


def test_gpu_check_runs_it_only_where_it_is_named() -> None:
    assert PARTS["overheads"].named and not PARTS["night"].named


def test_the_longest_pause_of_a_night_counts() -> None:
    told = figures([run(i, warm=True, idle=idle) for i, idle in enumerate((0.2, 3.5, 0.1))])[-1]
    assert (told.found, told.aim, told.runs, told.good) == (3.5, 3.0, 3, False)


def test_two_short_nights_for_real(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pydoc_data.topics import topics

    folder = tmp_path / "text"
    folder.mkdir()
    for number, name in enumerate(sorted(topics)[:60]):
        (folder / f"{number}.txt").write_text(topics[name])
    caps = {"train": 300, "val": 16, "holdout": 8}
    prep.prepare(str(folder), seq_len=256, vocab_size=320, out=tmp_path / "data", max_rows=caps)
    monkeypatch.setitem(overheads.BUDGETS, "laptop", ["--budget-tokens", "65536"])
    train = tmp_path / "train.py"
    train.write_text("MATRIX_LR = 1.0\n" + TINY.replace("lr=1.0", "lr=MATRIX_LR"))
    assert main(["overheads", "--train", str(train), "--preset", "laptop", "--data", str(tmp_path / "data")]) == 0
    text = capsys.readouterr().out
    assert "a night of a baseline and 2 experiments, --prewarm off\n" in text
    assert "| 6 |  |" in next(line for line in text.splitlines() if line.startswith("| submission"))
    counts = {line.split("|")[1].strip(): line.split("|")[4].strip() for line in text.splitlines() if "an hour" in line}
    assert counts == {
        "experiments an hour, next trainer made ahead": "2", "experiments an hour, cold starts": "4"
    }  # fmt: skip
    assert "CPU figures: the targets are a GPU's." in text
