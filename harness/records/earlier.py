"""Records of version 1, which hotloop 0.1 wrote, in the shapes of today: there was less structure in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from hotloop.harness.records.model import KINDS, Body

__all__ = ["Version1"]

_SAME = (
    "tag", "preset", "device", "source_sha256", "status", "reason", "log_tail", "total_s", "mfu_percent", "num_params",
    "weights_sha256", "budget", "ledger", "seals", "sandbox",
)  # fmt: skip
_TRAINING = {
    "steps": "steps", "tokens": "tokens", "training_s": "wall_s", "training_cpu_s": "cpu_s", "peak_mb": "peak_mb",
    "depth": "depth", "curve": "curve", "start": "start",
}  # fmt: skip
_CLOCKS = ("feed_late_s", "device_s", "device_wall_s")  # stood among the conditions
_ORIGIN = {"agent": "agent", "agent_s": "seconds", "seconds": "seconds", "cost_usd": "cost_usd", "tokens": "tokens",
           "why": "why", "again_of": "again_of"}  # fmt: skip


class Version1:
    """Reads entries in their order: a decision's run is that of the experiment before it."""

    def __init__(self) -> None:
        self._runs: dict[int, dict[str, Any]] = {}

    def read(self, kind: str, body: dict[str, Any]) -> Body:
        """Raises msgspec.ValidationError, KeyError or TypeError for what no version 1 wrote."""
        made = getattr(self, "_" + kind.replace("-", "_"))(body)
        found: Body = msgspec.convert(made, KINDS[kind])
        return found

    def _night(self, body: dict[str, Any]) -> dict[str, Any]:
        kind, amount = body["budget"]
        return body | {"budget": {"kind": kind, "amount": amount}}

    def _agents(self, body: dict[str, Any]) -> dict[str, Any]:
        return body

    def _experiment(self, body: dict[str, Any]) -> dict[str, Any]:
        self._runs[body["number"]] = body
        return _outcome(body)

    def _decision(self, body: dict[str, Any]) -> dict[str, Any]:
        return {
            "run": _run(self._runs.get(body["number"], {"parent": "", "seed": 1}) | body) | {"origin": _origin(body)},
            "judgement": {k: body[k] for k in ("decision", "reason", "again") if k in body},
        } | {k: body[k] for k in ("gain", "noise_bpb", "syntax", "slot", "idle_s") if k in body}

    def _turn(self, body: dict[str, Any]) -> dict[str, Any]:
        rest = {k: v for k, v in body.items() if k not in _ORIGIN}
        return rest | {"status": body["status"] or None, "origin": _origin(body)}

    def _leave_one_out(self, body: dict[str, Any]) -> dict[str, Any]:
        rest = {k: v for k, v in body.items() if k != "run"}
        return rest | {"outcome": _outcome(body["run"]) if body.get("run") else None}


def _origin(body: Mapping[str, Any]) -> dict[str, Any]:
    return {new: body[old] for old, new in _ORIGIN.items() if old in body}


def _run(body: Mapping[str, Any]) -> dict[str, Any]:
    return {k: body[k] for k in ("number", "kind", "commit", "parent", "description", "seed")}


def _outcome(body: dict[str, Any]) -> dict[str, Any]:
    conditions = dict(body.get("conditions") or {})
    environment = dict(body.get("environment") or {})
    training = {new: body[old] for old, new in _TRAINING.items() if old in body}
    training |= {k: conditions.pop(k) for k in _CLOCKS if k in conditions}
    training["implementations"] = environment.pop("kernels", {})
    for phase in ("evaluate", "audit"):
        if f"{phase}_first_s" in conditions:
            conditions[phase] = {k: conditions.pop(f"{phase}_{k}") for k in ("first_s", "rest_s")}
    scores = {k: body.get(k) for k in ("val_bpb", "holdout_bpb", "val_bpb_reference")}
    return {k: body[k] for k in _SAME if k in body} | {
        "run": _run(body),
        "scores": None if scores["val_bpb"] is None else scores,
        "audit": body.get("audit") or None,
        "training": training,
        "compiled": body.get("compiled") or None,
        "conditions": conditions,
        "environment": environment,
        "data": {k: v for k, v in (body.get("data") or {}).items() if k != "epochs"},
    }
