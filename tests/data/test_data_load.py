"""Prompts, responses and pairs of a task; the import stays light; the real data reads."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moalign.config.card import DataSpec, SourceSpec, SplitSpec
from moalign.core.errors import RequestError
from moalign.core.records import LoggedResponse, Pair
from moalign.data.dialogue import ASSISTANT, HUMAN
from moalign.data.load import load_grouped_pairs, load_pairs, load_prompts, load_responses
from moalign.data.splits import check_leaks, normalised, split

WriteJsonl = Callable[..., Path]
TALK = f"{HUMAN} Hi 😀{ASSISTANT}"


def source(path: Path, **options: Any) -> SourceSpec:
    return SourceSpec(path=str(path), **options)


def refusal(call: Callable[[], object], folder: Path | None = None) -> str:
    with pytest.raises(RequestError) as caught:
        call()
    text = str(caught.value)
    return text.removeprefix(f"{folder}/") if folder else text


# Prompts


def test_listed_prompts_keep_their_order_and_come_once() -> None:
    assert load_prompts(DataSpec(prompts=["b", "a 😀", "b", "B", "b"])) == ["b", "a 😀", "B"]


def test_prompts_of_a_source(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([{"question": "q1"}, {"question": "q2"}, {"question": "q1"}])
    spec = DataSpec(prompts=SourceSpec(path="data.jsonl", columns={"prompt": "question"}))
    assert load_prompts(spec, path.parent) == ["q1", "q2"]


def test_prompts_of_preference_dialogues(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([{"chosen": TALK + " Hello.", "rejected": TALK + " No."}, {"prompt": "plain"}])
    assert load_prompts(DataSpec(prompts=source(path))) == [TALK, "plain"]


def messages(*texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]


def test_prompts_beside_dialogues_that_are_lists_of_messages(write_jsonl: WriteJsonl) -> None:
    # UltraFeedback's layout: where there is a prompt, the dialogues are not looked at.
    path = write_jsonl(
        [{"prompt": q, "chosen": messages(q, "Yes."), "rejected": messages(q, "No.")} for q in ("q1", "q2", "q1")]
    )
    assert load_prompts(DataSpec(prompts=source(path))) == ["q1", "q2"]


@pytest.mark.parametrize("prompt", [{}, {"prompt": None}])
def test_without_a_prompt_the_dialogues_must_be_text(write_jsonl: WriteJsonl, prompt: dict[str, None]) -> None:
    dialogues = {"chosen": messages("q", "Yes."), "rejected": messages("q", "No.")}
    path = write_jsonl([{"prompt": "q", **dialogues}, {**prompt, **dialogues}])
    assert refusal(lambda: load_prompts(DataSpec(prompts=source(path))), path.parent).startswith(
        "data.jsonl:2: column 'chosen' must be text; found a list [{'role': 'user', 'content': 'q'}, "
    )


def test_a_wrong_prompt_column_names_the_nearest(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([{"promts": "a"}])
    assert refusal(lambda: load_prompts(DataSpec(prompts=source(path))), path.parent) == (
        "data.jsonl:1: no column 'prompt'; found: promts; did you mean 'promts'? "
        "(rename it, or where a task card names this file: columns: {prompt: promts})"
    )


@pytest.mark.parametrize(
    ("record", "wrong"),
    [
        ({"prompt": None}, "column 'prompt' must be text; found nothing (null)"),
        ({"prompt": 1}, "column 'prompt' must be text; found a number 1"),
        ({"prompt": "\t"}, "column 'prompt' is empty; a text is needed"),
        (
            {"chosen": "a"},
            "no column 'prompt'; found: chosen (rename one, or where a task card names this file: "
            "columns: {prompt: NAME})",
        ),
    ],
)
def test_bad_prompts_in_a_source(write_jsonl: WriteJsonl, record: dict[str, Any], wrong: str) -> None:
    path = write_jsonl([{"prompt": "a"}, record])
    assert refusal(lambda: load_prompts(DataSpec(prompts=source(path))), path.parent) == f"data.jsonl:2: {wrong}"


def test_bad_listed_prompts() -> None:
    assert refusal(lambda: load_prompts(DataSpec(prompts=["a", " "]))) == (
        "data.prompts: prompt 2 is empty; a text is needed"
    )


@pytest.mark.parametrize("spec", [DataSpec(), DataSpec(prompts=[])])
def test_no_prompts_at_all(spec: DataSpec) -> None:
    assert refusal(lambda: load_prompts(spec)).startswith("data: no prompts; give data.prompts ")


# Grammar


def test_a_grammar_gives_every_combination() -> None:
    grammar = {
        "template": ["Tell a {mood} tale of {who}.", "{who}, again {who} {{so}}!", "The end."],
        "mood": ["sad", "glad"],
        "who": ["a cat", "ein Bär", "{mood}"],
    }
    assert load_prompts(DataSpec(prompt_grammar=grammar)) == [
        "Tell a sad tale of a cat.",
        "Tell a sad tale of ein Bär.",
        "Tell a sad tale of {mood}.",
        "Tell a glad tale of a cat.",
        "Tell a glad tale of ein Bär.",
        "Tell a glad tale of {mood}.",
        "a cat, again a cat {so}!",
        "ein Bär, again ein Bär {so}!",
        "{mood}, again {mood} {so}!",
        "The end.",
    ]


def test_listed_and_generated_prompts_are_one_set() -> None:
    spec = DataSpec(prompts=["a x", "b"], prompt_grammar={"template": ["a {p}"], "p": ["x", "y"]})
    assert load_prompts(spec) == ["a x", "b", "a y"]


NO_PART = ".template: text 1: unknown part "
NAME = " cannot be filled in; allowed: names of letters, digits and _ that do not begin with a digit"
PLAIN = ".template: text 1: {who} may hold a part's name and nothing else; found "


@pytest.mark.parametrize(
    ("grammar", "wrong"),
    [
        ({"who": ["a"]}, "needs a list 'template' of texts with {part} fields; found: who"),
        ({}, "needs a list 'template' of texts with {part} fields; found: nothing"),
        ({"template": ["{whom}"], "who": ["a"]}, NO_PART + "'whom'; allowed: who; did you mean 'who'?"),
        ({"template": ["x", "{}"], "who": ["a"]}, ".template: text 2: unknown part ''; allowed: who"),
        ({"template": ["{who.a}"], "who": ["a"]}, NO_PART + "'who.a'; allowed: who; did you mean 'who'?"),
        ({"template": ["{0}"], "0": ["a"]}, "the part '0'" + NAME),
        ({"template": ["{}"], "": ["a"]}, "the part ''" + NAME),
        ({"template": ["{a.b}"], "a.b": ["a"]}, "the part 'a.b'" + NAME),
        ({"template": ["{a[0]}"], "a[0]": ["a"]}, "the part 'a[0]'" + NAME),
        ({"template": ["{who!r}"], "who": ["a"]}, PLAIN + "'{who!r}'"),
        ({"template": ["{who:9}"], "who": ["a"]}, PLAIN + "'{who:9}'"),
        ({"template": ["hi"], "who": ["a"]}, "the part 'who' is in no template; write {who} in one, or leave it out"),
        ({"template": ["{who}"], "who": []}, ".who: the list is empty; at least one text is needed"),
        ({"template": ["{who}"], "who": [" "]}, "the template '{who}' gives an empty prompt"),
    ],
)
def test_bad_grammars(grammar: dict[str, list[str]], wrong: str) -> None:
    begins = "data.prompt_grammar" + ("" if wrong.startswith(".") else ": ")
    assert refusal(lambda: load_prompts(DataSpec(prompt_grammar=grammar))) == begins + wrong


def test_unbalanced_braces() -> None:
    wrong = refusal(lambda: load_prompts(DataSpec(prompt_grammar={"template": ["{who"], "who": ["a"]})))
    assert wrong.startswith("data.prompt_grammar.template: text 1: ")
    assert wrong.endswith("write {{ and }} for braces that are text; found '{who'")


def test_a_grammar_too_large_is_refused_before_it_is_made() -> None:
    grammar = {"template": ["{a}{b}{c}{d}"], **{name: [str(index) for index in range(100)] for name in "abcd"}}
    assert refusal(lambda: load_prompts(DataSpec(prompt_grammar=grammar))) == (
        "data.prompt_grammar: 100,000,000 combinations; at most 1,000,000 are allowed"
    )


# Responses


def test_responses_are_read_without_whatever_else_the_file_holds(write_jsonl: WriteJsonl) -> None:
    # Columns named as the task's objectives too: its scorers score these responses like all others.
    path = write_jsonl(
        [
            {"prompt": "p", "response": "a", "humor": "high", "harmlessness": -2.5},
            {"prompt": "p", "response": "b", "humor": ["low"]},
            {"prompt": "q", "response": ""},
        ]
    )
    assert list(load_responses(DataSpec(responses=source(path)))) == [
        LoggedResponse("p", "a"),
        LoggedResponse("p", "b"),
        LoggedResponse("q", ""),
    ]


def test_a_column_for_an_objective_is_refused_as_no_field_of_responses(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([{"prompt": "p", "response": "a", "r1": 0.5}])
    spec = DataSpec(responses=source(path, columns={"help": "r1"}))
    assert refusal(lambda: load_responses(spec), path.parent) == (
        "data.jsonl: columns: unknown field 'help'; allowed: finished, prompt, response"
    )


def test_responses_of_a_csv_with_renamed_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("question,answer,prompt\nq,a,x\nq,b,\n")
    spec = DataSpec(responses=source(path, columns={"prompt": "question", "response": "answer"}))
    assert list(load_responses(spec)) == [LoggedResponse("q", "a"), LoggedResponse("q", "b")]


def test_a_column_says_which_responses_came_to_their_end(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    flags = [True, False, 1, 0, None, "true", "False"]
    path = write_jsonl([{"prompt": "p", "response": f"{i}", "finished": flag} for i, flag in enumerate(flags)])
    result = [one.finished for one in load_responses(DataSpec(responses=source(path)))]
    assert result == [True, False, True, False, True, True, False]
    path = tmp_path / "a.csv"
    path.write_text("prompt,response,whole\np,a,true\np,b,False\np,c,1\np,d,0\np,e,\np,f,TRUE\n")
    spec = DataSpec(responses=source(path, columns={"finished": "whole"}))
    assert [one.finished for one in load_responses(spec)] == [True, False, True, False, True, True]


def test_without_that_column_all_did(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([{"prompt": "p", "response": "a"}])
    assert next(load_responses(DataSpec(responses=source(path)))).finished


@pytest.mark.parametrize(
    ("flag", "result"), [("yes", "'yes'"), (2, "2"), (0.0, "0.0"), ([True], r"a list [True]"), ("nearly", "'nearly'")]
)
def test_a_flag_that_is_neither_true_nor_false(write_jsonl: WriteJsonl, flag: Any, result: str) -> None:
    path = write_jsonl([{"prompt": "p", "response": "a", "finished": f} for f in (True, flag)])
    assert refusal(lambda: list(load_responses(DataSpec(responses=source(path)))), path.parent).startswith(
        "data.jsonl:2: column 'finished' must be true, false or nothing; found "
    )
    with pytest.raises(RequestError) as caught:
        list(load_responses(DataSpec(responses=source(path))))
    assert str(caught.value).endswith(result)


def test_a_flag_of_a_csv_that_is_neither(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,response,finished\np,a,true\np,b,maybe\n")
    wrong = refusal(lambda: list(load_responses(DataSpec(responses=source(path)))), tmp_path)
    assert wrong.startswith("a.csv:3: column 'finished' must be true, false or nothing; found ")


def test_both_replies_of_preference_dialogues_are_responses_with_their_leading_space(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([{"chosen": TALK + " Yes.", "rejected": TALK + " No. "}])
    spec = DataSpec(responses=source(path, columns={"chosen": "chosen", "rejected": "rejected"}))
    assert list(load_responses(spec)) == [LoggedResponse(TALK, " Yes."), LoggedResponse(TALK, " No. ")]


def test_responses_stream(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(['{"prompt": "p", "response": "a"}', "{broken"])
    stream = load_responses(DataSpec(responses=source(path)))
    assert next(stream) == LoggedResponse("p", "a")
    assert refusal(lambda: next(stream), path.parent).startswith("data.jsonl:2: broken JSON: ")


def test_a_response_that_is_no_text(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([{"prompt": "p", "response": "a"}, {"prompt": "p", "response": ["a"]}])
    assert refusal(lambda: list(load_responses(DataSpec(responses=source(path)))), path.parent) == (
        "data.jsonl:2: column 'response' must be text; found a list ['a']"
    )


def test_a_task_without_responses_or_pairs() -> None:
    assert refusal(lambda: load_responses(DataSpec())).startswith("data.responses: the task has none; ")
    assert refusal(lambda: load_pairs(DataSpec())).startswith("data.pairs: the task has none; ")


def test_a_missing_file_is_told_at_once(tmp_path: Path) -> None:
    for call in (load_pairs, load_responses):
        spec = DataSpec(pairs=SourceSpec(path="a.jsonl"), responses=SourceSpec(path="a.jsonl"))
        assert "no such file" in refusal(lambda call=call, spec=spec: call(spec, tmp_path))  # type: ignore[misc]


# Pairs


def test_pairs_with_a_prompt_or_as_dialogues(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(
        [
            {"prompt": "p", "chosen": "yes", "rejected": "no"},
            {"chosen": TALK + " Yes.", "rejected": TALK + " No."},
            {"prompt": None, "chosen": TALK + " Yes!", "rejected": TALK},
            {"prompt": TALK, "chosen": TALK + " a", "rejected": TALK + " b"},
            {"prompt": "say p", "chosen": "say p", "rejected": "say p!"},
        ]
    )
    assert list(load_pairs(DataSpec(pairs=source(path)))) == [
        Pair("p", "yes", "no"),
        Pair(TALK, " Yes.", " No."),
        Pair(TALK, " Yes!", ""),
        Pair(TALK, " a", " b"),
        Pair("say p", "say p", "say p!"),
    ]


SAME = "chosen and rejected are the same text; a pair needs two different replies"


@pytest.mark.parametrize(
    ("record", "wrong"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, SAME),
        ({"chosen": TALK, "rejected": TALK}, SAME),
        (
            {"chosen": "a", "rejected": "b"},
            "chosen and rejected share no turn '\\n\\nAssistant:', so their prompt is unknown; "
            "give a column prompt or whole dialogues that begin alike; found 'a' and 'b'",
        ),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "column 'prompt' is empty; a text is needed"),
        (
            {"prompt": "p", "chosen": [{"role": "user"}], "rejected": ""},
            "column 'chosen' must be text; found a list [{'role': 'user'}]",
        ),
        (
            {"prompt": "p", "chosen": "a", "reject": "b"},
            "no column 'rejected'; found: prompt, chosen, reject; "
            "did you mean 'reject'? (rename it, or where a task card names this file: columns: {rejected: reject})",
        ),
    ],
)
def test_bad_pairs(write_jsonl: WriteJsonl, record: dict[str, Any], wrong: str) -> None:
    path = write_jsonl([{"prompt": "p", "chosen": "a", "rejected": "b"}, record])
    assert refusal(lambda: list(load_pairs(DataSpec(pairs=source(path)))), path.parent) == f"data.jsonl:2: {wrong}"


def test_only_who_asks_for_groups_looks_at_a_column_group(write_jsonl: WriteJsonl) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    path = write_jsonl([{**pair, "group": "g1"}, {**pair, "group": 7}])
    assert list(load_pairs(DataSpec(pairs=source(path)))) == [Pair("p", "a", "b")] * 2
    responses = DataSpec(responses=source(path, columns={"chosen": "chosen"}))
    assert list(load_responses(responses)) == [LoggedResponse("p", "a"), LoggedResponse("p", "b")] * 2
    assert len(list(load_pairs(DataSpec(pairs=source(path, columns={"group": "group"}, limit=1))))) == 1
    grouped = load_grouped_pairs(source(path))
    assert next(grouped) == ("g1", Pair("p", "a", "b"))
    assert refusal(lambda: next(grouped), path.parent) == "data.jsonl:2: column 'group' must be text; found a number 7"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXT, TEXT, TEXT).filter(lambda pair: pair[1] != pair[2]), min_size=1, max_size=5))
def test_dialogues_read_back_whole(write_jsonl: WriteJsonl, pairs: list[tuple[str, str, str]]) -> None:
    records = [{"chosen": f"{a}{ASSISTANT}{b}", "rejected": f"{a}{ASSISTANT}{c}"} for a, b, c in pairs]
    result = load_pairs(DataSpec(pairs=source(write_jsonl(records))))
    assert [{"chosen": p.prompt + p.chosen, "rejected": p.prompt + p.rejected} for p in result] == records


# The real data


def test_the_real_preference_data(hh_file: Path) -> None:
    with gzip.open(hh_file, "rt", encoding="utf-8") as handle:
        records = [json.loads(line) for line in handle]
    pairs = list(load_pairs(DataSpec(pairs=source(hh_file))))
    assert len(pairs) == 2312
    assert [{"chosen": p.prompt + p.chosen, "rejected": p.prompt + p.rejected} for p in pairs] == records
    assert all(pair.prompt.startswith(HUMAN) and pair.prompt.endswith(ASSISTANT) for pair in pairs)
    assert pairs[0].prompt.endswith(f"do not have anything to do with pens{ASSISTANT}")
    assert pairs[0].rejected.startswith(" There are lots of funny things you can do with pens")
    # Five rejoinders play a further turn themselves; the rest are one plain reply each.
    assert sum(HUMAN in pair.chosen + pair.rejected for pair in pairs) == 0
    assert sum(ASSISTANT in pair.chosen + pair.rejected for pair in pairs) == 5


def test_the_real_prompts_split_without_leaks(hh_file: Path) -> None:
    prompts = load_prompts(DataSpec(prompts=source(hh_file)))
    assert len(prompts) == len(set(prompts)) == 2310  # 2,312 pairs, of which two share their prompt with another
    parts = split(prompts, SplitSpec())
    check_leaks(parts)
    assert sum(map(len, parts.values())) == len(prompts)
    assert abs(len(parts["train"]) / len(prompts) - 0.8) < 0.04
    again = split(reversed(prompts), SplitSpec())
    assert {name: sorted(part) for name, part in parts.items()} == {name: sorted(part) for name, part in again.items()}
    leaked = {**parts, "eval": [*parts["eval"], parts["train"][0].upper().replace(" ", "  ")]}
    assert normalised(leaked["eval"][-1]) == normalised(parts["train"][0])
    assert "is in eval and in train" in refusal(lambda: check_leaks(leaked))


def test_the_real_data_is_read_lazily(hh_file: Path) -> None:
    stream = load_pairs(DataSpec(pairs=source(hh_file, limit=3)))
    assert len(list(stream)) == 3


# Imports


def test_the_data_layer_imports_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "datasets", "pandas", "pyarrow", "numpy"]
    code = f"import sys, moalign.data.load, moalign.data.splits; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_reading_jsonl_and_csv_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "a.csv").write_text("prompt\nb\n")
    code = (
        "import sys\nfrom moalign.config.card import DataSpec, SourceSpec\nfrom moalign.data.load import load_prompts\n"
        "print([load_prompts(DataSpec(prompts=SourceSpec(path=p)), sys.argv[1]) for p in ('a.jsonl', 'a.csv')],"
        " [m for m in ('torch', 'datasets', 'pandas', 'pyarrow') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[['a'], ['b']] []"
