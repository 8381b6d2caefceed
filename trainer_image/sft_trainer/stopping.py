"""SIGTERM as a flag that the ranks agree on at the end of a step."""

from __future__ import annotations

import signal


class StopFlag:
    """Set by SIGTERM. SIGINT is the launcher's business: a terminal sends it to every process at once."""

    def __init__(self) -> None:
        self.is_set = False

    @classmethod
    def on_sigterm(cls) -> StopFlag:
        flag = cls()
        signal.signal(signal.SIGTERM, flag.set)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return flag

    def set(self, number: int, frame: object) -> None:
        self.is_set = True
