"""The model to train: loaded whole or refused, as large as its tokenizer, its special tokens agreed on everywhere."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from sft_api.run import ExitCode, RunError
from sft_api.spec import Model, Precision

URI_PATH = "spec.model.uri"
DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP32: torch.float32}


@dataclass(frozen=True)
class ModelNumbers:
    """What steps cost in computation and memory, from a model's config alone."""

    parameters: int
    """All of them, each tied one once."""
    matrix_parameters: int
    """Those that a token is multiplied with: no embeddings that are only looked up, of experts those routed to."""
    layers: int
    width: int
    """Attention heads times the size of a head."""
    hidden: int
    vocabulary: int
    quadratic_length: float
    """L0 of `cost(l) = l + l²/L0`, in tokens: where attention costs what the matrices do. Infinite without any."""


def load_config(folder: Path, model: Model) -> PreTrainedConfig:
    """The config in `folder`. Raises RunError(MODEL) where it is not that of a causal language model we can make."""
    with _load_errors(model):
        written = json.loads((folder / "config.json").read_text())
        kind, brings_code = written.get("model_type"), "auto_map" in written
        if kind not in CONFIG_MAPPING and not brings_code:
            raise _unusable(model, f"transformers {transformers.__version__} does not know its model_type {kind!r}")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code, local_files_only=True)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not brings_code:
            raise _unusable(model, f"models of its model_type {kind!r} do not generate text from left to right")
    return config


def load_model(
    folder: Path, model: Model, tokenizer: PreTrainedTokenizerBase, precision: Precision, seed: int
) -> PreTrainedModel:
    """The model in `folder` on the CPU, ready to train with `tokenizer`, equal on every rank.

    Parameters are in `precision`; buffers, such as the frequencies of rotary positions, stay as the model makes them.
    Embeddings of tokens that the tokenizer has gained are the mean of the others. Raises RunError(MODEL) where a
    weight is missing, broken or of another shape: nothing is made up.
    """
    config = load_config(folder, model)
    transformers_logging.disable_progress_bar()
    with _load_errors(model), torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        loaded, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=DTYPES[precision],
            trust_remote_code=model.trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    _refuse_incomplete(model, report)
    for parameter in loaded.parameters():
        parameter.data = parameter.data.to(DTYPES[precision])  # some models keep a few in fp32
    _fit_embeddings(loaded, tokenizer, folder, model)
    reconcile_special_tokens(loaded, tokenizer)
    loaded.config.use_cache = False
    return loaded.train()


def reconcile_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokenizer's pad, bos and eos in the model's config and generation config.

    Generation ends at the tokenizer's eos, which ends the assistant's turn, and at what ended it before.
    """
    before = _ids(model.generation_config.eos_token_id) or _ids(model.config.get_text_config().eos_token_id)
    ends = list(dict.fromkeys([*_ids(tokenizer.eos_token_id), *before]))
    text_config = model.config.get_text_config()
    for config in {id(c): c for c in (model.config, text_config)}.values():
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
    # The padding row gets no gradient: it must not be that of a token which only used to pad.
    model.get_input_embeddings().padding_idx = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends


def model_numbers(config: PreTrainedConfig) -> ModelNumbers:
    """Sizes of the model that `config` describes; no weights are read or made."""
    text = config.get_text_config()
    with torch.device("meta"), _quiet():
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), trust_remote_code=type(config).__module__.startswith("transformers_modules")
        )
    output = getattr(model.get_output_embeddings(), "weight", None)
    looked_up = {
        id(module.weight): module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and module.weight is not output
    }
    parameters = sum(p.numel() for p in model.parameters())
    matrices = parameters - sum(looked_up.values()) - _idle_experts(model, text)
    heads = getattr(text, "num_attention_heads", 0) or 0
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // max(heads, 1))
    layers = text.num_hidden_layers
    return ModelNumbers(
        parameters=parameters,
        matrix_parameters=matrices,
        layers=layers,
        width=width,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        quadratic_length=matrices / (layers * width) if width else math.inf,
    )


def model_numbers_of(folder: Path, model: Model) -> ModelNumbers:
    """`model_numbers` of the config in `folder`."""
    return model_numbers(load_config(folder, model))


# ----------------------------------------------------------------------------------------------- details


def _idle_experts(model: PreTrainedModel, config: Any) -> int:
    """Parameters of experts that a token does not pass through, on average."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(config, name, None))), 0)
    used = getattr(config, "num_experts_per_tok", None) or experts
    if not experts:
        return 0
    size: int = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return size - size * used // experts


def _fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, source: Model) -> None:
    """Room for every token; rows of tokens that the tokenizer in `folder` does not have become the mean of the rest."""
    with _load_errors(source):
        before = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=source.trust_remote_code, local_files_only=True
        )
    known = set(before.get_vocab().values())
    gained = sorted(set(tokenizer.get_vocab().values()) - known)
    rows = model.get_input_embeddings().weight.shape[0]
    if not gained:
        if len(tokenizer) > rows:
            raise _unusable(source, f"its tokenizer has {len(tokenizer)} tokens and its embeddings {rows} rows")
        return
    if gained[-1] >= rows:
        with _quiet():
            model.resize_token_embeddings(gained[-1] + 1, mean_resizing=False)
    old = torch.tensor(sorted(i for i in known if i < rows))
    output = model.get_output_embeddings()
    tensors = [model.get_input_embeddings().weight, getattr(output, "weight", None), getattr(output, "bias", None)]
    with torch.no_grad():
        for tensor in {id(t): t for t in tensors if t is not None}.values():
            tensor[gained] = _mean_of_rows(tensor, old).to(tensor.dtype)


def _mean_of_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """In fp64, a slice at a time: no second copy of the embeddings."""
    total = torch.zeros(tensor.shape[1:], dtype=torch.float64)
    for part in torch.split(rows, 8192):
        total += tensor[part].sum(0, dtype=torch.float64)
    return total / len(rows)


def _refuse_incomplete(model: Model, report: Any) -> None:
    missing, mismatched = sorted(report["missing_keys"]), sorted(str(key[0]) for key in report["mismatched_keys"])
    if missing:
        what = f"its weights lack {len(missing)} tensors ({', '.join(missing[:3])}{' …' if len(missing) > 3 else ''})"
        raise _unusable(model, f"{what}; they are incomplete or of another architecture than its config says")
    if mismatched:
        raise _unusable(model, f"tensors have other shapes than its config says: {', '.join(mismatched[:3])}")
    if unexpected := sorted(report["unexpected_keys"]):
        logging.getLogger(__name__).warning(
            "%s: %d tensors of the weights have no place in the model and are left out: %s",
            model.uri, len(unexpected), ", ".join(unexpected[:3]),
        )  # fmt: skip


@contextmanager
def _load_errors(model: Model) -> Iterator[None]:
    """Whatever transformers raises on a folder's contents is about the folder."""
    try:
        yield
    except (RunError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        words = " ".join(str(error).split())
        if "trust_remote_code" in words:
            raise RunError(
                ExitCode.MODEL,
                f"{model.uri} brings code of its own. Read it, and set trustRemoteCode: true if it may run.",
                "spec.model.trustRemoteCode",
            ) from error
        raise _unusable(model, f"{type(error).__name__}: {words[:300]}".rstrip(". ")) from error


def _unusable(model: Model, why: str) -> RunError:
    return RunError(ExitCode.MODEL, f"{model.uri} cannot be loaded as a causal language model: {why}.", URI_PATH)


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' own report of missing weights goes into an error of ours."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
