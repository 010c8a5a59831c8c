"""Pickled weights are converted once, on request, and no code in them ever runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from moalign.config.objectives import ClassifierObjective
from moalign.core.errors import RequestError
from moalign.lm import conversion, language_model, model_folder, unpickle
from moalign.lm.language_model import LanguageModel
from moalign.rewards.hf_classifier import ClassifierScorer

ROOT = Path(__file__).resolve().parents[2]


class Runs:
    """Pickled as a call: whoever unpickles it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("MOALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(lm: LanguageModel, tmp_path: Path) -> Path:
    """A classifier's folder as it was saved before safetensors: one file of ``torch.save``."""
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    config = LlamaConfig(**{**lm.model.config.to_dict(), "num_labels": 2, "id2label": {0: "dull", 1: "funny"}})
    with torch.random.fork_rng():
        model = AutoModelForSequenceClassification.from_config(config)
    place = tmp_path / "old"
    model.save_pretrained(place)
    (place / "model.safetensors").unlink()
    lm.tokenizer.save_pretrained(place)
    torch.save(model.state_dict(), place / "pytorch_model.bin")
    return place


def scorer(folder: Path) -> ClassifierScorer:
    spec = {"name": "humor", "kind": "hf-classifier", "model": folder.name, "label": "funny", "template": "{response}"}
    return ClassifierScorer(ClassifierObjective.model_validate(spec), folder.parent)


def test_a_classifier_is_converted_once_and_then_used_by_its_old_name(folder: Path, cache: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RequestError, match="moalign model convert .*/old") as refused:
        scorer(folder)
    assert len(str(refused.value).splitlines()) == 1
    made = conversion.convert(str(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before  # nothing is written beside them
    assert (made.reused, Path(made.converted).parent) == (False, cache / "models")
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    kept = load_file(Path(made.converted) / "model.safetensors")
    assert kept.keys() == weights.keys() and made.tensors == len(kept)
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights.items())

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()  # the library itself unpickles
    inputs = AutoTokenizer.from_pretrained(folder)("make soup ?", return_tensors="pt")
    own = scorer(folder)
    assert own.score([""], ["make soup ?"]) == pytest.approx([model(**inputs).logits[0, 1].item()], abs=1e-5)

    assert conversion.convert(str(folder)).reused
    moved = folder.rename(folder.with_name("moved"))
    assert scorer(moved).revision == own.revision
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "id2label": {"0": "funny", "1": "dull"}}))
    with pytest.raises(RequestError, match="only pickled weights"):
        scorer(moved)


def test_tied_weights_in_several_files_load_bit_for_bit(random_base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    place, model = tmp_path / "base", AutoModelForCausalLM.from_pretrained(random_base)
    place.mkdir()
    for path in model_folder.beside(random_base):
        (place / path.name).write_bytes(path.read_bytes())
    state = model.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    parts = {"pytorch_model-1.bin": list(state)[:3], "pytorch_model-2.bin": list(state)[3:]}
    for name, keys in parts.items():
        torch.save({key: state[key] for key in keys}, place / name)
    index = {"metadata": {}, "weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (place / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    made = conversion.convert(str(place))
    assert len(model_folder.weight_files(Path(made.converted), "test")) == 2
    loaded = language_model.load(str(place), device="cpu")
    assert loaded.fingerprint == made.fingerprint
    assert all(torch.equal(loaded.model.state_dict()[name], tensor) for name, tensor in state.items())


# -- what is refused -------------------------------------------------------------------------------------


def zipped(content: bytes) -> bytes:
    """A file as torch.save writes it, with another pickle in it."""
    whole, changed = io.BytesIO(), io.BytesIO()
    torch.save({}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return changed.getvalue()


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(folder: Path, cache: Path, tmp_path: Path) -> None:
    content = pickle.dumps({"weight": Runs(tmp_path / "ran")}, protocol=2)
    (tmp_path / "plain.bin").write_bytes(content)
    with pytest.raises(pickle.UnpicklingError, match="posix.mkdir"):
        unpickle.read(tmp_path / "plain.bin")
    (folder / "pytorch_model.bin").write_bytes(zipped(content))
    with pytest.raises(RequestError) as refused:
        conversion.convert(str(folder))
    message = str(refused.value)
    assert "pytorch_model.bin: it needs posix.mkdir" in message and len(message.splitlines()) == 1
    assert not (tmp_path / "ran").exists()
    assert not [path for path in (cache / "models").iterdir() if path.suffix != ".lock"]
    with pytest.raises(RequestError, match="only pickled weights"):
        scorer(folder)


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


WHOLE = saved({"a": torch.arange(100.0)})
OLD = saved({"a": torch.arange(100.0)}, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"nothing", b"\x80\x02.", b"PK\x03\x04", zipped(b""), zipped(b"garbage")),
        *(WHOLE[:end] for end in (1, 40, len(WHOLE) // 2, len(WHOLE) - 1)),
        *(OLD[:end] for end in (1, 40, len(OLD) // 2, len(OLD) - 1)),
        *(saved(thing) for thing in ([torch.ones(2)], {}, torch.ones(2), {"a": 1}, {1: torch.ones(2)})),
        saved({"state_dict": {"a": torch.ones(2)}}),
        saved({"a": torch.ones(3, 3).to_sparse()}),
        saved({"a": torch.ones(1).expand(10**12)}),
        saved({"a": torch.ones(3, device="meta")}),
        saved(torch.nn.Linear(2, 2)),
    ],
)
def test_damaged_files_and_other_contents_have_one_short_reason(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(Exception) as refused:
        unpickle.read(tmp_path / "pytorch_model.bin")
    reason = unpickle._why(refused.value)
    assert len(reason) < 300 and len(reason.splitlines()) == 1
    assert "weights_only" not in reason  # torch's advice is to open the file all the same


def test_whole_files_of_both_formats_are_read(tmp_path: Path) -> None:
    for content in (WHOLE, OLD):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        assert torch.equal(unpickle.read(tmp_path / "pytorch_model.bin")["a"], torch.arange(100.0))


def test_views_become_weights_of_their_own(tmp_path: Path) -> None:
    square = torch.arange(9.0).reshape(3, 3)
    torch.save({"a": square, "b": square.T, "c": torch.nn.Parameter(square[1])}, tmp_path / "x.bin")
    kept = unpickle.read(tmp_path / "x.bin")
    assert torch.equal(kept["b"], square.T) and kept["b"].is_contiguous()
    assert len({tensor.untyped_storage().data_ptr() for tensor in kept.values()}) == 3
    assert kept["c"].untyped_storage().nbytes() == 12 and not kept["c"].requires_grad


def test_folders_that_need_or_allow_no_conversion(folder: Path, random_base: Path, tmp_path: Path) -> None:
    def refused(place: Path) -> str:
        with pytest.raises(RequestError) as caught:
            conversion.convert(str(place))
        return str(caught.value)

    assert "safetensors already; there is nothing to convert" in refused(random_base)
    assert "no such folder" in refused(tmp_path / "nowhere") and "hf download" in refused(tmp_path / "nowhere")
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert "no tokenizer files" in refused(folder)
    (tmp_path / "tokenizer.json").rename(folder / "tokenizer.json")
    (folder / "pytorch_model.bin").rename(tmp_path / "x.bin")
    assert "model.safetensors is missing" in refused(folder)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    assert "names '../x.bin'; names of .bin files beside it are needed" in refused(folder)
    index.write_text('{"weight_map": {}}')
    assert "names nothing" in refused(folder)
    for broken in ("{", "[]", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', "[" * 100_000):
        index.write_text(broken)
        assert "pytorch_model.bin.index.json cannot be read" in refused(folder)
        with pytest.raises(RequestError):
            scorer(folder)
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder)


# -- what stands behind the unpickler -------------------------------------------------------------------

ATTACKS = """
import os, socket, subprocess, sys, urllib.request
from moalign.lm import unpickle
sys.addaudithook(unpickle._guard)
attacks = [
    lambda: socket.socket(),
    lambda: socket.getaddrinfo("localhost", 80),
    lambda: urllib.request.urlopen("http://localhost"),
    lambda: os.system("true"),
    lambda: subprocess.run(["true"]),
    lambda: os.fork(),
    lambda: os.mkdir("made"),
    lambda: open("made", "w"),
    lambda: os.open("made", os.O_CREAT | os.O_WRONLY),
    lambda: __import__("ctypes").CDLL("libc.so.6"),
]
for number, attack in enumerate(attacks):
    try:
        attack()
    except RuntimeError as error:
        assert str(error).startswith("it tried"), error
    else:
        sys.exit(f"attack {number} was let through")
open(unpickle.__file__).close()
"""


def test_code_that_got_around_it_reaches_no_network_process_or_file(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ATTACKS], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_nothing_else_unpickles() -> None:
    ways = re.compile(r"torch\.load\(|\b(import|from) (pickle|dill|cloudpickle|joblib|shelve)\b|allow_pickle=True")
    files = [path for path in (ROOT / "moalign").rglob("*.py") if ways.search(path.read_text(encoding="utf-8"))]
    assert files == [ROOT / "moalign" / "lm" / "unpickle.py"]
