"""Searches launch configurations on the GPU at hand and writes `kernels/tuned/<gpu>.json`, which ships.

    hotloop bench tune [--operator NAME]

Each candidate runs on real-sized inputs, is checked against the default's answer, and is timed interleaved with it. A
candidate replaces the default only where it wins by more than the spread; so a file says what was worth changing.
Afterwards: `make gate-write`, `hotloop seal`, and commit all three.
"""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench import device as dev
from harness.errors import UsageError
from kernels import softcap_cross_entropy as ce
from kernels import tuning

__all__ = ["KERNELS", "Candidate", "main"]

ROUNDS = 20
Config = dict[str, int]


@dataclass(frozen=True)
class Candidate:
    """What is tuned at one key of one kernel.

    `reset()` restores inputs that the kernel overwrites; `run(config)` launches it once and returns what it computed.
    """

    key: str
    default: Config
    space: list[Config]
    reset: Callable[[], Any]
    run: Callable[[Config], list[torch.Tensor]]


def _softcap_cross_entropy() -> Iterator[Candidate]:
    one = torch.ones(1, device=dev.device())
    for vocab, rows in ((8192, 65536), (2048, 65536), (50304, 8192)):
        for capped in (True, False):
            source = (torch.randn(rows, vocab, device=dev.device()) * 6).bfloat16()
            logits = source.clone()
            targets = torch.randint(0, vocab, (rows,), device=dev.device())
            cap = 15.0 if capped else None

            def reset(logits: Any = logits, source: Any = source) -> None:
                logits.copy_(source)

            def run(config: Config, logits: Any = logits, targets: Any = targets, cap: Any = cap) -> list[torch.Tensor]:
                return [ce._launch(logits, targets, cap, one, config), logits]

            key, default = ce.config_key(vocab, capped), ce._default_config(vocab)
            yield Candidate(key, default, ce.search_space(vocab), reset, run)


KERNELS: dict[str, Callable[[], Iterator[Candidate]]] = {"softcap_cross_entropy": _softcap_cross_entropy}


def search(candidate: Candidate, say: Callable[[str], None]) -> Config | None:
    """The best configuration where it beats the default by more than the spread, else None."""
    best: tuple[float, Config] | None = None
    candidate.reset()
    want = [t.clone() for t in candidate.run(candidate.default)]
    for config in candidate.space:
        if config == candidate.default:
            continue
        candidate.reset()
        try:
            got = candidate.run(config)
        except Exception as e:  # too much shared memory or too many registers: not a candidate here
            say(f"  {config}: {type(e).__name__}")
            continue
        if not all(torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-5) for a, b in zip(got, want, strict=True)):
            say(f"  {config}: another answer than the default's; not a candidate")
            continue
        ratios = []
        for _ in range(ROUNDS):
            times = []
            for which in (candidate.default, config):
                candidate.reset()
                dev.flush()
                start = dev.now()
                candidate.run(which)
                times.append((start, dev.now()))
            ratios.append((times[0][1] - times[0][0]) / (times[1][1] - times[1][0]))
        median, low = statistics.median(ratios), sorted(ratios)[ROUNDS // 5]
        say(f"  {config}: {median:.3f}x (p20 {low:.3f}x)")
        if low > 1.01 and (best is None or median > best[0]):
            best = (median, config)
    return best[1] if best else None


def main(operators: list[str], say: Callable[[str], None] = print) -> int:
    """Raises DeviceError without a GPU, UsageError for a kernel that does not exist."""
    unknown = sorted(set(operators) - set(KERNELS))
    if unknown:
        raise UsageError(f"no kernel is called {unknown[0]}; those that can be tuned: {', '.join(KERNELS)}")
    dev.require_gpu()
    facts = dev.facts()
    path = tuning.FOLDER / tuning.file_name(facts["device"])
    configs: dict[str, dict[str, Config]] = json.loads(path.read_text())["configs"] if path.exists() else {}
    for name in operators or KERNELS:
        found: dict[str, Config] = {}
        for candidate in KERNELS[name]():
            say(f"{name} {candidate.key}, default {candidate.default}")
            config = search(candidate, say)
            if config:
                found[candidate.key] = config
        configs[name] = found
    versions = {k: facts[k] for k in ("torch", "triton", "cuda", "driver") if k in facts}
    body = {
        "gpu": facts["device"], "capability": facts["capability"], "multiprocessors": facts["multiprocessors"],
        "date": datetime.date.today().isoformat(), "versions": versions, "configs": configs,
    }  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    say(f"written: {path}; now: make gate-write && hotloop seal, and commit them together")
    return 0
