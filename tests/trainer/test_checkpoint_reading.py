"""Reading back: any sharding from any sharding, damage found and named, other runs refused, plain formats only."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from sft_api.run import ExitCode, RunError
from sft_trainer import checkpoint as package
from sft_trainer.checkpoint import Checkpoint, Damaged, list_checkpoints, newest_complete, open_checkpoint
from sft_trainer.checkpoint.digest import ParametersDigest, digest_slice
from sft_trainer.checkpoint.rng import capture_rng, restore_rng
from sft_trainer.store import Store
from tests.trainer.checkpoints import (
    FINGERPRINTS,
    KEYS,
    SHAPES,
    ArrayPiece,
    Gang,
    make_meta,
    make_pieces,
    make_state,
    read_state,
    same,
)


def newest(store: Store) -> Checkpoint:
    found = newest_complete(store)
    assert found is not None
    return found


def folder_store(tmp_path: Path, name: str = "x") -> Store:
    return Store.open(f"file://{tmp_path}/{name}")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("by_parameter", [False, True], ids=["zero1", "zero3"])
def test_any_sharding_is_read_from_any_other(store_uri: str, tmp_path: Path, world: int, by_parameter: bool) -> None:
    state = make_state(7)
    Gang(Store.open(store_uri), tmp_path / "staging", world=world).save(state, 10, by_parameter)
    found = newest(Store.open(store_uri))
    for other_world in (1, 2, 3, 4):
        for other in (False, True):
            assert same(read_state(found, other_world, other), state)
    assert found.adam_step("bias") == 5
    assert found.shapes() == SHAPES


def test_any_slice_is_the_slice_of_the_whole(tmp_path: Path) -> None:
    state = make_state(7)
    Gang(folder_store(tmp_path), tmp_path / "staging", world=3).save(state, 10, by_parameter=True)
    found = newest(folder_store(tmp_path))
    for start in range(45):
        for stop in range(start, 45):
            read = found.read("embed.weight", "exp_avg", start, stop)
            assert read.tobytes() == state["embed.weight"]["exp_avg"][start:stop].tobytes()


def test_a_slice_larger_than_a_request_is_put_together(tmp_path: Path, store_uri: str) -> None:
    count = 9_000_000  # 36 MB: more than one request
    values = np.arange(count, dtype=np.float32)
    gang = Gang(Store.open(store_uri), tmp_path / "staging")
    gang.writers[0].save([ArrayPiece("w", (count,), 0, dict.fromkeys(KEYS, values))], {}, make_meta(10))
    gang.wait()
    assert np.array_equal(newest(Store.open(store_uri)).read("w", "exp_avg", 5, count - 3), values[5:-3])


def test_the_digest_is_that_of_the_parameters_whatever_the_sharding(tmp_path: Path) -> None:
    state = make_state(7)
    parts = [digest_slice(name, SHAPES[name], 0, state[name]["master"]) for name in SHAPES]
    expected = str(sum(parts, ParametersDigest()))
    for number, (world, by_parameter) in enumerate([(1, False), (2, False), (3, True), (4, False), (4, True)]):
        store = folder_store(tmp_path, str(number))
        Gang(store, tmp_path / "staging", world=world).save(state, 10, by_parameter)
        assert newest(store).parameters_digest == expected
    other = make_state(7)
    other["bias"]["master"][0] += 1
    store = folder_store(tmp_path, "other")
    Gang(store, tmp_path / "staging").save(other, 10)
    assert newest(store).parameters_digest != expected


def test_each_rank_gets_its_own_state_back(store_uri: str, tmp_path: Path) -> None:
    Gang(Store.open(store_uri), tmp_path / "staging", world=2).save(make_state(), 10)
    found = newest(Store.open(store_uri))
    assert [found.rank_state(rank) for rank in range(3)] == [{"rng": b"10 0"}, {"rng": b"10 1"}, None]


def test_a_parameter_that_is_not_there_is_of_another_model(tmp_path: Path) -> None:
    Gang(folder_store(tmp_path), tmp_path / "staging").save(make_state(), 10)
    found = newest(folder_store(tmp_path))
    with pytest.raises(RunError, match="of another model") as caught:
        found.read("other.weight", "master", 0, 3)
    assert caught.value.code == ExitCode.CONFIGURATION
    with pytest.raises(RunError, match=r"elements 7 to 8 of norm\.weight"):
        found.read("norm.weight", "master", 0, 8)
    with pytest.raises(RunError, match="of another model"):
        found.adam_step("other.weight")


def two_checkpoints(store: Store, tmp_path: Path) -> None:
    gang = Gang(store, tmp_path / "staging", world=2)
    gang.save(make_state(1), 10)
    gang.save(make_state(2), 20)


LAST = "ckpt/00000020/1"


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


DAMAGE = {
    "a flipped byte": ("rank-00001.safetensors", lambda data: flip(data, len(data) - 3), "another checksum"),
    "a flipped byte in the header": ("rank-00000.safetensors", lambda data: flip(data, 20), "another checksum"),
    "a truncated shard": ("rank-00001.safetensors", lambda data: data[:-1], "bytes instead of"),
    "an empty shard": ("rank-00000.safetensors", lambda data: b"", "0 bytes instead of"),
    "a missing shard": ("rank-00001.safetensors", None, "is missing"),
    "a missing manifest": ("MANIFEST.json", None, "is missing"),
    "an unreadable manifest": ("MANIFEST.json", lambda data: b"{", "cannot be read"),
    "an edited manifest": ("MANIFEST.json", lambda data: data.replace(b": 200", b": 201"), "not the one"),
    "an unreadable marker": ("COMPLETE", lambda data: b"", "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_the_checkpoint_before_it_used(store_uri: str, tmp_path: Path, damage: str) -> None:
    store = Store.open(store_uri)
    two_checkpoints(store, tmp_path)
    file, change, words = DAMAGE[damage]
    if change is None:
        store.delete([f"{LAST}/{file}"])
    else:
        data = store.get(f"{LAST}/{file}")
        assert change(data) != data
        store.put(f"{LAST}/{file}", change(data))

    warnings: list[str] = []
    found = newest_complete(store, FINGERPRINTS, warnings.append)
    assert found is not None
    assert found.meta.step == 10
    assert same(read_state(found, 2), make_state(1))
    (warning,) = warnings
    assert file in warning
    assert LAST in warning
    assert words in warning
    assert "step 20" in warning

    rows = list_checkpoints(store, verify=True)
    assert [(row.step, row.complete, row.verified) for row in rows] == [(10, True, True), (20, True, False)]
    assert rows[1].problem is not None
    assert file in rows[1].problem


def test_when_all_are_damaged_there_is_none(tmp_path: Path) -> None:
    store = folder_store(tmp_path)
    two_checkpoints(store, tmp_path)
    store.delete([info.key for info in store.list("ckpt") if info.key.endswith(".safetensors")])
    warnings: list[str] = []
    assert newest_complete(store, FINGERPRINTS, warnings.append) is None
    assert len(warnings) == 2


def test_a_manifest_of_another_run_is_found_by_its_checksum(tmp_path: Path) -> None:
    ours, theirs = folder_store(tmp_path, "ours"), folder_store(tmp_path, "theirs")
    two_checkpoints(ours, tmp_path)
    Gang(theirs, tmp_path / "staging", world=2).save(make_state(3), 20, fingerprints={"data": "d2"})
    ours.put(f"{LAST}/MANIFEST.json", theirs.get(f"{LAST}/MANIFEST.json"))
    with pytest.raises(Damaged, match=r"MANIFEST\.json is not the one that was committed"):
        open_checkpoint(ours, 20, 1)
    warnings: list[str] = []
    found = newest_complete(ours, FINGERPRINTS, warnings.append)
    assert found is not None
    assert found.meta.step == 10
    assert len(warnings) == 1


def test_a_checkpoint_that_was_copied_to_another_step_is_damaged(tmp_path: Path) -> None:
    store = folder_store(tmp_path)
    two_checkpoints(store, tmp_path)
    shutil.copytree(tmp_path / "x" / LAST, tmp_path / "x/ckpt/00000030/1")
    warnings: list[str] = []
    found = newest_complete(store, FINGERPRINTS, warnings.append)
    assert found is not None
    assert found.meta.step == 20
    assert "is of step 20, attempt 1" in warnings[0]


@pytest.mark.parametrize(
    ("ours", "named"),
    [({"model": "m1", "data": "d2"}, "data"), ({"model": "m1"}, "data"), ({**FINGERPRINTS, "seed": "1"}, "seed")],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, ours: dict[str, str], named: str) -> None:
    store = folder_store(tmp_path)
    two_checkpoints(store, tmp_path)
    with pytest.raises(RunError, match=f"is a checkpoint of another run: its {named} differ") as caught:
        newest_complete(store, ours)
    assert caught.value.code == ExitCode.CONFIGURATION
    assert caught.value.path == "spec.checkpoints.uri"


def test_ranks_may_share_the_verification(tmp_path: Path) -> None:
    store = folder_store(tmp_path)
    two_checkpoints(store, tmp_path)
    store.delete([f"{LAST}/rank-00001.safetensors"])
    found = open_checkpoint(store, 20, 1)
    assert found.verify(range(0, 2, 2)) is None
    problem = found.verify(range(1, 2, 2))
    assert problem is not None
    assert problem.endswith(f"{LAST}/rank-00001.safetensors is missing")


def test_the_list_says_what_sft_checkpoints_promises(store_uri: str, tmp_path: Path) -> None:
    store = Store.open(store_uri)
    two_checkpoints(store, tmp_path)
    store.put("ckpt/00000030/1/rank-00000.safetensors", b"on its way")
    rows = [json.loads(row.model_dump_json(by_alias=True)) for row in list_checkpoints(store, verify=True)]
    assert [row["step"] for row in rows] == [10, 20, 30]
    first = rows[0]
    promised = {"phase": "skills", "epoch": 1, "samples": 100, "complete": True, "verified": True, "worldSize": 2}
    assert {key: first[key] for key in promised} == promised
    assert first["zeroStage"] == 1
    assert first["parametersDigest"] == newest_digest(store, 10)
    assert first["bytes"] == sum(info.size for info in store.list("ckpt/00000010"))
    assert first["time"] > 0
    assert first["problem"] is None
    assert (rows[2]["complete"], rows[2]["verified"], rows[2]["phase"], rows[2]["bytes"]) == (False, None, None, 10)
    assert [row.verified for row in list_checkpoints(store, verify=False)] == [None, None, None]


def newest_digest(store: Store, step: int) -> str:
    return open_checkpoint(store, step, 1).parameters_digest


def test_of_two_attempts_at_one_step_the_later_is_newer(tmp_path: Path) -> None:
    store = folder_store(tmp_path)
    for attempt in (9, 10):
        Gang(store, tmp_path / "staging", attempt=attempt).save(make_state(attempt), 10)
    assert newest(store).attempt == 10


def test_an_empty_store_has_none(store_uri: str) -> None:
    store = Store.open(store_uri)
    assert newest_complete(store) is None
    assert list_checkpoints(store, verify=True) == []


def test_a_shard_is_a_safetensors_file_like_any_other(tmp_path: Path) -> None:
    state = make_state(7)
    Gang(folder_store(tmp_path), tmp_path / "staging").save(state, 10)
    tensors = safetensors.numpy.load_file(tmp_path / "x/ckpt/00000010/1/rank-00000.safetensors")
    assert set(tensors) == {f"{key}/{name}" for key in KEYS for name in SHAPES} | {"rank_state/rng"}
    assert tensors["rank_state/rng"].tobytes() == b"10 0"
    for name in SHAPES:
        for key in KEYS:
            assert tensors[f"{key}/{name}"].tobytes() == state[name][key].tobytes()


def test_torch_tensors_are_saved_like_arrays(tmp_path: Path) -> None:
    state = make_state(7)
    pieces = make_pieces(state)
    for piece in pieces:
        piece.tensors = {key: torch.from_numpy(values) for key, values in piece.tensors.items()}  # type: ignore[misc]
    gang = Gang(folder_store(tmp_path), tmp_path / "staging")
    gang.writers[0].save(pieces, {}, make_meta(10))
    gang.wait()
    assert same(read_state(newest(folder_store(tmp_path))), state)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    """Every object is JSON, or a safetensors file with fp32 and byte tensors, or a writer's name in hexadecimal."""
    store = folder_store(tmp_path)
    Gang(store, tmp_path / "staging", world=2).save(make_state(), 10)
    for info in store.list("ckpt"):
        data = store.get(info.key)
        if info.key.endswith(".safetensors"):
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            assert {entry["dtype"] for key, entry in header.items() if key != "__metadata__"} <= {"F32", "U8"}
        elif info.key.endswith(".writer"):
            int(data, 16)
        else:
            json.loads(data)
    sources = Path(package.__file__).parent.glob("*.py")
    code = [line for source in sources for line in source.read_text().splitlines() if "import" in line]
    assert not [line for line in code if "pickle" in line or "torch.load" in line or "torch.save" in line]


def draw() -> list[float]:
    return [random.random(), float(np.random.random()), float(torch.rand(()))]


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    torch.manual_seed(1)
    np.random.normal()  # leaves half of a pair behind, which belongs to the state
    state = capture_rng()
    gang = Gang(folder_store(tmp_path), tmp_path / "staging")
    gang.writers[0].save(make_pieces(make_state()), state, make_meta(10))
    gang.wait()
    expected = [draw(), draw(), [float(np.random.normal())]]
    draw()
    kept = newest(folder_store(tmp_path)).rank_state(0)
    assert kept is not None
    restore_rng(kept)
    assert [draw(), draw(), [float(np.random.normal())]] == expected


def test_checkpoints_are_listed_without_a_training_library() -> None:
    code = "import sys, sft_trainer.checkpoint; print({'torch', 'transformers', 'deepspeed'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "set()\n"
