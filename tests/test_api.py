"""``import moalign``: examples that run, nothing heavy at import, and the command line's own runs, errors and numbers."""

from __future__ import annotations

import ast
import doctest
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moalign
from moalign import api
from moalign.experiment import arguments

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "pandas", "numpy", "pydantic", "typer", "rich", "peft", "trl", "pyarrow", "moocore"}
FUNCTIONS = sorted(name for name in moalign.__all__ if name.islower() and not name.startswith("_"))


# -- the examples ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the examples of the module and of its functions in a folder of their own; returns the names they made.

    They share one run, which the module's own example trains.
    """
    before, folder = Path.cwd(), tmp_path_factory.mktemp("examples")
    names: dict[str, Any] = {"Path": Path}
    failures: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    os.chdir(folder)
    try:
        for name in ("", *FUNCTIONS):
            text = inspect.getdoc(getattr(api, name) if name else api)
            example = doctest.DocTestParser().get_doctest(text or "", {}, name or "moalign.api", None, None)
            assert example.examples, f"{name} has no example"
            example.globs = names
            runner.run(example, out=failures.append, clear_globs=False)
    finally:
        os.chdir(before)
    assert not failures, "".join(failures)
    return {**names, "folder": folder}


def test_the_examples_of_every_function_run(examples: dict[str, Any]) -> None:
    assert examples["run"].status == "done"
