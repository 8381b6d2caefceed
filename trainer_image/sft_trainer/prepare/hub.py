"""Data on the Hugging Face Hub: a repository, at one commit, as a folder of files. The endpoint is HF_ENDPOINT's.

    hf://datasets/owner/name/data/*.jsonl       a data set's repository, as the Hub itself writes it
    hf://owner/name/data/*.jsonl                the same, in a data source; a model's repository for a chat template
    hf://owner/name@revision/…                  at a branch, tag or commit (unset: main)

Files are fetched whole into the Hub's own cache (HF_HOME) when they are first read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from sft_api.run import ExitCode, RunError

_HINT = "hf://datasets/owner/name/path or hf://owner/name/path, with @revision after the name where wanted"


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub."""

    kind: str
    """`dataset` or `model`."""
    name: str
    revision: str | None


def split_hub_uri(uri: str, default_kind: str, path: str) -> tuple[Repository, str]:
    """The repository that `uri` names, and the path or pattern within it."""
    parts = uri.removeprefix("hf://").split("/")
    kind = default_kind
    if parts[0] in ("datasets", "models"):
        kind = parts.pop(0).removesuffix("s")
    if len(parts) < 3 or not all(parts):
        raise RunError(ExitCode.CONFIGURATION, f"{uri!r} names no file on the Hub: write {_HINT}.", path)
    name, _, revision = parts[1].partition("@")
    return Repository(kind, f"{parts[0]}/{name}", revision or None), "/".join(parts[2:])


@dataclass(frozen=True)
class HubFolder:
    """A repository pinned to a commit, so that what is listed is what is read."""

    repository: Repository
    commit: str
    path: str = field(compare=False)
    """The field of the manifest, for messages."""

    @classmethod
    def at(cls, repository: Repository, path: str) -> HubFolder:
        from huggingface_hub import HfApi

        with _errors(repository, path):
            info = HfApi(endpoint=_endpoint()).repo_info(
                repository.name, repo_type=repository.kind, revision=repository.revision
            )
        assert info.sha is not None
        return cls(repository, info.sha, path)

    @property
    def uri(self) -> str:
        datasets = "datasets/" if self.repository.kind == "dataset" else ""
        return f"hf://{datasets}{self.repository.name}"

    def sizes(self) -> dict[str, int]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        with _errors(self.repository, self.path):
            entries = HfApi(endpoint=_endpoint()).list_repo_tree(
                self.repository.name, repo_type=self.repository.kind, revision=self.commit, recursive=True
            )
            return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}

    def size(self, key: str) -> int | None:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        with _errors(self.repository, self.path):
            found = HfApi(endpoint=_endpoint()).get_paths_info(
                self.repository.name, [key], repo_type=self.repository.kind, revision=self.commit
            )
        return next((entry.size for entry in found if isinstance(entry, RepoFile)), None)

    def open(self, key: str) -> BinaryIO:
        from huggingface_hub import hf_hub_download

        with _errors(self.repository, self.path):
            local = hf_hub_download(
                self.repository.name,
                key,
                repo_type=self.repository.kind,
                revision=self.commit,
                endpoint=_endpoint(),
            )
        return Path(local).open("rb")


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


@contextmanager
def _errors(repository: Repository, path: str) -> Iterator[None]:
    """Turn what the Hub's client raises into RunError, or FileNotFoundError for a missing file."""
    from huggingface_hub import errors

    # Whichever HTTP library the client is built on: the base of its errors.
    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    name = f"the {repository.kind} {repository.name} on the Hub"
    try:
        yield
    except errors.GatedRepoError as error:
        message = f"{name} is gated: ask for access on its page, then set HF_TOKEN."
        raise RunError(ExitCode.STORE_REFUSED, message, path) from error
    except errors.RevisionNotFoundError as error:
        raise RunError(ExitCode.DATA, f"{name} has no revision {repository.revision!r}.", path) from error
    except errors.RepositoryNotFoundError as error:
        message = f"{name} does not exist, or is private and HF_TOKEN does not open it."
        raise RunError(ExitCode.DATA, message, path) from error
    except errors.LocalEntryNotFoundError as error:
        raise RunError(ExitCode.STORE_UNAVAILABLE, f"{name} could not be reached: {error}", path) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(str(error)) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        refused = status in (401, 403)
        code = ExitCode.STORE_REFUSED if refused else ExitCode.STORE_UNAVAILABLE
        raise RunError(code, f"{name} answered {status or 'nothing'}: {error}", path) from error
    except (http_error, OSError) as error:
        raise RunError(ExitCode.STORE_UNAVAILABLE, f"{name} could not be read: {error}", path) from error
