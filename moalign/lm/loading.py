"""Shared by all code that loads a model: one message for any failure, and no output of the library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moalign.core.errors import MoalignError, RequestError, WorkError


def few(names: Sequence[str] | set[str]) -> str:
    """Return the first three names and how many more there are."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


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
        first = str(error).strip().partition("\n")[0]
        raise RequestError(
            f"{where}: model folder {folder} cannot be loaded: {type(error).__name__}: {first}"
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
