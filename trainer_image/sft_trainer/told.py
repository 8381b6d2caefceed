"""What the trainer was told, run.json, and what of it may change while a job runs: which checkpoints to keep."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from sft_api.run import ExitCode, RunConfig, RunError
from sft_api.spec import Keep


def read_config(path: Path) -> RunConfig:
    try:
        return RunConfig.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise RunError(ExitCode.CONFIGURATION, f"{path} is not a resolved job: {error}") from error


class KeepAsTold:
    """`checkpoints.keep` as run.json has it now: the kubelet puts another file there when the manifest changes."""

    def __init__(self, path: Path):
        self._path = path
        self._keep = read_config(path).checkpoints.keep
        self._seen = self._version()

    def __call__(self) -> Keep:
        version = self._version()
        if version is not None and version != self._seen:
            self._seen, self._keep = version, self._read()
        return self._keep

    def _version(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _read(self) -> Keep:
        try:
            return read_config(self._path).checkpoints.keep
        except RunError:
            return self._keep  # what was valid before: a run does not end over which old checkpoints to delete
