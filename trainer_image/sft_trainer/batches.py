"""From a position in the schedule to tensors: which samples a step holds, who computes them, one step ahead.

The samples of a step are a pure function of (seed, phase, epoch, step); the number of ranks decides who computes what
and nothing else. Every rank makes the same plan from lengths alone, without communication.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from sft_trainer.plan import Packer, StepPlan, permutation, samples_digest
from sft_trainer.prepare import Dataset
from sft_trainer.split import PhaseData

IGNORED = -100
"""The label of a token that bears no loss."""

MicroBatch = dict[str, object]
"""Keyword arguments of `PackedLM.forward`."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step holds, and one rank's share of it."""

    epoch: int
    """Pass over the phase's data, from 0."""
    num_samples: int
    num_tokens: int
    num_loss_tokens: int
    """Loss-bearing tokens of the whole step, over all ranks: what the loss is divided by."""
    squared_lengths: int
    """Σ l² over the step's samples, for the count of FLOPs."""
    digest: str
    plan: StepPlan
    mine: list[MicroBatch]
    """This rank's micro-batches, on the CPU until the loader hands the step out."""
    wait_seconds: float = 0.0
    """How long the loop waited for the step."""


class StepLoader:
    """The steps of one phase from a position on, each prepared while the one before it is computed."""

    def __init__(self, data: PhaseData, packer: Packer, rank: int, device: torch.device, seed: int, phase: int):
        self.data, self.packer, self.rank, self.device = data, packer, rank, device
        self.seed, self.phase = seed, phase
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def steps(self, epoch: int, step: int, epochs: int, steps_per_epoch: int) -> Iterator[Step]:
        """Yield the phase's steps from (epoch, step) on. A seek: nothing before the position is read."""
        positions = [(e, s) for e in range(epoch, epochs) for s in range(step if e == epoch else 0, steps_per_epoch)]
        with ThreadPoolExecutor(1, "next-step") as ahead:
            pending = None
            for index, position in enumerate(positions):
                asked = time.perf_counter()
                prepared = (pending or ahead.submit(self._prepare, *position)).result()
                if index + 1 < len(positions):
                    pending = ahead.submit(self._prepare, *positions[index + 1])
                mine = [to_device(micro_batch, self.device) for micro_batch in prepared.mine]
                yield replace(prepared, mine=mine, wait_seconds=time.perf_counter() - asked)

    def _prepare(self, epoch: int, step: int) -> Step:
        if self._order[0] != epoch:  # a permutation serves the whole epoch
            self._order = (epoch, permutation(len(self.data.samples), self.seed, self.phase, epoch))
        size = self.data.effective_batch_size
        samples = self.data.samples[self._order[1][step * size : (step + 1) * size]]
        dataset = self.data.dataset
        lengths = dataset.lengths[samples]
        plan = self.packer.plan(lengths, self.data.capacity)
        return Step(
            epoch=epoch,
            num_samples=len(samples),
            num_tokens=int(lengths.sum(dtype=np.int64)),
            num_loss_tokens=int(dataset.num_loss_tokens[samples].sum(dtype=np.int64)),
            squared_lengths=int(np.square(lengths, dtype=np.int64).sum()),
            digest=samples_digest(dataset.content[samples]),
            plan=plan,
            mine=micro_batches(dataset, samples, plan, self.rank, self.packer.padded),
        )


def micro_batches(
    dataset: Dataset, samples: NDArray[np.int64], plan: StepPlan, rank: int, padded: bool
) -> list[MicroBatch]:
    """One rank's micro-batches of a plan, as CPU tensors; an empty one becomes a dummy without loss."""
    make = padded_batch if padded else packed_batch
    batches = []
    for positions in plan.micro_batches[rank]:
        members = [dataset.tokens(int(index)) for index in samples[positions]]
        batches.append(make(members or [DUMMY]))
    return batches


DUMMY = (np.zeros(2, np.int32), np.zeros(2, np.bool_))
"""A sample without loss, for a rank that has none: every rank must take part in every micro-batch."""

Sample = tuple[NDArray[np.int32], NDArray[np.bool_]]


def shifted_labels(ids: NDArray[np.int32], is_target: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Labels such that position i is scored against token i + 1 of the same sample; the last position has none."""
    labels = np.full(len(ids), IGNORED, np.int64)
    labels[:-1] = np.where(is_target[1:], ids[1:], IGNORED)
    return labels


def packed_batch(members: list[Sample]) -> MicroBatch:
    """Samples side by side, without padding: tensors of shape [1, T], positions that restart, explicit boundaries."""
    lengths = [len(ids) for ids, _ in members]
    ids = np.concatenate([ids for ids, _ in members]).astype(np.int64)
    labels = np.concatenate([shifted_labels(*member) for member in members])
    positions = np.concatenate([np.arange(length) for length in lengths])
    boundaries = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "labels": torch.from_numpy(labels)[None],
        "cu_seq_lens": torch.from_numpy(boundaries),
        "lengths": lengths,
        "max_length": max(lengths),
    }


def padded_batch(members: list[Sample]) -> MicroBatch:
    """Samples in rows, padded on the right: tensors of shape [n, L], with an attention mask."""
    longest = max(len(ids) for ids, _ in members)
    ids = np.zeros((len(members), longest), np.int64)
    labels = np.full((len(members), longest), IGNORED, np.int64)
    mask = np.zeros((len(members), longest), np.int64)
    for row, member in enumerate(members):
        length = len(member[0])
        ids[row, :length], labels[row, :length], mask[row, :length] = member[0], shifted_labels(*member), 1
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.arange(longest).expand(len(members), -1),
        "labels": torch.from_numpy(labels),
        "attention_mask": torch.from_numpy(mask),
    }


def to_device(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    if device.type == "cpu":
        return micro_batch
    return {
        key: value.pin_memory().to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in micro_batch.items()
    }
