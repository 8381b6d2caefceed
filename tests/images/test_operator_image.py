"""What is in the operator's image, and what is not: read from the archive, without running it."""

from __future__ import annotations

import re

import pytest

from tests.images.archive import Image, read_image
from tests.images.build import ROOT, operator_archive

SITE_PACKAGES = "opt/venv/lib/python3.13/site-packages"
MAX_BYTES = 120_000_000


@pytest.fixture(scope="module")
def image() -> Image:
    return read_image(operator_archive())


def test_it_has_the_version_of_the_project_in_its_name(image: Image) -> None:
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert image.names == [f"ghcr.io/sftjob/operator:{version[1]}"]
    assert image.config["Labels"]["org.opencontainers.image.version"] == version[1]


def test_it_runs_as_a_user_that_kubernetes_can_tell_from_root(image: Image) -> None:
    user, group = image.config["User"].split(":")
    assert int(user) == int(group) == 10001


def test_it_starts_the_operator(image: Image) -> None:
    assert image.config["Entrypoint"] == ["/opt/venv/bin/python", "-m", "sft_operator"]
    assert f"{SITE_PACKAGES}/sft_operator/__main__.py" in image.files


def test_it_is_small(image: Image) -> None:
    assert image.size < MAX_BYTES, f"{image.size / 1e6:.0f} MB"


def test_nothing_in_it_gains_rights(image: Image) -> None:
    assert [path for path, file in image.files.items() if file.isfile() and file.mode & 0o6000] == []


def test_nothing_but_tmp_can_be_written_by_others(image: Image) -> None:
    writable = {path for path, file in image.files.items() if not file.issym() and file.mode & 0o002}
    assert writable == {"tmp", "var/tmp"}


def test_it_has_no_shell_and_no_installer(image: Image) -> None:
    assert image.named("sh", "bash", "dash", "busybox", "pip", "pip3", "apt", "apt-get", "dpkg", "curl", "wget") == []
    assert [path for path in image.files if path.startswith((f"{SITE_PACKAGES}/pip", f"{SITE_PACKAGES}/torch"))] == []


def test_it_holds_nothing_of_the_build(image: Image) -> None:
    assert image.named("pip.conf", "requirements.txt", "resolv.conf", "sources.list") == []
    assert not any(path.startswith(("run/secrets", "tmp/", "root/")) for path in image.files)


def test_what_the_operator_loads_need_not_be_compiled_at_each_start(image: Image) -> None:
    for module in (
        "sft_operator/{}__main__",
        "sft_api/{}spec",
        "kopf/{}__init__",
        "kubernetes/aio/client/{}api_client",
    ):
        assert f"{SITE_PACKAGES}/{module.format('__pycache__/')}.cpython-313.pyc" in image.files


def test_of_the_kubernetes_client_it_has_no_generated_class(image: Image) -> None:
    generated = re.compile(rf"{SITE_PACKAGES}/kubernetes/(aio/)?client/(api|models)/(?!__)\w+\.py$")
    assert [path for path in image.files if generated.match(path)] == []


def test_it_says_what_it_is(image: Image) -> None:
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in image.config["Labels"].items()}
    assert labels["title"] == "sftjob operator"
    assert labels["licenses"] == "Apache-2.0"
    assert {"description", "revision"} <= labels.keys()


def test_a_scanner_finds_its_debian_packages(image: Image) -> None:
    assert {"var/lib/dpkg/status.d/libc6", "var/lib/dpkg/status.d/python3.13", "etc/os-release"} <= image.files.keys()
