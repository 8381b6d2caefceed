"""The faults: what each does, when it may strike, and how the attempt may end that it strikes.

A fault that leaves the attempt running has to be ridden out: it ends nothing and costs nothing.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.chaos.gateway import Misbehaviour
from sft_api.run import ExitCode

if TYPE_CHECKING:
    from benchmarks.chaos.run import Attempt

KILLED = 128 + signal.SIGKILL
ASLEEP = -signal.SIGSTOP
"""Not an exit code: the attempt's processes are stopped, and it counts as ended until the next has begun."""
CORNER_BYTES, TOP_UP_SECONDS = 16_384, 0.02
TRANSIENT = 4
"""Requests that a passing fault of the store meets: fewer than the client's patience."""


@dataclass(frozen=True)
class Fault:
    """One way to disturb a run."""

    name: str
    strike: Callable[[Attempt, random.Random], bool]
    """Do it; whether there was anything to do it to."""
    ends_with: frozenset[int] = frozenset()
    """The exit codes that the attempt may end with; empty: it goes on."""
    between_attempts: bool = False
    """It strikes what is in the store while no attempt runs."""


def of(name: str, *ends_with: int, between_attempts: bool = False) -> Callable[[Callable[..., bool]], Fault]:
    def make(strike: Callable[[Attempt, random.Random], bool]) -> Fault:
        return Fault(name, strike, frozenset(map(int, ends_with)), between_attempts)

    return make


# ── processes ──────────────────────────────────────────────────────────────────────────────────────────────────────


@of("kill -9 of one rank", KILLED)
def kill_rank(attempt: Attempt, chance: random.Random) -> bool:
    ranks = attempt.ranks()
    if ranks:
        os.kill(chance.choice(ranks), signal.SIGKILL)
    return bool(ranks)


@of("kill -9 of all ranks", KILLED)
def kill_ranks(attempt: Attempt, chance: random.Random) -> bool:
    ranks = attempt.ranks()
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
    return bool(ranks)


@of("kill -9 of the launcher", -signal.SIGKILL)
def kill_launcher(attempt: Attempt, chance: random.Random) -> bool:
    attempt.process.kill()
    return True


@of("SIGTERM to the launcher", ExitCode.PREEMPTED)
def stop(attempt: Attempt, chance: random.Random) -> bool:
    attempt.process.terminate()
    return True


@of("SIGSTOP of one rank", ExitCode.HUNG)
def freeze_rank(attempt: Attempt, chance: random.Random) -> bool:
    ranks = attempt.ranks()
    if ranks:
        os.kill(chance.choice(ranks), signal.SIGSTOP)
    return bool(ranks)


@of("an attempt left for dead, which wakes beside the next", ASLEEP)
def leave_for_dead(attempt: Attempt, chance: random.Random) -> bool:
    return attempt.fall_asleep()


# ── the store, passing ─────────────────────────────────────────────────────────────────────────────────────────────


def passing(name: str, how: Misbehaviour) -> Fault:
    def strike(attempt: Attempt, chance: random.Random) -> bool:
        attempt.world.gateway.misbehave(how, chance.randint(1, TRANSIENT))
        return True

    return Fault(name, strike)


@of("the S3 server killed and started again")
def restart_server(attempt: Attempt, chance: random.Random) -> bool:
    attempt.world.server.kill()
    attempt.world.server.start()
    return True


# ── the store, for good ────────────────────────────────────────────────────────────────────────────────────────────


def lasting(name: str, how: Misbehaviour, *ends_with: int) -> Fault:
    def strike(attempt: Attempt, chance: random.Random) -> bool:
        attempt.world.gateway.misbehave(how, 1_000_000)
        return True

    return Fault(name, strike, frozenset(map(int, ends_with)))


@of("a full disk under the staging area", ExitCode.STORE_REFUSED)
def fill_staging(attempt: Attempt, chance: random.Random) -> bool:
    threading.Thread(target=keep_full, args=(attempt,), daemon=True).start()
    return True


def keep_full(attempt: Attempt) -> None:
    """Leave a corner until the attempt has ended; what the save under way gives back is taken too."""
    staging, size = attempt.world.staging, 0
    with (staging / "ballast").open("wb") as file:
        while attempt.process.poll() is None:
            if (more := shutil.disk_usage(staging).free - CORNER_BYTES) > 0:
                with contextlib.suppress(OSError):  # the attempt was faster
                    os.posix_fallocate(file.fileno(), size, more)
                    size += more
            threading.Event().wait(TOP_UP_SECONDS)


# ── what is in the store ───────────────────────────────────────────────────────────────────────────────────────────


@of("a flipped byte in a shard", between_attempts=True)
def flip_byte(attempt: Attempt, chance: random.Random) -> bool:
    shard = a_shard(attempt, chance)
    if shard is not None:
        body = bytearray(shard.read_bytes())
        body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
        shard.write_bytes(bytes(body))
    return shard is not None


@of("a truncated shard", between_attempts=True)
def truncate(attempt: Attempt, chance: random.Random) -> bool:
    shard = a_shard(attempt, chance)
    if shard is not None:
        os.truncate(shard, chance.randrange(shard.stat().st_size))
    return shard is not None


@of("a missing shard", between_attempts=True)
def remove_shard(attempt: Attempt, chance: random.Random) -> bool:
    shard = a_shard(attempt, chance)
    if shard is not None:
        shard.unlink()
    return shard is not None


@of("a manifest of another checkpoint", between_attempts=True)
def swap_manifest(attempt: Attempt, chance: random.Random) -> bool:
    newest = newest_checkpoint(attempt)
    if newest is not None:
        manifest = newest / "MANIFEST.json"
        manifest.write_text(manifest.read_text().replace('"step": ', '"step": 1'))
    return newest is not None


def newest_checkpoint(attempt: Attempt) -> Path | None:
    """The folder of the newest complete checkpoint: the S3 server keeps objects as files."""
    complete = [marker.parent for marker in attempt.world.folder.glob("ckpt/*/*/COMPLETE")]
    return max(complete, key=lambda folder: (int(folder.parent.name), int(folder.name)), default=None)


def a_shard(attempt: Attempt, chance: random.Random) -> Path | None:
    newest = newest_checkpoint(attempt)
    shards = [file for file in sorted(newest.glob("*.safetensors")) if file.stat().st_size] if newest else []
    return chance.choice(shards) if shards else None


FAULTS: Mapping[str, Fault] = {
    fault.name: fault
    for fault in (
        kill_rank,
        kill_ranks,
        kill_launcher,
        stop,
        freeze_rank,
        leave_for_dead,
        passing("500 from the store", Misbehaviour(500)),
        passing("503 slow down", Misbehaviour(503, "SlowDown")),
        passing("connections refused", Misbehaviour()),
        passing("answers lost", Misbehaviour(lose_the_answer=True)),
        passing("a store that takes its time", Misbehaviour(500, after_seconds=2.0)),
        restart_server,
        lasting(
            "a bucket that turns read-only", Misbehaviour(403, "AccessDenied", writes_only=True), ExitCode.STORE_REFUSED
        ),
        lasting("credentials that expire", Misbehaviour(403, "ExpiredToken"), ExitCode.STORE_REFUSED),
        lasting("a store that stays away", Misbehaviour(503, "ServiceUnavailable"), ExitCode.STORE_UNAVAILABLE),
        fill_staging,
        flip_byte,
        truncate,
        remove_shard,
        swap_manifest,
    )
}
