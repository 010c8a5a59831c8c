"""``import moalign``: examples that run, a light import, and the command line's own runs, errors and numbers."""

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


@pytest.mark.slow
def test_the_readme_s_block_runs(examples: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """As it stands there, but for the settings: fewer steps, and the examples' small card."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## From Python\n")[2].partition("\n## ")[0]
    assert len(section.splitlines()) <= 15
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    text, changed = re.subn(r"^settings = .*$", "settings = tiny", code[1], flags=re.MULTILINE)
    assert changed == 1
    monkeypatch.chdir(examples["folder"])
    names: dict[str, Any] = {"tiny": examples["tiny"]}
    exec(text, names)
    assert names["run"].reused
    assert sorted(names["table"]["label"]) == ["mo-odpo", "sft"]
    assert set(names["table"]["status"]) == {"done"}
    assert "optimal_share" in capsys.readouterr().out


# -- import ----------------------------------------------------------------------------------------------------------


def modules_after(code: str, folder: Path) -> set[str]:
    """Return the top-level modules that are loaded after ``code`` in a process of its own."""
    code += "\nimport json, sys\nprint(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    return set(json.loads(ended.stdout.splitlines()[-1]))


def test_importing_moalign_loads_nothing_heavy(tmp_path: Path) -> None:
    assert modules_after("import moalign; dir(moalign); moalign.__all__", tmp_path).isdisjoint(HEAVY)


def test_looking_up_a_function_or_an_error_loads_nothing_heavy(tmp_path: Path) -> None:
    code = "import moalign; [getattr(moalign, name) for name in moalign.__all__]"
    assert modules_after(code, tmp_path).isdisjoint(HEAVY)


def test_a_hypervolume_needs_no_model(tmp_path: Path) -> None:
    code = "import moalign; assert moalign.hypervolume([[1, 2]], [0, 0]) == 2"
    assert modules_after(code, tmp_path).isdisjoint({"torch", "transformers", "pandas", "pydantic"})


def test_every_public_name_is_listed_and_there() -> None:
    assert set(moalign.__all__) <= set(dir(moalign))
    assert all(getattr(moalign, name) is not None for name in moalign.__all__)
    assert [name for name in moalign.__all__ if callable(getattr(api, name, None)) and name.islower()] == FUNCTIONS
    assert sorted(api.__all__) == FUNCTIONS
    stub = ast.parse((ROOT / "moalign" / "__init__.py").read_text(encoding="utf-8"))
    typed = {alias.name for node in ast.walk(stub) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(moalign.__all__) - {"__version__"} <= typed  # what a type checker sees


def test_the_version_and_a_name_that_is_not_there() -> None:
    assert isinstance(moalign.__version__, str)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        moalign.trian  # noqa: B018


# -- what is given -------------------------------------------------------------------------------------------------


def test_the_examples_of_the_arguments_run() -> None:
    assert doctest.testmod(arguments).failed == 0


def test_the_python_line_of_the_command_contract() -> None:
    """``train(..., **settings)``, ``generate(run, prefs, prompts)``, ``hypervolume(points, ref, minimise=False)``."""
    assert moalign.hypervolume([[1, 3], [2, 2], [3, 1]], ref=[0, 0]) == 6
    assert moalign.hypervolume([[1, 3], [2, 2]], [4, 4], True) == 5
    assert list(inspect.signature(moalign.generate).parameters)[:3] == ["run", "prefs", "prompts"]
    with pytest.raises(moalign.RequestError, match=r"stpes.*steps"):
        moalign.train("sft", task="sandbox", stpes=3)


def test_settings_may_be_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    from moalign.experiment import train as workflow

    requests: list[workflow.TrainRequest] = []

    def stop(request: workflow.TrainRequest, *_: Any) -> None:
        requests.append(request)
        raise KeyboardInterrupt

    monkeypatch.setattr(workflow, "plan", stop)
    with pytest.raises(KeyboardInterrupt):
        moalign.train("moc", task="sandbox", prefs=(0.3, 0.7), seed=0, settings={"task.grid": 3}, steps=2, lr=0.1)
    assert requests[0].overrides == ("task.grid=3", "steps=2", "lr=0.1")


def test_settings_are_the_texts_of_set() -> None:
    nested = {"lr": 1e-5, "policy": {"lora": {"r": 4, "modules": ["q", "v"]}}, "task": {"template": {"words": None}}}
    assert arguments.setting_texts(nested) == (
        "lr=1e-05",
        "policy.lora.r=4",
        'policy.lora.modules=["q", "v"]',
        "task.template.words=null",
    )
    dotted = {"policy.lora.r": np.int64(4), "lr": np.float32(0.5), "task.model": Path("a b"), "text": "é: #\n😀"}
    texts = arguments.setting_texts(dotted)
    assert texts[:3] == ("policy.lora.r=4", "lr=0.5", 'task.model="a b"')
    from moalign.config import overrides

    assert [overrides.parse(text)[1] for text in texts] == [4, 0.5, "a b", "é: #\n😀"]
    assert arguments.setting_texts(["lr=1e-4"]) == ("lr=1e-4",)
    assert arguments.setting_texts("lr=1e-4") == ("lr=1e-4",)
    assert arguments.setting_texts(None) == arguments.setting_texts({}) == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({3: 1}, "settings: found the key 3; allowed: names"),
        ({"a=b": 1}, "settings: found the key 'a=b'"),
        ({"steps": object()}, "settings: steps: found object; allowed: numbers, texts"),
        ({"stpes": 3}, "--set stpes: unknown setting"),
        ({"": 3}, "--set =3: found an empty key"),
        ({"task": {"grdi": 3}}, "did you mean 'grid'?"),
        ({"steps": -1}, "--set steps"),
        ({"steps": "many"}, "--set steps"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[Any, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(moalign.RequestError) as caught:
        moalign.train("sft", settings=settings, results=tmp_path / "r")
    assert message in str(caught.value)
    assert not (tmp_path / "r").exists()


def test_a_vector_or_several_in_whatever_shape() -> None:
    for several in ([(0.3, 0.7), [1, 0]], np.array([[0.3, 0.7], [1.0, 0.0]]), ["0.3,0.7", "1,0"]):
        assert [tuple(map(float, text.split(","))) for text in arguments.vector_texts(several)] == [(0.3, 0.7), (1, 0)]
    for vector in ((0.3, 0.7), [0.3, 0.7], np.array([0.3, 0.7]), "0.3,0.7"):
        assert arguments.vector_texts(vector) == ("0.3,0.7",)
    assert arguments.vector_texts([1 / 3, 2 / 3]) == (f"{1 / 3!r},{2 / 3!r}",)
    assert arguments.vector_texts(None) == arguments.vector_texts([]) == ()


# -- the same as the command line ------------------------------------------------------------------------------------

WRONG: list[tuple[str, dict[str, Any], list[str]]] = [
    ("rick", {}, ["rick"]),
    ("sft", {"task": "sandbx"}, ["sft", "--task", "sandbx"]),
    ("sft", {"prefs": (3, 7)}, ["sft", "--prefs", "3,7"]),
    ("sft", {"prefs": [(0.2, 0.3, 0.5)]}, ["sft", "--prefs", "0.2,0.3,0.5"]),
    ("sft", {"prefs": [(0.5, "x")]}, ["sft", "--prefs", "0.5,x"]),
    ("sft", {"prefs": (0.5, 0.5), "grid": 3}, ["sft", "--prefs", "0.5,0.5", "--grid", "3"]),
    ("sft", {"settings": {"task": {"grid": 1}}}, ["sft", "--set", "task.grid=1"]),
    ("sft", {"settings": {"stpes": 3, "lr": -1}}, ["sft", "--set", "stpes=3", "--set", "lr=-1"]),
    ("sft", {"recipe": "no/such.yaml"}, ["sft", "--recipe", "no/such.yaml"]),
]


@pytest.mark.parametrize(("method", "given", "typed"), WRONG, ids=[" ".join(typed) for _, _, typed in WRONG])
def test_a_wrong_value_is_told_as_the_command_line_tells_it(
    method: str, given: dict[str, Any], typed: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(moalign.RequestError) as caught:
        moalign.train(method, **given)
    assert command(capsys, "train", *typed) == (2, "")
    errors = [line.removeprefix("error: ") for line in STDERR[0].splitlines()]
    assert errors == list(caught.value.problems)
    assert not list(tmp_path.iterdir())


STDERR = [""]
"""What the last command wrote to stderr."""


def command(capsys: Any, *arguments: str) -> tuple[int, str]:
    """Run a command in this process; returns its exit code and what it wrote to stdout."""
    from moalign.cli import main as cli

    before = dict(os.environ)
    capsys.readouterr()
    try:
        code = cli.main(arguments)
    finally:
        os.environ.clear()
        os.environ.update(before)
    out, STDERR[0] = capsys.readouterr()
    return code, out


@pytest.fixture
def trained(examples: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The run of the examples; the working directory is the folder that holds its results."""
    monkeypatch.chdir(examples["folder"])
    return moalign.load("mo-odpo/" + examples["run"].run_id[:6])


def test_the_command_finds_the_run_that_python_made(trained: Any, examples: dict[str, Any], capsys: Any) -> None:
    sets = [part for text in arguments.setting_texts(examples["tiny"]) for part in ("--set", text)]
    code, out = command(capsys, "train", "mo-odpo", *sets, "--json")
    content = json.loads(out)
    assert (code, content["found"], content["run_id"]) == (0, True, trained.run_id)
    assert content["evaluation"]["hypervolume"] == trained.evaluation.hypervolume


def test_evaluate_is_what_eval_prints(trained: Any, capsys: Any) -> None:
    result = moalign.evaluate(trained, prefs=[(1, 0), (0.25, 0.75)], reference_point=(-0.5, -0.5))
    options = ["--prefs", "1,0", "--prefs", "0.25,0.75", "--ref", "-0.5,-0.5"]
    code, out = command(capsys, "eval", str(trained.path), *options, "--json")
    assert (code, json.loads(out)) == (0, result.content)
    assert [point.preference for point in result.points] == [(1.0, 0.0), (0.25, 0.75)]
    assert result.reference_point == (-0.5, -0.5)
    assert result.points[0].mean == tuple(result.content["points"][0]["mean"])
    frame = result.to_frame()
    assert list(frame["preference"]) == [(1.0, 0.0), (0.25, 0.75)]
    assert frame["helpfulness"][0] == result.points[0].mean[0]
    assert (frame["helpfulness_low"] <= frame["helpfulness"]).all()


def test_every_run_is_checked_before_one_is_evaluated(trained: Any) -> None:
    before = sorted(trained.path.iterdir())
    with pytest.raises(moalign.RequestError, match="unknown run 'nothing'"):
        moalign.evaluate_all([trained, "nothing"], grid=5)
    with pytest.raises(moalign.RequestError, match="--ref 0,0,0: found 3 numbers; the task has 2 objectives"):
        moalign.evaluate(trained, grid=5, reference_point="0,0,0")
    with pytest.raises(moalign.RequestError, match="--prefs and --grid exclude each other"):
        moalign.evaluate(trained, grid=5, prefs=(1, 0))
    assert sorted(trained.path.iterdir()) == before
    assert len(moalign.evaluate_all([trained, str(trained.path)])) == 1


def test_the_stored_answers_are_those_that_were_scored(trained: Any) -> None:
    frame = trained.to_frame()
    assert "ids" not in frame.columns
    assert list(dict.fromkeys(frame["preference"])) == ["0,1", "0.5,0.5", "1,0"]
    means = frame.groupby("preference")[list(trained.objectives)].mean()
    for point, name in zip(trained.evaluation.points, ["0,1", "0.5,0.5", "1,0"], strict=True):
        assert means.loc[name].to_numpy() == pytest.approx(point.raw)
    scored = moalign.score("sandbox", list(frame["prompt"]), list(frame["response"]))
    assert scored == pytest.approx(frame[list(trained.objectives)].to_numpy())


@pytest.mark.slow
def test_generate_policy_and_command_give_the_same_answers(trained: Any, capsys: Any) -> None:
    prompts = ["how do i fix the roof today ?", "how do i clean the oven tonight ?"]
    answers = moalign.generate(trained, [(1, 0), (0.3, 0.7), (1, 0)], prompts, seed=5)
    assert [(answer.preference, answer.prompt) for answer in answers] == [
        (preference, prompt) for preference in ((1.0, 0.0), (0.3, 0.7)) for prompt in prompts
    ]
    policy = trained.policy((0.3, 0.7))
    assert policy.respond(prompts, seed=5) == [answer.response for answer in answers[2:]]
    assert policy.respond(prompts[0], seed=5) == [answers[2].response]
    code, out = command(
        capsys,
        "generate",
        str(trained.path),
        prompts[0],
        "--prefs",
        "1,0",
        "--prefs",
        "0.3,0.7",
        "--seed",
        "5",
        "--json",
    )
    content = json.loads(out)
    assert (code, content["prefs"]) == (0, [[1.0, 0.0], [0.3, 0.7]])
    assert [block[0]["response"] for block in content["answers"]] == [answers[0].response, answers[2].response]
    with pytest.raises(moalign.RequestError, match="PROMPT: prompt 2 is empty"):
        policy.respond(["a", " "])
    with pytest.raises(moalign.RequestError, match="the weights sum to 2, not 1"):
        trained.policy((1, 1))


def test_scores_in_normalised_units(trained: Any, examples: dict[str, Any]) -> None:
    """The units of the evaluation: a mean of scores is the mean of its point."""
    frame = trained.to_frame()
    scores = moalign.score(
        "sandbox", list(frame["prompt"]), list(frame["response"]), settings=examples["card"], normalised=True
    )
    assert scores.reshape(3, 8, 2).mean(axis=1) == pytest.approx(
        np.array([point.mean for point in trained.evaluation.points])
    )


def test_what_is_no_text_is_a_wrong_request() -> None:
    """An empty cell of a table is NaN in pandas."""
    from moalign.experiment.generate import checked

    with pytest.raises(moalign.RequestError, match=r"^PROMPT: prompt 2: found nan \(float\); a text is needed"):
        checked(["a", np.nan])  # type: ignore[list-item]
    with pytest.raises(moalign.RequestError, match=r"^response 1: found None \(NoneType\); a text is needed"):
        moalign.score("sandbox", ["a"], [None])  # type: ignore[list-item]


def test_scores_want_a_prompt_for_each_response() -> None:
    with pytest.raises(moalign.RequestError, match="found 1 prompt and 2 responses"):
        moalign.score("sandbox", ["a"], ["b", "c"])
    with pytest.raises(moalign.RequestError, match="found one text for the prompts and 1 response;"):
        moalign.score("sandbox", "a", ["b"])


def test_a_run_that_is_not_evaluated_says_so(trained: Any) -> None:
    (trained.path / "eval.json").rename("eval.json")
    try:
        assert trained.evaluation is None
        with pytest.raises(moalign.RequestError, match="it has no evaluation; evaluate it first: moalign eval"):
            trained.to_frame()
    finally:
        Path("eval.json").rename(trained.path / "eval.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"hyper', "eval.json:1: not JSON"), ("[]", "not an evaluation"), ('{"points": []}', "not an evaluation")],
)
def test_a_damaged_evaluation_is_one_message_everywhere(trained: Any, capsys: Any, text: str, message: str) -> None:
    path = trained.path / "eval.json"
    whole = path.read_bytes()
    path.write_text(text)
    try:
        for read in (lambda: trained.evaluation, trained.to_frame, lambda: moalign.evaluate(trained)):
            with pytest.raises(
                moalign.RequestError, match=rf"{message}.*evaluate again: moalign eval .*{trained.run_id}"
            ):
                read()
        for verb in ("show", "eval"):
            code, _ = command(capsys, verb, trained.run_id)
            assert code == 2
            assert message in STDERR[0] and "Traceback" not in STDERR[0]
        code, _ = command(capsys, "ls", "runs")
        assert code == 0 and message in STDERR[0]
    finally:
        path.write_bytes(whole)


def test_compare_takes_a_task_or_runs(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from moalign.comparison import compare as workflow

    requests: list[workflow.CompareRequest] = []
    monkeypatch.setattr(workflow, "compare", lambda request, progress: requests.append(request))
    moalign.compare()
    moalign.compare("sandbox-3", "sft", seeds=2, settings={"sft.steps": 3}, html="page.html")
    moalign.compare([trained, "abc"], task="sandbox")
    moalign.compare(trained)
    moalign.compare(Path("card.yaml"), ["sft", "ric"])
    assert [(request.task, tuple(request.methods or ()), tuple(request.runs)) for request in requests] == [
        (None, (), ()),
        ("sandbox-3", ("sft",), ()),
        ("sandbox", (), (str(trained.path), "abc")),
        (None, (), (str(trained.path),)),
        ("card.yaml", ("sft", "ric"), ()),
    ]
    assert (requests[1].overrides, requests[1].seeds, requests[1].html) == (("sft.steps=3",), 2, Path("page.html"))


def test_a_failed_entry_has_no_numbers() -> None:
    from moalign.comparison.result import CompareResult, Entry, RunSummary

    run = RunSummary(run="results/runs/sandbox/ric/0", run_id="0", seed=0, status="failed", command="moalign train ric")
    entry = Entry(method="ric", label="ric", status="failed", seeded=True, runs=[run])
    assert (entry.rank, entry.hypervolume, entry.interval, entry.cost) == (None, None, None, None)
    assert CompareResult.model_construct(entries=[entry]).to_frame()["hypervolume"].isna().all()
