"""The same training run, interrupted at the same steps, by us and by the peers: which samples are in the final weights.

    python -m benchmarks.resume [--kills 5] [--seed 1] [-o json]

Everybody trains the same tiny Llama on the same tokenised samples, as many a step, for the same epochs, on one rank on
the CPU in fp32, with their own loop, sampler, checkpoints and resume; all are real runs. Attempt i of a run is
interrupted after as many optimizer steps as the seed says, and started again, until the run is done. Interruptions:

    kill        SIGKILL in the step after
    stop        the notice before a pod is ended (SIGTERM), in the step after; whatever saves on it is turned on
    killInSave  SIGKILL in the middle of the next checkpoint (ours: as soon as the step is heard of that it follows)

Counted is what entered the weights that survive, by the samples' token ids, and nothing else: a step that was undone by
going back to a checkpoint counts as work done again, not as samples repeated. In each epoch the schedule wants every
sample once: `lost` are those that the final weights never saw in it, `repeated` the times that they saw one again;
both are summed over the epochs. Nothing is counted of a run that does not start again by itself; it says why.

The peers: instructlab-training, which can resume from the state after an epoch or from one saved on notice, and TRL's
SFTTrainer, which saves every so many steps as ours does, with and without packing. With packing a step of TRL holds
packs, not a fixed number of samples. How they are run is said in `benchmarks.peers.resume_of_*`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chaos.run import descendants
from benchmarks.ledger import History, history, read, tally
from benchmarks.peers.attempts import How, Samples
from benchmarks.reporting import machine
from benchmarks.throughput import call
from examples.make_model import make_model, read_texts
from sft_api.events import EVENT, Started, StepMetrics
from sft_api.manifest import parse_job
from sft_api.recipes import resolve
from sft_api.run import ExitCode, RunConfig
from sft_trainer.checkpoint import list_checkpoints
from sft_trainer.plan import permutation, samples_digest
from sft_trainer.preparation import prepare_job
from sft_trainer.store import Store
from tests.trainer.runs import write_conversations

OURS = "sftjob"
PEERS = {
    "instructlab-training": ("benchmarks.peers.resume_of_instructlab", False),
    "TRL": ("benchmarks.peers.resume_of_trl", False),
    "TRL, packing": ("benchmarks.peers.resume_of_trl", True),
}
"""The module that runs each, and whether it packs."""
EFFECTIVE_BATCH, SAVE_STEPS = 32, 7
MAX_TOKENS, MAX_LENGTH = 2_048, 512
AT_ONCE = 2
"""Contenders that run side by side, one thread each."""


@dataclass(frozen=True)
class Setting:
    """What all train, and when they are interrupted."""

    work: Path
    samples: int
    epochs: int
    after: tuple[int, ...]
    """Attempt i is interrupted after so many steps of its own."""

    def run_json(self, name: str) -> Path:
        """The resolved job of one of our runs; all share the prepared data."""
        job = parse_job(
            {
                "apiVersion": "sftjob.dev/v1alpha1",
                "kind": "SFTJob",
                "metadata": {"name": "resume"},
                "spec": {
                    "model": {"uri": f"file://{self.work}/model", "chatTemplate": {"name": "ChatML"}},
                    "recipe": "none",
                    "phases": [{"name": "all", "data": [{"uri": f"file://{self.work}/data.jsonl"}]}],
                    "epochs": self.epochs,
                    "batch": {
                        "effectiveBatchSize": EFFECTIVE_BATCH,
                        "maxTokensPerGPU": MAX_TOKENS,
                        "maxSequenceLength": MAX_LENGTH,
                    },
                    "optimizer": {"learningRate": 0.001},
                    "trainer": {"gpusPerNode": 0, "precision": "FP32", "activationCheckpointing": False},
                    "preparedData": {"uri": f"file://{self.work}/prepared"},
                    "checkpoints": {
                        "uri": f"file://{self.work}/{name}",
                        "every": {"steps": SAVE_STEPS},
                        "export": "Never",
                    },
                },
            }
        )
        path = self.work / f"{name}.json"
        path.write_text(resolve(job).model_dump_json(by_alias=True))
        return path

    def interruptions(self, how: How) -> tuple[int, ...]:
        return () if how is How.NEVER else self.after


@dataclass(frozen=True)
class Run:
    """What became of one run."""

    history: History
    error: str = ""
    """Why it could not go on; empty where it finished."""


def main() -> int:
    options = parse_arguments()
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "SFT_LOG_FORMAT": "json"}
    with tempfile.TemporaryDirectory(prefix="resume-") as folder:
        os.environ |= {"HF_HOME": f"{folder}/hub", "SFTJOB_CACHE": f"{folder}/cache"}
        setting = set_up(Path(folder), options)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            running = {OURS: pool.submit(lambda: {how: run_ours(setting, how) for how in How})}
            running |= {peer: pool.submit(run_peer, setting, peer) for peer in PEERS}
            runs = {contender: future.result() for contender, future in running.items()}
    found = {
        "benchmark": "resume",
        "machine": machine(),
        "versions": {
            name: version(name) for name in ("torch", "transformers", "deepspeed", "instructlab-training", "trl")
        },
        "seed": options.seed,
        "interruptedAfterSteps": setting.after,
        "samples": setting.samples,
        "epochs": setting.epochs,
        "effectiveBatchSize": EFFECTIVE_BATCH,
        "checkpointEverySteps": SAVE_STEPS,
        "runs": [
            describe(setting, contender, how, run, of_contender[How.NEVER])
            for contender, of_contender in runs.items()
            for how, run in of_contender.items()
        ],
    }
    print(json.dumps(found, indent=2) if options.output == "json" else to_table(found))
    return 0 if all(is_as_promised(row) for row in found["runs"] if row["contender"] == OURS) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table", help="what to print")
    parser.add_argument("--kills", type=int, default=5, help="interruptions of each run (5)")
    parser.add_argument("--seed", type=int, default=1, help="of when they come (1)")
    parser.add_argument("--samples", type=int, default=1_000, help="generated samples of varied length (1,000)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over them (3)")
    return parser.parse_args()


def set_up(work: Path, options: argparse.Namespace) -> Setting:
    """Data, tokenizer and model on disk, and the data prepared."""
    data = write_conversations(work / "data.jsonl", options.samples, seed=1)
    make_model(work / "model", read_texts([data]), hidden=32, layers=2, heads=2, vocab=320)
    steps = options.epochs * -(-options.samples // EFFECTIVE_BATCH)
    after = draw(options.kills, steps, random.Random(options.seed))
    setting = Setting(work, options.samples, options.epochs, after)
    for how in How:
        config = RunConfig.model_validate_json(setting.run_json(how).read_text())
        prepare_job(config, lambda event: None, processes=1, check_model=lambda folder: None)
    return setting


def draw(kills: int, steps: int, chance: random.Random) -> tuple[int, ...]:
    """After how many of its own steps each attempt is interrupted: few enough that the last comes before the end."""
    if kills >= steps:
        raise SystemExit(f"--kills {kills} are too many: a run has {steps} steps, and each attempt takes at least one")
    return tuple(chance.randint(1, (steps - 1) // kills) for _ in range(kills))


def run_peer(setting: Setting, peer: str) -> dict[How, Run]:
    """A peer's runs, one for each way to be interrupted."""
    module, packing = PEERS[peer]
    work = setting.work / peer
    asked = {
        "run": str(setting.work / f"{How.NEVER}.json"),
        "work": str(work),
        "after": {how: setting.interruptions(how) for how in How},
        "saveSteps": SAVE_STEPS,
        "packing": packing,
    }
    ended = json.loads(call(module, json.dumps(asked)).splitlines()[-1])
    return {how: Run(history(read(work / how / "ledger.jsonl")), ended[how]["error"]) for how in How}


def run_ours(setting: Setting, how: How) -> Run:
    """Our run: real launchers and ranks, one attempt after another."""
    run_json = setting.work / f"{how}.json"
    config = RunConfig.model_validate_json(run_json.read_text())
    schedule = Schedule(config)
    entries: list[dict[str, Any]] = []
    interruptions = list(setting.interruptions(how))
    while True:
        code = one_attempt(run_json, how, interruptions.pop(0) if interruptions else None, schedule, entries)
        if code == 0:
            newest = list_checkpoints(Store.open(config.checkpoints.uri), verify=True)[-1]
            entries.append({"event": "finish", "digest": newest.parameters_digest})
            return Run(history(entries))
        if code not in (-signal.SIGKILL, ExitCode.PREEMPTED):
            return Run(history(entries), f"exit code {code}")


class Schedule:
    """Which samples our steps hold, and the proof: the digest of their content that the trainer reports."""

    def __init__(self, config: RunConfig):
        self.config, self.content = config, Samples(config).dataset.content

    def samples(self, step: StepMetrics) -> list[int]:
        """Those of a step; an assertion fails where it trained on others."""
        in_epoch = (step.step - 1) % -(-len(self.content) // EFFECTIVE_BATCH)
        order = permutation(len(self.content), self.config.seed, phase=0, epoch=step.epoch - 1)
        samples = order[in_epoch * EFFECTIVE_BATCH : (in_epoch + 1) * EFFECTIVE_BATCH]
        assert samples_digest(self.content[samples]) == step.samples_digest
        return [int(sample) for sample in np.sort(samples)]


def one_attempt(run_json: Path, how: How, after: int | None, schedule: Schedule, entries: list[dict[str, Any]]) -> int:
    """Start the trainer, interrupt it after so many steps, write down what it says; its exit code.

    Every step is written down as a checkpoint: which of them it was, the next attempt says.
    """
    steps = 0
    command = [sys.executable, "-m", "sft_trainer", "train", str(run_json)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        entries.append({"event": "begin"})
        for line in process.stdout:
            event = EVENT.validate_json(line)
            if isinstance(event, Started) and event.resumed_from_step:
                entries.append({"event": "load", "checkpoint": event.resumed_from_step})
            if not isinstance(event, StepMetrics):
                continue
            steps += 1
            entries.append({"event": "step", "epoch": event.epoch - 1, "samples": schedule.samples(event)})
            entries.append({"event": "save", "checkpoint": event.step})
            if after is not None and steps >= after and (how is not How.KILL_IN_SAVE or event.step % SAVE_STEPS == 0):
                interrupt(process, how)
                after = None
    return process.returncode


def interrupt(process: subprocess.Popen[str], how: How) -> None:
    if how is How.STOP:
        process.terminate()
        return
    for pid in [*descendants(process.pid), process.pid]:
        os.kill(pid, signal.SIGKILL)


def describe(setting: Setting, contender: str, how: How, run: Run, alone: Run) -> dict[str, Any]:
    """One line of the comparison."""
    past = run.history
    row = {
        "contender": contender,
        "interruption": how,
        "interruptions": min(past.attempts - 1, len(setting.interruptions(how))),
        "finished": past.digest is not None,
        "error": run.error,
    }
    if past.digest is None:
        return row
    counted = tally(past.steps, setting.samples, setting.epochs)
    return row | {
        "samplesLost": sum(counted.lost),
        "samplesRepeated": sum(counted.repeated),
        "lostByEpoch": counted.lost,
        "repeatedByEpoch": counted.repeated,
        "steps": len(past.steps),
        "stepsLost": len(alone.history.steps) - len(past.steps),
        "stepsTakenAgain": past.steps_taken - len(past.steps),
        "sameParameters": past.digest == alone.history.digest,
    }


def is_as_promised(row: dict[str, Any]) -> bool:
    return bool(row["finished"] and row["sameParameters"] and row["samplesLost"] == row["samplesRepeated"] == 0)


def to_table(found: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [
        ("", "interrupted", "lost", "repeated", "steps lost", "steps again", "same parameters")
    ]
    rows += [cells(row) for row in found["runs"]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    wanted = f"{found['samples']:,} samples x {found['epochs']} epochs, {EFFECTIVE_BATCH} a step"
    about = ", ".join(f"{name} {value}" for name, value in {**found["machine"], **found["versions"]}.items())
    errors = [f"{row['contender']}, {row['interruption']}: {row['error']}" for row in found["runs"] if row["error"]]
    return "\n".join([f"{wanted}; interrupted after {found['interruptedAfterSteps']} steps", *lines, *errors, about])


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    how = row["interruption"] if row["interruption"] == How.NEVER else f"{row['interruption']} x {row['interruptions']}"
    if not row["finished"]:
        return row["contender"], how, "does not start again", "", "", "", ""
    counts = (row["samplesLost"], row["samplesRepeated"], row["stepsLost"], row["stepsTakenAgain"])
    return row["contender"], how, *(f"{count:,}" for count in counts), "yes" if row["sameParameters"] else "no"


if __name__ == "__main__":
    sys.exit(main())
