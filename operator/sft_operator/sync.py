"""One run of a job: observe, decide, carry out, report.

In this order: what should be there is made, then the status is written, then what should go is deleted. The status is
written against the version of the SFTJob that was decided on, and nothing is deleted that was decided on an older one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sft_api.job import API_VERSION, KIND
from sft_api.manifest import ManifestError, parse_job
from sft_api.status import SFTJobStatus
from sft_operator import events
from sft_operator.cluster import Cluster, ClusterError
from sft_operator.observe import observe
from sft_operator.observed import Decision, Manifest, ObjectRef
from sft_operator.reconcile import reconcile, refuse
from sft_operator.settings import Settings
from sft_operator.views import Child, Key, Raw, job_status
from sft_operator.world import World

LOG = logging.getLogger(__name__)
FIGURES_SECONDS = 10.0
"""How often a job's status is written when nothing but figures has changed."""
FIGURES = {"progress", "checkpoint", "heldSeconds", "gpuSeconds", "goodput"}
FIGURES_OF_ATTEMPTS = {"heldSeconds", "checkpointStep"}
MADE_ONCE = frozenset({"PyTorchJob", "Job", "PodGroup"})
"""Kinds that are not changed after they were made: their specs cannot be, or belong to a queue by then."""


class Stale(Exception):
    """The SFTJob is no longer what was decided on."""


@dataclass
class Written:
    """What was last written for a job."""

    digests: dict[tuple[str, str], str] = field(default_factory=dict)
    """Of what was last applied to the object of this uid and name."""
    status: float = float("-inf")
    """When the status was, by the loop's clock."""


def utc_now() -> datetime:
    return datetime.now(UTC)


class Sync:
    """Carries out decisions; `run` is what the queue runs."""

    def __init__(
        self, cluster: Cluster, world: World, settings: Settings, clock: Callable[[], datetime] = utc_now
    ) -> None:
        self._cluster = cluster
        self._world = world
        self._settings = settings
        self._clock = clock
        self._written: dict[Key, Written] = {}

    async def run(self, key: Key) -> float | None:
        """Make true what should be; returns after how many seconds to look again though nothing changes."""
        raw = self._world.job(key)
        if raw is None:
            self._written.pop(key, None)
            await self._collect(key)
            return None
        before = job_status(raw)
        decision = await self._decide(key, raw, before)
        try:
            return await self._carry_out(key, raw, before, decision)
        except Stale:
            await self._look_again(key)
            return 0.0

    # ── decide ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _decide(self, key: Key, raw: Raw, before: SFTJobStatus) -> Decision:
        try:
            job = parse_job(
                {"apiVersion": API_VERSION, "kind": KIND, "metadata": raw["metadata"], "spec": raw.get("spec")}
            )
        except ManifestError as error:
            generation = raw["metadata"].get("generation", 0)
            return refuse(before, generation, error.problems, self._clock().replace(microsecond=0))
        job = job.model_copy(update={"status": before})
        observed = await observe(key, job, self._world, self._cluster, self._clock())
        return reconcile(job, observed, self._settings, self._clock())

    # ── carry out ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _carry_out(self, key: Key, raw: Raw, before: SFTJobStatus, decision: Decision) -> float | None:
        for manifest in decision.apply:
            await self._make(key, raw, manifest)
        postponed = await self._report(key, raw, before, decision)
        for ref in decision.delete:
            await self._delete(key, ref)
        waits = [seconds for seconds in (decision.again_seconds, postponed) if seconds is not None]
        return min(waits, default=None)

    async def _make(self, key: Key, raw: Raw, manifest: Manifest) -> None:
        """See that the object is there, as the manifest says. An object of its name that is not ours is left alone."""
        kind, name, digest = manifest["kind"], manifest["metadata"]["name"], digest_of(manifest)
        known = self._world.find(key, kind, name)
        digests = self._written.setdefault(key, Written()).digests
        if known is not None and (kind in MADE_ONCE or digests.get((known.uid, name)) == digest):
            return
        try:
            made = await self._cluster.create(manifest) if known is None else await self._cluster.apply(manifest)
        except ClusterError as error:
            made = await self._already_ours(key, raw, manifest, error)
        digests[(made["metadata"]["uid"], name)] = digest
        self._world.put(kind, made)

    async def _already_ours(self, key: Key, raw: Raw, manifest: Manifest, error: ClusterError) -> Raw:
        """The object, where it was made just before and not seen yet. Else the error is told where users look."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if error.status == 404 and self._world.find(key, kind, name) is not None:
            self._world.forget(key, kind, name)  # it was deleted meanwhile
            raise error
        found = await self._cluster.get(kind, key.namespace, name) if error.status == 409 else None
        if found is not None and is_of(found, manifest):
            return found
        message = f"{kind} {name} cannot be made: {error}"
        await self._tell(raw, events.Event("MakingFailed", message, message, "Warning"))
        raise error

    async def _delete(self, key: Key, ref: ObjectRef) -> None:
        left = await self._cluster.delete(key.namespace, ref)
        LOG.info("%s: deleted %s %s", key, ref.kind, ref.name)
        if left is not None:
            self._world.put(ref.kind, left)
        elif (known := self._world.find(key, ref.kind, ref.name)) and known.uid == (ref.uid or known.uid):
            self._world.forget(key, ref.kind, ref.name)

    async def _collect(self, key: Key) -> None:
        """Delete what an SFTJob that is gone has left and Kubernetes does not collect."""
        left = [known for known in self._world.children(key) if not known.is_collected and known.kind in MADE_ONCE]
        if not left:
            return
        owner = await self._cluster.get("SFTJob", key.namespace, key.name)
        for known in left:
            if owner is None or owner["metadata"]["uid"] != known.owner:
                await self._delete(key, ref_of(known))

    # ── report ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _report(self, key: Key, raw: Raw, before: SFTJobStatus, decision: Decision) -> float | None:
        """Write the status if it changed; returns after how many seconds it should be, where it is put off.

        Raises Stale, before anything is deleted, where the SFTJob is no longer what was decided on.
        """
        written = self._written.setdefault(key, Written())
        old, new = as_json(before), as_json(decision.status)
        if old == new:
            await self._confirm(key, raw, decision)
            return None
        due = written.status + FIGURES_SECONDS - asyncio.get_running_loop().time()
        if due > 0 and not decision.delete and without_figures(old) == without_figures(new):
            return due
        try:
            answer = await self._cluster.apply_status(raw, new)
        except ClusterError as error:
            raise Stale if error.status in (404, 409) else error from error
        written.status = asyncio.get_running_loop().time()
        self._world.put("SFTJob", answer)
        for event in events.transitions(before, decision.status):
            await self._tell(raw, event)
        return None

    async def _confirm(self, key: Key, raw: Raw, decision: Decision) -> None:
        """Where something is to be deleted and no status is written, that nothing has changed."""
        if not decision.delete:
            return
        now = await self._cluster.get("SFTJob", key.namespace, key.name)
        if now is None or now["metadata"]["resourceVersion"] != raw["metadata"]["resourceVersion"]:
            raise Stale

    async def _look_again(self, key: Key) -> None:
        now = await self._cluster.get("SFTJob", key.namespace, key.name)
        if now is None:
            self._world.forget_job(key)
        else:
            self._world.put("SFTJob", now)

    async def _tell(self, raw: Raw, event: events.Event) -> None:
        """Post an event. One that was posted before is refused, and one that is lost holds nothing up."""
        LOG.info("%s/%s: %s: %s", raw["metadata"]["namespace"], raw["metadata"]["name"], event.reason, event.message)
        try:
            await self._cluster.create(events.manifest(event, raw, self._settings.pod_name, self._clock()))
        except ClusterError as error:
            if error.status != 409:
                LOG.warning("no event %s: %s", event.reason, error)


def is_of(found: Raw, manifest: Manifest) -> bool:
    """Whether the object was made for the same SFTJob, by its uid, as the manifest would be."""
    ours = manifest["metadata"]["labels"]
    given = found["metadata"].get("labels") or {}
    return all(given.get(name) == value for name, value in ours.items())


def ref_of(known: Child) -> ObjectRef:
    return ObjectRef(known.kind, known.name, known.uid)


def digest_of(manifest: Manifest) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def as_json(status: SFTJobStatus) -> dict[str, Any]:
    """The status as the API server takes it: a null is no value there."""
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)


def without_figures(status: Mapping[str, Any]) -> dict[str, Any]:
    """What of a status is written at once when it changes."""
    rest = {name: value for name, value in status.items() if name not in FIGURES}
    rest["attempts"] = [without(attempt, FIGURES_OF_ATTEMPTS) for attempt in status.get("attempts", [])]
    rest["conditions"] = [without(condition, {"message"}) for condition in status.get("conditions", [])]
    return rest


def without(fields: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}
