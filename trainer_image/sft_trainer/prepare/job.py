"""`prepare`: every phase's data and the validation data, tokenised once per fingerprint into the store."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate
from typing import Any, TypeAlias

from sft_api import names
from sft_api.base import ApiModel
from sft_api.events import PreparedMetrics, PrepareProgress
from sft_api.run import ExitCode, ResolvedBatch, RunConfig, RunError
from sft_api.spec import DataFormat, DataSource
from sft_trainer.prepare.chat import check_chat_template, encoder_spec
from sft_trainer.prepare.pool import Encoded, Failure, encode_chunks
from sft_trainer.prepare.previews import Previewer
from sft_trainer.prepare.records import Chunk, read_chunks
from sft_trainer.prepare.samples import EMPTY, NO_LOSS_TOKENS, NO_LOSS_TOKENS_LEFT, TOO_LONG, EncoderSpec, Tally
from sft_trainer.prepare.sources import DataFile, find_files
from sft_trainer.prepare.writer import ShardWriter, SourceFile, Summary, commit, committed, summarise
from sft_trainer.store import Store

VALIDATION = "validation"
"""Name under which the validation data is reported."""
PREPARE_VERSION = 1
"""Raise it whenever the same input would give other ids or masks: a test holds their digest."""
_PROGRESS_SECONDS = 0.5
BYTES_WORTH_A_PROCESS = 2 << 20
"""Of input: what takes about as long to tokenise as a process to start."""

Report: TypeAlias = Callable[[PreparedMetrics | PrepareProgress], None]


class PreparedJob(ApiModel):
    """The prepared data of a job, by fingerprint."""

    phases: list[str]
    """Of each phase, in order."""
    validation: str | None
    """Of the data at spec.validation.uri, if the job has it."""
    summaries: dict[str, Summary]


@dataclass(frozen=True)
class _Part:
    """Data that is prepared as one: a phase's, or the validation's."""

    name: str
    files: list[DataFile]
    batch: ResolvedBatch

    @property
    def has_conversations(self) -> bool:
        return any(file.format is DataFormat.MESSAGES for file in self.files)


def prepare(config: RunConfig, store: Store, tokenizer: Any, report: Report, processes: int) -> PreparedJob:
    """Tokenise all the data of a job, or find it tokenised.

    Args:
        store: opened at `config.prepared_data_uri`.
        tokenizer: as `load_tokenizer` returns it.
        report: hears progress, and PreparedMetrics once for each phase and the validation data.
        processes: how many tokenise; below 2, this one does.

    Raises RunError: DATA for input that is missing, malformed or leaves nothing to train on; CONFIGURATION for a
    chat template that is missing or cannot be masked; STORE_REFUSED and STORE_UNAVAILABLE.
    """
    parts = list(_parts(config))
    if any(part.has_conversations for part in parts):
        check_chat_template(tokenizer)
    digests: dict[DataFile, str] = {}
    summaries: dict[str, Summary] = {}
    fingerprints = []
    for part in parts:
        start = time.monotonic()
        spec = encoder_spec(tokenizer, part.batch.max_sequence_length, part.batch.overlong)
        digests |= {file: file.digest() for file in part.files if file not in digests}
        fingerprint = _fingerprint(part, spec, digests)
        target = store.child(names.prepared(fingerprint).rstrip("/"))
        found = summaries.get(fingerprint) or committed(target)
        summary = found or _prepare_part(part, spec, fingerprint, digests, target, tokenizer, report, processes)
        summaries[fingerprint] = summary
        fingerprints.append(fingerprint)
        report(_metrics(part.name, summary, found is not None, time.monotonic() - start))
    return PreparedJob(
        phases=fingerprints[: len(config.phases)],
        validation=fingerprints[-1] if len(parts) > len(config.phases) else None,
        summaries=summaries,
    )


def _parts(config: RunConfig) -> Iterator[_Part]:
    for phase in config.phases:
        yield _Part(phase.name, _files(phase.data, phase.data_paths), phase.batch)
    if config.validation is not None and config.validation.uri is not None:
        source = DataSource(uri=config.validation.uri, format=config.validation.format or DataFormat.MESSAGES)
        # The longest that any phase trains on: what is scored should not be cut shorter.
        batch = max((phase.batch for phase in config.phases), key=lambda batch: batch.max_sequence_length)
        yield _Part(VALIDATION, _files([source], ["spec.validation.uri"]), batch)


def _files(sources: list[DataSource], paths: list[str]) -> list[DataFile]:
    return [
        file
        for source, path in zip(sources, paths, strict=True)
        for file in find_files(source.uri, source.format, path)
    ]


def _fingerprint(part: _Part, spec: EncoderSpec, digests: dict[DataFile, str]) -> str:
    """32 hexadecimal digits that change with whatever may change a sample: data, tokenizer, template, lengths, code."""
    renderer = spec.renderer if part.has_conversations else None
    what = {
        "version": [PREPARE_VERSION, version("tokenizers"), version("transformers")],
        "files": [[file.format, file.kind, file.size, digests[file]] for file in part.files],
        "tokenizer": [hashlib.sha256(spec.backend.encode()).hexdigest(), spec.bos, spec.eos],
        "template": renderer
        and [renderer.template, renderer.tool_template, renderer.special_tokens, renderer.end_of_turn],
        "lengths": [spec.max_length, spec.overlong],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _prepare_part(
    part: _Part,
    spec: EncoderSpec,
    fingerprint: str,
    digests: dict[DataFile, str],
    store: Store,
    tokenizer: Any,
    report: Report,
    processes: int,
) -> Summary:
    processes = min(processes, 1 + sum(file.size for file in part.files) // BYTES_WORTH_A_PROCESS)
    progress = _Progress(part, report)
    previewer = Previewer()
    tally = Tally()
    with ShardWriter(store) as writer:
        for encoded in encode_chunks(_chunks(part.files, progress), spec, processes):
            tally.add(encoded.tally)
            if encoded.failure is not None:
                raise _run_error(part.files[encoded.file], encoded.failure)
            writer.add(encoded.batch)
            previewer.consider(encoded.batch)
            progress.encoded(encoded)
        if not writer.samples:
            raise _nothing_left(part, tally)
        writer.finish()
        sources = [SourceFile(name=file.name, bytes=file.size, sha256=digests[file]) for file in part.files]
        summary = summarise(fingerprint, writer, tally, sources, previewer.preview(tokenizer))
    commit(store, summary)
    return summary


def _chunks(files: list[DataFile], progress: _Progress) -> Iterator[Chunk]:
    before = accumulate((file.size for file in files), initial=0)
    for index, (file, start) in enumerate(zip(files, before, strict=False)):
        yield from read_chunks(file, index, lambda count, start=start: progress.read(start + count))  # type: ignore[misc]


class _Progress:
    """Says how far the preparation is, not more often than a person can read."""

    def __init__(self, part: _Part, report: Report):
        self._phase = part.name
        self._report = report
        self._total = sum(file.size for file in part.files)
        self._bytes = self._records = 0
        self._due = time.monotonic() + _PROGRESS_SECONDS

    def read(self, count: int) -> None:
        self._bytes = count

    def encoded(self, encoded: Encoded) -> None:
        self._records += encoded.tally.records
        now = time.monotonic()
        if now >= self._due:
            self._due = now + _PROGRESS_SECONDS
            fraction = min(1.0, self._bytes / self._total) if self._total else None
            self._report(PrepareProgress(phase=self._phase, samples=self._records, fraction=fraction))


def _run_error(file: DataFile, failure: Failure) -> RunError:
    if not failure.template:
        return RunError(ExitCode.DATA, f"{file.name}, {failure.where}: {failure.what}.", file.path)
    message = (
        f"the chat template cannot be masked safely for {file.name}, {failure.where}: {failure.what}. Give a template "
        "that marks what the assistant says with {% generation %} … {% endgeneration %}, or choose a built-in one."
    )
    return RunError(ExitCode.CONFIGURATION, message, "spec.model.chatTemplate")


def _nothing_left(part: _Part, tally: Tally) -> RunError:
    limit = part.batch.max_sequence_length
    meaning = {
        EMPTY: "empty",
        NO_LOSS_TOKENS: "without anything that the assistant says",
        NO_LOSS_TOKENS_LEFT: f"with nothing to train on within maxSequenceLength {limit}",
        TOO_LONG: f"longer than maxSequenceLength {limit} (overlong: Drop)",
    }
    reasons = ", ".join(f"{count:,} {meaning[reason]}" for reason, count in sorted(tally.dropped.items()))
    message = f"of {tally.records:,} records none is left to train on: {reasons or 'the files hold none'}."
    return RunError(ExitCode.DATA, message, part.files[0].path)


def _metrics(phase: str, summary: Summary, reused: bool, seconds: float) -> PreparedMetrics:
    return PreparedMetrics(
        phase=phase,
        fingerprint=summary.fingerprint,
        reused=reused,
        samples=summary.samples,
        tokens=summary.tokens,
        loss_tokens=summary.loss_tokens,
        dropped=summary.dropped,
        truncated=summary.truncated,
        seconds=seconds,
        preview=summary.preview,
    )
