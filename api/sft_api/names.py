"""Where things lie in an object store: the only place that spells a key.

    <checkpoints.uri>/
        data/<fingerprint>/…                   prepared data, unless spec.preparedData says elsewhere
        ckpt/<step>/<attempt>/…                state, then MANIFEST.json, then COMPLETE
        export/<phase>/…                       a Hugging Face model, then MANIFEST.json, then COMPLETE
        run.json                               the resolved job
        prepared.json                          which prepared data is this job's
        attempts/<n>.json                      who took the number n
        metrics/attempt-<n>.jsonl              a line for each step
        events/attempt-<n>.jsonl               a line for everything else that happened
        report.html

Keys are relative to the store that is opened at the URI; a prefix ends in a slash.
"""

from __future__ import annotations

import re

COMPLETE = "COMPLETE"
"""Last key of a checkpoint, an export or prepared data: what lacks it was never committed."""
MANIFEST = "MANIFEST.json"
DATA = "data"
CHECKPOINTS = "ckpt/"
EXPORTS = "export/"
RUN = "run.json"
PREPARED = "prepared.json"
ATTEMPTS = "attempts/"
METRICS = "metrics/"
EVENTS = "events/"
REPORT = "report.html"

_CHECKPOINT = re.compile(r"^ckpt/(\d{8,})/(\d+)(?:/|$)")
_ATTEMPT = re.compile(r"^attempts/(\d+)\.json$")
_METRICS = re.compile(r"^metrics/attempt-(\d+)\.jsonl$")


def prepared_data_uri(checkpoints_uri: str) -> str:
    """Where a job keeps its prepared data unless it names another place."""
    return f"{without_slash(checkpoints_uri)}/{DATA}"


def without_slash(uri: str) -> str:
    """`uri` without slashes at its end."""
    return uri.rstrip("/")


def prepared(fingerprint: str) -> str:
    """Prefix of a data set, relative to `RunConfig.prepared_data_uri`."""
    return f"{fingerprint}/"


def checkpoint(step: int, attempt: int) -> str:
    """Prefix of the checkpoint that `attempt` took after `step`. Names sort as steps do, up to 99,999,999."""
    return f"{CHECKPOINTS}{step:08d}/{attempt}/"


def parse_checkpoint(key: str) -> tuple[int, int] | None:
    """Step and attempt of a key at or below a checkpoint's prefix; none where it is something else."""
    match = _CHECKPOINT.match(key)
    return (int(match[1]), int(match[2])) if match else None


def export(phase: str) -> str:
    """Prefix of the model exported at the end of `phase`."""
    return f"{EXPORTS}{phase}/"


def metrics(attempt: int) -> str:
    """Key of the metrics of an attempt: JSON lines."""
    return f"{METRICS}attempt-{attempt}.jsonl"


def parse_metrics(key: str) -> int | None:
    """Attempt of a metrics key; none where it is something else."""
    match = _METRICS.match(key)
    return int(match[1]) if match else None


def events(attempt: int) -> str:
    """Key of what else happened in an attempt: JSON lines."""
    return f"{EVENTS}attempt-{attempt}.jsonl"


def attempt(number: int) -> str:
    """Key that is created once by the attempt of that number."""
    return f"{ATTEMPTS}{number}.json"


def parse_attempt(key: str) -> int | None:
    """Number of an attempt's key; none where it is something else."""
    match = _ATTEMPT.match(key)
    return int(match[1]) if match else None
