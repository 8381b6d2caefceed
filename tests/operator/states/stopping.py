"""What stops a job from outside: its limits in time, a suspension, its end, its deletion."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sft_api.run import ExitCode
from sft_api.status import SFTJobStatus, State
from tests.operator.builders import (
    CREATED,
    UID,
    ago,
    ahead,
    all_running,
    ended_attempt,
    ended_pod,
    finished_master,
    gang_of,
    make_attempt,
    make_checkpoint,
    make_condition,
    make_gang,
    make_group,
    make_observed,
    make_pod,
    make_prepare,
    make_progress,
    make_report,
    make_status,
    pending_pod,
    prepare_pod,
)
from tests.operator.states.case import CONFIG, Case
from tests.operator.states.preparing import failed

RUNNING = make_status(attempts=(make_attempt(),))
QUEUED = make_status(State.QUEUED, attempts=(make_attempt(running=False),))
FIRST = ("granite-1",)
GO = ("PyTorchJob/granite-1",)
STOPPING = ("False", "Stopping", "suspending: the pods commit a checkpoint and end")
HOLDING = ("True", "Suspended", "spec.suspend is true: no pods run; set it to false to go on")
HELD_LONG = make_attempt(started=ago(3000))


def stopping(status: SFTJobStatus) -> SFTJobStatus:
    """The status, written while a suspension took effect."""
    return status.model_copy(
        update={"conditions": [*status.conditions, make_condition("Suspended", "False", "Stopping")]}
    )


def suspended(**fields: Any) -> SFTJobStatus:
    """The status of a job that was suspended five minutes ago."""
    status = make_status(State.SUSPENDED, **fields)
    since = make_condition("Suspended", "True", "Suspended", ago(300))
    return status.model_copy(update={"conditions": [*status.conditions, since]})


def finished(state: State, seconds_ago: float = 5, **fields: Any) -> SFTJobStatus:
    known = {"attempts": (ended_attempt(1, "Completed", disruption=None, ended=ago(seconds_ago)),)}
    return make_status(state, **(known | fields), finished=ago(seconds_ago))


LIMITS = (
    Case(
        "the deadline is over while it runs",
        all_running(),
        RUNNING,
        spec={"lifecycle.activeDeadlineSeconds": 3599},
        state=State.FAILED,
        says=failed("DeadlineExceeded", "not done within spec.lifecycle.activeDeadlineSeconds, 3,599"),
        deleted=GO,
        attempts=("granite-1 DeadlineExceeded",),
    ),
    Case(
        "the deadline is over while it prepares",
        make_observed(prepare=make_prepare(), pods=(prepare_pod(),)),
        make_status(State.PREPARING, prepared=False),
        spec={"lifecycle.activeDeadlineSeconds": 60},
        state=State.FAILED,
        says=failed("DeadlineExceeded", "…") | {"Prepared": ("False", "DeadlineExceeded", "…")},
        deleted=("Job/granite-prepare",),
    ),
    Case(
        "time suspended does not count for the deadline",
        all_running(),
        make_status(attempts=(make_attempt(),), suspended_seconds=120.0),
        spec={"lifecycle.activeDeadlineSeconds": 3599},
        state=State.RUNNING,
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "it hangs, and says so",
        all_running(
            report=make_report(progress=make_progress(heartbeat=ago(2000))), gangs=(make_gang(created=ago(3000)),)
        ),
        make_status(attempts=(HELD_LONG,)),
        state=State.RESTARTING,
        says={
            "Running": (
                "False",
                "Restarting",
                "…; granite-1 ended (Hung): no step has ended for 2,000 s; spec.lifecycle.hangTimeoutSeconds is 1,800",
            )
        },
        deleted=GO,
        attempts=("granite-1 Hung",),
        counts=(1, 0),
    ),
    Case(
        "it never took a step",
        all_running(report=make_report(progress=None, checkpoint=None)),
        make_status(attempts=(HELD_LONG,)),
        state=State.RESTARTING,
        deleted=GO,
        attempts=("granite-1 Hung",),
        counts=(1, 0),
    ),
    Case(
        "its own watchdog still has time to speak",
        all_running(report=make_report(progress=make_progress(heartbeat=ago(1920)))),
        make_status(attempts=(HELD_LONG,)),
        state=State.RUNNING,
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "it cannot be reached: that is no hang",
        all_running(),
        make_status(attempts=(HELD_LONG,), progress=make_progress(heartbeat=ago(2900))),
        state=State.RUNNING,
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "an older attempt's heartbeat is no sign of this one",
        all_running(2, report=make_report(progress=make_progress(heartbeat=ago(3500)))),
        make_status(attempts=(ended_attempt(1), make_attempt(2))),
        state=State.RUNNING,
        applied=CONFIG,
        attempts=("granite-1 Killed", "granite-2"),
    ),
    Case(
        "the pods did not come to run in time",
        gang_of(make_pod(0), pending_pod(1, unscheduled="no room")),
        QUEUED,
        spec={"scheduling.timeoutSeconds": 599},
        state=State.FAILED,
        says=failed("NotScheduled", "1 of 2 pods ran within spec.scheduling.timeoutSeconds, 599"),
        deleted=GO,
        attempts=("granite-1 NotScheduled",),
    ),
    Case(
        "no pod was made in time",
        gang_of(),
        QUEUED,
        spec={"scheduling.timeoutSeconds": 599},
        state=State.FAILED,
        says=failed("NotScheduled", "0 of 2 pods ran within spec.scheduling.timeoutSeconds, 599"),
        deleted=GO,
        attempts=("granite-1 NotScheduled",),
    ),
    Case(
        "they still have time",
        gang_of(make_pod(0), pending_pod(1, unscheduled="no room")),
        QUEUED,
        spec={"scheduling.timeoutSeconds": 600},
        state=State.QUEUED,
        applied=CONFIG,
        attempts=FIRST,
    ),
)

SUSPENDED = (
    Case(
        "made suspended",
        make_observed(prepare=None, has_config=False),
        spec={"suspend": True},
        state=State.SUSPENDED,
        says={"Suspended": HOLDING, "Reconciling": ("False", "Accepted", "…")},
        again=None,
    ),
    Case(
        "suspended while it prepares",
        make_observed(prepare=make_prepare(), pods=(prepare_pod(),)),
        make_status(State.PREPARING, prepared=False),
        spec={"suspend": True},
        state=State.PREPARING,
        says={"Suspended": STOPPING},
        deleted=("Job/granite-prepare",),
    ),
    Case(
        "suspended when the preparation has failed: the reason is kept for later",
        make_observed(prepare=make_prepare(failed="BackoffLimitExceeded")),
        make_status(State.PREPARING, prepared=False),
        spec={"suspend": True},
        state=State.SUSPENDED,
        again=None,
    ),
    Case(
        "suspended while it waits for nodes",
        gang_of(pending_pod(0), pending_pod(1)),
        QUEUED,
        spec={"suspend": True},
        state=State.QUEUED,
        says={"Suspended": STOPPING, "Running": ("False", "Starting", "0 of 2 pods run")},
        deleted=GO,
        attempts=FIRST,
    ),
    Case(
        "suspended while it runs",
        all_running(report=make_report()),
        RUNNING,
        spec={"suspend": True},
        state=State.RUNNING,
        says={"Suspended": STOPPING},
        deleted=GO,
        attempts=FIRST,
    ),
    Case(
        "its pods save, and end",
        gang_of(
            ended_pod(0, ExitCode.PREEMPTED, deleting=ahead(280)),
            make_pod(1, deleting=ahead(280)),
            gangs=(make_gang(deleting=True, failed="1 failed"),),
            pod_groups=(make_group(deleting=True),),
        ),
        stopping(RUNNING),
        spec={"suspend": True},
        state=State.RUNNING,
        says={"Suspended": STOPPING, "Running": ("True", "Running", "1 of 2 pods run, …")},
        attempts=FIRST,
    ),
    Case(
        "its pods are gone",
        make_observed(pods=(ended_pod(0, ExitCode.PREEMPTED, gone=True),)),
        stopping(RUNNING),
        spec={"suspend": True},
        state=State.SUSPENDED,
        says={
            "Suspended": HOLDING,
            "GangScheduled": ("False", "NoPods", "no pods now: the job is Suspended; …"),
            "Running": ("False", "Suspended", "no pods of the gang run: the job is Suspended"),
        },
        attempts=("granite-1 Suspended",),
        again=None,
    ),
    Case(
        "suspended between two attempts",
        gang_of(make_pod(1, deleting=ahead(100)), gangs=(make_gang(deleting=True),), pod_groups=()),
        make_status(State.RESTARTING, attempts=(ended_attempt(1, ended=ago(5)),), restarts=1),
        spec={"suspend": True},
        state=State.RESTARTING,
        says={"Suspended": STOPPING},
        attempts=("granite-1 Killed",),
        counts=(1, 0),
    ),
    Case(
        "suspended in the back-off",
        make_observed(),
        make_status(State.RESTARTING, attempts=(ended_attempt(1, ended=ago(5)),), restarts=1),
        spec={"suspend": True},
        state=State.SUSPENDED,
        attempts=("granite-1 Killed",),
        counts=(1, 0),
        again=None,
    ),
    Case(
        "a suspended job has no deadline",
        make_observed(),
        suspended(attempts=(ended_attempt(1, "Suspended", disruption=None),)),
        spec={"suspend": True, "lifecycle.activeDeadlineSeconds": 60},
        state=State.SUSPENDED,
        attempts=("granite-1 Suspended",),
        again=None,
    ),
    Case(
        "resumed: the next attempt at once",
        make_observed(),
        suspended(attempts=(ended_attempt(1, "Suspended", disruption=None, ended=ago(1)),)),
        state=State.QUEUED,
        says={"Suspended": ("False", "NotSuspended", "the job is not suspended")},
        applied=(*CONFIG, "PodGroup/granite-2", "PyTorchJob/granite-2"),
        attempts=("granite-1 Suspended", "granite-2"),
    ),
    Case(
        "resumed after a suspension in the preparation",
        make_observed(prepare=None),
        suspended(prepared=False),
        state=State.PREPARING,
        applied=(*CONFIG, "Job/granite-prepare"),
    ),
    Case(
        "resumed before the pods were gone: it is no disruption",
        gang_of(make_pod(0, deleting=ahead(280)), make_pod(1, deleting=ahead(280)), gangs=(make_gang(deleting=True),)),
        stopping(RUNNING),
        state=State.RUNNING,
        says={"Suspended": STOPPING},
        attempts=FIRST,
    ),
    Case(
        "resumed, and now the pods are gone",
        make_observed(pods=(ended_pod(0, ExitCode.PREEMPTED, gone=True),)),
        stopping(RUNNING),
        state=State.SUSPENDED,
        attempts=("granite-1 Suspended",),
        again=0.0,
        steps=2,
    ),
)

ENDED = (
    Case(
        "it has succeeded, and its pods are about to end",
        all_running(report=make_report(complete=True)),
        finished(State.SUCCEEDED),
        state=State.SUCCEEDED,
        attempts=("granite-1 Completed",),
    ),
    Case(
        "it has succeeded, and its pods do not end",
        all_running(report=make_report(complete=True)),
        finished(State.SUCCEEDED, 60),
        state=State.SUCCEEDED,
        deleted=GO,
        attempts=("granite-1 Completed",),
    ),
    Case(
        "it has succeeded, and nothing runs any more",
        gang_of(finished_master(), ended_pod(1, 0), gangs=(make_gang(succeeded=True),)),
        finished(State.SUCCEEDED),
        state=State.SUCCEEDED,
        attempts=("granite-1 Completed",),
        again=None,
    ),
    Case(
        "it has failed: the training operator takes the healthy pods away and leaves the failed one",
        gang_of(ended_pod(0, 10), make_pod(1, deleting=ahead(250)), gangs=(make_gang(failed="1 failed"),)),
        finished(State.FAILED),
        state=State.FAILED,
        attempts=("granite-1 Completed",),
    ),
    Case(
        "it has failed, and a pod is stuck on a lost node",
        gang_of(
            ended_pod(0, 10),
            make_pod(1, deleting=ahead(250)),
            gangs=(make_gang(failed="1 failed"),),
            lost_nodes=frozenset({"node-2"}),
        ),
        finished(State.FAILED),
        state=State.FAILED,
        deleted=("Pod/granite-1-worker-0 now",),
        attempts=("granite-1 Completed",),
    ),
    Case(
        "it has failed, and the gang that was to go is still there",
        all_running(),
        finished(State.FAILED),
        state=State.FAILED,
        deleted=GO,
        attempts=("granite-1 Completed",),
    ),
    Case(
        "a finished job is not suspended, refused or begun anew",
        make_observed(prepare=None),
        finished(State.FAILED, attempts=()),
        spec={"suspend": True, "checkpoints.uri": "file://runs/granite", "lifecycle.activeDeadlineSeconds": 1},
        state=State.FAILED,
        again=None,
    ),
    Case(
        "its children have a while to live",
        gang_of(finished_master(), gangs=(make_gang(succeeded=True),)),
        finished(State.SUCCEEDED, 100),
        spec={"lifecycle.ttlSecondsAfterFinished": 600},
        state=State.SUCCEEDED,
        attempts=("granite-1 Completed",),
        again=500.0,
    ),
    Case(
        "their time is over",
        gang_of(finished_master(), gangs=(make_gang(succeeded=True),)),
        finished(State.SUCCEEDED, 600),
        spec={"lifecycle.ttlSecondsAfterFinished": 600},
        state=State.SUCCEEDED,
        deleted=(*GO, "Job/granite-prepare", "ConfigMap/granite-run"),
        attempts=("granite-1 Completed",),
    ),
    Case(
        "they are gone",
        make_observed(prepare=None, has_config=False),
        finished(State.SUCCEEDED, 600),
        spec={"lifecycle.ttlSecondsAfterFinished": 0},
        state=State.SUCCEEDED,
        attempts=("granite-1 Completed",),
        again=None,
    ),
)

DELETED = (
    Case(
        "it is being deleted, and waits for its children",
        all_running(),
        make_status(attempts=(make_attempt(),), checkpoint=make_checkpoint()),
        metadata={"deletionTimestamp": ago(2).isoformat(), "finalizers": ["foregroundDeletion"]},
        state=State.RUNNING,
        deleted=(*GO, "Job/granite-prepare", "ConfigMap/granite-run"),
        attempts=FIRST,
    ),
    Case(
        "it is being deleted: what is gone is not made anew",
        gang_of(make_pod(0, deleting=ago(60)), gangs=(), pod_groups=(), prepare=None, has_config=False),
        RUNNING,
        metadata={"deletionTimestamp": ago(2).isoformat(), "finalizers": ["foregroundDeletion"]},
        state=State.RUNNING,
        deleted=("Pod/granite-1-master-0 now",),
        attempts=FIRST,
    ),
)

OTHER_OPERATORS = (
    Case(
        "the status of an operator that wrote less",
        all_running(report=make_report()),
        SFTJobStatus(state=State.RUNNING, attempts=[make_attempt()]),
        metadata={"uid": UID, "creationTimestamp": CREATED.isoformat()},
        state=State.RUNNING,
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "objects of an operator that labelled no owner",
        replace(
            all_running(report=make_report()),
            gangs=(make_gang(owner=None),),
            pods=(make_pod(0, owner=None), make_pod(1, owner=None)),
        ),
        RUNNING,
        state=State.RUNNING,
        applied=CONFIG,
        attempts=FIRST,
    ),
)

CASES = (*LIMITS, *SUSPENDED, *ENDED, *DELETED, *OTHER_OPERATORS)
