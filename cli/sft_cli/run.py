"""`sft run`: prepare, train, show, sum up, on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pydantic import ValidationError

from sft_api import names
from sft_api.events import EVENT, Event
from sft_api.recipes import resolve
from sft_api.run import ExitCode, RunConfig, RunError
from sft_cli import laptop, machine
from sft_cli.children import Children
from sft_cli.display import Display, JsonDisplay, PlainDisplay
from sft_cli.manifests import BadManifest, Finding, read_job
from sft_cli.session import Session

if TYPE_CHECKING:
    from rich.console import Console

TRAINER = (sys.executable, "-m", "sft_trainer")
STOPPING = "Stopping: the trainer commits a checkpoint first. Ctrl-C again stops at once and keeps what was committed."
KILLED = "Stopped at once."


def run(
    file: str,
    processes: int | None,
    overrides: Sequence[str],
    as_json: bool,
    trainer_command: Sequence[str] = TRAINER,
) -> int:
    """Carry out the manifest in `file`; returns the exit code. Problems of the manifest go to stderr, one a line."""
    try:
        job = read_job(file, overrides)
        laptop.refuse_suspended(job)
        laptop.refuse_claims(job)
        config = resolve(job)
        os.environ.update(laptop.environment(job))  # for the trainer, and for whatever else opens a store here
        here = machine.choose(job.spec.trainer, processes, machine.visible_gpus(os.environ))
    except BadManifest as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIGURATION
    except RunError as error:
        print(Finding(file, error.message, error.path), file=sys.stderr)
        return error.code
    # From here on the job is this machine's: the trainer takes `gpusPerNode` at its word.
    trainer = config.trainer.model_copy(update={"nodes": 1, "gpus_per_node": here.gpus})
    config = config.model_copy(update={"trainer": trainer})
    session = Session()
    display, console = open_display(as_json, session)
    for note in (here.note, laptop.without_effect(job)):
        if note:
            display.note(note)
    work = Path(tempfile.mkdtemp(prefix=f"sft-{config.name}-"))
    began = time.monotonic()
    code = carry_out(config, here.processes, work, session, display, trainer_command)
    sum_up(config, code, time.monotonic() - began, session, work, console)
    if code in (ExitCode.COMPLETED, ExitCode.PREEMPTED):
        shutil.rmtree(work)
    return code


def open_display(as_json: bool, session: Session) -> tuple[Display, Console | None]:
    """The display that fits, and the console for the closing summary; none where a program reads."""
    if as_json:
        return JsonDisplay(sys.stdout, sys.stderr), None
    from sft_cli.screen import stdout_console

    console = stdout_console()
    if not console.is_terminal or console.is_dumb_terminal:
        return PlainDisplay(sys.stdout, session), console
    from sft_cli.live import LiveDisplay

    return LiveDisplay(console, session), console


def carry_out(
    config: RunConfig,
    processes: int,
    work: Path,
    session: Session,
    display: Display,
    trainer_command: Sequence[str],
) -> int:
    """Prepare, then train; the exit code of whichever ended the run."""
    run_json = work / "run.json"
    run_json.write_text(config.model_dump_json(by_alias=True, indent=2), encoding="utf-8")
    stages = {
        "prepare": [*trainer_command, "prepare", str(run_json)],
        "train": [*trainer_command, "train", str(run_json), "--processes", str(processes)],
    }
    with (work / "trainer.log").open("wb", buffering=0) as log:
        children = Children(
            log, listener(session, display, log), lambda count: display.note(STOPPING if count == 1 else KILLED)
        )
        try:
            with children:
                for name, command in stages.items():
                    display.stage(name)
                    code = children.run(command, {"SFT_LOG_FORMAT": "json"})
                    if code != 0:
                        break
                    if children.stops:
                        return ExitCode.PREEMPTED if name == "prepare" else code
        finally:
            display.close()
    return code


def listener(session: Session, display: Display, log: IO[bytes]) -> Callable[[str], None]:
    """Takes the trainer's lines: events to the session and the display, anything else to the log."""

    def listen(line: str) -> None:
        try:
            event: Event = EVENT.validate_json(line)
        except ValidationError:
            log.write(f"{line}\n".encode())
            return
        session.take(event)
        display.event(event, line)

    return listen


def sum_up(config: RunConfig, code: int, seconds: float, session: Session, work: Path, console: Console | None) -> None:
    """Write the report into the store and print the summary (where there is a person to read it)."""
    from sft_cli.results import Spoken, put_report, read_history, report_page, shown
    from sft_cli.summary import Ending, print_summary
    from sft_trainer.report import merge
    from sft_trainer.store import Store

    attempt = session.started.attempt if session.started else 0
    prepared = list(session.prepared.values())
    history = merge({attempt: session.training_events()}, prepared)
    exports = [(event.phase, event.uri) for event in session.exports]
    report: str | None = None
    if session.started is not None:
        try:
            store = Store.open(config.checkpoints.uri, path="spec.checkpoints.uri")
            history = read_history(store, warn, Spoken(attempt, session.training_events(), prepared))
            report = put_report(store, report_page(history, config.name, config.checkpoints.uri, config))
            exports = [(event.phase, shown(store, names.export(event.phase)).rstrip("/")) for event in history.exports]
        except Exception as error:  # whatever becomes of the report, the training ended as it ended
            kind = "" if isinstance(error, RunError) else f"{type(error).__name__}: "
            warn(f"The report could not be written: {kind}{error}")
    if console is not None:
        message = ending_message(code, session)
        log = work / "trainer.log"
        print_summary(console, Ending(code, config.checkpoints.uri, seconds, history, exports, report, log, message))


def ending_message(code: int, session: Session) -> str | None:
    if session.finished is not None:
        return session.finished.message
    if code - 128 in signal.valid_signals():
        return f"the trainer was ended by {signal.Signals(code - 128).name}"
    if code == ExitCode.PREEMPTED:
        return "nothing was trained yet"
    return None if code == 0 else "the trainer ended without a word"


def warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
