"""`sft`: one function a verb, each handing on to its module. Imports nothing that takes long before it is needed."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from typing import Annotated

import typer

app = typer.Typer(
    name="sft",
    help="Supervised fine-tuning of small language models from one manifest, the SFTJob.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Output(StrEnum):
    TEXT = "text"
    JSON = "json"


Manifest = Annotated[str, typer.Argument(metavar="FILE", help="An SFTJob in YAML; - reads standard input.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Set a field first: spec.batch.effectiveBatchSize=64. Repeatable."
    ),
]
Format = Annotated[Output, typer.Option("-o", "--output-format", help="text for a person, json for a program.")]


@app.command()
def run(
    file: Manifest,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Ranks on this machine. Unset: one for each GPU, else one.")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Serve /metrics (Prometheus) and /progress (JSON) on 127.0.0.1 meanwhile."),
    ] = None,
    overrides: Overrides = None,
    output: Format = Output.TEXT,
) -> None:
    """Train on this machine: prepare the data, train, export; goes on where an earlier run stopped.

    Ctrl-C once commits a checkpoint and stops; twice stops at once.
    """
    from sft_cli.run import run as verb

    if metrics_port is not None:
        os.environ["SFT_METRICS_PORT"] = str(metrics_port)  # for the rank that has the figures
    raise typer.Exit(verb(file, processes, overrides or [], output is Output.JSON))


@app.command()
def plan(
    file: Manifest,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs to plan for. Unset: the manifest's.")] = None,
    gpu_memory: Annotated[float, typer.Option(min=1, help="Memory of each GPU in GB.")] = 80,
    overrides: Overrides = None,
    output: Format = Output.TEXT,
) -> None:
    """Tell steps, tokens, packing and memory before anything is trained; needs no GPU."""
    from sft_cli.plan import plan as verb

    raise typer.Exit(verb(file, gpus, gpu_memory, overrides or [], output is Output.JSON))


@app.command()
def validate(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="SFTJobs in YAML; - reads standard input.")],
) -> None:
    """Check manifests: exit 0 if all are valid, else 1 and one line for each problem."""
    from sft_cli.validate import validate as verb

    raise typer.Exit(verb(files))


@app.command()
def checkpoints(
    uri: Annotated[str, typer.Argument(help="A job's checkpoints.uri, or its manifest.")],
    verify: Annotated[bool, typer.Option(help="Read every checkpoint and compare its checksums.")] = True,
    output: Format = Output.TEXT,
) -> None:
    """List a job's checkpoints, oldest first, and whether each is complete and unharmed."""
    from sft_cli.checkpoints import checkpoints as verb

    raise typer.Exit(verb(uri, verify, output is Output.JSON))


@app.command()
def report(
    source: Annotated[str, typer.Argument(metavar="URI|FILE", help="A job's checkpoints.uri, or its manifest.")],
    path: Annotated[
        str | None, typer.Option("--output", metavar="PATH", help="Where to write the page; - is standard output.")
    ] = None,
    output: Format = Output.TEXT,
) -> None:
    """Make the HTML report from the metrics of all attempts, into the job's store or to PATH."""
    from sft_cli.report import report as verb

    raise typer.Exit(verb(source, path, output is Output.JSON))


def main() -> None:
    """Entry point of `sft`."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    app()


if __name__ == "__main__":
    main()
