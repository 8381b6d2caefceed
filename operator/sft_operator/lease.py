"""Which of several replicas works: a loop of our own around one Lease.

It is ours before anything is watched, and when it is lost the process ends: nobody goes on who may not be the only one.
Other replicas' times are never compared with our clock: what counts is how long, by our clock, theirs have not changed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sft_operator.cluster import Cluster, ClusterError
from sft_operator.views import Raw

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timing:
    """In seconds."""

    duration: float = 15.0
    """How long a Lease that is not renewed is left to its holder."""
    deadline: float = 10.0
    """How long the holder tries to renew before it gives up, which is before others may take over."""
    period: float = 2.0
    """How often the holder renews, and the others look."""


class LeaseLost(Exception):
    """Somebody else may work now."""


class Lease:
    """One replica's side of the Lease."""

    def __init__(self, cluster: Cluster, namespace: str, name: str, identity: str, timing: Timing | None = None):
        self._cluster = cluster
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._timing = timing or Timing()
        self._held: Raw | None = None
        self._seen: tuple[Any, Any] = (None, None)
        self._seen_since = 0.0

    async def acquire(self) -> None:
        """Return when it is ours."""
        while True:
            try:
                if await self._try():
                    LOG.info("%s holds the lease %s", self._identity, self._name)
                    return
            except ClusterError as error:
                LOG.warning("the lease %s cannot be had yet: %s", self._name, error)
            await asyncio.sleep(self._timing.period)

    async def hold(self) -> None:
        """Renew it for ever. Raises LeaseLost."""
        renewed = now()
        while True:
            await asyncio.sleep(self._timing.period)
            try:
                async with asyncio.timeout(self._timing.deadline / 2):
                    await self._renew()
                renewed = now()
            except (ClusterError, TimeoutError) as error:
                LOG.warning("the lease %s was not renewed: %s", self._name, str(error) or "no answer in time")
            if now() - renewed > self._timing.deadline:
                raise LeaseLost(f"the lease {self._name} could not be renewed for {self._timing.deadline:g} s")

    async def release(self) -> None:
        """Let the next have it at once; where that fails, it has to wait."""
        if self._held is None:
            return
        try:
            async with asyncio.timeout(self._timing.period):
                await self._write(self._held, {"holderIdentity": ""})
        except (ClusterError, TimeoutError) as error:
            LOG.warning("the lease %s was not released: %s", self._name, str(error) or "no answer in time")
        self._held = None

    async def _try(self) -> bool:
        """Take it if it is free, or its holder has not renewed it for its duration."""
        found = await self._cluster.get("Lease", self._namespace, self._name)
        if found is None:
            found = await self._cluster.create(self._empty())
        spec = found.get("spec") or {}
        if spec.get("holderIdentity") and not self._has_run_out(spec):
            return False
        transitions = spec.get("leaseTransitions", 0) + (1 if spec.get("holderIdentity") != self._identity else 0)
        try:
            await self._write(found, {"acquireTime": micro_time(), "leaseTransitions": transitions})
        except ClusterError as error:
            if error.status == 409:
                return False
            raise
        return True

    def _has_run_out(self, spec: Mapping[str, Any]) -> bool:
        seen = (spec.get("holderIdentity"), spec.get("renewTime"))
        if seen != self._seen:
            self._seen, self._seen_since = seen, now()
        duration: float = spec.get("leaseDurationSeconds", self._timing.duration)
        return now() - self._seen_since > duration

    async def _renew(self) -> None:
        """Raises LeaseLost where another holds it."""
        assert self._held is not None
        try:
            await self._write(self._held, {})
        except ClusterError as error:
            if error.status not in (404, 409):
                raise
            found = await self._cluster.get("Lease", self._namespace, self._name)
            holder = ((found or {}).get("spec") or {}).get("holderIdentity")
            if found is None or holder != self._identity:
                self._held = None
                raise LeaseLost(f"the lease {self._name} is held by {holder or 'nobody'}") from error
            self._held = found  # an annotation was changed, say: the next renewal knows

    async def _write(self, lease: Raw, changes: Mapping[str, Any]) -> None:
        ours = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": max(1, round(self._timing.duration)),
            "renewTime": micro_time(),
        }
        spec = {**(lease.get("spec") or {}), **ours, **changes}
        metadata = {name: value for name, value in lease["metadata"].items() if name != "managedFields"}
        self._held = await self._cluster.replace({**self._empty(), "metadata": metadata, "spec": spec})

    def _empty(self) -> dict[str, Any]:
        metadata = {"name": self._name, "namespace": self._namespace}
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata}


def now() -> float:
    """By the loop's clock, which is monotonic."""
    return asyncio.get_running_loop().time()


def micro_time() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
