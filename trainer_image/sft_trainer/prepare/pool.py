"""Chunks of records to batches of samples, in many processes at once, in the order of the input whatever their number.

Memory is bounded: no more chunks are on their way than the processes can work on soon. The processes hold a
tokenizer and a template, and import no training library.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from sft_api.run import ExitCode, RunError
from sft_trainer.prepare.conversations import MalformedRecord
from sft_trainer.prepare.masks import MaskRefused, TemplateFailed
from sft_trainer.prepare.records import Chunk, RecordError
from sft_trainer.prepare.samples import Encoder, EncoderSpec, Sample, Tally, TooLong, pack_mask

SCHEMA = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        # As samples.pack_mask makes it.
        pa.field("loss_mask", pa.binary(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("num_loss_tokens", pa.int32(), nullable=False),
        pa.field("content", pa.uint64(), nullable=False),
    ]
)
_AHEAD = 3
"""Chunks under way for each process."""


@dataclass(frozen=True)
class Failure:
    """A record that stops the job."""

    where: str
    what: str
    template: bool = False
    """Whether the chat template is to blame rather than the record."""


@dataclass(frozen=True)
class Encoded:
    """What became of a chunk."""

    file: int
    batch: pa.RecordBatch
    tally: Tally = field(default_factory=Tally)
    failure: Failure | None = None


def encode_chunk(encoder: Encoder, chunk: Chunk) -> Encoded:
    """The samples of a chunk, up to the first record that stops the job."""
    samples: list[Sample] = []
    tally = Tally()
    failure = None
    where = ""
    try:
        for where, record in chunk.records():  # noqa: B007 (named after an error)
            samples += encoder.samples(record, chunk.format, tally)
    except RecordError as error:
        failure = Failure(error.where, error.what)
    except MalformedRecord as error:
        failure = Failure(where, str(error))
    except TooLong as error:
        failure = Failure(where, str(error))
    except TemplateFailed as error:
        failure = Failure(where, f"is refused by the chat template: {error}")
    except MaskRefused as error:
        failure = Failure(where, str(error), template=True)
    return Encoded(chunk.file, as_batch(samples), tally, failure)


def as_batch(samples: Sequence[Sample]) -> pa.RecordBatch:
    """Samples as a record batch of SCHEMA."""
    lengths = np.array([len(sample.ids) for sample in samples], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.concatenate([sample.ids for sample in samples]) if samples else np.empty(0, dtype=np.int32)
    columns = [
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids), type=SCHEMA.field("input_ids").type),
        pa.array([pack_mask(sample.mask) for sample in samples], pa.binary()),
        pa.array(lengths),
        pa.array([sample.num_loss_tokens for sample in samples], pa.int32()),
        pa.array([sample.content() for sample in samples], pa.uint64()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def encode_chunks(chunks: Iterable[Chunk], spec: EncoderSpec, processes: int) -> Iterator[Encoded]:
    """The chunks, encoded, in their order. With fewer than two processes, in this one."""
    if processes < 2:
        encoder = Encoder(spec)
        yield from (encode_chunk(encoder, chunk) for chunk in chunks)
        return
    # A fork server: the modules are imported once, and no thread of this process is forked.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers.utils.chat_template_utils"])
    pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(spec,))
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) > _AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        message = (
            "a process that tokenises died without a word, most likely killed for want of memory: "
            "give this machine more memory, or fewer processes."
        )
        raise RunError(ExitCode.OUT_OF_MEMORY, message) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_encoder: Encoder | None = None


def _start(spec: EncoderSpec) -> None:
    global _encoder
    # Ctrl-C goes to the whole process group; the parent alone decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()
    _encoder = Encoder(spec)


def _end_with_parent() -> None:
    """The pool's own pipes never say that the parent was killed: their other ends are open in every worker."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(chunk: Chunk) -> Encoded:
    assert _encoder is not None
    return encode_chunk(_encoder, chunk)
