"""The commands as they are typed, with real data, real processes and real training; only small."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import git
import msgspec
import pytest
from rich.console import Console

from hotloop import prepare as prep
from hotloop.agent_loop.agents.agent import Context, Turn
from hotloop.agent_loop.commands.verify import checks
from hotloop.agent_loop.folder import NightFolder
from hotloop.agent_loop.gitrepo import NightRepo, open_repo
from hotloop.agent_loop.loop.driver import Driver
from hotloop.agent_loop.loop.live import View
from hotloop.agent_loop.loop.planner import Options
from hotloop.harness import profile
from hotloop.harness.experiment import Settings
from hotloop.harness.paths import project_root
from hotloop.harness.records import heads
from hotloop.harness.records.chain import Chain, Lock
from hotloop.harness.records.model import Compiled, Decided, Decision, Judgement, Outcome
from hotloop.harness.sandbox.levels import best
from hotloop.harness.settings import PRESETS, BudgetRule, preset_named
from tests.harness.conftest import TINY, tiny_source

ROOT = project_root()
SMALL = ["--preset", "laptop", "--device", "cpu", "--budget-flops", "3e8", "--threads", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A laptop-shaped dataset of some pages of Python's manual."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("text")
    for number, name in enumerate(sorted(topics)[:80]):
        (folder / f"{number}.txt").write_text(topics[name])
    out = folder / "data"
    caps = {"train": 400, "val": 24, "holdout": 8}
    prep.prepare(str(folder), seq_len=256, vocab_size=320, out=out, max_rows=caps)
    return out


def call(folder: Path, *command: str, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HOTLOOP")} | {"PYTHONPATH": str(ROOT)} | settings
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)


def hotloop(folder: Path, *args: str, **settings: str) -> subprocess.CompletedProcess[str]:
    main = "import sys; from hotloop.agent_loop.cli import main; sys.exit(main())"
    return call(folder, sys.executable, "-c", main, *args, **settings)


def refused(done: subprocess.CompletedProcess[str], code: int, words: str) -> None:
    assert done.returncode == code, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("hotloop: WARNING: the sandbox is L")]
    assert len(said) == 1 and re.fullmatch(rf"hotloop: .*{words}.*", said[0]), done.stderr
    assert done.stdout == ""


def test_run_prints_the_block_and_its_replay_is_identical(tmp_path: Path, data: Path) -> None:
    # The file claims a score and stops every clock that it can reach: neither counts.
    lies = "print('val_bpb:          0.100000')\nimport time\n" + "\n".join(
        f"time.{name} = lambda: 0.0" for name in ("time", "monotonic", "perf_counter", "process_time")
    )
    (tmp_path / "train.py").write_bytes(tiny_source(START=lies))
    first, second = (hotloop(tmp_path, "run", *SMALL, "--data", str(data)) for _ in range(2))
    assert first.returncode == 0, first.stderr
    block = first.stdout.splitlines()
    assert block[0] == "---"
    names = (
        "val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps num_params_M depth"
    )
    assert [line.split(":")[0] for line in block[1:]] == names.split()
    values = dict(line.split(":") for line in block[1:])
    assert 1.0 < float(values["val_bpb"]) < 8.0
    assert Chain.read(tmp_path / "runs/single/records.jsonl").outcome(0).training.wall_s > 0
    assert (tmp_path / "runs/single/experiments/0000/log.txt").read_text().count("val_bpb") == 1
    assert second.stdout.splitlines()[1] == block[1]  # the same score to the last digit
    replay = hotloop(tmp_path, "replay", "0", "--tag", "single", "--data", str(data))
    assert replay.returncode == 0, replay.stderr
    assert replay.stdout.splitlines()[-1] == "identical"
    (tmp_path / "runs/single/experiments/0000/train.py").write_text("def build_model(): ...\ndef train(): ...\n")
    refused(hotloop(tmp_path, "replay", "0", "--tag", "single", "--data", str(data)), 2, "is not what was run")


def test_python_train_py_runs_the_shipped_model(tmp_path: Path, data: Path) -> None:
    shutil.copy(ROOT / "train.py", tmp_path)
    small = [*SMALL[:4], "--budget-tokens", "8192", "--threads", "2", "--data", str(data)]
    done = call(tmp_path, sys.executable, "train.py", *small)
    assert done.returncode == 0, done.stderr
    assert "total_tokens_M:   0.0\nnum_steps:        2\n" in done.stdout
    assert "depth:            4" in done.stdout


def test_no_sandbox_is_refused_unless_it_is_asked_for(tmp_path: Path, data: Path) -> None:
    (tmp_path / "train.py").write_bytes(tiny_source())
    run = ["run", *SMALL, "--data", str(data), "--sandbox", "L0"]
    refused(hotloop(tmp_path, *run), 2, "--sandbox L0 protects nothing; .* --unsafe-no-sandbox")
    done = hotloop(tmp_path, *run, "--unsafe-no-sandbox")
    assert done.returncode == 0
    assert "WARNING: train.py runs without a sandbox" in done.stderr
    outcome = Chain.read(tmp_path / "runs/single/records.jsonl").outcome(0)
    assert outcome.sandbox.level == 0


def test_a_failure_is_an_exit_status_with_its_reason(tmp_path: Path, data: Path) -> None:
    (tmp_path / "train.py").write_bytes(tiny_source(STEP="loss = step(batch) * float('nan')"))
    done = hotloop(tmp_path, "run", *SMALL, "--data", str(data))
    assert done.returncode == 15
    assert "status:           nan\nreason:           NonFiniteLossError: the loss of step 0 is nan" in done.stdout
    assert "val_bpb" not in done.stdout


class Scripted:
    """An agent with a list of files to try."""

    name = "scripted"

    def __init__(self, sources: dict[str, bytes]) -> None:
        self.sources = list(sources.items())

    ahead = False

    def propose(self, context: Context) -> Turn:
        name, source = self.sources[context.number - 1]
        (context.worktree / "train.py").write_bytes(source)
        return Turn(name)


@pytest.mark.usefixtures("warm_children")
def test_the_night_goes_on_whatever_train_py_does(tmp_path: Path, data: Path) -> None:
    """One hostile file after the other, for real; then an honest one, which is kept on merit."""
    (tmp_path / "train.py").write_text(TINY)
    made = git.Repo.init(tmp_path, initial_branch="main")
    made.git.add("train.py")
    made.git.execute(["git", "-c", "user.name=u", "-c", "user.email=u@u", "commit", "-qm", "start"])
    tries = {
        "raise": ("crash", tiny_source(STEP="raise RuntimeError('no')")),
        "hang": ("timeout", tiny_source(STEP="while True: pass")),
        "not a number": ("nan", tiny_source(STEP="loss = step(batch) * float('inf')")),
        "exit 0": ("crash", tiny_source(SUBMIT="raise SystemExit(0)")),
        "kill itself": ("oom", tiny_source(SUBMIT="import os, signal; os.kill(os.getpid(), signal.SIGKILL)")),
        "look ahead": ("invalid", tiny_source(MIX="x = x + x.roll(-1, 1)")),
        "another protocol": ("invalid", tiny_source(SUBMIT="run._wire.send('score', val_bpb=0.1)")),
        "a fake score": ("discard", tiny_source(SUBMIT="print('---\\nval_bpb:          0.000001', flush=True)")),
        "learn faster": ("keep", TINY.replace("lr=1.0", "lr=3.0").encode()),
    }
    preset = preset_named("laptop").with_limits(stall_s=3.0, overtime=50.0)
    settings = Settings(preset, "cpu", prep.load_dataset(data), 1)
    night = NightFolder(tmp_path / "runs" / "t")
    agent = Scripted({name: source for name, (_, source) in tries.items()})
    options = Options(experiments=len(tries), budget=BudgetRule("flops", 3e8))
    with View(Console(width=160)) as view:
        Driver(night, NightRepo(open_repo(tmp_path), "t", night.folder), [agent], [settings], options, view).run()
    rows = night.rows()
    assert [(r.description, r.decision) for r in rows[1:]] == [(k, want) for k, (want, _) in tries.items()]
    assert all(r.reason for r in rows)
    assert all(r.val_bpb is None for r in rows[1:8])
    assert rows[8].val_bpb == rows[0].val_bpb  # printing changes nothing
    assert b"lr=3.0" in made.git.show("autoresearch/t:train.py").encode()
    assert not list((night.folder / "experiments").glob("*/scratch"))
    _is_verified(tmp_path, night, made, data)
    made.close()


def test_noise_is_measured_on_as_many_seeds_as_are_asked_for(tmp_path: Path, data: Path) -> None:
    (tmp_path / "train.py").write_text(TINY)
    made = git.Repo.init(tmp_path, initial_branch="main")
    made.git.add("train.py")
    made.git.execute(["git", "-c", "user.name=u", "-c", "user.email=u@u", "commit", "-qm", "start"])
    made.close()
    first = hotloop(tmp_path, "noise", "--tag", "n", "--seeds", "1", *SMALL, "--data", str(data))
    assert first.returncode == 0, first.stderr
    assert "bits per byte, from 2 runs" in first.stdout
    more = hotloop(tmp_path, "noise", "--tag", "n", "--seeds", "1", *SMALL, "--data", str(data))
    assert "bits per byte, from 3 runs" in more.stdout, more.stderr
    refused(hotloop(tmp_path, "noise", "--seeds", "0", *SMALL, "--data", str(data)), 2, "--seeds must be at least 1")


def _is_verified(tmp_path: Path, night: NightFolder, repo: git.Repo, data: Path) -> None:
    """`hotloop verify` holds for a real night and finds each thing that was changed."""

    def bad(folder: Path) -> set[str]:
        return {name for name, good, _ in checks(folder, repo, None) if not good}

    level = {"sandbox"} if best().level < 3 else set()
    assert bad(night.folder) == level
    done = hotloop(tmp_path, "verify", "--tag", "t")
    assert (done.returncode, "decisions    " in done.stdout) == (1 if level else 0, True), done.stdout
    last = night.rows()[-1].number
    weights = night.experiment_folder(last) / "weights.safetensors"
    audit = ["audit", str(last), "--tag", "t", "--data", str(data)]
    kept = weights.read_bytes()
    for change, word in (
        (lambda: weights.write_bytes(kept[:-1] + b"x"), "weights"),
        (lambda: (night.folder / "results.tsv").write_text("commit\n"), "results.tsv"),
        (lambda: repo.git.update_ref("refs/heads/autoresearch/t", night.rows()[0].commit), "branch"),
    ):
        head = repo.commit("autoresearch/t").hexsha
        tsv = (night.folder / "results.tsv").read_bytes()
        change()
        assert bad(night.folder) == {word} | level
        if word == "weights":
            refused(hotloop(tmp_path, *audit), 1, "stored weights of experiment")
        weights.write_bytes(kept)
        (night.folder / "results.tsv").write_bytes(tsv)
        repo.git.update_ref("refs/heads/autoresearch/t", head)
    path = night.folder / "records.jsonl"
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"keep"', b'"lose"', 1))
    assert bad(night.folder) == {"chain"}
    path.write_bytes(raw)
    # Its tail is cut: a file outside tells; where that is gone too, commits and folders without a record.
    lines = raw.splitlines(keepends=True)
    last_one = max(i for i, line in enumerate(lines) if json.loads(line)["kind"] == "experiment")
    path.write_bytes(b"".join(lines[:last_one]))
    told = heads.place(path).read_bytes()
    assert {"end", "numbers"} <= bad(night.folder)
    heads.place(path).unlink()
    assert "numbers" in bad(night.folder) and "end" not in bad(night.folder)
    path.write_bytes(raw)
    heads.place(path).write_bytes(told)
    assert bad(night.folder) == level
    # A chain that was written anew verifies as a chain; the decision in it does not, nor would a signature.
    forged = Chain(tmp_path / "forged" / "records.jsonl", [], 0, 0)
    forged.path.parent.mkdir()
    for entry in Chain.read(path).entries:
        body = entry.body
        if isinstance(body, Decided) and body.judgement.decision == Decision.DISCARD:
            body = msgspec.structs.replace(body, judgement=Judgement(Decision.KEEP, body.judgement.reason))
        forged.append(body)
    assert {"decisions", "branch"} <= bad(forged.path.parent)
    assert "signatures" in {n for n, good, _ in checks(night.folder, repo, "00" * 32) if not good}


def test_a_night_with_prewarming_and_a_compile_cache_scores_what_one_without_does(tmp_path: Path, data: Path) -> None:
    (tmp_path / "train.py").write_text(TINY)
    made = git.Repo.init(tmp_path, initial_branch="main")
    made.git.add("train.py")
    made.git.execute(["git", "-c", "user.name=u", "-c", "user.email=u@u", "commit", "-qm", "start"])
    made.close()
    nights = {}
    for how, more in (("off", []), ("on", ["--compile-cache"])):
        done = hotloop(
            tmp_path, "loop", *SMALL, "--data", str(data), "--tag", how, "--prewarm", how, "--experiments", "0",
            "--noise-seeds", "1", "--no-watchdog", *more, GIT_AUTHOR_NAME="u", GIT_AUTHOR_EMAIL="u@u",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        nights[how] = Chain.read(tmp_path / "runs" / how / "records.jsonl").bodies(Outcome)
        assert ("warm start" in done.stdout) == (how == "on")
        assert not list((tmp_path / "runs" / how / "prewarm").glob("*/*"))
    assert [o.training.start.how for o in nights["off"]] == ["cold", "cold"]
    assert [o.training.start.how for o in nights["on"]] == ["cold", "warm"]
    assert nights["on"][0].training.start.because == "none was made ready"
    # It compiles nothing, so there is nothing to give.
    assert [o.compiled for o in nights["on"]] == [Compiled()] * 2
    assert [o.compiled for o in nights["off"]] == [None] * 2
    on, off = (
        [(o.status, o.scores, o.weights_sha256, o.training.tokens, o.training.curve, o.source_sha256) for o in made]
        for made in (nights["on"], nights["off"])
    )
    assert on == off
    assert nights["on"][1].ledger.start < nights["off"][1].ledger.start
    shown = hotloop(tmp_path, "show", "1", "--tag", "on")
    assert re.search(r"start: +warm, made ready in [0-9.]+ s", shown.stdout), shown.stdout


def test_a_night_keeps_its_kind_and_its_profile(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its train.py draws another seed each time where nobody asks for repetition; this machine is tuned meanwhile."""
    monkeypatch.setenv("HOTLOOP_DATA", str(tmp_path / "cache"))
    night = functools.partial(hotloop, tmp_path, HOTLOOP_DATA=str(tmp_path / "cache"))
    here = profile.facts(PRESETS["laptop"], "cpu", None)
    tuned = {"depends": here, "packages": {}, "configs": {}, "measured": {}, "selection": {"threads": "1"}}
    mine = profile.write(profile.own_path(here), tuned)
    (tmp_path / "train.py").write_bytes(
        tiny_source(
            START="import os\nif not torch.are_deterministic_algorithms_enabled(): torch.manual_seed(os.urandom(4)[0])"
        )
    )
    made = git.Repo.init(tmp_path, initial_branch="main")
    made.git.add("train.py")
    made.git.execute(["git", "-c", "user.name=u", "-c", "user.email=u@u", "commit", "-qm", "start"])
    made.close()
    loop = [
        "loop", *SMALL, "--data", str(data), "--tag", "f", "--experiments", "0", "--noise-seeds", "0", "--no-watchdog"
    ]  # fmt: skip
    done = night(*loop, "--fast-nondeterministic", GIT_AUTHOR_NAME="u", GIT_AUTHOR_EMAIL="u@u")
    assert done.returncode == 0, done.stderr
    assert "WARNING: --fast-nondeterministic: the same train.py may give other weights" in done.stdout
    environment = Chain.read(tmp_path / "runs/f/records.jsonl").outcome(0).environment
    assert environment.repeatable is False and environment.threads == 1
    assert environment.profile and (environment.profile.sha256, environment.profile.selection) == (
        mine.sha256, {"threads": "1"},
    )  # fmt: skip
    profile.write(profile.own_path(here), tuned | {"selection": {"threads": "2"}})
    assert night(*loop, "--fast-nondeterministic").returncode == 0
    again = night(*loop)
    assert (again.returncode, len(again.stderr.splitlines())) == (2, 1)
    assert "was started with repeatable = False, not True; scores would not compare" in again.stderr
    assert "need not repeat" in night("show", "0", "--tag", "f").stdout
    verified = night("verify", "--tag", "f").stdout
    assert "repeatable   run with --fast-nondeterministic" in verified
    assert f"profile      all ran under {mine.sha256[:12]}" in verified
    assert "no: --fast-nondeterministic" in (tmp_path / "runs/f/report.html").read_text()
    replay = night("replay", "0", "--tag", "f", "--data", str(data))
    assert replay.returncode == 0, replay.stderr
    (tmp_path / "runs/f/experiments/0000/profile.json").unlink()
    for command in (loop, ["replay", "0", "--tag", "f", "--data", str(data)]):
        refused(night(*command), 5, f"was made under the profile {mine.sha256[:12]}")
    assert "the weights differ, as those of --fast-nondeterministic may\nval_bpb differs by " in replay.stdout


def test_an_audit_repeats_the_recorded_score(tmp_path: Path, data: Path) -> None:
    (tmp_path / "train.py").write_bytes(tiny_source())
    assert hotloop(tmp_path, "run", "--preset", "laptop", "--budget-flops", "3e8", "--data", str(data)).returncode == 0
    done = hotloop(tmp_path, "audit", "0", "--tag", "single", "--data", str(data))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "identical"
    assert "mismatches:         0" in done.stdout
    refused(hotloop(tmp_path, "audit", "7", "--tag", "single", "--data", str(data)), 2, "has no experiment 7")


def test_signed_records_verify_and_go_on_with_their_key_only(tmp_path: Path, data: Path) -> None:
    (tmp_path / "train.py").write_bytes(tiny_source())
    run = ["run", "--preset", "laptop", "--budget-flops", "3e8", "--data", str(data)]
    key = {"HOTLOOP_KEY": str(tmp_path / "key")}
    refused(hotloop(tmp_path, *run, **key), 2, "there is no key at .*hotloop keygen")
    made = hotloop(tmp_path, "keygen", **key)
    public = re.findall(r"public:  ([0-9a-f]{64})", made.stdout)[0]
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    refused(hotloop(tmp_path, "keygen", **key), 2, "there is a key .* already")
    assert hotloop(tmp_path, *run, **key).returncode == 0
    done = hotloop(tmp_path, "verify", "--tag", "single", "--key", public)
    assert f"ok   signatures   all by {public[:16]}" in done.stdout
    refused(hotloop(tmp_path, *run, HOME=str(tmp_path)), 6, "was signed by .* would go on signed by nobody")
    (tmp_path / "key").chmod(0o644)
    refused(hotloop(tmp_path, *run, **key), 2, "others may read the key .*chmod 600")
    path = tmp_path / "runs" / "single" / "records.jsonl"
    signature = json.loads(path.read_text().splitlines()[0])["signature"]
    path.write_text(path.read_text().replace(signature, "00" * 64))
    assert "the signature of line 1 is wrong" in hotloop(tmp_path, "verify", "--tag", "single").stdout


def test_an_edited_kernel_is_refused(tmp_path: Path, data: Path) -> None:
    for name in ("harness", "kernels", "agent_loop"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "hotloop", tmp_path / "hotloop", symlinks=True)
    for name in ("prepare.py", "train.py"):
        shutil.copy(ROOT / name, tmp_path)
    with open(tmp_path / "kernels" / "reference.py", "a") as f:
        f.write("# faster\n")
    env = os.environ | {"PYTHONPATH": ""}
    command = [sys.executable, "train.py", *SMALL, "--data", str(data)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    refused(done, 4, r"kernels/reference\.py differ from the seal; undo with: git checkout kernels/reference\.py.*")


def test_damaged_data_is_refused(tmp_path: Path, data: Path) -> None:
    (tmp_path / "train.py").write_text(TINY)
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    raw = bytearray((copy / "val.bin").read_bytes())
    raw[100] ^= 1
    (copy / "val.bin").write_bytes(raw)
    refused(hotloop(tmp_path, "run", *SMALL, "--data", str(copy)), 3, r"val\.bin is not what was prepared.*")
    (copy / "val.bin").write_bytes(raw[:-2])
    refused(hotloop(tmp_path, "run", *SMALL, "--data", str(copy)), 3, r"val\.bin.*prepare it again.*")
    refused(hotloop(tmp_path, "run", *SMALL, "--data", str(tmp_path / "none")), 3, "no prepared data")


def test_two_runs_at_once_do_not_share_a_record(tmp_path: Path, data: Path) -> None:
    (tmp_path / "train.py").write_text(TINY)
    lock = Lock(tmp_path / "runs" / "single" / "lock")
    refused(hotloop(tmp_path, "run", *SMALL, "--data", str(data)), 7, f"in use by process {os.getpid()}")
    lock.release()


def test_doctor_names_what_is_there_and_what_is_missing(tmp_path: Path) -> None:
    done = hotloop(tmp_path, "doctor", HOTLOOP_DATA=str(tmp_path))
    assert done.returncode == 1
    lines = {line[5:].split("  ")[0].strip(): line for line in done.stdout.splitlines()}
    for name in ("python", "torch", "gpu", "cpu", "git", "sandbox", "disk", "seal", "data laptop", "data h100"):
        assert name in lines, done.stdout
    assert "run: hotloop prepare --preset" in done.stdout
    assert lines["seal"].startswith("ok")


def test_the_package_installs_whole(tmp_path: Path) -> None:
    """`pip install .`, from a copy, so that nothing of the checkout is picked up."""
    copy, target = tmp_path / "copy", tmp_path / "target"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "runs", "tests", "*.egg-info", "build")
    shutil.copytree(ROOT, copy, ignore=ignore)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = call(copy, *pip, "--target", str(target), ".")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(copy)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); from hotloop import kernels, harness, prepare\n"
        "import hotloop.harness.records.seal, hotloop.agent_loop.cli\n"
        "print(hotloop.harness.records.seal.verify_seal()); print(kernels.__file__)\n"
        "for p in (kernels, harness): [getattr(p, name) for name in p.__all__]"
    )
    done = call(tmp_path, sys.executable, "-I", "-c", code)
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout
    assert (target / "hotloop" / "bench" / "results" / "compile.json").exists()
    assert (target / "hotloop" / "bench" / "pytest.ini").exists()
    assert [p.name for p in target.iterdir() if not p.name.endswith((".dist-info", "bin"))] == ["hotloop"]
    entry = next(target.glob("hotloop-*.dist-info")) / "entry_points.txt"
    assert "hotloop = hotloop.agent_loop.cli:main" in entry.read_text()


def test_the_two_package_files_agree() -> None:
    """setup.py adds nothing to pyproject.toml, and the versions are one."""
    from hotloop import harness

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "--name", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.split() == [project["name"], project["version"]], done.stderr
    assert harness.__version__ == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
