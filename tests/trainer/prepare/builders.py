"""The smallest valid things for preparation: a tokenizer trained on the spot, a job, files of conversations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sft_api.events import PreparedMetrics, PrepareProgress
from sft_api.run import Lengths, ResolvedBatch, ResolvedOptimizer, ResolvedPhase, RunConfig
from sft_api.spec import (
    ChatTemplate,
    Checkpoints,
    DataFormat,
    DataSource,
    LearningRateSchedule,
    Model,
    OptimizerState,
    Overlong,
    Packing,
    Trainer,
    Validation,
    Warmup,
)
from sft_trainer.prepare import PreparedJob, prepare
from sft_trainer.store import Store
from sft_trainer.tokenizer import load_tokenizer

TEXT = ["What is the answer to this question, please? The answer is forty two, and they are happy. " * 3]


def byte_level(vocabulary: int = 400, special: Iterable[str] = ("<s>", "</s>")) -> Tokenizer:
    """A byte-level BPE that every text survives."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """A BPE with byte fallback and blanks as a character, as Llama 2 has it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(state))


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    """The same, beginning every text with <s>, and with offsets trimmed as Llama 3's are."""
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]),
        ]
    )
    return tokenizer


def save_model_folder(
    folder: Path, tokenizer: Tokenizer | None = None, chat_template: str | None = None, **tokens: str
) -> Path:
    """A folder as a model's repository has it, but for weights."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizer or byte_level()
    if not tokens and tokenizer.token_to_id("<s>") is not None:
        tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    if chat_template is not None:
        fast.chat_template = chat_template
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def load(folder: Path, **chat_template: Any) -> Any:
    """The tokenizer with a chat template: name=…, or inline=…, end_of_turn=…"""
    template = ChatTemplate(**chat_template) if chat_template else None
    return load_tokenizer(folder, Model(uri=f"file://{folder}", chat_template=template))


def chat(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **fields}


def write_jsonl(path: Path, records: Iterable[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def phase(*uris: str, name: str = "all", format: DataFormat = DataFormat.MESSAGES, **batch: Any) -> ResolvedPhase:
    """A phase over `uris`; `batch` may hold max_sequence_length and overlong."""
    settings: dict[str, Any] = {"max_sequence_length": 512, "overlong": Overlong.TRUNCATE, **batch}
    return ResolvedPhase(
        name=name,
        data=[DataSource(uri=uri, format=format) for uri in uris],
        data_paths=[f"spec.phases[0].data[{index}].uri" for index in range(len(uris))],
        lengths=Lengths.ALL,
        epochs=1,
        batch=ResolvedBatch(effective_batch_size=2, max_tokens_per_gpu=512, **settings),
        optimizer=ResolvedOptimizer(
            learning_rate=1e-4,
            schedule=LearningRateSchedule.CONSTANT,
            warmup=Warmup(steps=0),
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0,
            max_grad_norm=1,
            state=OptimizerState.KEEP,
        ),
    )


def job(*phases: ResolvedPhase, validation: Validation | None = None) -> RunConfig:
    return RunConfig(
        name="test",
        seed=7,
        model=Model(uri="file://model"),
        phases=list(phases),
        packing=Packing.PACKED,
        validation=validation,
        trainer=Trainer(),
        checkpoints=Checkpoints(uri="file://out"),
        prepared_data_uri="file://out/data",
    )


class Heard:
    """What a preparation reported."""

    def __init__(self) -> None:
        self.prepared: list[PreparedMetrics] = []
        self.progress: list[PrepareProgress] = []

    def __call__(self, event: PreparedMetrics | PrepareProgress) -> None:
        if isinstance(event, PreparedMetrics):
            self.prepared.append(event)
        else:
            self.progress.append(event)


Prepare = Callable[..., PreparedJob]


def run(config: RunConfig, folder: Path, tokenizer: Any, heard: Heard | None = None, processes: int = 1) -> PreparedJob:
    """Prepare into `folder`."""
    return prepare(config, Store.open(f"file://{folder}"), tokenizer, heard or Heard(), processes)
