"""Rows of `benchmarks/runtime.py` about numbers, not seconds: two processes against one device, in float64, on a small GPT-2."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel

BAR = 1e-9  # relative to the largest number of a tensor
MICRO, STEPS = 4, 3
OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-3, foreach=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2),
}
SCHEDULES = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS),
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
}
CLIPS = (None, 0.1)


class Model(nn.Module):
    """GPT-2 with a loss in the dtype of its logits; Hugging Face's is float32 whatever the model is."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.gpt = GPT2LMHeadModel(config)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.gpt(input_ids).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def small(rows: int) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(
        vocab_size=96, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, use_cache=False, **drops
    )
    tokens = torch.randint(96, (rows, 16), generator=torch.Generator().manual_seed(1))
    return Model(config).double(), {"input_ids": tokens, "labels": tokens}


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def _apart(ours: Any, theirs: Any) -> float:
    pairs = [(_whole(a).detach(), b.detach()) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def _parallel(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Any:
    from netmind_autopar import autoparallelize

    return autoparallelize(model, batch, init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)), **options)


def accumulate() -> dict[str, Any]:
    """Gradients of four micro-steps against one step of one device on the whole batch; bytes sent, over those of one micro-step."""
    model, batch = small(4 * MICRO)
    model(**batch).backward()
    expected = [p.grad for p in model.parameters()]
    micro = [{k: t[i::MICRO].contiguous() for k, t in batch.items()} for i in range(MICRO)]
    pm = _parallel(copy.deepcopy(model), micro[0], baseline="ddp")
    pm(**micro[0]).backward()
    pm.zero_grad()
    once = sum(pm.sent_bytes.values())
    for i, rows in enumerate(micro):
        with pm.no_sync(i + 1 < MICRO):
            (pm(**rows) / MICRO).backward()
    sent = sum(pm.sent_bytes.values()) - once
    off = _apart([p.grad for p in pm.parameters()], expected)
    return {"measured": float(f"{off:.2g}"), "bar": BAR, "ok": off <= BAR and sent <= 1.01 * once, "sent_over_one": round(sent / once, 5)}


def optimizers() -> dict[str, Any]:
    """Parameters after three steps with every optimizer, clip and schedule, against one device."""
    worst, cases = 0.0, list(itertools.product(OPTIMIZERS, SCHEDULES, CLIPS))
    start, batch = small(4)
    pm = _parallel(copy.deepcopy(start), batch, random_costs=1)
    for optimizer, schedule, clip in cases:
        model = copy.deepcopy(start)
        ours = copy.deepcopy(pm)
        for module in (model, ours):
            made = OPTIMIZERS[optimizer](module.parameters())
            planned = SCHEDULES[schedule](made)
            for _ in range(STEPS):
                made.zero_grad()
                module(**batch).backward()
                if clip:
                    torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
                made.step()
                planned.step()
        worst = max(worst, _apart(ours.parameters(), model.parameters()))
    return {"measured": float(f"{worst:.2g}"), "bar": BAR, "ok": worst <= BAR, "cases": len(cases)}


EXACT = {
    "accumulate": ("accumulation of 4 micro-steps equals one step, sending what one sends", accumulate),
    "optimizers": ("3 optimizers x 2 schedules x clip equal one device", optimizers),
}
