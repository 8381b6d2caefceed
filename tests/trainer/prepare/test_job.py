"""`prepare` as a whole: every phase, once per fingerprint, the same on any number of processes, or one clear error."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_api.run import ExitCode, RunError
from sft_api.spec import DataFormat, Overlong, Validation
from sft_trainer.prepare import Dataset, PreparedJob
from sft_trainer.prepare.job import BYTES_WORTH_A_PROCESS, PREPARE_VERSION
from sft_trainer.store import Store
from tests.trainer.prepare.builders import (
    Heard,
    byte_level,
    chat,
    job,
    load,
    phase,
    run,
    save_model_folder,
    write_jsonl,
)
from tests.trainer.prepare.conversations import MULTI_TURN, REASONING, TOOL, TOOLS

CHATS = [chat(f"question {index}", f"answer {index}") for index in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return load(model, name="ChatML")


def opened(folder: Path, fingerprint: str) -> Dataset:
    return Dataset.open(Store.open(f"file://{folder}"), fingerprint, folder / "cache")


def texts(dataset: Dataset, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(dataset.tokens(index)[0]) for index in range(len(dataset))]


def files(folder: Path, prepared: PreparedJob) -> dict[str, bytes]:
    root = folder / prepared.phases[0]
    return {path.name: path.read_bytes() for path in sorted(root.iterdir())}


def test_several_sources_of_several_forms_are_one_data_set_in_their_order(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "in" / "b.jsonl", CHATS[1:3])
    write_jsonl(tmp_path / "in" / "a.jsonl", CHATS[:1])
    pq.write_table(pa.Table.from_pylist(CHATS[3:]), tmp_path / "c.parquet")
    heard = Heard()
    config = job(phase(f"file://{tmp_path}/in/*", f"file://{tmp_path}/c.parquet"))
    prepared = run(config, tmp_path / "out", tokenizer, heard)
    dataset = opened(tmp_path / "out", prepared.phases[0])
    assert [f"question {index}<|im_end|>" in text for index, text in enumerate(texts(dataset, tokenizer))] == [True] * 6
    (event,) = heard.prepared
    assert (event.phase, event.fingerprint, event.reused) == ("all", dataset.fingerprint, False)
    assert (event.samples, event.tokens, event.loss_tokens) == (
        len(dataset),
        dataset.lengths.sum(),
        dataset.num_loss_tokens.sum(),
    )
    assert prepared.validation is None
    assert PreparedJob.model_validate_json(prepared.model_dump_json(by_alias=True)) == prepared


def test_the_preview_shows_three_samples_as_they_are_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "a.jsonl", CHATS)
    heard = Heard()
    run(job(phase(f"file://{tmp_path}/a.jsonl")), tmp_path / "out", tokenizer, heard)
    (event,) = heard.prepared
    assert len(event.preview) == 3
    for before, said, after in event.preview:
        number = said.text[len("answer ")]
        assert before.text == f"<|im_start|>user\nquestion {number}<|im_end|>\n<|im_start|>assistant\n"
        assert said.text == f"answer {number}<|im_end|>"
        assert after.text == "\n"
        assert [before.trained, said.trained, after.trained] == [False, True, False]


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path, tokenizer: Any) -> None:
    records = [
        *CHATS,
        {"messages": []},
        {"messages": CHATS[0]["messages"][:1]},
        chat("q" * 300, "a"),
        chat("q", "a" * 300),
    ]
    write_jsonl(tmp_path / "a.jsonl", records)
    heard = Heard()
    prepared = run(
        job(phase(f"file://{tmp_path}/a.jsonl", max_sequence_length=128)), tmp_path / "out", tokenizer, heard
    )
    (event,) = heard.prepared
    assert event.dropped == {"empty": 1, "noLossTokens": 1, "noLossTokensAfterTruncation": 1}
    assert (event.samples, event.truncated) == (7, 1)
    summary = prepared.summaries[event.fingerprint]
    assert (summary.records, summary.longest, summary.files[0].bytes) == (
        10,
        128,
        (tmp_path / "a.jsonl").stat().st_size,
    )


def test_documents_and_conversations_may_be_mixed_in_a_phase(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "a.jsonl", CHATS[:2])
    write_jsonl(tmp_path / "d.jsonl", [{"text": "what is the answer " * 40}])
    both = phase(f"file://{tmp_path}/a.jsonl", max_sequence_length=64)
    documents = phase(f"file://{tmp_path}/d.jsonl", format=DataFormat.PRETRAINING)
    mixed = both.model_copy(
        update={"data": [*both.data, *documents.data], "data_paths": [*both.data_paths, "spec.phases[0].data[1].uri"]}
    )
    prepared = run(job(mixed), tmp_path / "out", tokenizer)
    summary = prepared.summaries[prepared.phases[0]]
    assert (summary.split, summary.truncated, summary.records) == (1, 0, 3)
    dataset = opened(tmp_path / "out", prepared.phases[0])
    assert len(dataset) > 4
    assert dataset.num_loss_tokens[2] == dataset.lengths[2] - 1 == 63


def test_documents_need_no_chat_template(tmp_path: Path, model: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"text": "what is the answer"}])
    config = job(phase(f"file://{tmp_path}/d.jsonl", format=DataFormat.PRETRAINING))
    prepared = run(config, tmp_path / "out", load(model))
    dataset = opened(tmp_path / "out", prepared.phases[0])
    assert dataset.tokens(0)[0][-1] == load(model).eos_token_id


def test_conversations_without_a_chat_template_are_refused_before_data_is_read(tmp_path: Path, model: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", CHATS)
    with pytest.raises(RunError, match="no chat template, and Messages data needs one: name a built-in") as error:
        run(job(phase(f"file://{tmp_path}/a.jsonl")), tmp_path / "out", load(model))
    assert (error.value.code, error.value.path) == (ExitCode.CONFIGURATION, "spec.model.chatTemplate")
    assert not (tmp_path / "out").exists()


def big(folder: Path) -> Path:
    """Enough data that several processes are worth it: many chunks, several files, things to drop."""
    many = [
        chat(f"question {index} " + "what " * (index % 90), f"answer {index} " * (index % 7)) for index in range(6000)
    ]
    write_jsonl(folder / "a.jsonl", many[:4500])
    write_jsonl(folder / "b.jsonl", [*many[4500:], *CHATS])
    return folder


def test_any_number_of_processes_writes_the_same_bytes(tmp_path: Path, tokenizer: Any) -> None:
    config = job(phase(f"file://{big(tmp_path / 'in')}/*.jsonl", max_sequence_length=64))
    heard = Heard()
    assert sum(path.stat().st_size for path in (tmp_path / "in").iterdir()) > BYTES_WORTH_A_PROCESS
    one = run(config, tmp_path / "one", tokenizer, heard, processes=1)
    two = run(config, tmp_path / "two", tokenizer, heard, processes=2)
    assert files(tmp_path / "one", one) == files(tmp_path / "two", two)
    assert one == two
    assert one.summaries[one.phases[0]].records == 6006
    assert all(0 <= (event.fraction or 0) <= 1 for event in heard.progress)
    # The earliest mistake is the one that is told, whichever process comes upon one first.
    lines = (tmp_path / "in" / "a.jsonl").read_text().splitlines()
    lines[4000] = lines[4321] = "{"
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(RunError, match=r"a\.jsonl, line 4001: is not JSON"):
        run(config, tmp_path / "three", tokenizer, processes=2)
    assert not list((tmp_path / "three").rglob("COMPLETE"))


def test_equal_data_is_prepared_once_and_found_again(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "a.jsonl", CHATS)
    write_jsonl(tmp_path / "copy.jsonl", CHATS)
    first, second = phase(f"file://{tmp_path}/a.jsonl", name="one"), phase(f"file://{tmp_path}/copy.jsonl", name="two")
    heard = Heard()
    prepared = run(job(first, second), tmp_path / "out", tokenizer, heard)
    assert prepared.phases[0] == prepared.phases[1]
    assert [(event.phase, event.reused) for event in heard.prepared] == [("one", False), ("two", True)]
    written = files(tmp_path / "out", prepared)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = Heard()
    assert run(job(second), tmp_path / "out", tokenizer, again).phases == prepared.phases[:1]
    assert [event.reused for event in again.prepared] == [True]
    assert again.prepared[0].preview == heard.prepared[0].preview
    assert files(tmp_path / "out", prepared) == written
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_what_was_left_half_written_is_written_again(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "a.jsonl", CHATS)
    config = job(phase(f"file://{tmp_path}/a.jsonl"))
    prepared = run(config, tmp_path / "out", tokenizer)
    whole = files(tmp_path / "out", prepared)
    folder = tmp_path / "out" / prepared.phases[0]
    (folder / "COMPLETE").unlink()
    (folder / "shard-00000.arrow").write_bytes(b"half")
    heard = Heard()
    run(config, tmp_path / "out", tokenizer, heard)
    assert not heard.prepared[0].reused
    assert files(tmp_path / "out", prepared) == whole


def test_whatever_changes_a_sample_changes_the_fingerprint(tmp_path: Path, tmp_path_factory: Any, model: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", CHATS)
    pq.write_table(pa.Table.from_pylist(CHATS), tmp_path / "a.parquet")
    uri = f"file://{path}"
    other_model = save_model_folder(tmp_path_factory.mktemp("other"), bos_token="</s>", eos_token="<s>")
    cases = [
        (phase(uri), {"name": "ChatML"}, model),
        (phase(uri), {"name": "Llama3"}, model),
        (phase(uri), {"inline": FORGETFUL, "end_of_turn": "<|im_end|>"}, model),
        (phase(uri), {"inline": FORGETFUL + "{# another #}", "end_of_turn": "<|im_end|>"}, model),
        (phase(uri), {"name": "ChatML"}, other_model),
        (phase(uri, max_sequence_length=511), {"name": "ChatML"}, model),
        (phase(uri, overlong=Overlong.DROP), {"name": "ChatML"}, model),
        (phase(uri, uri), {"name": "ChatML"}, model),
        (phase(f"file://{tmp_path}/a.parquet"), {"name": "ChatML"}, model),
    ]
    found = [run(job(each), tmp_path / "out", load(folder, **template)).phases[0] for each, template, folder in cases]
    path.write_text(path.read_text() + json.dumps(CHATS[0]))
    found.append(run(job(phase(uri)), tmp_path / "out", load(model, name="ChatML")).phases[0])
    assert len(set(found)) == len(found)


def test_the_same_input_gives_the_same_samples_as_it_always_did(tmp_path: Path) -> None:
    """If this fails, samples have changed: raise PREPARE_VERSION, so that no job takes up old ones, and mend this."""
    tokenizer = load(save_model_folder(tmp_path / "model", byte_level(vocabulary=0)), name="ChatML")
    conversations = [{"messages": MULTI_TURN}, {"messages": MULTI_TURN, "unmask": True}, {"messages": REASONING}]
    write_jsonl(tmp_path / "a.jsonl", [*conversations, {"messages": TOOL, "tools": TOOLS}])
    prepared = run(job(phase(f"file://{tmp_path}/a.jsonl", max_sequence_length=1024)), tmp_path / "out", tokenizer)
    dataset = opened(tmp_path / "out", prepared.phases[0])
    assert (PREPARE_VERSION, dataset.num_loss_tokens.tolist()) == (1, GOLDEN_LOSS_TOKENS)
    assert [f"{content:016x}" for content in dataset.content] == GOLDEN_CONTENT


GOLDEN_LOSS_TOKENS = [58, 153, 91, 226]
GOLDEN_CONTENT = ["5a4b893d4b9886e8", "42fc8cbf9af3a13d", "d45f8589bb172f65", "22e8ed0309da0aa9"]


def test_validation_data_is_prepared_at_the_longest_length_of_the_phases(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "a.jsonl", CHATS)
    write_jsonl(tmp_path / "v.jsonl", [chat("q", "a" * 300)])
    phases = [
        phase(f"file://{tmp_path}/a.jsonl", name="one", max_sequence_length=32),
        phase(f"file://{tmp_path}/a.jsonl", name="two", max_sequence_length=512),
    ]
    heard = Heard()
    config = job(*phases, validation=Validation(uri=f"file://{tmp_path}/v.jsonl"))
    prepared = run(config, tmp_path / "out", tokenizer, heard)
    assert [event.phase for event in heard.prepared] == ["one", "two", "validation"]
    assert len(prepared.phases) == 2
    assert prepared.validation == heard.prepared[2].fingerprint
    assert heard.prepared[2].truncated == 0
    fraction = run(job(*phases, validation=Validation(fraction=0.5)), tmp_path / "out", tokenizer)
    assert (fraction.phases, fraction.validation) == (prepared.phases, None)


def test_a_mistake_in_validation_data_names_its_field(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "a.jsonl", CHATS)
    config = job(phase(f"file://{tmp_path}/a.jsonl"), validation=Validation(uri=f"file://{tmp_path}/none.jsonl"))
    with pytest.raises(RunError, match="is no file") as error:
        run(config, tmp_path / "out", tokenizer)
    assert error.value.path == "spec.validation.uri"


@contextmanager
def small_disk() -> Iterator[None]:
    """No file may grow beyond a few bytes: for as short as can be, since pytest's own output may go to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_said_and_nothing_is_committed(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "a.jsonl", CHATS)
    said = r"a shard cannot be written to .*\. Free some space there"
    with pytest.raises(RunError, match=said) as error, small_disk():
        run(job(phase(f"file://{tmp_path}/a.jsonl")), tmp_path / "out", tokenizer)
    assert error.value.code == ExitCode.STORE_REFUSED
    assert not (tmp_path / "out").exists()


FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.last %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_cannot_be_masked_for_a_sample_names_file_line_and_reason(tmp_path: Path, model: Path) -> None:
    tokenizer = load(model, inline=FORGETFUL, special_tokens=["<|im_start|>"], end_of_turn="<|im_end|>")
    write_jsonl(tmp_path / "a.jsonl", [*CHATS, {"messages": REASONING}])
    with pytest.raises(RunError) as error:
        run(job(phase(f"file://{tmp_path}/a.jsonl")), tmp_path / "out", tokenizer)
    assert (error.value.code, error.value.path) == (ExitCode.CONFIGURATION, "spec.model.chatTemplate")
    assert f"{tmp_path}/a.jsonl, line 7: it rewrites earlier turns when later ones follow" in error.value.message
    assert "{% generation %}" in error.value.message


BAD = [
    (["{"], "line 1: is not JSON", {}),
    ([CHATS[0], {"messages": [{"role": "usr", "content": "a"}]}], r"line 2: messages\[0\].role is 'usr'; allowed", {}),
    ([CHATS[0], chat("q" * 99, "a")], r"line 2: is \d+ tokens long", {"max_sequence_length": 64, "overlong": "Fail"}),
    ([{"messages": []}] * 2, "of 2 records none is left to train on: 2 empty", {}),
    ([chat("q" * 99, "a")], "1 with nothing to train on within maxSequenceLength 64", {"max_sequence_length": 64}),
    (
        [chat("q" * 99, "a")],
        r"1 longer than maxSequenceLength 64 \(overlong: Drop\)",
        {"max_sequence_length": 64, "overlong": "Drop"},
    ),
    ([{"messages": CHATS[0]["messages"][:1]}], "1 without anything that the assistant says", {}),
]


@pytest.mark.parametrize(("records", "message", "batch"), BAD)
def test_data_that_cannot_be_trained_on_is_said_before_anything_is_committed(
    tmp_path: Path, tokenizer: Any, records: list[object], message: str, batch: dict[str, Any]
) -> None:
    good, path = write_jsonl(tmp_path / "good.jsonl", CHATS), tmp_path / "a.jsonl"
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    uris = (
        [f"file://{path}"] if "none is left" in message or message[0] == "1" else [f"file://{good}", f"file://{path}"]
    )
    with pytest.raises(RunError, match=message) as error:
        run(job(phase(*uris, **batch)), tmp_path / "out", tokenizer)
    assert error.value.code == ExitCode.DATA
    assert error.value.path == f"spec.phases[0].data[{len(uris) - 1}].uri"
    assert not list((tmp_path / "out").rglob("COMPLETE"))


def test_what_a_template_refuses_is_a_mistake_in_the_data(tmp_path: Path, model: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"messages": TOOL}])
    with pytest.raises(
        RunError, match="line 1: is refused by the chat template: the Zephyr format has no tool calls"
    ) as error:
        run(job(phase(f"file://{tmp_path}/a.jsonl")), tmp_path / "out", load(model, name="Zephyr"))
    assert (error.value.code, error.value.path) == (ExitCode.DATA, "spec.phases[0].data[0].uri")
