"""A trained model as a Hugging Face folder that anything can load, and its way into the store.

export/<phase>/model-00001-of-00002.safetensors, …, config.json, tokenizer.json, chat_template.jinja, …
export/<phase>/MANIFEST.json           every file with its size and SHA-256
export/<phase>/COMPLETE                last: what lacks it is not whole
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sft_api import names
from sft_api.run import ExitCode, RunError
from sft_trainer.store import ObjectMissing, Store

SHARD_SIZE = "5GB"


def export_model(
    state_dict: Mapping[str, Tensor],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    shard_size: str = SHARD_SIZE,
) -> None:
    """Writes weights (bf16 safetensors in shards of at most 5 GB), configs, tokenizer and chat template to `folder`.

    `state_dict` holds the model's parameters in bf16 by the names of `model`, tied ones once; `model` gives
    everything else, its own weights are not read (under ZeRO-3 they are not there). RunError where this machine's disk
    does not take it.
    """
    model.generation_config = _valid_generation_config(model)
    config = copy.deepcopy(model.config)
    config.use_cache = True
    config.dtype = torch.bfloat16
    try:
        model.save_pretrained(folder, state_dict=_whole_state(state_dict, model), max_shard_size=shard_size)
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise RunError(
            ExitCode.STORE_REFUSED,
            f"the model to be exported cannot be written to {folder}: {error}. Free some space there, or set TMPDIR to "
            "a larger disk; the checkpoints are whole, and the same command goes on with the export",
        ) from error


def upload_export(folder: Path, store: Store, facts: Mapping[str, Any]) -> int:
    """Puts an exported folder into `store`, the child at `export/<phase>`: files, MANIFEST.json, COMPLETE last.

    What an earlier attempt left there is replaced; an equal export that is complete is left alone. `facts` (JSON)
    stand in the manifest beside the files. Returns the bytes of all files.
    """
    files = {path.name: _described(path) for path in sorted(folder.iterdir()) if path.is_file()}
    total: int = sum(file["bytes"] for file in files.values())
    manifest = {**facts, "files": files}
    if _is_complete(store, manifest):
        return total
    # Not whole from here until the new COMPLETE, whoever looks.
    store.delete([names.COMPLETE])
    store.delete([info.key for info in store.list() if info.key not in files])
    for name in files:
        store.put(name, folder / name)
    store.put(names.MANIFEST, json.dumps(manifest, indent=2).encode())
    store.make_durable([*files, names.MANIFEST])
    store.create(names.COMPLETE, b"")
    store.make_durable([names.COMPLETE])
    return total


def _whole_state(state_dict: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """With the buffers that a checkpoint of this model holds beside its parameters."""
    parameters = dict(model.named_parameters())
    assert set(state_dict) == set(parameters), sorted(set(state_dict) ^ set(parameters))[:5]
    everything = model.state_dict()
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {**{name: value for name, value in everything.items() if name not in tied}, **state_dict}


def _valid_generation_config(model: PreTrainedModel) -> GenerationConfig:
    """The model's own, made valid: some published ones set a temperature and forget do_sample."""
    config = copy.deepcopy(model.generation_config)
    config._from_model_config = False  # else whoever loads it makes it anew from the config, with one end of turn
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
    return config


def _is_complete(store: Store, manifest: Mapping[str, Any]) -> bool:
    if store.head(names.COMPLETE) is None:
        return False
    try:
        return bool(json.loads(store.get(names.MANIFEST)) == manifest)
    except (ObjectMissing, ValueError):
        return False


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
