"""How an attempt ends, and what follows: another one, or the end of the job."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sft_api.run import PERMANENT, ExitCode
from sft_api.status import State
from sft_operator.observed import Platform
from sft_operator.restart import reason_of
from tests.operator.builders import (
    ago,
    ahead,
    all_running,
    ended_attempt,
    ended_pod,
    finished_master,
    gang_of,
    make_account,
    make_attempt,
    make_checkpoint,
    make_gang,
    make_group,
    make_observed,
    make_pod,
    make_report,
    make_status,
)
from tests.operator.states.case import CONFIG, Case
from tests.operator.states.preparing import failed

RUNNING = make_status(attempts=(make_attempt(),))
FIRST = ("granite-1",)
GO = ("PyTorchJob/granite-1",)
"""What is deleted at an attempt's end; its PodGroup goes when the pods are gone."""
FAILED_GANG = {"gangs": (make_gang(failed="PyTorchJob granite-1 is failed because 1 Worker replica(s) failed."),)}
TAINT = "DeletionByTaintManager: Taint manager: deleting due to NoExecute taint"
DONE = (
    "True",
    "Completed",
    "300 steps trained, and the final checkpoint committed; the model is at s3://lab/…/stacked",
)


def restarts(reason: str, disruption: bool = False) -> dict[str, Any]:
    """What is expected where another attempt follows."""
    counts = (0, 1) if disruption else (1, 0)
    return {"state": State.RESTARTING, "deleted": GO, "attempts": (f"granite-1 {reason}",), "counts": counts}


def waits(**fields: Any) -> dict[str, Any]:
    return {"state": State.RUNNING, "applied": CONFIG, "attempts": FIRST, **fields}


COMPLETE = (
    Case(
        "the master says that all is done while it still runs",
        all_running(report=make_report(complete=True)),
        RUNNING,
        state=State.SUCCEEDED,
        says={
            "Succeeded": DONE,
            "Stalled": ("False", "NotStalled", "…"),
            "Running": ("False", "Succeeded", "no pods of the gang run: the job is Succeeded"),
            "CheckpointHealthy": ("True", "Committed", "step 300 is committed, read back and whole: …"),
        },
        attempts=("granite-1 Completed",),
    ),
    Case(
        "the master ended well, and said that all is done",
        gang_of(finished_master(), ended_pod(1, 0), gangs=(make_gang(succeeded=True),)),
        RUNNING,
        state=State.SUCCEEDED,
        says={"Succeeded": DONE},
        attempts=("granite-1 Completed",),
    ),
    Case(
        "a worker fails in its teardown after the master is done",
        gang_of(finished_master(), ended_pod(1, 1), gangs=(make_gang(succeeded=True),)),
        RUNNING,
        state=State.SUCCEEDED,
        says={"Succeeded": DONE},
        attempts=("granite-1 Completed",),
    ),
    Case(
        "the worker's failure was seen before the master's account",
        gang_of(finished_master(gone=True), gangs=()),
        make_status(State.RESTARTING, attempts=(ended_attempt(1),), restarts=1),
        state=State.SUCCEEDED,
        says={"Succeeded": DONE},
        attempts=("granite-1 Killed",),
        counts=(1, 0),
    ),
    Case(
        "suspended when all is done: it has succeeded",
        all_running(report=make_report(complete=True)),
        RUNNING,
        spec={"suspend": True},
        state=State.SUCCEEDED,
        attempts=("granite-1 Completed",),
    ),
    Case(
        "the master ended well without a word of the final checkpoint",
        gang_of(ended_pod(0, 0), ended_pod(1, 0), gangs=(make_gang(succeeded=True),)),
        RUNNING,
        **restarts("Incomplete"),
    ),
    Case(
        "the PyTorchJob succeeded, and its master's account is not seen yet",
        gang_of(make_pod(0), ended_pod(1, 0), gangs=(make_gang(succeeded=True, ended=ago(3)),)),
        RUNNING,
        **waits(),
    ),
)

EXITS = (
    *(
        Case(
            f"exit {int(code)} is permanent",
            gang_of(make_pod(0), ended_pod(1, code), **FAILED_GANG),
            RUNNING,
            state=State.FAILED,
            says=failed(
                reason_of(code),
                f"pod granite-1-worker-0 ended with exit code {int(code)} ({reason_of(code)}): the trainer's words on "
                f"{int(code)}",
            )
            | {"Prepared": ("True", "Prepared", "…"), "Reconciling": ("False", "Accepted", "…")},
            attempts=(f"granite-1 {reason_of(code)}",),
        )
        for code in PERMANENT
    ),
    Case("exit 1", gang_of(make_pod(0), ended_pod(1, 1), **FAILED_GANG), RUNNING, **restarts("Failed")),
    Case("exit 137", gang_of(make_pod(0), ended_pod(1, 137), **FAILED_GANG), RUNNING, **restarts("Killed")),
    Case("exit 255 is no signal", gang_of(make_pod(0), ended_pod(1, 255)), RUNNING, **restarts("Failed")),
    Case(
        "out of memory in the kubelet's eyes, without a message",
        gang_of(make_pod(0), ended_pod(1, 137, kubelet="OOMKilled", message=""), **FAILED_GANG),
        RUNNING,
        **restarts("OOMKilled"),
        says={
            "Running": (
                "False",
                "Restarting",
                "the next attempt begins when the pods of this one are gone and the back-off is over; granite-1 ended "
                "(OOMKilled): pod granite-1-worker-0 ended with exit code 137 (OOMKilled): OOMKilled; it left no …",
            )
        },
    ),
    Case(
        "the last lines of a log in place of an account",
        gang_of(make_pod(0), ended_pod(1, 1, message="Traceback …\nImportError: libcuda.so.1\n")),
        RUNNING,
        **restarts("Failed"),
        says={"Running": ("False", "Restarting", "…(Failed): Traceback …\nImportError: libcuda.so.1")},
    ),
    Case("exit 31", gang_of(make_pod(0), ended_pod(1, ExitCode.HUNG)), RUNNING, **restarts("Hung")),
    Case(
        "exit 33",
        gang_of(make_pod(0), ended_pod(1, ExitCode.STORE_UNAVAILABLE)),
        RUNNING,
        **restarts("StoreUnavailable"),
    ),
    Case(
        "exit 30 is a disruption",
        gang_of(ended_pod(0, ExitCode.PREEMPTED), ended_pod(1, ExitCode.PREEMPTED)),
        RUNNING,
        **restarts("Preempted", disruption=True),
    ),
    Case(
        "exit 32 alone: a better cause is waited for",
        gang_of(make_pod(0), ended_pod(1, ExitCode.COMMUNICATION, seconds_ago=14)),
        RUNNING,
        **waits(says={"Running": ("True", "Running", "1 of 2 pods run, …")}),
    ),
    Case(
        "exit 32 alone, and nothing better has turned up",
        gang_of(make_pod(0), ended_pod(1, ExitCode.COMMUNICATION, seconds_ago=15)),
        RUNNING,
        **restarts("Communication"),
    ),
    Case(
        "exit 32 of all: there is nothing to wait for",
        gang_of(ended_pod(0, ExitCode.COMMUNICATION), ended_pod(1, ExitCode.COMMUNICATION)),
        RUNNING,
        **restarts("Communication"),
    ),
    Case(
        "exit 32 beside 137: who was killed is the cause",
        gang_of(ended_pod(0, ExitCode.COMMUNICATION, seconds_ago=5), ended_pod(1, 137)),
        RUNNING,
        **restarts("Killed"),
    ),
    Case(
        "a failed rank, and a master that the training operator took away for it and that saved",
        gang_of(ended_pod(0, ExitCode.PREEMPTED, deleting=ahead(200)), ended_pod(1, 1), **FAILED_GANG),
        RUNNING,
        **restarts("Failed"),
    ),
    Case(
        "a permanent cause in a pod that was on its way out, beside the complaint of its peer",
        gang_of(ended_pod(0, ExitCode.COMMUNICATION), ended_pod(1, ExitCode.OUT_OF_MEMORY, deleting=ahead(200))),
        RUNNING,
        state=State.FAILED,
        says=failed("OutOfMemory", "pod granite-1-worker-0 ended with exit code 14 (OutOfMemory): …"),
        attempts=("granite-1 OutOfMemory",),
    ),
    Case(
        "a node that refused the pod",
        gang_of(make_pod(0), make_pod(1, phase="Failed", failed="UnexpectedAdmissionError: no healthy devices")),
        RUNNING,
        **restarts("PodFailed"),
    ),
)

TAKEN = (
    Case(
        "an eviction has begun",
        gang_of(make_pod(0), make_pod(1, deleting=ahead(290), disruption="EvictionByEvictionAPI: drained")),
        RUNNING,
        **restarts("Disrupted", disruption=True),
        says={
            "Running": (
                "False",
                "Restarting",
                "…; granite-1 ended (Disrupted): pod granite-1-worker-0 on node node-2: EvictionByEvictionAPI: drained",
            )
        },
    ),
    Case(
        "evicted, and killed in the end",
        gang_of(ended_pod(0, ExitCode.COMMUNICATION), ended_pod(1, 137, disruption="Evicted: low on memory")),
        RUNNING,
        **restarts("Disrupted", disruption=True),
    ),
    Case(
        "a lost node: its pod is terminating and runs on, as far as anybody knows",
        gang_of(
            make_pod(0),
            make_pod(1, deleting=ahead(30), disruption=TAINT),
            **FAILED_GANG,
            lost_nodes=frozenset({"node-2"}),
        ),
        RUNNING,
        **restarts("Disrupted", disruption=True) | {"deleted": (*GO, "Pod/granite-1-worker-0 now")},
    ),
    Case(
        "a pod was deleted",
        gang_of(make_pod(0), make_pod(1, deleting=ahead(290)), gangs=(make_gang(failed="1 failed", ended=ago(20)),)),
        RUNNING,
        **restarts("PodDeleted", disruption=True),
    ),
    Case(
        "the PyTorchJob failed, and which pod is to blame is not seen yet",
        gang_of(make_pod(0, deleting=ahead(299)), make_pod(1), gangs=(make_gang(failed="1 failed", ended=ago(2)),)),
        RUNNING,
        **waits(),
    ),
    Case(
        "the PyTorchJob failed, and no pod says why",
        gang_of(make_pod(0), make_pod(1), gangs=(make_gang(failed="because 1 Worker replica(s) failed."),)),
        RUNNING,
        **restarts("Failed"),
        says={"Running": ("False", "Restarting", "…no pod says why: because 1 Worker replica(s) failed.")},
    ),
    Case(
        "the PyTorchJob is being deleted by somebody",
        all_running(gangs=(make_gang(deleting=True),)),
        RUNNING,
        **restarts("Deleted", disruption=True) | {"deleted": ()},
    ),
    Case(
        "the PyTorchJob was deleted by somebody",
        make_observed(),
        RUNNING,
        **restarts("Deleted", disruption=True) | {"deleted": ()},
    ),
    Case(
        "the PyTorchJob and its pods were deleted by somebody, the PodGroup was not",
        make_observed(pod_groups=(make_group(),)),
        RUNNING,
        **restarts("Deleted", disruption=True) | {"deleted": ("PodGroup/granite-1",)},
    ),
    Case(
        "the PyTorchJob was deleted, and its pods were not",
        all_running(gangs=(), pod_groups=()),
        RUNNING,
        **restarts("Deleted", disruption=True) | {"deleted": ("Pod/granite-1-master-0", "Pod/granite-1-worker-0")},
    ),
    Case(
        "Kueue takes the gang back",
        replace(
            gang_of(
                ended_pod(0, ExitCode.PREEMPTED, gone=True),
                make_pod(1, deleting=ahead(290)),
                gangs=(make_gang(queued=True),),
                pod_groups=(),
            ),
            platform=Platform(groups=frozenset({"kueue.x-k8s.io"})),
        ),
        RUNNING,
        spec={"scheduling.gang": "Kueue", "scheduling.queue": "gpus"},
        **restarts("Preempted", disruption=True) | {"deleted": ("PyTorchJob/granite-1",)},
        says={"Running": ("False", "Restarting", "…; granite-1 ended (Preempted): the queue took granite-1 back")},
    ),
)

RESTARTING = make_status(State.RESTARTING, attempts=(ended_attempt(1),), restarts=1)
BETWEEN = (
    Case(
        "the PyTorchJob is on its way out",
        gang_of(ended_pod(0, 1), gangs=(make_gang(deleting=True),), pod_groups=(make_group(deleting=True),)),
        RESTARTING,
        state=State.RESTARTING,
        attempts=("granite-1 Killed",),
        counts=(1, 0),
    ),
    Case(
        "it is gone, a pod of it is not",
        gang_of(make_pod(1, deleting=ahead(200)), gangs=(), pod_groups=()),
        RESTARTING,
        state=State.RESTARTING,
        attempts=("granite-1 Killed",),
        counts=(1, 0),
    ),
    Case(
        "a pod is stuck: its node is lost",
        gang_of(
            make_pod(1, deleting=ahead(200)),
            gangs=(make_gang(deleting=True),),
            pod_groups=(),
            lost_nodes=frozenset({"node-2"}),
        ),
        RESTARTING,
        state=State.RESTARTING,
        deleted=("Pod/granite-1-worker-0 now",),
        attempts=("granite-1 Killed",),
        counts=(1, 0),
    ),
    Case(
        "a pod is past its time, and is given half a minute more",
        gang_of(make_pod(1, deleting=ago(30)), gangs=(make_gang(deleting=True),), pod_groups=()),
        RESTARTING,
        state=State.RESTARTING,
        attempts=("granite-1 Killed",),
        counts=(1, 0),
    ),
    Case(
        "a pod is stuck: its time is long over",
        gang_of(make_pod(1, deleting=ago(31)), gangs=(make_gang(deleting=True),), pod_groups=()),
        RESTARTING,
        state=State.RESTARTING,
        deleted=("Pod/granite-1-worker-0 now",),
        attempts=("granite-1 Killed",),
        counts=(1, 0),
    ),
    Case(
        "a pod that is gone is in nobody's way; its checkpoint came after the end",
        make_observed(
            pods=(
                ended_pod(
                    0,
                    ExitCode.PREEMPTED,
                    gone=True,
                    message=make_account(30, report=make_report(checkpoint=140)).model_dump_json(by_alias=True),
                ),
            )
        ),
        make_status(
            State.RESTARTING,
            attempts=(ended_attempt(1, "Disrupted", disruption=True, ended=ago(4), checkpoint_step=100),),
            checkpoint=make_checkpoint(100),
            disruptions=1,
            restarts=1,
        ),
        state=State.RESTARTING,
        says={"CheckpointHealthy": ("True", "Committed", "step 140 is committed, …")},
        attempts=("granite-1 Disrupted",),
        counts=(0, 1),
        again=6.0,
    ),
    Case(
        "the first back-off is not over",
        make_observed(),
        make_status(State.RESTARTING, attempts=(ended_attempt(1, ended=ago(9)),), restarts=1),
        state=State.RESTARTING,
        attempts=("granite-1 Killed",),
        counts=(1, 0),
        again=1.0,
    ),
    Case(
        "the pods are gone, the PodGroup is not",
        make_observed(pod_groups=(make_group(1),)),
        RESTARTING,
        state=State.RESTARTING,
        deleted=("PodGroup/granite-1",),
        attempts=("granite-1 Killed",),
        counts=(1, 0),
        steps=2,
    ),
    Case(
        "the first back-off is over",
        make_observed(pod_groups=(make_group(1, deleting=True),)),
        make_status(State.RESTARTING, attempts=(ended_attempt(1, ended=ago(10)),), restarts=1),
        state=State.QUEUED,
        applied=(*CONFIG, "PodGroup/granite-2", "PyTorchJob/granite-2"),
        attempts=("granite-1 Killed", "granite-2"),
        counts=(1, 0),
    ),
    Case(
        "back-off doubles",
        make_observed(),
        make_status(
            State.RESTARTING, attempts=(ended_attempt(1), ended_attempt(2), ended_attempt(3, ended=ago(10))), restarts=3
        ),
        state=State.RESTARTING,
        attempts=("granite-1 Killed", "granite-2 Killed", "granite-3 Killed"),
        counts=(3, 0),
        again=30.0,
    ),
    Case(
        "a newer checkpoint begins the back-off anew, and a suspension in between does not count",
        make_observed(),
        make_status(
            State.RESTARTING,
            attempts=(
                ended_attempt(1, checkpoint_step=100),
                ended_attempt(2, checkpoint_step=100),
                ended_attempt(3, "Suspended", disruption=None, checkpoint_step=140),
                ended_attempt(4, checkpoint_step=150, ended=ago(3)),
            ),
            restarts=1,
        ),
        state=State.RESTARTING,
        attempts=("granite-1 Killed", "granite-2 Killed", "granite-3 Suspended", "granite-4 Killed"),
        counts=(1, 0),
        again=7.0,
    ),
    Case(
        "back-off has its cap, and ten attempts are kept",
        make_observed(),
        make_status(
            State.RESTARTING,
            attempts=tuple(ended_attempt(number, ended=ago(299)) for number in range(5, 15)),
            restarts=3,
        ),
        state=State.RESTARTING,
        attempts=tuple(f"granite-{number} Killed" for number in range(5, 15)),
        counts=(3, 0),
        again=1.0,
    ),
    Case(
        "the eleventh attempt",
        make_observed(),
        make_status(
            State.RESTARTING,
            attempts=tuple(ended_attempt(number, ended=ago(300)) for number in range(5, 15)),
            restarts=3,
        ),
        state=State.QUEUED,
        applied=(*CONFIG, "PodGroup/granite-15", "PyTorchJob/granite-15"),
        attempts=(*(f"granite-{number} Killed" for number in range(6, 15)), "granite-15"),
        counts=(3, 0),
    ),
)

BUDGETS = (
    Case(
        "restarts are spent",
        gang_of(make_pod(0), ended_pod(1, 137), **FAILED_GANG),
        make_status(attempts=(make_attempt(),), restarts=3),
        state=State.FAILED,
        says=failed(
            "Killed",
            "failed 4 times without a newer checkpoint, and spec.lifecycle.maxRestarts is 3; last: pod "
            "granite-1-worker-0 ended with exit code 137 (Killed): the trainer's words on 137",
        ),
        attempts=("granite-1 Killed",),
        counts=(4, 0),
    ),
    Case(
        "no restart is wanted",
        gang_of(make_pod(0), ended_pod(1, 137)),
        RUNNING,
        spec={"lifecycle.maxRestarts": 0},
        state=State.FAILED,
        says=failed("Killed", "failed 1 times without a newer checkpoint, and spec.lifecycle.maxRestarts is 0; …"),
        attempts=("granite-1 Killed",),
        counts=(1, 0),
    ),
    Case(
        "disruptions are spent",
        gang_of(make_pod(0), make_pod(1, deleting=ahead(290), disruption="PreemptionByScheduler: for b")),
        make_status(attempts=(make_attempt(),), restarts=3, disruptions=2),
        spec={"lifecycle.maxDisruptions": 2},
        state=State.FAILED,
        says=failed(
            "Disrupted",
            "disrupted 3 times, and spec.lifecycle.maxDisruptions is 2; last: pod granite-1-worker-0 on node node-2: "
            "PreemptionByScheduler: for b",
        ),
        deleted=GO,
        attempts=("granite-1 Disrupted",),
        counts=(3, 3),
    ),
)

CASES = (*COMPLETE, *EXITS, *TAKEN, *BETWEEN, *BUDGETS)
