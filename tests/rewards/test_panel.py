"""The panel: order, direction, deduplication, failures that keep what was scored, killed processes."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moalign.config.objectives import PythonObjective, RuleObjective, SandboxObjective
from moalign.core.errors import RequestError, WorkError
from moalign.rewards import scorer
from moalign.rewards.normaliser import Normaliser
from moalign.rewards.panel import RewardPanel
from moalign.rewards.scorer import FunctionScorer
from moalign.rewards.store import Store

ROOT = Path(__file__).resolve().parents[2]


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def add_reward_calls(self, count: int) -> None:
        self.calls += count


class Recorder:
    """Scores the length of the response, or what ``special`` says; remembers every call."""

    def __init__(self, special: Callable[[str], Any] = len, name: str = "size", cheap: bool = False) -> None:
        self.name, self.maximise, self.revision, self.cheap = name, True, "recorder 1", cheap
        self.special = special
        self.calls: list[list[str]] = []

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Any]:
        self.calls.append(list(responses))
        return [self.special(response) for response in responses]

    @property
    def scored(self) -> list[str]:
        return [response for call in self.calls for response in call]


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store(tmp_path / "scores.sqlite") as opened:
        yield opened


def constant(name: str, value: float, maximise: bool = True) -> FunctionScorer:
    return FunctionScorer(name, lambda prompts, responses: [value] * len(prompts), f"constant {name}", maximise)


def test_columns_are_in_order_and_larger_is_better() -> None:
    panel = RewardPanel([constant("a", 3), constant("b", 5, maximise=False), constant("zero", 0, maximise=False)])
    raw = panel.score(["p", "q"], ["r", "s"])
    assert raw.tolist() == [[3, -5, 0], [3, -5, 0]]
    assert not np.signbit(raw[0, 2])
    assert raw.dtype == np.float64
    assert panel.names == ["a", "b", "zero"]


def test_same_texts_are_scored_once_and_calls_count_what_was_asked() -> None:
    scorer, meter = Recorder(), Counter()
    panel = RewardPanel([scorer, constant("b", 1)], meter=meter)
    raw = panel.score(["p", "q", "p", "p"], ["aa", "aa", "aa", "b"])
    assert raw[:, 0].tolist() == [2, 2, 2, 1]
    assert scorer.calls == [["aa", "aa", "b"]]  # ("p", "aa") and ("q", "aa") differ
    assert meter.calls == 8


def test_store_answers_the_second_time_also_across_panels(store: Store) -> None:
    first, second, meter = Recorder(), Recorder(), Counter()
    RewardPanel([first], store=store).score(["p", "p"], ["a", "bb"])
    raw = RewardPanel([second], store=store, meter=meter).score(["p"] * 3, ["bb", "ccc", "a"])
    assert raw[:, 0].tolist() == [2, 3, 1]
    assert second.calls == [["ccc"]]
    assert meter.calls == 3  # hits count: costs stay comparable whatever the cache holds


def test_a_new_revision_is_scored_again_and_directions_share_scores(store: Store) -> None:
    first, second, third = Recorder(), Recorder(), Recorder()
    RewardPanel([first], store=store).score(["p"], ["a"])
    second.revision = "recorder 2"
    RewardPanel([second], store=store).score(["p"], ["a"])
    assert second.scored == ["a"]
    third.maximise = False  # the store holds raw scores
    assert RewardPanel([third], store=store).score(["p"], ["a"]).tolist() == [[-1]]
    assert third.scored == []


def test_cheap_scorers_leave_the_store_alone(store: Store) -> None:
    RewardPanel([Recorder(cheap=True)], store=store).score(["p"], ["a"])
    assert len(store) == 0


def test_nothing_to_score() -> None:
    assert RewardPanel([Recorder()]).score([], []).shape == (0, 1)


def test_different_numbers_of_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="2 prompts, but 1 responses"):
        RewardPanel([Recorder()]).score(["p", "q"], ["r"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_a_number_that_is_not_finite_names_objective_and_sample(store: Store, bad: Any) -> None:
    texts = [f"{n:02}" for n in range(10)]
    scorer = Recorder(lambda response: bad if response == "07" else int(response))
    panel = RewardPanel([constant("first", 1), scorer], store=store, chunk=4)
    with pytest.raises(WorkError) as caught:
        panel.score(["p"] * 11, ["00", *texts])
    # Sample 8: the message counts the caller's samples, not the chunk's or the distinct texts'.
    for part in ("objective 'size'", "sample 8", "'07'", "not a finite number", "the 7 of 10", str(store.path)):
        assert part in str(caught.value)
    again = Recorder(lambda response: 0)
    RewardPanel([constant("first", 1), again], store=store).score(["p"] * 10, texts)
    assert again.scored == ["07", "08", "09"]  # 04 to 06 shared the bad sample's chunk and were kept


def test_an_integer_that_no_float_holds_is_a_fault_of_the_scorer(store: Store) -> None:
    scorer = Recorder(lambda response: 10**400 if response == "b" else 1)
    with pytest.raises(WorkError, match=r"gave an integer beyond the largest .* for sample 1 .*the 1 of 3 scores"):
        RewardPanel([scorer], store=store).score(["p"] * 3, ["a", "b", "c"])


def test_everything_scored_before_an_exception_is_kept(store: Store) -> None:
    texts = [str(n) for n in range(20)]

    def raising(response: str) -> float:
        if response == "13":
            raise KeyError("no such word")
        return float(response)

    panel = RewardPanel([Recorder(raising)], store=store, chunk=8)
    with pytest.raises(WorkError) as caught:
        panel.score(["p"] * 20, texts)
    for part in ("objective 'size'", "raised KeyError", "no such word", "sample 13", "'p'", "'13'", "the 13 of 20"):
        assert part in str(caught.value)
    assert isinstance(caught.value.__cause__, Exception)
    assert len(store) == 13
    again = Recorder(float)
    raw = RewardPanel([again], store=store, chunk=8).score(["p"] * 20, texts)
    assert again.scored == texts[13:]
    assert raw[:, 0].tolist() == list(range(20))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.data())
def test_the_failing_sample_is_found_wherever_it_is(count: int, data: st.DataObject) -> None:
    bad = data.draw(st.integers(0, count - 1))
    chunk = data.draw(st.integers(1, 50))

    def raising(response: str) -> float:
        return 1.0 / (int(response) - bad)

    scorer = Recorder(raising)
    with pytest.raises(WorkError, match=rf"raised ZeroDivisionError.* sample {bad} "):
        RewardPanel([scorer], chunk=chunk).score(["p"] * count, [str(n) for n in range(count)])
    assert len(scorer.calls) <= bad // chunk + 1 + 2 * math.ceil(math.log2(max(2, chunk)))


def test_wrong_number_of_scores_is_told(store: Store) -> None:
    short = FunctionScorer("short", lambda prompts, responses: [1.0] * (len(prompts) - 1), "1")
    with pytest.raises(WorkError, match=r"'short'.*shape \[0\] for 1 texts; \[1\] is needed for sample 0 "):
        RewardPanel([short], store=store).score(["p"] * 3, ["a", "b", "c"])
    column = FunctionScorer("column", lambda prompts, responses: [[1.0]] * len(prompts), "1")  # type: ignore[list-item]
    with pytest.raises(WorkError, match=r"'column'.*shape \[1, 1\]"):
        RewardPanel([column]).score(["p"], ["a"])


def test_text_instead_of_numbers_is_told() -> None:
    with pytest.raises(WorkError, match="gave str"):
        RewardPanel([Recorder(lambda response: "1.5")]).score(["p"], ["a"])


def test_a_scorer_that_only_fails_on_many_texts_is_told_and_kept(store: Store) -> None:
    class Small(Recorder):
        def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Any]:
            if len(prompts) > 2:
                raise MemoryError("too many")
            return super().score(prompts, responses)

    panel = RewardPanel([Small()], store=store)
    with pytest.raises(WorkError, match="MemoryError.* for 4 texts together.*not for each half"):
        panel.score(["p"] * 4, list("abcd"))
    assert panel.score(["p"] * 4, list("abcd")).tolist() == [[1.0]] * 4


def test_request_errors_of_a_scorer_pass_unchanged() -> None:
    def refuse(response: str) -> float:
        raise RequestError("objective 'size': no such folder")

    with pytest.raises(RequestError, match="^objective 'size': no such folder$"):
        RewardPanel([Recorder(refuse)]).score(["p"], ["a"])


def test_a_failed_call_is_not_counted() -> None:
    meter = Counter()
    with pytest.raises(WorkError):
        RewardPanel([constant("nan", math.nan)], meter=meter).score(["p"], ["a"])
    assert meter.calls == 0


def test_killed_process_keeps_committed_scores(tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        from moalign.rewards.panel import RewardPanel
        from moalign.rewards.scorer import FunctionScorer
        from moalign.rewards.store import Store

        def score(prompts, responses):
            if "17" in responses:
                os.kill(os.getpid(), signal.SIGKILL)
            return [float(r) for r in responses]

        panel = RewardPanel([FunctionScorer("size", score, "recorder 1")], store=Store(Path(sys.argv[1])), chunk=5)
        panel.score(["p"] * 20, [str(n) for n in range(20)])
    """
    path = tmp_path / "scores.sqlite"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)], env=environment, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    again = Recorder(float)
    with Store(path) as store:
        assert len(store) == 15
        raw = RewardPanel([again], store=store).score(["p"] * 20, [str(n) for n in range(20)])
    assert raw[:, 0].tolist() == list(range(20))
    assert again.scored == ["15", "16", "17", "18", "19"]


def test_progress_reaches_the_total(store: Store) -> None:
    reports: list[tuple[int, int]] = []
    panel = RewardPanel([Recorder(), constant("b", 1)], store=store, chunk=2)
    panel.score(["p"] * 6, list("aabcde"), progress=lambda done, total: reports.append((done, total)))
    assert reports[-1] == (10, 10)
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)


def test_normaliser_is_used_and_must_fit_the_objectives() -> None:
    panel = RewardPanel([constant("a", 3), constant("b", 5)])
    raw = np.array([[0.0, 0.0], [2.0, 4.0]])
    with pytest.raises(WorkError, match="no normaliser"):
        panel.z(raw)
    ready = panel.with_normaliser(Normaliser.fit(raw, ["a", "b"]))
    assert ready.z(raw).tolist() == [[-1, -1], [1, 1]]
    assert ready.unit(raw)[1] == pytest.approx([0.99 / 0.98] * 2, rel=0.02)
    assert panel.normaliser is None
    with pytest.raises(RequestError, match="for b, a, but the task's objectives are a, b"):
        panel.with_normaliser(Normaliser.fit(raw, ["b", "a"]))


def test_names_must_differ() -> None:
    with pytest.raises(RequestError, match="found twice: a"):
        RewardPanel([constant("a", 1), constant("a", 2)])


def test_scorer_hash_follows_order_direction_and_revision() -> None:
    a, b = constant("a", 1), constant("b", 1)
    hashes = {
        RewardPanel([a, b]).scorer_hash,
        RewardPanel([b, a]).scorer_hash,
        RewardPanel([a, constant("b", 1, maximise=False)]).scorer_hash,
        RewardPanel([a, FunctionScorer("b", b.score, "2")]).scorer_hash,
    }
    assert len(hashes) == 4
    assert RewardPanel([a, b]).scorer_hash == RewardPanel([constant("a", 9), b]).scorer_hash


def test_from_specs_builds_every_kind_and_reports_every_problem(tmp_path: Path) -> None:
    specs = [
        RuleObjective(name="short", kind="rule", rule="brevity"),
        RuleObjective(name="calm", kind="rule", rule="regex-count", options={"pattern": "!"}, maximise=False),
        PythonObjective(name="wide", kind="python", function="moalign_panel_example:width"),
    ]
    (tmp_path / "moalign_panel_example.py").write_text(
        "def width(prompts, responses):\n    return map_(responses)\n\n\n"
        "def map_(texts):\n    return [len(t) for t in texts]\n"
    )
    panel = RewardPanel.from_specs(specs, tmp_path)
    assert panel.score(["p"], ["oh! no!!"]).tolist() == [[-2, -3, 8]]
    assert str(tmp_path) not in sys.path
    wrong = [RuleObjective(name=f"o{n}", kind="rule", rule="lenght") for n in range(2)]
    with pytest.raises(RequestError) as caught:
        RewardPanel.from_specs([*specs[:1], *wrong], tmp_path)
    assert len(caught.value.problems) == 2


def test_the_kind_of_a_task_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scoring layer knows no task: what only a task can score has to be registered by it."""
    monkeypatch.setattr(scorer, "BUILDERS", {})
    with pytest.raises(WorkError, match="objective humor: kind sandbox is a task's own; import moalign.tasks first"):
        scorer.build_scorer(SandboxObjective(name="humor", kind="sandbox"), Path())


def test_what_a_reward_is_worth_beyond_the_data() -> None:
    """z = raw; bounds of the data at 2 and 3: (1, 3) is below both, (4, 8) is beyond them by 2 and 5."""
    scale = Normaliser(("a", "b"), (0.0, 0.0), (1.0, 1.0), (-1.0, -1.0), (1.0, 1.0), ((-2.0, 2.0), (-2.0, 3.0)))
    panel = RewardPanel([Recorder(name="a"), Recorder(name="b")]).with_normaliser(scale)
    raw = np.array([[1.0, 3.0], [4.0, 8.0]])
    assert panel.z(raw).tolist() == raw.tolist()
    assert panel.z(raw, "clip").tolist() == [[1.0, 3.0], [2.0, 3.0]]
    beyond = [[1.0, 3.0], [2 + math.log(3), 3 + math.log(6)]]
    assert panel.z(raw, "log") == pytest.approx(np.array(beyond), rel=1e-14)  # the last digit is the processor's
