"""Whole steps of train.py under one setting after another, each in a process of its own: what is worth being a default.

hotloop bench switches         each kernel alone, none, all, attention backends, 8 bits, CUDA graphs
hotloop bench determinism      results that repeat to the bit, as trainings are asked for, against those that need not
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from harness.errors import HotloopError
from harness.machine import threads_default
from harness.process import child_environment
from harness.walls import project_root
from kernels import attend
from kernels.dispatch import TOGETHER, TRITON_OPERATORS

__all__ = ["COST_ALLOWED", "Setting", "determinism", "switches", "tokens_per_s"]

COST_ALLOWED = 0.02  # of the speed, that repeatable results may cost before they are worth giving up
_CODE = "import sys; from bench.cli import main; sys.exit(main())"


@dataclass(frozen=True)
class Setting:
    """A way to run the step.

    Attributes:
        environment: variables that choose an implementation.
        constants: of train.py, as `NAME=VALUE`.
        repeatable: as the trainer asks for it.
    """

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    constants: tuple[str, ...] = ()
    repeatable: bool = True


def tokens_per_s(setting: Setting, train: Path, preset: str) -> float:
    """Of a steady step, in a process of its own that is set up as a trainer is.

    Raises:
        HotloopError: it failed; with its last words.
    """
    # What a shell of the user's asks for must not decide whether the step repeats.
    asked = child_environment(threads_default()).keys() - child_environment(threads_default(), False).keys()
    env = {k: v for k, v in os.environ.items() if k not in asked}
    env |= child_environment(threads_default(), setting.repeatable) | setting.environment
    command = [sys.executable, "-c", _CODE, "step", "--time", "--train", str(train), "--preset", preset]
    command += [] if setting.repeatable else ["--fast-nondeterministic"]
    command += [word for constant in setting.constants for word in ("--set", constant)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=project_root())
    if done.returncode:
        raise HotloopError((done.stderr.strip().splitlines() or ["?"])[-1][:200])
    found = json.loads(done.stdout.splitlines()[-1])
    return float(found["tokens"] / found["step_s"])


def all_settings(device: str) -> list[Setting]:
    """No kernel of ours, each alone, all, each attention backend, products in 8 bits, the step as CUDA graphs."""
    none = {"HOTLOOP_KERNELS": "reference"}
    alone = [name for name in TRITON_OPERATORS if name not in TOGETHER]
    names = ("reference", *alone, ",".join(sorted(TOGETHER)), "triton")
    found = [Setting(name, {"HOTLOOP_KERNELS": name}) for name in names]
    found += [Setting(f"reference {name}", none | {"HOTLOOP_ATTENTION": name}) for name in attend.backends(device)[0]]
    found += [Setting(f"8 bits: {words}", {}, (f'FP8="{words}"',)) for words in ("mlp", "lm_head", "mlp lm_head e5m2")]
    return [*found, Setting("reference CUDA graphs", none, ("CUDA_GRAPHS=True",))]


def switches(train: Path, preset: str, say: Callable[[str], None] = print) -> int:
    """Print tokens a second under each setting; the one without kernels first and last, so that drift shows.

    Returns:
        0 when all of them ran.
    """
    rates: list[float] = []
    settings = all_settings("cuda" if torch.cuda.is_available() else "cpu")
    settings.append(settings[0])
    for setting in settings:
        try:
            rates.append(tokens_per_s(setting, train, preset))
        except HotloopError as e:
            say(f"{setting.name}: failed: {e}")
            continue
        say(f"{setting.name:<32} {rates[-1]:>14,.0f} tokens/s  {rates[-1] / rates[0]:.3f}x")
    return 0 if len(rates) == len(settings) else 1


def determinism(train: Path, preset: str, pairs: int, say: Callable[[str], None] = print) -> int:
    """Print tokens a second with and without repeatable results, in pairs of changing order, and what they cost.

    Returns:
        0 when all of them ran, whatever the cost.
    """
    on_gpu = torch.cuda.is_available()
    kinds = [Setting("repeatable"), Setting("free", repeatable=False)]
    costs = []
    for pair in range(pairs):
        rates = {s.name: tokens_per_s(s, train, preset) for s in (kinds if pair % 2 else kinds[::-1])}
        costs.append(1 - rates["repeatable"] / rates["free"])
        told = ", ".join(f"{s.name} {rates[s.name]:,.0f}" for s in kinds)
        say(f"pair {pair}: tokens/s {told}; repeatable costs {costs[-1]:+.2%}")
    cost = statistics.median(costs)
    say(
        f"Repeatable results cost {cost:+.2%} of the speed (median of {pairs}, {min(costs):+.2%} to {max(costs):+.2%})."
    )
    if not on_gpu:
        say("CPU figures: a trial of the way, they say nothing of a GPU.")
    elif cost > COST_ALLOWED:
        say(f"Above {COST_ALLOWED:.0%}: where speed matters more than proof, --fast-nondeterministic is worth it.")
    else:
        say(f"Within {COST_ALLOWED:.0%}: --fast-nondeterministic is not worth what it gives up.")
    return 0
