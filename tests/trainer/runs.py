"""Small runs for tests: a job with a tiny model, and the case that a gang's ranks carry out."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from sft_api import names
from sft_api.events import StepMetrics, ValidationMetrics
from sft_api.manifest import parse_job
from sft_api.recipes import resolve
from sft_api.report import TrainerReport
from sft_api.run import RunConfig
from sft_trainer.progress import read_report
from sft_trainer.store import Store
from tests.gang import Gangs

SPEC: dict[str, Any] = {
    "recipe": "none",
    "strategy": "Phased",
    "epochs": 2,
    "validation": {"fraction": 0.15, "every": {"steps": 3}},
    "batch": {"effectiveBatchSize": 8, "maxTokensPerGPU": 160, "maxSequenceLength": 96},
    "optimizer": {"learningRate": 0.003},
    "trainer": {"gpusPerNode": 0, "precision": "FP32", "activationCheckpointing": False, "zeroStage": 1},
    "checkpoints": {"every": {"steps": 2}, "keep": {"last": 100}, "export": "Never"},
}
"""Two phases, by `make_run`; 20 and 12 samples of which some are held out."""


def write_conversations(path: Path, count: int, seed: int) -> Path:
    """Questions of uneven length with short answers; one in four has two turns."""
    chance = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            messages = []
            for _ in range(1 + (chance.random() < 0.25)):
                first, second = chance.randint(0, 99), chance.randint(0, 99)
                question = f"Which is larger, {first} or {second}?" + " please" * chance.randint(0, 24)
                messages += [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": f"{max(first, second)} is" + " larger" * chance.randint(1, 8)},
                ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def make_base(folder: Path, **model: Any) -> Path:
    """A base model and two files of conversations, in one folder. `model`: more for `make_model`."""
    from examples.make_model import make_model, read_texts

    files = [write_conversations(folder / "one.jsonl", 26, 1), write_conversations(folder / "two.jsonl", 16, 2)]
    make_model(folder / "model", read_texts(files), hidden=32, layers=2, heads=2, vocab=320, **model)
    return folder


def make_poisoned_base(folder: Path) -> Path:
    """A base whose embedding of § is not a number, and data of which only that of the second phase says §."""
    import torch
    from safetensors.torch import load_file, save_file

    from examples.make_model import make_model, read_texts

    files = [write_conversations(folder / "one.jsonl", 32, 1), write_conversations(folder / "two.jsonl", 16, 2)]
    files[1].write_text(files[1].read_text(encoding="utf-8").replace("Which", "§"), encoding="utf-8")
    make_model(folder / "model", read_texts(files), hidden=32, layers=2, heads=2, vocab=320, tie_embeddings=False)
    tokenizer = json.loads((folder / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "model" / "model.safetensors")
    # The two bytes of § in UTF-8, as byte-level tokenizers spell them: merged, or the second alone.
    for token in ("Â§", "§"):
        if token in tokenizer["model"]["vocab"]:
            weights["model.embed_tokens.weight"][tokenizer["model"]["vocab"][token]] = torch.nan
    save_file(weights, folder / "model" / "model.safetensors", {"format": "pt"})
    return folder


def make_run(base: Path, out: str, changes: dict[str, Any] | None = None) -> RunConfig:
    """The run of `SPEC` with `changes` to it, a section at a time; its data is prepared."""
    from sft_trainer.preparation import prepare_job

    spec: dict[str, Any] = json.loads(json.dumps(SPEC))
    spec["model"] = {"uri": f"file://{base}/model", "chatTemplate": {"name": "ChatML"}}
    spec["phases"] = [{"name": name, "data": [{"uri": f"file://{base}/{name}.jsonl"}]} for name in ("one", "two")]
    spec["checkpoints"]["uri"] = out
    for key, value in (changes or {}).items():
        spec[key] = {**spec[key], **value} if isinstance(value, dict) and isinstance(spec.get(key), dict) else value
    document = {"apiVersion": "sftjob.dev/v1alpha1", "kind": "SFTJob", "metadata": {"name": "test"}, "spec": spec}
    config = resolve(parse_job(document))
    prepare_job(config, lambda event: None, processes=1, check_model=lambda folder: None)
    return config


MORE_THAN_THERE_IS = 1 << 60
"""Bytes; no address space holds as many."""


class Died(Exception):
    """Stands for the sudden end of a process: nothing of the run is told of it."""


@dataclass
class Script:
    """What happens to a rank: told to stop, or dead, in the step of that number of this attempt.

    `stop_at`: told to stop at what is called so, a step or anything else that takes long. `chunk_samples`: how many
    held-out samples are scored at a time. `loss_guard_in`: from which step on the first rank, and no other, is told of
    which lossGuard. `exhaust_in`: in which step it asks for more memory than there can be.
    """

    stop_in: int | None = None
    die_in: int | None = None
    stop_at: str | None = None
    chunk_samples: int | None = None
    loss_guard_in: tuple[int, float] | None = None
    exhaust_in: int | None = None
    steps: int = field(default=0, init=False)
    told: bool = field(default=False, init=False)

    @property
    def is_set(self) -> bool:
        if self.steps == self.die_in:
            raise Died
        return self.told or self.steps == self.stop_in

    def told_of(self, config: RunConfig, is_first: bool) -> RunConfig:
        """run.json as it is now on a rank's node."""
        if self.loss_guard_in is None or not is_first or self.steps < self.loss_guard_in[0]:
            return config
        return config.model_copy(update={"loss_guard": self.loss_guard_in[1]})

    def hear(self, stage: str) -> None:
        self.steps += stage.startswith("step ")
        self.told = self.told or (self.stop_at is not None and stage.startswith(self.stop_at))
        if self.steps == self.exhaust_in:
            import torch

            torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)


@dataclass(frozen=True)
class Ending:
    """How one attempt ended on one rank."""

    code: int
    message: str
    memory: dict[str, float] = field(default_factory=dict)


def attempt(run: str, number: int, work: str, script: Script) -> Ending:
    """One attempt at a run, on a gang's rank: what `python -m sft_trainer rank` does, in a process that lives on."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from sft_api.run import RunError
    from sft_trainer.heartbeat import Heartbeat
    from sft_trainer.job import Workplace, assemble, open_signals
    from sft_trainer.rank import carry_out
    from sft_trainer.ranks import Ranks
    from sft_trainer.stopping import Stopping
    from sft_trainer.train import Progress

    class Heard(Heartbeat):
        """Tells the script as well."""

        def beat(self, stage: str, patience: float = 0.0) -> None:
            super().beat(stage, patience)
            script.hear(stage)

    config = RunConfig.model_validate_json(run)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    folder = Path(work) / f"attempt-{number}"
    job, heartbeat = None, Heard(folder, ranks.rank)
    signals, stop = open_signals(config, number, folder, ranks), Stopping(script, ranks)
    workplace = Workplace(
        ranks, number, folder, signals, heartbeat, stop, lambda: script.told_of(config, ranks.is_first)
    )
    try:
        job = assemble(config, Path(config.model.uri.removeprefix("file://")), workplace)
        if script.chunk_samples is not None:
            job.validation = replace(job.validation, chunk_samples=script.chunk_samples)
        carry_out(job, Progress())
        return Ending(0, "done")
    except RunError as error:
        return Ending(error.code, str(error))
    except Died:
        assert job is not None
        job.saver.wait()
        return Ending(-9, "died")
    finally:
        signals.close()
        heartbeat.close()
        if job is not None:
            job.engine.destroy()
        dist.monitored_barrier(timeout=timedelta(seconds=60))


@dataclass(frozen=True)
class Told:
    """What a run left in its store."""

    steps: dict[int, StepMetrics]
    """By number; where attempts overlap, the latest counts."""
    validations: dict[int, ValidationMetrics]
    digests: dict[int, str]
    """The parameters' digest at each committed step."""


def read_run(out: str) -> Told:
    from sft_trainer.checkpoint import list_checkpoints

    store = Store.open(out)
    steps: dict[int, StepMetrics] = {}
    validations: dict[int, ValidationMetrics] = {}
    for info in sorted(store.list(names.METRICS), key=lambda info: names.parse_metrics(info.key) or 0):
        number = names.parse_metrics(info.key)
        assert number is not None
        for line in store.get(info.key).splitlines():
            step = StepMetrics.model_validate_json(line)
            steps[step.step] = step
        for line in store.get(names.events(number)).splitlines():
            if json.loads(line)["event"] == "validation":
                scored = ValidationMetrics.model_validate_json(line)
                validations[scored.step] = scored
    digests = {row.step: row.parameters_digest for row in list_checkpoints(store, verify=False) if row.complete}
    return Told(steps, validations, {step: digest for step, digest in digests.items() if digest})


class Runs:
    """Carries out attempts at one run after another, in a folder of its own."""

    def __init__(self, gang: Gangs, base: Path, folder: Path):
        self.gang, self.base, self.folder = gang, base, folder
        self.attempts: Counter[str] = Counter()

    def uri(self, name: str) -> str:
        return f"file://{self.folder}/{name}"

    def config(self, name: str, changes: dict[str, Any] | None = None) -> RunConfig:
        return make_run(self.base, self.uri(name), changes)

    def run(
        self, name: str, world: int = 1, changes: dict[str, Any] | None = None, script: Script | None = None
    ) -> Ending:
        """One more attempt at the run `name`."""
        config = self.config(name, changes).model_dump_json(by_alias=True)
        self.attempts[name] += 1
        work = f"{self.folder}/work/{name}"
        endings: list[Ending] = self.gang(world).run(attempt, config, self.attempts[name], work, script or Script())
        assert len({ending.code for ending in endings}) == 1, endings
        return endings[0]

    def report(self, name: str) -> TrainerReport:
        """What the first rank of the newest attempt last knew."""
        report = read_report(self.folder / "work" / name / f"attempt-{self.attempts[name]}")
        assert report is not None
        return report

    def told(self, name: str) -> Told:
        return read_run(self.uri(name))


def figures(told: Told) -> list[tuple[object, ...]]:
    """All of the steps and scores that depends on neither clock nor machine."""
    timed = {"seconds", "tokens_per_second", "data_wait_seconds", "checkpoint_stall_seconds", "memory_bytes", "time"}
    steps = [tuple(step.model_dump(exclude=timed).values()) for step in told.steps.values()]
    return [*steps, *((v.step, v.phase, v.loss, v.accuracy) for v in told.validations.values())]


def same_training(told: Told, other: Told, tolerance: float) -> None:
    assert [s.samples_digest for s in told.steps.values()] == [s.samples_digest for s in other.steps.values()]
    for step, expected in zip(told.steps.values(), other.steps.values(), strict=True):
        assert step.loss == pytest.approx(expected.loss, rel=tolerance)
        assert (step.samples, step.tokens, step.loss_tokens) == (
            expected.samples,
            expected.tokens,
            expected.loss_tokens,
        )
        assert step.learning_rate == expected.learning_rate
    for score, expected_score in zip(told.validations.values(), other.validations.values(), strict=True):
        assert score.loss == pytest.approx(expected_score.loss, rel=tolerance)
