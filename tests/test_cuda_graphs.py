"""train.py's passes as CUDA graphs, on a CPU: a stand-in for a graph records each operation and repeats it in place."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from hotloop.harness.settings import Spec
from hotloop.harness.training.run import Batch, _Snapshot

VOCAB, LENGTH = 29, 12
TINY = dict(
    DEPTH=2, ASPECT_RATIO=8, HEAD_DIM=8, WINDOW_PATTERN="SL", GATE_CHANNELS=4, TOTAL_BATCH_SIZE=6 * LENGTH,
    DEVICE_BATCH_SIZE=2, MUON_RAMP=3,
)  # fmt: skip


class Graph(TorchDispatchMode):
    """A CUDA graph's bargain: what is recorded is not done yet, and a replay reads and writes the same addresses."""

    captures = 0

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []  # what stood where a recorded operation wrote
        self.made: set[int] = set()  # memory that belongs to the recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        assert func is not torch.ops.aten._local_scalar_dense.default, "a capture cannot wait for the device"
        if func._schema.is_mutable:
            written = args[0] if isinstance(args[0], list) else [args[0]]
            self.before += [(t, t.clone()) for t in written if t.untyped_storage().data_ptr() not in self.made]
        out = func(*args, **kwargs)
        places = {t.untyped_storage().data_ptr() for t in given}
        fresh = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        fresh = [t for t in fresh if t.untyped_storage().data_ptr() not in places]  # neither views nor written in place
        self.made |= {t.untyped_storage().data_ptr() for t in fresh}
        if fresh or func._schema.is_mutable:
            self.operations.append((func, args, kwargs, fresh))
        return out

    def undo(self) -> None:
        for tensor, was in reversed(self.before):
            tensor.copy_(was)
        for *_, fresh in self.operations:
            for t in fresh:
                t.fill_(0)  # never computed yet

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, places in self.operations:
            out = func(*args, **kwargs)
            for place, t in zip(places, (x for x in torch.utils._pytree.tree_leaves(out)), strict=False):
                place.copy_(t)


@contextlib.contextmanager
def capture(graph: Graph) -> Iterator[None]:
    Graph.captures += 1
    with graph:
        yield
    with torch.no_grad():
        graph.undo()


class Stream:
    def wait_stream(self, other: Stream) -> None: ...


class OnCpu(str):
    """Says that it is a GPU to whom asks, and is the CPU's name to torch."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return other == "cuda" or str.__eq__(self, other)


class Rehearsal:
    """A run without a harness: a warm-up whose traces are taken away, then some steps."""

    def __init__(self) -> None:
        self.spec = Spec("laptop", OnCpu("cpu"), 1, VOCAB, LENGTH)
        self.losses: list[torch.Tensor] = []
        self.weights: dict[str, torch.Tensor] = {}

    def batch(self, step: int, rows: int) -> Batch:
        data = torch.randint(0, VOCAB, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        return Batch(data[:, :-1].contiguous(), data[:, 1:].contiguous(), step / 8, step)

    def warmup(self, step: Callable[[Batch], Any], *, rows: int, restore: tuple[Any, ...]) -> None:
        saved = _Snapshot(restore)
        for i in range(3):
            step(self.batch(100 + i, rows))
        saved.put_back()

    def batches(self, *, rows: int) -> Iterator[Batch]:
        for step in range(6):
            yield self.batch(step, rows)

    def log(self, loss: torch.Tensor) -> None:
        self.losses.append(loss)  # as it is: read when all is over

    def submit(self, model: torch.nn.Module, **_: Any) -> None:
        self.weights = {k: v.clone() for k, v in model.state_dict().items()}


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    real = train.build_model
    monkeypatch.setattr(train, "LAPTOP", TINY)
    monkeypatch.setattr(train, "build_model", lambda spec: real(dataclasses.replace(spec, device="cpu")))
    monkeypatch.setattr(torch, "compile", lambda f=None, **_: f if f else lambda g: g)
    for name, value in (
        ("CUDAGraph", Graph), ("graph", capture), ("Stream", Stream), ("current_stream", Stream),
        ("stream", lambda _: contextlib.nullcontext()),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Graph, "captures", 0)


def trained() -> Rehearsal:
    torch.manual_seed(1)
    run = Rehearsal()
    train.train(run)  # type: ignore[arg-type]
    return run


@pytest.mark.usefixtures("cpu")
def test_replayed_passes_train_as_launched_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three passes a step, a warm-up that was taken back, losses that are read when the training is over."""
    plain = trained()
    assert Graph.captures == 0, "off by default"
    monkeypatch.setattr(train, "CUDA_GRAPHS", True)
    graphed = trained()
    assert Graph.captures == 1
    assert len({float(x) for x in plain.losses}) == 6
    assert [float(x) for x in graphed.losses] == [float(x) for x in plain.losses]
    assert all(torch.equal(graphed.weights[name], weight) for name, weight in plain.weights.items())


@pytest.mark.usefixtures("cpu")
def test_a_pass_of_another_shape_is_refused() -> None:
    weight = torch.ones(3, requires_grad=True)

    def one_pass(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = (weight.sum() * tokens).sum()
        loss.backward()
        return loss.detach()

    graphed = train.GraphedPass(one_pass, [weight])
    assert float(graphed(torch.ones(2), torch.ones(2))) == 6.0
    assert weight.grad is not None
    assert weight.grad.tolist() == [2.0] * 3  # neither of the warm passes nor of the recording
    with pytest.raises(ValueError, match=r"CUDA_GRAPHS: a pass of \(1,\) after one of \(2,\)"):
        graphed(torch.ones(1), torch.ones(1))
