"""TRL's SFTTrainer with packing, on the data that our preparation made: the peer of `benchmarks.throughput`.

    python -m benchmarks.peers.sft_trainer_of_trl RUN_JSON

Its last line is JSON: the time at the end of every optimizer step and the tokens since the start, padding not counted.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from sft_api.run import RunConfig
from sft_trainer.fetch import fetch_model
from sft_trainer.model import load_model
from sft_trainer.preparation import cache_folder, data_store, prepared_job
from sft_trainer.prepare import Dataset
from sft_trainer.tokenizer import load_tokenizer


class Counting(SFTTrainer):  # type: ignore[misc]
    """Counts the tokens of every micro-batch. Packed ones hold no padding."""

    tokens = 0

    def compute_loss(self, model: Any, inputs: dict[str, Any], *others: Any, **options: Any) -> Any:
        assert "attention_mask" not in inputs, "packed batches come without padding"
        self.tokens += inputs["input_ids"].numel()
        return super().compute_loss(model, inputs, *others, **options)


class Clock(TrainerCallback):  # type: ignore[misc]
    """Notes the time and the count of tokens at the end of every optimizer step."""

    def __init__(self) -> None:
        self.trainer: Counting | None = None
        self.steps: list[tuple[float, int]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        assert self.trainer is not None
        self.steps.append((time.time(), self.trainer.tokens))


def main() -> None:
    config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
    folder = fetch_model(config.model, cache_folder() / "models")
    tokenizer = load_tokenizer(folder, config.model)
    model = load_model(folder, config.model, tokenizer, config.trainer.precision, config.seed)
    model.set_attn_implementation("sdpa")
    data = Dataset.open(data_store(config), prepared_job(config).phases[0], cache_folder() / "data")
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        clock.trainer = Counting(
            model=model,
            args=settings(config, data, output),
            train_dataset=columns(data),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        clock.trainer.train()
    print(
        json.dumps(
            {
                "steps": clock.steps,
                "samples": len(data),
                "tokens": int(data.lengths.sum()),
                "lossTokens": int(data.num_loss_tokens.sum()),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
            }
        )
    )


def settings(config: RunConfig, data: Dataset, output: str) -> SFTConfig:
    """Packs of as many tokens as our micro-batches, and so many a step that a step is about as large as ours."""
    batch, optimizer = config.phases[0].batch, config.phases[0].optimizer
    tokens_per_step = data.lengths.mean() * batch.effective_batch_size
    return SFTConfig(
        output_dir=output,
        packing=True,
        packing_strategy="bfd",
        max_length=batch.max_tokens_per_gpu,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=max(1, round(tokens_per_step / batch.max_tokens_per_gpu)),
        gradient_checkpointing=config.trainer.activation_checkpointing,
        num_train_epochs=1,
        learning_rate=optimizer.learning_rate,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        lr_scheduler_type="constant",
        bf16=False,
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def columns(data: Dataset) -> datasets.Dataset:
    """The prepared samples as TRL takes them when they are tokenised already."""
    samples = [data.tokens(index) for index in range(len(data))]
    return datasets.Dataset.from_dict(
        {
            "input_ids": [ids.tolist() for ids, _ in samples],
            "assistant_masks": [mask.astype(int).tolist() for _, mask in samples],
        }
    )


if __name__ == "__main__":
    main()
