"""A small Kubernetes in which decisions are carried out: the job, its children, and what happens to them. Pure values.

It does what an API server, a training operator, kubelets and a garbage collector do with the few objects of one job, as
far as a decision can tell. Nothing happens by itself: a test says what happens next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from sft_api.job import SFTJob
from sft_api.run import ExitCode
from sft_api.status import SFTJobStatus
from sft_operator.observed import Decision, Ended, Gang, Manifest, ObjectRef, Observed, Pod
from sft_operator.reconcile import reconcile
from tests.operator.builders import (
    NATIVE,
    NOW,
    SETTINGS,
    make_account,
    make_gang,
    make_group,
    make_job,
    make_pod,
    make_prepare,
    make_progress,
    make_report,
    prepare_ended,
    prepare_pod,
)

GRACE = timedelta(seconds=300)


@dataclass
class World:
    """One job and everything of it."""

    job: SFTJob = field(default_factory=make_job)
    observed: Observed = field(default_factory=lambda: Observed(platform=NATIVE))
    now: datetime = NOW

    # ── the operator ──

    def look(self, stages: int = 3) -> Decision:
        """One run of the operator; it dies after so many of: apply, status, delete."""
        decision = reconcile(self.job, self.observed, SETTINGS, self.now)
        self.carry_out(decision, stages)
        return decision

    def carry_out(self, decision: Decision, stages: int = 3) -> None:
        for manifest in decision.apply if stages > 0 else ():
            self.apply(manifest)
        if stages > 1:
            self.job = self.job.model_copy(update={"status": as_written(decision.status)})
        for ref in decision.delete if stages > 2 else ():
            self.delete(ref)

    def apply(self, manifest: Manifest) -> None:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if kind == "ConfigMap":
            self.change(has_config=True)
        elif kind == "Job" and self.observed.prepare is None:
            self.change(prepare=make_prepare(name=name))
        elif kind == "PodGroup" and not self.has(self.observed.pod_groups, name):
            number = int(name.rpartition("-")[2])
            self.change(pod_groups=(*self.observed.pod_groups, make_group(number)))
        elif kind == "PyTorchJob":
            self.apply_gang(int(name.rpartition("-")[2]))

    def apply_gang(self, number: int) -> None:
        others = [gang.name for gang in self.observed.gangs] + [pod.name for pod in self.live_pods]
        assert not others, f"attempt {number} is made beside {others}"
        self.change(gangs=(make_gang(number, created=self.now),))

    def delete(self, ref: ObjectRef) -> None:
        if ref.kind == "PyTorchJob":
            self.delete_gang(ref.name)
        elif ref.kind == "PodGroup":
            self.change(pod_groups=tuple(group for group in self.observed.pod_groups if group.name != ref.name))
        elif ref.kind == "Job" and self.observed.prepare is not None:
            self.change(prepare=replace(self.observed.prepare, deleting=True))
        elif ref.kind == "ConfigMap":
            self.change(has_config=False)
        elif ref.force:
            self.change(pods=tuple(pod for pod in self.observed.pods if pod.name != ref.name))
        else:
            self.each_pod(lambda pod: pod.name == ref.name and not pod.deleting, deleting=self.now + GRACE)

    # ── what happens to it ──

    def delete_gang(self, name: str) -> None:
        """In the foreground: it is there until its pods are gone."""
        self.each_gang(name=name, deleting=True)
        self.each_pod(lambda pod: pod.attempt > 0 and not pod.deleting, deleting=self.now + GRACE)

    def prepares(self, code: int | None) -> None:
        """The prepare pod runs, or ends."""
        prepare = self.observed.prepare
        if prepare is None or prepare.deleting or prepare.complete or prepare.failed:
            return
        pod = prepare_pod() if code is None else prepare_ended(code)
        others = tuple(pod for pod in self.observed.pods if pod.attempt)
        failed = f"exit code {code}" if code else None
        self.change(pods=(*others, pod), prepare=replace(prepare, complete=code == 0, failed=failed))

    def makes_pods(self, number_of_them: int = 2) -> None:
        """The training operator makes the first pods of a gang."""
        for gang in self.observed.gangs:
            ranks = [pod.rank for pod in self.live_pods]
            if not gang.deleting and not gang.failed and not gang.succeeded:
                made = tuple(self.new_pod(gang, rank) for rank in range(number_of_them) if rank not in ranks)
                old = tuple(pod for pod in self.observed.pods if pod.attempt in (0, gang.attempt))
                self.change(pods=(*old, *made))

    def new_pod(self, gang: Gang, rank: int) -> Pod:
        return make_pod(rank, gang.attempt, phase="Pending", node=None, scheduled=None, created=self.now)

    def runs(self) -> None:
        """All pending pods come to run."""
        self.each_pod(lambda pod: pod.phase == "Pending" and pod.rank == 0, self.started("node-1"))
        self.each_pod(lambda pod: pod.phase == "Pending" and pod.rank == 1, self.started("node-2"))

    def started(self, node: str) -> dict[str, Any]:
        return {"phase": "Running", "node": node, "scheduled": self.now}

    def trains(self, steps: int = 0) -> None:
        """The gang answers, and has committed a checkpoint so many steps after the last."""
        self.change(report=None)
        if sum(pod.is_running for pod in self.live_pods) == self.job.spec.trainer.nodes:
            known = self.status.checkpoint
            step = (known.step if known else 0) + steps
            progress = make_progress(step + 5, heartbeat=self.now)
            self.change(report=make_report(checkpoint=step, progress=progress))

    def is_done(self) -> None:
        """The gang ends as it should."""
        if not self.observed.gangs or sum(pod.is_running for pod in self.live_pods) < self.job.spec.trainer.nodes:
            return
        account = make_account(0, "trained", report=make_report(complete=True))
        self.exits(0, 0, account.model_dump_json(by_alias=True))
        self.exits(1, 0)

    def exits(self, rank: int, code: int, message: str | None = None) -> None:
        """A running pod ends; the training operator notices."""
        if not any(pod.rank == rank and pod.is_running for pod in self.live_pods):
            return
        words = message or make_account(code).model_dump_json(by_alias=True)
        end = Ended(code, "Error" if code else "Completed", words, self.now)
        self.each_pod(
            lambda pod: pod.rank == rank and pod.is_running and pod.attempt > 0,
            ended=end,
            phase="Failed" if code else "Succeeded",
        )
        if code:
            self.each_gang(failed="1 replica(s) failed.", ended=self.now)
        elif rank == 0:
            self.each_gang(succeeded=True, ended=self.now)

    def is_tidied(self) -> None:
        """The training operator takes away what still runs of a gang that has ended."""
        if any(gang.failed or gang.succeeded for gang in self.observed.gangs):
            self.each_pod(
                lambda pod: pod.attempt > 0 and pod.is_running and not pod.deleting, deleting=self.now + GRACE
            )

    def is_taken(self, rank: int, disruption: str | None, node_is_lost: bool = False) -> None:
        """A pod is evicted, deleted, or on a node that does not answer any more."""
        if not any(pod.rank == rank and pod.is_running for pod in self.live_pods):
            return
        self.each_pod(
            lambda pod: pod.rank == rank and pod.is_running and pod.attempt > 0,
            disruption=disruption,
            deleting=self.now + GRACE,
        )
        self.each_gang(failed="1 replica(s) failed.", ended=self.now)
        if node_is_lost:
            self.change(lost_nodes=frozenset({f"node-{rank + 1}"}))

    def passes(self, seconds: float) -> None:
        """Time passes: what was told to end and did not is killed in the end, but for what runs on a lost node."""
        self.now += timedelta(seconds=seconds)
        self.leaves(lambda pod: pod.deleting is not None and self.now >= pod.deleting)

    def obeys(self) -> None:
        """What was told to end ends, but for what runs on a lost node."""
        self.leaves(lambda pod: pod.deleting is not None)

    def leaves(self, goes: Callable[[Pod], bool]) -> None:
        """These pods are gone, and so is what waited for them."""
        lost = self.observed.lost_nodes
        kept = (gone(pod, self.now) if goes(pod) and pod.node not in lost else pod for pod in self.observed.pods)
        self.change(pods=tuple(pod for pod in kept if pod is not None))
        alive = {pod.attempt for pod in self.live_pods}
        self.change(gangs=tuple(gang for gang in self.observed.gangs if not gang.deleting or gang.attempt in alive))
        prepare = self.observed.prepare
        if prepare is not None and prepare.deleting:
            self.change(prepare=None, pods=tuple(pod for pod in self.observed.pods if pod.attempt))

    def nodes_answer(self) -> None:
        self.change(lost_nodes=frozenset())

    def wants(self, **spec: Any) -> None:
        """The user changes the spec."""
        metadata = self.job.metadata.model_copy(update={"generation": (self.job.metadata.generation or 0) + 1})
        self.job = self.job.model_copy(update={"spec": self.job.spec.model_copy(update=spec), "metadata": metadata})

    # ── shared ──

    @property
    def live_pods(self) -> list[Pod]:
        return [pod for pod in self.observed.pods if pod.attempt and not pod.gone]

    @property
    def status(self) -> SFTJobStatus:
        return self.job.status or SFTJobStatus()

    def change(self, **fields: Any) -> None:
        self.observed = replace(self.observed, **fields)

    def each_pod(self, wanted: Callable[[Pod], bool], fields: dict[str, Any] | None = None, **more: Any) -> None:
        changes = (fields or {}) | more
        self.change(pods=tuple(replace(pod, **changes) if wanted(pod) else pod for pod in self.observed.pods))

    def each_gang(self, name: str | None = None, **fields: Any) -> None:
        self.change(
            gangs=tuple(replace(gang, **fields) if name in (None, gang.name) else gang for gang in self.observed.gangs)
        )

    @staticmethod
    def has(objects: tuple[Any, ...], name: str) -> bool:
        return any(found.name == name for found in objects)


def gone(pod: Pod, now: datetime) -> Pod | None:
    """The pod after its end, kept for its words; none where it has none."""
    if not pod.is_running:
        return replace(pod, gone=True) if pod.ended else None
    end = Ended(ExitCode.PREEMPTED, "Error", make_account(30).model_dump_json(by_alias=True), now)
    return replace(pod, ended=end, phase="Failed", gone=True)


def as_written(status: SFTJobStatus) -> SFTJobStatus:
    """The status as it is read again: written as JSON, and held to the bounds of the schema."""
    return SFTJobStatus.model_validate_json(status.model_dump_json(by_alias=True, exclude_none=True))
