"""Searches launch configurations on the GPU at hand: a part of `hotloop tune`.

Every candidate is compiled first, many at a time in processes of their own (`kernels.compiling`); what spills or does
not fit the card is never launched. The others run on real-sized inputs, are checked against the default's answer, and
are timed beside it in stages (`harness.tuning.search`). One replaces the default only where it wins by more than the
spread; so a file says what was worth changing.

Each kernel is tuned in a process of its own: a candidate that faults or hangs ends that one, is out, and the search
goes on without it. All that was found is noted, so that the same command goes on where it was ended.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hotloop.harness.proof import device as dev
from hotloop.harness.proof.accuracy import fresh, outputs, upstream
from hotloop.harness.proof.operators import OPERATORS
from hotloop.harness.text import one_line
from hotloop.harness.tuning.children import die_with_parent, faults_are_reasons, in_children
from hotloop.harness.tuning.notes import UNFINISHED, Notes
from hotloop.harness.tuning.search import entry, halving, out_of
from hotloop.harness.tuning.selection import TimeIsUp, Unfit
from hotloop.kernels import operators, tuning
from hotloop.kernels.attend import flash
from hotloop.kernels.block import mlp, qkv, qkv_backward, residual, stream
from hotloop.kernels.compiling import Launch, compile_all, recorded
from hotloop.kernels.gemm import product, weight_gradient
from hotloop.kernels.head import cross_entropy, embedding, in_place
from hotloop.kernels.optimizer import muon

__all__ = ["KERNELS", "Candidate", "Card", "child", "main", "search"]

HANG_S = 120.0  # after which a candidate that is being tried counts as hanging
CHUNK = 8  # candidates to a core that are compiled between two looks at the clock
TABLE = f"{__name__}:KERNELS"
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

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.key}"

    def run(self, config: Config) -> list[torch.Tensor]:
        self.reset()
        with tuning.trial(self.kernel, config):
            return self.work()

    def launches(self, config: Config) -> list[Launch]:
        """What it would launch of Triton's; nothing is launched."""
        with recorded() as found:
            self.run(config)
        return found

    def round(self, config: Config) -> float:
        """The default's time over this one's, one after the other."""
        times = []
        for which in (self.default, config):
            self.reset()
            dev.flush()
            start = dev.now()
            with tuning.trial(self.kernel, which):
                self.work()
            times.append((start, dev.now()))
        return float((times[0][1] - times[0][0]) / (times[1][1] - times[1][0]))


def _loss() -> Iterator[Candidate]:
    one = torch.ones(1, device=dev.device())
    for vocab, rows in ((8192, 65536), (2048, 65536), (50304, 8192)):
        for capped in (True, False):
            source = (torch.randn(rows, vocab, device=dev.device()) * 6).bfloat16()
            logits, targets = source.clone(), torch.randint(0, vocab, (rows,), device=dev.device())

            def work(logits: Any = logits, targets: Any = targets, capped: bool = capped) -> list[torch.Tensor]:
                return [in_place.launch(logits, targets, 15.0 if capped else None, one), logits]

            key = in_place.config_key(vocab, capped)
            reset = functools.partial(logits.copy_, source)
            default, space = in_place.default_config(vocab), in_place.search_space(vocab)
            yield Candidate("loss", key, default, space, work, reset)


def _operator(name: str, kernel: str, module: Any, variant: str, make: Callable[..., Any]) -> Iterator[Candidate]:
    """A kernel tuned on its operator's forward and backward pass at the baseline."""
    op = OPERATORS[name]
    args = op.make(op.shapes["baseline"], torch.bfloat16, dev.device())
    grads, given = upstream(op, args), fresh(args, op)
    wanted = [given[i] for i in op.gradients]
    key, *size = make(op.shapes["baseline"])
    function = op.bind(operators, variant)

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
    "loss": _loss,
    "exp_product": lambda: _operator("loss", "exp_product", cross_entropy, "exp", lambda s: ("16 bit",)),
    "qkv": lambda: _operator("qkv", "qkv", qkv, "", lambda s: (qkv.config_key(s["K"], s["D"]), s["K"], s["D"])),
    "qkv_backward": lambda: _operator("qkv", "qkv_backward", qkv_backward, "", lambda s: (f"K={s['K']}", s["K"])),
    "mlp": lambda: _operator("mlp", "mlp", mlp, "", lambda s: (product.config_key(s["D"]), s["D"])),
    "residual": lambda: itertools.chain.from_iterable(  # attention's projection is short, the MLP's long
        _operator(name, "residual", residual, "", lambda s: (product.config_key(s["N"]), s["N"]))
        for name in ("residual", "mlp")
    ),
    "stream_gradient": lambda: _operator(
        "mlp", "stream_gradient", stream, "", lambda s: (product.config_key(s["N"]), s["N"])
    ),
    "embedding": lambda: _operator("embedding", "embedding", embedding, "", lambda s: (f"D={s['D']}", s["D"])),
    "weight_gradient": _weight_gradient,
    "muon_product": _muon,
    "attention_forward": lambda: _attention("attention_forward"),
    "attention_dq": lambda: _attention("attention_dq"),
    "attention_dkdv": lambda: _attention("attention_dkdv"),
}


@dataclass(frozen=True)
class Card:
    """What candidates are compiled for.

    Attributes:
        capability: 10 * major + minor.
        shared_limit: bytes of shared memory that a block can get.
    """

    capability: int
    shared_limit: int

    @classmethod
    def here(cls) -> Card:
        if not torch.cuda.is_available():  # a trial of the search, as for an H100
            return cls(90, 232_448)
        from triton.compiler.compiler import max_shared_mem  # torch does not tell what a block can opt into

        major, minor = torch.cuda.get_device_capability()
        return cls(10 * major + minor, max_shared_mem(torch.cuda.current_device()))


def words(config: Config) -> str:
    return " ".join(f"{k}={v}" for k, v in config.items())


def search(
    candidate: Candidate, card: Card, notes: Notes, over: Callable[[], bool], say: Callable[[str], None]
) -> Config | None:
    """The best configuration where it beats the default by more than the spread, else None.

    Raises:
        TimeIsUp: what was found is noted.
    """
    space = {words(c): c for c in candidate.space if c != candidate.default}
    if "best" not in entry(notes, candidate.name):
        _prune(candidate, space, card, notes, over)
    want = [t.clone() for t in candidate.run(candidate.default)]

    def prove(name: str) -> None:
        with faults_are_reasons():
            got = candidate.run(space[name])
            if not all(_agree(a.float(), b.float()) for a, b in zip(got, want, strict=True)):
                raise Unfit("another answer than the default's")

    def round_of(name: str) -> float:
        with faults_are_reasons():
            return candidate.round(space[name])

    best = halving(candidate.name, list(space), prove, round_of, notes, over)
    here = entry(notes, candidate.name)
    timed, out = len(here["ratios"]), len(here["out"])
    say(f"{candidate.name}: {best or 'the default stays'} ({timed} timed, {out} were none)")
    return space[best] if best else None


def _prune(candidate: Candidate, space: dict[str, Config], card: Card, notes: Notes, over: Callable[[], bool]) -> None:
    """Compile what is not yet, and put out what need not be launched."""
    here = entry(notes, candidate.name)
    compiled: list[str] = here.setdefault("compiled", [])
    default = candidate.launches(candidate.default)
    left = [name for name in space if name not in compiled and name not in here["out"]]
    size = CHUNK * len(os.sched_getaffinity(0))
    for at in range(0, len(left), size):
        if over():
            raise TimeIsUp
        launches: dict[str, list[Launch]] = {}
        for name in left[at : at + size]:
            try:
                launches[name] = candidate.launches(space[name])
            except Exception as e:  # a launcher that refuses its configuration
                out_of(notes, candidate.name, name, f"{type(e).__name__}: {one_line(str(e), 200)}")
        facts = compile_all([*default, *(x for found in launches.values() for x in found)], card.capability)
        for name, found in launches.items():
            why = next((r for x in found if (r := facts[x].refusal(card.shared_limit))), "")
            if found and found == default:  # where descriptors do not serve, for one
                why = "the same launches as the default's"
            if why:
                out_of(notes, candidate.name, name, why)
            compiled.append(name)
        notes.save()


def _agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two orders of summation and rounding can explain the difference: over all, and in every element."""
    off, most = (a - b).abs(), b.abs().amax() if b.numel() else 0.0
    return bool(off.norm() <= 1e-2 * b.norm()) and bool((off <= 5e-2 * most).all())


# ---- each kernel in a process of its own ------------------------------------------------------------------------


def main(
    names: Sequence[str], notes: Path, stamp: dict[str, Any], deadline: float, say: Callable[[str], None],
    table: str = TABLE, hang_s: float = HANG_S,
) -> dict[str, dict[str, Config]]:  # fmt: skip
    """Search, kernel by kernel, until the deadline (time.time()); kernel -> key -> what beats the default.

    Args:
        names: of the kernels; those that the table does not have are passed over.
        notes: the file that what was found is kept in, for these facts.
        table: `module:name` of the kernels' table.
        hang_s: after which a candidate counts as hanging.
    """
    # Every kernel on, each by its name: attention too, whose candidates call ours.
    env = {"HOTLOOP_KERNELS": "triton", "HOTLOOP_ATTENTION": "triton", "HOTLOOP_PROFILE": ""}
    arguments = [str(notes), json.dumps(stamp), str(deadline), table]
    for name in names:
        if time.time() > deadline:
            break
        in_children(f"{__name__}:child", [name, *arguments], notes, deadline, hang_s, say, env)
    found: dict[str, dict[str, Config]] = Notes(notes, stamp).body.get("configs", {})
    return found


def _table(where: str) -> dict[str, Callable[[], Iterator[Candidate]]]:
    module, _, name = where.partition(":")
    found: dict[str, Callable[[], Iterator[Candidate]]] = getattr(importlib.import_module(module), name)
    return found


def child() -> None:
    """The process that tunes one kernel."""
    die_with_parent()
    name, path, stamp, deadline, table = sys.argv[1:]
    notes = Notes(Path(path), json.loads(stamp))
    if notes.body.pop("trying", None):  # of a run that was ended from outside: no fault of the candidate's
        notes.save()
    card = Card.here()
    try:
        for candidate in _table(table)[name]():
            config = search(candidate, card, notes, lambda: time.time() > float(deadline), print)
            if config:  # after each, so that a run that is cut short keeps what it found
                notes.body.setdefault("configs", {}).setdefault(name, {})[candidate.key] = config
                notes.save()
    except TimeIsUp:
        sys.exit(UNFINISHED)
