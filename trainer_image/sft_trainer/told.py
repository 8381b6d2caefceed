"""What the trainer was told, run.json. Some of it may change while a job runs: `lifecycle` and `checkpoints.keep`."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from sft_api.run import ExitCode, RunConfig, RunError


def read_config(path: Path) -> RunConfig:
    try:
        return RunConfig.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise RunError(ExitCode.CONFIGURATION, f"{path} is not a resolved job: {error}") from error


class AsTold:
    """run.json as it is now: the kubelet puts another there when the manifest changes, on each node in its own time."""

    def __init__(self, path: Path):
        self._path = path
        self._config = read_config(path)
        self._seen = self._version()

    def __call__(self) -> RunConfig:
        version = self._version()
        if version is not None and version != self._seen:
            self._seen, self._config = version, self._read()
        return self._config

    def _version(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _read(self) -> RunConfig:
        try:
            return read_config(self._path)
        except RunError:
            return self._config  # what was valid before: a run does not end over which old checkpoints to delete
