"""`sft checkpoints`: what a job has committed, and whether it is still whole."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from sft_api.run import ExitCode, RunError
from sft_cli.manifests import BadManifest, Finding
from sft_cli.places import find

if TYPE_CHECKING:
    from rich.table import Table

    from sft_trainer.checkpoint import CheckpointSummary


def checkpoints(source: str, verify: bool, as_json: bool) -> int:
    """List them, oldest first. 0, or the store's exit code; a damaged checkpoint is told, and no error."""
    try:
        place = find(source)
        from sft_trainer.checkpoint import list_checkpoints
        from sft_trainer.store import Store

        rows = list_checkpoints(Store.open(place.uri), verify=verify)
    except BadManifest as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIGURATION
    except RunError as error:
        print(Finding(source, error.message, error.path), file=sys.stderr)
        return error.code
    if as_json:
        print(json.dumps([row.model_dump(mode="json", by_alias=True) for row in rows], indent=2))
    elif not rows:
        print(f"{place.uri} holds no checkpoints")
    else:
        from sft_cli.screen import stdout_console

        stdout_console().print(table_of(rows))
    return 0


def table_of(rows: list[CheckpointSummary]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from sft_trainer.report import wording

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("step", "attempt", "epoch", "samples", "ranks", "ZeRO", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("phase", "state", "time", "parameters"):
        table.add_column(name, no_wrap=True)
    for row in rows:
        numbers = (row.step, row.attempt, row.epoch, row.samples, row.world_size, row.zero_stage)
        words, style = state_of(row)
        table.add_row(
            *("–" if number is None else f"{number:,}" for number in numbers),
            wording.size(row.bytes),
            Text(row.phase or "–"),
            Text(words, style=style),
            wording.moment(row.time),
            Text((row.parameters_digest or "–")[:12], style="dim"),
        )
    return table


def state_of(row: CheckpointSummary) -> tuple[str, str]:
    """In words, and the style to print them in."""
    if not row.complete:
        return "not committed", "yellow"
    if row.verified is False or row.problem:
        return f"damaged: {row.problem}" if row.problem else "damaged", "bold red"
    return ("committed, verified", "green") if row.verified else ("committed", "")
