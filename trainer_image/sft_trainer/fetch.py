"""The base model on this machine: a folder with config, tokenizer and weights, wherever it came from.

file://folder                used where it is
s3://, gs://, az://          copied below `cache`, a new copy whenever the listing changes
hf://owner/name              in the Hub's own cache (HF_HOME), from HF_ENDPOINT
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from sft_api.run import ExitCode, RunError
from sft_api.spec import Model
from sft_trainer.store import Store

URI_PATH = "spec.model.uri"
SAFETENSORS = "*.safetensors"
PICKLES = "pytorch_model*.bin"
"""Weights of old repositories; taken where there are no safetensors. transformers reads tensors from them, no code."""
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")


def fetch_model(model: Model, cache: Path, *, weights: bool = True) -> Path:
    """The folder of `model` on this machine. Without `weights` only config and tokenizer are sure to be there.

    Raises RunError: MODEL where there is no model, STORE_REFUSED and STORE_UNAVAILABLE as the store has it.
    """
    scheme = model.uri.partition("://")[0]
    if scheme == "hf":
        folder = _from_hub(model, weights)
    elif scheme == "file":
        folder = _from_disk(model)
    else:
        folder = _from_store(model, cache, weights)
    if not (folder / "config.json").is_file():
        raise _no_model(f"{model.uri} has no config.json, so it is no model folder of transformers")
    return folder


def _from_disk(model: Model) -> Path:
    folder = Store.open(model.uri, path=URI_PATH).local_path("")
    assert folder is not None
    if not folder.is_dir():
        raise _no_model(f"{model.uri} is not a folder: there is nothing at {folder}")
    return folder


def _from_store(model: Model, cache: Path, weights: bool) -> Path:
    store = Store.open(model.uri, path=URI_PATH)
    found = sorted(store.list(), key=lambda info: info.key)
    if not found:
        raise _no_model(f"{model.uri} holds no objects")
    listing = "\n".join([store.uri, *(f"{info.key} {info.size} {info.modified.isoformat()}" for info in found)])
    folder = cache / hashlib.sha256(listing.encode()).hexdigest()[:32]
    has_safetensors = any(_matches(info.key, [SAFETENSORS]) for info in found)
    wanted = _patterns(model, (SAFETENSORS if has_safetensors else PICKLES) if weights else None)
    for info in found:
        if _matches(info.key, wanted) and not (folder / info.key).is_file():
            store.download(info.key, folder / info.key)
    return folder


def _patterns(model: Model, weights: str | None) -> list[str]:
    return [*_SMALL, *(["*.py"] if model.trust_remote_code else []), *([weights] if weights else [])]


def _matches(key: str, patterns: list[str]) -> bool:
    """Nothing in folders: `original/` and the like hold the same weights in other forms."""
    return "/" not in key and any(fnmatch(key, pattern) for pattern in patterns)


def _from_hub(model: Model, weights: bool) -> Path:
    name = model.uri.removeprefix("hf://")
    folder = _snapshot(name, model, SAFETENSORS if weights else None)
    if weights and not any(folder.glob(SAFETENSORS)):
        folder = _snapshot(name, model, PICKLES)
    return folder


def _snapshot(name: str, model: Model, weights: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    with _hub_errors(name, model.revision):
        folder = snapshot_download(
            name,
            revision=model.revision,
            endpoint=os.environ.get("HF_ENDPOINT") or None,
            allow_patterns=_patterns(model, weights),
            ignore_patterns="*/*",
        )
    return Path(folder)


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub's client raises into RunError."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise RunError(
            ExitCode.STORE_REFUSED,
            f"{name} on the Hub is gated: ask for access on its page, then set HF_TOKEN.",
            URI_PATH,
        ) from error
    except RevisionNotFoundError as error:
        message = f"{name} on the Hub has no branch, tag or commit {revision!r}."
        raise RunError(ExitCode.MODEL, message, "spec.model.revision") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise _no_model(f"the Hub has no model {name}, or it is private and HF_TOKEN does not open it") from error
    except (HTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        code = ExitCode.STORE_REFUSED if status in (401, 403) else ExitCode.STORE_UNAVAILABLE
        raise RunError(code, f"{name} could not be fetched from the Hub: {error}", URI_PATH) from error


def _no_model(what: str) -> RunError:
    return RunError(
        ExitCode.MODEL,
        f"{what}. Give a folder with config.json, tokenizer.json and model.safetensors, or hf://owner/name.",
        URI_PATH,
    )
