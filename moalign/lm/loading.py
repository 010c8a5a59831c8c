"""Shared by all code that loads a model: one message for any failure, and no output of the library."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moalign.core.errors import MoalignError, RequestError, WorkError


def few(names: Collection[str]) -> str:
    """Return the first three names and how many more there are."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def first_line(error: Exception) -> str:
    """Return the beginning of an error's text: libraries write pages."""
    return str(error).strip().partition("\n")[0][:200]


def from_folder(auto: Any, folder: Path, where: str, **options: Any) -> Any:
    """Load a model with a transformers ``Auto`` class: safetensors only, no remote code, nothing printed.

    Raises RequestError for a weight that is missing, of another model or of another shape, by transformers' own
    matching of names (tied weights are not missing). The library itself fills such weights with random numbers.
    """
    with quiet():
        model, report = auto.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    shapes = [f"{name} {list(file)} instead of {list(own)}" for name, file, own in report["mismatched_keys"]]
    problems = {
        "missing": report["missing_keys"] - {name for name, _, _ in report["mismatched_keys"]},
        "of another model": report["unexpected_keys"],
        "of another shape": shapes,
    }
    wrong = [f"{what}: {few(names)}" for what, names in problems.items() if names]
    if wrong:
        raise RequestError(f"{where}: its weights are not those of a {type(model).__name__} ({'; '.join(wrong)})")
    return model


@contextmanager
def explained(where: str, folder: Path) -> Iterator[None]:
    """Turn any exception of loading into one RequestError; running out of memory is a WorkError."""
    import torch

    try:
        yield
    except MoalignError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise WorkError(f"{where}: not enough memory to load {folder}: {error}") from error
    except Exception as error:
        raise RequestError(
            f"{where}: model folder {folder} cannot be loaded: {type(error).__name__}: {first_line(error)}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's load report and progress bar off the terminal: our messages say what is wrong."""
    import transformers

    logging: Any = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
