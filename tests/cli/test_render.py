"""`sft render`: what the operator would create, byte for byte, without a cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_api import labels
from sft_api.manifest import parse_job
from sft_cli.manifests import ManifestLoader
from sft_cli.render import as_yaml
from sft_operator.gang import GROUPS
from sft_operator.observed import Manifest, Observed, Platform, PrepareJob
from sft_operator.reconcile import reconcile
from sft_operator.settings import Settings
from tests.cli.commands import manifest, sft

NOW = datetime(2026, 3, 4, 12, 0, 0, tzinfo=UTC)
IMAGE = "registry.example/sft-trainer:1"
JOB = """\
apiVersion: sftjob.dev/v1alpha1
kind: SFTJob
metadata: {name: small, namespace: lab, uid: 0f1e2d3c, generation: 1, creationTimestamp: "2026-03-04T12:00:00Z"}
spec:
  model: {uri: "s3://lab/model"}
  phases:
  - {name: instruct, data: [{uri: "s3://lab/a.jsonl"}]}
  trainer: {nodes: 2, gpusPerNode: 8}
  checkpoints: {uri: "s3://lab/runs/small"}
"""
EVERYTHING = Platform(pod_groups=True, gang_policy=True, groups=frozenset(GROUPS.values()))


def created(text: str, platform: Platform, settings: Settings) -> list[Manifest]:
    """What the operator creates up to the first gang, each once, in order: its own decisions, carried out."""
    job, observed = parse_job(yaml.load(text, ManifestLoader)), Observed(platform)
    found: dict[tuple[str, str], Manifest] = {}
    for _ in range(10):
        decision = reconcile(job, observed, settings, NOW)
        for made in decision.apply:
            assert found.setdefault((made["kind"], made["metadata"]["name"]), made) == made
        job = job.model_copy(update={"status": decision.status})
        observed = Observed(platform, PrepareJob(labels.prepare("small"), "uid", complete=True), has_config=True)
    return list(found.values())


@pytest.mark.parametrize(
    ("changes", "options", "platform", "kinds"),
    [
        ({}, [], EVERYTHING, ["ConfigMap", "Job", "PodGroup", "PyTorchJob"]),
        ({}, ["--gang", "None"], Platform(), ["ConfigMap", "Job", "PyTorchJob"]),
        ({"trainer.nodes": "1"}, [], EVERYTHING, ["ConfigMap", "Job", "PyTorchJob"]),
        ({"scheduling.gang": "Volcano", "scheduling.queue": "gpu"}, [], EVERYTHING, ["ConfigMap", "Job", "PyTorchJob"]),
        ({"scheduling.gang": "Kueue", "scheduling.queue": "gpu"}, [], EVERYTHING, ["ConfigMap", "Job", "PyTorchJob"]),
        ({"scheduling.gang": "KAI"}, [], EVERYTHING, ["ConfigMap", "Job", "PyTorchJob"]),
        ({"trainer.image": "mine:2"}, [], EVERYTHING, ["ConfigMap", "Job", "PodGroup", "PyTorchJob"]),
    ],
    ids=["native", "without a gang scheduler", "one pod", "Volcano", "Kueue", "KAI", "an image of its own"],
)
def test_it_prints_byte_for_byte_what_the_operator_creates(
    changes: dict[str, str], options: list[str], platform: Platform, kinds: list[str], tmp_path: Path
) -> None:
    document = yaml.safe_load(JOB)
    for path, value in changes.items():
        section, name = path.split(".")
        document["spec"].setdefault(section, {})[name] = int(value) if value.isdigit() else value
    text = yaml.safe_dump(document)
    done = sft("render", manifest(tmp_path, text), "--trainer-image", IMAGE, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = created(text, platform, Settings(trainer_image=IMAGE))
    assert [made["kind"] for made in expected] == kinds
    assert done.stdout == as_yaml(expected)
    assert list(yaml.load_all(done.stdout, ManifestLoader)) == json.loads(json.dumps(expected))


def documents(text: str) -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.load_all(text, ManifestLoader)}


def test_an_object_from_a_cluster_keeps_its_owner_and_its_namespace(tmp_path: Path) -> None:
    live = yaml.safe_load(JOB)
    live["status"] = {"observedGeneration": 1, "state": "Pending"}
    live["metadata"]["managedFields"] = [{"manager": "kubectl"}]
    done = sft("render", "-", "--trainer-image", IMAGE, cwd=tmp_path, stdin=yaml.safe_dump(live))
    made = documents(done.stdout)
    assert {found["metadata"]["namespace"] for found in made.values()} == {"lab"}
    assert {found["metadata"]["ownerReferences"][0]["uid"] for found in made.values()} == {"0f1e2d3c"}
    assert done.stderr == "# spec.scheduling.gang is Auto, taken for Native: --gang None is for a cluster without\n"


def test_a_manifest_says_what_the_cluster_will_add(tmp_path: Path) -> None:
    bare = yaml.safe_load(JOB)
    bare["metadata"] = {"name": "small"}
    done = sft("render", "-", "--trainer-image", IMAGE, "--gang", "Native", cwd=tmp_path, stdin=yaml.safe_dump(bare))
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "# metadata.uid is the cluster's to give: ownerReferences have none here",
        "# metadata.namespace is not given: default is taken",
    ]


def test_attempt_resource_and_overrides_go_into_the_gang(tmp_path: Path) -> None:
    options = ["--attempt", "3", "--gpu-resource", "amd.com/gpu", "--set", "spec.trainer.gpusPerNode=4"]
    done = sft("render", manifest(tmp_path, JOB), "--trainer-image", IMAGE, *options, cwd=tmp_path)
    gang = documents(done.stdout)["PyTorchJob"]
    assert gang["metadata"]["name"] == "small-3"
    [container] = gang["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"amd.com/gpu": "4"}


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (("recipe", "TULIP"), ["--trainer-image", IMAGE], 'job.yaml: spec.recipe: "TULIP" is not allowed; '),
        (
            ("checkpoints", {"uri": "file://runs/small"}),
            ["--trainer-image", IMAGE],
            "job.yaml: spec.checkpoints.uri: file://runs/small is a folder inside each pod, and is lost with it; ",
        ),
        (
            None,
            [],
            "job.yaml: spec.trainer.image: is not given, and the operator's own is set by its chart: say it with"
            " --trainer-image",
        ),
        (
            ("scheduling", {"gang": "None"}),
            ["--trainer-image", IMAGE, "--gang", "Native"],
            "--gang: says what Auto becomes, and spec.scheduling.gang is None",
        ),
    ],
    ids=["invalid", "not for a cluster", "no image", "a gang for what is not Auto"],
)
def test_what_the_operator_would_refuse_ends_in_ten(
    change: tuple[str, object] | None, options: list[str], said: str, tmp_path: Path
) -> None:
    document = yaml.safe_load(JOB)
    if change is not None:
        document["spec"][change[0]] = change[1]
    done = sft("render", manifest(tmp_path, yaml.safe_dump(document)), *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (10, "")
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


LOADED = """
import json, sys
from sft_cli.__main__ import app
try:
    app(sys.argv[1:])
finally:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


def test_it_loads_neither_kopf_nor_kubernetes_nor_a_training_library(tmp_path: Path) -> None:
    arguments = ["render", manifest(tmp_path, JOB), "--trainer-image", IMAGE]
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stderr.splitlines()[-1]))
    assert "sft_operator" in loaded
    assert loaded & {"kopf", "kubernetes", "aiohttp", "torch", "sft_trainer", "numpy", "jinja2"} == set()


# ── YAML that kubectl reads as it was meant ────────────────────────────────────────────────────────────────────────

TRICKY = [
    *("2e-5", "1_000", "0x1F", "0o17", "08", "1:30", ".5", "+.inf", "0b11", "1e3", "-0", "1.", "5e+2", "_1", "1__0"),
    *("yes", "No", "on", "y", "N", "true", "null", "~", "=", "<<", "2026-01-01", "2026-01-01T00:00:00Z", ".nan"),
    *("", " led", "trailed ", "a: b", "#", "- x", "'", '"', "a\nb", "a \n b\n", "\n", "a\tb", "ä€😀", "\x1b[0m", "{}"),
    "a word and " * 60,
]


@pytest.fixture(scope="module")
def kubectl() -> Path:
    cache = Path(os.environ.get("SFTJOB_CACHE") or Path.home() / ".cache" / "sftjob")
    program = cache / "bin" / "kubernetes"
    if not program.exists():
        reason = f"there is no kubectl at {program}: tests/tools/build_tools.sh builds it"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return program


def test_kubectl_reads_every_text_as_it_was(kubectl: Path) -> None:
    texts = {f"text-{number}": text for number, text in enumerate(TRICKY)}
    printed = as_yaml([{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "tricky"}, "data": texts}])
    command = ["kubectl", "annotate", "--local", "-f", "-", "read=back", "-o", "json"]
    done = subprocess.run(command, executable=kubectl, input=printed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["data"] == texts


def test_a_template_that_stands_twice_is_written_out_twice() -> None:
    template = {"spec": {"containers": [{"name": "pytorch"}]}}
    printed = as_yaml([{"master": template, "worker": template}])
    assert "&" not in printed
    assert yaml.safe_load(printed) == {"master": template, "worker": template}
