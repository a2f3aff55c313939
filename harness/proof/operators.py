"""The table of operators. Tests, compile gate, benchmarks and reports all read it; a new kernel is one entry and one
file.

Each entry names a function of `kernels.operators`; its reference has the same name and signature. Sizes are letters: B
batch, T time, D model, H heads, G key-value heads, K head dim, N outputs, M rows, V vocab, W window, L matrices of R
rows and C columns. Bytes count each input read once and each output written once (what an ideal kernel moves);
operations count matrix products, as 2 a multiply-add.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hotloop.harness.training.feed import zipf_tokens
from hotloop.kernels import reference
from hotloop.kernels.block.stream import squares

__all__ = ["OPERATORS", "PASSES", "Operator", "Tolerance"]

Sizes = Mapping[str, int]
Make = Callable[[Sizes, torch.dtype, torch.device], list[Any]]
Cost = Callable[[Sizes], float]

PASSES = ("forward", "backward", "both")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Tolerance:
    """Relative L2 error against fp64. The bound is `limit`, and 1.5 times plain PyTorch's error in the same dtype."""

    limit: float
    why: str


# Rounding one number to bf16 errs by up to 2^-9 = 2.0e-3 and on average by about 1.7e-3 in L2; sums are kept in fp32.
ROUNDING = {
    BF16: Tolerance(2.5e-3, "one rounding to bf16 is 1.7e-3 in L2; sums are fp32"),
    FP16: Tolerance(5e-4, "one rounding to fp16 is 2.1e-4 in L2; sums are fp32"),
    FP32: Tolerance(1e-5, "fp32 sums in another order"),
}
# A product of two tensors that were rounded on the way.
PRODUCTS = {
    BF16: Tolerance(3e-3, "a product of bf16 factors, one of them rounded on the way, rounded once more"),
    FP16: Tolerance(1e-3, "a product of fp16 factors, one of them rounded on the way, rounded once more"),
    FP32: Tolerance(1e-5, "fp32 sums in another order"),
}


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        name: of the function in `kernels.operators` and in `kernels.reference`.
        make: its arguments, random and realistic, on a device.
        shapes: `baseline` (karpathy/autoresearch's), `odd`, `long`, `tiny`.
        gradients: positions of the arguments that are differentiated; () for an operator without backward.
        mutates: positions of the arguments that the operator overwrites, which then count as outputs.
        call: how the function takes the arguments, where it does not take them one by one.
        variants: other ways of our kernel, measured beside it: name -> keyword arguments.
        rows: positions of the arguments whose first dimension is rows, so that fp64 can go in pieces.
        mean: the output is a mean over the rows.
        fold: turns (a tensor of the arguments or the results, the arguments) into one with more and smaller rows, where
            fp64 would be too large for whole ones.
        bytes, flops: pass -> cost of these sizes; bytes for 2-byte elements.
        exact: what an operator that rounds by design stands for, of the same arguments: its fp64 result is the truth,
            and its compiled form is what has to be beaten. None: the reference.
        module: the file of its Triton kernel; "" where there is none.
        chosen_as: its name in a selection, if that of another operator, whose kernels serve it too.
        torch_ops: registered operators behind it.
    """

    name: str
    make: Make
    shapes: dict[str, dict[str, int]]
    tolerance: dict[torch.dtype, Tolerance]
    gradients: tuple[int, ...]
    rows: tuple[int, ...]
    bytes: dict[str, Cost]
    flops: dict[str, Cost]
    mutates: tuple[int, ...] = ()
    call: Callable[..., Any] | None = None
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    mean: bool = False
    fold: Callable[[Tensor, list[Any]], Tensor] | None = None
    exact: Callable[..., Any] | None = None
    module: str = ""
    torch_ops: tuple[str, ...] = ()
    chosen_as: str = ""

    def bind(self, module: Any, variant: str = "") -> Callable[..., Any]:
        """The operator's function in `kernels.operators`, in `kernels.reference`, or anywhere, as a call of `make`'s
        arguments.
        """
        function = functools.partial(getattr(module, self.name), **self.variants.get(variant, {}))
        return function if self.call is None else functools.partial(self.call, function)

    @property
    def switch(self) -> str:
        """Its name in a selection (`kernels.dispatch`)."""
        return self.chosen_as or self.name

    @property
    def truth(self) -> Callable[..., Any]:
        """What is right, in fp64."""
        return self.exact or self.bind(reference)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(self.tolerance)

    @property
    def passes(self) -> tuple[str, ...]:
        return PASSES if self.gradients else ("forward",)


def _randn(*shape: int, dtype: torch.dtype, device: torch.device, std: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * std).to(dtype)


def _tokens(*shape: int, high: int, device: torch.device) -> Tensor:
    """Token ids as frequent as those of text, low ids most; drawn by torch's seed."""
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    return torch.from_numpy(zipf_tokens(rng, shape, high).astype(np.int64)).to(device)


def _targets(rows: int, vocab: int, device: torch.device) -> Tensor:
    u = torch.rand(rows, device=device)  # skewed to low ids; the time of the loss does not depend on them
    targets = (vocab * u.square() * u).long().clamp_max(vocab - 1)
    if rows > 2:
        targets[1] = -1
    return targets


def _rope(t: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(t, device=device).float(), 1e4 ** -(torch.arange(0, k, 2, device=device) / k))
    return angle[:, None].cos().to(dtype), angle[:, None].sin().to(dtype)


def _costs(forward: Cost, backward: Cost) -> dict[str, Cost]:
    return {"forward": forward, "backward": backward, "both": lambda s: forward(s) + backward(s)}


def _visible(s: Sizes) -> float:
    """Query-key pairs under the causal mask and the window, one head and row."""
    w = min(s["W"], s["T"] - 1)
    return s["T"] * (w + 1) - w * (w + 1) / 2


def _by_head(x: Tensor, args: list[Any]) -> Tensor:
    """[B, T, heads, K] -> [B G, T, heads / G, K]: groups of heads know nothing of each other."""
    b, t, _, k = x.shape
    return x.view(b, t, args[1].shape[2], -1, k).transpose(1, 2).flatten(0, 1)


NONE = _costs(lambda s: 0.0, lambda s: 0.0)
# Five polynomials that send singular values to 1 (Amsel et al. 2025, arXiv:2505.16932).
_POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# One factor rounded to e4m3, with three bits of mantissa, errs by 2.7e-2 in L2 (measured, normal and relu^2 numbers);
# a product of two by the root of two times that.
EIGHT_BITS = dict.fromkeys(
    (BF16, FP16, FP32), Tolerance(4.2e-2, "both factors are rounded to e4m3: 2.7e-2 in L2 each, 3.8e-2 together")
)
_LOSS = {
    "baseline": {"M": 262144, "D": 512, "V": 8192},
    "odd": {"M": 130, "D": 48, "V": 5003},
    "long": {"M": 4096, "D": 256, "V": 50304},
    "tiny": {"M": 1, "D": 16, "V": 7},
}

OPERATORS = {
    op.name: op
    for op in (
        Operator(
            name="loss",
            make=lambda s, dtype, device: [
                _randn(s["M"], s["D"], dtype=dtype, device=device),
                _randn(s["V"], s["D"], dtype=dtype, device=device, std=6.0 / s["D"] ** 0.5),
                _targets(s["M"], s["V"], device),
                15.0,
            ],
            shapes=_LOSS,
            tolerance=PRODUCTS,
            gradients=(0, 1),
            rows=(0, 2),
            mean=True,
            # x, W and targets in; the gradient of the logits out. Then that, x and W in; dx and dW out.
            bytes=_costs(
                lambda s: 2.0 * (s["M"] * s["D"] + s["V"] * s["D"] + s["M"] * s["V"]) + 12.0 * s["M"],
                lambda s: 2.0 * (s["M"] * s["V"] + 2 * s["M"] * s["D"] + 2 * s["V"] * s["D"]),
            ),
            flops=_costs(lambda s: 2.0 * s["M"] * s["D"] * s["V"], lambda s: 4.0 * s["M"] * s["D"] * s["V"]),
            module="hotloop.kernels.head.cross_entropy",
            torch_ops=("loss", "loss_chunked", "loss_fp8"),
            variants={"exp": {"method": "exp"}, "chunked": {"method": "chunked"}},
        ),
        Operator(
            name="adamw_",
            make=lambda s, dtype, device: [
                _randn(s["M"], dtype=dtype, device=device),
                _randn(s["M"], dtype=dtype, device=device, std=0.1),
                _randn(s["M"], dtype=dtype, device=device, std=0.1),
                _randn(s["M"], dtype=dtype, device=device, std=0.1).square(),
                torch.tensor([[0.1, 0.8, 0.95, 1e-10, 1 - 0.8**3, 1 - 0.95**3]], device=device),
            ],
            call=lambda function, p, g, m, v, hyper: function([p], [g], [m], [v], hyper),
            shapes={
                "baseline": {"M": 6 * 8192 * 512},
                "odd": {"M": 5003},
                "long": {"M": 2**28 + 3},
                "tiny": {"M": 1},
            },
            tolerance={
                BF16: Tolerance(5e-3, "the square root of a second moment that plain PyTorch rounds twice"),
                FP32: Tolerance(1e-5, "another order of operations"),
            },
            gradients=(),
            rows=(0, 1, 2, 3),
            mutates=(0, 2, 3),
            bytes=_costs(lambda s: 14.0 * s["M"], lambda s: 0.0),
            flops=NONE,
            module="hotloop.kernels.optimizer.adamw",
            torch_ops=("adamw_",),
        ),
        Operator(
            name="muon_",
            # The first gives the products' type. A large step and a small decay: what is judged is the update, and few
            # of the elements whose sign decides their decay are near 0.
            make=lambda s, dtype, device: [
                torch.empty((), dtype=dtype, device=device),
                _randn(s["L"], s["R"], s["C"], dtype=FP32, device=device, std=0.01),
                _randn(s["L"], s["R"], s["C"], dtype=FP32, device=device),
                _randn(s["L"], s["R"], s["C"], dtype=FP32, device=device, std=0.1),
                torch.rand(s["L"], *((s["R"], 1) if s["R"] >= s["C"] else (1, s["C"])), device=device) / s["R"],
                torch.tensor([1.0, 0.01, 0.9, 0.05], device=device),
            ],
            call=lambda function, like, p, g, m, v, hyper: function(
                list(p.unbind()), list(g.unbind()), m, v, hyper, _POLAR_EXPRESS, like.dtype
            ),
            shapes={
                "baseline": {"L": 32, "R": 512, "C": 512},
                "baseline tall": {"L": 8, "R": 2048, "C": 512},
                "baseline wide": {"L": 8, "R": 512, "C": 2048},
                "odd": {"L": 3, "R": 37, "C": 29},
                "odd wide": {"L": 2, "R": 70, "C": 135},
                "long": {"L": 2, "R": 8192, "C": 1024},
                "tiny": {"L": 1, "R": 1, "C": 8},
            },
            tolerance={
                BF16: Tolerance(
                    6e-2, "five polynomials in bf16 multiply what a small singular value lost by up to 970"
                ),
                FP32: Tolerance(1e-4, "five polynomials multiply what a small singular value lost by up to 970"),
            },
            gradients=(),
            rows=(1, 2, 3, 4),
            mutates=(1, 3, 4),
            # g, m and p in, m and p out, all fp32
            bytes=_costs(lambda s: 20.0 * s["L"] * s["R"] * s["C"], lambda s: 0.0),
            # the reference's: symmetric products need little more than half of two of the three
            flops=_costs(
                lambda s: 5.0 * s["L"] * min(s["R"], s["C"]) ** 2 * (4 * max(s["R"], s["C"]) + 2 * min(s["R"], s["C"])),
                lambda s: 0.0,
            ),
            module="hotloop.kernels.optimizer.muon",
            torch_ops=("muon_",),
        ),
        Operator(
            name="linear",
            make=lambda s, dtype, device: [
                _randn(s["B"], s["T"], s["D"], dtype=dtype, device=device),
                _randn(s["N"], s["D"], dtype=dtype, device=device, std=s["D"] ** -0.5),
            ],
            shapes={
                "baseline": {"B": 128, "T": 2048, "D": 512, "N": 512},
                "baseline wide": {"B": 128, "T": 2048, "D": 512, "N": 2048},
                "baseline narrow": {"B": 128, "T": 2048, "D": 2048, "N": 512},
                "baseline qkv": {"B": 128, "T": 2048, "D": 512, "N": 1536},
                "odd": {"B": 3, "T": 370, "D": 200, "N": 72},
                "long": {"B": 4, "T": 65536, "D": 512, "N": 2048},
                "tiny": {"B": 1, "T": 1, "D": 16, "N": 8},
            },
            tolerance=PRODUCTS,
            gradients=(0, 1),
            rows=(0,),
            bytes=_costs(
                lambda s: 2.0 * (s["B"] * s["T"] * (s["D"] + s["N"]) + s["N"] * s["D"]),
                lambda s: 2.0 * (s["B"] * s["T"] * (2 * s["D"] + 2 * s["N"]) + 2 * s["N"] * s["D"]),
            ),
            flops=_costs(
                lambda s: 2.0 * s["B"] * s["T"] * s["D"] * s["N"], lambda s: 4.0 * s["B"] * s["T"] * s["D"] * s["N"]
            ),
            module="hotloop.kernels.gemm.weight_gradient",
            torch_ops=("linear", "weight_gradient"),
        ),
        Operator(
            name="linear_fp8",
            make=lambda s, dtype, device: [
                _randn(s["B"], s["T"], s["D"], dtype=dtype, device=device),
                _randn(s["N"], s["D"], dtype=dtype, device=device, std=s["D"] ** -0.5),
            ],
            shapes={
                "baseline": {"B": 128, "T": 2048, "D": 512, "N": 2048},
                "baseline narrow": {"B": 128, "T": 2048, "D": 2048, "N": 512},
                "baseline head": {"B": 128, "T": 2048, "D": 512, "N": 8192},
                "odd": {"B": 3, "T": 37, "D": 208, "N": 80},
                "long": {"B": 4, "T": 65536, "D": 512, "N": 2048},
                "tiny": {"B": 1, "T": 1, "D": 16, "N": 16},
            },
            tolerance=EIGHT_BITS,
            gradients=(0, 1),
            rows=(0,),
            bytes=_costs(
                lambda s: 2.0 * (s["B"] * s["T"] * (s["D"] + s["N"]) + s["N"] * s["D"]),
                lambda s: 2.0 * (s["B"] * s["T"] * (2 * s["D"] + 2 * s["N"]) + 2 * s["N"] * s["D"]),
            ),
            flops=_costs(
                lambda s: 2.0 * s["B"] * s["T"] * s["D"] * s["N"], lambda s: 4.0 * s["B"] * s["T"] * s["D"] * s["N"]
            ),
            exact=reference.linear,
            torch_ops=("scaled_product",),
        ),
        Operator(
            name="mlp_alone",
            make=lambda s, dtype, device: [
                _randn(s["B"], s["T"], s["D"], dtype=dtype, device=device),
                _randn(s["N"], s["D"], dtype=dtype, device=device, std=s["D"] ** -0.5),
                _randn(s["D"], s["N"], dtype=dtype, device=device, std=s["N"] ** -0.5),
            ],
            shapes={
                "baseline": {"B": 128, "T": 2048, "D": 512, "N": 2048},
                "odd": {"B": 3, "T": 37, "D": 200, "N": 72},
                "long": {"B": 4, "T": 65536, "D": 512, "N": 2048},
                "tiny": {"B": 1, "T": 1, "D": 16, "N": 8},
            },
            tolerance=PRODUCTS | {BF16: Tolerance(4.5e-3, "plain PyTorch rounds what it squares, then the square")},
            gradients=(0, 1, 2),
            rows=(0,),
            bytes=_costs(
                lambda s: 2.0 * (s["B"] * s["T"] * (2 * s["D"] + 2 * s["N"]) + 2 * s["N"] * s["D"]),
                lambda s: 2.0 * (s["B"] * s["T"] * (4 * s["D"] + 5 * s["N"]) + 4 * s["N"] * s["D"]),
            ),
            flops=_costs(
                lambda s: 4.0 * s["B"] * s["T"] * s["D"] * s["N"], lambda s: 8.0 * s["B"] * s["T"] * s["D"] * s["N"]
            ),
            module="hotloop.kernels.block.mlp",
            torch_ops=("mlp_alone", "mlp_alone_dpre"),
            chosen_as="mlp",
        ),
        Operator(
            name="residual",
            make=lambda s, dtype, device: [
                _randn(s["B"], s["T"], s["D"], dtype=dtype, device=device),
                _randn(s["B"], s["T"], s["N"], dtype=dtype, device=device),
                _randn(s["D"], s["N"], dtype=dtype, device=device, std=s["N"] ** -0.5),
                _randn(s["B"], s["T"], s["D"], dtype=dtype, device=device),
                torch.tensor(0.9, device=device),
                torch.tensor(0.2, device=device),
            ],
            call=lambda function, *args: function(*args)[0],  # the squares have no gradient
            shapes={
                "baseline": {"B": 128, "T": 2048, "D": 512, "N": 512},
                "odd": {"B": 3, "T": 37, "D": 200, "N": 72},
                "long": {"B": 4, "T": 65536, "D": 512, "N": 512},
                "tiny": {"B": 1, "T": 1, "D": 16, "N": 8},
            },
            tolerance=PRODUCTS | {BF16: Tolerance(4.5e-3, "plain PyTorch rounds after each of five operations")},
            gradients=(0, 1, 2, 3, 4, 5),
            rows=(0, 1, 3),
            # a, x and x0 in, the stream out. Then g, a, x and x0 in, da, dx and dx0 out.
            bytes=_costs(
                lambda s: 2.0 * (s["B"] * s["T"] * (s["N"] + 3 * s["D"]) + s["N"] * s["D"]),
                lambda s: 2.0 * (s["B"] * s["T"] * (2 * s["N"] + 5 * s["D"]) + 2 * s["N"] * s["D"]),
            ),
            flops=_costs(
                lambda s: 2.0 * s["B"] * s["T"] * s["D"] * s["N"], lambda s: 4.0 * s["B"] * s["T"] * s["D"] * s["N"]
            ),
            module="hotloop.kernels.block.residual",
            torch_ops=("residual",),
        ),
        Operator(
            name="qkv",
            make=lambda s, dtype, device: [
                _randn(s["B"], s["T"], s["D"], dtype=dtype, device=device, std=2.0),
                *(
                    _randn(heads * s["K"], s["D"], dtype=dtype, device=device, std=s["D"] ** -0.5)
                    for heads in (s["H"], s["G"], s["G"])
                ),
                *_rope(s["T"], s["K"], dtype, device),
                _randn(s["B"], s["T"], s["G"], s["K"], dtype=dtype, device=device),
                _randn(s["G"], s["C"], dtype=dtype, device=device, std=s["C"] ** -0.5),
            ],
            call=lambda function, x, *args: function(x, squares(x), *args),
            shapes={
                "baseline": {"B": 128, "T": 2048, "D": 512, "H": 4, "G": 4, "K": 128, "C": 32},
                "odd": {"B": 3, "T": 37, "D": 200, "H": 3, "G": 1, "K": 64, "C": 12},
                "long": {"B": 4, "T": 65536, "D": 512, "H": 4, "G": 4, "K": 128, "C": 32},
                "tiny": {"B": 1, "T": 1, "D": 16, "H": 1, "G": 1, "K": 16, "C": 8},
            },
            tolerance=PRODUCTS | {BF16: Tolerance(6e-3, "a gate rounded twice, of few columns")},
            gradients=(0, 1, 2, 3, 6, 7),
            rows=(0, 6),
            # x and ve in, q, k, v out. Then the four gradients, q, k, v, ve and x in, those of the product, ve and x
            # out; the first of these twice more, and x.
            bytes=_costs(
                lambda s: 2.0 * s["B"] * s["T"] * (s["D"] + s["K"] * (s["H"] + 3 * s["G"])),
                lambda s: 2.0 * s["B"] * s["T"] * (4 * s["D"] + s["K"] * (5 * s["H"] + 12 * s["G"])),
            ),
            flops=_costs(
                lambda s: 2.0 * s["B"] * s["T"] * (s["D"] * s["K"] * (s["H"] + 2 * s["G"]) + s["G"] * s["C"]),
                lambda s: 4.0 * s["B"] * s["T"] * (s["D"] * s["K"] * (s["H"] + 2 * s["G"]) + s["G"] * s["C"]),
            ),
            module="hotloop.kernels.block.qkv",
            torch_ops=("qkv", "qkv_backward", "stream_gradient"),
        ),
        Operator(
            name="mlp",
            make=lambda s, dtype, device: [
                _randn(s["B"], s["T"], s["D"], dtype=dtype, device=device, std=2.0),
                _randn(s["N"], s["D"], dtype=dtype, device=device, std=s["D"] ** -0.5),
                _randn(s["D"], s["N"], dtype=dtype, device=device, std=s["N"] ** -0.5),
                _randn(s["B"], s["T"], s["D"], dtype=dtype, device=device),
                torch.tensor(0.9, device=device),
                torch.tensor(0.2, device=device),
            ],
            call=lambda function, x, *args: function(x, squares(x), *args)[0],
            shapes={
                "baseline": {"B": 128, "T": 2048, "D": 512, "N": 2048},
                "odd": {"B": 3, "T": 37, "D": 200, "N": 72},
                "long": {"B": 4, "T": 65536, "D": 512, "N": 2048},
                "tiny": {"B": 1, "T": 1, "D": 16, "N": 8},
            },
            tolerance=PRODUCTS | {BF16: Tolerance(4.5e-3, "plain PyTorch rounds what it squares, then the square")},
            gradients=(0, 1, 2, 3, 4, 5),
            rows=(0, 3),
            bytes=_costs(
                lambda s: 2.0 * (s["B"] * s["T"] * (4 * s["D"] + 2 * s["N"]) + 2 * s["N"] * s["D"]),
                lambda s: 2.0 * (s["B"] * s["T"] * (7 * s["D"] + 5 * s["N"]) + 4 * s["N"] * s["D"]),
            ),
            flops=_costs(
                lambda s: 4.0 * s["B"] * s["T"] * s["D"] * s["N"], lambda s: 8.0 * s["B"] * s["T"] * s["D"] * s["N"]
            ),
            module="hotloop.kernels.block.mlp",
            torch_ops=("mlp", "mlp_dpre"),
        ),
        Operator(
            name="embedding",
            make=lambda s, dtype, device: [
                _tokens(s["B"], s["T"], high=s["V"], device=device),
                _randn(s["V"], s["D"], dtype=dtype, device=device),
            ],
            shapes={
                "baseline": {"B": 128, "T": 2048, "D": 512, "V": 8192},
                "odd": {"B": 3, "T": 37, "D": 200, "V": 5003},
                "long": {"B": 4, "T": 65536, "D": 512, "V": 50304},
                "tiny": {"B": 1, "T": 1, "D": 8, "V": 7},
            },
            tolerance=ROUNDING,
            gradients=(1,),
            rows=(0,),
            bytes=_costs(
                lambda s: s["B"] * s["T"] * (8.0 + 4.0 * s["D"]),
                lambda s: s["B"] * s["T"] * (4.0 + 2.0 * s["D"]) + 2.0 * s["V"] * s["D"],
            ),
            flops=NONE,
            module="hotloop.kernels.head.embedding",
            torch_ops=("embedding", "embedding_backward", "sorted_embedding", "token_rows"),
        ),
        Operator(
            name="attention",
            make=lambda s, dtype, device: [
                _randn(s["B"], s["T"], s["H"], s["K"], dtype=dtype, device=device),
                _randn(s["B"], s["T"], s["G"], s["K"], dtype=dtype, device=device),
                _randn(s["B"], s["T"], s["G"], s["K"], dtype=dtype, device=device),
                s["W"],
            ],
            shapes={
                "baseline": {"B": 128, "T": 2048, "H": 4, "G": 4, "K": 128, "W": 1024},
                "baseline full": {"B": 128, "T": 2048, "H": 4, "G": 4, "K": 128, "W": 2048},
                "baseline 64": {"B": 128, "T": 2048, "H": 8, "G": 8, "K": 64, "W": 1024},
                "odd": {"B": 3, "T": 37, "H": 4, "G": 2, "K": 64, "W": 5},
                "8k": {"B": 16, "T": 8192, "H": 4, "G": 4, "K": 128, "W": 8192},
                "long": {"B": 8, "T": 16384, "H": 4, "G": 4, "K": 128, "W": 16384},
                "tiny": {"B": 1, "T": 1, "H": 1, "G": 1, "K": 16, "W": 1},
            },
            tolerance={
                BF16: Tolerance(6e-3, "probabilities and their gradients are rounded to bf16 between two products"),
                FP16: Tolerance(2e-3, "probabilities and their gradients are rounded to fp16 between two products"),
                FP32: Tolerance(1e-5, "fp32 sums in another order"),
            },
            gradients=(0, 1, 2),
            rows=(0, 1, 2),
            # q, k, v in, o out. Then those and do in, dq, dk, dv out.
            bytes=_costs(
                lambda s: 4.0 * s["B"] * s["T"] * s["K"] * (s["H"] + s["G"]),
                lambda s: 8.0 * s["B"] * s["T"] * s["K"] * (s["H"] + s["G"]),
            ),
            # two products of the visible pairs forward, five backward
            flops=_costs(
                lambda s: 4.0 * s["B"] * s["H"] * s["K"] * _visible(s),
                lambda s: 10.0 * s["B"] * s["H"] * s["K"] * _visible(s),
            ),
            fold=_by_head,
            module="hotloop.kernels.attend.flash",
            torch_ops=("attention", "attention_backward"),
        ),
    )
}
