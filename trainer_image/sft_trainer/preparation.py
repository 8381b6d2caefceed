"""What a job needs before its ranks start: proof of access, prepared data, the base model on this machine, a number."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from sft_api import names
from sft_api.events import Event, Finished, Message
from sft_api.run import ExitCode, RunConfig, RunError
from sft_trainer.fetch import fetch_model
from sft_trainer.prepare import Dataset, PreparedJob, prepare
from sft_trainer.store import ObjectMissing, Store
from sft_trainer.tokenizer import load_tokenizer
from sft_trainer.voice import say


def cache_folder() -> Path:
    """Where this machine keeps copies of what came from an object store."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("SFTJOB_CACHE", home / "sftjob"))


def job_store(config: RunConfig) -> Store:
    return Store.open(config.checkpoints.uri, path="spec.checkpoints.uri")


def data_store(config: RunConfig) -> Store:
    default = config.prepared_data_uri == names.prepared_data_uri(config.checkpoints.uri)
    return Store.open(config.prepared_data_uri, path="spec.checkpoints.uri" if default else "spec.preparedData.uri")


def prepare_job(
    config: RunConfig, report: Callable[[Event], None], processes: int, check_model: Callable[[Path], object]
) -> PreparedJob:
    """Tokenise what is not prepared yet and note in the job's store which data sets are its own.

    `check_model` is given the model's folder, without weights, before any data is read: raise what is wrong with it.
    """
    store = job_store(config)
    store.check_writable()
    folder = fetch_model(config.model, cache_folder() / "models", weights=False)
    check_model(folder)
    prepared = prepare(config, data_store(config), load_tokenizer(folder, config.model), report, processes)
    store.put(names.PREPARED, prepared.model_dump_json(by_alias=True).encode())
    store.put(names.RUN, config.model_dump_json(by_alias=True, indent=2).encode())
    return prepared


def prepared_job(config: RunConfig) -> PreparedJob:
    try:
        return PreparedJob.model_validate_json(job_store(config).get(names.PREPARED))
    except ObjectMissing as error:
        message = f"{config.checkpoints.uri} has no prepared data yet: prepare the job first"
        raise RunError(ExitCode.DATA, message) from error


def fetch(config: RunConfig) -> Path:
    """Bring base model and prepared data to this machine, once for all its ranks; returns the model's folder."""
    prepared, store = prepared_job(config), data_store(config)
    for fingerprint in prepared.summaries:
        Dataset.open(store, fingerprint, cache_folder() / "data")
    return fetch_model(config.model, cache_folder() / "models")


def claim_attempt(config: RunConfig) -> int:
    """The next free attempt number, taken by conditional create: two runs never write under one number."""
    store = job_store(config)
    taken = [number for info in store.list(names.ATTEMPTS) if (number := names.parse_attempt(info.key)) is not None]
    attempt = max(taken, default=0) + 1
    claim = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "time": time.time()}).encode()
    while not store.create(names.attempt(attempt), claim):
        attempt += 1
    return attempt


def note_ending(config: RunConfig, attempt: int, ending: Finished) -> None:
    """Add how the attempt ended to its events: the ranks that wrote them may not have lived to tell it."""
    store, key = job_store(config), names.events(attempt)
    try:
        told = store.get(key) if store.head(key) else b""
        store.put(key, told + ending.model_dump_json(by_alias=True).encode() + b"\n")
    except RunError as error:
        say(Message(level="warning", text=f"how the attempt ended could not be noted: {error}"))
