"""Events of a small job, as its trainer would say them."""

from __future__ import annotations

import math

from sft_api.events import (
    CheckpointCommitted,
    Event,
    Exported,
    Finished,
    PhasePlan,
    PreparedMetrics,
    PreviewMessage,
    Started,
    StepMetrics,
    ValidationMetrics,
)

BEGIN = 1_760_000_000.0
SAMPLE = [
    PreviewMessage(text="<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n", trained=False),
    PreviewMessage(text="17 + 25 = 42.<|im_end|>", trained=True),
    PreviewMessage(text="\n", trained=False),
]


def step(number: int, phase: str = "instruct", **changes: object) -> StepMetrics:
    """Step `number`: 8 samples of 100 tokens in half a second, the loss falling from 3 to 1."""
    made = StepMetrics(
        step=number,
        phase=phase,
        epoch=1,
        loss=1 + 2 * math.exp(-number / 10),
        grad_norm=1 + math.exp(-number / 5),
        learning_rate=2e-5,
        samples=8 * number,
        tokens=800 * number,
        loss_tokens=300 * number,
        samples_digest=f"{number:016x}",
        seconds=0.5,
        tokens_per_second=1600.0,
        mfu=None,
        packing_efficiency=0.97,
        packing_bound=0.99,
        micro_batches=2,
        data_wait_seconds=0.001,
        checkpoint_stall_seconds=0.0,
        memory_bytes=1 << 30,
        time=BEGIN + 0.5 * number,
    )
    return made.model_copy(update=changes)


def steps(first: int, last: int, phase: str = "instruct") -> list[Event]:
    return [step(number, phase) for number in range(first, last + 1)]


def validation(number: int, loss: float, accuracy: float, phase: str = "instruct") -> ValidationMetrics:
    return ValidationMetrics(
        step=number,
        phase=phase,
        loss=loss,
        accuracy=accuracy,
        samples=40,
        loss_tokens=1500,
        seconds=0.4,
        time=BEGIN + 0.5 * number,
    )


def checkpoint(number: int, phase: str = "instruct") -> CheckpointCommitted:
    return CheckpointCommitted(
        step=number,
        phase=phase,
        uri=f"file://runs/job/ckpt/{number:08d}/1",
        bytes=123_456_789,
        seconds=1.5,
        stall_seconds=0.2,
        time=BEGIN + 0.5 * number,
    )


def prepared(phase: str = "instruct", **changes: object) -> PreparedMetrics:
    made = PreparedMetrics(
        phase=phase,
        fingerprint="9f3c2a11" * 8,
        reused=False,
        samples=400,
        tokens=40_000,
        loss_tokens=15_000,
        dropped={"NoLossTokens": 12, "Overlong": 3},
        truncated=4,
        seconds=2.5,
        preview=[SAMPLE, SAMPLE, SAMPLE],
    )
    return made.model_copy(update=changes)


def started(total_steps: int, attempt: int = 1, resumed_from_step: int | None = None) -> Started:
    half = total_steps // 2
    return Started(
        attempt=attempt,
        total_steps=total_steps,
        phases=[
            PhasePlan(name="instruct", samples=8 * half, epochs=1, steps=half),
            PhasePlan(name="skills", samples=8 * (total_steps - half), epochs=1, steps=total_steps - half),
        ],
        resumed_from_step=resumed_from_step,
        world_size=2,
        zero_stage=1,
        precision="FP32",
        attention="sample_sdpa",
        attention_reason="the fastest that passed the self-test",
        packing="Packed",
        parameters=12_345_678,
        device="CPU",
    )


def exported(number: int, phase: str) -> Exported:
    return Exported(phase=phase, step=number, uri=f"file://runs/job/export/{phase}", seconds=2.0)


def finished(code: int = 0, reason: str = "Completed", message: str = "trained 20 steps", **more: int) -> Finished:
    return Finished(exit_code=code, reason=reason, message=message, **more)


def whole_run() -> list[Event]:
    """A training of 20 steps in two phases, from Started to Finished."""
    return [
        started(20),
        validation(0, 3.1, 0.18),
        *steps(1, 10),
        checkpoint(10),
        *steps(11, 20, "skills"),
        validation(20, 1.3, 0.74, "skills"),
        checkpoint(20, "skills"),
        exported(20, "skills"),
        finished(),
    ]
