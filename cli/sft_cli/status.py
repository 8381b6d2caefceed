"""`sft status`: how the jobs of a cluster stand, or one of them in detail, once or for as long as one watches."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sft_api.status import State
from sft_cli.clusters import NO_ANSWER, Access, Cluster, ClusterError, ClusterJob, connect

if TYPE_CHECKING:
    from rich.console import RenderableType

POLL_SECONDS = 2.0

Jobs = Sequence[ClusterJob]


def status(name: str | None, access: Access, everywhere: bool, watch: bool, as_json: bool) -> int:
    """One job by name, or all of a namespace, or of all namespaces. Returns the exit code."""
    try:
        with connect(access) as cluster:
            namespace = None if everywhere else cluster.namespace
            looks = watched(cluster, name, namespace) if watch else iter([look(cluster, name, namespace)])
            if as_json:
                show_json(looks, single=name is not None, indent=None if watch else 2)
            else:
                show(looks, pages(namespace) if name is None else page, live=watch)
    except ClusterError as error:
        print(error, file=sys.stderr)
        return NO_ANSWER
    except KeyboardInterrupt:  # how watching ends
        return 0
    return 0


def look(cluster: Cluster, name: str | None, namespace: str | None) -> Jobs:
    return cluster.jobs(namespace) if name is None else [cluster.job(name)]


def watched(cluster: Cluster, name: str | None, namespace: str | None) -> Iterator[Jobs]:
    """What there is, every few seconds, until the one job that was asked for has ended."""
    while True:
        jobs = look(cluster, name, namespace)
        yield jobs
        if name is not None and jobs[0].status.state in (State.SUCCEEDED, State.FAILED):
            return
        time.sleep(POLL_SECONDS)


def changes(looks: Iterable[Jobs]) -> Iterator[Jobs]:
    """Those that differ from the one before."""
    before: Jobs | None = None
    for jobs in looks:
        if jobs != before:
            yield jobs
        before = jobs


def show_json(looks: Iterable[Jobs], single: bool, indent: int | None) -> None:
    """One document, or while it is watched one line for each change."""
    for jobs in changes(looks):
        records = [record(job) for job in jobs]
        print(json.dumps(records[0] if single else records, indent=indent), flush=True)


def record(job: ClusterJob) -> dict[str, object]:
    """The job for a program: its status as the cluster has it, and what a person would be advised to do."""
    from sft_cli.standing import advice

    return {
        "namespace": job.namespace,
        "name": job.name,
        "created": job.created.isoformat(),
        "status": job.raw_status,
        "advice": advice(job, datetime.now(UTC)),
    }


def show(looks: Iterable[Jobs], render: Callable[[Jobs], RenderableType], live: bool) -> None:
    """On a terminal in one place, kept up to date; elsewhere again after each change."""
    from sft_cli.screen import stdout_console

    console = stdout_console()
    if live and console.is_terminal:
        from rich.live import Live

        with Live(console=console, auto_refresh=False) as display:
            for jobs in looks:
                display.update(render(jobs), refresh=True)
        return
    for jobs in changes(looks):
        console.print(render(jobs), soft_wrap=True)


def page(jobs: Jobs) -> RenderableType:
    from sft_cli.standing import page_of

    return page_of(jobs[0], datetime.now(UTC))


def pages(namespace: str | None) -> Callable[[Jobs], RenderableType]:
    from sft_cli.standing import table_of

    def render(jobs: Jobs) -> RenderableType:
        if not jobs:
            return "There are no SFTJobs" + (f" in namespace {namespace}." if namespace else ".")
        return table_of(jobs, datetime.now(UTC), with_namespace=namespace is None)

    return render
