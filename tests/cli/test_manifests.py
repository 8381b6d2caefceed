"""Reading manifests: YAML as the API server reads it, and every problem with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_cli.manifests import BadManifest, read_documents, read_job, read_jobs
from tests.cli.commands import MANIFEST, sft

CONFIG_MAP = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\n"
TYPO = MANIFEST.replace("recipe: TULU", "recipe: TULIP").replace("gpusPerNode: 0", "gpusPerNodes: 0")


def write(folder: Path, text: str) -> str:
    path = folder / "job.yaml"
    path.write_text(text)
    return str(path)


def problems(folder: Path, text: str) -> list[str]:
    return [str(finding).removeprefix(f"{folder}/") for finding in read_jobs(write(folder, text)).findings]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1.5E+3", 1500.0),
        (".5", 0.5),
        ("12", 12),
        ("0x10", 16),
        ("true", True),
        ("~", None),
        ("null", None),
        ("", None),
        ("none", "none"),
        ("2026-01-31", "2026-01-31"),
        ("12:30:45", "12:30:45"),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("'2e-5'", "2e-5"),
    ],
)
def test_a_scalar_is_what_the_api_server_would_read(text: str, value: object, tmp_path: Path) -> None:
    [document] = read_documents(write(tmp_path, f"key: {text}\n"))
    assert isinstance(document, dict)
    assert document["key"] == value
    assert type(document["key"]) is type(value)


def test_a_valid_manifest_is_read(tmp_path: Path) -> None:
    assert read_job(write(tmp_path, MANIFEST)).metadata.name == "small"


def test_an_anchor_and_a_merge_are_followed(tmp_path: Path) -> None:
    [document] = read_documents(write(tmp_path, "base: &b {a: 1, c: 2}\nuse: {<<: *b, c: 3}\n"))
    assert document == {"base": {"a": 1, "c": 2}, "use": {"a": 1, "c": 3}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spec:\n  epochs: 1\n  epochs: 2\n", "line 3, column 3: the key 'epochs' stands here for the second time"),
        ("spec: [1, 2\n", "line 2, column 1: expected ',' or ']', but got '<stream end>'"),
        ("spec:\n\tmodel: x\n", "line 2, column 1: found character '\\t' that cannot start any token"),
        ("a: *nothing\n", "line 1, column 4: found undefined alias 'nothing'"),
        ("a: !!python/object:os.system x\n", "line 1, column 4: could not determine a constructor"),
        ("? [1, 2]\n: 3\n", "line 1, column 3: a key must be plain text"),
        ("a: \x00\n", "is not YAML"),
        ("", "holds no SFTJob (nothing found)"),
        ("---\n---\n", "holds no SFTJob (nothing found)"),
        ("just text\n", '"just text" is no SFTJob'),
        (CONFIG_MAP, "holds no SFTJob (ConfigMap settings found)"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_file_that_is_no_manifest_is_told_with_its_place(text: str, message: str, tmp_path: Path) -> None:
    [problem] = problems(tmp_path, text)
    assert problem.startswith(f"job.yaml: {message}")


def test_every_problem_stands_on_a_line_of_its_own_with_the_path_of_its_field(tmp_path: Path) -> None:
    found = problems(tmp_path, TYPO)
    assert len(found) == 2
    assert any(line.startswith("job.yaml: spec.recipe: ") for line in found)
    assert any(line.startswith("job.yaml: spec.trainer.gpusPerNodes: ") for line in found)
    assert not any("\n" in line for line in found)


def test_an_object_of_another_kind_beside_a_job_is_passed_over(tmp_path: Path) -> None:
    reading = read_jobs(write(tmp_path, f"{CONFIG_MAP}---\n{MANIFEST}"))
    assert (len(reading.jobs), reading.findings, reading.passed_over) == (1, [], ["ConfigMap settings"])


@pytest.mark.parametrize("change", ["kind: SFTjob", "apiVersion: sftjob.dev/v1"])
def test_a_job_whose_kind_or_version_is_mistyped_is_not_passed_over(change: str, tmp_path: Path) -> None:
    field = change.partition(":")[0]
    original = next(line for line in MANIFEST.splitlines() if line.startswith(field))
    found = problems(tmp_path, f"{MANIFEST}---\n{MANIFEST.replace(original, change)}")
    assert len(found) == 1
    assert found[0].startswith(f"job.yaml: {field}: ")
    assert found[0].endswith("(document 2)")


def test_a_file_with_two_jobs_cannot_be_run(tmp_path: Path) -> None:
    with pytest.raises(BadManifest, match="holds 2 documents; this command takes a file with one SFTJob"):
        read_job(write(tmp_path, f"{MANIFEST}---\n{MANIFEST}"))


def test_a_missing_file_and_a_binary_file_are_told(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    [missing] = read_jobs(str(tmp_path / "nowhere.yaml")).findings
    [binary] = read_jobs(str(tmp_path / "binary")).findings
    assert missing.message == "cannot be read: No such file or directory"
    assert binary.message == "is not UTF-8 text (byte 0)"


def test_validate_ends_in_zero_where_all_files_are_valid_and_says_nothing(tmp_path: Path) -> None:
    write(tmp_path, MANIFEST)
    done = sft("validate", "job.yaml", "-", cwd=tmp_path, stdin=MANIFEST)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_validate_ends_in_one_and_names_file_field_and_problem(tmp_path: Path) -> None:
    write(tmp_path, MANIFEST)
    (tmp_path / "typo.yaml").write_text(TYPO)
    done = sft("validate", "typo.yaml", "-", "job.yaml", cwd=tmp_path, stdin="{")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert sorted(line.split(":")[0] for line in lines) == ["-", "typo.yaml", "typo.yaml"]
    assert done.stderr == ""
