"""train.py in plain PyTorch, without any kernel of this project: what speedups are claimed against.

The same model, initial weights, optimizer, schedule and data, so that the two compare at equal tokens; its own are only
the operations. torch.compile(mode="max-autotune-no-cudagraphs") fuses what it can, FlexAttention serves the windows,
SDPA the full context, torch's fused AdamW the tables, and Muon works on stacks of equal matrices. The logits are fp32.
It runs like any train.py: `hotloop run bench/baseline.py`, or beside it: `hotloop bench baseline`.

Where train.py's hyperparameters change, change them here (a test compares). Shapes: B batch, T time, D model, H heads,
K head dim.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from hotloop.harness import Batch, Run, Spec, main

DEPTH = 8
ASPECT_RATIO = 64
HEAD_DIM = 128
WINDOW_PATTERN = "SSSL"
SOFTCAP = 15.0
ROPE_BASE = 10000.0
GATE_CHANNELS = 32
TOTAL_BATCH_SIZE = 2**19
DEVICE_BATCH_SIZE = 128
EMBEDDING_LR = 0.6
UNEMBEDDING_LR = 0.004
MATRIX_LR = 0.04
SCALAR_LR = 0.5
WEIGHT_DECAY = 0.2
ADAM_BETAS = (0.8, 0.95)
MUON_MOMENTUM = 0.95
MUON_RAMP = 300
MUON_BETA2 = 0.95
WARMUP_RATIO = 0.0
WARMDOWN_RATIO = 0.5
FINAL_LR_FRAC = 0.0
LAPTOP = dict(
    DEPTH=4,
    ASPECT_RATIO=32,
    HEAD_DIM=32,
    WINDOW_PATTERN="L",
    TOTAL_BATCH_SIZE=2**12,
    DEVICE_BATCH_SIZE=16,
    MUON_RAMP=30,
)
# The harness asks torch for results that repeat to the bit, which costs speed; False takes that back, for what plain
# PyTorch can do at most (`hotloop bench baseline --free`).
REPEATABLE = True


def hyperparameters(spec: Spec) -> SimpleNamespace:
    values = {name: value for name, value in globals().items() if name.isupper() and name != "LAPTOP"}
    return SimpleNamespace(**(values | (LAPTOP if spec.preset == "laptop" else {})))


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=2.0**-23).to(x.dtype)  # autocast would leave fp32


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, T, H, K] with its rotary positions, normalised over each head."""
    a, b = x.chunk(2, dim=-1)
    return norm(torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1))


def attend(q: Tensor, k: Tensor, v: Tensor, window: int, flex: BlockMask | None) -> Tensor:
    """Query i sees keys i - window to i: [B, T, H, K] -> [B, T, H, K]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if window >= q.size(2) - 1:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    elif flex is not None:
        y = flex_attention(q, k, v, block_mask=flex)
    else:
        near = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).tril().triu(-window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=near)
    return y.transpose(1, 2)


def block_masks(windows: list[int], seq_len: int, device: str) -> dict[int, BlockMask]:
    """FlexAttention's masks of the windows that are shorter than the context."""

    def mask(window: int) -> BlockMask:
        def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (i - j <= window)

        return create_block_mask(near, None, None, seq_len, seq_len, device=device)

    return {window: mask(window) for window in set(windows) if window < seq_len}


class Attention(nn.Module):
    def __init__(self, hp: SimpleNamespace, dim: int, gated: bool) -> None:
        super().__init__()
        self.head_dim, self.gate_channels = hp.HEAD_DIM, hp.GATE_CHANNELS
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.gate = nn.Linear(hp.GATE_CHANNELS, dim // hp.HEAD_DIM, bias=False) if gated else None

    def forward(
        self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor, window: int, flex: BlockMask | None
    ) -> Tensor:
        qkv = F.linear(x, torch.cat((self.q.weight, self.k.weight, self.v.weight)))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in qkv.chunk(3, dim=-1))
        if self.gate is not None:
            gate = 2 * torch.sigmoid(self.gate(x[..., : self.gate_channels]))
            v = v + gate[..., None] * ve.view_as(v)
        y = attend(rotated(q, cos, sin), rotated(k, cos, sin), v, window, flex)
        return self.proj(y.flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, 4 * dim, bias=False)
        self.proj = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.relu(self.fc(x)).square())


class Block(nn.Module):
    def __init__(self, hp: SimpleNamespace, dim: int, gated: bool) -> None:
        super().__init__()
        self.attention = Attention(hp, dim, gated)
        self.mlp = MLP(dim)


class GPT(nn.Module):
    def __init__(self, hp: SimpleNamespace, vocab_size: int, seq_len: int) -> None:
        super().__init__()
        self.dim = dim = -(-hp.DEPTH * hp.ASPECT_RATIO // hp.HEAD_DIM) * hp.HEAD_DIM
        self.seq_len, self.softcap, self.depth = seq_len, hp.SOFTCAP, hp.DEPTH
        pattern = [hp.WINDOW_PATTERN[i % len(hp.WINDOW_PATTERN)] for i in range(hp.DEPTH)]
        self.windows = [seq_len if c == "L" else seq_len // 2 for c in (*pattern[:-1], "L")]
        gated = [i % 2 == (hp.DEPTH - 1) % 2 for i in range(hp.DEPTH)]
        self.wte = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(Block(hp, dim, g) for g in gated)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        self.resid_scalars = nn.Parameter(torch.ones(hp.DEPTH))
        self.x0_scalars = nn.Parameter(torch.full((hp.DEPTH,), 0.1))
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(vocab_size, dim) for i, g in enumerate(gated) if g})
        frequency = hp.ROPE_BASE ** -(torch.arange(0, hp.HEAD_DIM, 2, dtype=torch.float32) / hp.HEAD_DIM)
        angle = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequency)[:, None]
        self.register_buffer("cos", angle.cos(), persistent=False)  # [T, 1, K/2]
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.flex: dict[int, BlockMask] = {}  # window -> mask; empty: SDPA with a mask of [T, T]

    @torch.no_grad()
    def init_weights(self) -> None:
        bound = 3**0.5 * self.dim**-0.5
        nn.init.normal_(self.wte.weight, std=1.0)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.blocks:
            for linear in (block.attention.q, block.attention.k, block.attention.v, block.mlp.fc):
                nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.zeros_(block.attention.proj.weight)
            nn.init.zeros_(block.mlp.proj.weight)
            if block.attention.gate is not None:
                nn.init.zeros_(block.attention.gate.weight)
        for embed in self.value_embeds.values():
            nn.init.uniform_(embed.weight, -bound, bound)

    def logits(self, tokens: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
            cos, sin = self.cos[: tokens.size(1)], self.sin[: tokens.size(1)]
            x = x0 = norm(self.wte(tokens))
            for i, block in enumerate(self.blocks):
                x = self.resid_scalars[i] * x + self.x0_scalars[i] * x0
                ve = self.value_embeds[str(i)](tokens) if str(i) in self.value_embeds else None
                window = self.windows[i]
                x = x + block.attention(norm(x), ve, cos, sin, window, self.flex.get(window))
                x = x + block.mlp(norm(x))
            logits = self.lm_head(norm(x)).float()
        return self.softcap * torch.tanh(logits / self.softcap)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(tokens)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(tokens).flatten(0, 1), targets.flatten())

    def flops_per_token(self) -> int:
        tables = [self.wte, *self.value_embeds.values()]
        outside = sum(e.weight.numel() for e in tables) + 2 * self.depth
        matrices = sum(p.numel() for p in self.parameters()) - outside
        return 6 * matrices + sum(12 * self.dim * min(w, self.seq_len) for w in self.windows)


def build_model(spec: Spec) -> GPT:
    model = GPT(hyperparameters(spec), spec.vocab_size, spec.seq_len)
    model.init_weights()
    if spec.device == "cuda":
        for table in (model.wte, *model.value_embeds.values()):
            table.bfloat16()
        model.cos, model.sin = model.cos.bfloat16(), model.sin.bfloat16()
    return model.to(spec.device)


POLAR_EXPRESS = (  # Amsel et al. 2025, arXiv:2505.16932
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(g: Tensor) -> Tensor:
    x = g / (g.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    tall = g.size(-2) > g.size(-1)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT
        poly = b * gram + c * (gram @ gram)
        x = a * x + (x @ poly if tall else poly @ x)
    return x


def muon_update(
    p: Tensor, grad: Tensor, buffer: Tensor, second: Tensor, lr: Tensor, decay: Tensor, momentum: Tensor, beta2: float
) -> Tensor:
    """One step of NorMuon with cautious decay over a stack [N, rows, cols]; the new p."""
    buffer.lerp_(grad, 1 - momentum)
    g = torch.lerp(grad, buffer, momentum)
    g = orthogonalize(g.bfloat16() if g.is_cuda else g)
    mean = g.float().square().mean(dim=-1 if p.size(-2) >= p.size(-1) else -2, keepdim=True)
    second.lerp_(mean.to(second.dtype), 1 - beta2)
    scale = second.clamp_min(1e-10).rsqrt()
    before = mean.sum(dim=(-2, -1), keepdim=True).sqrt()
    after = (mean * scale.float().square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    g = g * (scale * (before / after.clamp_min(1e-10))).to(g.dtype)
    return p - lr * g - lr * decay * p * (g * p >= 0)


class Muon(torch.optim.Optimizer):
    def __init__(self, groups: list[dict], compiled: bool) -> None:
        super().__init__(groups, {})
        self.update = torch.compile(muon_update, dynamic=False, fullgraph=True) if compiled else muon_update

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = group["params"]
            rows, cols = params[0].shape
            state = self.state[params[0]]
            if not state:
                side = (rows, 1) if rows >= cols else (1, cols)
                state["buffer"] = params[0].new_zeros(len(params), rows, cols)
                state["second"] = params[0].new_zeros(len(params), *side)
            grads = torch.stack([p.grad for p in params])
            lr, decay, momentum = (torch.tensor(x) for x in (group["lr"], group["decay"], group["momentum"]))
            new = self.update(
                torch.stack(list(params)), grads, state["buffer"], state["second"],
                lr * max(1.0, rows / cols) ** 0.5, decay, momentum, group["beta2"],
            )  # fmt: skip
            torch._foreach_copy_(params, list(new.unbind(0)))


def build_optimizers(model: GPT, hp: SimpleNamespace, on_gpu: bool) -> tuple[torch.optim.AdamW, Muon]:
    scale = (model.dim / 768) ** -0.5
    tables = [
        dict(params=[model.lm_head.weight], base_lr=hp.UNEMBEDDING_LR * scale),
        dict(params=[model.wte.weight, *model.value_embeds.parameters()], base_lr=hp.EMBEDDING_LR * scale),
        dict(params=[model.resid_scalars], base_lr=hp.SCALAR_LR * 0.01),
        dict(params=[model.x0_scalars], base_lr=hp.SCALAR_LR, betas=(0.96, 0.95)),
    ]
    how = dict(fused=True) if on_gpu else dict(foreach=True)
    adamw = torch.optim.AdamW(tables, betas=hp.ADAM_BETAS, eps=1e-10, weight_decay=0.0, **how)
    matrices = list(model.blocks.parameters())
    stacks = [
        dict(params=[p for p in matrices if p.shape == shape], base_lr=hp.MATRIX_LR, beta2=hp.MUON_BETA2)
        for shape in sorted({p.shape for p in matrices})
    ]
    return adamw, Muon(stacks, compiled=on_gpu)


def lr_multiplier(hp: SimpleNamespace, progress: float) -> float:
    if progress < hp.WARMUP_RATIO:
        return progress / hp.WARMUP_RATIO
    left = min(1.0, (1.0 - progress) / hp.WARMDOWN_RATIO)
    return left + (1.0 - left) * hp.FINAL_LR_FRAC


def train(run: Run) -> None:
    if not REPEATABLE:
        torch.use_deterministic_algorithms(False)
        torch._inductor.config.deterministic = False
    hp = hyperparameters(run.spec)
    on_gpu = run.spec.device == "cuda"
    model = build_model(run.spec)
    adamw, muon = build_optimizers(model, hp, on_gpu)
    loss_of = model.loss
    if on_gpu:
        model.flex = block_masks(model.windows, run.spec.seq_len, "cuda")
        loss_of = torch.compile(model.loss, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True)
    rows = hp.TOTAL_BATCH_SIZE // run.spec.seq_len
    micro_rows = min(rows, max(1, hp.DEVICE_BATCH_SIZE // run.spec.batch_divisor))

    def step(batch: Batch) -> Tensor:
        total = torch.zeros((), device=batch.tokens.device)
        for tokens, targets in zip(batch.tokens.split(micro_rows), batch.targets.split(micro_rows), strict=True):
            loss = loss_of(tokens, targets) * (micro_rows / rows)
            loss.backward()
            total += loss.detach()
        ramp = min(batch.step / hp.MUON_RAMP, 1.0)
        momentum = (1 - ramp) * 0.85 + ramp * hp.MUON_MOMENTUM
        for group in (*adamw.param_groups, *muon.param_groups):
            group["lr"] = group["base_lr"] * lr_multiplier(hp, batch.progress)
        for group in muon.param_groups:
            group["momentum"], group["decay"] = momentum, hp.WEIGHT_DECAY * (1 - batch.progress)
        for optimizer in (adamw, muon):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total

    run.warmup(step, rows=rows, restore=(model, adamw, muon))
    for batch in run.batches(rows=rows):
        run.log(step(batch))
    run.submit(model, depth=hp.DEPTH, flops_per_token=model.flops_per_token())


if __name__ == "__main__":
    raise SystemExit(main(__file__))
