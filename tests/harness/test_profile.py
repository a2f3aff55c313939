"""A profile: what it holds for, what voids it, and how it reaches a trainer."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from hotloop.harness import profile
from hotloop.harness.errors import DeviceError, SealError, UsageError
from hotloop.harness.gpu.nvml import Gpu
from hotloop.harness.profile import PASSED, Profile
from hotloop.harness.sandbox.process import child_environment
from hotloop.harness.settings import PRESETS

H100 = Gpu(0, "GPU-1", name="NVIDIA H100 80GB HBM3", driver="580.95.05", capability=(9, 0))
GPU_FACTS = profile.facts(PRESETS["h100"], "cuda", H100)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTLOOP_DATA", str(tmp_path))
    for name in (*profile.CHOSEN_BY_USER, PASSED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what is entered ends with the test


def made(facts: dict[str, Any] = GPU_FACTS, **changes: Any) -> Profile:
    body = {
        "depends": facts, "packages": {}, "configs": {"embedding": {"D=512": {"ROWS": 4}}},
        "measured": {"attention": {"K=128 T=2048 W=1024": ["flash3", "torch"]}},
        "selection": {"attention": "flash3", "adamw_": "triton", "loss": "triton-exp"},
    }  # fmt: skip
    return profile.write(profile.own_path(facts), body | changes)


def test_what_was_chosen_is_what_a_child_starts_with() -> None:
    mine = made()
    assert profile.find(GPU_FACTS) == (mine, "")
    profile.enter(mine)
    env = child_environment(2)
    assert env["HOTLOOP_KERNELS"] == "auto,adamw_=triton,loss=triton-exp"
    assert "HOTLOOP_ATTENTION" not in env  # by its order, so that an edit's odd shape is served too
    given = json.loads(env[PASSED])
    assert given == {"configs": mine.body["configs"], "measured": mine.body["measured"], "sha256": mine.sha256}
    assert profile.find(GPU_FACTS)[0] == mine  # in a driver that was started again, with this environment
    profile.enter(None)
    assert not {"HOTLOOP_KERNELS", PASSED} & child_environment(2).keys()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"driver": "590.1"}, "driver 580.95.05, and here it is 590.1"),
        ({"gpu": "NVIDIA H100 80GB HBM3", "torch": "9.9"}, "and here it is 9.9"),
        ({"kernels": "0" * 16}, "kernels"),
        ({"rows of a pass divided by": 2}, "rows of a pass divided by 1, and here it is 2"),
    ],
)
def test_a_profile_of_other_facts_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    made()
    found, told = profile.find(GPU_FACTS | changes)
    assert found is None
    assert words in told and told.endswith("make a new one with: hotloop tune") and "\n" not in told


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"ROWS": 4', '"ROWS": 8'),
        lambda text: "[]",
        lambda text: json.dumps({"profile": {}, "sha256": profile._digest({})}),
    ],
)
def test_a_damaged_profile_is_refused_in_one_line(damage: Any) -> None:
    path = made().path
    path.write_text(damage(path.read_text()))
    found, told = profile.find(GPU_FACTS)
    assert found is None and "is damaged, and is not used" in told and "\n" not in told
    with pytest.raises(UsageError, match="is damaged"):
        profile.read(path)


def test_a_package_that_is_not_what_was_proven_voids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before a night, and before and after each run: another version, and another file of the same one."""
    mine = made(packages={"pluggy": profile.installed_hash("pluggy")})
    assert profile.find(GPU_FACTS)[0] == mine
    mine.verify()
    monkeypatch.setattr(profile, "installed_hash", lambda package: "another")
    with pytest.raises(SealError, match=r"files of pluggy are not those that it proved; run: hotloop tune"):
        mine.verify()
    found, told = profile.find(GPU_FACTS)
    assert found is None and "installed files of pluggy" in told


def test_the_hash_of_a_package_is_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some.py").write_text("a = 1\n")
    info = tmp_path / "some_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1\n")
    (info / "RECORD").write_text("some.py,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    was = profile.installed_hash("some-package")
    (tmp_path / "some.py").write_text("a = 2\n")
    assert len(was) == 64 and profile.installed_hash("some-package") not in (was, "")
    assert profile.installed_hash("not-there-at-all") == ""


def test_what_the_user_asks_for_comes_before_any_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = made()
    os.environ["HOTLOOP_KERNELS"] = "reference"
    assert profile.find(GPU_FACTS) == (None, "")
    profile.enter(mine)
    assert os.environ["HOTLOOP_KERNELS"] == "reference" and PASSED not in os.environ


def test_the_shipped_profile_of_a_cpu_is_what_runs_without_any() -> None:
    """So that the README's night repeats on any machine that was not tuned."""
    here = profile.facts(PRESETS["laptop"], "cpu", None)
    found, told = profile.find(here)
    assert found and not told and found.selection == {"step": "eager"} and found.threads is None
    assert found.environment() == {}
    own = made(here, configs={}, measured={}, selection={"step": "compiled", "threads": "4"})
    assert profile.find(here)[0] == own and own.threads == 4
    assert own.environment()["HOTLOOP_KERNELS"] == "auto,step=compiled"
    assert profile.find(GPU_FACTS)[0] is None


def test_a_gpus_profile_stops_nothing_that_runs_on_the_cpu_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pre-flight checks on the CPU, under the environment of the night; what the user asks for is an error there."""
    from hotloop.kernels import KernelError, dispatch

    monkeypatch.setattr(dispatch, "ASKED", made().environment()["HOTLOOP_KERNELS"])
    monkeypatch.setattr(dispatch, "_decided", {})
    assert dispatch.implementation("adamw_", "cpu") == "reference"
    monkeypatch.setattr(dispatch, "ASKED", "adamw_")
    monkeypatch.setattr(dispatch, "_decided", {})
    with pytest.raises(KernelError, match="was asked for and cannot run"):
        dispatch.implementation("adamw_", "cpu")


def test_what_goes_on_keeps_the_profile_of_its_record(tmp_path: Path) -> None:
    """A night that is resumed and an experiment that is replayed: the same profile, or a refusal in words."""
    mine, folder = made(), tmp_path / "experiments" / "0000"
    mine.keep(folder)
    newer = made(selection={"adamw_": "reference"})
    assert profile.find(GPU_FACTS)[0] == newer
    kept = profile.kept(folder, mine.sha256, GPU_FACTS)
    assert kept and kept.sha256 == mine.sha256
    assert profile.kept(folder, "", GPU_FACTS) is None
    with pytest.raises(DeviceError, match=r"that does not hold here: it was made with driver 580\.95\.05, and here"):
        profile.kept(folder, mine.sha256, GPU_FACTS | {"driver": "1"})
    with pytest.raises(DeviceError, match=r"it is not in .*profile\.json; scores would not compare"):
        profile.kept(tmp_path / "none", mine.sha256, GPU_FACTS)


def test_each_gpu_and_preset_has_a_file_of_its_own() -> None:
    others = [dataclasses.replace(H100, name="NVIDIA H200")]
    paths = {profile.own_path(profile.facts(PRESETS["h100"], "cuda", g)).name for g in (H100, *others)}
    assert paths == {"nvidia-h100-80gb-hbm3-h100.json", "nvidia-h200-h100.json"}
