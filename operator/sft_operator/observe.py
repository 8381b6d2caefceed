"""Brings together what a decision may rest on: what is known already, and what is asked only when it matters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta

from sft_api import labels
from sft_api.job import SFTJob
from sft_api.report import TrainerReport
from sft_api.status import Attempt
from sft_operator.cluster import Cluster
from sft_operator.observed import Gang, Observed, Role, Trouble
from sft_operator.restart import find_cause
from sft_operator.views import Key
from sft_operator.world import World

SETTLE = timedelta(seconds=5)
"""How long the training operator has to make a gang's pods before warnings are looked for."""


async def observe(key: Key, job: SFTJob, world: World, cluster: Cluster, now: datetime) -> Observed:
    """The world of this job, at most as old as the watches are late."""
    if group := unplaced_group(job, world.observed(key)):
        await refresh_group(key, group, world, cluster)
    known = world.observed(key)
    return replace(
        known,
        report=await report(job, known, cluster),
        troubles=await troubles(key, job, known, cluster, now),
        logs=await logs(key, job, known, cluster, now),
        lost_nodes=await lost_nodes(known, cluster),
    )


def attempt_of(job: SFTJob) -> Attempt | None:
    """The attempt that goes on."""
    attempts = job.status.attempts if job.status else []
    return attempts[-1] if attempts and attempts[-1].ended is None else None


def gang_of(job: SFTJob, known: Observed) -> Gang | None:
    """What makes the pods of the attempt that goes on."""
    attempt = attempt_of(job)
    return next((gang for gang in known.gangs if attempt and gang.name == attempt.name), None)


def unplaced_group(job: SFTJob, known: Observed) -> str | None:
    """Name of the PodGroup of a gang that does not run yet: PodGroups are not watched."""
    attempt = attempt_of(job)
    if attempt is None or not known.platform.pod_groups:
        return None
    running = sum(
        pod.is_running for pod in known.pods if labels.attempt(job.metadata.name, pod.attempt) == attempt.name
    )
    return attempt.name if running < job.spec.trainer.nodes else None


async def refresh_group(key: Key, name: str, world: World, cluster: Cluster) -> None:
    raw = await cluster.get("PodGroup", key.namespace, name)
    if raw is None:
        world.forget(key, "PodGroup", name)
    else:
        world.put("PodGroup", raw)


async def report(job: SFTJob, known: Observed, cluster: Cluster) -> TrainerReport | None:
    """What the attempt's first rank answers just now."""
    gang = gang_of(job, known)
    if gang is None:
        return None
    for pod in known.pods:
        if pod.attempt == gang.attempt and pod.rank == 0 and pod.is_running and pod.ip and pod.owner == gang.owner:
            return await cluster.progress(pod.ip)
    return None


async def troubles(key: Key, job: SFTJob, known: Observed, cluster: Cluster, now: datetime) -> tuple[Trouble, ...]:
    """Warnings about what should have made pods and has not: those have no pod to tell."""
    gang, prepare = gang_of(job, known), known.prepare
    if gang is not None:
        made = [pod for pod in known.pods if pod.attempt == gang.attempt and not pod.gone]
        is_late = now - gang.created > SETTLE and not gang.queued and not gang.deleting
        if is_late and not gang.ended and len(made) < job.spec.trainer.nodes:
            return await cluster.warnings(key.namespace, gang.uid)
        return ()
    if prepare is None or prepare.complete or prepare.failed or any(pod.role is Role.PREPARE for pod in known.pods):
        return ()
    return await cluster.warnings(key.namespace, prepare.uid)


async def logs(key: Key, job: SFTJob, known: Observed, cluster: Cluster, now: datetime) -> Mapping[str, str]:
    """The last lines of the pod that shows why the attempt has ended, before it is deleted."""
    gang, attempt = gang_of(job, known), attempt_of(job)
    if gang is None or attempt is None:
        return {}
    pods = [pod for pod in known.pods if pod.role is Role.TRAIN and pod.attempt == gang.attempt]
    cause = find_cause(gang, pods, attempt, now)
    if cause is None or cause.pod is None or all(pod.gone for pod in pods if pod.name == cause.pod):
        return {}
    return {cause.pod: await cluster.log_tail(key.namespace, cause.pod)}


async def lost_nodes(known: Observed, cluster: Cluster) -> frozenset[str]:
    """Of the nodes that terminating pods are on, those that will not confirm it."""
    nodes = sorted({pod.node for pod in known.pods if pod.deleting and not pod.gone and pod.node})
    return frozenset([node for node in nodes if await cluster.node_is_lost(node)])
