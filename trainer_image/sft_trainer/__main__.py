"""The trainer's three commands: `prepare` the data, `train` (start this machine's ranks), and `rank` (be one of them).

    python -m sft_trainer prepare RUN_JSON
    python -m sft_trainer train RUN_JSON --processes N [--attempt N]

Whatever happens ends in one `finished` event, the exit code of `sft_api.run.ExitCode`, and, where a kubelet asks for
it, a termination message.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from sft_api.events import Finished
from sft_api.run import ExitCode, RunConfig, RunError
from sft_trainer.launch import Account, Gang, Outcome, run_ranks, write_account
from sft_trainer.stopping import StopFlag
from sft_trainer.voice import claim_stdout, say

TERMINATION_LOG = Path("/dev/termination-log")
TERMINATION_LOG_BYTES = 4096


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    claim_stdout()
    if options.command == "rank":
        return rank(options)
    signal.signal(signal.SIGTERM, told_to_stop)
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
    train.add_argument("--attempt", type=int, help="number of this attempt; unset: the next free one")
    one.add_argument("--attempt", type=int, required=True)
    one.add_argument("--model", type=Path, required=True, help="folder of the base model")
    return top


def read_config(path: Path) -> RunConfig:
    try:
        return RunConfig.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise RunError(ExitCode.CONFIGURATION, f"{path} is not a resolved job: {error}") from error


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


def finished(outcome: Outcome) -> Finished:
    return Finished(
        exit_code=outcome.code,
        reason=reason(outcome.code),
        message=outcome.message,
        rank=outcome.rank,
        step=outcome.step,
        checkpoint_step=outcome.checkpoint_step,
    )


def finish(outcome: Outcome) -> None:
    event = finished(outcome)
    say(event)
    if TERMINATION_LOG.exists():
        room = TERMINATION_LOG_BYTES - len(event.model_copy(update={"message": ""}).model_dump_json(by_alias=True)) - 8
        short = event.model_copy(update={"message": event.message.encode()[: room // 2].decode(errors="ignore")})
        TERMINATION_LOG.write_text(short.model_dump_json(by_alias=True))


def reason(code: int) -> str:
    """The exit code's name in the spelling of Kubernetes reasons."""
    known = {member.value: "".join(word.title() for word in member.name.split("_")) for member in ExitCode}
    return known.get(code, "Stopped" if code == 128 + signal.SIGINT else "Failed")


def prepare(options: argparse.Namespace, config: RunConfig) -> Outcome:
    """Tokenise the data; also the first proof of credentials, write permission, the model and a schedule that works."""
    from sft_trainer.preparation import prepare_job
    from sft_trainer.schedule import Schedule
    from sft_trainer.split import open_data

    def check_model(folder: Path) -> None:
        from sft_trainer.model import load_config  # torch comes with it: not before the store is known to answer

        load_config(folder, config.model)

    data, _ = open_data(config, prepare_job(config, say, options.processes, check_model))
    schedule = Schedule(config.phases, [len(phase.samples) for phase in data])
    return Outcome(0, f"the data of {schedule.total_steps:,} steps is ready")


def told_to_stop(number: int, frame: object) -> None:
    raise RunError(ExitCode.PREEMPTED, "told to stop before the training began; run again to go on")


def train(options: argparse.Namespace, config: RunConfig) -> Outcome:
    """Everything one machine needs once, then its ranks."""
    from sft_trainer.preparation import claim_attempt, fetch, note_ending

    gang = Gang.from_environment(options.processes, os.environ)
    attempt = options.attempt or claim_attempt(config)
    with work_folder() as work:
        model = fetch(config)
        command = ["-m", "sft_trainer", "rank", str(options.run), "--attempt", str(attempt), "--model", str(model)]
        outcome = run_ranks(gang, command, work)
    if gang.first_rank == 0:
        note_ending(config, attempt, finished(outcome))
    return outcome


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
    stop = StopFlag.on_sigterm()
    number = int(os.environ["RANK"])
    work = Path(os.environ["SFT_WORK"])
    account = rank_account(options, work, stop)
    write_account(work, number, account)
    sys.stderr.flush()
    # Not sys.exit: after a failure NCCL's and gloo's threads may wait for peers that will never come.
    os._exit(account.code)


def rank_account(options: argparse.Namespace, work: Path, stop: StopFlag) -> Account:
    from sft_trainer.engine import as_run_error
    from sft_trainer.rank import run_rank
    from sft_trainer.train import Progress

    progress = Progress()
    try:
        message = run_rank(read_config(options.run), options.attempt, options.model, work, stop, progress)
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
