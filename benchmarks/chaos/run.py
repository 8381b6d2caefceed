"""Driving a run through its faults: attempts as real processes, one after another, until the run is complete."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.chaos.faults import ASLEEP, FAULTS, Fault
from benchmarks.chaos.gateway import Gateway
from sft_api.events import EVENT, Event, Finished, Started, StepMetrics
from sft_api.run import ExitCode
from tests.s3 import S3Server

LONGEST_ATTEMPT_SECONDS = 240.0
POLL_SECONDS = 0.2
SMALLEST_PIPE_BYTES = 4096
OVERTAKEN = frozenset(
    (
        ExitCode.CONFIGURATION,  # its commit is refused
        ExitCode.HUNG,  # its launcher takes the time asleep for a hang
        ExitCode.COMPLETED,  # the later one had completed the run before this one looked where to go on
        ExitCode.STORE_REFUSED,  # what is done to the store of the later one meanwhile
        ExitCode.STORE_UNAVAILABLE,
    )
)
"""How an attempt may end that wakes beside a later one."""
MOST_STEPS, MOST_WRITES, LONGEST_DELAY_SECONDS = 6, 30, 12.0
"""How far into an attempt a fault strikes at the latest, by each of the clocks."""
LAST_STEP = 12
"""How many steps later it strikes at the latest, whatever the clock."""


@dataclass(frozen=True)
class World:
    """Where a run happens. `folder` is what the S3 server shows as the job's checkpoints.uri."""

    server: S3Server
    gateway: Gateway
    run_json: Path
    folder: Path
    staging: Path
    processes: int

    @property
    def environment(self) -> dict[str, str]:
        return (
            os.environ
            | self.server.environment
            | {
                "AWS_ENDPOINT_URL": self.gateway.endpoint,
                "SFT_STORE_RETRY_SECONDS": "10",
                "SFT_STAGING": str(self.staging),
                "SFT_LOG_FORMAT": "json",
                "OMP_NUM_THREADS": "1",
            }
        )


@dataclass
class Attempt:
    """One start of the trainer's launcher, and what it has said."""

    world: World
    process: subprocess.Popen[bytes]
    events: list[Event] = field(default_factory=list)
    on_start: Callable[[], None] = lambda: None
    on_step: Callable[[int], None] = lambda number: None
    steps: int = 0
    asleep: list[int] = field(default_factory=list)
    """Its processes, where they are stopped."""

    @classmethod
    def start(cls, world: World, log: Path) -> Attempt:
        command = [sys.executable, "-m", "sft_trainer", "train", str(world.run_json)]
        with log.open("a") as errors:
            process = subprocess.Popen(
                [*command, "--processes", str(world.processes)],
                env=world.environment,
                bufsize=0,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        assert process.stdout is not None
        # Steps take milliseconds: with room for more than a few, the run would be far ahead of what we hear of it.
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, SMALLEST_PIPE_BYTES)
        attempt = cls(world, process)
        threading.Thread(target=attempt._listen, daemon=True).start()
        return attempt

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = EVENT.validate_json(line)
            self.events.append(event)
            if isinstance(event, Started):
                self.on_start()
            if isinstance(event, StepMetrics):
                self.steps += 1
                self.on_step(self.steps)

    def ranks(self) -> list[int]:
        """Process ids of the ranks that run."""
        return [pid for pid in descendants(self.process.pid) if b"sft_trainer\0rank" in command_line(pid)]

    def fall_asleep(self) -> bool:
        """Stop all its processes, as on a machine that nobody hears of any more; False where it has no ranks yet."""
        if ranks := self.ranks():
            self.asleep = [self.process.pid, *ranks]
            for pid in self.asleep:
                os.kill(pid, signal.SIGSTOP)
        return bool(ranks)

    def wake(self) -> None:
        for pid in self.asleep:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.asleep = []

    def end(self) -> int:
        """The exit code, or ASLEEP; an attempt that takes too long is ended, and that is an error."""
        deadline = time.monotonic() + LONGEST_ATTEMPT_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(POLL_SECONDS)
            if self.asleep:
                return ASLEEP
        for pid in [*self.ranks(), self.process.pid]:
            os.kill(pid, signal.SIGKILL)
        raise Hung(f"the attempt did not end within {LONGEST_ATTEMPT_SECONDS:.0f} s")

    @property
    def words(self) -> str:
        return next((event.message for event in self.events if isinstance(event, Finished)), "")

    @property
    def resumed_from(self) -> int:
        return next((event.resumed_from_step or 0 for event in self.events if isinstance(event, Started)), 0)


class Hung(Exception):
    """An attempt did not end."""


def descendants(pid: int) -> Iterator[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in map(int, children):
        yield child
        yield from descendants(child)


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@dataclass
class Log:
    """What was done, and what became of it."""

    struck: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    instants: list[dict[str, object]] = field(default_factory=list)
    wrong_ends: list[str] = field(default_factory=list)
    attempts: int = 0

    @property
    def faults(self) -> int:
        return sum(self.struck.values())

    def add(self, fault: Fault, when: str) -> None:
        self.struck[fault.name] += 1
        self.instants.append({"fault": fault.name, "attempt": self.attempts, "when": when})


def disturb(world: World, faults: int, chance: random.Random, names: list[str], log_file: Path) -> Log:
    """Run until complete, struck by `faults` faults of those named, in an order and at instants drawn from `chance`."""
    log = Log()
    deck = Deck(names, chance)
    sleeper: Attempt | None = None
    while True:
        log.attempts += 1
        world.gateway.begin()
        (world.staging / "ballast").unlink(missing_ok=True)
        fault = draw_between_attempts(deck, log, faults, world, chance, log_file)
        attempt = Attempt.start(world, log_file)
        if sleeper is not None:
            attempt.on_start = sleeper.wake
        strikes = Strikes(attempt, fault, deck, chance, log, faults)
        strikes.arm()
        code = attempt.end()
        log.codes[code] += 1
        judge(attempt, code, strikes, log)
        if sleeper is not None:
            sleeper.wake()  # should the next never have begun
            judge_overtaken(sleeper, sleeper.end(), log)
        sleeper = attempt if code == ASLEEP else None
        if code == 0:
            return log


class Deck:
    """The faults in an order by chance, each as often as the others."""

    def __init__(self, names: list[str], chance: random.Random):
        self._names, self._chance = names, chance
        self._left: list[str] = []

    def draw(self) -> Fault:
        if not self._left:
            self._left = self._chance.sample(self._names, len(self._names))
        return FAULTS[self._left.pop()]


def draw_between_attempts(
    deck: Deck, log: Log, faults: int, world: World, chance: random.Random, log_file: Path
) -> Fault | None:
    """Strike with what strikes while nothing runs; the first other fault is for the attempt. None: none is left."""
    while log.faults < faults:
        fault = deck.draw()
        if not fault.between_attempts:
            return fault
        nobody = Attempt(world, subprocess.Popen(["true"]))
        nobody.process.wait()
        if fault.strike(nobody, chance):
            log.add(fault, "between attempts")
    return None


class Strikes:
    """The faults of one attempt: the next is armed when one was ridden out."""

    def __init__(self, attempt: Attempt, fault: Fault | None, deck: Deck, chance: random.Random, log: Log, faults: int):
        self.attempt, self.fault, self.deck, self.chance, self.log, self.faults = (
            attempt, fault, deck, chance, log, faults,
        )  # fmt: skip
        self.last: Fault | None = None
        self._lock = threading.Lock()

    def arm(self) -> None:
        """Draw the instant: at a step's end, at a write to the store, or after some seconds, and not many steps on."""
        if self.fault is None:
            return
        clock = self.chance.choice(("step", "write", "seconds"))
        due_step = self.attempt.steps + (self.chance.randint(1, MOST_STEPS) if clock == "step" else LAST_STEP)
        self.attempt.on_step = lambda number: self._strike(f"step {number}") if number >= due_step else None
        if clock == "write":
            gateway = self.attempt.world.gateway
            due = gateway.writes + self.chance.randint(1, MOST_WRITES)
            gateway.on_write = lambda number: self._strike(f"write {number}") if number == due else None
        elif clock == "seconds":
            delay = self.chance.uniform(0, LONGEST_DELAY_SECONDS)
            timer = threading.Timer(delay, self._strike, (f"{delay:.1f} s",))
            timer.daemon = True
            timer.start()

    def _strike(self, when: str) -> None:
        with self._lock:
            fault, self.fault = self.fault, None
            if fault is None or self.attempt.process.poll() is not None or self.log.faults >= self.faults:
                return
            struck = fault.strike(self.attempt, self.chance)
            if struck:
                self.last = fault
                self.log.add(fault, when)
            if not (struck and fault.ends_with):
                self.fault = next_that_runs(self.deck) if self.log.faults < self.faults else None
                self.arm()


def next_that_runs(deck: Deck) -> Fault:
    """The next fault that strikes a running attempt."""
    fault = deck.draw()
    while fault.between_attempts:
        fault = deck.draw()
    return fault


def judge(attempt: Attempt, code: int, strikes: Strikes, log: Log) -> None:
    """An attempt may end complete, or as the fault that struck it last says; anything else is wrong."""
    allowed = {0} | (strikes.last.ends_with if strikes.last else frozenset())
    if code not in allowed:
        struck = strikes.last.name if strikes.last else "nothing"
        log.wrong_ends.append(f"attempt {log.attempts}, struck by {struck}, ended with {code}: {attempt.words}")


def judge_overtaken(attempt: Attempt, code: int, log: Log) -> None:
    """An attempt that woke beside a later one finds out and ends."""
    log.codes[code] += 1
    if code not in OVERTAKEN:
        log.wrong_ends.append(f"an attempt that was overtaken ended with {code}: {attempt.words}")


def processes_of(folder: Path) -> list[int]:
    """Of all attempts whose run.json is in `folder`."""
    running = (int(entry.name) for entry in Path("/proc").glob("[0-9]*"))
    return [pid for pid in running if b"sft_trainer\0" in (line := command_line(pid)) and str(folder).encode() in line]


def wait_until_quiet(folder: Path) -> None:
    """Return when no process of an earlier attempt runs."""
    deadline = time.monotonic() + 60
    while processes_of(folder):
        assert time.monotonic() < deadline, "ranks of an earlier attempt are still alive"
        threading.Event().wait(POLL_SECONDS)


def as_json(log: Log) -> dict[str, object]:
    return {
        "struck": dict(sorted(log.struck.items())),
        "exitCodes": {str(code): count for code, count in sorted(log.codes.items())},
        "attempts": log.attempts,
        "wrongEnds": log.wrong_ends,
        "instants": json.loads(json.dumps(log.instants)),
    }
