"""What a person sees: `sft run` in a terminal of its own, and the drawn parts by themselves."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from sft_api.events import PrepareProgress, PreviewMessage
from sft_cli.live import clock, preparing, sparkline
from sft_cli.samples import chosen_samples, marked
from sft_cli.session import Session
from tests.cli.commands import manifest, play, run_command
from tests.cli.events import finished, prepared, started, step, steps, whole_run

STYLES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def seen_in_a_terminal(command: list[str], folder: Path, columns: int) -> str:
    """Everything that the command writes into a terminal of that width, control sequences included."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "50"}
    running = subprocess.Popen(command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    written = bytearray()
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the last of the other side's owners has ended
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    assert running.wait(60) == 0
    return written.decode()


@pytest.mark.parametrize("columns", [80, 120])
def test_in_a_terminal_data_samples_steps_and_summary_are_drawn(columns: int, tmp_path: Path) -> None:
    manifest(tmp_path)
    # What is said above the live part draws the live part anew, with all that has come until then.
    progress = PrepareProgress(phase="skills", samples=4000, fraction=0.5)
    script = play(tmp_path, [progress, prepared(), prepared("skills"), finished()], whole_run())
    written = seen_in_a_terminal(run_command(script), tmp_path, columns)
    text = STYLES.sub("", written)
    assert "preparing skills" in text
    assert "4,000 samples · 50%" in text
    assert "12 NoLossTokens" in text
    assert "\x1b[32m17 + 25 = 42." in written
    assert "instruct (1/2) · epoch 1/1" in text
    assert "grad norm " in text
    assert "checkpoint committed" in text
    assert "✓ Trained." in text
    assert text.count("✓ Trained.") == 1
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1


def test_progress_of_unknown_size_is_drawn_without_a_share() -> None:
    console = Console(width=80, file=StringIO())
    console.print(preparing([PrepareProgress(phase="instruct", samples=1234, fraction=None)], "0:01"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1,234 samples" in text
    assert "%" not in text


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([], 5, ""),
        ([1.0], 5, "▁"),
        ([8.0, 4.5, 1.0], 5, "█▅▁"),
        ([2.0, 2.0], 5, "▁▁"),
        ([9.0, 7.0, 1.0, 1.0], 2, "█▁"),
        ([float("nan"), 3.0, float("inf"), 1.0], 5, "█▁"),
    ],
)
def test_a_sparkline_has_one_bar_for_each_stretch(values: list[float], width: int, drawn: str) -> None:
    assert sparkline(values, width) == drawn


def test_samples_are_taken_from_as_many_phases_as_there_are() -> None:
    one, two = prepared("one"), prepared("two")
    assert [phase for phase, _ in chosen_samples([one])] == ["one", "one", "one"]
    assert [phase for phase, _ in chosen_samples([one, two, prepared("validation")])] == ["one", "two", "one"]
    assert chosen_samples([prepared("none", preview=[])]) == []


def test_a_long_stretch_shows_its_beginning_and_its_end() -> None:
    text = marked([PreviewMessage(text="a" * 1000 + "b" * 1000, trained=True)])
    assert text == f"⟦{'a' * 300} … 1,400 characters … {'b' * 300}⟧"


def test_a_long_conversation_shows_its_beginning_and_its_end() -> None:
    text = marked([PreviewMessage(text=f"<{number}>", trained=False) for number in range(40)])
    assert text.startswith("<0><1><2><3><4><5>\n… 28 stretches …\n<34>")
    assert text.endswith("<39>")


@pytest.mark.parametrize(("seconds", "text"), [(None, "–:––"), (0, "0:00"), (75.4, "1:15"), (3723, "1:02:03")])
def test_a_clock_reads_hours_minutes_and_seconds(seconds: float | None, text: str) -> None:
    assert clock(seconds) == text


def test_the_time_left_follows_the_pace_of_the_last_steps() -> None:
    session = Session()
    assert session.seconds_left() is None
    session.take(started(200))
    for event in steps(1, 100):
        session.take(event)
    assert session.seconds_left() == pytest.approx(50.0)
    session.take(step(101, time=session.steps[-1].time + 5.4))
    assert session.seconds_left() == pytest.approx((48 * 0.5 + 5.4) / 49 * 99)
