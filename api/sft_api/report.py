"""What the trainer answers while it goes on (`/progress`) and when it ends (the termination message)."""

from __future__ import annotations

from sft_api.base import ApiModel
from sft_api.status import CheckpointStatus, Count, ExportStatus, PhaseStatus, PlanStatus, Progress, Seconds, Text

TERMINATION_BYTES = 4096
"""What a kubelet keeps of a termination message."""


class TrainerReport(ApiModel):
    """How a gang is doing: the body of `/progress`, served by the first rank."""

    attempt: Count
    """Number under which this attempt writes to the store. Not the operator's count of attempts."""
    resumed_from_step: Count | None = None
    """Step of the checkpoint it went on from; none where it began anew."""
    phase: PhaseStatus | None = None
    """The phase being trained."""
    progress: Progress | None = None
    """None before the first step is about to be taken."""
    checkpoint: CheckpointStatus | None = None
    """The newest committed checkpoint."""
    checkpoint_problem: Text | None = None
    """What keeps the newest save from being committed; none where nothing does."""
    export: ExportStatus | None = None
    """The newest exported model."""
    productive_seconds: Seconds = 0.0
    """Wall time of the steps that still count, through all attempts: carried in the checkpoints."""
    complete: bool = False
    """All is trained, the final checkpoint committed and every export written."""


class Termination(ApiModel):
    """How a trainer's command ended: the termination message, at most TERMINATION_BYTES of JSON."""

    exit_code: int
    reason: str
    """The name of the exit code, as in `ExitCode`: Completed, Data, …"""
    message: Text
    """Why, in a sentence for a person."""
    rank: int | None = None
    """The rank that was the cause."""
    step: Count | None = None
    """Optimizer steps it had done."""
    checkpoint_step: Count | None = None
    """Step of the newest committed checkpoint."""
    report: TrainerReport | None = None
    """What the first rank last knew; on its pod alone."""
    plan: PlanStatus | None = None
    """What the preparation found; on its pod alone."""
