"""bench/baseline.py is train.py's model, weights, optimizer and schedule, and none of its kernels."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from hotloop.bench import baseline
from hotloop.harness.preflight.preflight import preflight
from hotloop.harness.sandbox.levels import best
from hotloop.harness.settings import PRESETS, Spec
from hotloop.harness.training.run import Batch

ROOT = Path(__file__).resolve().parents[2]

VOCAB, LENGTH = 29, 12
SPEC = Spec("laptop", "cpu", 1, VOCAB, LENGTH)
TINY = dict(
    DEPTH=4, ASPECT_RATIO=8, HEAD_DIM=8, WINDOW_PATTERN="SL", GATE_CHANNELS=4, TOTAL_BATCH_SIZE=4 * LENGTH,
    DEVICE_BATCH_SIZE=2, MUON_RAMP=3, WARMUP_RATIO=0.25, FINAL_LR_FRAC=0.1,
)  # fmt: skip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both files at a size of milliseconds, with a window shorter than the rows and two micro-batches a step."""
    for module in (train, baseline):
        monkeypatch.setattr(module, "LAPTOP", TINY)


def shaken(module: Any) -> Any:
    """The model with every weight random, those that start at zero too, so that each of them matters."""
    torch.manual_seed(1)
    model = module.build_model(SPEC)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


LAUNCHED = {"CUDA_GRAPHS"}  # constants that say how train.py's step is launched, not what it computes


def test_it_has_train_pys_hyperparameters() -> None:
    for name, preset in PRESETS.items():
        spec = Spec(name, preset.device, 1, preset.vocab_size, preset.seq_len)
        ours, plain = (
            {k: v for k, v in vars(module.hyperparameters(spec)).items() if isinstance(v, int | float | str | tuple)}
            for module in (train, baseline)
        )
        # Products in 8 bits are off until their speed and their quality are shown, and plain PyTorch has none.
        assert ours.pop("FP8") == ""
        assert len(ours) > 20
        assert {name: plain[name] for name in ours.keys() - LAUNCHED} == {k: ours[k] for k in ours.keys() - LAUNCHED}


def test_it_needs_none_of_our_kernels() -> None:
    tree = ast.parse((ROOT / "bench" / "baseline.py").read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {n for n in names if n.partition(".")[0] != "torch"} == {"types", "hotloop.harness"}
    code = (
        "import sys, hotloop.bench.baseline\n"
        "sys.exit(any(m.startswith(('hotloop.kernels', 'train')) for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("preset", ["laptop", "h100"])
def test_the_same_seed_gives_the_same_weights(preset: str) -> None:
    spec = Spec(preset, "cpu", 1, 512, 64)
    states = []
    for module in (train, baseline):
        torch.manual_seed(5)
        states.append(module.build_model(spec))
    ours, plain = (m.state_dict() for m in states)
    assert list(ours) == list(plain)
    assert all(torch.equal(ours[name], plain[name]) for name in ours)
    assert states[0].flops_per_token() == states[1].flops_per_token()


@pytest.mark.usefixtures("tiny")
def test_outputs_loss_and_gradients_agree() -> None:
    ours, plain = shaken(train), shaken(baseline)
    tokens = torch.randint(0, VOCAB, (3, LENGTH + 1))
    x, y = tokens[:, :-1], tokens[:, 1:]
    torch.testing.assert_close(plain(x), ours(x), rtol=2e-6, atol=2e-6)
    losses = [m.loss(x, y) for m in (ours, plain)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=2e-5, atol=2e-7, msg=lambda m, n=name: f"{n}: {m}")


class Rehearsal:
    """A run without a harness: the batches of a training of eight steps; keeps what was logged and submitted."""

    def __init__(self) -> None:
        self.spec = SPEC
        self.losses: list[float] = []
        self.weights: dict[str, torch.Tensor] = {}

    def warmup(self, step: Callable[[Batch], Any], *, rows: int, restore: tuple[Any, ...]) -> None:
        self.rows = rows

    def batches(self, *, rows: int) -> Iterator[Batch]:
        assert rows == self.rows == 4
        generator = torch.Generator().manual_seed(0)
        for step in range(8):
            data = torch.randint(0, VOCAB, (rows, LENGTH + 1), generator=generator)
            yield Batch(data[:, :-1].contiguous(), data[:, 1:].contiguous(), step / 8, step)

    def log(self, loss: torch.Tensor) -> None:
        self.losses.append(float(loss))

    def submit(self, model: torch.nn.Module, *, depth: int, flops_per_token: int) -> None:
        self.weights = {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.usefixtures("tiny")
def test_eight_steps_of_training_agree() -> None:
    """Through each file's own train(run): micro-batches, schedules, both optimizers."""
    runs = []
    for module in (train, baseline):
        torch.manual_seed(1)
        runs.append(Rehearsal())
        module.train(runs[-1])
    ours, plain = runs
    assert ours.losses[-1] != ours.losses[0]
    assert plain.losses == pytest.approx(ours.losses, rel=1e-6)
    torch.manual_seed(1)
    start = train.build_model(SPEC).state_dict()
    for name, weight in ours.weights.items():
        moved = (weight - start[name]).norm()
        assert moved > 0, name
        # Orthogonalisation raises small singular values, and their rounding with them.
        assert (plain.weights[name] - weight).norm() < 1e-3 * moved, name


@pytest.mark.usefixtures("tiny")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_sees_the_same_window() -> None:
    """What a GPU trains with; and all of it in one graph, as torch.compile(fullgraph=True) wants it."""
    model = shaken(baseline)
    tokens = torch.randint(0, VOCAB, (2, LENGTH + 1))
    x, y = tokens[:, :-1], tokens[:, 1:]
    with torch.no_grad():
        want = model.loss(x, y)
        model.flex = baseline.block_masks(model.windows, LENGTH, "cpu")
        assert set(model.flex) == {LENGTH // 2}
        loss_of = torch.compile(model.loss, backend="eager", dynamic=False, fullgraph=True)
        torch.testing.assert_close(loss_of(x, y), want, rtol=1e-6, atol=0)
        model.flex = baseline.block_masks([LENGTH // 2 - 1], LENGTH, "cpu")
        model.flex[LENGTH // 2] = model.flex.pop(LENGTH // 2 - 1)
        assert not torch.isclose(model.loss(x, y), want, rtol=1e-6, atol=0), "a window of another size must show"


def test_its_gpu_branch_runs_at_full_size(tmp_path: Path) -> None:
    """On tensors without memory, as the pre-flight does; FlexAttention alone refuses them, so SDPA stands in for it."""
    source = (ROOT / "bench" / "baseline.py").read_bytes()
    flex = b'        model.flex = block_masks(model.windows, run.spec.seq_len, "cuda")\n'
    assert flex in source
    found = preflight(source.replace(flex, b""), PRESETS["h100"], 8192, 2048, 1, best(), tmp_path, 120.0)
    assert found.status == "ok", found.reason
    assert [s.name for s in found.stages] == ["import", "shapes"]
