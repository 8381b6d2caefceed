"""The smallest valid job, world and status, for tests of the operator: each says only what matters to it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from sft_api.job import SFTJob
from sft_api.manifest import parse_job
from sft_api.report import Termination, TrainerReport
from sft_api.run import ExitCode
from sft_api.status import (
    Attempt,
    CheckpointStatus,
    Condition,
    ExportStatus,
    PhasePlanStatus,
    PhaseStatus,
    PlanStatus,
    Progress,
    SFTJobStatus,
    State,
)
from sft_operator.observed import Ended, Gang, Observed, Platform, Pod, PodGroup, PrepareJob, Role
from sft_operator.restart import reason_of
from sft_operator.settings import Settings
from tests.api.jobs import document

CREATED = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
"""When the job was made."""
NOW = CREATED + timedelta(hours=1)
UID = "0d5a7c1e-0000-4000-8000-000000000001"
NATIVE = Platform(pod_groups=True, gang_policy=True)
SETTINGS = Settings(trainer_image="registry.example/sft-trainer:1")


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def ahead(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def make_job(
    changes: Mapping[str, Any] | None = None,
    status: SFTJobStatus | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> SFTJob:
    """A job `granite` on two nodes of eight GPUs; changes by path, as `lifecycle.maxRestarts`."""
    paths = {"trainer.nodes": 2, "trainer.gpusPerNode": 8} | dict(changes or {})
    server = {"namespace": "lab", "uid": UID, "generation": 1, "creationTimestamp": CREATED.isoformat()}
    given = document({f"spec.{path}": value for path, value in paths.items()})
    given["metadata"] |= server | dict(metadata or {})
    return parse_job(given).model_copy(update={"status": status})


def make_status(
    state: State = State.RUNNING, *, prepared: bool = True, attempts: tuple[Attempt, ...] = (), **fields: Any
) -> SFTJobStatus:
    """What the operator wrote when it last looked."""
    conditions = [make_condition("Prepared", "True" if prepared else "False", "Prepared" if prepared else "NotStarted")]
    known = {"state": state, "observed_generation": 1, "conditions": conditions, "attempts": list(attempts)}
    return SFTJobStatus.model_validate(known | fields)


def make_condition(kind: str, status: str, reason: str, since: datetime = CREATED) -> Condition:
    return Condition.model_validate(
        {
            "type": kind,
            "status": status,
            "reason": reason,
            "message": "…",
            "lastTransitionTime": since,
            "observedGeneration": 1,
        }
    )


def make_attempt(number: int = 1, *, running: bool = True, started: datetime | None = None, **fields: Any) -> Attempt:
    """An attempt that began ten minutes ago."""
    started = started or ago(600)
    known = {"name": f"granite-{number}", "started": started, "running": started if running else None}
    return Attempt.model_validate(known | fields)


def ended_attempt(number: int = 1, reason: str = "Killed", **fields: Any) -> Attempt:
    """An attempt that failed an hour ago, unless the fields say otherwise."""
    known: dict[str, Any] = {
        "ended": ago(3600),
        "reason": reason,
        "message": "it ended",
        "disruption": False,
        "held_seconds": 0.0,
    }
    return make_attempt(number, started=ago(4200), **(known | fields))


def make_gang(number: int = 1, **fields: Any) -> Gang:
    known: dict[str, Any] = {"created": ago(600), "owner": UID}
    return Gang(name=f"granite-{number}", uid=f"gang-{number}", attempt=number, **(known | fields))


def make_group(number: int = 1, **fields: Any) -> PodGroup:
    return PodGroup(**({"name": f"granite-{number}", "uid": f"group-{number}", "owner": UID} | fields))


def make_pod(rank: int = 0, number: int = 1, **fields: Any) -> Pod:
    """A running pod of the gang, on a node of its own."""
    replica = "master-0" if rank == 0 else f"worker-{rank - 1}"
    known: dict[str, Any] = {
        "name": f"granite-{number}-{replica}",
        "uid": f"pod-{number}-{rank}",
        "role": Role.TRAIN,
        "attempt": number,
        "rank": rank,
        "phase": "Running",
        "created": ago(600),
        "scheduled": ago(600),
        "node": f"node-{rank + 1}",
        "ip": f"10.0.0.{rank + 1}",
        "in_pod_group": True,
        "owner": UID,
    }
    return Pod(**(known | fields))


def pending_pod(rank: int = 0, number: int = 1, **fields: Any) -> Pod:
    """A pod that no node has yet."""
    known: dict[str, Any] = {"phase": "Pending", "node": None, "ip": None, "scheduled": None}
    return make_pod(rank, number, **(known | fields))


def waiting_pod(waiting: str, rank: int = 0, number: int = 1, **fields: Any) -> Pod:
    """A pod that has its node, and a container that cannot start there."""
    return make_pod(rank, number, phase="Pending", waiting=waiting, **fields)


def ended_pod(rank: int = 0, code: int = 0, number: int = 1, *, seconds_ago: float = 2, **fields: Any) -> Pod:
    """A pod whose container ended with this code, and said so as our launcher does unless `message` is given."""
    message = fields.pop("message", None)
    account = message if message is not None else make_account(code).model_dump_json(by_alias=True)
    reason = fields.pop("kubelet", "Completed" if code == 0 else "Error")
    end = Ended(code, reason, account, ago(seconds_ago))
    return make_pod(rank, number, phase="Failed" if code else "Succeeded", ended=end, **fields)


def make_account(code: int = 0, message: str | None = None, **fields: Any) -> Termination:
    said = message or f"the trainer's words on {code}"
    return Termination(exit_code=code, reason=reason_of(code), message=said, **fields)


def finished_master(number: int = 1, **fields: Any) -> Pod:
    """The first pod after all is done: it says so in its account."""
    account = make_account(ExitCode.COMPLETED, "trained", report=make_report(complete=True))
    return ended_pod(0, 0, number, message=account.model_dump_json(by_alias=True), **fields)


def prepare_pod(**fields: Any) -> Pod:
    known: dict[str, Any] = {
        "name": "granite-prepare-x7k2p",
        "uid": "prepare-pod",
        "role": Role.PREPARE,
        "number": 0,
        "in_pod_group": False,
    }
    return make_pod(**(known | fields))


def prepare_ended(code: int, message: str | None = None, **fields: Any) -> Pod:
    """A prepare pod that has ended; with its plan where all is well."""
    account = make_account(code, message, plan=make_plan() if code == 0 else None)
    end = Ended(code, "Completed" if code == 0 else "Error", account.model_dump_json(by_alias=True), ago(2))
    return prepare_pod(phase="Failed" if code else "Succeeded", ended=end, **fields)


def make_prepare(**fields: Any) -> PrepareJob:
    return PrepareJob(**({"name": "granite-prepare", "uid": "prepare", "owner": UID} | fields))


def make_plan() -> PlanStatus:
    phase = PhasePlanStatus(
        name="stacked", samples=1200, tokens=480_000, steps=300, dropped=0, truncated=3, fingerprint="f00d"
    )
    return PlanStatus(samples=1200, tokens=480_000, phases=[phase])


def make_progress(step: int = 120, heartbeat: datetime | None = None, **fields: Any) -> Progress:
    known: dict[str, Any] = {
        "step": step,
        "total_steps": 300,
        "epoch": 1,
        "samples": 128 * step,
        "tokens": 50_000 * step,
        "percent": step // 3,
        "loss": 1.5,
        "heartbeat": heartbeat or ago(1),
    }
    return Progress.model_validate(known | fields)


def make_checkpoint(step: int = 100, *, verified: bool = True) -> CheckpointStatus:
    uri = f"s3://lab/runs/granite/ckpt/{step:08d}/1"
    return CheckpointStatus(uri=uri, step=step, phase="stacked", time=ago(30), verified=verified)


def make_report(
    step: int = 120, *, checkpoint: int | None = 100, complete: bool = False, **fields: Any
) -> TrainerReport:
    known: dict[str, Any] = {
        "attempt": 1,
        "phase": PhaseStatus(name="stacked", index=0, count=1),
        "progress": make_progress(300 if complete else step),
        "checkpoint": make_checkpoint(300 if complete else checkpoint) if complete or checkpoint else None,
        "export": ExportStatus(uri="s3://lab/runs/granite/export/stacked") if complete else None,
        "productive_seconds": 500.0,
        "complete": complete,
    }
    return TrainerReport.model_validate(known | fields)


def make_observed(**fields: Any) -> Observed:
    """A cluster with Kubernetes' own gang scheduling, where the preparation is done."""
    known: dict[str, Any] = {"platform": NATIVE, "prepare": make_prepare(complete=True), "has_config": True}
    return Observed(**(known | fields))


def gang_of(*pods: Pod, **fields: Any) -> Observed:
    """A world with the first attempt's gang and these pods."""
    known: dict[str, Any] = {"gangs": (make_gang(),), "pod_groups": (make_group(scheduled=True),), "pods": pods}
    return make_observed(**(known | fields))


def all_running(number: int = 1, **fields: Any) -> Observed:
    known: dict[str, Any] = {"gangs": (make_gang(number),), "pod_groups": (make_group(number, scheduled=True),)}
    return gang_of(make_pod(0, number), make_pod(1, number), **(known | fields))
