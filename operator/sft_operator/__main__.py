"""The operator's process: starts what it is made of in order, and ends it in order.

Its exit code is 0 when it was told to end, 10 for settings that cannot be, and 1 for everything that a restart may help
against: a lost lease, kinds that are not served, an API server that is gone for long.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from sft_api.run import ExitCode
from sft_operator.cluster import Cluster, ClusterError, connected
from sft_operator.handlers import WATCHED, watch
from sft_operator.health import Health, served
from sft_operator.lease import Lease, LeaseLost
from sft_operator.queue import WorkQueue
from sft_operator.resync import Resync
from sft_operator.settings import Settings, SettingsError, from_environment
from sft_operator.sync import Sync
from sft_operator.views import Key
from sft_operator.world import World

LOG = logging.getLogger("sft_operator")
DRAIN_SECONDS = 20.0
NEEDED = {
    "SFTJob": "the CRD sftjobs.sftjob.dev is not installed",
    "PyTorchJob": "PyTorchJobs are not served: install the Kubeflow training operator, version 1.9",
}


def main() -> None:
    try:
        settings = from_environment(os.environ)
    except SettingsError as error:
        print(error, file=sys.stderr)
        sys.exit(ExitCode.CONFIGURATION)
    log_plainly(settings.log_level)
    sys.exit(asyncio.run(operate(settings)))


def log_plainly(level: str) -> None:
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # a line for every event otherwise


async def operate(settings: Settings) -> int:
    """Wait for our turn, then work. Returns the exit code."""
    health = Health(settings.resync_seconds)
    end_on_sigterm()
    try:
        async with served(health, settings.http_port), connected() as cluster, leadership(cluster, settings) as lease:
            health.is_leader = True
            return await lead(cluster, settings, health, lease)
    except asyncio.CancelledError:
        LOG.info("told to end")
        return 0
    except ClusterError as error:
        LOG.error("%s", error)
        return 1


def end_on_sigterm() -> None:
    """As the first process of a container has no default for it. Later kopf takes the signal over."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


@asynccontextmanager
async def leadership(cluster: Cluster, settings: Settings) -> AsyncIterator[Lease | None]:
    """The lease, while it is ours; none where there is no election."""
    if settings.lease is None:
        yield None
        return
    lease = Lease(cluster, settings.pod_namespace, settings.lease, settings.pod_name)
    await lease.acquire()
    try:
        yield lease
    finally:
        await lease.release()


async def lead(cluster: Cluster, settings: Settings, health: Health, lease: Lease | None) -> int:
    if missing := [why for kind, why in NEEDED.items() if not await cluster.serves(kind)]:
        LOG.error("cannot begin: %s", "; ".join(missing))
        return 1
    world = World()
    queue = WorkQueue[Key](Sync(cluster, world, settings).run, expected=(ClusterError,))
    resync = Resync(cluster, world, settings, queue.add)
    health.last_list, health.oldest_run = lambda: resync.completed, queue.oldest_seconds
    await resync.first()
    LOG.info("begin with %d SFTJobs; watching %s", len(world.job_keys()), ", ".join(WATCHED))
    works = [queue.work(), resync.forever(), *([lease.hold()] if lease else [])]
    return await together(works, watch(world, settings, queue.add, resync.request), queue)


async def together(
    works: list[Coroutine[Any, Any, None]], watching: Coroutine[Any, Any, None], queue: WorkQueue[Key]
) -> int:
    """Watch and work until one of both ends; then let what is being run come to its end."""
    tasks = [asyncio.create_task(work) for work in works]
    await asyncio.sleep(0)  # kopf ends every task that begins after its own
    watcher = asyncio.create_task(watching)
    await asyncio.wait([watcher, *tasks], return_when=asyncio.FIRST_COMPLETED)
    code = 0 if all(ended_well(task) for task in [watcher, *tasks] if task.done()) else 1
    watcher.cancel()
    await asyncio.wait([watcher])
    await queue.drain(DRAIN_SECONDS if code == 0 else 0.0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return code


def ended_well(task: asyncio.Task[None]) -> bool:
    error = None if task.cancelled() else task.exception()
    if error is not None:
        LOG.error("%s", error, exc_info=None if isinstance(error, LeaseLost) else error)
    return error is None


if __name__ == "__main__":
    main()
