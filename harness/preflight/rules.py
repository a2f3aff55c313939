"""What an exception in the pre-flight says about the run that would follow: a crash there too, or nothing certain.

A late crash costs minutes and a false refusal costs an idea, so a crash is said only of what stands in the list below;
whatever is not recognised is `inconclusive`, and the experiment gets its turn. The kinds are tried from the top; the
first that fits an exception names it, and TABLE says what that kind means where it happened:

    import       importing train.py, for a preset whose device is not here
    early        up to the end of the first real batch, and the evaluation, at real sizes without arithmetic
    late         from the second real batch: progress jumps to the end there, so what train.py prepares in between (an
                 average that starts at half of the budget) may be missing, and only what no state excuses counts
    doubtful     the same, after a number was made up where train.py asked for a tensor's value
    laptop       the laptop preset's values of a train.py that is to run elsewhere: they may be neglected, or gone
    own ...      a preset of this very device: the code, the sizes and the device are those of the run itself

Why these kinds. A name that is bound nowhere in the file (nor imported, nor a builtin) fails wherever it is reached. A
call that does not fit a signature, and sizes that do not fit each other, depend on neither values nor the device.
Exceptions that train.py itself raises are deterministic as long as no value, clock or device was asked for: so they
count early, and only without a word about devices in the message or on the line. Data types do not count, because
autocast on a GPU has other lists than on a CPU; nor does anything from the machinery that stands in for tensors.
"""

from __future__ import annotations

import ast
import builtins
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["COLUMNS", "TABLE", "ContractError", "Scene", "UnsubmittedError", "judge", "kind_of"]

COLUMNS = ("import", "early", "late", "doubtful", "laptop", "own import", "own early", "own late")


class ContractError(Exception):
    """train.py did not do what its contract says; the run would end as `crash` or `invalid`."""


class UnsubmittedError(ContractError):
    """train() returned without a submission, which it may owe to a run of three batches."""


@dataclass(frozen=True)
class Scene:
    """Where an exception came from.

    Attributes:
        error: the exception.
        source: train.py's text.
    """

    error: BaseException
    source: str

    @functools.cached_property
    def text(self) -> str:
        return " ".join(str(self.error).split())

    @functools.cached_property
    def frames(self) -> list[traceback.FrameSummary]:
        """Of the exception and of those that caused it: the machinery likes to wrap errors."""
        found: list[traceback.FrameSummary] = []
        error: BaseException | None = self.error
        while error is not None:
            found += traceback.extract_tb(error.__traceback__)
            error = error.__cause__
        return found

    @functools.cached_property
    def own(self) -> bool:
        """Whether train.py's code raised it: no frame lies below but those that look something up."""
        frames = [f for f in traceback.extract_tb(self.error.__traceback__) if "importlib" not in f.filename]
        while frames and frames[-1].name in ("__getattr__", "__getitem__") and not _is_train(frames[-1]):
            frames.pop()
        return bool(frames) and _is_train(frames[-1])

    @functools.cached_property
    def line(self) -> str:
        """The statement of train.py that was at work, as text."""
        own = [f for f in traceback.extract_tb(self.error.__traceback__) if _is_train(f)]
        if not own or own[-1].lineno is None:
            return ""
        last = own[-1].end_lineno or own[-1].lineno
        return "\n".join(self.source.splitlines()[own[-1].lineno - 1 : last])


def _is_train(frame: traceback.FrameSummary) -> bool:
    return os.path.basename(frame.filename) == "train.py"


_DEVICE = re.compile(
    r"cuda|\bgpu|nvidia|\bdevices?\b|triton|capabilit|driver|cudnn|cublas|nvrtc|flash|FakeTensor|_orig_mod|Eager|pinned|"
    r"pin_memory|compil|backend|dispatch|\bcpu\b",
    re.IGNORECASE,
)
_CALL = re.compile(
    r"missing \d+ required (positional|keyword-only) argument|got an unexpected keyword argument|"
    r"takes (from )?\d+ (to \d+ )?positional arguments? but|got multiple values for (keyword )?argument|"
    r"takes no (keyword )?arguments"
)
_SHAPE = re.compile(
    r"shapes cannot be multiplied|must have same reduction dim|The size of tensor a|Attempting to broadcast|"
    r"is invalid for input of size|Sizes of tensors must match|split_with_sizes|split_sizes|expanded size|"
    r"size mismatch|mat1 and mat2|batch1 and batch2|must be broadcastable|doesn't match the broadcast shape|"
    r"Expected size for first two dimensions|Given normalized_shape|Expected input batch_size|Tensors must have same "
    r"number of dimensions|expected stride to be a single|not divisible by|Dimension out of range|number of dims don't "
    r"match|Shape mismatch|shape mismatch|Expected weight to be of same shape|unflatten: Provided sizes|does not match "
    r"the shape|number of dimensions in the tensor input|too many indices for tensor|expected \d+D or \d+D|"
    r"Given groups=|tensor to be at least|Expected target size|one of the following scalar types: Long|must be "
    r"multiplied|incompatible (tensor )?(size|shape)|stack expects each tensor to be equal size|Expected query, key|"
    r"does not require grad and does not have a grad_fn|a leaf Variable that requires grad"
)


def _machinery(s: Scene) -> bool:
    """The stand-ins for tensors gave up, a kernel wanted a GPU, or an operation has no shape rule."""
    of_torch = type(s.error).__module__.startswith(("torch._subclasses", "torch.fx", "torch._dynamo", "triton"))
    unsure = isinstance(s.error, NotImplementedError) or "NYI" in s.text or "data-dependent" in s.text.lower()
    return of_torch or unsure or any("/triton/" in f.filename for f in s.frames)


def _contract(s: Scene) -> bool:
    """Ours, or the refusal of `run.warmup` and `run.batches` (not what a step raised below them)."""
    frames = traceback.extract_tb(s.error.__traceback__)
    refused = bool(frames) and frames[-1].filename.endswith("harness/training/run.py")
    return isinstance(s.error, ContractError) or (refused and isinstance(s.error, ValueError | TypeError))


def _memory(s: Scene) -> bool:
    return isinstance(s.error, MemoryError) or "OutOfMemory" in type(s.error).__name__ or "allocate memory" in s.text


def _missing_module(s: Scene) -> bool:
    """`import x` in train.py of what is installed nowhere; a part of a package may be for GPUs alone."""
    e = s.error
    return isinstance(e, ModuleNotFoundError) and s.own and "." not in (e.name or ".")


def _missing_name(s: Scene) -> bool:
    """`from x import y` in train.py, of a package that has the same names on every device."""
    if not isinstance(s.error, ImportError) or not s.own or not s.error.name:
        return False
    root = s.error.name.partition(".")[0]
    known = root in {"hotloop", "numpy", "torch"} or root in sys.stdlib_module_names
    return known and "cannot import name" in s.text


def _unknown_name(s: Scene) -> bool:
    e = s.error
    if not isinstance(e, NameError) or isinstance(e, UnboundLocalError) or not s.own or not e.name:
        return False
    return e.name not in _bound(s.source)


def _own_exception(s: Scene) -> bool:
    """What Python finds wrong in train.py's code, and what that code raises; not what an operation of torch raises.

    Those are RuntimeErrors too, and most speak of data types or devices.
    """
    kinds = (
        AttributeError, TypeError, KeyError, IndexError, ZeroDivisionError, ValueError, AssertionError,
        NameError, OverflowError,
    )  # fmt: skip
    raised = isinstance(s.error, RuntimeError) and re.search(r"\braise\b", s.line) is not None
    return (isinstance(s.error, kinds) or raised) and s.own and not _DEVICE.search(s.line)


KINDS: dict[str, Callable[[Scene], bool]] = {
    "unsubmitted": lambda s: isinstance(s.error, UnsubmittedError) and bool(re.search(r"\bsubmit\b", s.source)),
    "contract": _contract,
    "not finite": lambda s: type(s.error).__name__ == "NonFiniteLossError",
    "syntax": lambda s: isinstance(s.error, SyntaxError) and os.path.basename(s.error.filename or "") == "train.py",
    "memory": _memory,
    "machinery": _machinery,
    "system": lambda s: isinstance(s.error, OSError) or not isinstance(s.error, Exception | SystemExit),
    "exit": lambda s: isinstance(s.error, SystemExit),
    "unknown name": _unknown_name,
    "missing module": _missing_module,
    "missing name": _missing_name,
    "call": lambda s: isinstance(s.error, TypeError) and bool(_CALL.search(s.text)) and s.own,
    "device": lambda s: bool(_DEVICE.search(s.text)),
    "shape": lambda s: bool(_SHAPE.search(s.text)) and any(_is_train(f) for f in s.frames),
    "own exception": _own_exception,
    "other": lambda s: True,
}

# Kind -> the columns where it is a crash; everywhere else it is inconclusive.
_ALL_OWN = ("own import", "own early", "own late")
_RUN = ("early", "late", *_ALL_OWN)
TABLE: dict[str, tuple[str, ...]] = {
    "unsubmitted": ("early", "own early"),
    "contract": ("import", *_RUN),
    "not finite": ("own early",),
    "syntax": COLUMNS,
    "memory": (),
    "machinery": ("own import", "own early"),
    "system": (),
    "exit": ("own import", "own early"),
    "unknown name": ("import", "doubtful", "laptop", *_RUN),
    "missing module": COLUMNS,
    "missing name": COLUMNS,
    "device": ("own import", "own early"),
    "call": ("import", "doubtful", *_RUN),
    "shape": _RUN,
    "own exception": ("early", "own import", "own early"),
    "other": ("own import", "own early"),
}


def kind_of(error: BaseException, source: str) -> str:
    """The first of KINDS that fits."""
    scene = Scene(error, source)
    return next(name for name, fits in KINDS.items() if fits(scene))


def judge(error: BaseException, source: str, column: str) -> str:
    """`crash` or `inconclusive`, by TABLE; with the laptop preset's values only outside every branch."""
    kind = kind_of(error, source)
    if column not in TABLE[kind]:
        return "inconclusive"
    if column == "laptop" and not _certain(error, source):
        return "inconclusive"
    return "crash"


@functools.lru_cache(maxsize=4)
def _bound(source: str) -> frozenset[str]:
    """Every name that the file binds anywhere; all names where it could bind others (`import *`, exec, globals)."""
    names = set(dir(builtins)) | {"__file__", "__name__", "__doc__"}
    tree = ast.parse(source)
    reads = {  # the `globals` of globals().items(), which binds nothing
        id(node.value.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in ("items", "keys", "values", "get")
        and isinstance(node.value, ast.Call)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            if not isinstance(node.ctx, ast.Load):
                names.add(node.id)
            elif node.id in ("exec", "eval", "globals", "locals", "vars", "setattr") and id(node) not in reads:
                return _Everything()
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.alias):
            if node.name == "*":
                return _Everything()
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            names.add(node.name)
        elif isinstance(node, ast.MatchMapping) and node.rest:
            names.add(node.rest)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            names.update(node.names)
    return frozenset(names)


class _Everything(frozenset[str]):
    def __contains__(self, _: object) -> bool:
        return True


_BRANCHES = (
    ast.If, ast.IfExp, ast.BoolOp, ast.Try, ast.While, ast.Match, ast.comprehension, ast.Lambda, ast.Assert,
)  # fmt: skip
_LEAVES = (ast.Return, ast.Raise, ast.Continue, ast.Break)


def _certain(error: BaseException, source: str) -> bool:
    """Whether any run comes to the line of `error`: no frame of train.py lies in a branch, or behind a way out.

    A name that the file mentions within a branch (LAPTOP, or a class that is chosen by device) is left alone.
    """
    if isinstance(error, SyntaxError | ImportError):
        return True
    lines = {f.lineno for f in traceback.extract_tb(error.__traceback__) if _is_train(f) and f.name != "<module>"}
    tree = ast.parse(source)
    chosen: set[str] = set()
    branched: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, _BRANCHES):
            chosen |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            for n in ast.walk(node):
                if hasattr(n, "lineno"):
                    branched.add(n.lineno)
        elif isinstance(node, ast.FunctionDef):
            inner = {id(n) for b in ast.walk(node) if isinstance(b, _BRANCHES) for n in ast.walk(b)}
            ways_out = [n.lineno for n in ast.walk(node) if isinstance(n, _LEAVES) and id(n) in inner]
            if ways_out:
                branched |= set(range(min(ways_out), (node.end_lineno or 0) + 1))
    within = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and any(node.lineno <= (n or 0) <= (node.end_lineno or 0) for n in lines)
    }
    return not (lines & branched) and not (within & chosen) and getattr(error, "name", "") not in chosen
