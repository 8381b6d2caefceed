"""A process that ends with the one that started it, however that ends: an orphan would go on beside a new attempt."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>: which signal the kernel sends when the parent is gone. It reaches stopped processes as well."""


def end_with(parent: int) -> None:
    """From now on this process is killed when `parent` ends, which started it from its main thread.

    On Linux; elsewhere only one whose parent is gone already ends.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGKILL)
