"""Searches launch configurations on the GPU at hand and writes `kernels/tuned/<gpu>.json`, which ships.

    hotloop bench tune [--operator NAME] [--minutes N]

Every candidate is compiled first, many at a time in processes of their own (`kernels.compiling`); what spills or does
not fit the card is never launched. The others run on real-sized inputs, are checked against the default's answer, and
are timed beside it in stages (`harness.tuning.search`). One replaces the default only where it wins by more than the
spread; so a file says what was worth changing.

Each kernel is tuned in a process of its own: a candidate that faults or hangs ends that one, is out, and the search
goes on without it. All that was found is noted, so that the same command goes on where it was ended. Afterwards:
`make gate-write`, `hotloop seal`, and commit all three.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hotloop.harness.errors import UsageError
from hotloop.harness.files import write_whole
from hotloop.harness.paths import project_root
from hotloop.harness.proof import device as dev
from hotloop.harness.proof.accuracy import fresh, outputs, upstream
from hotloop.harness.proof.operators import OPERATORS
from hotloop.harness.sandbox.process import tail
from hotloop.harness.text import one_line
from hotloop.harness.tuning.notes import UNFINISHED, Notes
from hotloop.harness.tuning.runner import die_with_parent
from hotloop.harness.tuning.search import blame, entry, halving, out_of
from hotloop.harness.tuning.selection import TimeIsUp, Unfit
from hotloop.kernels import operators, tuning
from hotloop.kernels.attend import flash
from hotloop.kernels.block import mlp, qkv, qkv_backward, residual, stream
from hotloop.kernels.compiling import Launch, compile_all, recorded
from hotloop.kernels.gemm import product, weight_gradient
from hotloop.kernels.head import cross_entropy, embedding, in_place
from hotloop.kernels.optimizer import muon

__all__ = ["KERNELS", "Candidate", "Card", "child", "main", "search", "tuned"]

HANG_S = 120.0  # after which a candidate that is being tried counts as hanging
CHUNK = 8  # candidates to a core that are compiled between two looks at the clock
TABLE = "hotloop.harness.tuning.configurations:KERNELS"
_CHILD = "from hotloop.harness.tuning.configurations import child; child()"
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
        with _unfit():
            got = candidate.run(space[name])
            if not all(_agree(a.float(), b.float()) for a, b in zip(got, want, strict=True)):
                raise Unfit("another answer than the default's")

    def round_of(name: str) -> float:
        with _unfit():
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


@contextlib.contextmanager
def _unfit() -> Iterator[None]:
    """What a launch raises is a reason against its configuration; what ends the device's context ends this process."""
    try:
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Unfit:
        raise
    except Exception as e:
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
            except Exception:  # nothing can be launched any more; the one that was tried is noted
                print(f"hotloop: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
                os._exit(1)
        raise Unfit(f"{type(e).__name__}: {one_line(str(e), 200)}") from None


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
    write_whole(path, json.dumps(body, indent=1, sort_keys=True) + "\n")


def stamp(facts: dict[str, Any]) -> dict[str, Any]:
    """What a search depends on: the machine, and the kernels' sources but not what was tuned."""
    sources = b"".join(p.read_bytes() for p in sorted((project_root() / "kernels").rglob("*.py")))
    return facts | {"kernels": hashlib.sha256(sources).hexdigest()}


# ---- each kernel in a process of its own ------------------------------------------------------------------------


def main(
    operators: list[str], notes: Path, minutes: float = 60.0, say: Callable[[str], None] = print, table: str = TABLE,
    hang_s: float = HANG_S,
) -> int:  # fmt: skip
    """Search, kernel by kernel, for so many minutes at most.

    Args:
        notes: the file that what was found is kept in.
        table: `module:name` of the kernels' table.
        hang_s: after which a candidate counts as hanging.

    Returns:
        0; UNFINISHED where the time was over; 1 where the search of a kernel failed.

    Raises:
        UsageError: a kernel that does not exist.
    """
    known = _table(table)
    if unknown := sorted(set(operators) - set(known)):
        raise UsageError(f"no kernel is called {unknown[0]}; those that can be tuned: {', '.join(known)}")
    deadline = time.time() + minutes * 60
    failed = []
    for name in operators or list(known):
        status = _supervised(name, notes, deadline, table, hang_s, say)
        if status == UNFINISHED:
            say("the time is over; run it again to go on")
            return UNFINISHED
        if status:
            failed.append(name)
    if failed:
        say(f"failed: {', '.join(failed)}")
    if table == TABLE:
        say("what was found is in kernels/tuned; now: make gate-write && hotloop seal, and commit them together")
    return 1 if failed else 0


def _supervised(name: str, path: Path, deadline: float, table: str, hang_s: float, say: Callable[[str], None]) -> int:
    """Tune one kernel, in one process after another while candidates end them."""
    command = [sys.executable, "-c", _CHILD, name, str(path), str(deadline), table]
    # Every kernel on, each by its name: attention too, whose candidates call ours.
    env = os.environ | {"HOTLOOP_KERNELS": "triton", "HOTLOOP_ATTENTION": "triton"}
    while True:
        with tempfile.NamedTemporaryFile(suffix=".log") as log:
            process = subprocess.Popen(
                command, env=env, cwd=project_root(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            hung = False
            try:
                while (code := _waited(process, min(2.0, hang_s / 4))) is None:
                    hung = _trying_for(path) > hang_s
                    if hung:
                        break
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its compilers too
                process.wait()
            said = tail(Path(log.name), 200)
        for line in said:
            say(f"  {line}")
        if code in (0, UNFINISHED) and not hung:
            return int(code)
        notes = Notes(path, _read_stamp(path))
        reason = "it hangs" if hung else f"it ended the process ({(said or ['no words'])[-1][:160]})"
        if not (out := blame(notes, reason)):
            return 1
        say(f"  {out}: {reason}")


def _waited(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _read_stamp(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())["stamp"]
    except (OSError, ValueError, KeyError):
        return {}
    return found


def _trying_for(path: Path) -> float:
    """For how many seconds a candidate is being tried; 0 for none."""
    try:
        trying = "trying" in json.loads(path.read_text())["body"]
        return time.time() - path.stat().st_mtime if trying else 0.0
    except (OSError, ValueError, KeyError):
        return 0.0


def _table(where: str) -> dict[str, Callable[[], Iterator[Candidate]]]:
    module, _, name = where.partition(":")
    found: dict[str, Callable[[], Iterator[Candidate]]] = getattr(importlib.import_module(module), name)
    return found


def _tell(words: str) -> None:
    print(words, flush=True)


def child() -> None:
    """The process that tunes one kernel."""
    die_with_parent()
    name, path, deadline, table = sys.argv[1:]
    facts = dev.identity()
    notes = Notes(Path(path), stamp(facts))
    if notes.why:
        _tell(f"begun anew: {notes.why}")
    if notes.body.pop("trying", None):  # of a run that was ended from outside: no fault of the candidate's
        notes.save()
    found: dict[str, Config] = {}
    card = Card.here()
    try:
        for candidate in _table(table)[name]():
            config = search(candidate, card, notes, lambda: time.time() > float(deadline), _tell)
            if config:
                found[candidate.key] = config
            # After each, so that a run that is cut short keeps what it found.
            if not facts["cpu_figures"]:
                with tuned(facts) as (_, body):
                    body["configs"][name] = body["configs"].get(name, {}) | found
    except TimeIsUp:
        sys.exit(UNFINISHED)
