"""What a manifest says for a cluster, on one machine: taken over, named as without effect here, or refused."""

from __future__ import annotations

from collections.abc import Iterator

from sft_api.job import SFTJob
from sft_api.run import ExitCode, RunError
from sft_api.spec import Compute, Trainer
from sft_api.wording import listing


def environment(job: SFTJob) -> dict[str, str]:
    """The variables of `spec.trainer.env` that need no cluster."""
    return {variable.name: variable.value for variable in job.spec.trainer.env if variable.value is not None}


def without_effect(job: SFTJob) -> str | None:
    """One line that names what only a cluster obeys; none where nothing of it is given."""
    fields = list(cluster_fields(job))
    if not fields:
        return None
    changes = "it changes" if len(fields) == 1 else "they change"
    return f"Only a cluster obeys {listing(fields)}; here {changes} nothing."


def cluster_fields(job: SFTJob) -> Iterator[str]:
    spec = job.spec
    for name, field in Trainer.model_fields.items():
        if name not in (*Compute.model_fields, "env") and name in spec.trainer.model_fields_set:
            yield f"spec.trainer.{field.alias}"
    for index, variable in enumerate(spec.trainer.env):
        if variable.value_from is not None:
            yield f"spec.trainer.env[{index}].valueFrom ({variable.name})"
    if spec.checkpoints.credentials is not None:
        yield "spec.checkpoints.credentials"
    if "scheduling" in spec.model_fields_set:
        yield "spec.scheduling"
    for name, field in type(spec.lifecycle).model_fields.items():
        if name not in ("hang_timeout_seconds", "loss_guard") and name in spec.lifecycle.model_fields_set:
            yield f"spec.lifecycle.{field.alias}"


def refuse_suspended(job: SFTJob) -> None:
    """Raises RunError where the manifest says that the job is not to run."""
    if job.spec.suspend:
        message = "is true: there is nothing to run; set it to false, or --set spec.suspend=false"
        raise RunError(ExitCode.CONFIGURATION, message, "spec.suspend")


def refuse_claims(job: SFTJob) -> None:
    """Raises RunError for the first URI that only a cluster can read or write."""
    for path, uri in uris(job):
        refuse_claim(path, uri)


def refuse_claim(path: str, uri: str) -> None:
    if uri.startswith("pvc://"):
        message = (
            f"{uri} is on a PersistentVolumeClaim, which only a cluster has; here allowed: file://PATH or a bucket"
        )
        raise RunError(ExitCode.CONFIGURATION, message, path)


def uris(job: SFTJob) -> Iterator[tuple[str, str]]:
    """Every URI of the manifest with its field."""
    spec = job.spec
    yield "spec.model.uri", spec.model.uri
    if spec.model.chat_template is not None and spec.model.chat_template.uri is not None:
        yield "spec.model.chatTemplate.uri", spec.model.chat_template.uri
    for index, phase in enumerate(spec.phases):
        yield from ((f"spec.phases[{index}].data[{number}].uri", data.uri) for number, data in enumerate(phase.data))
    if spec.validation is not None and spec.validation.uri is not None:
        yield "spec.validation.uri", spec.validation.uri
    if spec.prepared_data is not None:
        yield "spec.preparedData.uri", spec.prepared_data.uri
    yield "spec.checkpoints.uri", spec.checkpoints.uri
