"""`sft logs`: what the pods of a job say; of pods that are gone, the last lines that the operator kept."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from sft_cli.clusters import (
    NO_ANSWER,
    Access,
    Cluster,
    ClusterError,
    ClusterJob,
    JobPod,
    NotStarted,
    connect,
    number_of,
)
from sft_operator.observed import Role
from sft_operator.pods import CONTAINER

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Wanted:
    """Whose log, and how much of it."""

    attempt: int | None = None
    """The last one unless given."""
    rank: int = 0
    """The pod's place in the gang."""
    all_ranks: bool = False
    prepare: bool = False
    follow: bool = False
    tail: int | None = None


def logs(name: str, access: Access, wanted: Wanted) -> int:
    """Print the log on stdout, and what is to be said of it on stderr. Returns the exit code."""
    try:
        with connect(access) as cluster:
            job = cluster.job(name)
            last = number_of(job.status.attempts[-1]) if job.status.attempts else 0
            number = 0 if wanted.prepare else wanted.attempt or last
            pods = chosen_pods(cluster, job, number, wanted)
            if pods:
                print_logs(cluster, pods, wanted)
            else:
                print_kept(job, number, wanted.tail)
    except ClusterError as error:
        print(error, file=sys.stderr)
        return NO_ANSWER
    except KeyboardInterrupt:  # how following ends
        return 0
    return 0


def chosen_pods(cluster: Cluster, job: ClusterJob, number: int, wanted: Wanted) -> list[JobPod]:
    """The pods to hear, by rank; of the preparation where `number` is 0. None where they are gone."""
    if number == 0:
        if not wanted.prepare:
            tell("there is no attempt yet: this is the preparation")
        return cluster.pods(job, Role.PREPARE)[-1:]
    newest = {pod.rank: pod for pod in cluster.pods(job, Role.TRAIN, number)}
    if wanted.all_ranks or not newest:
        return [newest[rank] for rank in sorted(newest)]
    if wanted.rank not in newest:
        there = ", ".join(map(str, sorted(newest)))
        raise ClusterError(f"attempt {number} has no pod of rank {wanted.rank}; there are the ranks {there}")
    return [newest[wanted.rank]]


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ── of pods that are there ─────────────────────────────────────────────────────────────────────────────────────────


def print_logs(cluster: Cluster, pods: Sequence[JobPod], wanted: Wanted) -> None:
    """One pod's lines as they are; of several, each with its rank before it."""
    if len(pods) == 1 and not wanted.all_ranks:
        for line in spoken(cluster, pods[0], wanted):
            print(line, flush=wanted.follow)
        return
    lines = together(cluster, pods, wanted) if wanted.follow else in_turn(cluster, pods, wanted)
    for rank, line in lines:
        print(f"[{rank}] {line}", flush=wanted.follow)


def in_turn(cluster: Cluster, pods: Sequence[JobPod], wanted: Wanted) -> Iterator[tuple[int, str]]:
    for pod in pods:
        for line in spoken(cluster, pod, wanted):
            yield pod.rank, line


def together(cluster: Cluster, pods: Sequence[JobPod], wanted: Wanted) -> Iterator[tuple[int, str]]:
    """Lines of all pods as they come, until the last of them has ended."""
    inbox: SimpleQueue[tuple[int, str | ClusterError | None]] = SimpleQueue()

    def listen(pod: JobPod) -> None:
        try:
            for line in spoken(cluster, pod, wanted):
                inbox.put((pod.rank, line))
            inbox.put((pod.rank, None))
        except ClusterError as error:
            inbox.put((pod.rank, error))

    for pod in pods:
        threading.Thread(target=listen, args=(pod,), name=f"log-{pod.rank}", daemon=True).start()
    going_on = len(pods)
    while going_on:
        match inbox.get():
            case rank, str(line):
                yield rank, line
            case rank, ended:
                going_on -= 1
                if ended is not None:
                    tell(f"[{rank}] {ended}")


def spoken(cluster: Cluster, pod: JobPod, wanted: Wanted) -> Iterator[str]:
    """The pod's lines; where they are followed, from when it starts."""
    told = None
    while True:
        try:
            yield from cluster.log(pod, CONTAINER, follow=wanted.follow, tail=wanted.tail)
            return
        except NotStarted as error:
            if not wanted.follow or not cluster.is_pending(pod):
                raise
            if str(error) != told:
                tell(f"waiting: {error}")
            told = str(error)
        time.sleep(POLL_SECONDS)


# ── of pods that are gone ──────────────────────────────────────────────────────────────────────────────────────────


def print_kept(job: ClusterJob, number: int, tail: int | None) -> None:
    """The last lines of an attempt's failed pod, from the status."""
    if number == 0:
        raise ClusterError(f"SFTJob {job.name} has no pod of a preparation: it has not begun, or is cleaned up")
    kept = {number_of(attempt): attempt for attempt in job.status.attempts}
    if number not in kept:
        known = ", ".join(map(str, kept)) or "none"
        raise ClusterError(f"SFTJob {job.name} has no attempt {number}; in its status: {known}")
    attempt = kept[number]
    ending = f"it ended by {attempt.reason}: {attempt.message}" if attempt.ended else "its pods are still to be made"
    if not attempt.log:
        raise ClusterError(f"attempt {number} has no pods, and no lines of their log were kept; {ending}")
    tell(f"the pods of attempt {number} are gone; {ending}")
    tell("the last lines of the one that failed, from the job's status:")
    lines = attempt.log.splitlines()
    for line in lines if tail is None else lines[len(lines) - min(tail, len(lines)) :]:
        print(line)
