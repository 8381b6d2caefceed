"""The cluster's processes: each in a session of its own, recorded by pid and start time, killed by that record only.

The record outlives this Python: `make cluster-down` ends what `make cluster` started. A pid that has since been given
to another process has another start time and is left alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import Event

POLL_SECONDS = 0.02
END_SECONDS = 20.0
LOG_TAIL = 3000


def start_time(pid: int) -> int | None:
    """When the process began, in ticks since boot; None where there is none, or only its exit status is left."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name before may hold spaces and parentheses
    return None if state in "ZX" else int(fields[18])


class Processes:
    """What runs for one cluster; `state/pids` has a file for each, `state/logs` what it said."""

    def __init__(self, state: Path) -> None:
        self._pids = state / "pids"
        self._logs = state / "logs"
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        """Begin; what it prints goes to its log."""
        self._logs.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("ab") as log:
            child = subprocess.Popen(
                [str(part) for part in command],
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us: what we started is ended in order
            )
        self._children[name] = child
        self.record(name, child.pid)

    def record(self, name: str, pid: int) -> None:
        """Have a process that somebody else started ended with the others."""
        self._pids.mkdir(parents=True, exist_ok=True)
        (self._pids / name).write_text(json.dumps({"pid": pid, "start_time": start_time(pid)}))

    def pid(self, name: str) -> int | None:
        """The pid of the process that was recorded, if it is still that process."""
        try:
            recorded = json.loads((self._pids / name).read_text())
        except FileNotFoundError:
            return None
        pid = int(recorded["pid"])
        return pid if recorded["start_time"] is not None and start_time(pid) == recorded["start_time"] else None

    def recorded(self) -> list[str]:
        return sorted(path.name for path in self._pids.glob("*"))

    def kill(self, names: Iterable[str]) -> None:
        """kill -9, and return when they are gone."""
        names = list(names)
        pids = {name: pid for name in names if (pid := self.pid(name))}
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        for name in names:
            if child := self._children.pop(name, None):
                child.wait(END_SECONDS)
        for name in pids:
            self._await_end(name)
        for name in names:
            (self._pids / name).unlink(missing_ok=True)

    def log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def log_tail(self, name: str) -> str:
        path = self.log(name)
        return path.read_text(errors="replace")[-LOG_TAIL:] if path.exists() else ""

    def _await_end(self, name: str) -> None:
        waited = 0.0
        while self.pid(name) is not None:
            assert waited < END_SECONDS, f"{name} does not end: {self.log_tail(name)}"
            Event().wait(POLL_SECONDS)
            waited += POLL_SECONDS
