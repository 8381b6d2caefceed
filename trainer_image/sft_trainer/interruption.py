"""SIGTERM before there are ranks: the command ends with exit code 30, whatever it waits for.

What waits in a library's own code, as for a store that does not answer, is not interrupted by python's signal
handlers. So a thread hears of the signal as well, and ends the process where that has not ended by itself.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sft_api.run import ExitCode, RunError
from sft_trainer.ending import Outcome

PATIENCE_SECONDS = 5.0
MESSAGE = "told to stop before the training began; run again to go on"


@contextmanager
def interruptible(finish: Callable[[Outcome], None]) -> Iterator[None]:
    """Inside, where `raise_preempted` does not help in time, `finish` is called and the process ends."""
    heard, told = os.pipe()
    os.set_blocking(told, False)
    over = threading.Event()
    threading.Thread(target=insist, args=(heard, over, finish), name="interruption", daemon=True).start()
    before = signal.set_wakeup_fd(told)
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(told)


def raise_preempted(number: int, frame: object) -> None:
    """The handler of SIGTERM."""
    raise RunError(ExitCode.PREEMPTED, MESSAGE)


def insist(heard: int, over: threading.Event, finish: Callable[[Outcome], None]) -> None:
    while numbers := os.read(heard, 1):
        if numbers[0] == signal.SIGTERM and not over.wait(PATIENCE_SECONDS):
            finish(Outcome(ExitCode.PREEMPTED, MESSAGE))
            os._exit(ExitCode.PREEMPTED)
    os.close(heard)
