"""The gang as one rank sees it: who it is, on which device, and the one small collective of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray


@dataclass(frozen=True)
class Ranks:
    """This rank among all. `rank` counts over all nodes, `local_rank` on this one."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, values: Sequence[float]) -> NDArray[np.float64]:
        """The values of every rank as float64 of shape [world, len(values)], the same on each; collective."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        everyone = torch.empty(self.world * len(values), dtype=torch.float64, device=self.device)
        dist.all_gather_into_tensor(everyone, mine)
        return everyone.cpu().numpy().reshape(self.world, len(values))
