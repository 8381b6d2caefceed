"""What the engine and the checkpoints agree on: training state as slices of whole parameters, whatever the sharding.

A parameter's state is three fp32 vectors as long as the flattened parameter, and Adam's step count. Each rank owns
some contiguous ranges of them; all ranks' ranges together cover every trainable parameter exactly once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

StateKey = Literal["master", "exp_avg", "exp_avg_sq"]
STATE_KEYS: tuple[StateKey, ...] = get_args(StateKey)


@dataclass(frozen=True)
class Piece:
    """The elements [start, start + count) of one flattened parameter, as one rank holds them.

    The tensors are flat fp32 views of the live state on the training device: copy what must outlive the next step.
    """

    name: str
    shape: tuple[int, ...]
    """The whole parameter's."""
    start: int
    tensors: Mapping[StateKey, Tensor]
    step: int
    """Adam's step count: the optimizer steps that the moments have seen."""

    @property
    def count(self) -> int:
        return self.tensors["master"].numel()


class StateSource(Protocol):
    """Something that holds the state of every parameter: a checkpoint, or a dictionary in a test."""

    def read(self, name: str, key: StateKey, start: int, stop: int) -> NDArray[np.float32]:
        """The elements [start, stop) of a flattened parameter's vector."""

    def adam_step(self, name: str) -> int:
        """Adam's step count for a parameter."""
