"""`sft plan`: what a job will do, in tables or JSON, before anything is trained."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sft_api.events import Event, Message, PreparedMetrics
from sft_api.recipes import resolve
from sft_api.run import ExitCode, RunConfig, RunError
from sft_cli import laptop
from sft_cli.machine import counted
from sft_cli.manifests import BadManifest, Finding, read_job

if TYPE_CHECKING:
    from rich.table import Table


def plan(file: str, gpus: int | None, gpu_memory_gb: float, overrides: Sequence[str], as_json: bool) -> int:
    """Plan the job for `gpus` GPUs; returns the exit code. The data is prepared where the run will find it."""
    try:
        job = read_job(file, overrides)
        laptop.refuse_claims(job)
        config = resolve(job)
        os.environ.update(laptop.environment(job))  # as the trainer would have it
        trainer = config.trainer
        ranks = gpus or max(1, trainer.nodes * trainer.gpus_per_node)
        found = planned(config, ranks, round(gpu_memory_gb * 1e9))
    except BadManifest as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIGURATION
    except RunError as error:
        print(Finding(file, error.message, error.path), file=sys.stderr)
        return error.code
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found, config.name, ranks)
    return 0


def planned(config: RunConfig, ranks: int, gpu_memory: int) -> dict[str, Any]:
    with stdout_for_us():
        # Loads the training libraries: only here, after the manifest has been found valid.
        from sft_trainer.planning import plan_job

        processes = len(os.sched_getaffinity(0))
        return dict(plan_job(config, ranks, gpu_memory, tell, processes))


def tell(event: Event) -> None:
    """Progress for a person, beside the plan: on stderr."""
    if isinstance(event, Message | PreparedMetrics):
        from sft_trainer.voice import sentence

        print(sentence(event), file=sys.stderr)


@contextmanager
def stdout_for_us() -> Iterator[None]:
    """Whatever libraries print goes to stderr, also what they print below Python's streams."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def show(found: dict[str, Any], name: str, ranks: int) -> None:
    from rich.text import Text

    from sft_cli.screen import stdout_console

    console = stdout_console()
    total = found["totalSteps"]
    title = f"{name}: {counted(total, 'optimizer step')} on {counted(ranks, 'GPU')}"
    console.print(Text(title, style="bold"))
    console.print(phase_table(found["phases"]))
    console.print(memory_table(found["memory"]))
    console.print(Text.assemble(*verdict(found["memory"])))


def phase_table(phases: list[dict[str, Any]]) -> Table:
    """Samples and tokens are those of one epoch."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from sft_trainer.report import wording

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("phase", no_wrap=True)
    names = ("samples", "tokens", "trained on", "truncated", "epochs", "steps", "micro-batches", "packing", "bound")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("dropped")
    for phase in phases:
        table.add_row(
            Text(phase["name"]),
            wording.count(phase["samples"]),
            wording.short_count(phase["tokens"]),
            wording.short_count(phase["lossTokens"]),
            wording.count(phase["truncated"]),
            wording.count(phase["epochs"]),
            wording.count(phase["steps"]),
            wording.count(phase["microBatches"]),
            wording.percent(phase["utilisation"]),
            wording.percent(phase["bound"]),
            Text("\n".join(f"{number:,} {reason}" for reason, number in phase["dropped"].items()) or "none"),
        )
    return table


def memory_table(memory: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from sft_trainer.report import wording

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("ZeRO stage", justify="right")
    table.add_column("memory of a GPU", justify="right")
    table.add_column("")
    for stage, needed in memory["stage"].items():
        chosen = str(memory["chosen"]) == stage
        table.add_row(stage, wording.size(needed), Text("◀ chosen" if chosen else "", style="bold"))
    return table


def verdict(memory: dict[str, Any]) -> tuple[tuple[str, str], str]:
    from sft_trainer.report import wording

    available = wording.size(memory["available"])
    if memory["fits"]:
        return ("Fits", "bold green"), f" into {available} with ZeRO {memory['chosen']}."
    return (
        ("Does not fit", "bold red"),
        f" into {available} with ZeRO {memory['chosen']}: lower spec.batch.maxTokensPerGPU, or give more GPUs.",
    )
