"""How a run speaks: events as JSON lines for a program, as sentences for a person; nothing else on stdout."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from sft_api.events import (
    CheckpointCommitted,
    Event,
    Exported,
    Finished,
    Message,
    PreparedMetrics,
    PrepareProgress,
    Started,
    StepMetrics,
    ValidationMetrics,
)

_claimed: TextIO | None = None


def claim_stdout() -> None:
    """Keep stdout for events: whatever else this process or its libraries print goes to stderr from now on."""
    global _claimed
    if _claimed is None:
        _claimed = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        os.dup2(2, 1)


def event_stream() -> int:
    """File descriptor of the events, for processes that speak for this one."""
    return (_claimed or sys.stdout).fileno()


def say(event: Event) -> None:
    """Print one event. A reader that has gone away does not end the run."""
    line = event.model_dump_json(by_alias=True) if os.environ.get("SFT_LOG_FORMAT") == "json" else sentence(event)
    out = _claimed or sys.stdout
    try:
        out.write(line + "\n")  # one write: other threads speak as well
        out.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def sentence(event: Event) -> str:
    """The event as one line for a person who reads a log."""
    match event:
        case StepMetrics():
            return (
                f"step {event.step} · {event.phase} epoch {event.epoch} · loss {event.loss:.4f}"
                f" · gradient norm {event.grad_norm:.3f} · learning rate {event.learning_rate:.2e}"
                f" · {event.tokens_per_second:,.0f} tokens/s · packing {event.packing_efficiency:.1%}"
            )
        case ValidationMetrics():
            return f"step {event.step} · held-out loss {event.loss:.4f} · token accuracy {event.accuracy:.1%}"
        case PrepareProgress():
            share = "" if event.fraction is None else f" ({event.fraction:.0%})"
            return f"preparing {event.phase}: {event.samples:,} samples{share}"
        case PreparedMetrics():
            dropped = "".join(f", {count:,} dropped: {reason}" for reason, count in event.dropped.items())
            verb = "found prepared" if event.reused else "prepared"
            return (
                f"{verb} {event.phase}: {event.samples:,} samples, {event.tokens:,} tokens,"
                f" {event.loss_tokens:,} with loss{dropped}, {event.truncated:,} truncated"
            )
        case Started():
            resumed = "" if event.resumed_from_step is None else f" from step {event.resumed_from_step}"
            return (
                f"attempt {event.attempt}: {event.total_steps:,} steps{resumed} on {event.world_size} × {event.device},"
                f" ZeRO {event.zero_stage}, {event.precision}, {event.packing}, attention {event.attention}"
                f" ({event.attention_reason}), {event.parameters:,} parameters"
            )
        case CheckpointCommitted():
            return f"step {event.step} · checkpoint committed at {event.uri} ({event.bytes / 1e6:,.1f} MB)"
        case Exported():
            return f"step {event.step} · model of phase {event.phase} exported to {event.uri}"
        case Message():
            return f"{event.level}: {event.text}"
        case Finished():
            return f"{event.reason} (exit code {event.exit_code}): {event.message}"
