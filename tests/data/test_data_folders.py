"""Data set folders and hub ids, read through ``datasets``; nothing here may use the network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moalign.config.card import SourceSpec
from moalign.core.errors import RequestError, WorkError
from moalign.data import readers
from moalign.data.readers import Field, Row, read

pytestmark = pytest.mark.usefixtures("no_network")

WriteJsonl = Callable[..., Path]
FIELDS = [Field("prompt", blank=False), Field("done", truth=True, required=False)]
RECORDS = [{"prompt": f"p{index} 😀", "done": index % 2 == 0, "other": "x"} for index in range(5)]


def rows(path: Path | str, base: Path | str = ".", **options: Any) -> list[Row]:
    return list(read(SourceSpec(path=str(path), **options), FIELDS, base))


def message(path: Path | str, base: Path | str = ".", **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        rows(path, base, **options)
    return str(caught.value)


@pytest.fixture
def folder(write_jsonl: WriteJsonl) -> Path:
    """A folder with a train split of five records and a test split of two."""
    path = write_jsonl(RECORDS, "train.jsonl").parent
    write_jsonl(RECORDS[:2], "test.jsonl")
    return path


def test_a_folder_of_data_files(folder: Path) -> None:
    result = rows(folder)
    assert [row.values for row in result] == [{"prompt": f"p{index} 😀", "done": index % 2 == 0} for index in range(5)]
    assert result[2].where == f"{folder}: split train, row 3"
    assert len(rows(folder, split="test")) == 2
    assert len(rows(folder.name, folder.parent, limit=3)) == 3


def test_an_unknown_split_names_the_nearest(folder: Path) -> None:
    assert message(folder, split="tests") == (f"{folder}: no split 'tests'; found: train, test; did you mean 'test'?")


def test_a_wrong_column_in_a_folder(folder: Path) -> None:
    assert message(folder, columns={"done": "dones"}) == (
        f"{folder}: split train: no column 'dones' (for the field 'done'); found: prompt, done, other; "
        "did you mean 'done'? (rename it, or where a task card names this file: columns: {done: done})"
    )


def test_rows_of_a_folder_are_checked(write_jsonl: WriteJsonl) -> None:
    # datasets itself accepts a column of mixed types.
    path = write_jsonl([{"prompt": "a"}, {"prompt": 5}], "train.jsonl").parent
    assert message(path) == f"{path}: split train, row 2: column 'prompt' must be text; found a number 5"


def test_a_broken_file_in_a_folder(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(['{"prompt": "a"}', '{"prompt": '], "train.jsonl").parent
    assert message(path).startswith(f"{path}: cannot be read as a data set: ")


def test_a_folder_without_data(tmp_path: Path) -> None:
    assert message(tmp_path).startswith(f"{tmp_path}: cannot be read as a data set: ")


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(RECORDS)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=data, test=data.select(range(2))).save_to_disk(str(tmp_path / "many"))
    assert [row.values["prompt"] for row in rows("one", tmp_path)] == [record["prompt"] for record in RECORDS]
    assert len(rows("many", tmp_path, split="test")) == 2
    assert "no split 'validation'; found: train, test" in message("many", tmp_path, split="validation")


def test_a_connection_lost_on_the_way_is_no_wrong_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        column_names = None

        def __iter__(self) -> Any:
            yield {"prompt": "a"}
            raise ConnectionError("Server Disconnected")

    monkeypatch.setattr(readers, "_open_hub", lambda datasets, name, source: {"train": Broken()})
    stream = read(SourceSpec(path="owner/name"), FIELDS, tmp_path)
    assert next(stream).where == "owner/name: split train, row 1"
    with pytest.raises(WorkError, match=r"^owner/name: the connection broke after row 1: Server Disconnected$"):
        next(stream)


OFFLINE = """
import json, shutil, socket, sys
from pathlib import Path

def refuse(*args):
    raise SystemExit(f"the network was used: {args}")

socket.socket.connect = refuse
socket.getaddrinfo = refuse
from moalign.config.card import SourceSpec
from moalign.data.readers import Field, read
from moalign.core.errors import RequestError

def tell(**source):
    try:
        return [row.values["prompt"] for row in read(SourceSpec(**source), [Field("prompt")], sys.argv[1])]
    except RequestError as error:
        return str(error)

missing = tell(path="owner/no-such-data")
# A cached data set is what an online run leaves behind: the built Arrow file under the commit's hash.
import datasets
cache = Path(datasets.config.HF_DATASETS_CACHE)
datasets.load_dataset("json", data_files=str(Path(sys.argv[1]) / "train.jsonl"))
built = next(cache.glob("json/default-*/0.0.0/*/dataset_info.json")).parent
kept = cache / "owner___name" / "default" / "0.0.0" / ("ab" * 20)
shutil.copytree(built, kept)
(kept / "json-train.arrow").rename(kept / "name-train.arrow")
info = json.loads((kept / "dataset_info.json").read_text())
(kept / "dataset_info.json").write_text(json.dumps(info | {"dataset_name": "name"}))
told = {
    "missing": missing,
    "cached": tell(path="owner/name"),
    "limited": tell(path="owner/name", limit=2),
    "right": tell(path="owner/name", revision="ab" * 20),
    "wrong": tell(path="owner/name", revision="v2"),
}
print(json.dumps(told))
"""


@pytest.mark.slow
def test_hub_ids_while_offline(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    folder = write_jsonl(RECORDS, "train.jsonl").parent
    home = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(tmp_path / "home" / "d")}
    command = [sys.executable, "-c", OFFLINE, str(folder)]
    done = subprocess.run(command, env=os.environ | home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    messages = json.loads(done.stdout.splitlines()[-1])
    prompts = [record["prompt"] for record in RECORDS]
    assert messages["missing"].startswith(
        "owner/no-such-data: this hub data set could not be reached (offline?), is not in the cache, and there is no "
        f"local file or folder {folder}/owner/no-such-data ("
    )
    assert messages["missing"].endswith(
        "to work offline, point path to a local file (.jsonl, .json, .csv, .jsonl.gz, .json.gz, .csv.gz, .parquet) "
        "or to a data set folder"
    )
    assert (messages["cached"], messages["limited"], messages["right"]) == (prompts, prompts[:2], prompts)
    # datasets by itself would have returned the cached copy of another revision.
    assert messages["wrong"] == (
        f"owner/name: revision 'v2' could not be fetched from the hub, and the cached copy is revision {'ab' * 20}; "
        "go online, or give a local file or folder as path"
    )
