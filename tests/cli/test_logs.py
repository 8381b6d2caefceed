"""`sft logs` against a server that speaks as an API server does."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from queue import SimpleQueue

import pytest

from sft_cli.clusters import Access
from sft_cli.logs import Wanted, logs
from tests.cli.api_server import END, ApiServer, failure
from tests.cli.cluster_jobs import ago, attempt, failed_attempt, job, pod, prepare_pod, running
from tests.cli.commands import SFT, sft


@pytest.fixture
def access(server: ApiServer, tmp_path: Path) -> Access:
    """To a cluster with `granite`, which runs its second attempt on two pods, of which the first is gone."""
    server.objects["sftjobs"] = [running()]
    server.objects["pods"] = [
        prepare_pod("granite"),
        pod("granite", 2, 1),
        pod("granite", 2, 0),
        pod("granite", 2, 0, "other"),
    ]
    server.logs = {
        "granite-prepare-abcde": ["12,345 samples"],
        "granite-2-master-0": ["step 1,001", "step 1,002", "step 1,003"],
        "granite-2-worker-0": ["a worker's words"],
    }
    return Access(server.kubeconfig(tmp_path))


def following(server: ApiServer, folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [str(SFT), "logs", "granite", "-f", "--kubeconfig", server.kubeconfig(folder), *options]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


# ── of pods that are there ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("wanted", "lines"),
    [
        (Wanted(), ["step 1,001", "step 1,002", "step 1,003"]),
        (Wanted(tail=2), ["step 1,002", "step 1,003"]),
        (Wanted(tail=0), []),
        (Wanted(rank=1), ["a worker's words"]),
        (Wanted(all_ranks=True, tail=1), ["[0] step 1,003", "[1] a worker's words"]),
        (Wanted(attempt=2, rank=1), ["a worker's words"]),
        (Wanted(prepare=True), ["12,345 samples"]),
    ],
    ids=["the first rank", "its last lines", "none of them", "a rank", "all ranks", "an attempt", "the preparation"],
)
def test_the_lines_are_those_asked_for(
    wanted: Wanted, lines: list[str], access: Access, capsys: pytest.CaptureFixture[str]
) -> None:
    assert logs("granite", access, wanted) == 0
    out, error = capsys.readouterr()
    assert (out.splitlines(), error) == (lines, "")


def test_before_the_first_attempt_it_is_the_preparation_that_speaks(
    server: ApiServer, access: Access, capsys: pytest.CaptureFixture[str]
) -> None:
    server.objects["sftjobs"] = [job(state="Preparing")]
    assert logs("granite", access, Wanted()) == 0
    assert capsys.readouterr() == ("12,345 samples\n", "there is no attempt yet: this is the preparation\n")


def test_of_several_pods_in_one_place_the_newest_speaks(
    server: ApiServer, access: Access, capsys: pytest.CaptureFixture[str]
) -> None:
    """A preparation that is tried again; a gang that Kueue took away and let in again."""
    server.objects["pods"].insert(0, prepare_pod("granite", "aaaaa", created=ago(minutes=1)))
    server.logs["granite-prepare-aaaaa"] = ["tried again"]
    assert logs("granite", access, Wanted(prepare=True)) == 0
    assert capsys.readouterr().out == "tried again\n"


def test_a_rank_that_is_not_there_is_answered_with_those_that_are(
    access: Access, capsys: pytest.CaptureFixture[str]
) -> None:
    assert logs("granite", access, Wanted(rank=7)) == 1
    assert capsys.readouterr() == ("", "attempt 2 has no pod of rank 7; there are the ranks 0, 1\n")


def test_a_pod_that_has_not_started_is_told_in_the_servers_words(
    server: ApiServer, access: Access, capsys: pytest.CaptureFixture[str]
) -> None:
    del server.logs["granite-2-master-0"]
    assert logs("granite", access, Wanted()) == 1
    waiting = 'container "pytorch" in pod "granite-2-master-0" is waiting to start: ContainerCreating\n'
    assert capsys.readouterr() == ("", waiting)


def test_who_may_not_read_logs_is_told(server: ApiServer, access: Access, capsys: pytest.CaptureFixture[str]) -> None:
    server.refusals["pods"] = 403, failure('pods is forbidden: User "eve" cannot list resource "pods"')
    assert logs("granite", access, Wanted()) == 1
    said = 'you may not read this: pods is forbidden: User "eve" cannot list resource "pods"\n'
    assert capsys.readouterr() == ("", said)


# ── followed ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_line_is_there_as_soon_as_it_is_said(server: ApiServer, access: Access, tmp_path: Path) -> None:
    said: SimpleQueue[str | None] = SimpleQueue()
    server.logs["granite-2-master-0"] = said
    with following(server, tmp_path) as process:
        assert process.stdout is not None
        for line in ("step 1,001", "step 1,002"):
            said.put(line)
            assert process.stdout.readline() == f"{line}\n"
        said.put(END)
        assert process.stdout.read() == ""
    assert process.returncode == 0


def test_all_ranks_are_heard_at_once(server: ApiServer, access: Access, tmp_path: Path) -> None:
    first: SimpleQueue[str | None] = SimpleQueue()
    second: SimpleQueue[str | None] = SimpleQueue()
    server.logs |= {"granite-2-master-0": first, "granite-2-worker-0": second}
    with following(server, tmp_path, "--all") as process:
        assert process.stdout is not None
        for rank, queue in ((1, second), (0, first), (1, second)):
            queue.put("here")
            assert process.stdout.readline() == f"[{rank}] here\n"
        second.put(END)
        first.put("the last")
        first.put(END)
        assert process.stdout.read() == "[0] the last\n"
    assert process.returncode == 0


def test_following_waits_for_a_pod_to_start(server: ApiServer, access: Access, tmp_path: Path) -> None:
    del server.logs["granite-2-master-0"]
    server.objects["pods"] = [pod("granite", 2, 0, phase="Pending")]
    with following(server, tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stderr.readline().startswith('waiting: container "pytorch" in pod "granite-2-master-0" is ')
        server.logs["granite-2-master-0"] = ["started"]
        assert process.stdout.read() == "started\n"
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_waiting_ends_with_the_pod(server: ApiServer, access: Access, tmp_path: Path) -> None:
    del server.logs["granite-2-master-0"]
    server.objects["pods"] = [pod("granite", 2, 0, phase="Pending")]
    with following(server, tmp_path) as process:
        assert process.stderr is not None
        process.stderr.readline()
        server.objects["pods"] = []
        assert process.stderr.read() == 'pods "granite-2-master-0" not found\n'
    assert process.returncode == 1


def test_ctrl_c_ends_following_without_a_word(server: ApiServer, access: Access, tmp_path: Path) -> None:
    said: SimpleQueue[str | None] = SimpleQueue()
    server.logs |= {"granite-2-master-0": said, "granite-2-worker-0": said}
    with following(server, tmp_path, "--all") as process:
        assert process.stdout is not None
        said.put("here")
        process.stdout.readline()
        os.kill(process.pid, signal.SIGINT)
        assert process.communicate() == ("", "")
    assert process.returncode == 0
    said.put(END)
    said.put(END)


# ── of pods that are gone ──────────────────────────────────────────────────────────────────────────────────────────


def test_of_pods_that_are_gone_the_lines_in_the_status_are_told(
    access: Access, capsys: pytest.CaptureFixture[str]
) -> None:
    assert logs("granite", access, Wanted(attempt=1, tail=2)) == 0
    out, error = capsys.readouterr()
    assert out == "step 1034\nKilled\n"
    assert error.splitlines() == [
        "the pods of attempt 1 are gone; it ended by OOMKilled: pod granite-1-worker-0 was killed: out of memory",
        "the last lines of the one that failed, from the job's status:",
    ]


@pytest.mark.parametrize(
    ("attempts", "wanted", "said"),
    [
        ([failed_attempt(1), attempt(2)], Wanted(attempt=9), "SFTJob granite has no attempt 9; in its status: 1, 2"),
        (
            [attempt(1, ended=ago(minutes=1), reason="Suspended", message="spec.suspend was set to true")],
            Wanted(),
            "attempt 1 has no pods, and no lines of their log were kept;"
            " it ended by Suspended: spec.suspend was set to true",
        ),
        (
            [attempt(1)],
            Wanted(),
            "attempt 1 has no pods, and no lines of their log were kept; its pods are still to be made",
        ),
        ([], Wanted(), "SFTJob granite has no pod of a preparation: it has not begun, or is cleaned up"),
        ([], Wanted(prepare=True), "SFTJob granite has no pod of a preparation: it has not begun, or is cleaned up"),
    ],
    ids=["no such attempt", "nothing kept", "not made yet", "not begun", "no preparation"],
)
def test_where_there_is_nothing_to_tell_it_says_why(
    attempts: list[dict[str, object]],
    wanted: Wanted,
    said: str,
    server: ApiServer,
    access: Access,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.objects |= {"sftjobs": [job(attempts=attempts)], "pods": []}
    assert logs("granite", access, wanted) == 1
    assert capsys.readouterr().err.splitlines()[-1] == said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prepare", "--rank", "1"], "--prepare is one pod: it has no attempt and no ranks"),
        (["--all", "--rank", "1"], "--rank is one pod, --all is every one"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: list[str], said: str, tmp_path: Path) -> None:
    done = sft("logs", "granite", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
