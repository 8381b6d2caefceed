"""URIs and globs to files; files to records, whatever their form; errors with file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_api.run import ExitCode, RunError
from sft_api.spec import DataFormat
from sft_trainer.prepare.records import BLOCK_BYTES, MAX_LINE_BYTES, ROWS, RecordError, read_chunks
from sft_trainer.prepare.sources import find_files, glob_pattern, read_object
from sft_trainer.store import Store
from tests.trainer.prepare.builders import chat, write_jsonl

PATH = "spec.phases[0].data[0].uri"
RECORDS = [chat(f"question {index}", f"answer\u2028{index}") for index in range(3)]


def found(uri: str) -> list[str]:
    return [file.key for file in find_files(uri, DataFormat.MESSAGES, PATH)]


def records(uri: str, format: DataFormat = DataFormat.MESSAGES) -> list[tuple[str, str, dict[str, Any]]]:
    """File, place and content of every record."""
    files = find_files(uri, format, PATH)
    return [
        (file.key, where, record)
        for index, file in enumerate(files)
        for chunk in read_chunks(file, index, lambda count: None)
        for where, record in chunk.records()
    ]


def compressed(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        # Two members, as `cat a.gz b.gz` makes.
        path.write_bytes(gzip.compress(data[:50]) + gzip.compress(data[50:]))
    elif path.suffix == ".zst":
        codec = pa.Codec("zstd")
        path.write_bytes(codec.compress(data[:50], asbytes=True) + codec.compress(data[50:], asbytes=True))
    else:
        path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_lines_are_read_plain_and_compressed(tmp_path: Path, name: str) -> None:
    data = write_jsonl(tmp_path / "plain", RECORDS).read_bytes()
    compressed(tmp_path / name, data)
    read = records(f"file://{tmp_path}/{name}")
    assert [(where, record) for _, where, record in read] == [
        (f"line {number}", record) for number, record in enumerate(RECORDS, 1)
    ]


def test_a_parquet_file_is_read_row_by_row_without_its_nulls(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "reasoning_content": "r"}], "id": 1},
        *({"messages": record["messages"], "id": 2, "unmask": True} for record in RECORDS * ROWS),
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=100)
    read = records(f"file://{tmp_path}/a.parquet")
    assert len(read) == len(rows)
    assert read[0][1:] == ("row 1", {"messages": rows[0]["messages"]})
    assert read[-1][1:] == (f"row {len(rows)}", {"messages": RECORDS[-1]["messages"]})


def test_optional_columns_of_parquet_are_read(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{**RECORDS[0], "unmask": True, "tools": "[]"}])
    pq.write_table(table, tmp_path / "a.parquet")
    assert records(f"file://{tmp_path}/a.parquet")[0][2] == {**RECORDS[0], "unmask": True, "tools": "[]"}


def test_lines_longer_than_a_block_and_files_of_many_blocks_keep_their_numbers(tmp_path: Path) -> None:
    long = [chat("q", "x" * (BLOCK_BYTES * (index % 3))) for index in range(7)]
    short = [chat("q", "y" * 1000) for _ in range(2 * BLOCK_BYTES // 1000)]
    write_jsonl(tmp_path / "a.jsonl", [*long, *short, *long])
    read = records(f"file://{tmp_path}/a.jsonl")
    assert [where for _, where, _ in read] == [f"line {number}" for number in range(1, len(read) + 1)]
    assert [record for _, _, record in read] == [*long, *short, *long]


def test_blank_lines_a_byte_order_mark_and_a_missing_last_newline_do_no_harm(tmp_path: Path) -> None:
    text = "\ufeff" + json.dumps(RECORDS[0]) + "\r\n\n  \n" + json.dumps(RECORDS[1])
    (tmp_path / "a.jsonl").write_text(text, newline="")
    assert [where for _, where, _ in records(f"file://{tmp_path}/a.jsonl")] == ["line 1", "line 4"]


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("?.jsonl*", ["a.jsonl", "b.jsonl", "c.jsonl.gz"]),
        ("[!a].jsonl", ["b.jsonl"]),
        ("[a-b].jsonl", ["a.jsonl", "b.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "sub/a.jsonl", "sub/deep/a.jsonl"]),
        ("**", ["a.jsonl", "b.jsonl", "c.jsonl.gz", "sub/a.jsonl", "sub/deep/a.jsonl"]),
        ("sub/**/a.jsonl", ["a.jsonl", "deep/a.jsonl"]),
        ("*/a.jsonl", ["sub/a.jsonl"]),
    ],
)
def test_globs_match_in_sorted_order(tmp_path: Path, pattern: str, matches: list[str]) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.jsonl.gz", "sub/a.jsonl", "sub/deep/a.jsonl"):
        compressed(write_jsonl(tmp_path / name, RECORDS), (tmp_path / name).read_bytes())
    # Keys are relative to the folder before the first glob character.
    assert (
        found(f"file://{tmp_path}/{pattern}") == [match.removeprefix("sub/") for match in matches]
        if pattern.startswith("sub/")
        else matches
    )


def test_glob_characters_in_a_name_that_exists_mean_themselves(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a[1]?.jsonl", RECORDS)
    write_jsonl(tmp_path / "a1x.jsonl", RECORDS)
    (file,) = find_files(f"file://{tmp_path}/a[1]?.jsonl", DataFormat.MESSAGES, PATH)
    assert file.name == f"{tmp_path}/a[1]?.jsonl"


@pytest.mark.parametrize(
    ("pattern", "key"), [("[]]", "]"), ("[a\\]", "\\"), ("[^^]", "a"), ("a[", "a["), ("{a,b}", "{a,b}")]
)
def test_odd_patterns_mean_what_they_mean_to_a_shell(pattern: str, key: str) -> None:
    assert glob_pattern(pattern).fullmatch(key)


def test_a_relative_file_uri_starts_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    write_jsonl(tmp_path / "sub" / "b.jsonl", RECORDS)
    monkeypatch.chdir(tmp_path)
    assert found("file://a.jsonl") == ["a.jsonl"]
    assert found("file://*.jsonl") == ["a.jsonl"]
    assert found("file://sub/*") == ["b.jsonl"]


def test_a_linked_file_is_found(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "elsewhere" / "x", RECORDS)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").symlink_to(tmp_path / "elsewhere" / "x")
    assert len(records(f"file://{tmp_path}/data/*.jsonl")) == len(RECORDS)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("{folder}/*.jsonl", r"/\*.jsonl matches no file: give a file or a glob"),
        ("{folder}/a.jsonl", r"/a.jsonl is no file"),
        ("{folder}/nothing/**", r"matches no file"),
        ("{folder}", r"is no file"),
        (
            "{folder}/notes*",
            r"names notes.txt, whose kind is not known .* allowed are .jsonl, .jsonl.gz, .jsonl.zst, .p",
        ),
    ],
)
def test_what_is_not_there_or_not_known_is_said(tmp_path: Path, uri: str, message: str) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(RunError, match=message) as error:
        found("file://" + uri.format(folder=tmp_path))
    assert (error.value.code, error.value.path) == (ExitCode.DATA, PATH)


def bad_gzip(data: bytes) -> bytes:
    return gzip.compress(data)[:-20]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl is empty: it holds no record"),
        ("a.jsonl", b"\n \n", "a.jsonl is empty: it holds no record"),
        ("a.jsonl.gz", gzip.compress(b""), "a.jsonl.gz is empty"),
        ("a.jsonl.gz", b"no gzip at all", "a.jsonl.gz, line 1: the file cannot be read from here on"),
        ("a.jsonl.gz", bad_gzip(b'{"a": 1}\n' * 9), "a.jsonl.gz, line 1?[0-9]: the file cannot be read"),
        ("a.jsonl.zst", bz2.compress(b"x"), "a.jsonl.zst, line 1: the file cannot be read"),
        ("a.parquet", b"PAR1 not really", "a.parquet, row 1: not readable as Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match=message) as error:
        records(f"file://{tmp_path}/{name}")
    assert (error.value.code, error.value.path) == (ExitCode.DATA, PATH)


def test_a_stream_that_is_cut_off_says_from_which_line_on(tmp_path: Path) -> None:
    noise = random.Random(1)
    data = b"".join(b'{"text": "%s"}\n' % noise.randbytes(100).hex().encode() for _ in range(5000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data)[:-1000])
    with pytest.raises(RunError, match=r"a\.jsonl\.gz, line (\d+): the file cannot be read from here on") as error:
        records(f"file://{tmp_path}/a.jsonl.gz")
    line = re.search(r"line (\d+)", error.value.message)
    assert line
    assert 3000 < int(line[1]) < 5000


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "a"}\n' * 2 + b"[")
        file.truncate(3 * MAX_LINE_BYTES)
    with pytest.raises(RunError, match=r"a\.jsonl, line 3: the line is longer than 64 MiB: each line must hold one"):
        records(f"file://{tmp_path}/a.jsonl")


def test_parquet_without_the_column_says_what_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "answer": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(RunError, match="no column 'messages', which format Messages needs; it has prompt, answer"):
        records(f"file://{tmp_path}/a.parquet")


def test_parquet_without_rows_is_empty(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(RunError, match=r"a\.parquet is empty"):
        records(f"file://{tmp_path}/a.parquet", DataFormat.PRETRAINING)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"messages": ', "is not JSON"),
        (b"[1, 2]", "is a list: each line must hold one JSON object"),
        (b"null", "is null"),
        (b'"a"', "is a string"),
        (b'{"text": "\xff"}', "is not JSON"),
        (b'{"text": "a"} {"text": "b"}', "is not JSON .* at column 15"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path: Path, line: bytes, what: str) -> None:
    good = json.dumps(RECORDS[0]).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, b"", good, line, good]))
    with pytest.raises(RecordError, match=what) as error:
        records(f"file://{tmp_path}/a.jsonl")
    assert error.value.where == "line 4"


def test_progress_counts_the_bytes_of_the_file_as_it_lies(tmp_path: Path) -> None:
    path = compressed(tmp_path / "a.jsonl.gz", write_jsonl(tmp_path / "x", RECORDS * 2000).read_bytes())
    counts: list[int] = []
    (file,) = find_files(f"file://{path}", DataFormat.MESSAGES, PATH)
    chunks = list(read_chunks(file, 0, counts.append))
    assert len(chunks) > 1
    assert counts == sorted(counts)
    assert counts[-1] == path.stat().st_size == file.size


def test_equal_content_has_an_equal_digest(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, RECORDS)
    write_jsonl(tmp_path / "c.jsonl", RECORDS[:2])
    a, b, c = (file.digest() for file in find_files(f"file://{tmp_path}/*", DataFormat.MESSAGES, PATH))
    assert a == b != c
    assert len(a) == 64


def test_data_is_read_from_s3(tmp_path: Path, s3_bucket: str) -> None:
    store = Store.open(f"{s3_bucket}/lab")
    data = write_jsonl(tmp_path / "plain", RECORDS).read_bytes()
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        store.put(f"data/{name}", compressed(tmp_path / name, data))
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "d.parquet")
    store.put("data/deep/d.parquet", tmp_path / "d.parquet")
    read = records(f"{s3_bucket}/lab/data/**")
    assert [key for key, _, _ in read[::3]] == ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "deep/d.parquet"]
    assert [record for _, _, record in read] == RECORDS * 4
    assert [key for key, _, _ in records(f"{s3_bucket}/lab/data/a.jsonl")] == ["a.jsonl"] * 3
    with pytest.raises(RunError, match="matches no file"):
        found(f"{s3_bucket}/*.jsonl")


def test_an_object_is_read_whole_or_said_to_be_missing(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert read_object(f"file://{tmp_path}/t.jinja", PATH) == b"{{ messages }}"
    for missing in ("u.jinja", ""):
        with pytest.raises(RunError, match="is no file") as error:
            read_object(f"file://{tmp_path}/{missing}", PATH)
        assert error.value.code == ExitCode.CONFIGURATION


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", RECORDS).chmod(0)
    with pytest.raises(RunError) as error:
        records(f"file://{tmp_path}/a.jsonl")
    assert error.value.code == ExitCode.STORE_REFUSED
