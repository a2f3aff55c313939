"""Variants of the real train.py for the pre-flight: honest ones that it must let through, and broken ones.

Each is a list of (old, new) pieces of text; `at` names the presets where it is honest, or where a CPU can see that it
is broken.
"""

# ruff: noqa: E501 - an edit of a line reads best on one line
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TRAIN = (Path(__file__).resolve().parents[2] / "train.py").read_text()
BOTH = ("h100", "laptop")
Edits = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Variant:
    edits: Edits
    at: tuple[str, ...] = BOTH

    def source(self) -> bytes:
        text = TRAIN
        for old, new in (*SMALLER, *self.edits):
            assert old in text, f"train.py has no {old!r} any more; write this variant anew"
            text = text.replace(old, new, 1)
        return text.encode()


# Two blocks instead of eight, one micro-batch, one polynomial: what is found does not depend on that, and a variant takes a second.
SMALLER: Edits = (
    ("DEVICE_BATCH_SIZE = 128 ", "DEVICE_BATCH_SIZE = 256 "),
    ("row, POLAR_EXPRESS,", "row, POLAR_EXPRESS[:1],"),
    ("DEPTH = 8 ", "DEPTH = 2 "),
    ("    DEPTH=4,\n", "    DEPTH=2,\n"),
    (
        "    TOTAL_BATCH_SIZE=2**12,\n    DEVICE_BATCH_SIZE=16,\n",
        "    TOTAL_BATCH_SIZE=2**10,\n    DEVICE_BATCH_SIZE=8,\n",
    ),
)

LOG = "        run.log(step(batch))\n"
STEP = "        loss.backward()\n"
LOSS = "        loss = loss_of(tokens, targets) * (micro_rows / rows)\n"
SUBMIT = "    run.submit(model, depth=hp.DEPTH, flops_per_token=model.flops_per_token())"
DEVICE = "    return model.to(spec.device)\n"
FORWARD = "            logits = self.lm_head(self.hidden(tokens)).float()\n"
MLP_CALL = "        return x + self.mlp(norm(x))\n"
MLP = "        return self.proj(F.relu(self.fc(x)).square())\n"
ATTENTION = "        y = kernels.attention(norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin)), v, window)\n"
WARMUP = "    run.warmup(step, rows=rows, restore=(model, optimizer))\n"
BATCHES = "    for batch in run.batches(rows=rows):\n"
TRITON = """
@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, 2 * tl.load(x + i, i < n), i < n)

def doubled(x):
    y = torch.empty_like(x)
    double[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)
    return y

class GPT(nn.Module):"""


def one(old: str, new: str, at: tuple[str, ...] = BOTH) -> Variant:
    return Variant(((old, new),), at)


GPU = ("h100",)
HONEST: dict[str, Variant] = {
    "the file itself": Variant(()),
    "cuda() hard-coded": one(DEVICE, "    return model.cuda()\n", GPU),
    "cuda devices hard-coded everywhere": Variant((
        (DEVICE, "    return model.to('cuda')\n"),
        ("device=batch.tokens.device)", "device='cuda')"),
        ("x = x0 = norm", "assert tokens.is_cuda and tokens.device.type == 'cuda'\n        x = x0 = norm"),
    ), GPU),
    "autocast on cuda, always": Variant((
        ('torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda)', 'torch.autocast("cuda", torch.bfloat16)'),
        ('torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda)', 'torch.autocast("cuda", torch.bfloat16)'),
    ), GPU),
    "all weights bf16": one(
        DEVICE, "    return model.to(spec.device).bfloat16() if spec.device == 'cuda' else model\n"
    ),
    "only runs on a GPU": one(
        "    on_gpu = run.spec.device == \"cuda\"\n",
        "    on_gpu = True\n    if not torch.cuda.is_available():\n        raise SystemExit('needs a GPU')\n", GPU,
    ),
    "a CPU branch that is broken": one(
        "loss_of = kernels.compile(model.loss) if compiled else model.loss",
        "loss_of = torch.compile(model.loss) if compiled else model.los", GPU,
    ),
    "events, streams and memory statistics": one(
        LOG, "        torch.cuda.synchronize(); start = torch.cuda.Event(enable_timing=True); start.record()\n"
        "        run.log(step(batch)); torch.cuda.current_stream().synchronize()\n"
        "        print(torch.cuda.max_memory_allocated() / 2**20, torch.cuda.mem_get_info())\n", GPU,
    ),
    "a Triton kernel of its own": Variant((
        ("import torch\n", "import torch\nimport triton\nimport triton.language as tl\n"),
        ("\nclass GPT(nn.Module):", TRITON), (LOSS, LOSS.replace("loss_of(", "doubled(model.hidden(tokens)).mean() + loss_of(")),
    ), GPU),
    "item() in the loop": one(LOG, "        loss = step(batch).item()\n        run.log(loss)\n"),
    "float(loss) each step, and its average": one(
        LOG, "        loss = float(step(batch))\n        mean = 0.9 * (mean if batch.step else loss) + 0.1 * loss\n"
        "        print(f'{batch.step} {mean:.3f}')\n        run.log(loss)\n"
    ),
    "stops at a loss that explodes": one(
        LOG, "        loss = step(batch)\n        run.log(loss)\n        if not torch.isfinite(loss) or loss > 100:\n"
        "            raise RuntimeError('diverged')\n"
    ),
    "clips what is large, by value": one(
        STEP, STEP + "        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n"
        "        if norm.item() > 5:\n            print('large', norm.item())\n"
    ),
    "a mask that selects rows": one(LOSS, LOSS + "        kept = targets[targets > 3]\n"),
    "the whole step compiled": one(WARMUP, "    step = torch.compile(step)\n" + WARMUP, GPU),
    "the model compiled, and its original submitted": Variant((
        (SUBMIT, SUBMIT.replace("submit(model", "submit(compiled._orig_mod")),
        (WARMUP, "    compiled = torch.compile(model)\n" + WARMUP),
    ), GPU),
    "compiled blocks": one("    optimizer = build_optimizer(model", "    model.blocks.compile()\n    optimizer = build_optimizer(model", GPU),
    "a schedule of two lengths": Variant((
        (WARMUP, WARMUP + "    run.warmup(step, rows=2 * rows, seq_len=run.spec.seq_len // 2, restore=(model, optimizer))\n"),
        ("run.batches(rows=rows)", "run.batches(rows=lambda p: (2 * rows, run.spec.seq_len // 2) if p < 0.5 else (rows, run.spec.seq_len))"),
    )),
    "micro-batches by a view": one(
        "zip(batch.tokens.split(micro_rows), batch.targets.split(micro_rows), strict=True)",
        "zip(batch.tokens.view(rows // micro_rows, -1, run.spec.seq_len), "
        "batch.targets.view(rows // micro_rows, -1, run.spec.seq_len), strict=True)",
    ),
    "no laptop column": Variant((("LAPTOP = dict(", "OLD = dict("),), GPU),
    "a broken laptop column": one("    HEAD_DIM=32,\n", "    HEAD_DIM=0,\n", GPU),
    "a laptop column that does not fit": one("    HEAD_DIM=32,\n", "    HEAD_DIM=30,\n    GATE_CHANNELS=4096,\n", GPU),
    "prints a lot": one(LOG, "        print('step', batch.step, 'x' * 10000)\n" + LOG),
    "imports slowly": one("import torch\n", "import time; time.sleep(0.3)\nimport torch\n"),
    "twice as many steps in the warm-up": one(
        WARMUP, "    def twice(batch):\n        step(batch)\n        return step(batch)\n"
        + WARMUP.replace("(step", "(twice")
    ),
    "numbers from numpy": Variant((
        ("import torch\n", "import numpy as np\nimport torch\n"),
        (LOSS, LOSS + "        order = torch.from_numpy(np.random.permutation(len(tokens))).to(tokens.device)\n"
         "        loss = loss + 0 * tokens[order].sum()\n"),
    )),
    "dropout and noise": one(
        MLP,
        "        branch = nn.functional.dropout(self.proj(F.relu(self.fc(x)).square()), 0.1, self.training)\n"
        "        return branch + 0.01 * torch.randn_like(branch) * self.training\n",
    ),
    "an average of the weights, from half of the run": Variant((
        ("    def step(batch: Batch)", "    average = None\n\n    def step(batch: Batch)"),
        (LOG, LOG + "        if batch.progress > 0.9:\n            if average is None:\n"
         "                average = build_model(run.spec)\n                average.load_state_dict(model.state_dict())\n"
         "            for a, p in zip(average.parameters(), model.parameters(), strict=True):\n"
         "                a.data.lerp_(p.data, 0.1)\n"),
        (SUBMIT, SUBMIT.replace("submit(model", "submit(average")),
    )),
    "an average that starts at step 100 exactly": Variant((
        ("    def step(batch: Batch)", "    average = None\n\n    def step(batch: Batch)"),
        (LOG, LOG + "        if batch.step == 100:\n            average = build_model(run.spec)\n"),
        (SUBMIT, SUBMIT.replace("submit(model", "submit(average.eval()")),
    ), GPU),
    "torch's AdamW, fused": one(
        "    optimizer = build_optimizer(model, hp, compiled)\n",
        "    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)\n"
        "    optimizer.set_schedule = lambda *a: None\n",
    ),
    "torch's AdamW with a scheduler": one(
        "    optimizer = build_optimizer(model, hp, compiled)\n",
        "    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)\n"
        "    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s))\n"
        "    optimizer.set_schedule = lambda *a: None\n",
    ),
    "a deep copy of the model": Variant((
        ("import torch\n", "import copy\n\nimport torch\n"), (SUBMIT, "    model = copy.deepcopy(model)\n" + SUBMIT),
    )),
    "an autograd function": Variant((
        ("\nclass GPT(nn.Module):", "\nclass Scale(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, x):\n"
         "        ctx.save_for_backward(x)\n        return x * 2\n    @staticmethod\n    def backward(ctx, g):\n"
         "        return g * torch.full((1,), 2.0, device=g.device, dtype=g.dtype)\n\n\nclass GPT(nn.Module):"),
        (LOSS, LOSS + "        loss = Scale.apply(loss) / 2\n"),
    )),
    "checkpointed blocks": Variant((
        ("import torch\n", "import torch\nfrom torch.utils.checkpoint import checkpoint\n"),
        ("self.mlp(norm(x))", "checkpoint(self.mlp, norm(x), use_reentrant=False)"),
    )),
    "flex attention": Variant((
        ("import torch\n", "import torch\nfrom torch.nn.attention.flex_attention import create_block_mask, flex_attention\n"),
        ("\nclass Attention(nn.Module):", "\nFLEX = torch.compile(flex_attention)\n\n\nclass Attention(nn.Module):"),
        (ATTENTION,
         "        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, x.size(1), x.size(1), device=x.device)\n"
         "        y = FLEX(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=mask).transpose(1, 2)\n"),
    ), GPU),
    "the best average, if there is one": one(
        SUBMIT, "    if getattr(run, 'average', None) is not None:\n        run.submit(run.average)\n", GPU,
    ),
    "one cached mask": Variant((
        ("\nclass GPT(nn.Module):", "\nCACHE = {}\n\n\ndef mask(x):\n    if 'm' not in CACHE:\n"
         "        CACHE['m'] = torch.ones(x.size(1), 1, device=x.device)\n    return CACHE['m']\n\n\nclass GPT(nn.Module):"),
        (MLP_CALL, "        x = x * mask(x).to(x.dtype)\n" + MLP_CALL),
    )),
    "a seed and a generator": one(
        "    model = build_model(run.spec)\n",
        "    torch.manual_seed(3)\n    model = build_model(run.spec)\n"
        "    noise = torch.rand(4, generator=torch.Generator().manual_seed(1))\n",
    ),
}  # fmt: skip

HP = "hp = hyperparameters(run.spec)\n"
BROKEN: dict[str, Variant] = {
    "a syntax error": one("def train(run: Run) -> None:", "def train(run: Run) -> None"),
    "an indentation": one("    model.init_weights()\n", "      model.init_weights()\n"),
    "a package that is not installed": one("import torch\n", "import torch\nimport no_such_package\n"),
    "a name that a module does not have": one("from torch import Tensor, nn", "from torch import Tensor, nn, flash_attend"),
    "no build_model": one("def build_model(spec: Spec)", "def make_model(spec: Spec)"),
    "an unknown name at import": one("SOFTCAP = 15.0", "SOFTCAP = FIFTEEN"),
    "an unknown name in forward": one("self.lm_head(self.hidden(tokens))", "self.lm_head(self.hidden(tokns))"),
    "an unknown name on the GPU's branch": one("return model.to(spec.device)", "return model.to(spec.devic)"),
    "a misspelt attribute": one("x + self.mlp(", "x + self.mpl("),
    "a misspelt function of torch": one("self.softcap * torch.tanh(", "self.softcap * torch.tanhh("),
    "a misspelt layer": one("self.fc = nn.Linear(", "self.fc = nn.Linaer("),
    "a misspelt kernel": one("y = kernels.attention(", "y = kernels.atention("),
    "a hyperparameter that is gone": one("SCALAR_LR = 0.5 ", "SCALARS_LR = 0.5 "),
    "a wrong dimension in the MLP": one("self.proj = nn.Linear(4 * dim, dim", "self.proj = nn.Linear(3 * dim, dim"),
    "a wrong dimension in the head": one("self.lm_head = nn.Linear(dim, vocab", "self.lm_head = nn.Linear(dim + 1, vocab"),
    "heads that do not divide": one("self.v.weight)))", "self.v.weight[3:])))"),
    "a broadcast that does not fit": one(
        MLP_CALL, MLP_CALL.replace("norm(x)", "norm(x) + torch.zeros(x.size(-1) + 3, device=x.device)")
    ),
    "a concatenation that does not fit": one(MLP_CALL, MLP_CALL.replace("norm(x)", "torch.cat((x, x[:, 1:]), -1)")),
    "a view that does not fit": one(MLP_CALL, MLP_CALL.replace("norm(x)", "x.view(-1, 7, 11)")),
    "keys of another length": one(
        ATTENTION, "        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2)[..., 1:], v.transpose(1, 2)).transpose(1, 2)\n"
    ),
    "a missing argument": one("build_optimizer(model, hp, compiled)", "build_optimizer(model, compiled)"),
    "an argument that is not known": one("build_optimizer(model, hp, compiled)", "build_optimizer(model, hp, compile=compiled)"),
    "a layer's argument that is not known": one("nn.Linear(dim, 4 * dim, bias=False)", "nn.Linear(dim, 4 * dim, biased=False)"),
    "too many arguments": one("self.hidden(tokens), self.lm_head.weight", "self.hidden(tokens, targets), self.lm_head.weight"),
    "indices of a wrong type": one(
        "x = x0 = norm(self.wte(tokens))", "x = x0 = norm(self.wte(tokens.float()))"
    ),
    "a batch that does not divide": Variant((("TOTAL_BATCH_SIZE = 2**19", "TOTAL_BATCH_SIZE = 2**19 + 2**15"), ("TOTAL_BATCH_SIZE=2**10", "TOTAL_BATCH_SIZE=2**10 + 2**8"))),
    "a batch of no row": Variant((("TOTAL_BATCH_SIZE = 2**19", "TOTAL_BATCH_SIZE = 2**9"), ("TOTAL_BATCH_SIZE=2**10", "TOTAL_BATCH_SIZE=2**5"))),
    "a batch larger than the feed": Variant((("TOTAL_BATCH_SIZE = 2**19", "TOTAL_BATCH_SIZE = 2**26"), ("TOTAL_BATCH_SIZE=2**10", "TOTAL_BATCH_SIZE=2**26"))),
    "no submission": one(SUBMIT, "    return"),
    "no real batch": Variant(((BATCHES, "    for batch in ():\n"),)),
    "no warm-up": one(WARMUP, ""),
    "another shape than was declared": one("run.batches(rows=rows)", "run.batches(rows=2 * rows)"),
    "another model submitted": one(SUBMIT, SUBMIT.replace("submit(model", "submit(model.blocks")),
    "an optimizer submitted": one(SUBMIT, "    run.submit(optimizer)"),
    "logits of another vocabulary": one("return self.softcap * torch.tanh(logits / self.softcap)", "return self.softcap * torch.tanh(logits / self.softcap)[..., :-1]"),
    "a tuple for logits": one("return self.softcap * torch.tanh(logits / self.softcap)", "return logits, self.softcap"),
    "logits of the last token only": one("logits = self.lm_head(self.hidden(tokens)).float()", "logits = self.lm_head(self.hidden(tokens)[:, -1]).float()"),
    "no return in loss": one("            return kernels.loss", "            kernels.loss"),
    "no return in hidden": one("        return norm(x)\n", "        norm(x)\n"),
    "a division by zero": one("ramp = min(batch.step / hp.MUON_RAMP, 1.0)", "ramp = min(1.0, batch.step / (batch.step * hp.MUON_RAMP))"),
    "a table without the key": one("str(i) in self.value_embeds else None", "True else None"),
    "a list that is too short": one("self.windows[i]", "self.windows[i + 1]"),
    "used before it is set": one("        total = torch.zeros((), device=batch.tokens.device)\n", ""),
    "a gradient of nothing": one(LOSS, LOSS + "        loss = loss.detach()\n"),
    "a parameter outside the loss": one(MLP_CALL, "        return x\n"),
    "a loss that is no number": one(LOSS, LOSS.replace("loss_of(", "(0 * float('inf')) + loss_of("), ("laptop",)),
    "logits that are no number": one("return self.softcap * torch.tanh(logits / self.softcap)", "return torch.log(logits - logits)[..., :] * 0"  , ("laptop",)),
    "types that do not fit, on the GPU alone": one(
        "        for table in (model.wte, *model.value_embeds.values()):\n            table.bfloat16()\n",
        "        model.lm_head.double()\n", (),
    ),
}  # fmt: skip
