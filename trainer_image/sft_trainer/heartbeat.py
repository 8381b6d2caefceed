"""A rank's sign of life: what it is at and since when, in a small file that its machine's launcher reads.

The clock is the machine's monotonic one, the same for all its processes.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from pydantic import BaseModel, ValidationError

BYTES = 512
"""Size of the file. It is written in place, so that a full disk cannot keep a rank from saying that it lives."""
JOINING = "joining the gang"
"""Until the ranks have met; whoever waits there cannot hear that it should stop."""


class Beat(BaseModel):
    """What a rank is at."""

    stage: str
    """As in "rank 3 has been at step 17 for 1,800 s"."""
    since: float
    patience: float
    """Seconds that it may take in any case, whatever the hang time-out."""


class Heartbeat:
    """Written by one rank, at the start of each step and of everything else that may take long."""

    def __init__(self, work: Path, rank: int):
        work.mkdir(parents=True, exist_ok=True)
        self._file = os.open(heartbeat_file(work, rank), os.O_WRONLY | os.O_CREAT, 0o644)

    def beat(self, stage: str, patience: float = 0.0) -> None:
        text = Beat(stage=stage[:200], since=time.monotonic(), patience=patience).model_dump_json()
        os.pwrite(self._file, text.encode()[:BYTES].ljust(BYTES), 0)

    def close(self) -> None:
        os.close(self._file)


def heartbeat_file(work: Path, rank: int) -> Path:
    return work / f"heartbeat-{rank}"


def read_beat(work: Path, rank: int) -> Beat | None:
    """The rank's newest beat; none where it is being written at this moment."""
    try:
        return Beat.model_validate_json(heartbeat_file(work, rank).read_bytes())
    except ValidationError:
        return None
