"""The state of a rank's random generators as plain bytes: python's, numpy's, torch's, and the device's."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import numpy as np
import torch


def capture_rng() -> dict[str, bytes]:
    """For `CheckpointWriter.save`, as part of `rank_state`."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "rng/python": json.dumps(random.getstate()).encode(),
        "rng/numpy": json.dumps([name, np.asarray(keys).tolist(), position, has_gauss, gauss]).encode(),
        "rng/torch": torch.get_rng_state().numpy().tobytes(),
    }
    if torch.cuda.is_available():
        state["rng/cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
    return state


def restore_rng(state: Mapping[str, bytes]) -> None:
    """Set the generators as `capture_rng` found them. The device's only where there is one, then and now."""
    version, internal, gauss = json.loads(state["rng/python"])
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, numpy_gauss = json.loads(state["rng/numpy"])
    np.random.set_state((name, np.array(keys, np.uint32), position, has_gauss, numpy_gauss))
    torch.set_rng_state(_bytes(state["rng/torch"]))
    if "rng/cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["rng/cuda"]))


def _bytes(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())
