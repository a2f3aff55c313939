"""The built-in text: the same on every machine with the pinned packages, and read by no child at any level."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import zipfile
from pathlib import Path

import pytest

import hotloop.harness.sandbox.bubblewrap
import hotloop.harness.sandbox.policy
import hotloop.harness.sandbox.probe
from hotloop.harness.data import packages
from hotloop.harness.data.building import prepare
from hotloop.harness.data.dataset import SPLITS, default_data_dir
from hotloop.harness.data.sources import CodeText
from hotloop.harness.errors import DataError
from hotloop.harness.paths import project_root
from hotloop.harness.sandbox.levels import best
from hotloop.harness.sandbox.visible import around, hidden_text
from hotloop.harness.settings import PRESETS
from tests.needs import at, sandbox

# Of the laptop preset's rows. Another text, tokenizer or packing, and every score before it compares with none after.
ROWS_SHA256 = {
    "tokenizer.json": "0c08f45d8fc1f1b9594c6f3afcd821d390908081c32d4285dd36209fa3603ccd",
    "train.bin": "1bd3acac0f7013c4e6e775dddd579ffb00dd1c77731a4b9dbd09b09a11e27f9c",
    "val.bin": "f2bb59a2e962dc32be6e9a0174f4f51114e0e2f7b1b174c567d0cba8ac028662",
    "holdout.bin": "5b0e6545e559b56b427e857dccf695925cbfc0bd601013d0727f923b7cd094a4",
}
PINS = dict(
    line.split("==") for line in (project_root() / "requirements/lock.txt").read_text().splitlines() if "==" in line
)


def pinned(*names: str) -> bool:
    return all(importlib.metadata.version(name) == PINS[name] for name in names)


def test_the_pins_are_those_of_the_lock_file() -> None:
    assert {name: PINS[name] for name in packages.PINNED} == packages.PINNED


@pytest.mark.skipif(
    not pinned(*packages.PINNED, "tiktoken", "rustbpe"), reason="needs the versions in requirements/lock.txt"
)
def test_text_tokenizer_and_rows_are_the_same_everywhere(tmp_path: Path) -> None:
    laptop, told = PRESETS["laptop"], []
    caps = {"val": laptop.eval_rows, "holdout": laptop.holdout_rows}
    made = prepare(
        laptop.source, seq_len=laptop.seq_len, vocab_size=laptop.vocab_size, max_rows=caps, out=tmp_path / "data",
        report=told.append,
    )  # fmt: skip
    assert made.manifest["text"] == {"packages": packages.PINNED, "text_sha256": packages.TEXT_SHA256}
    assert made.manifest["sha256"] == ROWS_SHA256
    assert [made.manifest["splits"][s]["rows"] for s in SPLITS[1:]] == [laptop.eval_rows, laptop.holdout_rows]
    assert made.facts().epoch_tokens > 3_000_000  # a night's budgets are less, so no row is seen twice
    assert not [line for line in told if "WARNING" in line]


def test_other_versions_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not as they were released" in packages.differences("0" * 64)
    monkeypatch.setattr(packages, "PINNED", packages.PINNED | {"matplotlib": "0.1"})
    assert re.fullmatch(r"installed is matplotlib \S+ \(pinned: 0\.1\)", packages.differences("0" * 64))
    monkeypatch.setattr(packages, "FOLDERS", {"no-such-package": ("x",)})
    with pytest.raises(DataError, match="needs the package no-such-package; run: make install"):
        CodeText("packages").identity()


def test_the_standard_library_is_still_a_text_of_its_own() -> None:
    assert set(CodeText("stdlib").identity()) == {"text_sha256", "python"}
    assert default_data_dir("stdlib", 256, 2048).name == f"stdlib-py3.{sys.version_info.minor}-t256-v2048"
    assert default_data_dir("packages", 256, 2048).name == "packages-t256-v2048"


def test_copies_are_found_wherever_a_child_may_read(tmp_path: Path) -> None:
    places = [
        "venv/lib/python3.12/site-packages/matplotlib", "usr/lib/python3/dist-packages/fontTools",
        "usr/local/lib/python3.11/dist-packages/mpl_toolkits", "conda/envs/x/lib/python3.13/site-packages/matplotlib",
        "conda/pkgs/matplotlib-base-3.9.2-py312/lib/python3.12/site-packages/matplotlib",
        "conda/pkgs/fonttools-4.53-py312.conda", "store/abc-matplotlib-3.9/lib/python3.11/site-packages/matplotlib",
        "sites/fontTools",
    ]  # fmt: skip
    for place in places:
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "venv" / "lib64").symlink_to("lib")
    roots = [str(tmp_path / r) for r in ("venv", "usr", "usr/local", "conda", "store", "sites")]
    found = packages.copies_below(roots)
    assert {str(tmp_path / p) for p in places} - set(found) == set()
    assert not [f for f in found if "lib64" in f]  # the same folder, once


def test_what_is_hidden_is_around_nothing(tmp_path: Path) -> None:
    for name in ("a/hidden/x", "a/seen", "b"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "hidden")
    (tmp_path / "c").symlink_to(tmp_path / "a")  # a root that is a link: where it leads is what counts
    read, listed = around([str(tmp_path / n) for n in ("a", "b", "c")], [tmp_path / "c" / "hidden"])
    assert read == [str(tmp_path / "a" / "seen"), str(tmp_path / "b")]
    assert listed == [str(tmp_path / "a")]


@pytest.mark.parametrize("level", [at(3), at(2), at(1)])
def test_a_level_that_shows_the_text_is_not_taken(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe is a child that tries; it reads the text when nothing hides it, and then there is no such level."""
    assert sandbox(level).probes["reading the built-in text"]
    assert hidden_text()
    monkeypatch.setattr(hotloop.harness.sandbox.policy, "hidden_text", lambda: ())
    assert not hotloop.harness.sandbox.probe.probe(best(level))["reading the built-in text"]


def test_pygments_would_not_do() -> None:
    """Why it is not a part of the text: every pip has a copy, also the one that Python brings."""
    import ensurepip

    wheels = list((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"))
    if not wheels:
        pytest.skip("this Python brings no pip")
    names = zipfile.ZipFile(wheels[0]).namelist()
    assert any(n.startswith("pip/_vendor/pygments/") for n in names)
    assert not any("fontTools" in n or "matplotlib" in n for n in names)
