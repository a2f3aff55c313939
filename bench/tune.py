"""Searches launch configurations on the GPU at hand and writes `kernels/tuned/<gpu>.json`, which ships.

    hotloop bench tune [--operator NAME]

Each candidate runs on real-sized inputs, is checked against the default's answer, and is timed interleaved with it. A
candidate replaces the default only where it wins by more than the spread; so a file says what was worth changing.
Afterwards: `make gate-write`, `hotloop seal`, and commit all three.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kernels
from bench import device as dev
from bench.accuracy import fresh, outputs, upstream
from bench.operators import OPERATORS
from harness.errors import UsageError
from kernels import (
    flash,
    linear_qkv,
    mlp,
    muon,
    product,
    qkv,
    residual_linear,
    residual_norm,
    residual_stream,
    token_embedding,
    tuning,
    weight_gradient,
)
from kernels import linear_cross_entropy as lce
from kernels import softcap_cross_entropy as ce

__all__ = ["KERNELS", "Candidate", "main"]

ROUNDS = 20
Config = dict[str, int]


@dataclass(frozen=True)
class Candidate:
    """What is tuned at one key of one kernel: launches through the operator's own path, on inputs of its own."""

    kernel: str
    key: str
    default: Config
    space: list[Config]
    work: Callable[[], list[torch.Tensor]]
    reset: Callable[[], Any] = lambda: None

    def run(self, config: Config) -> list[torch.Tensor]:
        with tuning.trial(self.kernel, config):
            return self.work()


def _softcap_cross_entropy() -> Iterator[Candidate]:
    one = torch.ones(1, device=dev.device())
    for vocab, rows in ((8192, 65536), (2048, 65536), (50304, 8192)):
        for capped in (True, False):
            source = (torch.randn(rows, vocab, device=dev.device()) * 6).bfloat16()
            logits, targets = source.clone(), torch.randint(0, vocab, (rows,), device=dev.device())

            def work(logits: Any = logits, targets: Any = targets, capped: bool = capped) -> list[torch.Tensor]:
                return [ce.launch(logits, targets, 15.0 if capped else None, one), logits]

            key = ce.config_key(vocab, capped)
            reset = functools.partial(logits.copy_, source)
            yield Candidate("softcap_cross_entropy", key, ce.default_config(vocab), ce.search_space(vocab), work, reset)


def _operator(name: str, kernel: str, module: Any, variant: str, make: Callable[..., Any]) -> Iterator[Candidate]:
    """A kernel tuned on its operator's forward and backward pass at the baseline."""
    op = OPERATORS[name]
    args = op.make(op.shapes["baseline"], torch.bfloat16, dev.device())
    grads, given = upstream(op, args), fresh(args, op)
    wanted = [given[i] for i in op.gradients]
    key, *size = make(op.shapes["baseline"])
    function = op.bind(kernels, variant)

    def work() -> list[torch.Tensor]:
        outs = outputs(function(*given))
        return [*(o.detach() for o in outs), *torch.autograd.grad(outs, wanted, grads)]

    yield Candidate(kernel, key, module.default_config(*size), module.search_space(*size), work)


def _attention(kernel: str) -> Iterator[Candidate]:
    """At the baseline's shape, for both head dimensions, windows of half the row and all of it, and grouped heads."""
    b, t, width = 128, 2048, 512
    for head_dim in (128, 64):
        for window in (t // 2, t):
            for groups in (1, 4) if kernel == "attention_dkdv" else (1,):  # heads that share a key
                heads = width // head_dim
                sizes = ((b, t, heads, head_dim), (b, t, heads // groups, head_dim))
                q, k, v, do = (torch.randn(sizes[i], device=dev.device()).bfloat16() for i in (0, 1, 1, 0))
                o, lse = flash.forward(q, k, v, window)

                def work(
                    q: Any = q, k: Any = k, v: Any = v, do: Any = do, o: Any = o, lse: Any = lse, window: int = window
                ) -> list[torch.Tensor]:
                    if kernel == "attention_forward":
                        return [flash.forward(q, k, v, window)[0]]
                    return list(flash.backward(do, q, k, v, o, lse, window))

                key = flash.config_key(head_dim, window < t, groups > 1)
                default = flash.default_config(kernel, head_dim, key, flash.kind_of(torch.bfloat16, t))
                yield Candidate(kernel, key, default, flash.search_space(kernel), work)


def _weight_gradient() -> Iterator[Candidate]:
    """At every shape of the baseline: the projections, the MLP, QKV, the language model's head."""
    m = 128 * 2048
    for n, d in ((512, 512), (2048, 512), (512, 2048), (1536, 512), (8192, 512)):
        dy, x = (torch.randn(m, width, device=dev.device()).bfloat16() for width in (n, d))

        def work(dy: Any = dy, x: Any = x) -> list[torch.Tensor]:
            return [torch.ops.hotloop.weight_gradient(dy, x)]

        key = weight_gradient.config_key(n, d)
        yield Candidate("weight_gradient", key, weight_gradient.default_config(), weight_gradient.search_space(), work)


def _muon() -> Iterator[Candidate]:
    """Both symmetric products of an iteration: many square matrices, and few tall ones."""
    for matrices, rows, cols in ((32, 512, 512), (8, 2048, 512)):
        y = torch.randn(matrices, rows, cols, device=dev.device())
        partial = y.square().view(matrices, muon.CHUNKS, -1).sum(-1)
        y = y.bfloat16()

        def work(y: Any = y, partial: Any = partial, tall: bool = rows > cols) -> list[torch.Tensor]:
            gram = muon.product(y, partial, tall)
            return [gram, muon.product(gram, None, b=-2.8, c=0.5)]

        key = muon.config_key(matrices, min(rows, cols), False)
        yield Candidate("muon_product", key, muon.default_config(key), muon.search_space(), work)


KERNELS: dict[str, Callable[[], Iterator[Candidate]]] = {
    "softcap_cross_entropy": _softcap_cross_entropy,
    "exp_product": lambda: _operator("softcap_linear_cross_entropy", "exp_product", lce, "exp", lambda s: ("16 bit",)),
    "residual_norm": lambda: _operator(
        "residual_rms_norm", "residual_norm", residual_norm, "", lambda s: (f"D={s['D']}", s["D"])
    ),
    "qkv_rope_norm": lambda: _operator("qkv_rope_norm", "qkv_rope_norm", qkv, "", lambda s: (f"K={s['K']}", s["K"])),
    "linear_qkv": lambda: _operator(
        "linear_qkv_rope_norm",
        "linear_qkv",
        linear_qkv,
        "",
        lambda s: (linear_qkv.config_key(s["K"], s["D"]), s["K"], s["D"]),
    ),
    "mlp_product": lambda: _operator(
        "mlp_relu2", "mlp_product", mlp, "", lambda s: (product.config_key(s["D"]), s["D"])
    ),
    "linear_residual": lambda: itertools.chain.from_iterable(  # attention's projection is short, the MLP's long
        _operator(name, "linear_residual", residual_linear, "", lambda s: (product.config_key(s["N"]), s["N"]))
        for name in ("linear_residual", "norm_mlp_relu2")
    ),
    "stream_gradient": lambda: _operator(
        "norm_mlp_relu2", "stream_gradient", residual_stream, "", lambda s: (product.config_key(s["N"]), s["N"])
    ),
    "embedding": lambda: _operator("embedding", "embedding", token_embedding, "", lambda s: (f"D={s['D']}", s["D"])),
    "weight_gradient": _weight_gradient,
    "muon_product": _muon,
    "attention_forward": lambda: _attention("attention_forward"),
    "attention_dq": lambda: _attention("attention_dq"),
    "attention_dkdv": lambda: _attention("attention_dkdv"),
}


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
        if not all(_agree(a.float(), b.float()) for a, b in zip(got, want, strict=True)):
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


def _agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two orders of summation and rounding can explain the difference: over all, and in every element."""
    off, most = (a - b).abs(), b.abs().amax() if b.numel() else 0.0
    return bool(off.norm() <= 1e-2 * b.norm()) and bool((off <= 5e-2 * most).all())


@contextlib.contextmanager
def tuned(facts: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(the file of a GPU, its content to be changed); written whole at the end, unless that raised."""
    path = tuning.FOLDER / tuning.file_name(facts["device"])
    body: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"configs": {}}
    yield path, body
    body |= {
        "gpu": facts["device"], "capability": facts["capability"], "multiprocessors": facts["multiprocessors"],
        "date": datetime.date.today().isoformat(),
        "versions": {k: facts[k] for k in ("torch", "triton", "cuda", "driver") if k in facts},
    }  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")


def main(operators: list[str], say: Callable[[str], None] = print) -> int:
    """Raises DeviceError without a GPU, UsageError for a kernel that does not exist."""
    unknown = sorted(set(operators) - set(KERNELS))
    if unknown:
        raise UsageError(f"no kernel is called {unknown[0]}; those that can be tuned: {', '.join(KERNELS)}")
    dev.require_gpu()
    for name in operators or KERNELS:
        found: dict[str, Config] = {}
        for candidate in KERNELS[name]():
            say(f"{name} {candidate.key}, default {candidate.default}")
            config = search(candidate, say)
            if config:
                found[candidate.key] = config
        with tuned(dev.facts()) as (path, body):  # after each, so that a run that is cut short keeps what it found
            body["configs"][name] = found
    say(f"written: {path}; now: make gate-write && hotloop seal, and commit them together")
    return 0
