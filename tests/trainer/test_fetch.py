"""A model is fetched from wherever its URI says, once, and a URI that leads nowhere is said so."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.make_model import make_model
from sft_api.run import ExitCode, RunError
from sft_api.spec import Model
from sft_trainer.fetch import fetch_model
from sft_trainer.store import Store
from tests.trainer.hub import Hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as repositories have it: with other forms of the same weights beside it."""
    folder = make_model(tmp_path_factory.mktemp("base"), ["a few words"])
    (folder / "pytorch_model.bin").write_bytes(b"the same as a pickle")
    (folder / "original").mkdir()
    (folder / "original" / "other.safetensors").write_bytes(b"the same in another form")
    (folder / "README.md").write_text("# A model")
    (folder / "modeling.py").write_text("raise AssertionError")
    return folder


WANTED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def names(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


def test_a_folder_is_used_where_it_is(folder: Path, tmp_path: Path) -> None:
    assert fetch_model(Model(uri=f"file://{folder}"), tmp_path) == folder
    assert names(tmp_path) == set()


def test_a_folder_may_be_relative_to_the_working_directory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    assert fetch_model(Model(uri=f"file://{folder.name}"), tmp_path).samefile(folder)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda f: None, "is not a folder: there is nothing at", id="nothing"),
        pytest.param(lambda f: f.mkdir(), "has no config.json", id="no-config"),
        pytest.param(lambda f: f.write_text(""), "is not a folder", id="a-file"),
    ],
)
def test_a_folder_without_a_model_is_refused(tmp_path: Path, make: object, words: str) -> None:
    make(tmp_path / "model")  # type: ignore[operator]
    with pytest.raises(RunError, match=words) as e:
        fetch_model(Model(uri=f"file://{tmp_path}/model"), tmp_path / "cache")
    assert (e.value.code, e.value.path) == (ExitCode.MODEL, "spec.model.uri")


def upload(folder: Path, uri: str) -> Store:
    store = Store.open(uri)
    for name in names(folder):
        store.put(name, folder / name)
    return store


def test_a_model_in_a_bucket_is_copied_once_and_only_what_is_needed(
    folder: Path, tmp_path: Path, s3_bucket: str
) -> None:
    store = upload(folder, f"{s3_bucket}/models/tiny")
    model = Model(uri=store.uri)
    small = fetch_model(model, tmp_path, weights=False)
    assert names(small) == WANTED - {"model.safetensors"}
    fetched = fetch_model(model, tmp_path)
    assert fetched == small
    assert names(fetched) == WANTED
    assert (fetched / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

    times = {name: (fetched / name).stat().st_mtime_ns for name in WANTED}
    assert fetch_model(model, tmp_path) == fetched
    assert {name: (fetched / name).stat().st_mtime_ns for name in WANTED} == times
    assert "modeling.py" in names(fetch_model(Model(uri=store.uri, trust_remote_code=True), tmp_path))


def test_a_model_that_changed_in_its_bucket_is_copied_anew(folder: Path, tmp_path: Path, s3_bucket: str) -> None:
    store = upload(folder, f"{s3_bucket}/models/tiny")
    before = fetch_model(Model(uri=store.uri), tmp_path)
    store.put("config.json", b"{} ")
    after = fetch_model(Model(uri=store.uri), tmp_path)
    assert after != before
    assert (after / "config.json").read_bytes() == b"{} "


def test_an_empty_prefix_and_a_missing_bucket_are_told_apart(tmp_path: Path, s3_bucket: str) -> None:
    with pytest.raises(RunError, match="holds no objects") as e:
        fetch_model(Model(uri=f"{s3_bucket}/nothing"), tmp_path)
    assert e.value.code == ExitCode.MODEL
    with pytest.raises(RunError, match="bucket does not exist") as e:
        fetch_model(Model(uri="s3://no-such-bucket/model"), tmp_path)
    assert (e.value.code, e.value.path) == (ExitCode.STORE_REFUSED, "spec.model.uri")


# ------------------------------------------------------------------------------------------------ the Hub


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with one good model, one of old (pickled weights only), one without config, and a gated one."""
    old = Path(shutil.copytree(folder, tmp_path / "old"))
    (old / "model.safetensors").unlink()
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "model.gguf").write_bytes(b"GGUF")
    models = {"lab/tiny": folder, "lab/old": old, "lab/gguf": gguf, "lab/gated": folder}
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    with Hub(models, gated=frozenset({"lab/gated"})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def test_a_model_of_the_hub_is_fetched_once_and_only_what_is_needed(hub: Hub, tmp_path: Path) -> None:
    model = Model(uri="hf://lab/tiny")
    small = fetch_model(model, tmp_path, weights=False)
    assert names(small) == WANTED - {"model.safetensors"}
    fetched = fetch_model(model, tmp_path)
    assert fetched == small
    assert names(fetched) == WANTED
    fetch_model(model, tmp_path)
    assert sorted(hub.downloaded) == sorted(WANTED)


def test_a_revision_of_the_hub_may_be_a_commit(hub: Hub, tmp_path: Path) -> None:
    fetched = fetch_model(Model(uri="hf://lab/tiny", revision=hub.commit("lab/tiny")), tmp_path)
    assert names(fetched) == WANTED


def test_old_weights_are_taken_where_there_are_no_others(hub: Hub, tmp_path: Path) -> None:
    fetched = fetch_model(Model(uri="hf://lab/old"), tmp_path)
    assert names(fetched) == WANTED - {"model.safetensors"} | {"pytorch_model.bin"}


@pytest.mark.parametrize(
    ("uri", "revision", "code", "path", "words"),
    [
        ("hf://lab/none", None, ExitCode.MODEL, "spec.model.uri", "the Hub has no model lab/none, or it is private"),
        ("hf://lab/tiny", "v9", ExitCode.MODEL, "spec.model.revision", "no branch, tag or commit 'v9'"),
        ("hf://lab/gguf", None, ExitCode.MODEL, "spec.model.uri", "has no config.json"),
        ("hf://lab/gated", None, ExitCode.STORE_REFUSED, "spec.model.uri", "is gated: ask for access on its page"),
    ],
    ids=["no-model", "no-revision", "no-config", "gated"],
)
def test_what_the_hub_does_not_give_is_said(
    hub: Hub, tmp_path: Path, uri: str, revision: str | None, code: ExitCode, path: str, words: str
) -> None:
    with pytest.raises(RunError) as e:
        fetch_model(Model(uri=uri, revision=revision), tmp_path)
    assert (e.value.code, e.value.path) == (code, path)
    assert words in e.value.message


def test_a_hub_that_cannot_be_reached_is_worth_another_attempt(hub: Hub, tmp_path: Path) -> None:
    hub._server.server_close()
    with pytest.raises(RunError, match="could not be fetched from the Hub") as e:
        fetch_model(Model(uri="hf://lab/tiny"), tmp_path)
    assert e.value.code == ExitCode.STORE_UNAVAILABLE


def test_what_was_fetched_before_serves_while_the_hub_is_away(hub: Hub, tmp_path: Path) -> None:
    fetched = fetch_model(Model(uri="hf://lab/tiny"), tmp_path)
    hub._server.server_close()
    assert fetch_model(Model(uri="hf://lab/tiny"), tmp_path) == fetched
