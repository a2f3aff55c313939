"""train.py beside plain PyTorch: what the pages say, what counts as equal quality, and both commands for real."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from hotloop import prepare as prep
from hotloop.bench import quality, versus_plain
from hotloop.bench.cli import main
from hotloop.bench.versus_plain import FREE, OURS, PLAIN, Side, page, source_of
from hotloop.harness.errors import UsageError

SEEDS = (2.010, 1.990, 2.000, 2.005, 1.995)  # standard deviation 0.0079


def side(name: str, seed: int = 1, bpb: float = 2.0, losses: tuple[float, ...] = (), **changes: object) -> Side:
    losses = losses or tuple(bpb + 3.0 - i for i in range(4))
    made = Side(
        name, seed, "cpu", 4096, 4, 0.5, 2.5, 4.0, 100.0, None, bpb, dict.fromkeys(versus_plain.PHASES, 1.0),
        [[i / 4, loss] for i, loss in enumerate(losses)], {"embedding": "reference: cpu tensors"},
    )  # fmt: skip
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def sides(name: str, shift: float = 0.0, jitter: float = 1e-4) -> list[Side]:
    return [side(name, i, bpb + shift + jitter * (-1) ** i) for i, bpb in enumerate(SEEDS)]


def test_what_counts_as_equal_quality() -> None:
    plain = sides(PLAIN, jitter=0.0)
    same = quality.verdict(sides(OURS), plain)
    assert same.within_noise
    assert same.seed_sd == pytest.approx(0.0079, abs=2e-4)
    assert same.allowed_mean == pytest.approx(2 * same.seed_sd * (2 / 5) ** 0.5)
    assert same.allowed_pair == pytest.approx(2 * same.seed_sd * 2**0.5)
    assert not quality.verdict(sides(OURS, shift=0.012), plain).within_noise  # two allowed means
    assert not quality.verdict(sides(OURS, shift=-0.012), plain).within_noise  # nor better: it is another model then
    one_off = quality.verdict([*sides(OURS)[:4], side(OURS, 4, SEEDS[4] + 0.03)], plain)
    assert abs(one_off.mean) < one_off.allowed_mean
    assert not one_off.within_noise


def test_curves_that_part_are_not_equal_quality() -> None:
    """The same scores in the end, and another way there."""
    plain = [side(PLAIN, i, b, (5.0 + b, 4.0 + b, 3.0 + b, 2.0 + b)) for i, b in enumerate(SEEDS)]
    slower = [side(OURS, i, b, (5.0 + b, 4.1 + b, 3.0 + b, 2.0 + b)) for i, b in enumerate(SEEDS)]
    found = quality.verdict(slower, plain)
    assert (found.mean, found.curve_share) == (0.0, 0.25)
    assert found.curve_largest_nats == pytest.approx(0.1)
    assert not found.within_noise
    assert quality.verdict(plain, plain).within_noise


def test_runs_that_do_not_pair_are_refused() -> None:
    with pytest.raises(UsageError, match="do not pair"):
        quality.verdict(sides(OURS), [dataclasses.replace(s, seed=s.seed + 1) for s in sides(PLAIN)])
    with pytest.raises(UsageError, match="do not pair"):
        quality.verdict(sides(OURS), [dataclasses.replace(s, tokens=8192) for s in sides(PLAIN)])
    with pytest.raises(UsageError, match="two of them at least"):
        quality.verdict(sides(OURS)[:1], sides(PLAIN)[:1])


def test_the_page_has_ratios_to_plain_pytorch_by_pairs() -> None:
    fast = {OURS: [side(OURS, step_s=0.25), side(OURS, step_s=0.1)], PLAIN: [side(PLAIN), side(PLAIN, step_s=0.2)]}
    text = page(fast)
    assert "CPU figures" in text
    assert "2 pairs" in text
    # 4096 tokens in 4 steps of 0.5 s are 2,048 a second; medians of (4096, 10240) and (2048, 5120).
    assert "| tokens/s, median step | 7,168 | 3,584 | 2.000 |" in text
    assert "| train, s | 1.00 | 1.00 |  |" in text
    assert "MFU" not in text  # it is not known on a CPU
    on_gpu = {
        name: [dataclasses.replace(s[0], device="cuda", mfu_percent=m)]
        for (name, s), m in zip(fast.items(), (60.0, 40.0), strict=True)
    }
    assert "| MFU of the training, % | 60.00 | 40.00 | 1.500 |" in page(on_gpu)
    assert "none, all are references" in text
    assert "Kernels in train.py: embedding." in page(
        fast | {OURS: [side(OURS, kernels={"embedding": "triton: cuda"})] * 2}
    )


def test_the_third_column_is_another_file() -> None:
    assert (
        source_of(FREE) == source_of(PLAIN).replace(b"REPEATABLE = True", b"REPEATABLE = False", 1) != source_of(PLAIN)
    )


def test_a_constant_is_changed_where_it_stands() -> None:
    pair = versus_plain.pair_of(["FP8='mlp lm_head'", "DEPTH=12"], "h100")
    assert list(pair) == ["train.py with FP8='mlp lm_head', DEPTH=12", OURS]
    assert pair[OURS] == source_of(OURS)
    ours, changed = (dict(enumerate(source.splitlines())) for source in (pair[OURS], next(iter(pair.values()))))
    assert [changed[i] for i in ours if changed[i] != ours[i]] == [
        ours[i].replace(b"DEPTH = 8", b"DEPTH = 12").replace(b'FP8 = ""', b"FP8 = 'mlp lm_head'")
        for i in ours
        if ours[i].startswith((b"DEPTH = ", b"FP8 = "))
    ]
    assert list(versus_plain.pair_of([], "h100")) == [OURS, PLAIN]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("NO_SUCH=1", "no such constant"),
        ("DEPTH=8", "the preset laptop"),  # the laptop's table overrides it
        ("FP8=mlp", "a literal of Python"),
        ("FP8", "a literal of Python"),
        ('FP8=""', "changes nothing"),
    ],
)
def test_a_change_that_would_not_show_is_refused(change: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        versus_plain.pair_of([change], "laptop")


def test_train_py_in_8_bits_is_trained_scored_and_audited(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole experiment twice; an audit that failed would end it."""
    flags = ["--preset", "laptop", "--data", str(data), "--tokens", "12288", "--set", "FP8='mlp lm_head e5m2'"]
    assert main(["baseline", *flags]) == 0
    text = capsys.readouterr().out
    name = "train.py with FP8='mlp lm_head e5m2'"
    assert f"| | {name} | train.py | {name} / train.py |" in text
    eight, ours = (float(x) for x in re.findall(r"val_bpb at equal tokens \| ([\d.]+) \| ([\d.]+)", text)[0])
    assert eight != ours
    assert eight == pytest.approx(ours, rel=2e-2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of the laptop preset's length from some pages of Python's manual."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("text")
    for number, name in enumerate(sorted(topics)[:60]):
        (folder / f"{number}.txt").write_text(topics[name])
    caps = {"train": 300, "val": 16, "holdout": 8}
    prep.prepare(str(folder), seq_len=256, vocab_size=320, out=folder / "data", max_rows=caps)
    return folder / "data"


def test_both_are_trained_and_scored(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.md"
    flags = ["--preset", "laptop", "--data", str(data), "--tokens", "12288", "--page", str(out)]
    assert main(["baseline", *flags]) == 0
    text = capsys.readouterr().out
    assert out.read_text() in text
    assert "12,288 tokens each in 3 steps, 1 pair (CPU figures" in text
    ours, plain = (float(x) for x in re.findall(r"val_bpb at equal tokens \| ([\d.]+) \| ([\d.]+)", text)[0])
    assert ours == pytest.approx(plain, abs=2e-4)
    assert len(re.findall(r"^\| \w+, s \|", text, re.MULTILINE)) == 8  # the whole ledger


def test_a_tiny_comparison_of_quality(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--preset", "laptop", "--data", str(data), "--tiny", "--tokens", "2560", "--seeds", "2"]
    flags += ["--out", str(tmp_path)]
    assert main(["quality", *flags]) == 0
    text = capsys.readouterr().out
    assert "2 seeds, 2,560 tokens each in 10 steps (CPU figures)" in text
    assert "**Within the noise of seeds.**" in text
    (written,) = tmp_path.glob("cpu-*/quality/*.json")
    assert f"written: {written}" in text
    found = json.loads(written.read_text())
    assert found["cpu_figures"] and found["verdict"]["within_noise"] and found["tokens"] == 2560
    assert [(r["file"], r["seed"]) for r in found["runs"]] == [(OURS, 1), (PLAIN, 1), (OURS, 2), (PLAIN, 2)]
    assert all(f"{r['val_bpb']:.6f}" in text for r in found["runs"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["baseline", "--pairs", "0"], "--pairs must be at least 1"),
        (["baseline", "--tokens", "0"], "--tokens must be a positive number"),
        (["quality", "--seeds", "1"], "--seeds must be at least 2"),
        (["baseline", "--free", "--set", "FP8='mlp'"], "--set compares train.py with itself"),
        (["quality", "--tokens", "-5"], "--tokens must be a positive number"),
        (["quality", "--tokens", "5"], "train.py, seed 1, ended as invalid: one step of 4096 tokens costs more"),
        (["baseline", "--preset", "h100"], "nvidia-smi shows none"),
    ],
)
def test_bad_input_is_one_line(args: list[str], words: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([args[0], "--preset", "laptop", "--data", str(data), *args[1:]]) != 0
    err = capsys.readouterr().err
    assert err.startswith("hotloop: ") and len(err.splitlines()) == 1 and words in err
