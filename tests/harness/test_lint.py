"""What a train.py may look like as text, however it is spelled."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotloop.harness.preflight.lint import MAX_COMPRESSED, compressed_bytes, problem, unfit

ROOT = Path(__file__).resolve().parents[2]
REAL = (ROOT / "train.py").read_bytes()


def test_code_twice_as_long_as_what_is_shipped_may_run() -> None:
    other = (ROOT / "bench" / "baseline.py").read_bytes()
    assert problem(REAL) == problem(other) == ""
    assert problem(REAL + other) == ""


@pytest.mark.parametrize("alphabet", ["01", " \t", "abcdefghijklmnop", "".join(map(chr, range(0x4E00, 0x5E00)))])
def test_no_spelling_carries_more_than_the_cap(alphabet: str) -> None:
    """Random letters of any alphabet, as many as hold a tenth more than the cap."""
    bits = (len(alphabet) - 1).bit_length()
    count = int(1.1 * 8 * MAX_COMPRESSED / bits)
    text = "".join(random.Random(1).choices(alphabet, k=count))
    lines = "\n".join(f"x = 1 #{text[i : i + 200]}" for i in range(0, count, 200))
    assert problem(REAL + lines.encode())
    assert compressed_bytes(lines.encode()) > MAX_COMPRESSED


@pytest.mark.parametrize("code", ["exec('x = 1')", "run = eval", "[exec][0]('x')", "def f(g=eval): g('1')"])
def test_text_is_not_run_as_code(code: str) -> None:
    assert "runs text as code" in problem(code.encode())
    assert not problem(b"model.eval()\ncompiled = torch.compile(step)\n")


@given(st.binary(max_size=300))
def test_any_bytes_are_judged(source: bytes) -> None:
    assert isinstance(problem(source), str)


@pytest.mark.parametrize("source", [b"x = 1  # \xb5\n", b"# coding: no-such\n", b"\xef\xbb\xbf# coding: latin-1\n"])
def test_what_is_no_text_is_refused(source: bytes) -> None:
    assert "not text" in problem(source)


@pytest.mark.parametrize(
    ("line", "now"),
    [
        (b"from harness import Batch, Run\n", "write: from hotloop.harness import Batch, Run, Spec, main"),
        (b"import harness.settings\n", "write: from hotloop.harness import"),
        (b"import kernels\n", "write: from hotloop import kernels"),
        (b"from kernels import rms_norm\n", "write: from hotloop import kernels"),
    ],
)
def test_imports_of_the_first_version_are_told_their_new_name(line: bytes, now: str) -> None:
    reason, at = unfit(b"import torch\n" + line + REAL)
    assert now in reason and at == 2


def test_the_package_of_others_that_is_called_kernels_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert unfit(b"import kernels\n" + REAL) == ("", 0)
    assert unfit(REAL) == ("", 0)
