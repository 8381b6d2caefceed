"""From prepared data to a gang that runs: who places it, and what keeps pods from starting."""

from __future__ import annotations

from dataclasses import replace

from sft_api.status import State
from sft_operator.observed import Platform, Trouble
from tests.operator.builders import (
    UID,
    ago,
    all_running,
    ended_pod,
    gang_of,
    make_attempt,
    make_checkpoint,
    make_gang,
    make_group,
    make_observed,
    make_pod,
    make_report,
    make_status,
    pending_pod,
    waiting_pod,
)
from tests.operator.states.case import CONFIG, Case

QUEUED = make_status(State.QUEUED, attempts=(make_attempt(running=False),))
RUNNING = make_status(attempts=(make_attempt(),))
PREPARED = make_status(State.QUEUED)
FIRST = ("granite-1",)
STARTED = {"applied": (*CONFIG, "PyTorchJob/granite-1"), "attempts": FIRST}
NO_GPUS = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu"
NATIVE_GANG = "a gang of Kubernetes' own scheduler, as one PodGroup"
PSS = (
    'pods "granite-1-worker-0" is forbidden: violates PodSecurity "restricted:latest": '
    'allowPrivilegeEscalation != false (container "init-pytorch" must set '
    "securityContext.allowPrivilegeEscalation=false)"
)


def on(*groups: str) -> Platform:
    return Platform(groups=frozenset(groups))


CASES = (
    Case(
        "prepared: a gang of Kubernetes' own",
        make_observed(),
        PREPARED,
        state=State.QUEUED,
        says={
            "GangScheduled": ("False", "Waiting", f"0 of 2 pods placed; {NATIVE_GANG}"),
            "Running": ("False", "Starting", "0 of 2 pods run"),
            "Reconciling": ("False", "Accepted", "…"),
        },
        applied=(*CONFIG, "PodGroup/granite-1", "PyTorchJob/granite-1"),
        attempts=FIRST,
    ),
    Case(
        "prepared: one pod is no gang",
        make_observed(),
        PREPARED,
        spec={"trainer.nodes": 1},
        state=State.QUEUED,
        says={"GangScheduled": ("False", "Waiting", "0 of 1 pods placed; no gang: one pod needs none")},
        **STARTED,
    ),
    Case(
        "prepared: Auto, and the cluster has no PodGroups",
        make_observed(platform=Platform()),
        PREPARED,
        state=State.QUEUED,
        says={
            "GangScheduled": (
                "False",
                "Waiting",
                "0 of 2 pods placed; no gang: spec.scheduling.gang is Auto, and the API server serves no "
                "scheduling.k8s.io/v1beta1 PodGroups: …GenericWorkload…",
            )
        },
        **STARTED,
    ),
    Case(
        "prepared: Native, and the chart's policy is not installed",
        make_observed(platform=Platform(pod_groups=True)),
        PREPARED,
        spec={"scheduling.gang": "Native"},
        state=State.PENDING,
        says={
            "GangScheduled": (
                "False",
                "SchedulerMissing",
                "spec.scheduling.gang is Native: the MutatingAdmissionPolicy sftjob-gang of our chart, …",
            ),
            "Reconciling": ("True", "SchedulerMissing", "the MutatingAdmissionPolicy sftjob-gang of our chart, …"),
            "Running": ("False", "Pending", "no pods of the gang run: the job is Pending"),
        },
    ),
    Case(
        "prepared: Volcano is not installed",
        make_observed(),
        PREPARED,
        spec={"scheduling.gang": "Volcano"},
        state=State.PENDING,
        says={
            "GangScheduled": (
                "False",
                "SchedulerMissing",
                "spec.scheduling.gang is Volcano: the API server serves no scheduling.volcano.sh: install Volcano",
            )
        },
    ),
    Case(
        "prepared: Volcano",
        make_observed(platform=on("scheduling.volcano.sh")),
        PREPARED,
        spec={"scheduling.gang": "Volcano"},
        state=State.QUEUED,
        says={"GangScheduled": ("False", "Waiting", "0 of 2 pods placed; a gang of Volcano")},
        **STARTED,
    ),
    Case(
        "the training operator was not told of Volcano",
        replace(
            gang_of(make_pod(0, in_pod_group=False), make_pod(1, in_pod_group=False), pod_groups=()),
            platform=on("scheduling.volcano.sh"),
        ),
        RUNNING,
        spec={"scheduling.gang": "Volcano"},
        state=State.RUNNING,
        says={
            "GangScheduled": (
                "False",
                "NotInPodGroup",
                "granite-1-master-0 is in no PodGroup: start the training operator with --gang-scheduler-name=volcano",
            )
        },
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "the PyTorchJob is there, no pod yet",
        gang_of(pod_groups=(make_group(),)),
        QUEUED,
        state=State.QUEUED,
        says={"Running": ("False", "Starting", "0 of 2 pods run")},
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "no room for the gang",
        gang_of(
            pending_pod(0),
            pending_pod(1),
            pod_groups=(make_group(message='minCount (2) cannot be satisfied: no node has "nvidia.com/gpu"'),),
        ),
        QUEUED,
        state=State.QUEUED,
        says={
            "GangScheduled": (
                "False",
                "Unschedulable",
                f'0 of 2 pods placed: minCount (2) cannot be satisfied: no node has "nvidia.com/gpu"; {NATIVE_GANG}',
            ),
            "Running": ("False", "Starting", "0 of 2 pods run"),
        },
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "half of the pods are placed, for it is no gang",
        gang_of(make_pod(0), pending_pod(1, unscheduled=NO_GPUS), pod_groups=()),
        QUEUED,
        spec={"scheduling.gang": "None"},
        state=State.QUEUED,
        says={
            "GangScheduled": (
                "False",
                "Unschedulable",
                f"1 of 2 pods placed; granite-1-worker-0: {NO_GPUS}; no gang: spec.scheduling.gang is None",
            ),
            "Running": ("False", "Waiting", f"1 of 2 pods run; granite-1-worker-0: {NO_GPUS}"),
        },
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "placed pod by pod",
        gang_of(make_pod(0), make_pod(1), pod_groups=()),
        RUNNING,
        spec={"scheduling.gang": "None"},
        state=State.RUNNING,
        says={
            "GangScheduled": (
                "False",
                "NoGang",
                "2 of 2 pods placed on node-1, node-2; no gang: spec.scheduling.gang is None",
            )
        },
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "the PodGroup is missing",
        gang_of(pending_pod(0), pending_pod(1), pod_groups=()),
        QUEUED,
        state=State.QUEUED,
        says={
            "GangScheduled": (
                "False",
                "PodGroupMissing",
                "0 of 2 pods placed: PodGroup granite-1 was gone, without which they wait unsaid; it is made anew",
            )
        },
        applied=(*CONFIG, "PodGroup/granite-1"),
        attempts=FIRST,
        steps=2,
    ),
    Case(
        "the pods are in no PodGroup",
        gang_of(make_pod(0, in_pod_group=False), pending_pod(1, in_pod_group=False)),
        QUEUED,
        state=State.QUEUED,
        says={
            "GangScheduled": (
                "False",
                "NotInPodGroup",
                "granite-1-master-0 is in no PodGroup: the policy sftjob-gang did not reach it",
            )
        },
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "a worker is refused by Pod Security",
        gang_of(make_pod(0), troubles=(Trouble("FailedCreatePod", PSS),)),
        QUEUED,
        state=State.QUEUED,
        says={
            "Running": (
                "False",
                "PodSecurity",
                "1 of 2 pods run: the namespace enforces the restricted Pod Security Standard…initContainer.yaml…"
                f"(docs/install.md). The API server's words: {PSS}",
            )
        },
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "pods are refused for another reason, in words of the training operator's own",
        gang_of(troubles=(Trouble("Failed create/pod", "exceeded quota: gpus"),)),
        QUEUED,
        state=State.QUEUED,
        says={"Running": ("False", "Failedcreatepod", "0 of 2 pods run: exceeded quota: gpus")},
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "the image's name is no name",
        gang_of(waiting_pod('InvalidImageName: couldn\'t parse image name "X"', 0), make_pod(1)),
        QUEUED,
        state=State.QUEUED,
        says={
            "GangScheduled": ("True", "Native", f"2 of 2 pods placed on node-1, node-2; {NATIVE_GANG}"),
            "Running": (
                "False",
                "Waiting",
                '1 of 2 pods run; granite-1-master-0: InvalidImageName: couldn\'t parse image name "X"',
            ),
        },
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "the worker waits for its init container",
        gang_of(make_pod(0), waiting_pod("PodInitializing", 1)),
        QUEUED,
        state=State.QUEUED,
        says={"Running": ("False", "Waiting", "1 of 2 pods run; granite-1-worker-0: PodInitializing")},
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "all run for the first time, without a report",
        all_running(),
        QUEUED,
        state=State.RUNNING,
        says={
            "GangScheduled": ("True", "Native", f"2 of 2 pods placed on node-1, node-2; {NATIVE_GANG}"),
            "Running": ("True", "Running", "2 of 2 pods run, attempt 1; the first step is not taken yet"),
            "Prepared": ("True", "Prepared", "…"),
        },
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "the policy is uninstalled while the gang runs",
        replace(all_running(), platform=Platform(pod_groups=True)),
        RUNNING,
        spec={"scheduling.gang": "Native"},
        state=State.RUNNING,
        says={"GangScheduled": ("True", "Native", "…")},
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "it trains",
        all_running(report=make_report()),
        RUNNING,
        state=State.RUNNING,
        says={
            "Running": ("True", "Running", "2 of 2 pods run, attempt 1"),
            "CheckpointHealthy": (
                "True",
                "Committed",
                "step 100 is committed, read back and whole: s3://lab/runs/granite/ckpt/00000100/1",
            ),
        },
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "its saves do not come through",
        all_running(report=make_report(checkpoint_problem="s3://lab: 503 SlowDown; tried again")),
        make_status(attempts=(make_attempt(),), checkpoint=make_checkpoint()),
        state=State.RUNNING,
        says={"CheckpointHealthy": ("False", "SaveFailing", "s3://lab: 503 SlowDown; tried again")},
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "the worker has ended well, the master exports",
        gang_of(make_pod(0), ended_pod(1, 0), report=make_report(300)),
        RUNNING,
        state=State.RUNNING,
        says={"Running": ("True", "Running", "1 of 2 pods run, attempt 1")},
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "a newer checkpoint counts failures anew",
        all_running(2, report=make_report(checkpoint=200)),
        make_status(
            attempts=(
                make_attempt(1, ended=ago(700), reason="Killed", disruption=False, checkpoint_step=100),
                make_attempt(2),
            ),
            restarts=2,
            disruptions=1,
            checkpoint=make_checkpoint(100),
        ),
        state=State.RUNNING,
        applied=CONFIG,
        attempts=("granite-1 Killed", "granite-2"),
        counts=(0, 1),
    ),
    Case(
        "the same checkpoint does not",
        all_running(2, report=make_report(checkpoint=100)),
        make_status(attempts=(make_attempt(2),), restarts=2, checkpoint=make_checkpoint(100)),
        state=State.RUNNING,
        applied=CONFIG,
        attempts=("granite-2",),
        counts=(2, 0),
    ),
    Case(
        "Kueue holds the gang in its queue",
        replace(gang_of(pod_groups=(), gangs=(make_gang(queued=True),)), platform=on("kueue.x-k8s.io")),
        QUEUED,
        spec={"scheduling.gang": "Kueue", "scheduling.queue": "gpus", "scheduling.timeoutSeconds": 60},
        state=State.QUEUED,
        says={
            "GangScheduled": ("False", "Queued", "waits in the queue gpus"),
            "Running": ("False", "Starting", "0 of 2 pods run"),
        },
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "Kueue has let it go, and there is no pod yet",
        replace(gang_of(pod_groups=()), platform=on("kueue.x-k8s.io")),
        QUEUED,
        spec={"scheduling.gang": "Kueue", "scheduling.queue": "gpus", "scheduling.timeoutSeconds": 60},
        state=State.QUEUED,
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "the attempt was made and the status was lost: its number is adopted, and nothing is applied twice",
        all_running(),
        make_status(State.QUEUED),
        state=State.RUNNING,
        applied=CONFIG,
        attempts=FIRST,
    ),
    Case(
        "the whole status was lost",
        all_running(4),
        None,
        state=State.RUNNING,
        applied=CONFIG,
        attempts=("granite-4",),
    ),
    Case(
        "what may change while it runs: the ConfigMap does, the PyTorchJob is not applied again",
        all_running(report=make_report()),
        RUNNING,
        spec={"checkpoints.keep": {"last": 9}, "lifecycle.maxRestarts": 7, "lifecycle.hangTimeoutSeconds": 99},
        metadata={"uid": UID, "generation": 3},
        state=State.RUNNING,
        applied=CONFIG,
        attempts=FIRST,
    ),
)
