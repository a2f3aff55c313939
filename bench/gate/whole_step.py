"""The child of `bench.gate.step`: train.py's whole step compiled for a card that is not there; prints what it found.

    python -m hotloop.bench.gate.whole_step CAPABILITY TRAIN.PY FACTS.JSON

The step is the function that train.py hands to `run.warmup`, at the h100 preset: every micro-batch forward and
backward, then the optimizer. The evaluation's forward pass is compiled beside it, though the harness runs it as it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hotloop.bench.gate import offline
from hotloop.harness.text import one_line

__all__ = ["facts_of", "main"]


class _Captured(Exception):
    """Carries the step out of train()."""


class _Run:
    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def warmup(self, step: Any, *, rows: int, **kwargs: Any) -> None:
        raise _Captured(step, rows)


def facts_of(capability: int, path: Path) -> dict[str, Any]:
    """{"tokens", "versions"} and what `Recorder.facts` tells."""
    offline.pretend(capability)
    import torch
    import triton

    from hotloop.bench.gate.launches import Recorder
    from hotloop.harness.errors import UsageError
    from hotloop.harness.settings import PRESETS, Spec
    from hotloop.harness.training.child import load_train_module

    preset = PRESETS["h100"]
    spec = Spec("h100", "cuda", 1, preset.vocab_size, preset.seq_len, 1)
    module = load_train_module(str(path))
    seen, tokens, broken = Recorder(), 0, ""
    try:
        with seen:
            try:
                module.train(_Run(spec))
            except _Captured as e:
                step, rows = e.args
            else:
                raise UsageError(f"{path}: train(run) ended without calling run.warmup, so there is no step to compile")
            tokens = rows * spec.seq_len
            _step(seen, step, rows, spec)
            _evaluation(seen, module, spec, preset.eval_batch_rows)
    except torch._dynamo.exc.Unsupported as e:  # a graph break under fullgraph
        broken = one_line(str(e), 300)
    return {
        "tokens": tokens,
        "versions": f"torch {torch.__version__.partition('+')[0]}, triton {triton.__version__}",
        **seen.facts(broken),
    }


def _step(seen: Any, step: Any, rows: int, spec: Any) -> None:
    import torch

    from hotloop import kernels
    from hotloop.harness.training.run import Batch

    def at(stage: str, function: Any) -> Any:
        def staged(*args: Any, **kwargs: Any) -> Any:
            with seen.at(stage):
                return function(*args, **kwargs)

        return staged

    places = ((torch.Tensor, "backward", "backward"), (kernels, "adamw_", "adamw"), (kernels, "muon_", "muon"))
    for owner, name, stage in places:
        setattr(owner, name, at(stage, getattr(owner, name)))
    tokens = torch.zeros(rows, spec.seq_len, dtype=torch.int64, device="cuda")
    targets = torch.zeros_like(tokens)
    with seen.at("forward"):
        step(Batch(tokens, targets, 0.25, 10))


def _evaluation(seen: Any, module: Any, spec: Any, rows: int) -> None:
    import torch

    forward: Any = torch.compile(module.build_model(spec).forward, dynamic=False, fullgraph=True)
    tokens = torch.zeros(rows, spec.seq_len, dtype=torch.int64, device="cuda")
    with torch.no_grad(), seen.at("evaluation"):
        forward(tokens)


def main(argv: list[str]) -> int:
    capability, path, out = argv
    Path(out).write_text(json.dumps(facts_of(int(capability), Path(path))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
