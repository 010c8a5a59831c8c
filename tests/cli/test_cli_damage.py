"""A results folder in which something is damaged, unreadable or read-only: each command as typed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

DAMAGE: dict[str, bytes | None] = {
    "empty": b"",
    "null": b"null",
    "a list": b"[1, 2]",
    "an object": b"{}",
    "nested deeply": b"[" * 100_000,
    "nested, valid": b'{"a":' * 800 + b"1" + b"}" * 800,
    "a long number": b'{"version": ' + b"9" * 5000 + b"}",
    "binary": bytes(range(256)) * 4,
    "a folder": None,
}


def damage(path: Path, kind: str) -> None:
    """Put something else in the place of ``path``; ``half``: keep the first half, ``dangling``: a link to nothing."""
    content = path.read_bytes() if path.is_file() else b""
    path.unlink(missing_ok=True)
    if kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "a loop":
        path.symlink_to(path.name)
    elif kind == "half":
        path.write_bytes(content[: len(content) // 2])
    elif (new := DAMAGE[kind]) is None:
        path.mkdir()
    else:
        path.write_bytes(new)


KINDS = [*DAMAGE, "half", "dangling", "a loop"]
FILES = ["run.json", "eval.json", "responses.parquet", "metrics.jsonl", ".lock", ".owner.json"]
COMMANDS = {
    "ls": ("ls", "runs"),
    "show": ("show", "BAD"),
    "eval": ("eval", "BAD"),
    "eval newest": ("eval",),
    "generate": ("generate", "BAD", "hello ?", "--prefs", "1,0"),
    "export": ("export", "BAD", "--prefs", "1,0", "--out", "out"),
    "compare": ("compare", "BAD", "GOOD"),
    "compare task": ("compare", "--methods", "toy,fixed-toy", "--grid", "3"),
    "train": ("train", "fixed-toy", "--grid", "3"),
}


@pytest.mark.parametrize("name", FILES)
def test_damage(moalign: Any, toys: None, name: str) -> None:
    runs = {}
    for method in ("toy", "fixed-toy"):
        ended = moalign("train", method, "--grid", "3", "--json")
        assert ended.code == 0, ended.err
        runs[method] = json.loads(ended.out)
    bad, good = Path(runs["fixed-toy"]["run"]), Path(runs["toy"]["run"])
    shutil.copytree("results", "sound")
    names = {"BAD": bad.name, "GOOD": good.name}
    for kind in KINDS:
        for label, command in COMMANDS.items():
            shutil.rmtree("results")
            shutil.copytree("sound", "results")
            damage(bad / name, kind)
            ended = moalign(*(names.get(word, word) for word in command))
            flag = "  " if ended.code in (0, 2) and "with --debug" not in ended.err else "!!"
            os.write(2, f"{flag} {name} | {kind} | {label} | {ended.code} | {ended.err[-900:]!r}\n".encode())
            shutil.rmtree("out", ignore_errors=True)
