"""Mutation testing: break the code in one place at a time and see whether the quick tests notice.

    python tests/mutation.py moalign/losses/dpo.py moalign/methods/moc.py --sample 40

Prints every mutant that survives as ``file:line  before  ->  after``, and counts. A file is judged by the test file of
its name (``--tests`` names others). The tree is copied, and every mutant runs in a fork of this process, which has the
heavy libraries loaded already. Not mutated are texts, messages of exceptions, annotations, and what stands in the body
of a class outside its methods (settings and their defaults): they are choices, not logic.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("numpy", "moocore", "scipy.stats", "hypothesis.extra.numpy", "pydantic", "pytest")
OF_TRAININGS = ("torch", "transformers", "datasets", "peft", "trl", "pandas", "safetensors.torch")
OTHERS: dict[type[ast.AST], tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
"""What an operator is replaced by."""


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in a node's place; ``pass`` where a statement is deleted."""
    match node:
        case ast.Compare(ops=[op], left=left, comparators=others):
            yield from (ast.Compare(left, [other()], others) for other in OTHERS[type(op)])
        case ast.BinOp(left=left, op=op, right=right):
            yield from (ast.BinOp(left, other(), right) for other in OTHERS.get(type(op), ()))
        case ast.BoolOp(op=op, values=values):
            yield from (ast.BoolOp(other(), values) for other in OTHERS[type(op)])
        case ast.UnaryOp(operand=operand) if not isinstance(operand, ast.Constant):  # -1 is mostly the last axis
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1))
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test) if not isinstance(test, ast.Compare):
            other = copy.copy(node)
            other.test = ast.UnaryOp(ast.Not(), test)
            yield other
        case ast.Call(func=func, args=[first, second, *rest], keywords=keywords):
            if ast.unparse(first) != ast.unparse(second):
                yield ast.Call(func, [second, first, *rest], keywords)
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Break():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Subscript() | ast.Attribute()]):
            yield ast.Pass()


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Yield every node that may be replaced below ``node``: its parent, the field, the place in a list, and itself."""
    if isinstance(node, ast.Raise | ast.JoinedStr):
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for number, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Import | ast.ImportFrom | ast.Assert):
                continue
            if isinstance(node, ast.ClassDef) and not isinstance(child, ast.FunctionDef):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            yield node, field, number, child
            yield from places(child)


def mutants(source: str) -> Iterator[tuple[int, str, str, str]]:
    """Yield line, code before, code after and the whole source of every mutant."""
    tree = ast.parse(source)
    for parent, field, number, child in list(places(tree)):
        for other in variants(child):
            value = getattr(parent, field)
            changed = other if number is None else [*value[:number], other, *value[number + 1 :]]
            setattr(parent, field, changed)
            text = ast.unparse(ast.fix_missing_locations(tree))
            setattr(parent, field, value)
            before, after = (ast.unparse(node).splitlines()[0] for node in (child, other))
            yield child.lineno, before, after, text


class CheapFirst:
    """A plugin of pytest: tests that train come last, so that most mutants die before them."""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Sort the tests, those that build a task behind all others."""
        items.sort(key=lambda item: bool({"small_task", "make_job"} & set(item.fixturenames)))


def passes(tree: Path, tests: list[str], seconds: float, first: bool = False) -> bool:
    """Whether the tests pass in a fork of this process; too slow counts as failing."""
    child = os.fork()
    if not child:
        os.setsid()
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        sys.dont_write_bytecode = not first  # the first run leaves everything compiled but the mutants
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        code = 1
        try:
            import pytest
            from hypothesis import settings

            settings.register_profile("mutants", max_examples=40, derandomize=True, database=None, deadline=None)
            settings.load_profile("mutants")
            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", str(tree / "tmp")]
            code = int(pytest.main([*options, *tests], plugins=[CheapFirst()]))
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def judge(tree: Path, file: str, tests: list[str], sample: int | None) -> tuple[int, int]:
    """Run the mutants of a file, or a random sample of them; returns how many were killed, and of how many."""
    source = (tree / file).read_text(encoding="utf-8")
    start = time.monotonic()
    assert passes(tree, tests, 600, first=True), f"{file}: its tests fail without any mutant"
    whole = time.monotonic() - start
    every = list(mutants(source))
    if sample is not None and sample < len(every):
        every = [every[i] for i in sorted(random.Random(0).sample(range(len(every)), sample))]
    killed = 0
    for line, before, after, text in every:
        (tree / file).write_text(text, encoding="utf-8")
        if passes(tree, tests, 3 * whole + 20):
            print(f"  {file}:{line}  {before}  ->  {after}", flush=True)
        else:
            killed += 1
    (tree / file).write_text(source, encoding="utf-8")
    print(f"{file}: {killed} of {len(every)} killed, {time.monotonic() - start:.0f} s", flush=True)
    return killed, len(every)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the mutants of some files against their quick tests.")
    parser.add_argument("files", nargs="+", help="below the root: moalign/losses/dpo.py")
    parser.add_argument("--tests", nargs="+", help="test files; else the one of the file's name")
    parser.add_argument("--sample", type=int, help="mutants of each file; else all")
    given = parser.parse_args()
    for name in LIBRARIES + (() if all("pareto" in file for file in given.files) else OF_TRAININGS):
        __import__(name)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for part in ("moalign", "tests", "recipes"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        counts = [
            judge(tree, file, given.tests or [f"tests/{Path(file).parent.name}/test_{Path(file).name}"], given.sample)
            for file in given.files
        ]
    killed, total = (sum(column) for column in zip(*counts, strict=True))
    print(f"{killed} of {total} killed ({killed / max(1, total):.1%})")


if __name__ == "__main__":
    main()
