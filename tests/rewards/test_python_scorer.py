"""Python objectives: dotted paths, entry points, options, error messages."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moalign.config.objectives import PythonObjective
from moalign.core.errors import RequestError
from moalign.rewards import python_scorer
from moalign.rewards.python_scorer import GROUP, PythonScorer
from moalign.rewards.scorer import ScorerFault

MODULE = """
def count(prompts, responses, word="a"):
    return [float(r.count(word)) for r in responses]

class Scale:
    def __call__(self, prompts, responses, **options):
        return [2.0 for _ in prompts]

scale = Scale()
number = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path, modules = list(sys.path), set(sys.modules)
    (tmp_path / "my_test_rewards.py").write_text(MODULE)
    (tmp_path / "my_broken_rewards.py").write_text("raise OSError('no lexicon')")
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith(("my_test", "my_broken")):
            del sys.modules[name]


def build(folder: Path, function: str, **more: object) -> PythonScorer:
    return PythonScorer(
        PythonObjective.model_validate({"name": "x", "kind": "python", "function": function, **more}), folder
    )


def test_module_beside_the_card_with_options(folder: Path) -> None:
    scorer = build(folder, "my_test_rewards:count", options={"word": "b"})
    assert list(scorer.score(["p", "p"], ["abb", "a"])) == [2.0, 0.0]
    assert not scorer.cheap
    assert build(folder, "my_test_rewards:count", store=False).cheap


def test_a_file_is_named_by_its_path_and_each_folder_has_its_own(folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    (folder / "scorers.py").write_text(
        "HALF = 0.5\ndef size(prompts, responses):\n    return [HALF] * len(responses)\n"
    )
    (other / "scorers.py").write_text("HALF = 2.5\ndef size(prompts, responses):\n    return [HALF] * len(responses)\n")
    first, second = build(folder, "scorers.py:size"), build(folder, f"{other}/scorers.py:size")
    assert (list(first.score(["p"], ["r"])), list(second.score(["p"], ["r"]))) == ([0.5], [2.5])
    assert first.revision.startswith("python:scorers.py:size:")
    assert first.revision != second.revision  # the function's own lines are the same, the file is not


def test_a_file_that_fails_is_told_with_its_line_however_it_is_named(folder: Path) -> None:
    (folder / "task").mkdir()
    (folder / "scorers.py").write_text("def size(prompts, responses):\n    raise ValueError('no')\n")
    for scorer in (build(folder, "scorers.py:size"), build(folder / "task", "../scorers.py:size")):
        with pytest.raises(ScorerFault, match=r"ValueError: no \(line 2\)"):
            scorer.score(["p"], ["r"])


@pytest.mark.parametrize("called", ["scorers.py:nice", "my_test_scorers:nice"])
def test_neighbours_of_one_name_are_each_folders_own(folder: Path, called: str) -> None:
    """At the import and later, inside a function; a module of the environment is everybody's."""
    file = called.partition(":")[0].removesuffix(".py") + ".py"
    scorers = []
    for name, word in (("a", "good"), ("b", "bad")):
        place = folder / name
        (place / "my_test_parts").mkdir(parents=True)
        (place / "my_test_lexicon.py").write_text(f"WORDS = {{{word!r}}}\n")
        (place / "my_test_parts" / "more.py").write_text(f"NAME = {name!r}\n")
        (place / file).write_text(
            "import json\nfrom my_test_lexicon import WORDS\n"
            "def nice(prompts, responses):\n"
            "    from my_test_lexicon import WORDS as again\n"
            "    from my_test_parts.more import NAME\n"
            f"    assert again is WORDS and NAME == {name!r}\n"
            "    return [sum(word in WORDS for word in text.split()) for text in responses]\n"
        )
        scorers.append(build(place, called))
    for _ in range(2):
        assert [list(scorer.score(["p"] * 2, ["good good", "bad"])) for scorer in scorers] == [[2, 0], [0, 1]]
    assert not [name for name in sys.modules if name.startswith("my_test")]
    assert not [place for place in sys.path if place.startswith(str(folder))]


def test_an_edited_partial_has_another_revision(folder: Path) -> None:
    file = folder / "my_test_partial.py"
    text = (
        "import functools\ndef f(p, r, weight):\n    return [weight] * len(r)\nnice = functools.partial(f, weight={})\n"
    )
    revisions, scores = set(), []
    for weight in (1, 5):
        file.write_text(text.format(weight))
        python_scorer._NEIGHBOURS.clear()  # as in another process
        scorer = build(folder, "my_test_partial:nice")
        revisions.add(scorer.revision)
        scores += list(scorer.score(["p"], ["r"]))
    assert len(revisions) == 2 and scores == [1, 5]


def test_callable_object_with_open_options(folder: Path) -> None:
    assert list(build(folder, "my_test_rewards:scale", options={"any": 1}).score(["p"], ["r"])) == [2.0]


def test_installed_function_by_dotted_attribute(folder: Path) -> None:
    with pytest.raises(RequestError, match="does not take"):
        build(folder, "pathlib:Path.cwd", options={"x": 1})


def test_entry_point(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        importlib.metadata.EntryPoint("polite", "my_test_rewards:count", GROUP),
        importlib.metadata.EntryPoint("broken", "my_broken_rewards:f", GROUP),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == GROUP else [])
    monkeypatch.syspath_prepend(str(folder))
    assert list(build(folder, "polite").score(["p"], ["aa"])) == [2.0]
    with pytest.raises(RequestError, match="unknown function 'polit'.*broken, polite; did you mean 'polite'"):
        build(folder, "polit")
    with pytest.raises(RequestError, match="'broken'.*cannot be loaded: OSError: no lexicon"):
        build(folder, "broken")


@pytest.mark.parametrize(
    ("function", "options", "parts"),
    [
        ("my_test_rewards:cuont", {}, ["has no 'cuont'", "did you mean 'count'?"]),
        ("my_test_rewards:number", {}, ["is a int, which cannot be called"]),
        ("no_such_module_here:f", {}, ["'no_such_module_here'", "cannot be imported", "Python path"]),
        ("my_test_rewards.deeper:f", {}, ["cannot be imported"]),
        ("my_broken_rewards:f", {}, ["failed: OSError: no lexicon"]),
        ("my_test_rewards:", {}, ["package.module:callable"]),
        ("no_colon_here", {}, ["none installed", "package.module:callable"]),
        ("my_test_rewards:count", {"wrod": "b"}, ["'wrod'", "did you mean 'word'?"]),
    ],
)
def test_wrong_functions_are_named(folder: Path, function: str, options: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        build(folder, function, options=options)
    for part in ["objective 'x'", *parts]:
        assert part in str(caught.value)


def test_revision_follows_options_declared_revision_and_source(folder: Path) -> None:
    first = build(folder, "my_test_rewards:count").revision
    assert build(folder, "my_test_rewards:count").revision == first
    changed = {
        first,
        build(folder, "my_test_rewards:count", options={"word": "b"}).revision,
        build(folder, "my_test_rewards:count", revision="2").revision,
    }
    (folder / "my_test_rewards.py").write_text(MODULE.replace("float(r.count(word))", "float(len(r))"))
    python_scorer._NEIGHBOURS.clear()  # as in another process
    changed.add(build(folder, "my_test_rewards:count").revision)
    assert len(changed) == 4
