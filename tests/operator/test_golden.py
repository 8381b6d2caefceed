"""What each gang scheduler is asked for, as manifests that can be read: tests/operator/golden.

python -m tests.operator.test_golden     writes them anew
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sft_api.pods import GangScheduler
from sft_cli.render import as_yaml, platform
from sft_operator.gang import choose_gang
from sft_operator.objects import attempt, prepare_job
from tests.operator.builders import SETTINGS, make_job

FOLDER = Path(__file__).parent / "golden"
WITH_QUEUES = (GangScheduler.VOLCANO, GangScheduler.KUEUE, GangScheduler.KAI)
SCHEDULERS = [scheduler for scheduler in GangScheduler if scheduler is not GangScheduler.AUTO]


def manifests(scheduler: GangScheduler) -> str:
    """What makes an attempt of two pods, in the order in which it is created."""
    queue = {"scheduling.queue": "research"} if scheduler in WITH_QUEUES else {}
    asked = {"scheduling.gang": scheduler.value, "scheduling.priorityClassName": "high", **queue}
    job = make_job(asked)
    choice = choose_gang(job.spec.scheduling, job.spec.trainer.nodes, platform(True))
    return as_yaml(attempt(job, 1, choice, SETTINGS))


def golden() -> dict[Path, str]:
    """Every file and what it should hold."""
    return {file(scheduler): manifests(scheduler) for scheduler in SCHEDULERS} | {
        FOLDER / "prepare.yaml": as_yaml([prepare_job(make_job(), SETTINGS)])
    }


def file(scheduler: GangScheduler) -> Path:
    return FOLDER / f"{scheduler.value.lower()}.yaml"


@pytest.mark.parametrize("path", golden(), ids=lambda path: path.name)
def test_what_is_created_is_as_the_golden_manifests_say(path: Path) -> None:
    assert golden()[path] == path.read_text()


def test_what_the_schedulers_are_told_differs_where_it_must() -> None:
    """The fields by which each knows a gang, as its own documentation has them."""
    found = {scheduler: list(yaml.safe_load_all(file(scheduler).read_text())) for scheduler in SCHEDULERS}
    jobs = {scheduler: documents[-1] for scheduler, documents in found.items()}
    pods = {scheduler: job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"] for scheduler, job in jobs.items()}
    native = found[GangScheduler.NATIVE][0]
    assert (native["kind"], native["spec"]) == ("PodGroup", {"schedulingPolicy": {"gang": {"minCount": 2}}})
    assert pods[GangScheduler.NATIVE]["metadata"]["labels"]["sftjob.dev/pod-group"] == native["metadata"]["name"]
    for scheduler in (GangScheduler.VOLCANO, GangScheduler.COSCHEDULING):
        assert jobs[scheduler]["spec"]["runPolicy"]["schedulingPolicy"]["minAvailable"] == 2
    assert pods[GangScheduler.VOLCANO]["spec"]["schedulerName"] == "volcano"
    assert pods[GangScheduler.COSCHEDULING]["spec"]["schedulerName"] == "scheduler-plugins-scheduler"
    kueue = jobs[GangScheduler.KUEUE]
    assert kueue["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert kueue["spec"]["runPolicy"]["suspend"] is True
    assert pods[GangScheduler.KAI]["metadata"]["labels"]["kai.scheduler/queue"] == "research"
    assert pods[GangScheduler.KAI]["spec"]["schedulerName"] == "kai-scheduler"
    assert "ownerReferences" not in jobs[GangScheduler.KAI]["metadata"]
    assert {kind: len(documents) for kind, documents in found.items()} == {
        kind: 2 if kind is GangScheduler.NATIVE else 1 for kind in SCHEDULERS
    }


def write() -> None:
    FOLDER.mkdir(exist_ok=True)
    for path, text in golden().items():
        path.write_text(text)


if __name__ == "__main__":
    write()
