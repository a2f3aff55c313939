"""Every operator of the table, every implementation at hand, timed against the reference: A, B, A, B on one stream.

One benchmark is one operator, shape, dtype, pass and implementation. Each of its rounds takes the next copy of the
inputs, evicts the cache, times the compiled reference, evicts the cache again and times the implementation, so that
both see the same clocks and temperature. `extra_info` has the ratio, the share of the roofline and the errors; an
answer that is wrong gets no time.

On a CPU the same code runs at the tiny shapes, the kernel through Triton's interpreter where that is asked for: a test
of the rig, whose figures say nothing.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from hotloop import kernels
from hotloop.harness.proof import device as dev
from hotloop.harness.proof.accuracy import bitwise_repeats, check, fresh, outputs, upstream
from hotloop.harness.proof.operators import OPERATORS, Operator
from hotloop.harness.text import one_line
from hotloop.harness.tuning.proving import function_of
from hotloop.kernels import attend, dispatch, reference

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
BEGAN = time.monotonic()
ROUNDS, REPEATS = (30, 100) if ON_GPU else (3, 3)
Function = Callable[..., Any]


def names(op: Operator) -> list[str]:
    """The implementations of the table that run here."""
    found = dispatch.OPERATORS[op.switch].implementations
    if op.name == "attention":
        able = attend.backends("cuda" if ON_GPU else "cpu")[0]
        return [n for n in found if n in (*able, "reference")]
    runs = kernels.implementations().get(op.switch, "").startswith(("triton", "vendor"))
    return [n for n in found if runs or n == "reference"]


def cases() -> list[Any]:
    found = []
    for op in OPERATORS.values():
        for shape in op.shapes:
            if (shape in ("odd", "tiny")) if ON_GPU else (shape != "tiny"):
                continue  # small ones are for tests, not for timing
            for way in op.passes:
                for name in names(op):
                    found.append(pytest.param(op.name, shape, way, name, id=f"{op.name}-{shape}-{way}-{name}"))
    return found


@functools.cache
def compiled(name: str) -> Function:
    """What has to be beaten, under torch.compile; as it is on a CPU, where this is no measurement."""
    function = OPERATORS[name].exact or OPERATORS[name].bind(reference)
    if not ON_GPU:
        return function
    products = any(cost(sizes) for cost in OPERATORS[name].flops.values() for sizes in OPERATORS[name].shapes.values())
    mode = "max-autotune-no-cudagraphs" if products else None  # where there is something to tune
    return dev.compiled(function, mode=mode)


@functools.lru_cache(maxsize=1)
def inputs(name: str, shape: str) -> list[list[Any]]:
    """Copies of the arguments, enough to push each other out of the cache."""
    op = OPERATORS[name]
    torch.manual_seed(0)
    first = op.make(op.shapes[shape], DTYPE, dev.device())
    size = sum(a.numel() * a.element_size() for a in first if isinstance(a, torch.Tensor))
    return [first, *(op.make(op.shapes[shape], DTYPE, dev.device()) for _ in range(dev.rotations(size) - 1))]


@functools.lru_cache(maxsize=16)  # every implementation of a shape, for all its passes
def verdict(name: str, shape: str, implementation: str) -> tuple[bool, str]:
    """Whether an implementation is right on these very tensors, and its errors in words."""
    errors = check(OPERATORS[name], inputs(name, shape)[0], implementation_of(name, implementation))
    words = ", ".join(f"{e.what} {e.ours:.1e} (plain {e.plain:.1e}, allowed {e.allowed:.1e})" for e in errors)
    return all(e.fine for e in errors), words


def implementation_of(name: str, implementation: str) -> Function:
    op = OPERATORS[name]
    function = function_of(op, implementation)
    # Without a kernel of ours it is PyTorch that is meant to be compiled.
    ours = implementation.startswith("triton")
    return dev.compiled(function, fullgraph=True) if ours and ON_GPU and not op.module else function


def work_of(op: Operator, way: str, function: Function, args: list[Any], grad: Any) -> Callable[[], Any]:
    """What is timed of one pass; what comes before it is done here."""
    given = fresh(args, op)
    if way == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return function(*given)

        return forward
    wanted = [given[i] for i in op.gradients]
    if way == "backward":
        outs = outputs(function(*given))
        return lambda: torch.autograd.grad(outs, wanted, grad)
    return lambda: torch.autograd.grad(outputs(function(*given)), wanted, grad)


@pytest.mark.benchmark(timer=dev.now, disable_gc=True)
@pytest.mark.parametrize(("name", "shape", "way", "implementation"), cases())
def test_operator(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, name: str, shape: str, way: str, implementation: str
) -> None:
    op, options = OPERATORS[name], request.config.option
    if (options.operator and name not in options.operator) or (options.shape and shape not in options.shape):
        pytest.skip("not asked for")
    if options.deadline and time.monotonic() - BEGAN > options.deadline:
        pytest.skip("the time for all was over")
    function = implementation_of(name, implementation)
    copies = inputs(name, shape)
    try:
        right, errors = verdict(name, shape, implementation)
    except Exception as e:
        if implementation.startswith("triton"):
            raise
        # A peer that does not serve this case, or the eager reference without the memory for it.
        pytest.skip(f"{implementation}: {type(e).__name__}: {one_line(str(e), 120)}")
    benchmark.extra_info["errors"] = errors
    if not right and not implementation.startswith("triton"):
        pytest.skip(f"{implementation} is wrong, so it is not timed: {errors}")
    assert right, f"{implementation} is wrong, so it is not timed: {errors}"
    grad = upstream(op, copies[0])
    turn, paired = 0, []
    try:
        work_of(op, way, compiled(name), copies[0], grad)()
        beside = True
    except torch.OutOfMemoryError:  # ours may be what makes this size possible
        beside = False
        torch.cuda.empty_cache()

    def setup() -> tuple[tuple[Callable[[], Any]], dict[str, Any]]:
        nonlocal turn
        args = copies[turn % len(copies)]
        turn += 1
        if beside:
            base = work_of(op, way, compiled(name), args, grad)
            dev.flush()
            start = dev.now()
            base()
            paired.append((start, dev.now()))
            del base
        mine = work_of(op, way, function, args, grad)
        dev.flush()
        return (mine,), {}

    for _ in range(2):  # compilation and allocation
        (mine,), _unused = setup()
        mine()
    paired.clear()
    benchmark.pedantic(lambda work: work(), setup=setup, rounds=options.rounds or ROUNDS)
    base_s = statistics.median(end - start for start, end in paired) if beside else 0.0
    median, samples = benchmark.stats.stats.median, benchmark.stats.stats.sorted_data
    floor = max(
        op.bytes[way](op.shapes[shape]) * (DTYPE.itemsize / 2) / dev.copy_bandwidth(),
        op.flops[way](op.shapes[shape]) / dev.matrix_rate(),
    )
    p20, p80 = (samples[int(q * (len(samples) - 1))] for q in (0.2, 0.8))
    benchmark.extra_info |= {
        "operator": name, "shape": shape, "pass": way, "implementation": implementation, "dtype": str(DTYPE)[6:],
        "median_us": round(median * 1e6, 2), "p20_us": round(p20 * 1e6, 2), "p80_us": round(p80 * 1e6, 2),
        "reference_us": round(base_s * 1e6, 2), "ratio": round(base_s / median, 4),
        "roofline": round(floor / median, 4), "tflops": round(op.flops[way](op.shapes[shape]) / median / 1e12, 2),
        "right": right,
    }  # fmt: skip
    if way == op.passes[-1]:
        runs = (options.repeats if shape.startswith("baseline") else 0) or REPEATS
        different = bitwise_repeats(op, copies[0], function, runs)
        benchmark.extra_info |= {"runs": runs, "runs_with_other_bits": different}
        assert not implementation.startswith("triton") or different == 0, f"{different} of {runs} runs gave other bits"
