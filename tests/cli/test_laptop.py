"""What a manifest says for a cluster, and what becomes of it here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft_api.manifest import parse_job
from sft_api.run import ExitCode, RunError
from sft_cli.laptop import environment, refuse_claims, refuse_suspended, without_effect
from tests.api.jobs import document
from tests.cli.commands import MANIFEST, manifest, sft

TOKEN = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
FIELDS: dict[str, tuple[dict[str, Any], str | None]] = {
    "nothing": ({}, None),
    "how to compute": ({"spec.trainer": {"nodes": 2, "precision": "FP32"}}, None),
    "a plain variable": ({"spec.trainer": {"env": [{"name": "A", "value": "x"}]}}, None),
    "what the trainer obeys": ({"spec.lifecycle": {"hangTimeoutSeconds": 60, "lossGuard": 9.5}}, None),
    "one field": (
        {"spec.trainer": {"image": "registry/trainer"}},
        "Only a cluster obeys spec.trainer.image; here it changes nothing.",
    ),
    "all fields": (
        {
            "spec.trainer": {
                "image": "registry/trainer",
                "resources": {"limits": {"cpu": 8}},
                "nodeSelector": {"zone": "a"},
                "tolerations": [{"operator": "Exists"}],
                "env": [{"name": "A", "value": "x"}, TOKEN],
                "sharedMemory": "1Gi",
                "podTemplate": {"spec": {"hostNetwork": True}},
            },
            "spec.checkpoints.credentials": {"serviceAccountName": "lab"},
            "spec.scheduling": {"gang": "None"},
            "spec.lifecycle": {
                "maxRestarts": 1,
                "maxDisruptions": 1,
                "activeDeadlineSeconds": 60,
                "ttlSecondsAfterFinished": 60,
                "hangTimeoutSeconds": 60,
                "lossGuard": 9.5,
            },
        },
        "Only a cluster obeys spec.trainer.image, spec.trainer.resources, spec.trainer.nodeSelector, "
        "spec.trainer.tolerations, spec.trainer.sharedMemory, spec.trainer.podTemplate, "
        "spec.trainer.env[1].valueFrom (HF_TOKEN), spec.checkpoints.credentials, spec.scheduling, "
        "spec.lifecycle.maxRestarts, spec.lifecycle.maxDisruptions, spec.lifecycle.activeDeadlineSeconds and "
        "spec.lifecycle.ttlSecondsAfterFinished; here they change nothing.",
    ),
}


@pytest.mark.parametrize("case", FIELDS)
def test_what_only_a_cluster_obeys_is_named_when_it_is_given(case: str) -> None:
    changes, note = FIELDS[case]
    assert without_effect(parse_job(document(changes))) == note


def test_variables_with_a_value_are_taken_over() -> None:
    env = [{"name": "A", "value": "x"}, TOKEN, {"name": "B", "value": ""}]
    assert environment(parse_job(document({"spec.trainer": {"env": env}}))) == {"A": "x", "B": ""}


CLAIMS: dict[str, dict[str, Any]] = {
    "spec.model.uri": {"spec.model.uri": "pvc://lab/x.jsonl"},
    "spec.model.chatTemplate.uri": {"spec.model.chatTemplate": {"uri": "pvc://lab/x.jsonl"}},
    "spec.phases[1].data[0].uri": {"spec.phases[1].data[0].uri": "pvc://lab/x.jsonl"},
    "spec.validation.uri": {"spec.validation": {"uri": "pvc://lab/x.jsonl"}},
    "spec.preparedData.uri": {"spec.preparedData": {"uri": "pvc://lab/x.jsonl"}},
    "spec.checkpoints.uri": {"spec.checkpoints.uri": "pvc://lab/x.jsonl"},
}


@pytest.mark.parametrize("path", CLAIMS)
def test_a_claim_is_refused_by_its_field(path: str) -> None:
    with pytest.raises(RunError) as caught:
        refuse_claims(parse_job(document(CLAIMS[path])))
    assert caught.value.code is ExitCode.CONFIGURATION
    assert str(caught.value) == (
        f"{path}: pvc://lab/x.jsonl is on a PersistentVolumeClaim, which only a cluster has; "
        "here allowed: file://PATH or a bucket"
    )


def test_a_job_without_claims_is_let_through() -> None:
    refuse_claims(parse_job(document()))
    refuse_suspended(parse_job(document()))


@pytest.mark.parametrize("command", ["run", "plan", "report", "checkpoints"])
def test_every_command_that_opens_a_store_refuses_a_claim(command: str, tmp_path: Path) -> None:
    manifest(tmp_path, MANIFEST.replace("file://runs/job", "pvc://runs/job"))
    done = sft(command, "job.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (10, "")
    assert "spec.checkpoints.uri: pvc://runs/job is on a PersistentVolumeClaim" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_suspended_job_is_not_run(tmp_path: Path) -> None:
    manifest(tmp_path, f"{MANIFEST}  suspend: true\n")
    done = sft("run", "job.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (10, "")
    assert done.stderr == (
        "job.yaml: spec.suspend: is true: there is nothing to run; set it to false, or --set spec.suspend=false\n"
    )
