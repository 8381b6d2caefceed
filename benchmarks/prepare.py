"""Preparing synthetic conversations: samples a second, and the memory of all processes together.

    python -m benchmarks.prepare --samples 1000000 -o json

The tokenizer is trained on the spot; reading, rendering, masking, tokenising and writing are the real ones. The peer is
one process that calls `apply_chat_template` with its assistant mask on the first --peer-samples of the same
conversations and verifies and writes nothing. On a busy machine the rate by processor time is the one to read.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.reporting import Comparison, Figure, Report, arguments
from sft_api.events import PreparedMetrics, PrepareProgress
from sft_api.run import Lengths, ResolvedBatch, ResolvedOptimizer, ResolvedPhase, RunConfig
from sft_api.spec import (
    ChatTemplate,
    Checkpoints,
    DataSource,
    LearningRateSchedule,
    Model,
    OptimizerState,
    Overlong,
    Packing,
    Trainer,
    Warmup,
)
from sft_trainer.prepare import prepare
from sft_trainer.store import Store
from sft_trainer.tokenizer import load_tokenizer

TARGET_BYTES = 2 << 30
WORDS = "the of and to in is it that for on with as are this be at by from or which one had not but what".split()  # noqa: SIM905


def conversation(index: int) -> dict[str, Any]:
    """A conversation of about 160 tokens, one in eight of three turns; like no other."""
    turns = 3 if index % 8 == 0 else 1
    messages: list[dict[str, str]] = []
    for turn in range(turns):
        start = index * 7 + turn
        question = " ".join(WORDS[(start * step + step) % len(WORDS)] for step in range(1, 30 + index % 40))
        answer = " ".join(WORDS[(start + step * step) % len(WORDS)] for step in range(1, 20 + index % 60))
        messages.append({"role": "user", "content": f"{question} {index}?"})
        messages.append({"role": "assistant", "content": f"{answer} {start}."})
    return {"messages": messages}


def write_data(path: Path, samples: int) -> None:
    with path.open("w") as file:
        for index in range(samples):
            file.write(json.dumps(conversation(index)) + "\n")


def make_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = (message["content"] for index in range(500) for message in conversation(index)["messages"])
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    model = Model(uri=f"file://{folder}", chat_template=ChatTemplate(name="ChatML"))
    return load_tokenizer(folder, model)


def make_job(data: Path) -> RunConfig:
    phase = ResolvedPhase(
        name="synthetic",
        data=[DataSource(uri=f"file://{data}")],
        data_paths=["spec.phases[0].data[0].uri"],
        lengths=Lengths.ALL,
        epochs=1,
        batch=ResolvedBatch(
            effective_batch_size=128,
            max_tokens_per_gpu=4096,
            max_sequence_length=4096,
            overlong=Overlong.TRUNCATE,
        ),
        optimizer=ResolvedOptimizer(
            learning_rate=2e-5,
            schedule=LearningRateSchedule.CONSTANT,
            warmup=Warmup(steps=0),
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0,
            max_grad_norm=1,
            state=OptimizerState.KEEP,
        ),
    )
    return RunConfig(
        name="benchmark",
        seed=1,
        model=Model(uri="file://model"),
        phases=[phase],
        packing=Packing.PACKED,
        validation=None,
        trainer=Trainer(),
        checkpoints=Checkpoints(uri="file://out"),
        prepared_data_uri="file://out",
    )


class Watched:
    """What this process and all below it took: the largest sum of their resident memory, and their processor time.

    Looked at five times a second. Pages that processes share count once for each: the sum is an upper bound.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._seconds: dict[int, float] = {}
        self._before = time.process_time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def processor_seconds(self) -> float:
        return sum(self._seconds.values()) - self._before

    def _watch(self) -> None:
        root = psutil.Process()
        while not self._stop.wait(0.2):
            self.peak_bytes = max(self.peak_bytes, sum(self._look([root, *root.children(recursive=True)])))

    def _look(self, processes: list[psutil.Process]) -> Iterator[int]:
        for process in processes:
            try:
                times = process.cpu_times()
                self._seconds[process.pid] = times.user + times.system
                yield process.memory_info().rss
            except psutil.NoSuchProcess:
                continue


def peer(tokenizer: Any, data: Path, samples: int) -> tuple[float, float]:
    """Seconds and processor seconds of one process, sample by sample, with transformers' own mask, kept in a list."""
    kept = []
    start, processor = time.perf_counter(), time.process_time()
    with data.open() as file:
        for _, line in zip(range(samples), file, strict=False):
            messages = json.loads(line)["messages"]
            kept.append(
                tokenizer.apply_chat_template(
                    messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
                )
            )
    return time.perf_counter() - start, time.process_time() - processor


def progress(event: PreparedMetrics | PrepareProgress) -> None:
    if isinstance(event, PrepareProgress):
        print(f"\r{event.samples:,} samples", end="", file=sys.stderr, flush=True)


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--samples", type=int, default=100_000, help="conversations (100,000)")
    parser.add_argument("--peer-samples", type=int, default=5_000, help="of which the peer does so many (5,000)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that tokenise (all cores)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data.jsonl"
        write_data(data, given.samples)
        tokenizer = make_tokenizer(folder / "model")
        ours, peers, peaks = [], [], []
        count = min(given.samples, given.peer_samples)
        for attempt in range(given.rounds):
            store = Store.open(f"file://{folder}/out-{attempt}")
            start = time.perf_counter()
            with Watched() as watched:
                prepared = prepare(make_job(data), store, tokenizer, progress, given.processes)
            ours.append((given.samples / (time.perf_counter() - start), given.samples / watched.processor_seconds))
            peaks.append(watched.peak_bytes / (1 << 20))
            seconds, processor_seconds = peer(tokenizer, data, count)
            peers.append((count / seconds, count / processor_seconds))
        size = data.stat().st_size
    (summary,) = prepared.summaries.values()
    print(file=sys.stderr)
    Report(
        benchmark="prepare",
        comparisons=[
            *(
                Comparison(
                    what=f"samples prepared a {what}",
                    ours=Figure.of([rates[place] for rates in ours], "samples/s"),
                    peer=Figure.of([rates[place] for rates in peers], "samples/s"),
                    peer_name="transformers, one process",
                    higher_is_better=True,
                )
                for place, what in enumerate(("second", "processor second"))
            ),
            Comparison(
                what="peak resident memory, all processes",
                ours=Figure.of(peaks, "MiB"),
                target=TARGET_BYTES / (1 << 20),
            ),
        ],
        notes=[
            f"{summary.samples:,} samples, {summary.tokens:,} tokens, {size / 1e6:,.0f} MB of JSON; "
            f"{given.processes} processes tokenise"
        ],
        versions={name: version(name) for name in ("tokenizers", "transformers", "pyarrow")},
    ).print(given.output)


if __name__ == "__main__":
    main()
