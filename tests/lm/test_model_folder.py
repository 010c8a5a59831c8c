"""Model folders without torch: broken and missing files, fingerprints, hub ids while offline."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from moalign.core.errors import RequestError
from moalign.lm import model_folder


def write_safetensors(path: Path, numbers: int = 4) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * (4 * numbers))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "bert"}')
    (made / "tokenizer.json").write_text("{}")
    write_safetensors(made / "model.safetensors")
    return made


def check(folder: Path, *parts: str) -> None:
    with pytest.raises(RequestError) as caught:
        model_folder.require_complete(folder, "objective 'x'")
    for part in ("objective 'x'", str(folder), *parts):
        assert part in str(caught.value)


def test_whole_folder_passes(folder: Path) -> None:
    model_folder.require_complete(folder, "x")


@pytest.mark.parametrize("kept", [0, 5, 20, 60, -1])
def test_truncated_weights_are_named(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    check(folder, "model.safetensors", "copy it again")


def test_longer_or_garbled_weights_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    check(folder, "truncated or damaged")
    path.write_bytes((9).to_bytes(8, "little") + b"not json!")
    check(folder, "not a whole safetensors file")


def test_missing_parts_are_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    check(folder, "no tokenizer files")
    (folder / "model.safetensors").unlink()
    check(folder, "has no weights")
    (folder / "pytorch_model.bin").write_bytes(b"")
    check(folder, "pytorch_model.bin", "never loads", "safetensors")
    (folder / "config.json").unlink()
    check(folder, "no config.json")


@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_broken_config_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    check(folder, "config.json")


def test_shards_must_all_be_there(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    check(folder, names[1])
    write_safetensors(folder / names[1], 9)
    model_folder.require_complete(folder, "x")
    index.write_text("{}")
    check(folder, "index.json")


def test_fingerprint_follows_content_not_place(folder: Path, tmp_path: Path) -> None:
    first = model_folder.fingerprint(folder, "x")
    shutil.copytree(folder, tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("not read by the model")
    assert model_folder.fingerprint(tmp_path / "moved", "x") == first
    seen = {first}
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        path = tmp_path / "moved" / name
        path.write_bytes(path.read_bytes()[:-1] + b" ")
        seen.add(model_folder.fingerprint(tmp_path / "moved", "x"))
    assert len(seen) == 4


def test_folders_are_found_beside_the_card_and_hub_ids_are_told_apart(folder: Path, tmp_path: Path) -> None:
    assert model_folder.local_folder("model", tmp_path, "x") == folder
    assert model_folder.local_folder(str(folder), Path("/"), "x") == folder
    assert model_folder.local_folder("owner/name", tmp_path, "x") is None
    assert model_folder.local_folder("gpt2", tmp_path, "x") is None
    for path in ("./modle", "../x/model", "/no/such/model", "a/b/c", "models/my reward", "./" + "a" * 300):
        with pytest.raises(RequestError, match="there is no model folder"):
            model_folder.local_folder(path, tmp_path, "x")
    with pytest.raises(RequestError, match="is a file"):
        model_folder.local_folder("model/config.json", tmp_path, "x")


@pytest.mark.parametrize("config_only", [True, False])
def test_hub_id_while_offline_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, config_only: bool, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RequestError) as caught:
        model_folder.fetch("owner/reward-model", None, "objective 'x'", config_only)
    for part in ("objective 'x'", "'owner/reward-model'", "HF_HUB_OFFLINE is set", "local model folder"):
        assert part in str(caught.value)


def test_hub_failures_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def failing(error: Exception) -> None:
        def download(*_: object, **__: object) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    failing(errors.HFValidationError("Repo id must use\nmore"))
    with pytest.raises(RequestError, match=r"HFValidationError: Repo id must use\); check the id"):
        model_folder.fetch("owner/name", None, "x")
    failing(OSError("disk on fire"))
    with pytest.raises(RequestError, match="cannot be fetched .OSError: disk on fire"):
        model_folder.fetch("owner/name", None, "x")
    failing(errors.LocalEntryNotFoundError("gone"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(RequestError, match="no connection"):
        model_folder.fetch("owner/name", None, "x")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The files that are read to be hashed, where every file counts as large and each call is a new process."""
    names: list[str] = []

    def sha256(path: str) -> str:
        names.append(Path(path).name)
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()

    monkeypatch.setenv("MOALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model_folder, "LARGE", 100)
    monkeypatch.setattr(model_folder, "file_sum", sha256)
    monkeypatch.setattr(model_folder, "_file_hash", model_folder._file_hash.__wrapped__)
    return names


def test_the_hash_of_a_large_file_is_kept_for_the_next_process(folder: Path, read: list[str], tmp_path: Path) -> None:
    write_safetensors(folder / "model.safetensors", 40)
    first = model_folder.fingerprint(folder, "x")
    assert sorted(read) == ["config.json", "model.safetensors", "tokenizer.json"]
    read.clear()
    assert model_folder.fingerprint(folder, "x") == first
    assert sorted(read) == ["config.json", "tokenizer.json"]  # small ones are read again
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1] + b"1")
    read.clear()
    changed = model_folder.fingerprint(folder, "x")
    assert changed != first and "model.safetensors" in read
    for note in (tmp_path / "cache" / "hashes").glob("*.json"):
        note.write_text("[1]")  # damaged: made again
    read.clear()
    assert model_folder.fingerprint(folder, "x") == changed and "model.safetensors" in read


def test_a_relative_path_is_another_file_in_another_folder(
    folder: Path, read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_safetensors(folder / "model.safetensors", 40)
    other = shutil.copytree(folder, tmp_path / "elsewhere" / "model")
    content = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(content[:-1] + b"1")
    for place in (folder, other):  # of one size and time
        os.utime(place / "model.safetensors", ns=(10**18, 10**18))
    found = []
    for place in (folder, other):
        monkeypatch.chdir(place.parent)
        found.append(model_folder.fingerprint(Path("model"), "x"))
    assert found[0] != found[1]


def test_a_cache_that_cannot_be_written_costs_time_alone(folder: Path, read: list[str], tmp_path: Path) -> None:
    write_safetensors(folder / "model.safetensors", 40)
    (tmp_path / "cache").write_text("a file in the place of the folder")
    assert model_folder.fingerprint(folder, "x") == model_folder.fingerprint(folder, "x")
    assert read.count("model.safetensors") == 2
