"""`sft run` as a person runs it: real processes, a real S3 server, and what an unlucky user does to it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_api.recipes import resolve
from sft_api.run import ExitCode
from sft_cli.manifests import BadManifest, read_job
from sft_trainer.__main__ import account_for, parser, prepare, read_config
from sft_trainer.launch import free_port
from tests.trainer.runs import SPEC, make_base

SFT = Path(sys.executable).with_name("sft")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def document(base: Path, out: str) -> dict[str, Any]:
    """A manifest of two phases, ten steps, a checkpoint every two."""
    spec = json.loads(json.dumps(SPEC))
    spec["model"] = {"uri": f"file://{base}/model", "chatTemplate": {"name": "ChatML"}}
    spec["phases"] = [{"name": name, "data": [{"uri": f"file://{base}/{name}.jsonl"}]} for name in ("one", "two")]
    spec["checkpoints"] |= {"uri": out, "export": "End"}
    return {"apiVersion": "sftjob.dev/v1alpha1", "kind": "SFTJob", "metadata": {"name": "small"}, "spec": spec}


def write(folder: Path, manifest: dict[str, Any]) -> Path:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(manifest))
    return path


def sft(*arguments: str | Path, cwd: Path, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SFT), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=seconds, check=False
    )


def rows(uri: str, cwd: Path) -> list[dict[str, Any]]:
    listed = sft("checkpoints", uri, "-o", "json", cwd=cwd)
    assert listed.returncode == 0, listed.stderr
    return list(json.loads(listed.stdout))


@dataclass(frozen=True)
class Undisturbed:
    """A run from its first to its last step on two ranks, on disk."""

    uri: str
    folder: Path
    output: str

    @property
    def digest(self) -> str:
        return str(rows(self.uri, self.folder)[-1]["parametersDigest"])


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    uri = f"file://{folder}/out"
    done = sft("run", write(folder, document(base, uri)), "--processes", "2", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return Undisturbed(uri, folder, done.stdout)


def test_one_command_leaves_checkpoints_a_model_metrics_and_a_report(undisturbed: Undisturbed) -> None:
    out = undisturbed.folder / "out"
    found = rows(undisturbed.uri, undisturbed.folder)
    assert found[-1].items() >= {"step": 10, "phase": "two", "complete": True, "verified": True, "worldSize": 2}.items()
    assert (out / "export/two/COMPLETE").exists()
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    lines = [json.loads(line) for line in (out / "metrics/attempt-1.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert "held-out loss" in undisturbed.output


def start(manifest: Path, cwd: Path, *more: str) -> subprocess.Popen[str]:
    command = [str(SFT), "run", str(manifest), "--processes", "2", "-o", "json", *more]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def events(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)


def test_a_run_against_s3_that_is_stopped_and_killed_ends_with_the_same_parameters(
    undisturbed: Undisturbed, base: Path, s3_bucket: str, tmp_path: Path
) -> None:
    uri = f"{s3_bucket}/runs/small"
    manifest = write(tmp_path, document(base, uri))

    port = free_port()
    with start(manifest, tmp_path, "--metrics-port", str(port)) as stopped:
        for event in events(stopped):
            if event["event"] == "step" and event["step"] == 3:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress") as answer:
                    assert json.loads(answer.read())["progress"]["totalSteps"] == 10
                stopped.send_signal(signal.SIGTERM)
    assert stopped.returncode == ExitCode.PREEMPTED
    committed = rows(uri, tmp_path)[-1]
    assert committed["complete"]
    assert committed["verified"]

    with start(manifest, tmp_path) as killed:
        for event in events(killed):
            if event["event"] == "started":
                assert event["resumedFromStep"] == committed["step"]
            if event["event"] == "checkpoint" and event["step"] > committed["step"]:
                rank = next(pid for pid in descendants(killed.pid) if b"sft_trainer\0rank" in command_line(pid))
                os.kill(rank, signal.SIGKILL)
                break
        finished = [event for event in events(killed) if event["event"] == "finished"]
    assert killed.returncode == 128 + signal.SIGKILL
    assert "was killed by SIGKILL" in finished[-1]["message"]

    assert sft("run", manifest, "--processes", "2", cwd=tmp_path).returncode == 0
    assert rows(uri, tmp_path)[-1]["parametersDigest"] == undisturbed.digest


def descendants(pid: int) -> Iterator[int]:
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield int(child)
        yield from descendants(int(child))


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def an_empty_file(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "one.jsonl").write_text("")


def a_broken_line(folder: Path, manifest: dict[str, Any]) -> None:
    with (folder / "one.jsonl").open("a") as file:
        file.write('{"messages": [\n')


def no_loss_tokens(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "two.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n' * 3)


def all_too_long(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["spec"]["batch"] |= {"maxSequenceLength": 8, "overlong": "Drop"}


def too_long_a_warm_up(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["spec"]["optimizer"]["warmup"] = {"steps": 100}


def too_large_a_batch(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["spec"]["batch"]["effectiveBatchSize"] = 512


def too_small_a_capacity(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["spec"]["batch"]["maxTokensPerGPU"] = 16


def a_typo(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["spec"]["optimizer"]["learnigRate"] = 0.1


def no_chat_template(folder: Path, manifest: dict[str, Any]) -> None:
    del manifest["spec"]["model"]["chatTemplate"]


def a_template_that_cannot_be_masked(folder: Path, manifest: dict[str, Any]) -> None:
    source = "{% for m in messages %}{{ m.content | upper if not loop.last else m.content }} {% endfor %}"
    manifest["spec"]["model"]["chatTemplate"] = {"inline": source}


def no_such_model(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["spec"]["model"]["uri"] = f"file://{folder}/modle"


def an_unknown_class(folder: Path, manifest: dict[str, Any]) -> None:
    config = folder / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "lama"}))


def a_file_in_place_of_the_folder(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "out").write_text("")


def no_such_data(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["spec"]["phases"][1]["data"][0]["uri"] = f"file://{folder}/tow*.jsonl"


UNLUCKY = {
    an_empty_file: (ExitCode.DATA, "spec.phases[0].data[0].uri: "),
    a_broken_line: (ExitCode.DATA, "line 27: "),
    no_loss_tokens: (ExitCode.DATA, "spec.phases[1].data[0].uri: of 3 records none is left to train on"),
    all_too_long: (ExitCode.DATA, "longer than maxSequenceLength 8 (overlong: Drop)"),
    too_long_a_warm_up: (ExitCode.CONFIGURATION, "spec.optimizer.warmup.steps: 100 steps of warm-up are more than"),
    too_large_a_batch: (ExitCode.CONFIGURATION, "spec.batch.effectiveBatchSize: 512 samples a step are more than"),
    too_small_a_capacity: (ExitCode.CONFIGURATION, "spec.batch.maxTokensPerGPU: "),
    a_typo: (ExitCode.CONFIGURATION, "job.yaml: spec.optimizer.learnigRate: "),
    no_chat_template: (ExitCode.CONFIGURATION, "spec.model.chatTemplate: "),
    a_template_that_cannot_be_masked: (ExitCode.CONFIGURATION, "spec.model.chatTemplate: "),
    no_such_model: (ExitCode.MODEL, "spec.model.uri: "),
    an_unknown_class: (ExitCode.MODEL, "does not know its model_type 'lama'"),
    a_file_in_place_of_the_folder: (ExitCode.STORE_REFUSED, "spec.checkpoints.uri: "),
    no_such_data: (ExitCode.DATA, "spec.phases[1].data[0].uri: "),
}


def outcome_of(folder: Path, manifest: dict[str, Any]) -> tuple[int, str]:
    """How `sft run` would end: what reads the manifest, then what prepares the run, without processes of their own."""
    try:
        config = resolve(read_job(str(write(folder, manifest))))
    except BadManifest as error:
        return ExitCode.CONFIGURATION, str(error)
    (folder / "run.json").write_text(config.model_dump_json(by_alias=True))
    options = parser().parse_args(["prepare", str(folder / "run.json"), "--processes", "1"])
    outcome = account_for(lambda: prepare(options, read_config(options.run)))
    return outcome.code, outcome.message


@pytest.mark.parametrize("misfortune", UNLUCKY, ids=lambda misfortune: misfortune.__name__.replace("_", " "))
def test_one_clear_message_before_the_first_step(misfortune: Any, base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    manifest = document(folder, f"file://{folder}/out")
    misfortune(folder, manifest)
    code, words = UNLUCKY[misfortune]
    ended, message = outcome_of(folder, manifest)
    assert ended == code, message
    assert words in message
    left = [path.relative_to(folder / "out").parts[0] for path in folder.glob("out/**/COMPLETE")]
    assert set(left) <= {"data"}


def test_a_misfortune_is_one_line_and_an_exit_code_for_a_person(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    manifest = document(folder, f"file://{folder}/out")
    too_long_a_warm_up(folder, manifest)
    done = sft("run", write(folder, manifest), cwd=folder)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == ExitCode.CONFIGURATION, said
    assert said.count("spec.optimizer.warmup.steps: 100 steps of warm-up are more than phase one has") == 1
    assert "Traceback" not in said


@pytest.mark.parametrize("how", ["no such bucket", "wrong credentials", "nobody there"])
def test_a_store_that_refuses_is_found_out_before_any_work(
    how: str,
    base: Path,
    tmp_path: Path,
    s3_bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri, code = f"{s3_bucket}/run", ExitCode.STORE_REFUSED
    if how == "no such bucket":
        uri = "s3://no-such-bucket-here/run"
    elif how == "wrong credentials":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    else:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("SFT_STORE_RETRY_SECONDS", "1")
        code = ExitCode.STORE_UNAVAILABLE
    ended, message = outcome_of(tmp_path, document(base, uri))
    assert ended == code, message
    assert message.startswith("spec.checkpoints.uri: ")
    assert "prepar" not in capsys.readouterr().out


def test_the_report_can_be_made_again_from_what_is_in_the_store(undisturbed: Undisturbed) -> None:
    done = sft("report", undisturbed.uri, "--output", "-", cwd=undisturbed.folder)
    assert done.returncode == 0, done.stderr
    assert "<title>small" in done.stdout
    numbers = json.loads(sft("report", undisturbed.uri, "-o", "json", cwd=undisturbed.folder).stdout)
    assert numbers["totalSteps"] == 10
    assert [attempt["reason"] for attempt in numbers["attempts"]] == ["Completed"]
