"""What this installation of the operator is told: the environment of its pod, read once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


class SettingsError(ValueError):
    """A variable of the environment cannot be what it is."""


@dataclass(frozen=True)
class Settings:
    """How this operator was installed."""

    namespaces: tuple[str, ...] = ()
    """Where SFTJobs are served; everywhere where none is named."""
    trainer_image: str = ""
    """The trainer's image for jobs that name none."""
    gpu_resource: str = "nvidia.com/gpu"
    """What a GPU is called among the resources of a node."""
    lease: str | None = None
    """Name of the Lease by which replicas agree on who works; none where there is one replica."""
    pod_name: str = "sft-operator"
    pod_namespace: str = "default"
    log_level: str = "INFO"
    native_gang: bool | None = None
    """Whether the admission policy for Kubernetes' own gangs is installed; none: ask the API server."""
    http_port: int = 8080
    """Port of /healthz and /readyz."""
    resync_seconds: float = 300.0
    """How often everything is listed, whatever the watches say."""


def from_environment(environment: Mapping[str, str]) -> Settings:
    """The settings that these variables say; what is not set, or empty, is as above. Raises SettingsError."""
    chosen: dict[str, Any] = {
        field: read(name, environment[name].strip())
        for name, (field, read) in VARIABLES.items()
        if environment.get(name, "").strip()
    }
    return Settings(**chosen)


def names(variable: str, text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def as_it_is(variable: str, text: str) -> str:
    return text


def one_of(choices: Mapping[str, T]) -> Callable[[str, str], T]:
    def read(variable: str, text: str) -> T:
        if text.lower() not in choices:
            raise SettingsError(f"{variable}: {text!r} is not allowed; allowed: {', '.join(choices)}")
        return choices[text.lower()]

    return read


def port(variable: str, text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise SettingsError(f"{variable}: {text!r} is not allowed; allowed: a port, 1 to 65535")
    return int(text)


def seconds(variable: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1.0 <= number <= 86400.0:
        raise SettingsError(f"{variable}: {text!r} is not allowed; allowed: seconds, 1 to 86400")
    return number


LEVELS = {level.lower(): level for level in ("DEBUG", "INFO", "WARNING", "ERROR")}
VARIABLES: Mapping[str, tuple[str, Callable[[str, str], object]]] = {
    "SFTJOB_NAMESPACES": ("namespaces", names),
    "SFTJOB_TRAINER_IMAGE": ("trainer_image", as_it_is),
    "SFTJOB_GPU_RESOURCE": ("gpu_resource", as_it_is),
    "SFTJOB_LEASE": ("lease", as_it_is),
    "POD_NAME": ("pod_name", as_it_is),
    "POD_NAMESPACE": ("pod_namespace", as_it_is),
    "SFTJOB_LOG_LEVEL": ("log_level", one_of(LEVELS)),
    "SFTJOB_NATIVE_GANG": ("native_gang", one_of({"auto": None, "true": True, "false": False})),
    "SFTJOB_HTTP_PORT": ("http_port", port),
    "SFTJOB_RESYNC_SECONDS": ("resync_seconds", seconds),
}
