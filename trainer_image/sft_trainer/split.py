"""Which prepared samples a job trains on, phase by phase, and which it holds out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sft_api.run import RunConfig
from sft_trainer.preparation import cache_folder, data_store
from sft_trainer.prepare import Dataset, PreparedJob, held_out_samples, training_samples


@dataclass(frozen=True)
class PhaseData:
    """The samples of one phase: indices into its prepared data set, in file order."""

    dataset: Dataset
    samples: NDArray[np.int64]
    effective_batch_size: int
    capacity: int


@dataclass(frozen=True)
class HeldOut:
    """Samples of one data set that are never trained on."""

    dataset: Dataset
    samples: NDArray[np.int64]


def open_data(config: RunConfig, prepared: PreparedJob) -> tuple[list[PhaseData], list[HeldOut]]:
    """The samples to train on, a phase at a time, and those held out."""
    store, cache = data_store(config), cache_folder() / "data"
    datasets = {name: Dataset.open(store, name, cache) for name in prepared.summaries}
    fraction = config.validation.fraction if config.validation else None
    data = []
    for phase, fingerprint in zip(config.phases, prepared.phases, strict=True):
        dataset = datasets[fingerprint]
        samples = training_samples(dataset, fraction, config.seed, phase.lengths)
        data.append(PhaseData(dataset, samples, phase.batch.effective_batch_size, phase.batch.max_tokens_per_gpu))
    if fraction is not None:
        return data, [HeldOut(one, held_out_samples(one, fraction, config.seed)) for one in datasets.values()]
    if prepared.validation is not None:
        dataset = datasets[prepared.validation]
        return data, [HeldOut(dataset, np.arange(len(dataset)))]
    return data, []
