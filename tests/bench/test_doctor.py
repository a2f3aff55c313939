"""What `hotloop doctor` says of the kernels."""

from __future__ import annotations

import pytest

from hotloop.bench import doctor
from hotloop.kernels import attend


def test_the_doctor_asks_the_kernels_for_their_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(doctor.attention("cpu")) == [("attention", True, "reference")]
    plan = attend.Plan("", ("torch", "cudnn"), {"flash3": "not installed"}, {}, {}, "cuda")
    monkeypatch.setitem(attend._plans, "cuda", plan)
    assert list(doctor.attention("cuda")) == [
        ("attention", True, "torch, cudnn, reference"), ("  not flash3", True, "not installed")
    ]  # fmt: skip
    monkeypatch.setattr(attend, "ASKED", "fast")
    monkeypatch.setattr(attend, "_plans", {})
    assert next(iter(doctor.attention("cpu")))[:2] == ("attention", False)
