"""What the loss's tests run on ranks: a step of a PackedLM under ZeRO, and how much memory a loss takes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from sft_trainer.attention import choose_attention
from sft_trainer.loss import PackedLM, fused_cross_entropy
from tests.trainer.architectures import packed, random_samples, tiny_model
from tests.trainer.engine_cases import Part, make_optimizer, parts, running

LENGTHS = (9, 41, 30, 2, 17)
WITHOUT_CLIPPING = 1e9


def step_under_zero(stage: int) -> tuple[list[Part], float, float, int]:
    """On two ranks: state after a step over LENGTHS, its norm, this rank's Σ loss, and the hits found in eval mode."""
    model = tiny_model("llama", tie_word_embeddings=True)
    choose_attention(model, None, "cpu")
    module = PackedLM(model)
    assert module.head is not None
    samples = random_samples(LENGTHS)
    num_targets = sum(int((labels != -100).sum()) for _, labels in samples)
    mine = [samples[0], samples[2]] if dist.get_rank() == 0 else [samples[1], samples[3], samples[4]]
    silent = (samples[0][0], torch.full_like(samples[0][1], -100))
    batches = [mine[:1], mine[1:], [silent]]
    with running(module, stage, optimizer=make_optimizer(max_grad_norm=WITHOUT_CLIPPING)) as engine:
        with engine.evaluating():
            hits = sum(int(engine(**packed(batch))[1]) for batch in batches)
        total = 0.0
        for batch in batches:
            loss, _ = engine(**packed(batch))
            total += float(loss.detach())
            engine.backward(loss / num_targets, last=batch is batches[-1])
        norm = engine.step(0.0)
        return parts(engine), norm, total, hits


def peak_bytes(fused: bool, rows: int, hidden: int, vocabulary: int) -> int:
    """How far the resident memory of this process rises above where it was, while a loss and its gradients are made."""
    torch.manual_seed(0)
    h = torch.randn(rows, hidden, requires_grad=True)
    w = torch.randn(vocabulary, hidden, requires_grad=True)
    y = torch.randint(vocabulary, (rows,))
    Path("/proc/self/clear_refs").write_text("5")  # from here on the high-water mark is ours
    before = _status("VmRSS")
    if fused:
        loss, _ = fused_cross_entropy(h, w, None, y)
    else:
        loss = torch.nn.functional.cross_entropy((h @ w.t()).float(), y, reduction="sum")
    loss.backward()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
