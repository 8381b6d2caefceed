"""`sft render`: the objects that the operator would create for a job, as YAML, made by the operator's own functions."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from sft_api.job import SFTJob
from sft_api.manifest import Problem
from sft_api.pods import GangScheduler
from sft_api.run import ExitCode
from sft_cli.manifests import BadManifest, Finding, read_job
from sft_operator.admission import cluster_problems
from sft_operator.gang import GROUPS, GangChoice, choose_gang
from sft_operator.objects import attempt, config_map, prepare_job
from sft_operator.observed import Manifest, Platform
from sft_operator.settings import Settings

NO_IMAGE = "is not given, and the operator's own is set by its chart: say it with --trainer-image"


@dataclass(frozen=True)
class Installed:
    """What the manifests depend on besides the job: how the operator was installed, and where."""

    trainer_image: str
    gpu_resource: str
    native_gang: bool | None = None
    """Whether the cluster's own scheduler places gangs, which is what Auto goes by; taken for granted unless said."""


class Dumper(yaml.SafeDumper):
    """YAML that kubectl reads back as it was: no anchors, long texts as blocks, and quotes where it guesses numbers."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


Dumper.add_representer(str, Dumper.represent_text)
Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9.][0-9a-zA-Z_.+-]*$"), list("-+.0123456789")
)
Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^[yYnN]$"), list("yYnN"))


def render(file: str, installed: Installed, number: int, overrides: Sequence[str]) -> int:
    """Print the job's objects with the gang of attempt `number`; returns the exit code."""
    settings = Settings(trainer_image=installed.trainer_image, gpu_resource=installed.gpu_resource)
    try:
        job = read_job(file, overrides)
        check(file, job, installed.native_gang, settings)
    except BadManifest as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIGURATION
    choice = choose_gang(job.spec.scheduling, job.spec.trainer.nodes, platform(installed.native_gang))
    for remark in remarks(job, installed.native_gang, choice):
        print(f"# {remark}", file=sys.stderr)
    print(as_yaml(manifests(job, number, choice, settings)), end="")
    return 0


def manifests(job: SFTJob, number: int, choice: GangChoice, settings: Settings) -> list[Manifest]:
    """In the order in which the operator creates them."""
    return [config_map(job), prepare_job(job, settings), *attempt(job, number, choice, settings)]


def as_yaml(documents: Sequence[Manifest]) -> str:
    return str(yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10_000))


def platform(native: bool | None) -> Platform:
    """A cluster that has every gang scheduler, but Kubernetes' own where it is said to have none."""
    has_it = native is not False
    return Platform(pod_groups=has_it, gang_policy=has_it, groups=frozenset(GROUPS.values()))


def check(file: str, job: SFTJob, native: bool | None, settings: Settings) -> None:
    """Raises BadManifest with what the operator would refuse."""
    asked = job.spec.scheduling.gang
    if native is not None and asked is not GangScheduler.AUTO:
        raise BadManifest([Finding("--gang", f"says what Auto becomes, and spec.scheduling.gang is {asked}")])
    problems = cluster_problems(job, settings)
    if not (job.spec.trainer.image or settings.trainer_image):
        rest = [problem for problem in problems if problem.path != "spec.trainer.image"]
        problems = [Problem("spec.trainer.image", NO_IMAGE), *rest]
    if problems:
        raise BadManifest([Finding(file, problem.message, problem.path) for problem in problems])


def remarks(job: SFTJob, native: bool | None, choice: GangChoice) -> list[str]:
    """Where the cluster may say otherwise than what is printed."""
    said = []
    if job.metadata.uid is None:
        said.append("metadata.uid is the cluster's to give: ownerReferences have none here")
    if job.metadata.namespace is None:
        said.append("metadata.namespace is not given: default is taken")
    if job.spec.scheduling.gang is GangScheduler.AUTO and job.spec.trainer.nodes > 1 and native is None:
        said.append(f"spec.scheduling.gang is Auto, taken for {choice.scheduler}: --gang None is for a cluster without")
    return said
