"""Useful tokens a second of our trainer and of TRL's SFTTrainer with packing, on the same tokens, model and threads.

    python -m benchmarks.throughput [--data FILE.jsonl …] [--rounds 3] [--cpus 0 1] [-o json]

A token is useful if it stands in a sample that bears loss; padding never counts. Ours is `python -m sft_trainer train`
as `sft run` starts it, measured by its own metrics file; the peer is `benchmarks.peers.sft_trainer_of_trl`, measured
after each optimizer step. Both train a Llama of about 5 million parameters in fp32 on the token ids and loss masks of
one preparation, with about as many tokens an optimizer step. Runs alternate, each in a process of its own, pinned to
the same CPUs; the first optimizer steps of each, and whatever comes before and after training, are not counted.
Activation checkpointing is off on both sides unless asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.reporting import Comparison, Figure, Report, arguments
from sft_api import names
from sft_api.manifest import parse_job
from sft_api.recipes import resolve

TARGET_RATIO = 3.0
PEER = "TRL"
EFFECTIVE_BATCH = 64
CAPACITY = 2_048
"""Tokens in a micro-batch: ours packs up to it, TRL packs to it."""
WARM_STEPS = 3
"""Optimizer steps at the start of a run that are not counted."""


@dataclass(frozen=True)
class Setting:
    """What both sides train, and how."""

    work: Path
    data: Path
    model: Path
    checkpointing: bool

    def run_json(self, run: str) -> Path:
        """The resolved job of one run; all runs share the prepared data."""
        job = parse_job(
            {
                "apiVersion": "sftjob.dev/v1alpha1",
                "kind": "SFTJob",
                "metadata": {"name": "throughput"},
                "spec": {
                    "model": {"uri": f"file://{self.model}", "chatTemplate": {"name": "ChatML"}},
                    "recipe": "none",
                    "phases": [{"name": "all", "data": [{"uri": f"file://{self.data}"}]}],
                    "epochs": 1,
                    "batch": {
                        "effectiveBatchSize": EFFECTIVE_BATCH,
                        "maxTokensPerGPU": CAPACITY,
                        "maxSequenceLength": CAPACITY,
                    },
                    "optimizer": {"learningRate": 0.001},
                    "trainer": {
                        "gpusPerNode": 0,
                        "precision": "FP32",
                        "activationCheckpointing": self.checkpointing,
                    },
                    "preparedData": {"uri": f"file://{self.work}/data"},
                    "checkpoints": {"uri": f"file://{self.work}/{run}", "every": {"steps": 10**9}, "export": "Never"},
                },
            }
        )
        path = self.work / f"{run}.json"
        path.write_text(resolve(job).model_dump_json(by_alias=True))
        return path


def main() -> None:
    options = parse_arguments()
    os.sched_setaffinity(0, options.cpus)
    # Threads that wait sleep, on both sides: on a busy machine threads that spin measure the scheduler.
    os.environ |= {"OMP_NUM_THREADS": str(len(options.cpus)), "OMP_WAIT_POLICY": "PASSIVE"}
    os.environ |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as work:
        setting = set_up(Path(work), options)
        report(setting, options).print(options.output)


def parse_arguments() -> argparse.Namespace:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--data", type=Path, nargs="+", help="conversations in JSON lines; unset: made on the spot")
    parser.add_argument("--samples", type=int, default=1_500, help="conversations to train on, drawn from the data")
    parser.add_argument("--cpus", type=int, nargs="+", default=sorted(os.sched_getaffinity(0)), help="CPUs to pin to")
    parser.add_argument("--vocab", type=int, default=8_192)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--activation-checkpointing", action="store_true", help="on both sides")
    return parser.parse_args()


def set_up(work: Path, options: argparse.Namespace) -> Setting:
    """Data, tokenizer and model on disk, and the data prepared."""
    conversations = list(read(options.data) if options.data else make(options.samples))
    random.Random(0).shuffle(conversations)
    conversations = conversations[: options.samples]
    data = work / "conversations.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in conversations))
    model = work / "model"
    call("examples.make_model", str(model), "--texts", str(data), "--vocab", str(options.vocab), "--hidden",
         str(options.hidden), "--layers", str(options.layers))  # fmt: skip
    return Setting(work, data, model, options.activation_checkpointing)


def read(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            yield from ({"messages": json.loads(line)["messages"]} for line in lines)


def make(samples: int) -> Iterator[dict[str, Any]]:
    """Conversations of some 170 tokens, long-tailed, a third of it the assistant's, words as frequent as in speech."""
    source = random.Random(0)
    words = ["".join(source.choices("aeioubdfgklmnprstvz", k=source.randint(2, 9))) for _ in range(4_000)]
    frequencies = [1 / rank for rank in range(1, len(words) + 1)]
    for _ in range(samples):
        length = min(1_200, int(source.lognormvariate(4.7, 0.8)) + 8)
        said = source.choices(words, frequencies, k=length)
        asked, answered = " ".join(said[length // 3 :]), " ".join(said[: length // 3])
        yield {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


def report(setting: Setting, options: argparse.Namespace) -> Report:
    ours: list[float] = []
    peers: list[float] = []
    about: dict[str, Any] = {}
    for number in range(options.rounds):
        ours.append(run_ours(setting, f"ours-{number}"))
        measured = run_peer(setting, f"ours-{number}")
        peers.append(measured.pop("tokensPerSecond"))
        about = measured
    ratios = Figure.of(mine / theirs for mine, theirs in zip(ours, peers, strict=True))
    return Report(
        "throughput",
        [
            Comparison("useful tokens/s", Figure.of(ours, "tokens/s"), Figure.of(peers, "tokens/s"), PEER, True),
            Comparison("times TRL's, round by round", ratios, higher_is_better=True, target=TARGET_RATIO),
        ],
        notes=[
            f"{about['samples']:,} conversations, {about['tokens']:,} tokens, {about['lossTokens']:,} with loss; "
            f"{about['parameters']:,} parameters, fp32, activation checkpointing "
            f"{'on' if setting.checkpointing else 'off'}; CPUs {options.cpus}",
        ],
        versions={name: version(name) for name in ("torch", "transformers", "deepspeed", "trl")},
    )


def run_ours(setting: Setting, run: str) -> float:
    """Tokens a second of one run of our trainer."""
    config = setting.run_json(run)
    call("sft_trainer", "prepare", str(config))
    call("sft_trainer", "train", str(config))
    lines = (setting.work / run / names.metrics(1)).read_text().splitlines()
    steps = [(step["time"], step["tokens"]) for step in map(json.loads, lines) if "loss" in step]
    return tokens_per_second(steps)


def run_peer(setting: Setting, run: str) -> dict[str, Any]:
    """What the peer measured, on the data that `run` has prepared."""
    output = call("benchmarks.peers.sft_trainer_of_trl", str(setting.work / f"{run}.json"))
    measured: dict[str, Any] = json.loads(output.splitlines()[-1])
    measured["tokensPerSecond"] = tokens_per_second(measured.pop("steps"))
    return measured


def tokens_per_second(steps: list[tuple[float, int]]) -> float:
    """Over all steps but the first; `steps`: the time at each step's end, and the tokens since the run began."""
    assert all(before[0] < after[0] for before, after in pairwise(steps))
    if len(steps) < WARM_STEPS + 2:
        raise SystemExit(f"{len(steps)} optimizer steps are too few to measure: give more --samples")
    (start, before), (end, after) = steps[WARM_STEPS - 1], steps[-1]
    return (after - before) / (end - start)


def call(module: str, *parameters: str) -> str:
    """Run a module in a process of its own; its standard output. Its complaints are shown where it fails."""
    done = subprocess.run([sys.executable, "-m", module, *parameters], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{module} ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
