"""The trainer's three commands: `prepare` the data, `train` (start this machine's ranks), and `rank` (be one of them).

    python -m sft_trainer prepare RUN_JSON
    python -m sft_trainer train RUN_JSON --processes N

Whatever happens ends in one `finished` event, the exit code of `sft_api.run.ExitCode`, and, where a kubelet asks for
it, a termination message.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    # Before anything is imported that takes long: whoever is told to stop meanwhile ends as one that was, and not by a
    # signal; and as the first process of a container, which has no default for it, does not miss it.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(30))  # ExitCode.PREEMPTED

import argparse
import faulthandler
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sft_api.events import Event, PreparedMetrics
from sft_api.run import ExitCode, RunConfig, RunError
from sft_trainer.ending import Account, Outcome, finished, termination_message, write_account
from sft_trainer.hang import STACKS_SIGNAL, stacks_file
from sft_trainer.heartbeat import Heartbeat
from sft_trainer.interruption import interruptible, raise_preempted
from sft_trainer.launch import Gang, Limits, run_ranks
from sft_trainer.parent import end_with
from sft_trainer.stopping import StopFlag
from sft_trainer.told import read_config
from sft_trainer.voice import claim_stdout, say

TERMINATION_LOG = "/dev/termination-log"
"""Where a kubelet asks for a termination message, unless SFT_TERMINATION_LOG says otherwise."""
GRACE_SECONDS = 270.0
"""How long ranks that were told to stop may take to save, unless SFT_GRACE_SECONDS says otherwise."""


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    claim_stdout()
    if options.command == "rank":
        return rank(options)
    signal.signal(signal.SIGTERM, raise_preempted)
    outcome = account_for(lambda: COMMANDS[options.command](options, read_config(options.run)))
    finish(outcome)
    return outcome.code


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m sft_trainer", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="tokenise the data, once for each fingerprint")
    train = commands.add_parser("train", help="start this machine's ranks and wait for them")
    one = commands.add_parser("rank", help="be one rank of a gang; started by `train`")
    for command in (prepare, train, one):
        command.add_argument("run", type=Path, help="the resolved job, run.json")
    prepare.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="tokenising processes")
    train.add_argument("--processes", type=int, default=1, help="ranks on this machine")
    one.add_argument("--attempt", type=int, default=0, help="number of this attempt; the first rank's counts")
    one.add_argument("--model", type=Path, required=True, help="folder of the base model")
    return top


def account_for(work: Callable[[], Outcome]) -> Outcome:
    """Run a command; whatever stops it becomes an outcome."""
    try:
        return work()
    except RunError as error:
        return Outcome(error.code, str(error))
    except KeyboardInterrupt:
        return Outcome(128 + signal.SIGINT, "stopped at once; what was committed before counts")
    except MemoryError as error:
        return Outcome(ExitCode.OUT_OF_MEMORY, f"out of memory: {error}")
    except Exception as error:
        traceback.print_exc()
        return Outcome(1, f"{type(error).__name__}: {error}")


def finish(outcome: Outcome) -> None:
    say(finished(outcome))
    leave_word(outcome)


def leave_word(outcome: Outcome) -> None:
    """Write the termination message, where a kubelet asks for one."""
    log = Path(os.environ.get("SFT_TERMINATION_LOG", TERMINATION_LOG))
    if log.exists():
        log.write_text(termination_message(outcome))


def prepare(options: argparse.Namespace, config: RunConfig) -> Outcome:
    """Tokenise the data; also the first proof of credentials, write permission, the model and a schedule that works."""
    from sft_trainer.preparation import prepare_job
    from sft_trainer.prepared_plan import prepared_plan
    from sft_trainer.schedule import Schedule
    from sft_trainer.split import open_data

    def check_model(folder: Path) -> None:
        from sft_trainer.model import load_config  # torch comes with it: not before the store is known to answer

        load_config(folder, config.model)

    prepared: dict[str, PreparedMetrics] = {}

    def note(event: Event) -> None:
        if isinstance(event, PreparedMetrics):
            prepared[event.phase] = event
        say(event)

    with interruptible(finish):
        data, _ = open_data(config, prepare_job(config, note, options.processes, check_model))
    schedule = Schedule(config.phases, [len(phase.samples) for phase in data])
    plan = prepared_plan(data, schedule, prepared)
    return Outcome(0, f"the data of {schedule.total_steps:,} steps is ready", plan=plan)


def train(options: argparse.Namespace, config: RunConfig) -> Outcome:
    """Everything one machine needs once, then its ranks."""
    from sft_trainer.preparation import claim_attempt, fetch, note_ending

    gang = Gang.from_environment(options.processes, os.environ)
    limits = Limits(config.hang_timeout_seconds, float(os.environ.get("SFT_GRACE_SECONDS", GRACE_SECONDS)))
    with interruptible(finish):
        attempt = claim_attempt(config) if gang.first_rank == 0 else 0
        model = fetch(config)
    with work_folder() as work:
        command = ["-m", "sft_trainer", "rank", str(options.run), "--attempt", str(attempt), "--model", str(model)]
        outcome = run_ranks(gang, command, work, limits, threads(config, gang))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it has ended; only the account of it is left to be given
    leave_word(outcome)  # before the store is asked, which may not answer while a kubelet's patience ends
    if gang.first_rank == 0:
        note_ending(config, attempt, finished(outcome))
    return outcome


def threads(config: RunConfig, gang: Gang) -> int:
    """Of each rank. On the CPU always one, for sums depend on it: the same ranks give the same bits on any machine."""
    if config.trainer.gpus_per_node == 0:
        return 1
    return max(1, len(os.sched_getaffinity(0)) // gang.processes)


@contextmanager
def work_folder() -> Iterator[Path]:
    """A folder of this attempt alone, for what is staged; gone at its end."""
    folder = Path(tempfile.mkdtemp(prefix="sftjob-", dir=os.environ.get("SFT_STAGING")))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def rank(options: argparse.Namespace) -> int:
    """Be one rank: train, then leave an account of the end for the launcher."""
    end_with(int(os.environ["SFT_LAUNCHER"]))
    stop = StopFlag.on_sigterm()
    number = int(os.environ["RANK"])
    work = Path(os.environ["SFT_WORK"])
    stacks = stacks_file(work, number).open("w")  # stays open: written to when the launcher asks
    faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
    account = rank_account(options, work, stop, Heartbeat(work, number))
    write_account(work, number, account)
    sys.stderr.flush()
    # Not sys.exit: after a failure NCCL's and gloo's threads may wait for peers that will never come.
    os._exit(account.code)


def rank_account(options: argparse.Namespace, work: Path, stop: StopFlag, heartbeat: Heartbeat) -> Account:
    from sft_trainer.engine import as_run_error
    from sft_trainer.rank import run_rank
    from sft_trainer.train import Progress

    progress = Progress()
    try:
        message = run_rank(options.run, options.attempt, options.model, work, stop, heartbeat, progress)
        code = int(ExitCode.COMPLETED)
    except BaseException as error:
        known = error if isinstance(error, RunError) else as_run_error(error)
        if known is None or known.code == ExitCode.COMMUNICATION:
            traceback.print_exc()
        code, message = (known.code, str(known)) if known else (1, f"{type(error).__name__}: {error}")
    return Account(code=code, message=message, step=progress.step, checkpoint_step=progress.checkpoint_step)


COMMANDS: dict[str, Callable[[argparse.Namespace, RunConfig], Outcome]] = {"prepare": prepare, "train": train}

if __name__ == "__main__":
    sys.exit(main())
