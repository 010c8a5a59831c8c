"""Reading JSONL, CSV and Parquet: streamed, typed, and every error with its line."""

from __future__ import annotations

import gzip
import itertools
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moalign.config.card import SourceSpec
from moalign.core.errors import RequestError
from moalign.data import readers
from moalign.data.readers import Field, locate, read

WriteJsonl = Callable[..., Path]
PROMPT = Field("prompt", blank=False)
RESPONSE = Field("response")
DONE = Field("done", truth=True, required=False)
FIELDS = [PROMPT, RESPONSE, DONE]
RECORDS: list[dict[str, Any]] = [{"prompt": f"p{index}", "response": f"r{index}"} for index in range(30)]


def values(path: Path, fields: list[Field] = FIELDS, **options: Any) -> list[dict[str, Any]]:
    return [row.values for row in read(SourceSpec(path=str(path), **options), fields)]


def message(path: Path, fields: list[Field] = FIELDS, **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        values(path, fields, **options)
    assert caught.value.exit_code == 2
    # Errors begin with the whole path; the tests compare what follows the folder.
    return str(caught.value).removeprefix(f"{path.parent}/")


# What is read


def test_jsonl_with_all_kinds_of_text(write_jsonl: WriteJsonl) -> None:
    records = [
        {"prompt": "Grüße 😀 👩‍👩‍👧‍👦", "response": "你好、世界", "done": 1},
        {"prompt": "مرحبا", "response": "line\nline\u2028line\x85", "done": False, "other": [1, {}]},
        {"prompt": "Привет", "response": "", "done": None},
    ]
    assert values(write_jsonl(records)) == [
        {"prompt": "Grüße 😀 👩‍👩‍👧‍👦", "response": "你好、世界", "done": True},
        {"prompt": "مرحبا", "response": "line\nline\u2028line\x85", "done": False},
        {"prompt": "Привет", "response": "", "done": None},
    ]


def test_rows_know_their_line_and_blank_lines_count(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(["", json.dumps(RECORDS[0]), "  ", "", json.dumps(RECORDS[1])])
    rows = list(read(SourceSpec(path=str(path)), FIELDS))
    assert [row.where for row in rows] == [f"{path}:2", f"{path}:5"]
    assert rows[0].columns == ("prompt", "response")


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "response": "b"}\r\n{"prompt": "c", "response": "d"}')
    assert [row["prompt"] for row in values(path)] == ["a", "c"]
    table = tmp_path / "a.csv"
    table.write_bytes(b"\xef\xbb\xbfprompt,response\r\na,b\r\n")
    assert values(table) == [{"prompt": "a", "response": "b", "done": None}]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "A.JSONL.GZ"])
def test_gz_and_lines_in_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in RECORDS).encode()))
    assert [row["response"] for row in values(path)] == [record["response"] for record in RECORDS]
    path.write_bytes(gzip.compress(b'{"prompt": "a", "response": "b"}\n{"prompt": 3}\n'))
    assert message(path, [PROMPT]) == f"{name}:2: column 'prompt' must be text; found a number 3"


def test_csv_with_quotes_commas_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    text = 'prompt,response,done\n"one\nstill ""one"", yes",r1, True \n\nplain,"r\r\n2",\n"a\n\n\nb",r3,0\n'
    path.write_bytes(text.encode())
    rows = list(read(SourceSpec(path=str(path)), FIELDS))
    assert [row.values for row in rows] == [
        {"prompt": 'one\nstill "one", yes', "response": "r1", "done": True},
        {"prompt": "plain", "response": "r\r\n2", "done": None},
        {"prompt": "a\n\n\nb", "response": "r3", "done": False},
    ]
    # A record is named by the line it begins on, whatever its cells hold.
    assert [row.where.rpartition(":")[2] for row in rows] == ["2", "5", "7"]


def test_gz_csv_and_cells_longer_than_the_csv_module_allows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    long = "x" * 300_000
    path.write_bytes(gzip.compress(f"prompt,response\na,{long}\n".encode()))
    assert values(path)[0]["response"] == long


def test_columns_are_renamed_and_limit_stops(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(
        [{"question": "q1", "response": "r", "prompt": 5}, {"question": "q2", "response": "r"}, "{broken"]
    )
    assert values(path, columns={"prompt": "question"}, limit=2) == [
        {"prompt": "q1", "response": "r", "done": None},
        {"prompt": "q2", "response": "r", "done": None},
    ]


def test_paths_are_relative_to_the_base_folder(write_jsonl: WriteJsonl, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(RECORDS)
    source = SourceSpec(path=f"../{path.parent.name}/data.jsonl", limit=1)
    monkeypatch.chdir("/")
    assert next(read(source, FIELDS, path.parent)).values["prompt"] == "p0"
    monkeypatch.chdir(path.parent)
    # Below the current folder the message shows the short path.
    assert next(read(source, FIELDS, path.parent)).where == "data.jsonl:1"


# Streaming


@pytest.mark.slow
@pytest.mark.parametrize("name", ["big.jsonl", "big.jsonl.gz", "big.csv"])
def test_a_large_file_is_never_held_in_memory(tmp_path: Path, name: str) -> None:
    path, count = tmp_path / name, 10_000
    opener: Any = gzip.open if name.endswith(".gz") else open
    filler = "word " * 400
    with opener(path, "wt", encoding="utf-8") as handle:
        if ".csv" in name:
            handle.write("prompt,response\n")
        for index in range(count):
            row = f"p{index},{filler}" if ".csv" in name else f'{{"prompt": "p{index}", "response": "{filler}"}}'
            handle.write(row + "\n")
    size = count * len(filler)
    tracemalloc.start()
    try:
        result = sum(1 for _ in read(SourceSpec(path=str(path)), [PROMPT, RESPONSE]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result == count
    assert size >= 20_000_000
    assert peak < 1_000_000


def test_the_first_record_does_not_read_the_file_to_its_end(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([*(json.dumps(record) for record in RECORDS), "{broken"])
    rows = read(SourceSpec(path=str(path)), FIELDS)
    assert [row.values["prompt"] for row in itertools.islice(rows, 30)] == [f"p{index}" for index in range(30)]
    with pytest.raises(RequestError, match=r"data\.jsonl:31: broken JSON"):
        next(rows)


def test_parquet_comes_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"prompt": [f"p{i}" for i in range(20_000)], "response": [f"{i} " * 200 for i in range(20_000)]})
    size = table.nbytes
    pq.write_table(table, path, row_group_size=1000)
    del table
    before = pa.total_allocated_bytes()
    rows = read(SourceSpec(path=str(path)), [PROMPT, RESPONSE])
    first = next(rows)
    held = pa.total_allocated_bytes() - before
    assert first.where == f"{path}: row 1"
    assert size > 15_000_000
    assert held < size / 5
    assert [row.values["prompt"] for row in rows] == [f"p{i}" for i in range(1, 20_000)]


def test_parquet_that_breaks_later_is_read_until_there(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"prompt": [f"{i:08d}" for i in range(2000)]})
    pq.write_table(table, path, row_group_size=500, compression="snappy", use_dictionary=False)
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 200] = b"\xff" * 200
    path.write_bytes(content)
    rows = read(SourceSpec(path=str(path)), [PROMPT])
    assert [row.values["prompt"] for row in itertools.islice(rows, 768)] == [f"{i:08d}" for i in range(768)]
    with pytest.raises(RequestError, match=r"a\.parquet: not a whole Parquet file \(after row \d+\)"):
        list(rows)


def test_reading_only_the_columns_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "response": ["b"], "image": [b"\0" * 10]}), path)
    asked: list[list[str]] = []
    original = pq.ParquetFile.iter_batches

    def spy(self: Any, *args: Any, **options: Any) -> Any:
        asked.append(options["columns"])
        return original(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    assert values(path) == [{"prompt": "a", "response": "b", "done": None}]
    assert asked == [["prompt", "response"]]


# What is refused


def test_broken_line_17_is_named(write_jsonl: WriteJsonl) -> None:
    lines = [json.dumps(record) for record in RECORDS]
    lines[16] = '{"prompt": "p16", "response": "r16'
    assert message(write_jsonl(lines)) == (
        "data.jsonl:17: broken JSON: Unterminated string starting at (character 31); each line must be one whole "
        """JSON object; found '{"prompt": "p16", "response": "r16'"""
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    assert message(path) == f"{name}: the file is empty; at least one record is needed"


def test_files_without_records(tmp_path: Path) -> None:
    contents = {"blank.jsonl": b"\n \n", "head.csv": b"prompt,response\n", "a.jsonl.gz": gzip.compress(b"")}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert message(tmp_path / name) == f"{name}: no records in it; at least one record is needed"
    pq.write_table(
        pa.table({"prompt": pa.array([], pa.string()), "response": pa.array([], pa.string())}), tmp_path / "a.parquet"
    )
    assert message(tmp_path / "a.parquet") == "a.parquet: no records in it; at least one record is needed"


def test_a_wrong_column_names_the_nearest(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    wrong = (
        "no column 'prompt'; found: promt, response; did you mean 'promt'? "
        "(rename it, or where a task card names this file: columns: {prompt: promt})"
    )
    assert message(write_jsonl([{"promt": "a", "response": "b"}])) == f"data.jsonl:1: {wrong}"
    (tmp_path / "a.csv").write_text("promt,response\na,b\n")
    assert message(tmp_path / "a.csv") == f"a.csv:1: {wrong}"
    pq.write_table(pa.table({"promt": ["a"], "response": ["b"]}), tmp_path / "a.parquet")
    assert message(tmp_path / "a.parquet") == f"a.parquet: {wrong}"


def test_a_column_missing_on_a_later_line_only(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([RECORDS[0], RECORDS[1], {"prompt": "a"}])
    assert message(path) == (
        "data.jsonl:3: no column 'response'; found: prompt (rename one, or where a task card names this file: "
        "columns: {response: NAME})"
    )


def test_a_column_named_in_the_source_must_exist(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(RECORDS)
    assert message(path, columns={"done": "whole"}) == (
        "data.jsonl:1: no column 'whole' (for the field 'done'); found: prompt, response"
    )


def test_an_unknown_field_in_columns_is_refused_before_reading(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(["{broken"])
    assert message(path, columns={"promt": "question"}) == (
        "data.jsonl: columns: unknown field 'promt'; allowed: done, prompt, response; did you mean 'prompt'?"
    )


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        (5, "a number 5"),
        (True, "a boolean True"),
        (None, "nothing (null)"),
        (["a"], "a list ['a']"),
        ({"role": "user"}, "an object {'role': 'user'}"),
    ],
)
def test_a_response_that_is_no_text(write_jsonl: WriteJsonl, value: Any, wrong: str) -> None:
    path = write_jsonl([RECORDS[0], {"prompt": "a", "response": value}])
    assert message(path) == f"data.jsonl:2: column 'response' must be text; found {wrong}"


def test_parquet_types_are_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "response": pa.array(["x", None]), "done": [True, False]}), path)
    assert message(path) == "a.parquet: row 2: column 'response' must be text; found nothing (null)"
    pq.write_table(pa.table({"prompt": ["a"], "response": ["b"], "done": [0.5]}), path)
    assert message(path) == "a.parquet: row 1: column 'done' must be true, false or nothing; found a number 0.5"
    pq.write_table(pa.table({"prompt": [b"a"], "response": ["b"]}), path)
    assert message(path) == "a.parquet: row 1: column 'prompt' must be text; found bytes b'a'"


@pytest.mark.parametrize("prompt", ["", "  \n", "\u3000"])
def test_an_empty_prompt(write_jsonl: WriteJsonl, prompt: str) -> None:
    path = write_jsonl([RECORDS[0], {"prompt": prompt, "response": "b"}])
    assert message(path) == "data.jsonl:2: column 'prompt' is empty; a text is needed"


def test_half_an_emoji_is_refused(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(['{"prompt": "ok \\ud83d\\ude00", "response": ""}', '{"prompt": "hm \\ud83d", "response": ""}'])
    assert message(path) == (
        "data.jsonl:2: column 'prompt' holds half a character ('\\ud83d' at position 3), which is no valid text"
    )


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('[{"prompt": "a"}]', "each line must be one JSON object; found a list [{'prompt': 'a'}]"),
        ('"a"', "each line must be one JSON object; found a text 'a'"),
        ("[" * 200_000, "broken JSON: nested too deeply"),
        ('{"prompt": ' + "1" * 5000 + "}", "broken JSON: Exceeds the limit"),
        ("{", "broken JSON: Expecting property name"),
    ],
)
def test_lines_that_are_no_object(write_jsonl: WriteJsonl, line: str, wrong: str) -> None:
    assert message(write_jsonl([line])).startswith(f"data.jsonl:1: {wrong}")


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "a", "response": "b"}\n{"prompt": "caf\xe9", "response": "b"}\n')
    assert message(path) == "a.jsonl:2: not UTF-8 text (0xe9 at byte 16 of the line); save the file as UTF-8"
    path.write_text('{"prompt": "a"}', encoding="utf-16")
    assert "a.jsonl:1: not UTF-8 text" in message(path)


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LINE_LIMIT", 2 * 2**20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "' + b"x" * (3 * 2**20))
    assert message(path) == "a.jsonl:1: a line longer than 2 MiB; one record a line is needed"


def test_a_truncated_gz_and_one_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    content = "".join(json.dumps(record | {"noise": str(hash(str(record)))}) + "\n" for record in RECORDS * 2000)
    whole = gzip.compress(content.encode())
    path.write_bytes(whole[: len(whole) // 2])
    rows = read(SourceSpec(path=str(path)), FIELDS)
    assert next(rows).values["prompt"] == "p0"
    with pytest.raises(RequestError, match=r"a\.jsonl\.gz:\d+: not a whole gzip file: Compressed file ended"):
        list(rows)
    path.write_bytes(b'{"prompt": "a"}\n')
    assert message(path).startswith("a.jsonl.gz:1: not a whole gzip file: Not a gzipped file")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("prompt,response\na,b\nc,d,e\n", "a.csv:3: 3 cells, but the header has 2 columns (prompt, response)"),
        ('prompt,response\na,b\n"x\ny",d\nc\n', "a.csv:5: 1 cells, but the header has 2 columns (prompt, response)"),
        ("prompt,response,prompt\na,b,c\n", "a.csv:1: column 'prompt' is there 2 times; every name must be unique"),
        (
            'prompt,response\na,"b\nc,d\n',
            "a.csv:2: broken CSV: unexpected end of data (the record begins on this line)",
        ),
        ('prompt,response\na,"b"c\n', "a.csv:2: broken CSV: ',' expected after '\"' (the record begins on this line)"),
    ],
)
def test_broken_csv(tmp_path: Path, text: str, wrong: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert message(path) == wrong


def test_parquet_whose_text_is_no_utf8(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    raw = pa.array([b"caf\xe9"], pa.binary()).view(pa.binary())
    text = pa.Array.from_buffers(pa.string(), 1, raw.buffers())
    parquet.write_table(pa.table({"prompt": text, "response": text}), tmp_path / "a.parquet")
    assert "a.parquet: not a whole Parquet file (after row 0): " in message(tmp_path / "a.parquet")


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and then nothing of use PAR1")
    assert message(path).startswith("a.parquet: not a whole Parquet file (after row 0): ")
    path.write_bytes(b"")
    assert message(path).startswith("a.parquet: not a whole Parquet file (after row 0): ")


def test_an_unreadable_file(write_jsonl: WriteJsonl, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(RECORDS)

    def refuse(*args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert message(path) == "data.jsonl:1: cannot be read: Permission denied"


# Where sources are


def refusal(path: str, base: Path, **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        read(SourceSpec(path=path, **options), FIELDS, base)
    return str(caught.value)


@pytest.mark.parametrize("path", ["a" * 300, f"{'a' * 300}.jsonl", f"{'a' * 300}/b/c"])
def test_a_name_too_long_for_a_file_is_not_there(path: str, tmp_path: Path) -> None:
    assert f"{path}: no such file" in refusal(path, tmp_path)


def test_a_missing_file_names_the_nearest(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(RECORDS, "prompts.jsonl")
    wrong = refusal("promts.jsonl", path.parent)
    assert wrong.startswith(f"{path.parent}/promts.jsonl: no such file or folder; allowed: .jsonl, .json, .csv, ")
    assert wrong.endswith("; did you mean 'prompts.jsonl'?")


def test_a_missing_file_is_never_taken_for_a_hub_id(tmp_path: Path) -> None:
    # data/prompts.jsonl has the form owner/name.
    assert refusal("data/prompts.jsonl", tmp_path) == (
        f"{tmp_path}/data/prompts.jsonl: no such file; the folder {tmp_path}/data does not exist"
    )


def test_an_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"x")
    assert refusal("a.xlsx", tmp_path) == (
        f"{tmp_path}/a.xlsx: unknown kind of data file; allowed: .jsonl, .json, .csv, .jsonl.gz, .json.gz, .csv.gz, "
        ".parquet, or a folder"
    )


@pytest.mark.parametrize("path", ["", " ", "a\0b"])
def test_a_path_that_is_none(tmp_path: Path, path: str) -> None:
    assert "is not a file, a folder or a hub id" in refusal(path, tmp_path)


def test_a_plain_file_has_neither_split_nor_revision(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(RECORDS)
    assert refusal("data.jsonl", path.parent, split="test") == (
        f"{path}: split 'test' is for hub data sets and folders, but this is one file; leave it out"
    )
    assert "revision 'v1' is for hub data sets" in refusal("data.jsonl", path.parent, revision="v1")
    assert "revision 'v1' is for hub data sets" in refusal(".", path.parent, revision="v1")


def test_hub_ids_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate(SourceSpec(path="owner/some-data_1.0"), tmp_path) == "owner/some-data_1.0"
    (tmp_path / "owner" / "data").mkdir(parents=True)
    assert locate(SourceSpec(path="owner/data"), tmp_path) == tmp_path / "owner" / "data"


def test_a_folder_beside_the_reader_does_not_shadow_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "owner" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    wrong = refusal("owner/data", tmp_path / "card")
    assert wrong.startswith(
        "owner/data: found in the current folder, but a relative path starts at the task card's folder"
    )
    assert wrong.endswith(f"give the whole path {tmp_path}/here/owner/data")
