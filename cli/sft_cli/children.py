"""The trainer's processes: start them, hand on what they say, stop them once gently, twice at once. Knows no events."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import FrameType, TracebackType
from typing import IO, Self

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a polite kill, and a terminal that is closed."""
POLL_SECONDS = 0.2
LINGER_SECONDS = 5.0
"""How long output is awaited after a child has ended: a process that it left behind may hold the pipe open."""


@dataclass(frozen=True)
class Line:
    text: str


@dataclass(frozen=True)
class EndOfOutput:
    pass


@dataclass(frozen=True)
class StopAsked:
    pass


class Children:
    """Runs commands one after another; while it is entered, it owns this process's stop signals.

    The first stop signal is passed on as SIGTERM to the running child, which commits a checkpoint and ends; the second
    kills the child and all its descendants. A child runs in a session of its own, so that the terminal's Ctrl-C comes
    to it once: through here.
    """

    def __init__(self, log: IO[bytes], on_line: Callable[[str], None], on_stop: Callable[[int], None]):
        """`log` takes the children's stderr; `on_stop` is told the number of the stop signal: 1, 2, …"""
        self._log, self._on_line, self._on_stop = log, on_line, on_stop
        self._inbox: SimpleQueue[Line | EndOfOutput | StopAsked] = SimpleQueue()
        self._child: subprocess.Popen[str] | None = None
        self._previous: dict[signal.Signals, object] = {}
        self.stops = 0

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child is not None and self._child.poll() is None:
            kill_tree(self._child.pid)
            self._child.wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def run(self, command: Sequence[str], environment: dict[str, str]) -> int:
        """Run `command` to its end and return its exit code, 128 + n where signal n ended it."""
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | environment,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._child = child
        assert child.stdout is not None
        threading.Thread(target=self._read, args=(child.stdout,), name="trainer-output", daemon=True).start()
        self._attend(child)
        return child.returncode if child.returncode >= 0 else 128 - child.returncode

    def _read(self, output: IO[str]) -> None:
        with output:
            for line in output:
                self._inbox.put(Line(line.rstrip("\n")))
        self._inbox.put(EndOfOutput())

    def _attend(self, child: subprocess.Popen[str]) -> None:
        """Hand on lines and stop signals until the child has ended and its output is read."""
        ended, lingered = False, 0.0
        while not (ended and child.poll() is not None) and lingered < LINGER_SECONDS:
            try:
                item = self._inbox.get(timeout=POLL_SECONDS)
            except Empty:
                lingered += POLL_SECONDS if child.poll() is not None else 0.0
                continue
            match item:
                case Line(text):
                    self._on_line(text)
                case StopAsked():
                    self._stop(child)
                case EndOfOutput():
                    ended = True

    def _stop(self, child: subprocess.Popen[str]) -> None:
        self.stops += 1
        self._on_stop(self.stops)
        if child.poll() is not None:
            return
        if self.stops == 1:
            child.send_signal(signal.SIGTERM)
        else:
            kill_tree(child.pid)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._inbox.put(StopAsked())  # put is re-entrant; whatever else there is to do is done outside the handler


def kill_tree(pid: int) -> None:
    """SIGKILL to the process and its descendants, also those in sessions of their own (the ranks)."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        root.suspend()  # it starts no new ones meanwhile
        for process in [*root.children(recursive=True), root]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
