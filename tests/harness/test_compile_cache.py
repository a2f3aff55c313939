"""What compilers made, from one experiment to the next: only what may, only whole, and never into an evaluator."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from hotloop.harness.experiment import Job, Settings, run_experiment
from hotloop.harness.records.model import Outcome
from hotloop.harness.sandbox.levels import best
from hotloop.harness.settings import Preset
from hotloop.harness.training import compile_cache
from hotloop.harness.training.compile_cache import GENERATIONS, PACK, Pack, Store, collect, decode, encode, lay_out
from hotloop.harness.training.trainer import Setup
from tests.builders import make_run
from tests.harness.conftest import tiny_dataset, tiny_preset, tiny_rows, tiny_source

pytestmark = pytest.mark.usefixtures("warm_children")


SPLITS = {"train": tiny_rows(256, 0), "val": tiny_rows(64, 1), "holdout": tiny_rows(16, 2)}
MOST = 1 << 20
# A train.py that fills its caches as compilers do, tells what it finds there, and goes on writing once it has data.
CACHES = "os.environ['TORCHINDUCTOR_CACHE_DIR'], os.environ['TRITON_CACHE_DIR']"
SHOW = (
    "import os, glob\n"
    f"print('CACHES', sorted(os.path.relpath(p, c) for c in ({CACHES}) for p in glob.glob(c + '/**', recursive=True)"
    " if os.path.isfile(p)), flush=True)\n"
)
FILL = (
    f"for c in ({CACHES}):\n"
    "    os.makedirs(c + '/ab', exist_ok=True)\n"
    "    open(c + '/ab/kernel.so', 'wb').write(b'machine code')\n"
    "    open(c + '/ab/x.lock', 'wb').write(b'')\n"
    "    os.path.islink(c + '/ab/link') or os.symlink('/etc/passwd', c + '/ab/link')"
)
LATE = (
    "loss = step(batch); import os\n"
    "open(os.environ['TORCHINDUCTOR_CACHE_DIR'] + '/ab/data.bin', 'wb').write(batch.tokens.numpy().tobytes())"
)
SOURCE = tiny_source(START=SHOW + FILL, STEP=LATE).replace(
    b"def build_model(spec):\n",
    b"def build_model(spec):\n    " + SHOW.rstrip().replace("\n", "\n    ").encode() + b"\n",
)


def settings(root: Path, preset: Preset | None = None) -> Settings:
    return Settings(preset or tiny_preset(), "cpu", tiny_dataset(SPLITS), 1, best(), store=Store(root))


def run(root: Path, number: int = 0, source: bytes = SOURCE, preset: Preset | None = None) -> tuple[Outcome, Path]:
    folder = root / f"{number:04d}"
    job = Job(make_run(number), source, "t", folder)
    return run_experiment(job, settings(root / "store", preset)), folder


def shown(log: Path) -> list[str]:
    """What train.py found in its caches, each time that it looked."""
    return [line for line in log.read_text().splitlines() if line.startswith("CACHES")]


def setup(**limits: Any) -> Setup:
    return Setup(best(), "cpu", dataclasses.replace(tiny_preset().limits, **limits), 1)


def promoted(root: Path, generation: int = 1, **facts: Any) -> Path:
    """A store's pack that was left and kept."""
    root.mkdir(parents=True, exist_ok=True)
    store = Store(root)
    given = Pack(b"", {"generation": generation - 1}, {}) if generation > 1 else None
    made = decode(encode({"inductor/ab/k.so": b"code" * 100, "triton/x": b""}), MOST)
    left, _ = store.leave(made, setup(), given, root)
    assert left is not None
    store.settle(root, left.recorded(), kept=True)
    return root / f"{left.recorded().key}.pack"


def test_what_a_kept_experiment_compiled_is_given_to_the_next_and_to_no_evaluator(tmp_path: Path) -> None:
    first, folder = run(tmp_path)
    assert first.status == "ok", first.reason
    assert first.compiled.given is None
    assert first.compiled.left.files == 2
    left = decode((folder / PACK).read_bytes(), MOST)
    assert set(left.files) == {"inductor/ab/kernel.so", "triton/ab/kernel.so"}  # no lock, no link, and no data
    store = Store(tmp_path / "store")
    store.settle(folder, first.compiled.left, kept=True)
    assert not (folder / PACK).exists()
    second, folder = run(tmp_path, 1)
    assert second.status == "ok", second.reason
    assert second.compiled.given == first.compiled.left
    assert second.compiled.left.generation == 2
    assert shown(folder / "log.txt")[0] == "CACHES ['ab/kernel.so', 'ab/kernel.so']"
    assert shown(folder / "evaluate.txt") == ["CACHES []"] * 2
    assert (second.val_bpb, second.weights_sha256) == (first.val_bpb, first.weights_sha256)


def test_what_was_discarded_is_given_to_nobody(tmp_path: Path) -> None:
    first, folder = run(tmp_path)
    Store(tmp_path / "store").settle(folder, first.compiled.left, kept=False)
    assert not (folder / PACK).exists()
    second, folder = run(tmp_path, 1)
    assert second.compiled.given is None
    assert shown(folder / "log.txt")[0] == "CACHES []"


def test_a_trainer_changes_its_own_copy_and_cannot_reach_the_store(tmp_path: Path) -> None:
    if best().level == 0:
        pytest.skip("there is no sandbox on this machine")
    path = promoted(tmp_path / "store")
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    attempts = (
        SHOW + "open(os.environ['TORCHINDUCTOR_CACHE_DIR'] + '/ab/k.so', 'wb').write(b'other')\n"
        f"for mode in ('rb', 'wb'):\n"
        f"    try: open({str(path)!r}, mode); print('REACHED')\n"
        f"    except OSError: pass"
    )
    outcome, folder = run(tmp_path, 0, tiny_source(START=attempts))
    assert outcome.compiled.given.files == 2
    assert "REACHED" not in (folder / "log.txt").read_text()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_a_chain_of_caches_made_from_caches_has_an_end(tmp_path: Path) -> None:
    """Else a few hidden bytes from each kept train.py would add up."""
    promoted(tmp_path / "store", GENERATIONS)
    outcome, folder = run(tmp_path)
    assert outcome.compiled.given.generation == GENERATIONS
    assert outcome.compiled.left is None
    assert not (folder / PACK).exists()
    store = Store(tmp_path / "store")
    store.settle(folder, None, kept=True)
    assert store.load(setup()) == (None, "")
    again, _ = run(tmp_path, 1)
    assert (again.compiled.given, again.compiled.left.generation) == (None, 1)


def test_a_decision_may_be_carried_out_twice(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    left, _ = store.leave(decode(encode({"triton/x": b"1"}), MOST), setup(), None, tmp_path)
    assert left is not None
    for _ in range(2):
        store.settle(tmp_path, left.recorded(), kept=True)
        given, _ = store.load(setup())
        assert given is not None and given.files == {"triton/x": b"1"}
    for _ in range(2):
        store.settle(tmp_path, left.recorded(), kept=False)
    assert store.load(setup())[0] is not None  # what another one left stays


def damaged(data: bytes, how: str) -> bytes:
    at = {"hash": 3, "list": 80, "content": -5}.get(how)
    if at is not None:
        changed = bytearray(data)
        changed[at] ^= 1
        return bytes(changed)
    return {"torn": data[:-7], "longer": data + b"x", "empty": b"", "text": b"not a pack\n" * 40}[how]


@pytest.mark.parametrize("how", ["hash", "list", "content", "torn", "longer", "empty", "text"])
def test_a_damaged_cache_is_set_aside_in_one_line(tmp_path: Path, how: str) -> None:
    path = promoted(tmp_path)
    path.write_bytes(damaged(path.read_bytes(), how))
    given, note = Store(tmp_path).load(setup())
    assert given is None
    assert note.startswith(f"the compile cache {path} was set aside, ") and "\n" not in note
    assert path.with_suffix(".set-aside").exists()
    assert Store(tmp_path).load(setup()) == (None, "")  # said once


def test_a_run_says_that_its_cache_was_set_aside_and_compiles_again(tmp_path: Path) -> None:
    path = promoted(tmp_path / "store")
    path.write_bytes(damaged(path.read_bytes(), "content"))
    outcome, folder = run(tmp_path)
    assert outcome.status == "ok"
    assert outcome.compiled.given is None
    assert "inductor/ab/k.so is damaged" in outcome.compiled.note or "triton" in outcome.compiled.note
    assert shown(folder / "log.txt")[0] == "CACHES []"


@pytest.mark.parametrize("what", ["versions", "device", "seal"])
def test_the_cache_of_another_machine_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    path = promoted(tmp_path)
    facts = compile_cache._facts(setup())
    other = facts | {what: {"torch": "0.1"} if what == "versions" else "another"}
    monkeypatch.setattr(compile_cache, "_facts", lambda _: other)
    assert Store(tmp_path).load(setup()) == (None, "")  # it has another name
    path.rename(tmp_path / f"{compile_cache._key(other)}.pack")  # somebody has copied it here
    given, note = Store(tmp_path).load(setup())
    assert given is None
    assert f"it was made elsewhere (another {what})" in note


def test_what_compiled_code_depends_on_is_in_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    was = compile_cache._facts(setup())
    assert was["versions"]["torch"] and len(was["seal"]) == 64 and was["device"] and was["python"]
    assert compile_cache._facts(dataclasses.replace(setup(), threads=2)) != was
    monkeypatch.setenv("HOTLOOP_KERNELS", "triton")
    assert compile_cache._facts(setup()) != was


def test_what_is_too_large_is_neither_taken_nor_given(tmp_path: Path) -> None:
    promoted(tmp_path)
    given, note = Store(tmp_path).load(setup(compiled_bytes=100))
    assert given is None
    assert "it is too large: more than 100 bytes" in note
    for most in (200, 500):  # less than the files and their list; less than that and what the parent adds
        outcome, folder = run(tmp_path / "run", preset=tiny_preset().with_limits(compiled_bytes=most))
        assert outcome.status == "ok"
        assert outcome.compiled.left is None
        assert outcome.compiled.note == f"its compile cache is larger than {most} bytes and was not taken"
        assert not (folder / PACK).exists()


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "inductor/../../x", "inductor/./x", "inductor//x", "inductor", "home/x", "triton/a\nb"]
)
def test_a_pack_names_only_files_of_caches(name: str) -> None:
    with pytest.raises(ValueError, match="of a name or size that no cache has"):
        decode(encode({name: b"x"}), MOST)


@pytest.mark.parametrize(
    "listed", [[["triton/x", -1, ""]], [["triton/x", 1]], [["triton/x", 0, hashlib.sha256().hexdigest()]] * 2, "abc", 7]
)
def test_a_list_that_is_none_is_refused(listed: Any) -> None:
    header = json.dumps({"files": listed}).encode()
    data = hashlib.sha256(header).hexdigest().encode() + b"\n" + header + b"\n"
    with pytest.raises(ValueError, match=r"its list of files is none|no cache has"):
        decode(data, MOST)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("self._wire.send('compiled', bytes=1 << 40)", "malformed bytes"),
        ("self._wire.send('compiled', bytes=4); self._wire.send_bytes(b'junk')", "a compile cache that is none"),
        ("self._wire.send('next', rows=8, seq_len=32)", "where 'compiled' was due"),
    ],
)
def test_a_trainer_that_sends_something_else_is_invalid(tmp_path: Path, answer: str, reason: str) -> None:
    lie = f"def collect(most): {answer}; import time; time.sleep(60)\n"
    lie = f"import types\nfrom hotloop.harness.training import compile_cache\nself = run\n{lie}"
    outcome, _ = run(tmp_path, source=tiny_source(START=lie + "compile_cache.collect = collect"))
    assert (outcome.status, outcome.compiled.left) == ("invalid", None)
    assert reason in outcome.reason


def test_caches_go_and_come_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "one"), ("TRITON_CACHE_DIR", "two")):
        (tmp_path / name / "deep/er").mkdir(parents=True)
        (tmp_path / name / "deep/er/k.so").write_bytes(name.encode() * 1000)
        monkeypatch.setenv(variable, str(tmp_path / name))
    os.mkfifo(tmp_path / "one/pipe")  # would block for ever
    data = collect(MOST)
    assert not decode(collect(100), MOST).files
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "new" / variable))
    lay_out(data)
    assert collect(MOST) == data
    assert (tmp_path / "new/TRITON_CACHE_DIR/deep/er/k.so").read_bytes() == b"two" * 1000
