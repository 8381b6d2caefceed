"""Samples as a person can check them: decoded, in stretches that are trained on and stretches that are not."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sft_api.events import PreviewMessage
from sft_trainer.prepare.samples import Sample, unpack_mask

NUM_SAMPLES = 3
MAX_CHARACTERS = 4_000
"""Longer stretches lose their middle."""


class Decoder(Protocol):
    """What a tokenizer does for a preview."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class Previewer:
    """Keeps three samples of a stream, those with the smallest content hashes: as good as random, always the same."""

    def __init__(self) -> None:
        self._kept: dict[int, Sample] = {}

    def consider(self, batch: pa.RecordBatch) -> None:
        """Look at a record batch of pool.SCHEMA."""
        contents = batch.column("content").to_numpy()
        for row in np.argsort(contents)[:NUM_SAMPLES]:
            ids = batch.column("input_ids")[int(row)].values.to_numpy().copy()
            mask = unpack_mask(batch.column("loss_mask")[int(row)].as_buffer(), len(ids))
            self._kept[int(contents[row])] = Sample(ids, mask)
        self._kept = dict(sorted(self._kept.items())[:NUM_SAMPLES])

    def preview(self, decoder: Decoder) -> list[list[PreviewMessage]]:
        return [_stretches(sample.ids, sample.mask, decoder) for sample in self._kept.values()]


def _stretches(ids: NDArray[np.int32], mask: NDArray[np.bool_], decoder: Decoder) -> list[PreviewMessage]:
    edges = np.flatnonzero(np.diff(mask)) + 1
    parts = zip(np.split(ids, edges), np.split(mask, edges), strict=True)
    return [
        PreviewMessage(text=_cut(decoder.decode(part.tolist(), skip_special_tokens=False)), trained=bool(trained[0]))
        for part, trained in parts
    ]


def _cut(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]} […{len(text) - 2 * half} characters…] {text[-half:]}"
