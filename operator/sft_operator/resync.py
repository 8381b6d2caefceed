"""Lists everything, now and then and whenever a watch began anew, so that what a watch missed does no harm."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from sft_api import labels
from sft_operator.cluster import Cluster, ClusterError
from sft_operator.observed import Platform
from sft_operator.settings import Settings
from sft_operator.views import Key
from sft_operator.world import World

LOG = logging.getLogger(__name__)
SETTLE_SECONDS = 5.0
"""How long requests are gathered: a watch that begins anew tells of every object."""
RETRY_SECONDS = 20.0
PATIENCE_AT_FIRST = (1.0, 2.0, 5.0, 10.0, 20.0)
"""An API server that has just begun, or a CRD that is new, answers 429 for some seconds."""
BINDING = "sftjob-gang"
"""Our chart's MutatingAdmissionPolicyBinding."""


@dataclass(frozen=True)
class Selection:
    kind: str
    selector: str = ""


SELECTIONS = (
    *(Selection(kind, labels.JOB) for kind in ("PyTorchJob", "Job", "Pod", "ConfigMap")),
    Selection("SFTJob"),
)
POD_GROUPS = Selection("PodGroup", labels.JOB)


class Resync:
    """Keeps the world complete, and has every job looked at."""

    def __init__(self, cluster: Cluster, world: World, settings: Settings, enqueue: Callable[[Key], None]) -> None:
        self._cluster = cluster
        self._world = world
        self._settings = settings
        self._enqueue = enqueue
        self._wanted = asyncio.Event()
        self.completed: float | None = None
        """When a list of everything was last complete, by the loop's clock."""

    def request(self) -> None:
        """Have one made soon."""
        self._wanted.set()

    async def once(self) -> None:
        """List everything, forget what is no more, and have every job looked at. Raises ClusterError."""
        self._world.platform = await self._platform()
        selections = (*SELECTIONS, POD_GROUPS) if self._world.platform.pod_groups else SELECTIONS
        for namespace in self._settings.namespaces or (None,):
            for selection in selections:
                await self._list(selection, namespace)
        self.completed = asyncio.get_running_loop().time()
        for key in self._world.job_keys():
            self._enqueue(key)

    async def first(self) -> None:
        """As `once`, with some patience. Raises ClusterError."""
        for seconds in PATIENCE_AT_FIRST:
            try:
                return await self.once()
            except ClusterError as error:
                LOG.warning("not everything can be listed yet: %s; again in %g s", error, seconds)
                await asyncio.sleep(seconds)
        return await self.once()

    async def forever(self) -> None:
        """Again after every period, soon after a request, and soon after a failure."""
        seconds = self._settings.resync_seconds
        while True:
            await self._wait(seconds)
            try:
                await self.once()
                seconds = self._settings.resync_seconds
            except ClusterError as error:
                LOG.warning("not everything could be listed: %s; again in %g s", error, RETRY_SECONDS)
                seconds = min(RETRY_SECONDS, self._settings.resync_seconds)

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wanted.wait()
                await asyncio.sleep(SETTLE_SECONDS)
        except TimeoutError:
            pass
        self._wanted.clear()

    async def _list(self, selection: Selection, namespace: str | None) -> None:
        seen: set[str] = set()
        version = 0
        async for page in self._cluster.pages(selection.kind, namespace, selection.selector):
            version = page.version
            for item in page.items:
                self._world.put(selection.kind, item)
                seen.add(item["metadata"]["uid"])
        self._world.prune(selection.kind, namespace, seen, version)

    async def _platform(self) -> Platform:
        return Platform(
            pod_groups=await self._cluster.serves("PodGroup"),
            gang_policy=await self._has_gang_policy(),
            groups=await self._cluster.groups(),
        )

    async def _has_gang_policy(self) -> bool:
        """Whether pods are put into their PodGroup, as the API server says where the settings leave it to it."""
        if self._settings.native_gang is not None:
            return self._settings.native_gang
        try:
            return await self._cluster.get("MutatingAdmissionPolicyBinding", None, BINDING) is not None
        except ClusterError as error:
            if error.status == 403:
                return False
            raise
