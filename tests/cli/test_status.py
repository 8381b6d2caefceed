"""`sft status` against a server that speaks as an API server does, through the real client and a real kubeconfig."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer
from threading import Thread
from typing import Any

import pytest

from sft_cli import standing
from sft_cli.clusters import Access, ClusterJob, job_of
from sft_cli.screen import stdout_console
from sft_cli.status import status
from tests.cli.api_server import ApiServer, api_server, failure
from tests.cli.cluster_jobs import (
    NOW,
    ago,
    attempt,
    checkpoint,
    condition,
    failed_attempt,
    job,
    progress,
    running,
)
from tests.cli.commands import SFT, sft


def told(job: ClusterJob, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The page of one job, as it was at NOW."""
    stdout_console().print(standing.page_of(job, NOW), soft_wrap=True)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def failed(**more: Any) -> dict[str, Any]:
    message = "s3://lab/data.jsonl, line 17: is no JSON"
    conditions = [
        condition("Prepared", "False", "Data", message),
        condition("GangScheduled", "False", "NoPods"),
        condition("Succeeded", "False", "Data", message),
        condition("Stalled", "True", "Data", message),
    ]
    return job(state="Failed", conditions=conditions, **more)


# ── one job ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_of_a_running_job_says_how_far_it_is_and_what_it_cost(capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(job_of(running()), capsys)
    assert lines[:9] == [
        "granite  Running  in lab, 3h old",
        "phase         skills, 2 of 2, epoch 1",
        "step          1,234 of 5,000, 24%, 2:04:05 left",
        "signals       loss 0.4321, gradient norm 0.91, learning rate 2e-05",
        "speed         12,346 tokens/s, 41.0% MFU, packing 98.7%",
        "checkpoint    step 1,200, 4m ago, verified: s3://lab/runs/granite/ckpt/1200",
        "restarts      1 of 3 after failures without a newer checkpoint, 0 of 100 after disruptions",
        "time          2:30:00 on its nodes, 40.0 GPU hours, 93.0% of it in steps that count",
        "",
    ]
    assert [" ".join(line.split()) for line in lines if line.strip().startswith(("1 ", "2 "))] == [
        "1 2h ago 1:00:00 0 OOMKilled pod granite-1-worker-0 was killed: out of memory",
        "2 60m ago 1:00:00 1,000 goes on",
    ]


def test_a_job_without_figures_says_what_is_to_be_trained(capsys: pytest.CaptureFixture[str]) -> None:
    phase = {"name": "p", "samples": 9, "tokens": 99, "steps": 30, "dropped": 0, "truncated": 0, "fingerprint": "f"}
    plan = {"samples": 12_345, "tokens": 6_400_000, "phases": [phase]}
    unplaced = condition("GangScheduled", "False", "Unschedulable", "0 of 2 pods placed; no GPU is free")
    starting = condition("Running", "False", "Starting", "0 of 2 pods run")
    found = job_of(job(state="Queued", plan=plan, attempts=[attempt(1)], conditions=[unplaced, starting]))
    lines = told(found, capsys)
    assert lines[1] == "to train      12,345 samples, 6,400,000 tokens, 30 steps"
    assert lines[-1] == "! GangScheduled is False since 5m, Unschedulable: 0 of 2 pods placed; no GPU is free"


def test_a_failure_is_told_with_its_reason_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(job_of(failed()), capsys)[1:] == [
        "! Succeeded is False since 5m, Data: s3://lab/data.jsonl, line 17: is no JSON",
        "→ The log of the preparation: sft logs granite -n lab --prepare",
        "→ Once it is mended: kubectl delete sft granite -n lab, and apply the manifest again",
    ]


def test_a_failed_attempt_leads_to_its_log_and_to_the_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    found = job_of(failed(attempts=[failed_attempt(3)], checkpoint=checkpoint()))
    assert told(found, capsys)[-2:] == [
        "→ The last lines of its log: sft logs granite -n lab --attempt 3",
        "→ Once it is mended: kubectl delete sft granite -n lab, and apply the manifest again:"
        " it goes on after step 1,200",
    ]


def test_a_suspended_job_says_how_it_goes_on() -> None:
    found = job_of(job(state="Suspended", conditions=[condition("Suspended", "True", "Suspended")]))
    assert standing.telling(found) == []
    assert standing.advice(found, NOW) == [
        """It goes on after kubectl patch sft granite -n lab --type merge -p '{"spec": {"suspend": false}}'"""
    ]


def test_a_save_that_fails_is_told_while_training_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    unhealthy = condition("CheckpointHealthy", "False", "SaveFailing", "the bucket is read-only")
    lines = told(job_of(running(conditions=[unhealthy])), capsys)
    assert lines[-1] == "! CheckpointHealthy is False since 5m, SaveFailing: the bucket is read-only"


def test_a_job_that_no_operator_has_seen_says_so_after_a_while() -> None:
    new = job()
    assert standing.state_of(job_of(new)) == "New"
    assert standing.advice(job_of(new), NOW) == [
        "No operator has looked at it: is the chart sftjob-operator installed, and its pod ready?"
    ]
    new["metadata"]["creationTimestamp"] = ago(seconds=20)
    assert standing.advice(job_of(new), NOW) == []


def test_a_change_that_the_operator_has_not_seen_is_told() -> None:
    changed = running()
    changed["metadata"]["generation"] = 2
    assert standing.advice(job_of(changed), NOW) == ["The operator has not looked at the newest change yet."]


def test_a_job_whose_steps_take_long_says_when_the_last_one_ended(capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(job_of(running(progress=progress(heartbeat=ago(minutes=10)))), capsys)
    assert "last step     ended 10m ago" in lines
    assert lines[-1] == "→ What it says meanwhile: sft logs granite -n lab -f"


def test_a_job_that_is_being_deleted_says_nothing_else() -> None:
    going = failed()
    going["metadata"]["deletionTimestamp"] = ago(seconds=3)
    assert standing.state_of(job_of(going)) == "Deleting"
    assert standing.advice(job_of(going), NOW) == []


def test_what_commands_a_terminal_is_made_visible(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = condition("CheckpointHealthy", "False", "SaveFailing", "\x1b[2Jgone")
    assert told(job_of(running(conditions=[hostile])), capsys)[-1].endswith("SaveFailing: ␛[2Jgone")


@pytest.mark.parametrize(
    ("units", "words"),
    [({"seconds": 119}, "119s"), ({"minutes": 119}, "119m"), ({"hours": 47}, "47h"), ({"days": 3}, "3d")],
)
def test_an_age_has_one_unit(units: dict[str, float], words: str) -> None:
    found = job()
    found["metadata"]["creationTimestamp"] = ago(**units)
    assert standing.age(job_of(found).created, NOW) == words


# ── the table ──────────────────────────────────────────────────────────────────────────────────────────────────────


def table(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Its lines, each gap one space: head, rule, rows."""
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_the_table_has_a_row_for_each_job_of_the_namespace(
    server: ApiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.objects["sftjobs"] = [running("zeta"), failed(), running("far", "other")]
    server.page = 1
    assert status(None, Access(server.kubeconfig(tmp_path)), everywhere=False, watch=False, as_json=False) == 0
    head, _, failed_row, running_row = table(capsys)
    assert head == "name state phase step done left loss tokens/s restarts checkpoint age why"
    assert failed_row.startswith("granite Failed – – – – – – 0 – ")
    assert failed_row.endswith(" Data")
    assert running_row.startswith("zeta Running skills 2/2 1,234/5,000 24% 2:04:05 0.4321 12.3k 1 ")


def test_all_namespaces_are_one_table(server: ApiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.objects["sftjobs"] = [running("near"), running("far", "other")]
    status(None, Access(server.kubeconfig(tmp_path)), everywhere=True, watch=False, as_json=False)
    assert [row.split()[:2] for row in table(capsys)[2:]] == [["lab", "near"], ["other", "far"]]


@pytest.mark.parametrize(
    ("access", "words"),
    [
        (Access(), "There are no SFTJobs in namespace lab."),
        (Access(context="elsewhere"), "There are no SFTJobs in namespace other."),
        (Access(context="elsewhere", namespace="third"), "There are no SFTJobs in namespace third."),
    ],
)
def test_the_namespace_is_that_of_the_option_or_of_the_context(
    access: Access, words: str, server: ApiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    access = Access(server.kubeconfig(tmp_path), access.context, access.namespace)
    assert status(None, access, everywhere=False, watch=False, as_json=False) == 0
    assert capsys.readouterr().out == f"{words}\n"


# ── for a program, and watched ─────────────────────────────────────────────────────────────────────────────────────


def test_a_program_gets_the_status_as_the_cluster_has_it(
    server: ApiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = failed()
    server.objects["sftjobs"] = [there]
    access = Access(server.kubeconfig(tmp_path))
    assert status("granite", access, everywhere=False, watch=False, as_json=True) == 0
    one = json.loads(capsys.readouterr().out)
    assert (one["namespace"], one["name"], one["status"]) == ("lab", "granite", there["status"])
    assert one["advice"][-1].startswith("Once it is mended: kubectl delete sft granite -n lab")
    assert status(None, access, everywhere=False, watch=False, as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == [one]


def test_watching_tells_each_change_and_ends_with_the_job(server: ApiServer, tmp_path: Path) -> None:
    server.objects["sftjobs"] = [running()]
    command = [str(SFT), "status", "granite", "-w", "-o", "json", "--kubeconfig", server.kubeconfig(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        assert json.loads(watching.stdout.readline())["status"]["state"] == "Running"
        server.objects["sftjobs"] = [running(state="Succeeded")]
        assert [json.loads(line)["status"]["state"] for line in watching.stdout] == ["Succeeded"]
    assert watching.returncode == 0


# ── what can go wrong ──────────────────────────────────────────────────────────────────────────────────────────────


def refused(access: Access, capsys: pytest.CaptureFixture[str], name: str | None = None) -> str:
    """The one line that is said where there is nothing to show."""
    assert status(name, access, everywhere=False, watch=False, as_json=False) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    return error.rstrip("\n")


def test_a_job_that_is_not_there_is_answered_with_those_that_are(
    server: ApiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.objects["sftjobs"] = [running("zeta"), running("alpha")]
    access = Access(server.kubeconfig(tmp_path))
    assert refused(access, capsys, "gamma") == "there is no SFTJob gamma in namespace lab; there: alpha, zeta"
    server.objects["sftjobs"] = []
    assert refused(access, capsys, "gamma") == "there is no SFTJob gamma in namespace lab; there: none"


def test_a_name_that_no_job_can_have_is_not_asked_for(
    server: ApiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(Access(server.kubeconfig(tmp_path)), capsys, "../pods")
    assert said.startswith("'../pods' is no name of an SFTJob: ")
    assert server.asked == []


FORBIDDEN = 'sftjobs.sftjob.dev is forbidden: User "eve" cannot list resource "sftjobs"'


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((403, failure(FORBIDDEN)), f"you may not read this: {FORBIDDEN}"),
        ((404, "404 page not found\n"), "{place} has no SFTJobs: the chart sftjob-operator is not installed there"),
        ((500, failure("etcd is away")), "{place} refuses: etcd is away (500)"),
        ((503, "no  healthy\nupstream"), "{place} refuses: no healthy upstream (503)"),
    ],
    ids=["forbidden", "not installed", "broken", "a proxy's words"],
)
def test_a_refusal_is_one_line_in_the_servers_words(
    refusal: tuple[int, Any], said: str, server: ApiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refusals["sftjobs"] = refusal
    place = f"the cluster at http://127.0.0.1:{server.server_port}"
    assert refused(Access(server.kubeconfig(tmp_path)), capsys) == said.format(place=place)


def test_a_cluster_that_does_not_know_its_user_says_so(
    server: ApiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(Access(server.kubeconfig(tmp_path, token="old")), capsys)
    assert said.endswith("does not know you (401): log in, or give another --context")


def test_a_cluster_that_is_away_is_one_line(tmp_path: Path) -> None:
    """In a process of its own: what libraries log would stand beside it."""
    with api_server() as gone:
        config, place = gone.kubeconfig(tmp_path), f"http://127.0.0.1:{gone.server_port}"
    done = sft("status", "--kubeconfig", config, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"the cluster at {place} does not answer: Connection refused\n"


class Deaf(BaseRequestHandler):
    """Takes a connection and closes it."""

    taken = 0

    def handle(self) -> None:
        Deaf.taken += 1


def test_a_cluster_that_hangs_up_is_asked_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with api_server() as gone, TCPServer(("127.0.0.1", 0), Deaf) as deaf:
        gone.server_port = deaf.server_address[1]
        config = gone.kubeconfig(tmp_path)
        Thread(target=deaf.serve_forever, kwargs={"poll_interval": 0.01}).start()
        said = refused(Access(config), capsys)
        deaf.shutdown()
    assert re.search("does not answer: (Connection reset by peer|Remote end closed connection)", said)
    assert Deaf.taken == 1


def test_without_a_kubeconfig_it_says_how_to_give_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(Access(str(tmp_path / "none")), capsys)
    assert said.startswith(f"no cluster to ask: {tmp_path}/none: Invalid kube-config file. ")
    assert said.endswith("; give --kubeconfig PATH and --context NAME, or set KUBECONFIG")


def test_a_context_that_is_not_there_is_named(
    server: ApiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nowhere" in refused(Access(server.kubeconfig(tmp_path), "nowhere"), capsys)


def test_a_status_of_another_version_is_no_crash(
    server: ApiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.objects["sftjobs"] = [job(progress=progress(mood="good"))]
    assert refused(Access(server.kubeconfig(tmp_path)), capsys) == (
        "the status of SFTJob granite is of another version of sftjob than this `sft` (status.progress.mood)"
    )


def test_one_job_and_all_namespaces_do_not_go_together(tmp_path: Path) -> None:
    done = sft("status", "granite", "-A", cwd=tmp_path)
    assert done.returncode == 2
    assert "a job is in one namespace" in done.stderr


WITHOUT_THE_CLIENT = """
import sys
sys.modules["kubernetes"] = None
from sft_cli.__main__ import app
app(["status"])
"""


def test_without_the_kubernetes_client_it_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_THE_CLIENT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "this needs the Kubernetes client: pip install 'sftjob[operator]'\n"
