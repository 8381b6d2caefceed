"""The launcher's watch over its ranks: one that stays too long at one thing hangs, and shows its stacks first."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sft_trainer.heartbeat import Beat, read_beat

STACKS_SIGNAL = signal.SIGUSR1
STOPPED = "T"
"""State of a process that a signal has stopped, as in /proc/<pid>/stat."""

Ranks = Mapping[int, "subprocess.Popen[bytes]"]


@dataclass(frozen=True)
class Hang:
    """What a rank does not come to the end of."""

    rank: int
    beat: Beat
    message: str


def find_hang(ranks: Ranks, work: Path, timeout: float) -> Hang | None:
    """The rank that has been at one thing for the longest, if that is too long; any that is stopped before others.

    What may take longer than the time-out, as the wait for a commit, may do so only while the process runs.
    """
    now = time.monotonic()
    beats = {
        rank: beat for rank, process in ranks.items() if process.poll() is None and (beat := read_beat(work, rank))
    }
    late = [rank for rank, beat in beats.items() if now - beat.since > timeout]
    stopped = {rank for rank in beats if is_stopped(ranks[rank])} if late else set()
    overdue = [rank for rank in late if rank in stopped or now - beats[rank].since > beats[rank].patience]
    if not overdue:
        return None
    rank = min(stopped or overdue, key=lambda rank: beats[rank].since)
    beat = beats[rank]
    limit = timeout if rank in stopped else max(timeout, beat.patience)
    why = "; its process is stopped (SIGSTOP)" if rank in stopped else ""
    message = (
        f"{beat.stage} has not ended within {limit:,.0f} s on rank {rank}{why}. The stacks of this machine's ranks"
        " are in the log; spec.lifecycle.hangTimeoutSeconds must be longer than the longest step, validation or export"
    )
    return Hang(rank, beat, message)


def tell_stacks(ranks: Ranks, work: Path, seconds: float) -> None:
    """Write the stacks of all threads of all ranks into the log; they have so many seconds to show them."""
    alive = {rank: process for rank, process in ranks.items() if process.poll() is None}
    for process in alive.values():
        process.send_signal(STACKS_SIGNAL)
        if is_stopped(process):
            process.send_signal(signal.SIGCONT)  # it hears nothing else; the stacks come before it does anything
    threading.Event().wait(seconds)
    for rank, process in alive.items():
        beat, file = read_beat(work, rank), stacks_file(work, rank)
        at = f", at {beat.stage} for {time.monotonic() - beat.since:,.0f} s" if beat else ""
        stacks = file.read_text(errors="replace") if file.exists() else ""
        shown = stacks or "it does not show its stacks"
        print(f"── rank {rank} (process {process.pid}){at}\n{shown}", file=sys.stderr, flush=True)


def stacks_file(work: Path, rank: int) -> Path:
    return work / f"stacks-{rank}.txt"


def is_stopped(process: subprocess.Popen[bytes]) -> bool:
    try:
        after_name = Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2]
    except OSError:
        return False
    return after_name[:1] == STOPPED
