"""`sft report`: the HTML page, or its numbers, from what a job's attempts left in the store."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_api import names
from sft_api.run import ExitCode, RunConfig, RunError
from sft_cli.manifests import BadManifest, Finding
from sft_cli.places import Place, find

if TYPE_CHECKING:
    from sft_trainer.report import History
    from sft_trainer.store import Store


def report(source: str, path: str | None, as_json: bool) -> int:
    """Write the page into the store, or to `path`; with `as_json` print the merged numbers and write only to `path`."""
    try:
        return make(find(source), path, as_json)
    except BadManifest as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIGURATION
    except RunError as error:
        print(Finding(source, error.message, error.path), file=sys.stderr)
        return error.code


def make(place: Place, path: str | None, as_json: bool) -> int:
    from sft_cli.results import put_report, read_history, report_page
    from sft_trainer.store import Store

    store = Store.open(place.uri)
    history = read_history(store, lambda text: print(text, file=sys.stderr))
    if not any(attempt.started or attempt.first_step for attempt in history.attempts):
        raise RunError(
            ExitCode.DATA, "there are no metrics (metrics/attempt-<n>.jsonl) here; give a job's checkpoints.uri"
        )
    if as_json:
        print(json.dumps(as_plain(history), indent=2))
    if as_json and path is None:
        return 0
    config = place.config or resolved_job(store)
    page = report_page(history, config.name if config else place.name, place.uri, config)
    if path is None:
        print(put_report(store, page))
    elif path == "-":
        sys.stdout.write(page)
    else:
        write_file(path, page)
    return 0


def resolved_job(store: Store) -> RunConfig | None:
    """The job as the trainer was told it; none where the store is from before it was kept, or from another version."""
    from pydantic import ValidationError

    try:
        return RunConfig.model_validate_json(store.get(names.RUN)) if store.head(names.RUN) else None
    except ValidationError:
        return None


def write_file(path: str, page: str) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise RunError(ExitCode.CONFIGURATION, f"--output {path} cannot be written: {error.strerror}") from error
    print(path)


def as_plain(history: History) -> dict[str, Any]:
    """The merged history as JSON-able values: steps, scores, checkpoints, exports, data, attempts."""
    return {
        "totalSteps": history.total_steps,
        "stepsRepeated": history.steps_lost,
        "attempts": [
            {
                "attempt": attempt.number,
                "firstStep": attempt.first_step,
                "lastStep": attempt.last_step,
                "stepsRepeated": attempt.steps_lost,
                "seconds": attempt.seconds,
                "reason": attempt.finished.reason if attempt.finished else None,
            }
            for attempt in history.attempts
        ],
        **{
            name: [event.model_dump(mode="json", by_alias=True, exclude={"event"}) for event in events]
            for name, events in (
                ("steps", history.steps),
                ("validations", history.validations),
                ("checkpoints", history.checkpoints),
                ("exports", history.exports),
                ("prepared", history.prepared),
            )
        },
        "warnings": history.warnings,
    }
