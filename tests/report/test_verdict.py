"""The words: who wins, how sure, and what to keep in mind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moalign.report import verdict

Build = Callable[..., dict[str, Any]]


def test_a_winner_is_named_with_its_lead(compared: Build) -> None:
    lines = compared({"a": 0.3, "b": 0.1, "c": 0.0})["verdict"]
    assert lines[0].startswith("a wins: its hypervolume is above that of each of the 2 others with 95 % certainty")
    assert "Its lead over b, the next: +0." in lines[0]


def test_two_methods(compared: Build) -> None:
    lines = compared({"a": 0.3, "b": 0.1})["verdict"]
    assert "above that of the other method with 95 % certainty. Its lead over b: +0." in lines[0]


def test_no_winner_says_what_is_open_and_what_is_not(compared: Build) -> None:
    lines = compared({"a": 0.0, "b": 0.0, "c": -0.2})["verdict"]
    assert lines[0] == "No method wins: a and b have the same hypervolume. It is above c with 95 % certainty."
    record = compared({"a": 0.3, "b": 0.1})
    record["winner"] = None
    record["pairs"][0].update(certain=False, difference=0.01, ci=[-0.02, 0.04], share_above_zero=0.81)
    assert verdict.sentences(record)[0] == (
        "No method wins with certainty: a leads, but its lead over b may be chance: +0.010 [-0.020, 0.040], "
        "above 0 in 81 % of the resamples."
    )


def test_a_share_of_resamples_that_contradicts_the_interval_is_left_out(compared: Build) -> None:
    """Of three seeds it knows ten combinations; the interval is Student's, and wider."""
    record = compared({"a": 0.3, "b": 0.1})
    record["winner"] = None
    record["pairs"][0].update(certain=False, difference=0.022, ci=[-0.006, 0.05], share_above_zero=1.0)
    assert verdict.sentences(record)[0] == (
        "No method wins with certainty: a leads, but its lead over b may be chance: +0.022 [-0.006, 0.050]."
    )
    assert verdict.sure({"certain": False, "share_above_zero": 0.99}) == "open"
    assert verdict.sure({"certain": False, "share_above_zero": 0.5}) == "open (above 0 in 50 %)"


def test_what_is_asked_for_is_compared_at_the_same_preferences(compared: Build) -> None:
    """A run per preference that has the corners alone is best at what is asked there; of the grid it says nothing."""
    record = compared({"a": 0.3, "b": 0.1, "c": 0.0})
    record["rows"][2]["own_preferences"] = True
    record["rows"][2]["indicators"]["inner_product"] = 2.0
    assert verdict.sentences(record)[1].startswith(
        "By what each preference asked for (inner product) a leads b by +0.1"
    )


def test_a_leader_that_lost_a_seed(compared: Build) -> None:
    record = compared({"a": 0.3, "b": 0.1})
    record["winner"] = None
    record["rows"][0]["status"] = "partial"
    record["rows"][0]["runs"].append({"seed": 1, "status": "failed", "error": "burst", "command": "", "made": None})
    lines = verdict.sentences(record)
    assert lines[0] == "No method wins: a leads, but not all of its seeds finished."
    assert any(item.startswith("a: 1 of 2 seeds failed") for item in lines)


def test_who_gives_preferences_what_they_ask_for(compared: Build) -> None:
    """The front's winner need not be the one: the sentence names its own leader, and how sure that is."""
    record = compared({"a": 0.3, "b": 0.1, "c": 0.0})
    assert record["verdict"][1].startswith("By what each preference asked for (inner product) a leads b by +0.1")
    assert record["verdict"][1].endswith("with certainty.")
    record["rows"][1]["indicators"]["inner_product"] = 2.0
    seen = next(pair["inner_product"] for pair in record["pairs"] if {pair["a"], pair["b"]} == {"a", "b"})
    seen.update(difference=-0.01, ci=[-0.03, 0.01], share_above_zero=0.2, certain=False)
    assert verdict.sentences(record)[1] == (
        "By what each preference asked for (inner product) b leads a by +0.010 [-0.010, 0.030], "
        "which may be chance (above 0 in 80 %)."
    )
    for pair in record["pairs"]:
        pair["inner_product"] = None  # evaluated on different preferences
    assert "inner product" not in " ".join(verdict.sentences(record))


def test_failures_are_told(compared: Build) -> None:
    assert "dead failed and is not ranked." in compared({"a": 0.1, "b": 0.0}, dead=("dead",))["verdict"]
    lines = compared({"a": 0.1}, dead=("x", "y"))["verdict"]
    assert lines[0].startswith("Only a can be judged") and "x and y failed and are not ranked." in lines
    assert compared({}, dead=("x",))["verdict"][0].startswith("No method finished")


def test_collapsed_text_is_told(compared: Build) -> None:
    lines = " ".join(compared({"a": 0.3, "b": 0.0}, rates={"a": 0.2, "b": 0.01})["verdict"])
    assert "a: 20 % of its responses are collapsed" in lines and "b: 1 %" not in lines


def test_a_policy_that_left_the_bases_language_is_told(compared: Build) -> None:
    """Per token, so that long answers do not count against a method; a bound is no evidence."""
    record = compared({"a": 0.3, "b": 0.0})
    first, second = (row["quality"] for row in record["rows"])
    first.update(kl=2.9 * 21.0), second.update(kl=3.5 * 21.0)
    told = "its KL to base is 3.5 nats per token (above 3): the base would hardly ever give its responses; read some"
    lines = [line for line in verdict.sentences(record) if "KL to base" in line]
    assert len(lines) == 1 and lines[0].startswith(f"b: {told}")
    second.update(kl_bound=True)
    assert "KL to base" not in " ".join(verdict.sentences(record))
    second.update(kl_bound=False, mean_length=0.0)  # nothing but empty answers
    assert "b: its KL to base is 73.5 nats per token" in " ".join(verdict.sentences(record))


def test_one_preference_beyond_a_limit_is_told_where_the_mean_is_not() -> None:
    fine = {"prefs": [0.0, 1.0], "collapsed": 0.0, "mean_length": 20.0, "kl": 10.0, "kl_bound": False}
    points = [
        fine,
        {**fine, "prefs": [0.3, 0.7], "collapsed": 0.12},
        {**fine, "prefs": [1.0, 0.0], "kl": 3.5 * 20},
        {**fine, "kl": 3.5 * 20, "kl_bound": True},
        {"prefs": [0.5, 0.5], "kl": 900.0, "collapsed": None, "mean_length": None},  # an older file
    ]
    mean = {"rate": 0.03, "mean_length": 20.0, "kl": 25.0}
    assert [text.partition(" (")[0] for text in verdict.cautions_at(mean, points)] == [
        "at 0.3,0.7 12 % of its responses are collapsed",
        "at 1,0 its KL to base is 3.5 nats per token",
    ]
    assert [text[:5] for text in verdict.cautions_at({**mean, "rate": 0.06}, points)] == ["at 1,"]
    assert verdict.cautions_at({**mean, "rate": 0.06, "kl": 61.0}, points) == []


def test_a_ranking_that_depends_on_the_reference_point(compared: Build) -> None:
    record = compared({"a": 0.3, "b": 0.1})
    assert "reference point" not in " ".join(record["verdict"])
    record["sensitivity"]["flipped"] = [["a", "b"]]
    assert "The ranking depends on the reference point: at (-0.1, -0.1) it is b before a." in verdict.sentences(record)


def test_seeds_are_told(compared: Build) -> None:
    assert compared({"a": 0.3, "b": 0.1})["verdict"][-1].startswith("One training seed")
    record = compared({"a": 0.3, "b": 0.1}, seeds=3)
    assert "3 training seeds" in record["verdict"][-1]
    record["rows"][0]["seeds"] = [0, 1, 2, 3, 4]
    assert "3 to 5 training seeds" in verdict.sentences(record)[-1]
    row = next(row for row in record["rows"] if row["label"] == "a")
    row["seeds"] = row["seeds"][:1]  # a record of runs that were named one by one
    assert verdict.sentences(record)[-1].startswith("One training seed for a: ")


def test_runs_of_different_machines_are_told(compared: Build) -> None:
    content = compared({"a": 0.3, "b": 0.1})
    made = [run for row in content["rows"] for run in row["runs"]]
    for run in made:
        run["made"] = {"cpu": "C", "gpus": []}
    assert "machines" not in " ".join(verdict.sentences(content))
    made[0]["made"] = {"cpu": "C", "gpus": ["G"]}
    assert "(G; C): times of training cannot be compared." in verdict.sentences(content)[-1]


def test_the_lead_is_seen_from_the_first(compared: Build) -> None:
    record = compared({"a": 0.0, "b": 0.2, "c": 0.1})
    leads = verdict.lead_over_each(record)
    assert [lead["other"] for lead in leads] == ["c", "a"]
    assert all(lead["difference"] > 0 for lead in leads)
    # The same however a pair is written down.
    for pair in record["pairs"]:
        lo, hi = pair["ci"]
        turned = {"difference": -pair["difference"], "ci": [-hi, -lo]}
        turned["share_above_zero"] = 1 - pair["share_above_zero"]
        pair.update(a=pair["b"], b=pair["a"], **turned)
    assert [(lead["other"], lead["difference"], lead["ci"]) for lead in verdict.lead_over_each(record)] == [
        (lead["other"], lead["difference"], lead["ci"]) for lead in leads
    ]


def test_long_lists_are_cut(compared: Build) -> None:
    gains = {f"m{i}": -0.05 * i for i in range(9)}
    record = compared(gains)
    record["winner"] = None
    record["pairs"][0]["certain"] = False
    assert "m2, m3, m4, m5 and 3 others" in verdict.sentences(record)[0]


def test_a_judge_that_is_seldom_understood_is_a_warning() -> None:
    usage = {"help": {"failure_rate": 0.12}, "gold help": {"failure_rate": 0.05}, "tone": {"failure_rate": None}}
    assert verdict.unread(usage) == ["12 % of the verdicts on help could not be read and are in no mean"]
