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


class AutoGang(StrEnum):
    """What `spec.scheduling.gang: Auto` can become in a cluster."""

    NATIVE = "Native"
    NONE = "None"


Manifest = Annotated[str, typer.Argument(metavar="FILE", help="An SFTJob in YAML; - reads standard input.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Set a field first: spec.batch.effectiveBatchSize=64. Repeatable."
    ),
]
Namespace = Annotated[str | None, typer.Option("-n", "--namespace", help="Unset: the context's.")]
Kubeconfig = Annotated[str | None, typer.Option(metavar="PATH", help="Unset: $KUBECONFIG, else ~/.kube/config.")]
Context = Annotated[str | None, typer.Option(metavar="NAME", help="Unset: the kubeconfig's current context.")]
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


@app.command()
def render(
    file: Manifest,
    gang: Annotated[
        AutoGang | None, typer.Option(help="What spec.scheduling.gang: Auto becomes in the cluster. Unset: Native.")
    ] = None,
    attempt: Annotated[int, typer.Option(min=1, help="Number of the attempt.")] = 1,
    trainer_image: Annotated[
        str, typer.Option(metavar="IMAGE", help="The operator's own, for jobs without spec.trainer.image.")
    ] = "",
    gpu_resource: Annotated[
        str, typer.Option(metavar="NAME", help="The extended resource that the operator asks for as GPUs.")
    ] = "nvidia.com/gpu",
    overrides: Overrides = None,
) -> None:
    """Print what the operator would create for a job: ConfigMap, Job, PodGroup, PyTorchJob. Asks no cluster.

    kubectl get sft NAME -o yaml | sft render - prints them with the owner and the namespace that they have there.
    """
    from sft_cli.render import Installed
    from sft_cli.render import render as verb

    native_gang = None if gang is None else gang is AutoGang.NATIVE
    raise typer.Exit(verb(file, Installed(trainer_image, gpu_resource, native_gang), attempt, overrides or []))


@app.command()
def status(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One job in detail. Unset: all in a table.")
    ] = None,
    namespace: Namespace = None,
    all_namespaces: Annotated[bool, typer.Option("-A", "--all-namespaces", help="The jobs of all namespaces.")] = False,
    watch: Annotated[bool, typer.Option("-w", "--watch", help="Go on, until the job has ended or Ctrl-C.")] = False,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    output: Format = Output.TEXT,
) -> None:
    """Tell how the jobs of a cluster stand: steps, loss, checkpoint, attempts, what is wrong, what to do."""
    from sft_cli.clusters import Access
    from sft_cli.status import status as verb

    if name is not None and all_namespaces:
        raise typer.BadParameter("a job is in one namespace: give NAME with -n, or -A alone")
    access = Access(kubeconfig, context, namespace)
    raise typer.Exit(verb(name, access, all_namespaces, watch, output is Output.JSON))


@app.command()
def logs(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The job.")],
    attempt: Annotated[int | None, typer.Option(min=1, help="Number of the attempt. Unset: the last.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="The pod's place in the gang. Unset: 0, the first.")] = None,
    all_ranks: Annotated[bool, typer.Option("--all", help="Every pod of the gang, its rank before each line.")] = False,
    prepare: Annotated[bool, typer.Option("--prepare", help="The preparation's pod.")] = False,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the pods end.")] = False,
    tail: Annotated[int | None, typer.Option(min=0, help="Only so many of the last lines.")] = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Print the log of a job's pods; of pods that are gone, the last lines that the operator kept."""
    from sft_cli.clusters import Access
    from sft_cli.logs import Wanted
    from sft_cli.logs import logs as verb

    if prepare and (attempt is not None or rank is not None or all_ranks):
        raise typer.BadParameter("--prepare is one pod: it has no attempt and no ranks")
    if rank is not None and all_ranks:
        raise typer.BadParameter("--rank is one pod, --all is every one")
    wanted = Wanted(attempt, rank or 0, all_ranks, prepare, follow, tail)
    raise typer.Exit(verb(name, Access(kubeconfig, context, namespace), wanted))


def main() -> None:
    """Entry point of `sft`."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    app()


if __name__ == "__main__":
    main()
