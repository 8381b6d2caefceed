"""From a new job to prepared data."""

from __future__ import annotations

from dataclasses import replace

from sft_api.run import ExitCode
from sft_api.status import State
from sft_operator.observed import Trouble
from tests.operator.builders import (
    UID,
    ago,
    gang_of,
    make_attempt,
    make_condition,
    make_gang,
    make_group,
    make_observed,
    make_plan,
    make_pod,
    make_prepare,
    make_report,
    make_status,
    prepare_ended,
    prepare_pod,
)
from tests.operator.states.case import CONFIG, Case

NEW = make_observed(prepare=None, has_config=False)
PREPARING = make_status(State.PREPARING, prepared=False)
UNPREPARED = make_observed(prepare=make_prepare())
FIRST_PREPARED = ("True", "Prepared", "1,200 samples of 480,000 tokens, 300 steps")
OPEN = ("Unknown", "InProgress", "the job has not ended")


def failed(reason: str, message: str) -> dict[str, tuple[str, str, str]]:
    """What a job says that has failed."""
    return {"Succeeded": ("False", reason, message), "Stalled": ("True", reason, message)}


CASES = (
    Case(
        "a new job",
        NEW,
        state=State.PREPARING,
        says={
            "Prepared": ("False", "Preparing", "the preparation is about to start"),
            "GangScheduled": ("False", "NoPods", "no pods yet: the job is Preparing; a gang of Kubernetes' own …"),
            "Running": ("False", "Preparing", "no pods of the gang run: the job is Preparing"),
            "Suspended": ("False", "NotSuspended", "the job is not suspended"),
            "CheckpointHealthy": ("Unknown", "NoneYet", "no checkpoint is committed yet"),
            "Succeeded": OPEN,
            "Stalled": ("False", "NotStalled", "nothing has ended the job for good"),
            "Reconciling": ("False", "Accepted", "the operator waits for pods, or has nothing to do"),
        },
        applied=(*CONFIG, "Job/granite-prepare"),
    ),
    Case(
        "a job whose preparation was made and whose status was not written",
        make_observed(prepare=make_prepare()),
        state=State.PREPARING,
        applied=CONFIG,
    ),
    Case(
        "the preparation runs",
        replace(UNPREPARED, pods=(prepare_pod(),)),
        PREPARING,
        state=State.PREPARING,
        says={"Prepared": ("False", "Preparing", "pod granite-prepare-x7k2p prepares the data")},
        applied=CONFIG,
    ),
    Case(
        "no node takes the prepare pod",
        replace(
            UNPREPARED,
            pods=(prepare_pod(phase="Pending", node=None, unscheduled="0/2 nodes are available: 2 Insufficient cpu"),),
        ),
        PREPARING,
        state=State.PREPARING,
        says={
            "Prepared": (
                "False",
                "Waiting",
                "pod granite-prepare-x7k2p: 0/2 nodes are available: 2 Insufficient cpu",
            )
        },
        applied=CONFIG,
    ),
    Case(
        "the prepare pod's image cannot be pulled",
        replace(
            UNPREPARED, pods=(prepare_pod(phase="Pending", waiting='ImagePullBackOff: Back-off pulling image "x"'),)
        ),
        PREPARING,
        state=State.PREPARING,
        says={
            "Prepared": (
                "False",
                "Waiting",
                'pod granite-prepare-x7k2p: ImagePullBackOff: Back-off pulling image "x"',
            )
        },
        applied=CONFIG,
    ),
    Case(
        "the prepare pod's Secret is missing",
        replace(
            UNPREPARED,
            pods=(prepare_pod(phase="Pending", waiting='CreateContainerConfigError: secret "lab-s3" not found'),),
        ),
        PREPARING,
        state=State.PREPARING,
        says={
            "Prepared": (
                "False",
                "Waiting",
                'pod granite-prepare-x7k2p: CreateContainerConfigError: secret "lab-s3" not found',
            )
        },
        applied=CONFIG,
    ),
    Case(
        "the prepare pod is refused",
        replace(UNPREPARED, troubles=(Trouble("FailedCreate", 'pods "x" is forbidden: exceeded quota'),)),
        PREPARING,
        state=State.PREPARING,
        says={"Prepared": ("False", "FailedCreate", 'pods "x" is forbidden: exceeded quota')},
        applied=CONFIG,
    ),
    Case(
        "the preparation is tried again",
        replace(UNPREPARED, pods=(prepare_ended(ExitCode.STORE_UNAVAILABLE, "s3://lab does not answer"),)),
        PREPARING,
        state=State.PREPARING,
        says={
            "Prepared": (
                "False",
                "Retrying",
                "pod granite-prepare-x7k2p ended with StoreUnavailable: s3://lab does not answer",
            )
        },
        applied=CONFIG,
    ),
    Case(
        "the data is wrong",
        make_observed(
            prepare=make_prepare(failed="Container pytorch … failed with exit code 11 matching FailJob rule"),
            pods=(prepare_ended(ExitCode.DATA, "spec.phases[0].data[0].uri: line 7 has no messages"),),
        ),
        PREPARING,
        state=State.FAILED,
        says=failed("Data", "the preparation failed: spec.phases[0].data[0].uri: line 7 has no messages")
        | {
            "Prepared": (
                "False",
                "Data",
                "the preparation failed: spec.phases[0].data[0].uri: line 7 has no messages",
            )
        },
    ),
    Case(
        "the preparation failed too often",
        make_observed(
            prepare=make_prepare(failed="Job has reached the specified backoff limit"),
            pods=(
                prepare_ended(137, "first", name="granite-prepare-a", created=ago(500)),
                prepare_ended(ExitCode.STORE_UNAVAILABLE, "s3://lab does not answer", created=ago(100)),
            ),
        ),
        PREPARING,
        state=State.FAILED,
        says=failed("StoreUnavailable", "the preparation failed: s3://lab does not answer"),
    ),
    Case(
        "the preparation failed and no pod is left to say why",
        make_observed(prepare=make_prepare(failed="Job has reached the specified backoff limit")),
        PREPARING,
        state=State.FAILED,
        says=failed("PrepareFailed", "the preparation failed: Job has reached the specified backoff limit"),
    ),
    Case(
        "the data is prepared",
        make_observed(pods=(prepare_ended(0),)),
        PREPARING,
        state=State.QUEUED,
        says={"Prepared": FIRST_PREPARED},
        again=0.0,
        steps=2,
    ),
    Case(
        "the Job is complete before its pod's account is seen",
        make_observed(),
        PREPARING,
        state=State.QUEUED,
        says={"Prepared": ("True", "Prepared", "the data is prepared")},
        again=0.0,
        steps=2,
    ),
    Case(
        "the account is seen later, with the gang on its way",
        gang_of(make_pod(0), make_pod(1), prepare_ended(0), report=make_report()),
        make_status(attempts=(make_attempt(),)),
        state=State.RUNNING,
        says={"Prepared": FIRST_PREPARED},
        applied=CONFIG,
        attempts=("granite-1",),
    ),
    Case(
        "the preparation is being deleted by somebody else",
        make_observed(prepare=make_prepare(deleting=True)),
        PREPARING,
        state=State.PREPARING,
        applied=CONFIG,
    ),
    Case(
        "the preparation was deleted by somebody else",
        make_observed(prepare=None),
        PREPARING,
        state=State.PREPARING,
        applied=(*CONFIG, "Job/granite-prepare"),
    ),
    Case(
        "prepared data needs no Job any more",
        make_observed(prepare=None),
        make_status(State.QUEUED, plan=make_plan()),
        state=State.QUEUED,
        says={"Prepared": FIRST_PREPARED},
        applied=(*CONFIG, "PodGroup/granite-1", "PyTorchJob/granite-1"),
        attempts=("granite-1",),
    ),
    Case(
        "a namesake's objects are still there",
        make_observed(
            prepare=make_prepare(complete=True, owner="another"),
            gangs=(make_gang(owner="another", deleting=True),),
            pod_groups=(make_group(owner="another"),),
            pods=(make_pod(0, owner="another", deleting=ago(-200)),),
        ),
        state=State.PENDING,
        says={
            "Reconciling": (
                "True",
                "NamesakeLeaving",
                "the objects of an earlier job of this name are on their way out",
            ),
            "Prepared": ("False", "NotStarted", "the data is not prepared yet"),
        },
        deleted=("Job/granite-prepare",),
    ),
    Case(
        "only the pods of a namesake are left",
        make_observed(prepare=None, pods=(make_pod(0, owner="another", deleting=ago(-200)),)),
        state=State.PENDING,
        says={"Reconciling": ("True", "NamesakeLeaving", "…")},
    ),
    Case(
        "a spec that a cluster cannot carry out",
        NEW,
        spec={"checkpoints.uri": "file://runs/granite"},
        state=State.FAILED,
        says=failed(
            "InvalidSpec", "spec.checkpoints.uri: file://runs/granite is a folder inside each pod, and is lost …"
        ),
        again=None,
    ),
    Case(
        "the same, mended",
        NEW,
        make_status(State.FAILED, prepared=False).model_copy(
            update={
                "conditions": [
                    make_condition("Succeeded", "False", "InvalidSpec"),
                    make_condition("Stalled", "True", "InvalidSpec"),
                ]
            }
        ),
        metadata={"uid": UID, "generation": 2},
        state=State.PREPARING,
        says={"Succeeded": OPEN, "Stalled": ("False", "NotStalled", "…")},
        applied=(*CONFIG, "Job/granite-prepare"),
    ),
)
