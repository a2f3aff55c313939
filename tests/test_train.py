"""train.py is the reference's model and optimizer: counts at full size, arithmetic at a tiny one, against fp64."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from hotloop.bench import baseline
from hotloop.harness import Batch
from hotloop.harness.settings import PRESETS, Spec

TINY = dict(
    DEPTH=3, ASPECT_RATIO=16, HEAD_DIM=8, WINDOW_PATTERN="SL", SOFTCAP=15.0, ROPE_BASE=10000.0, GATE_CHANNELS=4
)  # fmt: skip
VOCAB, LENGTH = 29, 12


def tiny_hp(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(**(vars(train.hyperparameters(Spec("h100", "cpu", 1, VOCAB, LENGTH))) | TINY | changes))


def tiny_model(scale: float = 0.3) -> train.GPT:
    """Every weight random, the zero-initialised ones too, so that each of them matters."""
    torch.manual_seed(3)
    model = train.GPT(tiny_hp(), VOCAB, LENGTH)
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * scale)
    return model


def test_the_full_size_has_the_published_counts() -> None:
    """50.3 M parameters and 239.08 MFLOP a token, each also summed here from the architecture's description."""
    depth, dim, vocab, length, heads = 8, 512, 8192, 2048, 4
    with torch.device("meta"):
        model = train.GPT(train.hyperparameters(Spec("h100", "cpu", 1, vocab, length)), vocab, length)
    blocks = depth * 12 * dim * dim + depth // 2 * heads * 32
    parameters = blocks + vocab * dim * (1 + depth // 2) + vocab * dim + 2 * depth
    assert sum(p.numel() for p in model.parameters()) == parameters == 50_332_176
    windows = [length // 2] * 3 + [length] + [length // 2] * 3 + [length]
    flops = 6 * (blocks + vocab * dim) + sum(12 * dim * w for w in windows)
    assert model.flops_per_token() == flops == 239_078_400


def norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()


def plain_logits(model: train.GPT, tokens: torch.Tensor) -> torch.Tensor:
    """The forward pass for one row, position by position, in fp64."""
    w = {k: v.double() for k, v in model.state_dict().items()}
    depth, heads, width = 3, 6, 8
    x = x0 = norm(w["wte.weight"][tokens])
    for layer in range(depth):
        x = w["resid_scalars"][layer] * x + w["x0_scalars"][layer] * x0
        h, name = norm(x), f"blocks.{layer}."
        q, k, v = ((h @ w[f"{name}attention.{p}.weight"].T).view(-1, heads, width) for p in "qkv")
        if layer in (0, 2):  # every other block, the last included
            gate = 2 / (1 + torch.exp(-(h[:, :4] @ w[f"{name}attention.gate.weight"].T)))
            v = v + gate[..., None] * w[f"value_embeds.{layer}.weight"][tokens].view(-1, heads, width)
        out = torch.zeros_like(x)
        window = LENGTH if layer in (1, 2) else LENGTH // 2

        def turn(y: torch.Tensor, position: int) -> torch.Tensor:
            angle = position / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
            a, b = y[..., : width // 2], y[..., width // 2 :]
            return norm(torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], -1))

        for i in range(len(tokens)):
            seen = range(max(0, i - window), i + 1)
            for head in range(heads):
                query = turn(q[i, head], i)
                scores = torch.stack([query @ turn(k[j, head], j) for j in seen]) / math.sqrt(width)
                mixed = torch.softmax(scores, 0) @ v[list(seen), head]
                out[i, head * width : (head + 1) * width] = mixed
        x = x + out @ w[f"{name}attention.proj.weight"].T
        hidden = torch.clamp(norm(x) @ w[f"{name}mlp.fc.weight"].T, min=0) ** 2
        x = x + hidden @ w[f"{name}mlp.proj.weight"].T
    return 15 * torch.tanh(norm(x) @ w["lm_head.weight"].T / 15)


def test_forward_and_loss_against_a_plain_fp64_rewrite() -> None:
    model = tiny_model()
    tokens = torch.randint(0, VOCAB, (2, LENGTH + 1))
    want = torch.stack([plain_logits(model, row[:-1]) for row in tokens])
    torch.testing.assert_close(model(tokens[:, :-1]).double(), want, rtol=1e-4, atol=1e-4)
    nll = torch.nn.functional.cross_entropy(want.flatten(0, 1), tokens[:, 1:].flatten())
    assert model.loss(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(float(nll), rel=1e-5)


def test_it_starts_as_the_unigram_of_nothing() -> None:
    """Zero projections and a tiny head: the first loss is log V."""
    torch.manual_seed(0)
    model = train.build_model(Spec("laptop", "cpu", 1, 2048, 256))
    tokens = torch.randint(0, 2048, (2, 257))
    assert model.loss(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(math.log(2048), rel=1e-3)


POLAR = [  # Polar Express, five iterations (arXiv:2505.16932)
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


@pytest.mark.parametrize(("rows", "cols"), [(6, 6), (12, 5), (5, 12)])
def test_muon_against_a_plain_fp64_rewrite(rows: int, cols: int) -> None:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(rows, cols)) for _ in range(3)]
    group = dict(kind="muon", params=params, base_lr=0.05, beta2=0.9)
    optimizer = train.MuonAdamW([group], compiled=False)
    plain = [dict(p=p.detach().double(), m=torch.zeros(rows, cols).double(), v=None) for p in params]
    for step in range(5):
        momentum, decay, scale = 0.85 + 0.02 * step, 0.3 - 0.05 * step, 1.0 - 0.1 * step
        for p, s in zip(params, plain, strict=True):
            p.grad = torch.randn(rows, cols)
            g = p.grad.double()
            s["m"] = momentum * s["m"] + (1 - momentum) * g
            x = (1 - momentum) * g + momentum * s["m"]
            x = x / (1.02 * x.pow(2).sum().sqrt() + 1e-6)
            for a, b, c in POLAR:  # an odd polynomial of the singular values
                u, sigma, vt = torch.linalg.svd(x, full_matrices=False)
                x = u @ torch.diag(a * sigma + b * sigma**3 + c * sigma**5) @ vt
            axis = 1 if rows >= cols else 0
            mean = x.pow(2).mean(axis, keepdim=True)
            s["v"] = 0.1 * mean if s["v"] is None else 0.9 * s["v"] + 0.1 * mean
            size = x.pow(2).sum().sqrt()
            x = x / s["v"].clamp_min(1e-10).sqrt()
            x = x * size / x.pow(2).sum().sqrt()
            lr = 0.05 * scale * max(1.0, rows / cols) ** 0.5
            s["p"] = s["p"] - lr * x - lr * decay * s["p"] * (x * s["p"] >= 0)
        optimizer.set_schedule(scale, momentum, decay)
        optimizer.step()
        for p, s in zip(params, plain, strict=True):
            torch.testing.assert_close(p.detach().double(), s["p"], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("eps", [1e-10, 0.3])  # the second matters, and tells where it is added
def test_adamw_against_a_plain_fp64_rewrite(eps: float) -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(7, 3))
    optimizer = train.MuonAdamW(
        [dict(kind="adamw", params=[p], base_lr=0.1, betas=(0.8, 0.95), eps=eps)], compiled=False
    )
    x, m, v = p.detach().double(), torch.zeros(7, 3).double(), torch.zeros(7, 3).double()
    for step in range(1, 7):
        p.grad = torch.randn(7, 3)
        g = p.grad.double()
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        x = x - 0.1 * 0.5 * (m / (1 - 0.8**step)) / ((v / (1 - 0.95**step)).sqrt() + eps)
        optimizer.set_schedule(0.5, 0.9, 0.0)
        optimizer.step()
        torch.testing.assert_close(p.detach().double(), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", [train, baseline], ids=["train.py", "bench/baseline.py"])
def test_the_momentum_rises_from_85_hundredths_over_the_ramp(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hp = tiny_hp(TOTAL_BATCH_SIZE=2 * LENGTH, MUON_RAMP=10)
    monkeypatch.setattr(module, "hyperparameters", lambda spec: hp)
    made = []
    name = "build_optimizer" if module is train else "build_optimizers"
    build = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: made.append(build(*args, **kwargs)) or made[-1])
    seen = []

    class Run:
        spec = Spec("h100", "cpu", 1, VOCAB, LENGTH)

        def warmup(self, step: Any, **_: Any) -> None:
            tokens = torch.randint(0, VOCAB, (2, LENGTH + 1))
            for at in (0, 5, 10, 400):
                step(Batch(tokens[:, :-1], tokens[:, 1:], 0.25, at))
                optimizer = made[0] if module is train else made[0][1]
                groups = [g for g in optimizer.param_groups if "momentum" in g]
                seen.append({round(g["momentum"], 6) for g in groups})
                assert all(g["decay"] == pytest.approx(0.15) for g in groups)
            raise StopIteration

    with pytest.raises(StopIteration):
        module.train(Run())
    assert seen == [{0.85}, {0.9}, {0.95}, {0.95}]


def test_every_parameter_is_optimised_once_at_its_own_rate() -> None:
    model = tiny_model()
    optimizer = train.build_optimizer(model, tiny_hp(), compiled=False)
    held = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    rate = {id(p): (g["kind"], g["base_lr"]) for g in optimizer.param_groups for p in g["params"]}
    scale = (48 / 768) ** -0.5
    assert rate[id(model.wte.weight)] == ("adamw", pytest.approx(0.6 * scale))
    assert rate[id(model.lm_head.weight)] == ("adamw", pytest.approx(0.004 * scale))
    assert rate[id(model.resid_scalars)] == ("adamw", pytest.approx(0.005))
    assert rate[id(model.x0_scalars)] == ("adamw", 0.5)
    assert rate[id(model.blocks[0].mlp.fc.weight)] == ("muon", 0.04)
    assert rate[id(model.blocks[0].attention.gate.weight)] == ("muon", 0.04)


@pytest.mark.parametrize(
    ("progress", "multiplier"), [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.5, 1.0), (0.75, 0.6), (1.0, 0.2)]
)
def test_the_schedule(progress: float, multiplier: float) -> None:
    hp = tiny_hp(WARMUP_RATIO=0.1, WARMDOWN_RATIO=0.5, FINAL_LR_FRAC=0.2)
    assert train.lr_multiplier(hp, progress) == pytest.approx(multiplier)


def test_a_preset_changes_what_its_table_names_and_nothing_else() -> None:
    full = vars(train.hyperparameters(Spec("h100", "cpu", 1, 8192, 2048)))
    laptop = vars(train.hyperparameters(Spec("laptop", "cpu", 1, 2048, 256)))
    assert {k for k in full if full[k] != laptop[k]} <= set(train.LAPTOP) <= set(full)
    for preset, hp in ((PRESETS["h100"], full), (PRESETS["laptop"], laptop)):
        rows = hp["TOTAL_BATCH_SIZE"] // preset.seq_len
        assert rows % min(rows, hp["DEVICE_BATCH_SIZE"]) == 0


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    model = tiny_model()
    tokens = torch.randint(0, VOCAB, (6, LENGTH + 1))
    x, y = tokens[:, :-1], tokens[:, 1:]
    model.loss(x, y).backward()
    whole = model.blocks[1].mlp.fc.weight.grad.clone()
    model.zero_grad()
    for part in range(3):
        (model.loss(x[2 * part : 2 * part + 2], y[2 * part : 2 * part + 2]) / 3).backward()
    torch.testing.assert_close(model.blocks[1].mlp.fc.weight.grad, whole)
