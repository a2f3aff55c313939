"""What the warm-up changes is put back, wherever it is kept."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hotloop.harness.training.snapshot import Snapshot


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("assigned", torch.zeros(()))
        self.calls, self.mean, self.cache = 0, torch.zeros(2), None
        self.noise = {"own": torch.Generator().manual_seed(7)}


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A train.py with generators in its globals, plain and behind a class and a function of its own."""
    module = ModuleType("train")
    monkeypatch.setitem(sys.modules, "train", module)
    code = (
        "import random, numpy as np, torch\n"
        "plain = random.Random(3)\n"
        "class Data:\n    rng = np.random.default_rng(3)\n"
        "def closure():\n    old = np.random.RandomState(3)\n    return lambda: old.rand()\n"
        "draw = closure()\n"
        "system = random.SystemRandom()\n"
        "listed = [1, {'deep': (torch.Generator().manual_seed(3),)}]\n"
    )
    exec(code, vars(module))
    return module


def test_every_kind_of_state_is_put_back(own: ModuleType) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    local = torch.Generator().manual_seed(5)

    def step() -> list[float]:
        """Everything that it draws, so that two calls under one state are equal."""
        drawn = [random.random(), np.random.rand(), torch.rand(()), torch.rand((), generator=local)]
        drawn += [torch.rand((), generator=model.noise["own"]), own.plain.random(), own.Data.rng.random(), own.draw()]
        drawn += [torch.rand((), generator=own.listed[1]["deep"][0])]
        model.in_place.add_(1)
        model.assigned = model.assigned + 1
        model.calls += 1
        model.mean = model.mean + model.w.detach()
        model.cache = "compiled once"
        model.w.sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        state = [model.in_place, model.assigned, model.calls, *model.mean, *model.w.detach()]
        return [float(x) for x in (*drawn, *state, optimizer.param_groups[0]["lr"], model.training)]

    buffer, weight = model.assigned, model.w
    snapshot = Snapshot((model, optimizer, schedule), (step,))
    first = step()
    for steps in (1, 5):
        for _ in range(steps):
            step()
        model.eval()
        snapshot.put_back()
        assert model.assigned is buffer and model.w is weight  # compiled code and graphs hold these
        assert model.cache == "compiled once"
        assert not optimizer.state
        assert step() == first
        snapshot.put_back()


def test_a_parameter_or_buffer_that_the_warm_up_put_there_is_gone() -> None:
    model = Model()
    was = model.w
    snapshot = Snapshot((model,))
    model.w = nn.Parameter(torch.zeros(3))
    model.register_buffer("later", torch.ones(1), persistent=False)
    snapshot.put_back()
    assert model.w is was and torch.equal(was.detach(), torch.ones(2))
    assert "later" not in model._buffers
    model.register_buffer("later", torch.ones(1))
    assert "later" in model.state_dict()


def test_libraries_are_not_searched(own: ModuleType) -> None:
    """A generator of a library's module keeps its state: nothing of it is train.py's."""
    library = ModuleType("library")
    library.rng = random.Random(1)  # type: ignore[attr-defined]
    own.library = library  # type: ignore[attr-defined]
    snapshot = Snapshot(())
    before = library.rng.random()
    snapshot.put_back()
    assert library.rng.random() != before


@pytest.mark.parametrize("what", [3, "model", object()])
def test_what_cannot_be_restored_is_named(what: Any) -> None:
    make: Callable[[], Snapshot] = lambda: Snapshot((what,))  # noqa: E731
    with pytest.raises(TypeError, match=type(what).__name__):
        make()
