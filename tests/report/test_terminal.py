"""The terminal's tables."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from moalign.report.terminal import print_comparison

Build = Callable[..., dict[str, Any]]


def printed(record: dict[str, Any], width: int = 80) -> list[str]:
    text = io.StringIO()
    print_comparison(Console(file=text, width=width, markup=False, highlight=False, emoji=False), record)
    return text.getvalue().splitlines()


def line_of(lines: list[str], *words: str) -> str:
    return next(line for line in lines if all(word in line for word in words))


@pytest.mark.parametrize("width", [60, 80, 200])
def test_it_fits_the_terminal(compared: Build, width: int) -> None:
    gains = {"preference-prompting": 0.0, "mo-odpo (steps=400, batch=128)": 0.3, "sft": -0.1}
    lines = printed(compared(gains, dead=("broken",)), width)
    files = ("figure", "markdown", "json")
    assert all(len(line) <= min(width, 100) for line in lines if not line.startswith(files))


def test_numbers_are_whole_at_80_columns(compared: Build) -> None:
    record = compared({"best-of-n": 0.1, "mo-odpo": 0.3, "prompting": 0.0, "ric": 0.15, "sft": -0.1})
    lines = printed(record)
    assert not any("…" in line for line in lines)
    for row in record["rows"]:
        line = line_of(lines, row["label"], f"{row['hypervolume']:.3f}")
        assert f"[{row['ci'][0]:.3f}, {row['ci'][1]:.3f}]" in line
        assert f"{100 * row['optimal_share']:.0f} %" in line
        assert f"{row['indicators']['tau']:.2f}" in line
    assert "1 min 01 s" in "".join(lines) and "1.36 M" in "".join(lines) and "701 MiB" in "".join(lines)


def test_names_are_on_one_line_and_numbers_end_in_one_column(compared: Build) -> None:
    record = compared({"best-of-n": 0.1, "mo-odpo": 0.3, "prompting": 0.0})
    lines = printed(record)
    ends = {line_of(lines, row["label"], f"{row['hypervolume']:.3f}").index("]") for row in record["rows"]}
    assert len(ends) == 1


@pytest.mark.parametrize("width", [60, 80])
def test_long_labels_are_folded_and_never_cut(compared: Build, width: int) -> None:
    """Two rows that differ in the last of many settings must not look alike."""
    labels = [f"hindsight (steps=320, batch=128, temperature=1.25, sft_coef={value})" for value in (0.125, 0.126)]
    lines = printed(compared({labels[0]: 0.3, labels[1]: 0.1}), width)
    top = next(number for number, line in enumerate(lines) if "method" in line)
    cells = "".join(line[4 : lines[top].index("hyperv.")] for line in lines[top + 1 :]).replace(" ", "")
    assert all(label.replace(" ", "") in cells for label in labels)
    assert line_of(lines, "hindsight", "1 min 01 s", "45.3 k", "1.36 M", "4.00 k")


def test_what_cost_nothing_is_a_dash(compared: Build) -> None:
    record = compared({"prompting": 0.1, "sft": 0.0})
    spent = record["rows"][0]["cost"]
    spent |= {"tokens_generated": 0.0, "tokens_trained": 0.0, "reward_calls": 0.0}
    line = line_of(printed(record), "prompting", "701 MiB")
    assert line.split() == ["prompting", "1", "min", "01", "s", "–", "–", "–", "701", "MiB", "32.1", "k"]
    spent["answering"]["tokens_generated"] = 0
    assert line_of(printed(record), "prompting", "701 MiB").rstrip().endswith("–")


def test_the_optimum_is_shown_only_when_known(compared: Build) -> None:
    assert "optimum" in " ".join(printed(compared({"a": 0.1, "b": 0.0})))
    assert "optimum" not in " ".join(printed(compared({"a": 0.1, "b": 0.0}, optimum=False)))


def test_kl_to_base_is_shown_only_when_known(compared: Build) -> None:
    record = compared({"rewarded-soups": 0.1, "best-of-n": 0.05, "c": 0.0}, dead=("broken",))
    assert "KL" not in " ".join(printed(record))
    record["rows"][0]["quality"].update(kl=13.2, kl_bound=False)
    record["rows"][1]["quality"].update(kl=0.6363, kl_bound=True)
    lines = printed(record)
    assert line_of(lines, "rewarded-soups", f"{record['rows'][0]['hypervolume']:.3f}").rstrip().endswith("13.20")
    assert line_of(lines, "best-of-n", f"{record['rows'][1]['hypervolume']:.3f}").rstrip().endswith("≤ 0.64")
    assert line_of(lines, "KL to base: nats per response") and line_of(lines, "broken (failed)")
    assert all(len(line) <= 80 for line in lines if not line.startswith(("figure", "markdown", "json")))


def test_a_failed_method_is_shown(compared: Build) -> None:
    lines = printed(compared({"a": 0.1, "b": 0.0}, dead=("broken",)))
    assert line_of(lines, "broken (failed)")
    assert line_of(lines, "broken seed 0 failed: WorkError: out of | memory")


def test_nothing_but_failures(compared: Build) -> None:
    record = compared({}, dead=("broken",))
    record["figure"] = None
    lines = printed(record)
    assert line_of(lines, "broken seed 0 failed") and line_of(lines, "No method finished")
    assert not any(line.startswith("figure") for line in lines)


def test_leads_say_how_sure_they_are(compared: Build) -> None:
    lines = printed(compared({"a": 0.1, "b": 0.1, "c": 0.0}))
    assert "open (above 0 in 50 %)" in line_of(lines, "b", "[0.000, 0.000]")
    assert "certain" in line_of(lines, "c", "+0.")


def test_text_is_printed_as_it_is(compared: Build) -> None:
    record = compared({"a": 0.1, "b": 0.0})
    record["rows"][0]["label"] = "a [bold]x[/bold] :smile:"
    text = io.StringIO()
    # Even on a console that would read markup.
    print_comparison(Console(file=text, width=120), record)
    assert "[bold]x[/bold]" in text.getvalue()


def test_verdict_and_files_come_last(compared: Build) -> None:
    record = compared({"a": 0.3, "b": 0.0})
    lines = [line for line in printed(record) if line]
    assert lines[-1].endswith(record["json"]) and lines[-3].endswith(record["figure"])
    assert record["verdict"][0].split(".")[0][:60] in " ".join(lines)


def test_diagnostics_and_numbers_of_papers_are_blocks_of_their_own(compared: Build) -> None:
    record = compared({"a": 0.1, "b": 0.0})
    assert "diagnostics" not in "\n".join(printed(record)) and "papers" not in "\n".join(printed(record))
    record["rows"][0]["diagnostics"] = {"kl": 6.54321, "pairs dropped": 0.012}
    record["reported"] = [{"method": "RiC", "metric": "hypervolume", "value": 0.8, "source": "arXiv 2402.10207"}]
    lines = printed(record)
    assert line_of(lines, "a", "kl 6.54, pairs dropped 0.012")
    assert lines.index("reported by papers, not measured here and not comparable with the above:") + 1 == lines.index(
        "  RiC: hypervolume 0.8 (arXiv 2402.10207)"
    )


def test_hostile_labels_errors_and_sentences_are_shown_escaped(compared: Build, hostile: Any) -> None:
    record = compared({"a": 0.2, "b": 0.0}, dead=("x",))
    record |= {"description": hostile.ALL, "verdict": [hostile.ALL], "task": hostile.ALL, "figure": hostile.ALL}
    for row in record["rows"]:
        row["label"] = f"{row['label']} {hostile.ALL}"
        row["diagnostics"] = {hostile.ALL: 1.0}
        for run in row["runs"]:
            run["error"] = hostile.ALL
    lines = printed(record)
    assert hostile.acting("\n".join(lines)) == []
    assert "[red]a[/red]" in "".join(lines) and "\\x1b[2J" in "".join(lines)


def test_an_optimum_for_other_preferences_is_not_told_as_that_of_the_comparison(compared: Build) -> None:
    from moalign.report.record import optimum_on_grid

    record = compared({"a": 0.1, "b": 0.0})
    assert optimum_on_grid(record) == record["optimum"]["hypervolume"]
    for row in record["rows"]:
        row["own_preferences"] = True
    assert optimum_on_grid(record) is None
    assert "optimum" not in printed(record)[0]
    record["rows"][1]["status"] = "failed"
    record["rows"][1]["own_preferences"] = False
    assert optimum_on_grid(record) is None, "a method that failed answered none"
