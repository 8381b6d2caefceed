"""Prepared data as training reads it, and the parts it falls into."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_api.run import ExitCode, Lengths, RunError
from sft_trainer.prepare import Dataset, held_out_samples, training_samples
from sft_trainer.prepare.pool import as_batch
from sft_trainer.prepare.samples import Sample, Tally
from sft_trainer.prepare.writer import BATCH_SAMPLES, ShardWriter, commit, summarise
from sft_trainer.store import Store

FINGERPRINT = "f" * 32


def samples(count: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 1 << 30, rng.integers(2, 20), dtype=np.int32) for _ in range(count)]
    return [Sample(each, np.arange(len(each)) >= rng.integers(1, len(each))) for each in ids]


def write(store: Store, batches: list[list[Sample]]) -> None:
    folder = store.child(FINGERPRINT)
    with ShardWriter(folder) as writer:
        for batch in batches:
            writer.add(as_batch(batch))
        writer.finish()
        commit(folder, summarise(FINGERPRINT, writer, Tally(), [], []))


def dataset(folder: Path, wanted: list[Sample]) -> Dataset:
    store = Store.open(f"file://{folder}/store")
    write(store, [wanted])
    return Dataset.open(store, FINGERPRINT, folder / "cache")


def check(found: Dataset, wanted: list[Sample]) -> None:
    assert len(found) == len(wanted)
    assert found.lengths.tolist() == [len(sample.ids) for sample in wanted]
    assert found.num_loss_tokens.tolist() == [sample.num_loss_tokens for sample in wanted]
    assert found.content.tolist() == [sample.content() for sample in wanted]
    for index, sample in enumerate(wanted):
        ids, mask = found.tokens(index)
        assert ids.tolist() == sample.ids.tolist()
        assert mask.tolist() == sample.mask.tolist()


def test_every_sample_comes_back_in_its_order_across_batches(tmp_path: Path) -> None:
    wanted = samples(50)
    store = Store.open(f"file://{tmp_path}")
    write(store, [wanted[:20], [], wanted[20:21], wanted[21:]])
    found = Dataset.open(store, FINGERPRINT, tmp_path / "cache")
    check(found, wanted)
    assert found.lengths.dtype == found.num_loss_tokens.dtype == np.int32
    assert found.content.dtype == np.uint64
    ids, mask = found.tokens(np.int64(3))
    assert ids.dtype == np.int32
    assert mask.dtype == np.bool_
    assert not (tmp_path / "cache").exists()


def test_large_data_fills_several_record_batches(tmp_path: Path) -> None:
    one = samples(2)
    wanted = one * BATCH_SAMPLES
    store = Store.open(f"file://{tmp_path}")
    write(store, [wanted[start : start + 1000] for start in range(0, len(wanted), 1000)])
    found = Dataset.open(store, FINGERPRINT, tmp_path)
    assert len(found) == len(wanted)
    for index in (0, 1, *range(BATCH_SAMPLES // 1000 * 1000, len(wanted), 500), len(wanted) - 1):
        assert found.tokens(index)[0].tolist() == wanted[index].ids.tolist()


def test_data_in_a_bucket_is_copied_once_and_checked(tmp_path: Path, s3_bucket: str) -> None:
    wanted = samples(9)
    store = Store.open(f"{s3_bucket}/data")
    write(store, [wanted])
    check(Dataset.open(store, FINGERPRINT, tmp_path), wanted)
    copy = tmp_path / FINGERPRINT / "shard-00000.arrow"
    before = copy.stat().st_mtime_ns
    check(Dataset.open(store, FINGERPRINT, tmp_path), wanted)
    assert copy.stat().st_mtime_ns == before
    copy.write_bytes(b"cut short")
    check(Dataset.open(store, FINGERPRINT, tmp_path), wanted)


def test_a_damaged_shard_in_a_bucket_is_not_trained_on(tmp_path: Path, s3_bucket: str) -> None:
    store = Store.open(f"{s3_bucket}/data")
    write(store, [samples(9)])
    key = f"{FINGERPRINT}/shard-00000.arrow"
    store.put(key, store.get(key)[:-1] + b"x")
    with pytest.raises(RunError, match="is damaged"):
        Dataset.open(store, FINGERPRINT, tmp_path)


def test_a_shard_of_the_wrong_size_is_not_trained_on(tmp_path: Path) -> None:
    store = Store.open(f"file://{tmp_path}")
    write(store, [samples(9)])
    shard = tmp_path / FINGERPRINT / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(RunError, match="is damaged") as error:
        Dataset.open(store, FINGERPRINT, tmp_path)
    assert error.value.code == ExitCode.DATA


def test_what_was_not_committed_is_not_there(tmp_path: Path) -> None:
    store = Store.open(f"file://{tmp_path}")
    write(store, [samples(9)])
    store.delete([f"{FINGERPRINT}/COMPLETE"])
    with pytest.raises(RunError, match="no prepared data is complete at"):
        Dataset.open(store, FINGERPRINT, tmp_path)


def test_held_out_and_trained_on_are_all_samples_and_no_content_is_in_both(tmp_path: Path) -> None:
    distinct = samples(300)
    data = dataset(tmp_path, distinct + distinct[:150] * 2)
    held_out = held_out_samples(data, 0.2, seed=1)
    trained = training_samples(data, 0.2, 1, Lengths.ALL)
    assert sorted([*held_out, *trained]) == list(range(len(data)))
    assert not set(data.content[held_out]) & set(data.content[trained])
    assert 0.1 < len(set(data.content[held_out])) / len(distinct) < 0.3
    assert held_out.dtype == trained.dtype == np.int64


def test_the_seed_decides_what_is_held_out_and_a_larger_fraction_holds_out_more_of_the_same(tmp_path: Path) -> None:
    data = dataset(tmp_path, samples(300))
    small, large = (set(held_out_samples(data, fraction, 1)) for fraction in (0.1, 0.3))
    assert small < large
    assert small != set(held_out_samples(data, 0.1, 2))


def test_what_is_held_out_of_one_data_set_is_held_out_of_another(tmp_path: Path) -> None:
    shared = samples(200)
    one, other = dataset(tmp_path / "a", shared), dataset(tmp_path / "b", samples(100, seed=9) + shared[::-1])
    held_out = {index for index in held_out_samples(other, 0.2, 3) if index >= 100}
    assert {299 - index for index in held_out} == set(held_out_samples(one, 0.2, 3))


def test_holding_out_none_or_all_says_what_to_do(tmp_path: Path) -> None:
    data = dataset(tmp_path, samples(3))
    with pytest.raises(RunError, match="1e-06 of 3 samples holds out none: give a larger fraction") as error:
        held_out_samples(data, 1e-6, 1)
    assert (error.value.code, error.value.path) == (ExitCode.CONFIGURATION, "spec.validation.fraction")
    with pytest.raises(RunError, match="of 3 samples none is left to train on") as error:
        training_samples(data, 0.999999, 1, Lengths.ALL)
    assert (error.value.code, error.value.path) == (ExitCode.CONFIGURATION, "spec.validation.fraction")


def test_without_a_fraction_every_sample_is_trained_on(tmp_path: Path) -> None:
    data = dataset(tmp_path, samples(7))
    assert training_samples(data, None, 1, Lengths.ALL).tolist() == list(range(7))


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(0, 1000), st.sampled_from([None, 0.3]))
def test_the_halves_are_the_shorter_and_the_longer_samples(
    tmp_path_factory: pytest.TempPathFactory, count: int, seed: int, fraction: float | None
) -> None:
    data = dataset(tmp_path_factory.mktemp("data"), samples(count, seed) + samples(1, seed))
    kept = training_samples(data, None, 1, Lengths.ALL)
    shorter, longer = (training_samples(data, None, 1, half) for half in (Lengths.SHORTER, Lengths.LONGER))
    assert sorted([*shorter, *longer]) == kept.tolist()
    assert len(shorter) == (len(kept) + 1) // 2
    assert shorter.tolist() == sorted(shorter)
    assert max(data.lengths[shorter]) <= min(data.lengths[longer])


def test_halves_of_equal_lengths_are_told_apart_by_content(tmp_path: Path) -> None:
    mask = np.array([False, True])
    data = dataset(tmp_path, [Sample(np.array([0, index], dtype=np.int32), mask) for index in range(10)])
    shorter, longer = (training_samples(data, None, 1, half) for half in (Lengths.SHORTER, Lengths.LONGER))
    assert max(data.content[shorter]) < min(data.content[longer])
