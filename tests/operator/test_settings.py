"""The operator's settings: every variable, what it means, and what is said of a value that cannot be."""

from __future__ import annotations

import pytest

from sft_operator.settings import VARIABLES, Settings, SettingsError, from_environment


def test_an_environment_that_says_nothing_gives_the_defaults() -> None:
    empty = dict.fromkeys(VARIABLES, "")
    assert from_environment({}) == from_environment(empty) == Settings()


def test_every_variable_sets_its_field() -> None:
    settings = from_environment(
        {
            "SFTJOB_NAMESPACES": "lab, team-b,",
            "SFTJOB_TRAINER_IMAGE": "registry.example/trainer:1",
            "SFTJOB_GPU_RESOURCE": "amd.com/gpu",
            "SFTJOB_LEASE": "sft-operator",
            "POD_NAME": "sft-operator-x",
            "POD_NAMESPACE": "sft-system",
            "SFTJOB_LOG_LEVEL": "debug",
            "SFTJOB_NATIVE_GANG": "false",
            "SFTJOB_HTTP_PORT": "9090",
            "SFTJOB_RESYNC_SECONDS": "60",
        }
    )
    assert settings == Settings(
        namespaces=("lab", "team-b"),
        trainer_image="registry.example/trainer:1",
        gpu_resource="amd.com/gpu",
        lease="sft-operator",
        pod_name="sft-operator-x",
        pod_namespace="sft-system",
        log_level="DEBUG",
        native_gang=False,
        http_port=9090,
        resync_seconds=60.0,
    )


def test_whether_gangs_are_native_is_left_to_the_api_server_by_auto() -> None:
    assert from_environment({"SFTJOB_NATIVE_GANG": "auto"}).native_gang is None
    assert from_environment({"SFTJOB_NATIVE_GANG": "true"}).native_gang is True


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SFTJOB_LOG_LEVEL", "loud", "SFTJOB_LOG_LEVEL: 'loud' is not allowed; allowed: debug, info, warning, error"),
        ("SFTJOB_NATIVE_GANG", "yes", "SFTJOB_NATIVE_GANG: 'yes' is not allowed; allowed: auto, true, false"),
        ("SFTJOB_HTTP_PORT", "0", "SFTJOB_HTTP_PORT: '0' is not allowed; allowed: a port, 1 to 65535"),
        ("SFTJOB_HTTP_PORT", "http", "SFTJOB_HTTP_PORT: 'http' is not allowed; allowed: a port, 1 to 65535"),
        ("SFTJOB_RESYNC_SECONDS", "5m", "SFTJOB_RESYNC_SECONDS: '5m' is not allowed; allowed: seconds, 1 to 86400"),
        ("SFTJOB_RESYNC_SECONDS", "nan", "SFTJOB_RESYNC_SECONDS: 'nan' is not allowed; allowed: seconds, 1 to 86400"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 25 else "",
)
def test_a_value_that_cannot_be_is_named_with_what_is_allowed(variable: str, value: str, message: str) -> None:
    with pytest.raises(SettingsError) as error:
        from_environment({variable: value})
    assert str(error.value) == message
