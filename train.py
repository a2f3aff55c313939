"""One pretraining experiment: model, optimizer, schedules and loop. The only file that an experiment changes.

The harness calls `build_model(spec)` and `train(run)`; everything else here is free: architecture, optimizer, batch
size, precision, schedules. It counts the budget in tokens, feeds the data and scores the submitted weights, all from
outside this process. Rules that follow: `forward(tokens)` must be causal and must treat every row on its own, and the
weights that are submitted must load into what `build_model` returns. Run it with `python train.py`.

The baseline is that of karpathy/autoresearch: a GPT with rotary positions, QK-norm, value embeddings, learned residual
scalars, relu^2 and sliding windows, trained by Muon and AdamW. Shapes: B batch, T time, D model, H heads, K head dim.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hotloop import kernels
from hotloop.harness import Batch, Run, Spec, main

# ---------------------------------------------------------------------------------------------------------------------
# Hyperparameters: edit these
# ---------------------------------------------------------------------------------------------------------------------

# Model
DEPTH = 8  # transformer blocks
ASPECT_RATIO = 64  # model width = DEPTH * ASPECT_RATIO, rounded up to whole heads
HEAD_DIM = 128  # width of one attention head
WINDOW_PATTERN = "SSSL"  # attention windows, repeated over the blocks: L full, S half the context; the last is full
SOFTCAP = 15.0  # logits are squashed into (-SOFTCAP, SOFTCAP)
ROPE_BASE = 10000.0  # wavelength base of the rotary positions
GATE_CHANNELS = 32  # first channels of the block's input that gate its value embedding
FP8 = ""  # products in 8 bits: "", "mlp", "lm_head" or "mlp lm_head"; "e5m2" beside them: their inputs' gradients too

# Batch
TOTAL_BATCH_SIZE = 2**19  # tokens an optimizer step
DEVICE_BATCH_SIZE = 128  # rows a pass at 80 GB, fewer on smaller GPUs; lower it when memory runs out

# Speed
CUDA_GRAPHS = False  # on a GPU: each pass is recorded once and then launched whole

# Optimizer
EMBEDDING_LR = 0.6  # token and value embeddings (AdamW)
UNEMBEDDING_LR = 0.004  # lm_head (AdamW)
MATRIX_LR = 0.04  # matrices of the blocks (Muon)
SCALAR_LR = 0.5  # residual scalars (AdamW)
WEIGHT_DECAY = 0.2  # cautious decay of the matrices, falling to 0 over the run
ADAM_BETAS = (0.8, 0.95)  # AdamW's first and second moment
MUON_MOMENTUM = 0.95  # Muon's Nesterov momentum, reached after MUON_RAMP steps
MUON_RAMP = 300  # steps from momentum 0.85 to MUON_MOMENTUM
MUON_BETA2 = 0.95  # second moment of Muon's variance reduction

# Schedule, in shares of the budget
WARMUP_RATIO = 0.0  # learning rates rise from 0
WARMDOWN_RATIO = 0.5  # learning rates fall to FINAL_LR_FRAC
FINAL_LR_FRAC = 0.0  # learning rate at the end, as a share of the full one

# The laptop preset is the same experiment at a size for two CPU cores: rows of 256 tokens, 20 seconds. Where a name
# stands in this table, its value is used there instead of the one above.
LAPTOP = dict(
    DEPTH=4,
    ASPECT_RATIO=32,
    HEAD_DIM=32,
    WINDOW_PATTERN="L",
    TOTAL_BATCH_SIZE=2**12,
    DEVICE_BATCH_SIZE=16,
    MUON_RAMP=30,
)


def hyperparameters(spec: Spec) -> SimpleNamespace:
    """The constants above, with LAPTOP's on top where that preset runs."""
    values = {name: value for name, value in globals().items() if name.isupper() and name != "LAPTOP"}
    return SimpleNamespace(**(values | (LAPTOP if spec.preset == "laptop" else {})))


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


def fp8_of(hp: SimpleNamespace, product: str) -> str:
    """How the kernels multiply `product`: "" for not in 8 bits, else the type of what flows back (see linear_fp8)."""
    words = hp.FP8.split()
    if unknown := sorted(set(words) - {"mlp", "lm_head", "e5m2"}):
        raise ValueError(f"FP8 knows mlp, lm_head and e5m2, not {unknown[0]!r}")
    return "" if product not in words else "e5m2" if "e5m2" in words else "bf16"


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=2.0**-23).to(x.dtype)  # autocast would leave fp32


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the two halves of each head: [B, T, H, K] -> [B, T, H, K]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, hp: SimpleNamespace, dim: int, gated: bool) -> None:
        super().__init__()
        self.heads = dim // hp.HEAD_DIM
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.gate = nn.Linear(hp.GATE_CHANNELS, self.heads, bias=False) if gated else None

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor, window: int) -> Tensor:
        qkv = F.linear(x, torch.cat((self.q.weight, self.k.weight, self.v.weight)))
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in qkv.chunk(3, dim=-1))  # [B, T, H, K]
        if self.gate is not None:  # 0 at the start
            v = v + 2 * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))[..., None] * ve.view_as(v)
        y = kernels.attention(norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin)), v, window)
        return self.proj(y.flatten(2))


class MLP(nn.Module):
    def __init__(self, hp: SimpleNamespace, dim: int) -> None:
        super().__init__()
        self.fp8 = fp8_of(hp, "mlp")
        self.fc = nn.Linear(dim, 4 * dim, bias=False)
        self.proj = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8:
            y = F.relu(kernels.linear_fp8(x, self.fc.weight, self.fp8)).square()
            return kernels.linear_fp8(y, self.proj.weight, self.fp8)
        return self.proj(F.relu(self.fc(x)).square())


class Block(nn.Module):
    def __init__(self, hp: SimpleNamespace, dim: int, gated: bool) -> None:
        super().__init__()
        self.attention = Attention(hp, dim, gated)
        self.mlp = MLP(hp, dim)

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor, window: int) -> Tensor:
        x = x + self.attention(norm(x), ve, cos, sin, window)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, hp: SimpleNamespace, vocab_size: int, seq_len: int) -> None:
        super().__init__()
        self.dim = dim = -(-hp.DEPTH * hp.ASPECT_RATIO // hp.HEAD_DIM) * hp.HEAD_DIM  # rounded up to whole heads
        self.seq_len, self.softcap, self.depth = seq_len, hp.SOFTCAP, hp.DEPTH
        pattern = [hp.WINDOW_PATTERN[i % len(hp.WINDOW_PATTERN)] for i in range(hp.DEPTH)]
        self.windows = [seq_len if c == "L" else seq_len // 2 for c in (*pattern[:-1], "L")]
        self.wte = nn.Embedding(vocab_size, dim)
        gated = [i % 2 == (hp.DEPTH - 1) % 2 for i in range(hp.DEPTH)]  # every other block, the last one included
        self.blocks = nn.ModuleList(Block(hp, dim, g) for g in gated)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        self.head_fp8 = fp8_of(hp, "lm_head")
        self.resid_scalars = nn.Parameter(torch.ones(hp.DEPTH))
        self.x0_scalars = nn.Parameter(torch.full((hp.DEPTH,), 0.1))
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(vocab_size, dim) for i, g in enumerate(gated) if g})
        frequency = hp.ROPE_BASE ** -(torch.arange(0, hp.HEAD_DIM, 2, dtype=torch.float32) / hp.HEAD_DIM)
        angle = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequency)
        self.register_buffer("cos", angle[:, None].cos(), persistent=False)  # [T, 1, K/2]
        self.register_buffer("sin", angle[:, None].sin(), persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        bound = 3**0.5 * self.dim**-0.5  # a uniform distribution with the deviation of 1/sqrt(D)
        nn.init.normal_(self.wte.weight, std=1.0)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.blocks:
            for linear in (block.attention.q, block.attention.k, block.attention.v, block.mlp.fc):
                nn.init.uniform_(linear.weight, -bound, bound)
            for linear in (block.attention.proj, block.mlp.proj, block.attention.gate):
                if linear is not None:  # every block starts as the identity
                    nn.init.zeros_(linear.weight)
        for embed in self.value_embeds.values():
            nn.init.uniform_(embed.weight, -bound, bound)

    def hidden(self, tokens: Tensor) -> Tensor:
        """[B, T] -> normalised hidden state [B, T, D]."""
        cos, sin = self.cos[: tokens.size(1)], self.sin[: tokens.size(1)]
        x = x0 = norm(self.wte(tokens))
        for i, block in enumerate(self.blocks):
            x = self.resid_scalars[i] * x + self.x0_scalars[i] * x0
            ve = self.value_embeds[str(i)](tokens) if str(i) in self.value_embeds else None
            x = block(x, ve, cos, sin, self.windows[i])
        return norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V], fp32. The harness scores with this, lm_head never in 8 bits; training uses `loss`."""
        with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
            logits = self.lm_head(self.hidden(tokens)).float()
        return self.softcap * torch.tanh(logits / self.softcap)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats."""
        with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
            return kernels.loss(self.hidden(tokens), self.lm_head.weight, targets, self.softcap, fp8=self.head_fp8)

    def flops_per_token(self) -> int:
        """Forward and backward, by the formula of karpathy/autoresearch: 6 a matrix weight, 12 D a visible key."""
        tables = [self.wte, *self.value_embeds.values()]
        outside = sum(e.weight.numel() for e in tables) + 2 * self.depth
        matrices = sum(p.numel() for p in self.parameters()) - outside
        return 6 * matrices + sum(12 * self.dim * min(w, self.seq_len) for w in self.windows)


def build_model(spec: Spec) -> GPT:
    """The model that is trained and scored. Its weights depend on torch's seed alone."""
    model = GPT(hyperparameters(spec), spec.vocab_size, spec.seq_len)
    model.init_weights()
    if spec.device == "cuda":
        for table in (model.wte, *model.value_embeds.values()):
            table.bfloat16()
        model.cos, model.sin = model.cos.bfloat16(), model.sin.bfloat16()
    return model.to(spec.device)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer: Muon for the blocks' matrices, AdamW for everything else
# ---------------------------------------------------------------------------------------------------------------------

# Polar Express (Amsel et al. 2025, arXiv:2505.16932): five odd polynomials that send singular values to 1.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class MuonAdamW(torch.optim.Optimizer):
    """Groups carry `kind` ("muon" or "adamw") and `base_lr`; `set_schedule` turns it into `lr`."""

    def __init__(self, groups: list[dict], compiled: bool) -> None:
        super().__init__(groups, {})
        self.compiled = compiled

    def set_schedule(self, lr_scale: float, momentum: float, decay: float) -> None:
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
            if group["kind"] == "muon":
                group["momentum"], group["decay"] = momentum, decay

    @torch.no_grad()
    def step(self) -> None:
        for kind, update in (("adamw", self._adamw), ("muon", self._muon)):
            if groups := [g for g in self.param_groups if g["kind"] == kind]:
                update(groups)

    @staticmethod
    def _to_device(rates: list[tuple[float, ...]], device: torch.device) -> Tensor:
        """Without waiting for the device."""
        return torch.tensor(rates, pin_memory=device.type == "cuda").to(device, non_blocking=True)

    def _adamw(self, groups: list[dict]) -> None:
        """All groups in one launch."""
        params, hyper = [], []
        for group in groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"], state["m"], state["v"] = 0, torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                correction = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
                params.append(p)
                hyper.append((group["lr"], beta1, beta2, group["eps"], *correction))
        ms, vs = ([self.state[p][name] for p in params] for name in "mv")
        kernels.adamw_(params, [p.grad for p in params], ms, vs, self._to_device(hyper, params[0].device))

    def _muon(self, groups: list[dict]) -> None:
        """Each group is a bank of equal matrices: orthogonalised momentum, variance reduction, cautious decay."""
        hyper = []
        for group in groups:
            rows, cols = group["params"][0].shape
            lr = group["lr"] * max(1.0, rows / cols) ** 0.5
            hyper.append((lr, group["decay"], group["momentum"], 1 - group["beta2"]))
        rates = self._to_device(hyper, groups[0]["params"][0].device)
        for group, row in zip(groups, rates.unbind(), strict=True):
            params = group["params"]
            state = self.state[params[0]]
            if not state:
                rows, cols = params[0].shape
                side = (rows, 1) if rows >= cols else (1, cols)
                state["buffer"] = params[0].new_zeros(len(params), rows, cols)
                state["second"] = params[0].new_zeros(len(params), *side)
            kernels.muon_(
                params, [p.grad for p in params], state["buffer"], state["second"], row, POLAR_EXPRESS,
                dtype=torch.bfloat16 if params[0].is_cuda else None, compiled=self.compiled,
            )  # fmt: skip


def build_optimizer(model: GPT, hp: SimpleNamespace, compiled: bool) -> MuonAdamW:
    adamw_lr_scale = (model.dim / 768) ** -0.5  # the rates were tuned at width 768
    adamw = dict(kind="adamw", betas=hp.ADAM_BETAS, eps=1e-10)
    embeddings = hp.EMBEDDING_LR * adamw_lr_scale
    groups = [
        dict(adamw, params=[model.lm_head.weight], base_lr=hp.UNEMBEDDING_LR * adamw_lr_scale),
        dict(adamw, params=[model.wte.weight], base_lr=embeddings),
        dict(adamw, params=list(model.value_embeds.parameters()), base_lr=embeddings),
        dict(adamw, params=[model.resid_scalars], base_lr=hp.SCALAR_LR * 0.01),
        dict(adamw, params=[model.x0_scalars], base_lr=hp.SCALAR_LR, betas=(0.96, 0.95)),
    ]
    muon = dict(kind="muon", base_lr=hp.MATRIX_LR, beta2=hp.MUON_BETA2)
    matrices = list(model.blocks.parameters())
    for shape in sorted({p.shape for p in matrices}):  # equal shapes are updated as one bank
        groups.append(dict(muon, params=[p for p in matrices if p.shape == shape]))
    return MuonAdamW(groups, compiled)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def lr_multiplier(hp: SimpleNamespace, progress: float) -> float:
    if progress < hp.WARMUP_RATIO:
        return progress / hp.WARMUP_RATIO
    if progress < 1.0 - hp.WARMDOWN_RATIO:
        return 1.0
    left = (1.0 - progress) / hp.WARMDOWN_RATIO
    return left + (1.0 - left) * hp.FINAL_LR_FRAC


class GraphedPass:
    """A pass (forward and backward of a micro-batch) as a CUDA graph: hundreds of launches become one.

    All that it touches keeps its address: tokens, targets, loss, and gradients, in which the passes of a step add up.
    Each has the shape of the first. A budget in operations cannot count what is replayed.
    """

    def __init__(self, one_pass: Callable[[Tensor, Tensor], Tensor], params: list[Tensor]) -> None:
        self.one_pass, self.params = one_pass, params
        self.graph: torch.cuda.CUDAGraph | None = None

    def begin(self) -> None:
        """Before the first pass of a step: empty gradients, in their places, from which zero_grad has taken them."""
        if self.graph is not None:
            torch._foreach_zero_(self.grads)
            for p, grad in zip(self.params, self.grads, strict=True):
                p.grad = grad

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        if self.graph is None:
            self.record(tokens, targets)
        if tokens.shape != self.tokens.shape:
            raise ValueError(f"CUDA_GRAPHS: a pass of {tuple(tokens.shape)} after one of {tuple(self.tokens.shape)}")
        self.tokens.copy_(tokens)
        self.targets.copy_(targets)
        self.graph.replay()
        return self.loss  # the next pass writes over it

    def record(self, tokens: Tensor, targets: Tensor) -> None:
        self.tokens, self.targets = tokens.clone(), targets.clone()
        side = torch.cuda.Stream()  # as torch wants it before a capture
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # what is compiled, chosen and allocated once, the gradients too
                self.one_pass(self.tokens, self.targets)
        torch.cuda.current_stream().wait_stream(side)
        self.params = [p for p in self.params if p.grad is not None]
        self.grads = [p.grad for p in self.params]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss = self.one_pass(self.tokens, self.targets)
        self.graph = graph
        self.begin()


def train(run: Run) -> None:
    hp = hyperparameters(run.spec)
    on_gpu = run.spec.device == "cuda"
    model = build_model(run.spec)
    compiled = kernels.compiled(run.spec.device)
    optimizer = build_optimizer(model, hp, compiled)
    loss_of = kernels.compile(model.loss) if compiled else model.loss
    rows = hp.TOTAL_BATCH_SIZE // run.spec.seq_len
    micro_rows = min(rows, max(1, hp.DEVICE_BATCH_SIZE // run.spec.batch_divisor))
    if rows < 1 or rows % micro_rows:
        raise ValueError(f"TOTAL_BATCH_SIZE is {rows} rows, which must be a multiple of DEVICE_BATCH_SIZE {micro_rows}")

    def one_pass(tokens: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward of a micro-batch; returns its share of the loss."""
        loss = loss_of(tokens, targets) * (micro_rows / rows)
        loss.backward()
        return loss.detach()

    graphed = GraphedPass(one_pass, list(model.parameters())) if on_gpu and hp.CUDA_GRAPHS else None

    def step(batch: Batch) -> Tensor:
        """One optimizer step over the whole batch, in micro-batches; returns its mean loss."""
        total = torch.zeros((), device=batch.tokens.device)
        if graphed:
            graphed.begin()
        for tokens, targets in zip(batch.tokens.split(micro_rows), batch.targets.split(micro_rows), strict=True):
            total += (graphed or one_pass)(tokens, targets)
        ramp = min(batch.step / hp.MUON_RAMP, 1.0)
        momentum = (1 - ramp) * 0.85 + ramp * hp.MUON_MOMENTUM
        optimizer.set_schedule(lr_multiplier(hp, batch.progress), momentum, hp.WEIGHT_DECAY * (1 - batch.progress))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    run.warmup(step, rows=rows, restore=(model, optimizer))
    for batch in run.batches(rows=rows):
        run.log(step(batch))
    run.submit(model, depth=hp.DEPTH, flops_per_token=model.flops_per_token())


if __name__ == "__main__":
    raise SystemExit(main(__file__))
