"""Model folders: located, checked and fingerprinted without importing torch.

Nothing is ever unpickled: weights must be safetensors, whose header tells the file's exact size. A folder whose weights
are pickled only stands for what :mod:`moalign.lm.conversion` made of it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moalign.core.errors import MoalignError, RequestError, did_you_mean
from moalign.core.paths import cache_root
from moalign.lm import builtin
from moalign.lm.loading import first_line
from moalign.runs import atomic
from moalign.runs.checkpoint import file_sum

LARGE = 2**30
"""Bytes of a file from which on its hash is kept."""
_TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "*.vocab", "bpe.codes", "*.bpe")
"""One of these must be there: without them the library silently makes up an empty tokenizer."""
_READ = (
    "config.json",
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    *_TOKENIZER_FILES,
)
"""What can change a score, beside the weights."""
_BESIDE = ["*.json", "*.jinja", "*.txt", "*.model", "*.bpe", "*.tiktoken", "*.vocab"]
_FETCHED = [*_BESIDE, "model*.safetensors"]
_PICKLE = "pytorch_model.bin"
_CONVERSION = 1
"""Raise it when a conversion gives other files than before: it is part of the cached folder's name."""
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


def local_folder(model: str, base_dir: Path, where: str) -> Path | None:
    """Return the folder that ``model`` names, or None when it can only be a hub id.

    A relative path is looked up from ``base_dir`` (the task card's folder), then from the current folder; then it may
    be the name of a built-in model, whose folder is made at its first use. Of a folder whose pickled weights were
    converted it is the converted one. Raises RequestError for a file, and for a path (``./x``, ``/x``, ``a/b/c``) that
    does not exist.
    """
    path = Path(os.path.expanduser(model))
    for candidate in [path] if path.is_absolute() else [base_dir / path, path]:
        if os.path.isdir(candidate):  # a Path's own raises for a name that is too long
            folder = candidate.resolve()
            return converted(folder) or folder
        if os.path.lexists(candidate):
            what = "a file" if os.path.exists(candidate) else "a link to nothing"
            raise RequestError(f"{where}: model {model!r} is {what}; a model folder or a hub id is needed")
    if model in builtin.MODELS:
        return builtin.ensure(model, where)
    if not _HUB_ID.match(model):
        raise RequestError(
            f"{where}: there is no model folder {model!r} (looked in {base_dir} and the current folder), and it is not "
            f"of the form owner/name of a hub id{near(model)}"
        )
    return None


def near(model: str) -> str:
    """Return a hint when ``model`` is a reward model's place, or looks like a mistyped built-in name.

    A name with an owner is a hub id.
    """
    if "reward-models" in Path(model).parts:
        return "; moalign reward train makes it: the card says of what"
    return "" if "/" in model else did_you_mean(model, list(builtin.MODELS))


def resolve(model: str, revision: str | None, where: str) -> Path:
    """Return a model's checked local folder: as given, a built-in model's, or a hub id's in the library's cache.

    A relative path is relative to the current folder. Raises RequestError when it is not there or not complete.
    """
    folder = local_folder(model, Path.cwd(), where) or fetch(model, revision, where)
    require_complete(folder, where)
    return folder


def read_config(folder: Path, where: str) -> dict[str, Any]:
    """Return the folder's config.json; raises RequestError when it is missing or not a JSON object."""
    path = folder / "config.json"
    try:
        config = atomic.parsed_json(path.read_bytes())
    except FileNotFoundError:
        raise RequestError(f"{where}: {folder} is not a model folder: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"{where}: {path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise RequestError(f"{where}: {path} holds a {type(config).__name__}; a JSON object is needed")
    return config


def further_ends(folder: Path, where: str) -> list[int]:
    """Return the ids that end an answer by generation_config.json alone; config.json's are in the fingerprint."""
    try:
        told = atomic.parsed_json((folder / "generation_config.json").read_bytes())
    except (OSError, ValueError):  # the library does without it, too
        return []
    ids = told.get("eos_token_id") if isinstance(told, dict) else None
    known = read_config(folder, where).get("eos_token_id")
    return sorted(set(_listed(ids)) - set(_listed(known)))


def _listed(ids: Any) -> list[int]:
    return [each for each in (ids if isinstance(ids, list) else [ids]) if isinstance(each, int)]


def require_complete(folder: Path, where: str) -> None:
    """Raise RequestError unless the folder has a config, whole safetensors weights and a tokenizer."""
    read_config(folder, where)
    for path in weight_files(folder, where):
        header(path, where)
    require_tokenizer(folder, where)


def require_tokenizer(folder: Path, where: str) -> None:
    """Raise RequestError unless the folder has files of a tokenizer."""
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise RequestError(
            f"{where}: model folder {folder} has no tokenizer files (such as tokenizer.json); save the tokenizer "
            "beside the weights with tokenizer.save_pretrained(folder)"
        )


def weight_files(folder: Path, where: str) -> list[Path]:
    """Return the safetensors files of a model folder, all of them present; raises RequestError otherwise."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        try:
            names = sorted({str(name) for name in atomic.parsed_json(index.read_bytes())["weight_map"].values()})
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise RequestError(f"{where}: {index} cannot be read: {type(error).__name__}: {error}") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise RequestError(f"{where}: model folder {folder} lacks the weight files {', '.join(missing)}")
        return [folder / name for name in names]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        known = (folder / _PICKLE).is_file() or (folder / f"{_PICKLE}.index.json").is_file()
        convert = f"convert them once, without running any: moalign model convert {shlex.quote(str(folder))} (or "
        raise RequestError(
            f"{where}: model folder {folder} has only pickled weights ({', '.join(pickles)}), which moalign never "
            f"loads because they can run code; {convert if known else ''}save the model as safetensors "
            f"(model.save_pretrained(folder)){')' if known else ''}"
        )
    hub = "; pickled ones are not fetched: hf download OWNER/NAME --local-dir FOLDER, then moalign model convert FOLDER"
    more = hub if folder.parent.name == "snapshots" else ""
    raise RequestError(f"{where}: model folder {folder} has no weights: model.safetensors is missing{more}")


def pickled(folder: Path) -> list[Path]:
    """Return the pickled weights of a folder that has no others, in order; empty where it has none, or safetensors.

    Weights in several files are led by their index; ValueError for one that is damaged or names other files than those
    of the folder.
    """
    index = folder / f"{_PICKLE}.index.json"
    if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
        return []
    if (folder / _PICKLE).is_file():
        return [folder / _PICKLE]
    if not index.is_file():
        return []
    try:
        names = sorted(set(atomic.parsed_json(index.read_bytes())["weight_map"].values()))
        wrong = [name for name in names if Path(name).name != name or not name.endswith(".bin")]
        wrong += [name for name in names if not (folder / name).is_file()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} cannot be read: {type(error).__name__}: {first_line(error)}") from error
    if wrong or not names:
        raise ValueError(
            f"{index} names {repr(wrong[0]) if wrong else 'nothing'}; names of .bin files beside it are needed"
        )
    return [index, *(folder / name for name in names)]


def beside(folder: Path) -> list[Path]:
    """Return the files of a model folder that belong to the model beside its weights, in order."""
    paths = {path for pattern in {*_BESIDE, *_READ} for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in paths if not path.name.endswith(".index.json"))


def conversion(folder: Path, weights: Iterable[Path]) -> Path:
    """Return where the conversion of a folder's pickled weights is kept: by the content of all its files."""
    return cache_root() / "models" / f"converted-{_digest({*beside(folder), *weights})}-{_CONVERSION}"


def converted(folder: Path) -> Path | None:
    """Return the folder in the cache with a folder's converted weights; None where it needs or has no conversion."""
    try:
        weights = pickled(folder)
        place = conversion(folder, weights) if weights else None
    except (OSError, ValueError):
        return None  # it was not converted, and where it is to be, the problem is reported
    return place if place is not None and place.is_dir() else None


def shapes(folder: Path, where: str) -> dict[str, list[int]]:
    """Return the shape of every weight of a model folder, from the headers of its files."""
    return {name: shape for path in weight_files(folder, where) for name, shape in header(path, where).items()}


def header(path: Path, where: str) -> dict[str, list[int]]:
    """Return the shape of every tensor of a safetensors file; raises RequestError unless the file is whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        why = f"{path.name} is not a whole safetensors file ({os.path.getsize(path)} bytes; {first_line(error)})"
        raise RequestError(f"{where}: {path} is truncated or damaged: {why}; copy it again") from error


def fingerprint(folder: Path, where: str) -> str:
    """Return 16 hex digits over config, tokenizer and weights: moving the folder keeps it, any change changes it.

    A built-in model has one of its own as long as its weights are the known ones.
    """
    known = builtin.of_folder(folder)
    if known is not None and [_hash(path) for path in weight_files(folder, where)] == [known.weights]:
        return known.fingerprint
    paths = {path for pattern in _READ for path in folder.glob(pattern) if path.is_file()}
    return _digest({*paths, *weight_files(folder, where)})


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.name}\0{_hash(path)}\n".encode())
    return digest.hexdigest()[:16]


def _hash(path: Path) -> str:
    state = path.stat()
    return _file_hash(str(path), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _file_hash(path: str, size: int, changed: int) -> str:
    """Hash a file; size and time are only there so that a file is read once per process unless it changes.

    Of a large one the hash is kept in moalign's cache, for as long as size and time stay.
    """
    if size < LARGE:
        return file_sum(path)
    whole = os.path.abspath(path)  # a relative one means another file in another folder
    note = cache_root() / "hashes" / f"{hashlib.sha256(whole.encode()).hexdigest()[:16]}.json"
    state = {"path": whole, "size": size, "changed_ns": changed}
    try:
        kept = json.loads(note.read_text(encoding="utf-8"))
        if {**kept, **state} == kept and len(kept["sha256"]) == 64:
            return str(kept["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or not one of ours: it is made again
    found = file_sum(path)
    with contextlib.suppress(OSError, MoalignError):  # a cache that cannot be written costs time, nothing else
        note.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(note, {**state, "sha256": found})
    return found


def fetch(model: str, revision: str | None, where: str, config_only: bool = False) -> Path:
    """Return the local folder of a hub model, downloading what is not in the library's cache.

    ``config_only`` fetches config.json alone: enough to check labels before any work begins. Raises RequestError when
    offline, for an unknown id or revision, or when access is denied.
    """
    from huggingface_hub import constants, errors, snapshot_download

    name, folder_instead = f"{where}: hub model {model!r}", "name a local model folder instead"
    patterns = ["config.json"] if config_only else _FETCHED
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no connection"
        raise RequestError(
            f"{name} is not in the local cache and the hub cannot be reached ({why}), and there is no folder of that "
            f"name; {folder_instead}: model: path/to/folder{near(model)}"
        ) from error
    except errors.GatedRepoError as error:
        raise RequestError(f"{name} is gated: accept its terms and log in, or name a folder") from error
    except errors.RevisionNotFoundError as error:
        raise RequestError(f"{name} has no revision {revision!r}") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise RequestError(
            f"{name} cannot be fetched ({why}); check the id, or {folder_instead}{near(model)}"
        ) from error
