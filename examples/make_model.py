"""Make a small base model on the spot: a tokenizer trained on given texts, random weights from a config.

    python -m examples.make_model runs/tiny --texts data.jsonl --hidden 128 --layers 4 --vocab 1024

The folder is an ordinary Hugging Face model folder of a base model: it has no chat template.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def make_model(
    folder: Path | str,
    texts: Iterable[str],
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    vocab: int = 512,
    architecture: str = "llama",
    max_length: int = 2048,
    tie_embeddings: bool = True,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Writes config, weights (fp32, seeded) and tokenizer into `folder` and returns it.

    `vocab` is an upper bound: few texts make fewer merges. `architecture` is a `model_type` of transformers,
    `config` goes to its config class as it is.
    """
    folder = Path(folder)
    tokenizer = train_tokenizer(texts, vocab, max_length)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": hidden * 3,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "max_position_embeddings": max_length,
        "tie_word_embeddings": tie_embeddings,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model_config = AutoConfig.for_model(architecture, **{**settings, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train_tokenizer(texts: Iterable[str], vocab: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with bos, eos and pad: any text survives encoding and decoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def read_texts(paths: Iterable[Path]) -> Iterator[str]:
    """The texts of JSONL conversations (`messages`) and documents (`text`), or the lines of any other file."""
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if path.suffix != ".jsonl":
                    yield line
                    continue
                sample = json.loads(line)
                yield from (m["content"] for m in sample.get("messages", []) if m.get("content"))
                if "text" in sample:
                    yield sample["text"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="files that the tokenizer is trained on")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--architecture", default="llama", help="a model_type of transformers")
    parser.add_argument("--untied", action="store_true", help="an output matrix of its own")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_model(
        args.folder,
        read_texts(args.texts),
        hidden=args.hidden,
        layers=args.layers,
        heads=args.heads,
        vocab=args.vocab,
        max_length=args.max_length,
        architecture=args.architecture,
        tie_embeddings=not args.untied,
        seed=args.seed,
    )
    print(args.folder)


if __name__ == "__main__":
    main()
