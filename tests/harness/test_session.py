"""Training and evaluation in real child processes, honest and not."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch

from hotloop.harness import single
from hotloop.harness.errors import TrialError
from hotloop.harness.sandbox import process
from hotloop.harness.scoring.evaluation import Evaluation, Evaluator, Scoring
from hotloop.harness.settings import BudgetRule, Preset, Spec
from hotloop.harness.training.budget import Budget
from hotloop.harness.training.session import Event, Session, SessionConfig
from tests.needs import at

pytestmark = pytest.mark.usefixtures("warm_children")


_spec = importlib.util.spec_from_file_location("tiny_train", Path(__file__).with_name("conftest.py"))
assert _spec is not None
assert _spec.loader is not None
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

SPEC = Spec("laptop", "cpu", 1, tiny.VOCAB, tiny.LENGTH)
TRAIN, VAL, HOLDOUT = tiny.tiny_rows(256, 0), tiny.tiny_rows(64, 1), tiny.tiny_rows(16, 2)
BYTES = np.arange(tiny.VOCAB, dtype=np.int32) % 5  # some tokens have no bytes


def session(
    folder: Path,
    source: bytes,
    preset: Preset | None = None,
    budget: Budget | None = None,
    spec: Spec = SPEC,
    **kwargs: Any,
) -> Session:
    preset = preset or tiny.tiny_preset()
    return Session(SessionConfig(
        source=source, spec=spec, preset=preset, rows=TRAIN, budget=budget or Budget(preset.budget), folder=folder,
        threads=1, **kwargs,
    ))  # fmt: skip


def train(folder: Path, source: bytes, **kwargs: Any) -> Session:
    return session(folder, source, **kwargs).run()


def scoring(folder: Path, source: bytes, preset: Preset | None = None, **more: Any) -> Scoring:
    return Scoring(
        source=source, spec=SPEC, preset=preset or tiny.tiny_preset(), val=VAL, holdout=HOLDOUT, train=TRAIN,
        token_bytes=BYTES, folder=folder, threads=1, **more,
    )  # fmt: skip


def evaluate(folder: Path, source: bytes, weights: bytearray, preset: Preset | None = None) -> Evaluation:
    preset = preset or tiny.tiny_preset()
    return Evaluator(scoring(folder, source, preset)).run(weights)


def failure(call: Any) -> TrialError:
    with pytest.raises(TrialError) as e:
        call()
    return e.value


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return train(tmp_path_factory.mktemp("trained"), tiny.tiny_source())


def test_training_learns_uses_its_budget_and_repeats_to_the_bit(trained: Session, folder: Path) -> None:
    again = session(folder, tiny.tiny_source())
    result = again.run()
    assert result.weights == trained.weights
    assert result.training.tokens == again.budget.tokens == trained.training.tokens
    assert result.training.steps == result.training.tokens // (8 * tiny.LENGTH)
    losses = [loss for _, loss in trained.training.curve]
    assert losses[-1] < 0.8 * losses[0]
    assert result.training.depth == 1
    assert result.training.peak_mb > 50
    assert [k for k, seconds in result.ledger.items() if seconds] == [
        "start", "import", "compile", "calibrate", "train", "submit"
    ]  # fmt: skip
    assert not (folder / "scratch").exists()


def test_another_seed_gives_other_weights(trained: Session, folder: Path) -> None:
    preset = tiny.tiny_preset()
    spec = Spec("laptop", "cpu", 2, tiny.VOCAB, tiny.LENGTH)
    other = session(folder, tiny.tiny_source(), preset, spec=spec).run()
    assert other.weights != trained.weights
    assert other.training.tokens == trained.training.tokens


def test_warm_up_leaves_no_trace_in_the_weights(trained: Session, folder: Path) -> None:
    """Twenty timed steps instead of two: same weights."""
    result = train(folder, tiny.tiny_source(), preset=tiny.tiny_preset(calibrate_steps=20))
    assert result.weights == trained.weights


RANDOM = (
    "noise = random.Random(1); numbers = np.random.default_rng(1); drawn = torch.Generator().manual_seed(1)\n"
    "model.register_buffer('mean', torch.zeros(()))\n"
    "forward = model.forward\n"
    "def jitter(tokens):\n"
    "    draws = random.random() + np.random.rand() + noise.random() + numbers.random()\n"
    "    model.mean = 0.9 * model.mean + draws + float(torch.rand(()) + torch.rand((), generator=drawn))\n"
    "    model.eval() if model.mean > 4 else None\n"
    "    return forward(tokens) * (1 + 0.01 * float(model.mean) + model.training)\n"
    "model.forward = jitter; model.register_buffer('mean', torch.zeros(()), persistent=False)"
)


def test_warm_up_leaves_no_trace_in_random_numbers_buffers_and_modes(folder: Path) -> None:
    source = tiny.tiny_source().replace(b"    def step", b"    # MORE\n    def step")
    head, tail = source.decode().split("    # MORE\n")
    text = "import random, numpy as np\n" + head + "".join(f"    {x}\n" for x in RANDOM.splitlines()) + tail
    one, two = (
        train(folder, text.encode(), preset=tiny.tiny_preset(calibrate_steps=steps)).weights for steps in (2, 9)
    )
    assert one == two


def test_a_replay_makes_as_many_warm_up_steps_whatever_its_clock_says(folder: Path) -> None:
    """The model counts its calls where nothing can put them back: the weights depend on their number."""
    source = tiny.tiny_source(LOGITS="calls.append(0)\nreturn self.head(x) * (1 + 1e-3 * len(calls))")
    source = b"calls = []\n" + source
    first = session(folder, source, tiny.tiny_preset(calibrate_steps=7, calibrate_s=0.0))
    weights = first.run().weights
    recorded = first.budget.recorded()
    assert recorded.timed_steps == [7]
    again = session(folder, source, tiny.tiny_preset(calibrate_steps=2, calibrate_s=0.0), Budget.replay(recorded))
    assert again.run().weights == weights
    old = Budget.replay(msgspec.structs.replace(recorded, timed_steps=None))  # as records once were
    assert session(folder, source, tiny.tiny_preset(calibrate_s=0.0), old).run().weights != weights


def test_a_garbage_collection_is_in_no_timed_step(folder: Path) -> None:
    """One that takes four seconds, and steps of a millisecond."""
    slow = (
        "import gc, time; collect = gc.collect\n"
        "gc.collect = lambda *generation: (None if generation else time.sleep(4), collect(*generation))"
    )
    one = session(folder, tiny.tiny_source(START=slow), tiny.tiny_preset(budget=BudgetRule("tokens", 1024)))
    one.run()
    assert max(one.budget.step_s.values()) < 2.0


@pytest.mark.parametrize("whole", [False, True])
def test_what_torch_compile_wraps_keeps_its_names(trained: Session, folder: Path, whole: bool) -> None:
    """A part, in train(); all of it, in build_model()."""
    source = tiny.tiny_source(START="pass")
    if whole:
        model = b"torch.compile(Model(spec.vocab_size), backend='eager')"
        source = source.replace(b"Model(spec.vocab_size).to(spec.device)", model)
    else:
        part = b"    model.head = torch.compile(model.head, backend='eager')\n    def step"
        source = source.replace(b"    def step", part)
    assert b"eager" in source
    weights = train(folder, source).weights
    assert safetensors.torch.load(bytes(weights)).keys() == safetensors.torch.load(bytes(trained.weights)).keys()
    assert evaluate(folder, source, weights).audit.mismatches == 0


LOADER = (
    "from torch.utils.data import DataLoader, Dataset\n"
    "class Rows(Dataset):\n"
    "    def __len__(self): return 8\n"
    "    def __getitem__(self, i): return {'row': torch.full((3,), i), 'none': torch.zeros(0), 'more': ITEM}\n"
    "got = torch.cat([b['row'][:, 0] for b in DataLoader(Rows(), batch_size=4, num_workers=2)])\n"
    "assert got.tolist() == list(range(8))"
)


def test_a_loader_with_workers_works(folder: Path) -> None:
    train(folder, tiny.tiny_source(START=LOADER.replace("ITEM", "i")))


@pytest.mark.parametrize(
    ("item", "words"), [("[][1]", "IndexError"), ("open('/dev/null')", "DataLoader worker"), ("os._exit(3)", "worker")]
)
def test_a_loader_whose_worker_fails_is_a_crash(folder: Path, item: str, words: str) -> None:
    """Also where the worker made what cannot be sent: its loader would wait for ever."""
    text = "import os\n" + LOADER.replace("ITEM", item).replace(
        "num_workers=2", "num_workers=2, collate_fn=lambda x: x"
    )
    error = failure(lambda: train(folder, tiny.tiny_source(START=text)))
    assert (error.status, words in error.reason) == ("crash", True), error.reason


def test_a_folder_named_from_here_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the command line names its own: the child starts elsewhere."""
    from hotloop.harness.sandbox.policy import Sandbox

    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    assert train(Path("run"), tiny.tiny_source(), sandbox=Sandbox(1)).training.steps > 0


def test_bits_per_byte_against_an_independent_fp64_computation(trained: Session, folder: Path) -> None:
    result = evaluate(folder, tiny.tiny_source(), trained.weights)
    w = {k: v.double() for k, v in safetensors.torch.load(bytes(trained.weights)).items()}
    nats, total = 0.0, 0
    for row in VAL.astype(np.int64):
        x = w["embed.weight"][torch.from_numpy(row[:-1])]
        mean = torch.stack([x[: i + 1].mean(0) for i in range(len(x))])
        logits = (x + mean) @ w["head.weight"].T + w["head.bias"]
        for i, target in enumerate(row[1:]):
            if BYTES[target]:
                nats += float(torch.logsumexp(logits[i], 0) - logits[i, target])
                total += int(BYTES[target])
    assert result.scores.val_bpb == pytest.approx(nats / math.log(2) / total, rel=1e-6)
    assert result.scores.holdout_bpb != result.scores.val_bpb
    assert result.audit.mismatches == 0
    assert result.audit.cuts == len(VAL)


def test_the_score_does_not_depend_on_the_batch_size(trained: Session, folder: Path) -> None:
    scores = [
        evaluate(folder, tiny.tiny_source(), trained.weights, tiny.tiny_preset(eval_batch_rows=rows)).scores.val_bpb
        for rows in (1, 7, 64)
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-6)


def test_the_trainer_never_maps_val_and_gets_no_token_before_the_clock(folder: Path) -> None:
    """The child looks at all it can reach: mapped files, descriptors, and the shared memory after the warm-up."""
    source = tiny.tiny_source(
        WARM=(
            "import os, gc, numpy as np\n"
            "for line in open('/proc/self/maps'):\n"
            "    if '.bin' in line: print('MAPPED', line)\n"
            "for fd in os.listdir('/proc/self/fd'):\n"
            "    try: print('FD', os.readlink(f'/proc/self/fd/{fd}'))\n"
            "    except OSError: pass\n"
            "print('ENV', sorted(os.environ))\n"
            "ring = np.asarray(run._ring._bytes).view(np.uint16)\n"
            "print('RING', ring[:8 * 33].tolist(), flush=True)"
        )
    )
    train(folder, source)
    log = (folder / "log.txt").read_text()
    assert "MAPPED" not in log
    assert "val.bin" not in log
    assert "RING" in log
    ring = np.array(eval(log.split("RING ")[1].splitlines()[0]))
    real = {tuple(r[:8]) for r in TRAIN.astype(int)}
    assert not any(tuple(row[:8]) in real for row in ring.reshape(8, 33))


@pytest.mark.parametrize(
    ("changes", "status", "reason"),
    [
        ({"START": "raise ValueError('broken on purpose')"}, "crash", "broken on purpose"),
        ({"START": "import sys; sys.exit(0)"}, "crash", "SystemExit"),
        ({"START": "import os; os._exit(0)"}, "crash", "without submitting weights"),
        ({"START": "return"}, "crash", "without submitting weights"),
        ({"START": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"}, "crash", "SIGSEGV"),
        ({"START": "import os; os.kill(os.getpid(), 9)"}, "oom", "SIGKILL"),
        ({"START": "raise MemoryError('all gone')"}, "oom", "all gone"),
        ({"START": "raise torch.OutOfMemoryError('CUDA out of memory')"}, "oom", "CUDA out of memory"),
        ({"STEP": "loss = step(batch) * float('nan')"}, "nan", "loss of step 0"),
        ({"SUBMIT": "model.head.weight.data.fill_(float('nan'))"}, "nan", "not finite"),
        ({"WARM": "run.submit(model)"}, "invalid", "without having taken a batch"),
        ({"STEP": "loss = step(batch); run._wire.send_bytes(b'\\xff' * 64)"}, "invalid", "message of"),
        ({"STEP": "loss = step(batch); run._wire.send('submit', bytes=1 << 60)"}, "invalid", "at most"),
        ({"STEP": "loss = step(batch); run._wire.send('submit', bytes='all')"}, "invalid", "malformed bytes"),
        ({"STEP": "loss = step(batch); run._wire.send('next', rows=4, seq_len=32)"}, "invalid", "not declared"),
        ({"STEP": "loss = step(batch); run._wire.send('submit', bytes=9); run._wire.send_bytes(b'x' * 9)"},
         "invalid", "safetensors"),
    ],
)  # fmt: skip
def test_what_goes_wrong_in_training_is_a_status(
    folder: Path, changes: dict[str, str], status: str, reason: str
) -> None:
    from hotloop.harness.scoring.weights import check_weights

    error = failure(lambda: check_weights(train(folder, tiny.tiny_source(**changes)).weights))
    assert error.status == status
    assert reason in error.reason


def test_garbage_is_collected_between_steps_and_never_in_one(trained: Session, folder: Path) -> None:
    """Each step leaves a thousand objects in cycles, one with a tensor: the collector would run in the middle of it."""
    source = tiny.tiny_source(
        START=(
            "import gc, sys, weakref\n"
            "inside, ran, left, most, frozen = [False], [], [], [0], []\n"
            "def told(phase, info):\n"
            "    if phase == 'start' and run._step >= 0: ran.append((inside[0], info['generation']))\n"
            "gc.callbacks.append(told)"
        ),
        STEP=(
            "inside[0] = True; loss = step(batch)\n"
            "for i in range(1000):\n"
            "    cycle = [torch.empty(1) if i == 0 else None]; cycle.append(cycle)\n"
            "    if i == 0: left.append(weakref.ref(cycle[0]))\n"
            "most[0] = max(most[0], sum(r() is not None for r in left)); inside[0] = False"
        ),
        SUBMIT=(
            "print('RAN', len(ran), sorted(set(ran)), 'MOST', most[0], 'FROZEN', gc.get_freeze_count() > 10000)\n"
            "sys.stdout.flush()"
        ),
    )
    result = train(folder, source)
    assert result.weights == trained.weights
    (line,) = [x for x in (folder / "log.txt").read_text().splitlines() if x.startswith("RAN")]
    assert line == f"RAN {result.training.steps} [(False, 0)] MOST 1 FROZEN True"


def test_a_batch_is_the_rows_whole_also_above_two_to_the_fifteenth() -> None:
    from hotloop.harness.training.feed import SLOT_BYTES, SLOTS, Ring
    from hotloop.harness.training.run import Run

    class Memory:
        map = bytearray(SLOTS * SLOT_BYTES)

    ring = Ring(Memory)  # type: ignore[arg-type]
    rows = np.random.default_rng(1).integers(0, 1 << 16, (4, 9)).astype(np.uint16)
    assert rows.max() > 1 << 15
    ring.put(1, rows)
    run = Run(Spec("laptop", "cpu", 1, 1 << 16, 8), None, ring)  # type: ignore[arg-type]
    batch = run._batch({"slot": 1, "progress": 0.5, "step": 3}, 4, 8)
    ring.put(1, np.zeros_like(rows))  # the parent's next one
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.tokens.is_contiguous() and batch.targets.is_contiguous()
    np.testing.assert_array_equal(batch.tokens.numpy(), rows[:, :-1])
    np.testing.assert_array_equal(batch.targets.numpy(), rows[:, 1:])


def test_the_record_names_the_kernels_that_ran(folder: Path) -> None:
    """What train.py's calls chose is known at the end only."""
    fake = "import sys, types; k = sys.modules['hotloop.kernels'] = types.ModuleType('hotloop.kernels'); "
    fake += "k.implementations = lambda: {'attention': 'what ran'}"
    assert train(folder, tiny.tiny_source(START=fake)).training.implementations == {"attention": "what ran"}


def test_an_exception_says_its_line(folder: Path) -> None:
    source = tiny.tiny_source(START="raise ValueError('broken on purpose')")
    line = source.decode().splitlines().index("    raise ValueError('broken on purpose')") + 1
    assert f"train.py:{line}" in failure(lambda: train(folder, source)).reason
    assert "broken on purpose" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("source", [b"def train(:\n", b"def train(run): ...\n", b"import no_such_module\n"])
def test_a_file_that_is_no_train_py_is_a_crash(folder: Path, source: bytes) -> None:
    assert failure(lambda: train(folder, source)).status == "crash"


def test_a_hang_is_a_timeout_in_every_phase(folder: Path) -> None:
    sleep = "import time; time.sleep(1000)"  # longer than the test may take
    for marker, limits in (
        ("START", {"warmup_s": 1.0}),
        ("WARM", {"warmup_s": 1.5}),
        ("STEP", {"stall_s": 1.0}),
        ("SUBMIT", {"stall_s": 1.0}),
    ):
        text = sleep if marker != "STEP" else f"loss = step(batch); {sleep}"
        preset = tiny.tiny_preset().with_limits(**limits)
        assert failure(
            lambda p=preset, t=text, m=marker: train(folder, tiny.tiny_source(**{m: t}), preset=p)
        ).status == ("timeout")


def test_slow_after_the_calibration_is_overtime(folder: Path) -> None:
    source = tiny.tiny_source(STEP="loss = step(batch); import time; time.sleep(0.2)")
    preset = tiny.tiny_preset(budget=BudgetRule("seconds", 0.4)).with_limits(overtime=1.03)
    error = failure(lambda: train(folder, source, preset=preset))
    assert error.status == "overtime"
    assert "budget was" in error.reason


def test_the_calibrated_budget_is_the_parents_clock_not_the_trainers(folder: Path) -> None:
    """With a fake parent clock of a tenth of a second a reading, the budget is a known number of tokens.

    The trainer patches every clock it has; nothing changes.
    """

    class Clock:
        now = 0.0

        def __call__(self) -> float:
            self.now += 0.1
            return self.now

    lie = "import time\nfor n in ('time', 'monotonic', 'perf_counter'): setattr(time, n, lambda: 0.0)"
    preset = tiny.tiny_preset(budget=BudgetRule("seconds", 20.0), calibrate_s=1.0).with_limits(
        overtime=1e6, warmup_s=1e6, start_s=1e6, stall_s=1e6
    )
    budgets = []
    for start in ("pass", lie):
        one = session(folder, tiny.tiny_source(START=start), preset, clock=Clock())
        one.run()
        budgets.append(one.budget.tokens)
        (step_s,) = one.budget.step_s.values()
        assert one.budget.tokens == int(20.0 / step_s + 1e-9) * 8 * tiny.LENGTH
    assert budgets[0] == budgets[1]


def test_a_budget_in_seconds_takes_that_long_for_real(folder: Path) -> None:
    source = tiny.tiny_source().replace(
        b"        logits = model", b"        import time; time.sleep(0.02); logits = model"
    )
    preset = tiny.tiny_preset(budget=BudgetRule("seconds", 2.0), calibrate_s=0.5)
    one = session(folder, source, preset).run()
    (step_s,) = one.budget.step_s.values()
    assert step_s > 0.02 and one.budget.tokens == int(2.0 / step_s + 1e-9) * 8 * tiny.LENGTH
    assert one.training.wall_s > 0.02 * one.budget.tokens / (8 * tiny.LENGTH)


def test_a_replayed_budget_gives_the_same_weights_on_a_slower_day(folder: Path) -> None:
    preset = tiny.tiny_preset(budget=BudgetRule("seconds", 0.5))
    first = session(folder, tiny.tiny_source(), preset)
    weights = first.run().weights
    replay = session(folder, tiny.tiny_source(), preset, Budget.replay(first.budget.recorded()))
    assert replay.run().weights == weights


def test_two_shapes_in_one_training(folder: Path) -> None:
    source = (
        tiny.tiny_source()
        .replace(b"restore=(model,))", b"restore=(model,))\n"
                 b"    run.warmup(step, rows=8, seq_len=16, restore=(model,))")
        .replace(b"run.batches(rows=8)", b"run.batches(rows=lambda p: (8, 16) if p < 0.5 else (8, 32))")
    )  # fmt: skip
    one = session(folder, source)
    result = one.run()
    assert len(one.budget.charges) == 2
    short, long = (c for s, c in sorted(one.budget.charges.items(), key=lambda x: x[0].seq_len))
    assert short == pytest.approx(long / 2)  # this model's products are linear in the tokens
    assert result.training.tokens == pytest.approx(one.budget.tokens, abs=2 * 8 * tiny.LENGTH)
    assert result.training.steps > one.budget.tokens // (8 * tiny.LENGTH)


PEEK = "x = x + torch.roll(self.embed(tokens), -1, 1)"
HOSTILE = {
    "looks one token ahead": {"MIX": PEEK},
    "looks ahead on one token in ten": {"MIX": "x = torch.where((tokens % 10 == 0)[..., None], " + PEEK[4:] + ", x)"},
    "mixes rows": {"MIX": "x = x + x.mean(0, keepdim=True)"},
    "keeps state across batches": {
        "LOGITS": "self.seen = getattr(self, 'seen', 0) + 1\nreturn self.head(x) * (1 + 0.05 * self.seen)"
    },
    "trains while it is evaluated": {
        "LOGITS": (
            "if not self.training:\n"
            "    counts = torch.bincount(tokens.flatten(), minlength=61).float()\n"
            "    self.bias = getattr(self, 'bias', torch.zeros(61)) + 0.01 * counts\n"
            "    return self.head(x) + self.bias\n"
            "return self.head(x)"
        )
    },
    "patches cross_entropy where it is scored": {
        "LOGITS": (
            "if not self.training:\n"
            "    real = F.cross_entropy\n"
            "    if not hasattr(F, 'patched'):\n"
            "        F.cross_entropy = lambda *a, **k: real(*a, **k) * 0.5\n"
            "        F.patched = True\n"
            "return self.head(x)"
        )
    },
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_a_model_that_cheats_is_invalid(folder: Path, changes: dict[str, str]) -> None:
    source = tiny.tiny_source(**changes)
    weights = train(folder, source).weights
    error = failure(lambda: evaluate(folder, source, weights))
    assert error.status == "invalid", error.reason


@pytest.mark.parametrize(
    ("changes", "status", "reason"),
    [
        ({"LOGITS": "return self.head(x) if self.training else self.head(x) * float('nan')"}, "nan", "not finite"),
        ({"LOGITS": "return self.head(x) if self.training else self.head(x)[:, :-1]"}, "crash", "logits are not"),
        ({"LOGITS": "if not self.training: raise RuntimeError('no score for you')\nreturn self.head(x)"}, "crash",
         "RuntimeError (train.py:16)"),
        ({"LOGITS": "if not self.training: import os; os._exit(0)\nreturn self.head(x)"}, "crash", "died (by itself)"),
        ({"LOGITS": "if not self.training: import time; time.sleep(60)\nreturn self.head(x)"}, "timeout",
         "took longer"),
    ],
)  # fmt: skip
def test_what_goes_wrong_in_evaluation_is_a_status(
    folder: Path, changes: dict[str, str], status: str, reason: str
) -> None:
    source = tiny.tiny_source(**changes)
    weights = train(folder, source).weights
    preset = tiny.tiny_preset().with_limits(evaluate_s=4.0 if status == "timeout" else 60.0)
    error = failure(lambda: evaluate(folder, source, weights, preset))
    assert (error.status, reason in error.reason) == (status, True), error.reason


def test_weights_that_do_not_fit_the_model_are_invalid(trained: Session, folder: Path) -> None:
    state = safetensors.torch.load(bytes(trained.weights))
    for change in ({"extra": torch.ones(2)}, {"head.bias": torch.ones(3)}):
        weights = bytearray(safetensors.torch.save({**state, **change}))
        assert failure(lambda w=weights: evaluate(folder, tiny.tiny_source(), w)).status == "invalid"


def test_the_child_sees_no_setting_of_the_users_shell(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sitecustomize.py").write_text("print('CUSTOMIZED')")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    train(folder, tiny.tiny_source(START="import os; print(dict(os.environ))"))
    log = (folder / "log.txt").read_text()
    assert "hunter2" not in log
    assert "CUSTOMIZED" not in log
    assert "HOME" in log


@pytest.mark.parametrize("level", [at(3), at(1), at(0)])
def test_a_child_dies_with_its_parent(folder: Path, level: int) -> None:
    """SIGKILL of the parent, the hardest case: nothing of it may be left running."""
    import signal
    import subprocess

    root = Path(__file__).resolve().parents[2]
    script = (
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "from pathlib import Path\n"
        "from hotloop.harness.sandbox.process import Child, descendants\n"
        "from hotloop.harness.sandbox.levels import best\n"
        "from hotloop.harness.sandbox.policy import Policy\n"
        f"folder = Path({str(folder)!r})\n"
        f"c = Child(best({level}), Policy('hotloop.harness.training.child', folder), [], folder / 'log.txt', 1)\n"
        "c.__enter__()\n"
        "while not descendants(c.pid): pass\n"
        "print(c.pid, *descendants(c.pid), flush=True); c.wait(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) > 1
        time.sleep(1.0)  # the child makes its setting right after its start
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(_state(pid) not in ("", "Z") for pid in pids):
        time.sleep(0.05)
    assert all(_state(pid) in ("", "Z") for pid in pids)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


def test_a_device_is_warmed_before_its_calibration_and_nothing_else_changes(folder: Path, trained: Session) -> None:
    events: list[Event] = []
    warmed = session(folder, tiny.tiny_source(), on_event=events.append, warm_s=0.2)
    result = warmed.run()
    assert list(dict.fromkeys(e.phase for e in events))[:5] == ["start", "import", "compile", "warm", "calibrate"]
    shares = [e.progress for e in events if e.phase == "warm"]
    assert shares[0] == min(shares) >= 0 and shares == sorted(shares) and shares[-1] < 1
    assert result.ledger.calibrate > 0.2
    assert result.weights == trained.weights


def test_a_start_that_takes_long_shows_that_it_goes_on_and_has_a_limit_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotloop.harness.training.session.SHOW_S", 0.01)
    monkeypatch.setattr(process, "subprocess", subprocess)  # one that is forked is ready at once
    events: list[Event] = []
    preset = tiny.tiny_preset().with_limits(load_s=60.0, start_s=30.0)
    session(folder, tiny.tiny_source(), preset, on_event=events.append).run()
    loading = [e.loaded_mb for e in events if e.phase == "start" and e.loaded_mb is not None]
    assert len(loading) > 1 and loading[-1] > 10 and not any(e.message for e in events if e.phase == "start")
    error = failure(lambda: train(folder, tiny.tiny_source(), preset=preset.with_limits(load_s=0.01)))
    assert (error.status, error.reason) == (
        "timeout", "torch and CUDA were not ready within 0 s; is the disk slow?"
    )  # fmt: skip


def test_a_terminal_shows_what_is_loaded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    show = single._printer()
    show(Event("start", loaded_mb=1234.4))
    show(Event("warm", 0.5))
    err = capsys.readouterr().err
    assert "start  1,234 MB loaded" in err and "warm  50.0 %" in err


def test_events_tell_the_phases_in_order(folder: Path) -> None:
    events: list[Event] = []
    session(folder, tiny.tiny_source(), on_event=events.append).run()
    phases = list(dict.fromkeys(e.phase for e in events))
    assert phases == ["start", "import", "compile", "calibrate", "train", "submit"]
    last = [e for e in events if e.phase == "train"][-1]
    assert last.loss is not None
    assert last.tokens_per_s is not None
    assert last.progress > 0.5
