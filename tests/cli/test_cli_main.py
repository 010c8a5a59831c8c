"""How a command ends: codes, messages, ``--debug``; and that nothing heavy is imported to say what there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moalign.cli import ls, output
from moalign.cli import main as cli
from moalign.core.errors import RequestError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "pandas", "datasets", "numpy", "peft", "trl", "pyarrow", "matplotlib")


def process(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, env=environment, timeout=60
    )


IMPORTED = """
import json, sys
from moalign.cli.main import main
code = main(sys.argv[1:])
print(json.dumps([code, sorted({name.partition('.')[0] for name in sys.modules})]), file=sys.stderr)
"""


def imported(*arguments: str, cwd: Path) -> tuple[int, set[str]]:
    ended = process(IMPORTED, *arguments, cwd=cwd)
    code, names = json.loads(ended.stderr.splitlines()[-1])
    return code, set(names)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["bench", "--help"], ["--version"]])
def test_help_and_version_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    code, names = imported(*arguments, cwd=tmp_path)
    assert code == 0
    assert names.isdisjoint(HEAVY)


def test_a_dry_run_imports_neither_torch_nor_pandas(tmp_path: Path) -> None:
    code, names = imported("train", "ric", "--dry-run", cwd=tmp_path)
    assert code == 0
    assert names.isdisjoint({"torch", "transformers", "pandas", "datasets"})
    assert list(tmp_path.iterdir()) == []


def test_the_calculator_imports_neither_torch_nor_pandas(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("a,b\n1,3\n2,2\n3,1\n")
    code, names = imported("eval", "--points", "p.csv", "--ref", "0,0", "--json", cwd=tmp_path)
    assert code == 0
    assert names.isdisjoint({"torch", "transformers", "pandas", "datasets"})


@pytest.mark.slow
def test_python_dash_m_names_the_program_and_ends_with_the_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moalign", "train", "ric", "--prefs", "3,7"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == "error: --prefs 3,7: the weights sum to 10, not 1; did you mean --prefs 0.3,0.7?\n"


@pytest.mark.slow
@pytest.mark.parametrize("shown", [["show", "ric"], ["show", "moc"], ["ls", "methods"]])
def test_a_reader_that_goes_away_gets_no_traceback(tmp_path: Path, shown: list[str]) -> None:
    code = f"import sys; from moalign.cli.main import main; sys.exit(main({shown}))"
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, cwd=tmp_path, env=environment, timeout=60
    )
    os.close(writing)
    assert ended.returncode == 1
    assert ended.stderr == b""


def test_version_is_looked_up_when_asked_for() -> None:
    import moalign

    assert moalign.__version__[0].isdigit()
    assert "__version__" in dir(moalign)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        moalign.nothing  # noqa: B018


def test_help_lists_every_verb(moalign: Any) -> None:
    ended = moalign("--help")
    assert ended.code == 0
    for verb in (
        "train",
        "eval",
        "compare",
        "generate",
        "score",
        "init",
        "ls",
        "show",
        "check",
        "preview",
        "bench",
        "model",
    ):
        assert f"\n  {verb} " in ended.out
    assert "--debug" in ended.out


def test_without_a_verb_the_help_is_a_usage_error(moalign: Any) -> None:
    ended = moalign()
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("error: a command is missing; allowed: train, eval")
    assert "Usage: moalign" in ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "ric"], "unknown command 'trian'; allowed: bench, check, compare, eval,"),
        (["trian", "ric"], "did you mean 'train'?"),
        (["train", "ric", "--pref", "1,0"], "unknown option --pref; did you mean '--prefs'?"),
        (["eval", "--hypervolum"], "unknown option --hypervolum; did you mean '--hypervolume'?"),
        (["ls", "runs", "--jsn"], "did you mean '--json'?"),
        (["--hepl"], "did you mean '--help'?"),
        (["train"], "missing argument 'METHOD' (see moalign train --help)"),
        (["score", "--task", "sandbox"], "missing option '--in'"),
        (["train", "ric", "--grid", "many"], "'--grid'"),
        (["train", "ric", "--seed", "-1"], "'--seed'"),
        (["ls", "methods", "runs"], "unexpected extra argument"),
    ],
)
def test_usage_errors_are_one_message_and_exit_2(moalign: Any, arguments: list[str], message: str) -> None:
    ended = moalign(*arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert message in ended.err
    assert len(ended.errors) == len(ended.err.splitlines()) == 1


def test_a_request_error_shows_every_problem_on_its_own_line(moalign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> list[dict[str, Any]]:
        raise RequestError("a.yaml:1: first", "a.yaml:2: second")

    monkeypatch.setattr(ls, "_methods", refuse)
    ended = moalign("ls", "methods")
    assert (ended.code, ended.out, ended.errors) == (2, "", ["a.yaml:1: first", "a.yaml:2: second"])


def test_an_error_that_quotes_a_long_text_leaves_out_its_middle(moalign: Any) -> None:
    ended = moalign("train", "ric", "--set", "x" * 5000)
    assert ended.code == 2
    (error,) = ended.errors
    assert len(error) < 2100
    assert error.startswith("--set xxx") and error.endswith("no '=' found; write --set key=value, like --set seed=3")
    assert "characters left out ...]" in error


def test_an_unexpected_error_is_one_line_naming_type_and_debug(moalign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault() -> list[dict[str, Any]]:
        raise LookupError("no\nsuch thing")

    monkeypatch.setattr(ls, "_methods", fault)
    ended = moalign("ls", "methods")
    assert ended.code == 1
    assert ended.err == "error: LookupError: no such thing; the same command with --debug shows where\n"
    for arguments in (["--debug", "ls", "methods"], ["ls", "--debug", "methods"], ["ls", "methods", "--debug"]):
        shown = moalign(*arguments)
        assert shown.code == 1
        assert "Traceback (most recent call last)" in shown.err
        assert shown.errors == ["LookupError: no such thing"]


def test_debug_after_two_dashes_is_text() -> None:
    assert cli._without_debug(["generate", "x", "--", "--debug"]) == (["generate", "x", "--", "--debug"], False)
    assert cli._without_debug(["--debug", "ls", "--", "a"]) == (["ls", "--", "a"], True)


def test_an_interruption_is_130_and_says_how_to_go_on(moalign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> list[dict[str, Any]]:
        raise KeyboardInterrupt

    monkeypatch.setattr(ls, "_methods", stop)
    ended = moalign("ls", "methods")
    assert ended.code == 130
    assert ended.err.splitlines() == ["interrupted; finished work is kept: the same command resumes from there"]


@pytest.mark.parametrize("name", ["x" * 300, "dangling", "loop", "~nobody-of-that-name/x", "caf\udce9"])
@pytest.mark.parametrize(
    "command",
    [
        "train prompting --task @ --dry-run",
        "train prompting --recipe @.yaml --dry-run",
        "train prompting --set task.model=./@ --dry-run",
        "eval @",
        "eval --points @ --hypervolume",
        "compare @",
        "generate @ --prefs 1,0 hello",
        "export @ --prefs 1,0 --out out",
        "show @",
        "check @",
        "preview --task @",
        "init made --model @",
        "init made --data @",
        "score --task sandbox --in @",
        "reward eval @",
        "reward train --pairs @ --model m",
    ],
)
def test_names_that_no_file_can_have_are_one_message(moalign: Any, command: str, name: str) -> None:
    """Longer than 255 bytes, links to nothing or to themselves, an unknown home folder, bytes that are no UTF-8."""
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    ended = moalign(*command.replace("@", name).split())
    assert (ended.code, ended.out, len(ended.errors)) == (2, "", 1), ended.err
    assert not Path("made").exists() and not Path("out").exists()


@pytest.mark.parametrize("name", ["x" * 300, "loop"])
def test_a_results_folder_that_cannot_be_made(moalign: Any, toys: None, name: str) -> None:
    Path("loop").symlink_to("loop")
    ended = moalign("train", "toy", "--results", name)
    assert (ended.code, len(ended.errors)) == (2, 1), ended.err
    assert name in ended.errors[0]


def test_an_empty_task_is_not_the_default_one(moalign: Any) -> None:
    for command in (("train", "prompting", "--dry-run"), ("compare",), ("preview",), ("reward", "train")):
        ended = moalign(*command, "--task", "")
        assert (ended.code, ended.out) == (2, ""), command
        assert "unknown task ''" in ended.errors[0]


@pytest.mark.slow
def test_libraries_are_told_to_be_quiet_unless_debugging(moalign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cli._QUIET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    moalign("ls", "recipes", "--debug")
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    moalign("ls", "recipes")
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"  # the user's own stays


def test_work_keeps_stdout_for_results(capsys: pytest.CaptureFixture[str]) -> None:
    with output.working():
        print("a library's chatter")
    output.as_json({"a": float("nan"), "b": "ü"})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": None, "b": "ü"}
    assert err == "a library's chatter\n"


def test_commands_to_paste_name_another_results_folder() -> None:
    assert output.command("eval", "a b") == "moalign eval 'a b'"
    assert output.command("eval", results=Path("/r")) == "moalign eval --results /r"
