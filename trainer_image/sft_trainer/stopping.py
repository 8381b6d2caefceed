"""SIGTERM as a flag, and as something that all ranks of the gang know alike."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Protocol

from sft_api.run import ExitCode, RunError

if TYPE_CHECKING:  # the launcher does without torch
    import numpy as np
    from numpy.typing import NDArray

    from sft_trainer.ranks import Ranks


class Flag(Protocol):
    """Whether this rank was told to stop."""

    @property
    def is_set(self) -> bool: ...


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


class Stopping:
    """Whether any rank was told to stop, the same on all ranks and for good: once agreed, it stays so."""

    def __init__(self, flag: Flag, ranks: Ranks):
        self._flag, self._ranks = flag, ranks
        self.is_agreed = False

    @property
    def mine(self) -> bool:
        """Whether this rank was told, for a collective that is made anyway."""
        return self._flag.is_set

    def hear(self, everyone: NDArray[np.float64]) -> bool:
        """Take in what each rank was told."""
        self.is_agreed = self.is_agreed or bool(everyone.any())
        return self.is_agreed

    def agree(self) -> bool:
        """Ask all ranks; collective."""
        return self.hear(self._ranks.gather([self.mine]))

    def before_training(self) -> None:
        """Ask all ranks and end where one was told; collective. For where nothing is to be saved yet."""
        if self.agree():
            raise RunError(ExitCode.PREEMPTED, "told to stop before a step was taken; run again to go on")
