"""The page: what it holds, that nothing in it can act, how large it is, and (in Chromium) that it works."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moalign.core import preferences
from moalign.report import page, templates
from moalign.report.page import Answers

Build = Callable[..., dict[str, Any]]

HOSTILE = [
    "<script>window.hacked = 1</script>",
    '<img src="x" onerror="window.hacked = 1">',
    "</script><script>window.hacked = 1</script>",
    "<!--<script>",
    "]]> --> &lt;b&gt; &amp; \u2028 \u2029 {{data}} {{js}} \\u003c",
    "'\"`${window.hacked = 1}",
    "\ud800 half a pair",
    "<svg onload=window.hacked=1><style>*{display:none}</style>",
    "<answers>",
]


class Reader(HTMLParser):
    """Takes a page apart as a browser does: elements, and the content of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.inside = True
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "script"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data


def answered(
    record: dict[str, Any], texts: Callable[[str, int, int], str] | None = None, prompts: int = 4
) -> list[Answers]:
    """Answers of every judged row: ``texts(label, preference, prompt)``."""
    write = texts or (lambda label, k, p: f"{label} answers prompt {p} at preference {k}")
    result = []
    for row in record["rows"]:
        if not row["points"]:
            continue
        wanted = [point["prefs"] for point in row["points"]]
        result.append(
            Answers(
                row["label"],
                wanted,
                [f"prompt {p}" for p in range(prompts)],
                [[write(row["label"], k, p) for p in range(prompts)] for k in range(len(wanted))],
                [[[k + p / 10 for _ in record["objectives"]] for p in range(prompts)] for k in range(len(wanted))],
            )
        )
    return result


def blocks(content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The comparison and the answers, as the page's script reads them."""
    scripts = Reader(content.decode()).scripts
    assert len(scripts) == 3
    return json.loads(scripts[0]), json.loads(scripts[1])


# --- what it holds --------------------------------------------------------------------------------------------------


def test_the_page_holds_the_comparison_and_the_answers(compared: Build) -> None:
    record = compared({"a": 0.2, "b": 0.0}, dead=("x",))
    held, answers = blocks(page.page(record, answered(record)))
    assert held["task"] == "toy" and [row["label"] for row in held["rows"]] == ["a", "b", "x"]
    assert held["rows"][0]["hypervolume"] == record["rows"][0]["hypervolume"] and held["command"] == record["command"]
    text = answers["texts"][answers["rows"]["b"]["texts"][7][2]]
    assert text == "b answers prompt 2 at preference 7" and answers["note"] == ""
    assert answers["rows"]["b"]["scores"][7][2] == [7.2, 7.2]
    assert b"Answers of each method's first seed that finished" in page.page(record)  # a verdict may warn of another


def rows_of(content: bytes, table: str) -> list[str]:
    """The body rows of a table, as they stand in the page."""
    body = content.decode().split(f'<table id="{table}">')[1].split("<tbody>")[1].split("</tbody>")[0]
    return body.split("<tr")[1:]


def test_the_winner_stands_out_in_the_leaderboard_only(compared: Build) -> None:
    record = {**compared({"a": 0.2, "b": 0.0}), "winner": "a"}
    record["rows"][0]["diagnostics"] = {"kl": 6.5}
    content = page.page(record)
    assert [row.startswith(' class="winner"') for row in rows_of(content, "board")] == [True, False]
    assert len(rows_of(content, "cost")) == 2 and len(rows_of(content, "diagnostics")) == 1
    assert content.count(b'class="winner"') == 1


def test_the_gaps_are_of_the_methods_that_have_one(compared: Build) -> None:
    record = compared({"a": 0.2, "b": 0.0})
    assert b'id="gap"' not in page.page(record)
    record["rows"][1]["gap"] = 0.0625
    (row,) = rows_of(page.page(record), "gap")
    assert ">b</td>" in row and "+0.0625" in row


def test_a_page_of_failed_runs_counts_no_prompt_and_has_no_control_character(compared: Build) -> None:
    record = compared(gains={}, dead=("moc",))
    record["prompts"] = None
    record["rows"][0]["error"] = record["rows"][0]["runs"][0]["error"] = "no <b>way</b>\x1b[2J"
    text = page.page(record, []).decode()
    assert "0 prompts" in text and "None prompts" not in text
    assert "\x1b" not in text and "no &lt;b&gt;way" in text


def test_the_same_bytes_twice(compared: Build) -> None:
    record = compared({"a": 0.2, "b": 0.0})
    assert page.page(record, answered(record)) == page.page(record, answered(record))


def test_it_opens_offline(compared: Build) -> None:
    record = compared({"a": 0.2, "b": 0.0})
    result = Reader(page.page(record, answered(record)).decode())
    for tag, attributes in result.tags:
        assert not {"src", "href", "srcset", "action", "style"} & set(attributes), (tag, attributes)
    assert {tag for tag, _ in result.tags}.isdisjoint({"link", "iframe", "img", "object", "embed", "base", "form"})


def test_repeated_texts_are_kept_once(compared: Build) -> None:
    record = compared({"a": 0.2, "b": 0.0})
    _, answers = blocks(page.page(record, answered(record, lambda label, k, p: f"{label} {p}")))
    assert answers["texts"] == [f"{label} {p}" for label in "ab" for p in range(4)]


# --- nothing in it can act ------------------------------------------------------------------------------------------


def hostile(record: dict[str, Any]) -> list[Answers]:
    """The comparison with hostile texts everywhere that a text of others can reach; and hostile answers."""
    bad = HOSTILE[2]
    record["description"], record["command"], record["verdict"] = bad, bad, HOSTILE
    record["rows"][0]["diagnostics"] = {bad: 1.0}
    record["rows"][0]["runs"][0]["error"] = bad
    record["reported"] = [{"method": bad, "metric": bad, "value": 1.0, "source": bad, "setting": bad}]
    record["environment"]["platform"] = bad
    answers = answered(record, lambda label, k, p: HOSTILE[p], prompts=len(HOSTILE))
    return [Answers(a.label, a.preferences, HOSTILE, a.responses, a.scores) for a in answers]


def test_no_text_can_end_its_block_or_begin_a_tag(compared: Build) -> None:
    record = compared({"a": 0.2, "</script><b>": 0.0})
    answers = hostile(record)
    content = page.page({**record, "task": HOSTILE[2]}, answers).decode()
    result = Reader(content)
    assert [tag for tag, _ in result.tags].count("script") == 3
    assert not {"img", "b"} & {tag for tag, _ in result.tags}
    for block in result.scripts[:2]:
        assert not set("<>&\u2028\u2029") & set(block)
    held, kept = json.loads(result.scripts[0]), json.loads(result.scripts[1])
    assert held["description"] == HOSTILE[2] and held["reported"][0]["source"] == HOSTILE[2]
    assert kept["texts"] == HOSTILE and kept["prompts"] == HOSTILE


@pytest.mark.slow
@settings(deadline=None)
@given(st.recursive(st.text() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_any_text_comes_back_from_its_block(value: Any) -> None:
    block = page._json(value)
    assert not set("<>&\u2028\u2029") & set(block)
    block.encode()
    assert json.loads(block) == value


def test_the_script_writes_text_only() -> None:
    script = "\n".join(templates.asset(name) for name in page.SCRIPTS)
    ways = "innerHTML outerHTML insertAdjacentHTML document.write eval( Function( srcdoc DOMParser setHTML"
    assert [way for way in ways.split() if way in script] == []
    assert "textContent" in script


def test_the_policy_allows_this_script_and_this_style_only(compared: Build) -> None:
    content = page.page(compared({"a": 0.2, "b": 0.0})).decode()
    policy = next(a["content"] for tag, a in Reader(content).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    script, style = Reader(content).scripts[2], re.search(r"<style>(.*?)</style>", content, re.DOTALL)
    assert style is not None
    for text, name in ((script, "script-src"), (style.group(1), "style-src")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy


# --- how large it is ------------------------------------------------------------------------------------------------

WORDS = ["".join(part) for part in np.random.default_rng(0).choice(list("abcdefghijklmnop"), (4000, 5))]


def many(record: dict[str, Any], words: int, prompts: int = 256) -> list[Answers]:
    rng = np.random.default_rng(1)

    def text(label: str, k: int, p: int) -> str:
        return " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=words))

    return answered(record, text, prompts)


@pytest.mark.slow
@pytest.mark.parametrize(("words", "packed"), [(22, ""), (90, "gzip")])
def test_ten_methods_by_eleven_preferences_by_256_prompts_fit(compared: Build, words: int, packed: str) -> None:
    record = compared({f"method-{i}": 0.02 * i for i in range(10)})
    content = page.page(record, many(record, words))
    assert len(content) <= page.LIMIT
    tags = Reader(content.decode())
    assert next(a for tag, a in tags.tags if a.get("id") == "answers")["data-packed"] == packed
    text = tags.scripts[1]
    kept = json.loads(gzip.decompress(base64.b64decode(text)) if packed else text)
    assert len(kept["prompts"]) == 256 and kept["note"] == ""


def test_what_would_not_fit_is_left_out_and_said(compared: Build) -> None:
    record = compared({"a": 0.2, "b": 0.0})
    content = page.page(record, many(record, 40, prompts=200), limit=300_000)
    assert len(content) <= 300_000
    _, kept = blocks(content)
    count = len(kept["prompts"])
    assert 20 < count < 200 and kept["note"].startswith(f"The first {count} of 200 prompts")
    assert all(len(row) == count for rows in kept["rows"].values() for row in rows["texts"])


def test_a_packed_page_keeps_to_its_limit_too(compared: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PLAIN", 0)
    record = compared({"a": 0.2, "b": 0.0})
    answers = many(record, 40, prompts=30)
    whole = page.page(record, answers)
    assert b'data-packed="gzip"' in whole
    assert page.page(record, answers, limit=len(whole)) == whole
    for less in range(1, 6):
        assert len(page.page(record, answers, limit=len(whole) - less)) <= len(whole) - less


def test_the_page_is_rendered_once(compared: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[str] = []

    def render(template: str, context: Any) -> str:
        rendered.append(template)
        return templates.render(template, context)

    monkeypatch.setattr(page, "render", render)
    record = compared({"a": 0.2, "b": 0.0})
    page.page(record, answered(record))
    assert rendered == ["page.html"]


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(browser: Any, tmp_path: Path) -> Callable[..., Any]:
    def show(record: dict[str, Any], answers: list[Answers], fragment: str = "") -> Any:
        path = tmp_path / "page.html"
        path.write_bytes(page.page(record, answers))
        browser.open(path, fragment)
        return browser

    return show


FAMILIES = {"a": "online", "b": "online", "c'<&\"": "offline"}


def test_one_family_is_shown_in_every_table_and_chart(compared: Build, shown: Callable[..., Any]) -> None:
    """Of pairs those stay in which one of the two is of it; a label may hold any character."""
    record = compared({label: 0.2 - 0.1 * n for n, label in enumerate(FAMILIES)})
    for row in record["rows"]:
        row["family"] = FAMILIES[row["label"]]
        row["gap"], row["believed"] = 0.1, {"hypervolume": 0.3, "inner_product": 0.4, "false_wins": []}
    browser = shown(record, answered(record))

    def seen(table: str) -> int:
        return int(
            browser.run(f"[...document.querySelectorAll('#{table} tbody tr')].filter((row) => !row.hidden).length")
        )

    def choose(name: str) -> tuple[int, ...]:
        browser.run(f"document.getElementById('family').value = '{name}'")
        browser.run("document.getElementById('family').dispatchEvent(new Event('change'))")
        return seen("board"), seen("cost"), seen("pairs"), len(cards(browser))

    def named(place: str) -> list[str]:
        labels = f"[...document.querySelectorAll('#{place} [data-label]')].filter((one) => one.checkVisibility())"
        found: list[str] = browser.run(f"{labels}.map((one) => one.dataset.label)")
        return found

    assert named("legend") == named("believed-of") == list(FAMILIES)
    assert choose("offline") == (1, 1, 2, 1)
    assert browser.run("document.querySelectorAll('#front .mark').length") == len(record["grid"])
    assert browser.run("document.querySelectorAll('#believed-true .mark').length") == 1
    assert named("legend") == named("believed-of") == ["c'<&\""]
    assert choose("online") == (2, 2, 3, 2)
    assert choose("") == (3, 3, 3, 3)


def test_without_families_there_is_nothing_to_choose(compared: Build, shown: Callable[..., Any]) -> None:
    record = compared({"a": 0.2, "b": 0.0})
    assert shown(record, answered(record)).run("document.getElementById('family')") is None


def cards(browser: Any) -> list[str]:
    result: list[str] = browser.run("[...document.querySelectorAll('.answer')].map((one) => one.textContent)")
    return result


@pytest.mark.slow
def test_hostile_text_stays_text(compared: Build, shown: Callable[..., Any]) -> None:
    record = compared({"a": 0.2, "</script><b>": 0.0})
    browser = shown(record, hostile(record))
    for number, text in enumerate(HOSTILE):
        browser.run(f"document.getElementById('which').value = {number}")
        browser.run("document.getElementById('which').dispatchEvent(new Event('change'))")
        assert cards(browser) == [text] * 2
    assert browser.run("window.hacked") is None
    assert browser.run("document.images.length + document.querySelectorAll('main b, main script').length") == 0
    assert browser.run("document.scripts.length") == 3


def test_nothing_is_asked_of_the_network_and_nothing_fails(compared: Build, shown: Callable[..., Any]) -> None:
    record = compared({"a": 0.2, "b": 0.0})
    browser = shown(record, answered(record))
    browser.screenshot()
    requests = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith(("file:", "about:"))] == []
    faults = [e for e in browser.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert faults == []


def test_the_slider_at_work(compared: Build, shown: Callable[..., Any], tmp_path: Path) -> None:
    record = compared({"a": 0.2, "b": 0.0})
    browser = shown(record, answered(record), "#preference=6&prompt=1")
    assert cards(browser) == [f"{label} answers prompt 1 at preference 6" for label in "ab"]
    before = browser.screenshot("#s-answers")
    browser.run("document.getElementById('slider').focus()")
    browser.key("ArrowRight")
    assert cards(browser) == [f"{label} answers prompt 1 at preference 7" for label in "ab"]
    assert browser.run("document.getElementById('asked').textContent") == "helpfulness 0.7, harmlessness 0.3"
    assert "#preference=7&prompt=1" in browser.run("location.href")
    after = browser.screenshot("#s-answers")
    assert before != after and after.startswith(b"\x89PNG")
    moved = changed(before, after)
    # The slider's thumb, what it says, and both cards: more than a handful of pixels, far from all.
    assert 0.001 < moved < 0.3
    browser.pointer("button[aria-label='next prompt']", click=True)
    assert cards(browser) == [f"{label} answers prompt 2 at preference 7" for label in "ab"]


def changed(item: bytes, other: bytes) -> float:
    """The share of pixels that differ."""
    import io

    from matplotlib import image

    first, second = (image.imread(io.BytesIO(content))[..., :3] for content in (item, other))
    assert first.shape == second.shape
    return float((np.abs(first - second).max(axis=-1) > 0.02).mean())


def test_pointing_at_a_mark_tells_preference_mean_and_interval(compared: Build, shown: Callable[..., Any]) -> None:
    record = compared({"a": 0.2, "b": 0.0})
    browser = shown(record, answered(record))
    point = next(point for point in record["rows"][0]["points"] if point["prefs"] == list(record["grid"][0]))
    browser.pointer("#front g .mark")
    text = browser.run("document.getElementById('tip').hidden ? null : document.getElementById('tip').textContent")
    assert text.startswith("a at 0, 1\n") and f"helpfulness {point['mean'][0]:.3f}" in text.replace("-0.000", "0.000")
    assert f"[{point['ci'][1][0]:.3f}, {point['ci'][1][1]:.3f}]" in text
    browser.pointer("#front g .mark", click=True)
    assert cards(browser)[0].endswith("at preference 0")


def test_a_mark_that_is_chosen_by_keyboard_keeps_the_focus(compared: Build, shown: Callable[..., Any]) -> None:
    record = compared({"a": 0.2, "b": 0.0})
    browser = shown(record, answered(record))
    browser.run("document.querySelectorAll('#front .mark')[7].focus()")
    browser.key("Enter")
    assert cards(browser)[0].endswith("at preference 7")
    assert browser.run("[...document.querySelectorAll('#front .mark')].indexOf(document.activeElement)") == 7


def test_one_long_interval_does_not_shrink_all_others(compared: Build, shown: Callable[..., Any]) -> None:
    record = compared({"a": 0.2, "b": 0.0}, optimum=False)
    record["rows"][1]["points"][5]["ci"] = [[-20.0, 20.0], [-20.0, 20.0]]
    browser = shown(record, answered(record))
    read = "[...document.querySelectorAll('#front {}')].map((one) => one.getBoundingClientRect().{})"
    least, most = min(browser.run(read.format(".axis", "left"))), max(browser.run(read.format(".axis", "right")))
    assert min(browser.run(read.format(".bar", "left"))) >= least - 1
    assert max(browser.run(read.format(".bar", "right"))) <= most + 1
    shown_by = max(browser.run(read.format(".mark", "right"))) - min(browser.run(read.format(".mark", "left")))
    assert shown_by > 0.5 * (most - least)


def test_the_leaderboard_sorts(compared: Build, shown: Callable[..., Any]) -> None:
    record = compared({"a": 0.2, "b": 0.0, "c": 0.1}, dead=("x",))
    browser = shown(record, answered(record))
    column = "[...document.querySelectorAll('#board tbody tr')].map((row) => row.cells[1].textContent)"
    assert browser.run(column) == ["a", "c", "b", "x (failed)"]
    browser.pointer("#board th:nth-child(2) button", click=True)
    assert browser.run(column) == ["a", "b", "c", "x (failed)"]
    browser.pointer("#board th:nth-child(3) button", click=True)
    browser.pointer("#board th:nth-child(3) button", click=True)
    assert browser.run(column) == ["b", "c", "a", "x (failed)"], "upwards; what has no number stays last"
    assert browser.run("document.querySelector('#board th:nth-child(3)').ariaSort") == "ascending"


@pytest.mark.slow
def test_kl_to_base_has_a_column_where_a_row_has_it(compared: Build, shown: Callable[..., Any]) -> None:
    record = compared({"a": 0.2, "b": 0.1, "c": 0.0}, dead=("x",))
    record["rows"][1]["front"] = 1.0
    row = "(n) => [...document.querySelectorAll(`#board tbody tr:nth-child(${n}) td`)].map((one) => one.textContent)"
    heads = "[...document.querySelectorAll('#board th, #cost th')].map((one) => one.textContent)"
    browser = shown(record, answered(record))
    assert "KL to base" not in browser.run(heads)
    spread = browser.run(heads).index("spacing")
    assert browser.run(f"({row})(1)")[spread] == f"{record['rows'][0]['indicators']['spacing']:.3f}"
    assert browser.run(f"({row})(2)")[spread] == "–"  # a single point is not spread at all
    record["rows"][0]["quality"].update(kl=3.207, kl_bound=False)
    record["rows"][1]["quality"].update(kl=0.6363, kl_bound=True)
    browser = shown(record, answered(record))
    assert browser.run(heads).count("KL to base") == 2
    at = browser.run(heads).index("KL to base")
    assert [browser.run(f"({row})({n})")[at] for n in (1, 2, 3, 4)] == ["3.21", "≤ 0.64", "–", "–"]


def test_three_objectives_choose_on_the_grid(compared: Build, shown: Callable[..., Any]) -> None:
    record = compared({"a": 0.2, "b": 0.0}, objectives=3)
    browser = shown(record, answered(record))
    assert browser.run("document.getElementById('slider').tagName") == "SELECT"
    spots = browser.run("document.querySelectorAll('#picker circle').length")
    assert spots == len(record["grid"]) == len(preferences.grid(3, 4))
    browser.pointer("#picker circle:nth-of-type(3)", click=True)
    assert cards(browser)[0].endswith("at preference 2")
    assert browser.run("document.getElementById('slider').value") == "2"
    before = browser.run("document.querySelector('#front text:last-of-type').textContent")
    browser.run("(s => { s.value = 2; s.dispatchEvent(new Event('change')) })(document.querySelector('#axes select'))")
    assert browser.run("document.querySelector('#front text:last-of-type').textContent") != before


def test_a_method_of_other_preferences_says_so(compared: Build, shown: Callable[..., Any]) -> None:
    record = compared({"a": 0.2, "b": 0.0})
    answers = answered(record)
    few = answers[1]
    answers[1] = Answers(
        few.label, [few.preferences[0], few.preferences[10]], few.prompts, few.responses[:2], few.scores[:2]
    )
    browser = shown(record, answers, "#preference=8")
    notes = browser.run("[...document.querySelectorAll('.card .note')].map((one) => one.textContent)")
    assert notes == ["it answers for its nearest preference, 1, 0"]


def test_a_narrow_window_is_never_scrolled_sideways(compared: Build, shown: Callable[..., Any]) -> None:
    record = compared({"a": 0.2, "b": 0.0})
    browser = shown(record, answered(record))
    browser.send("Emulation.setDeviceMetricsOverride", width=360, height=800, deviceScaleFactor=1, mobile=False)
    try:
        assert browser.run("document.documentElement.scrollWidth") == 360
    finally:
        browser.send("Emulation.clearDeviceMetricsOverride")


@pytest.mark.slow
def test_a_packed_page_opens_and_dark_is_dark(compared: Build, shown: Callable[..., Any]) -> None:
    import io

    from matplotlib import image

    record = compared({f"method-{i}": 0.02 * i for i in range(10)})
    answers = many(record, 40)
    browser = shown(record, answers)
    first = answered(record, lambda label, k, p: answers[0].responses[k][p], prompts=1)[0].responses[5][0]
    assert cards(browser)[0] == first or first in cards(browser)
    light, dark = (image.imread(io.BytesIO(browser.screenshot("#s-front", dark=dark))) for dark in (False, True))
    assert light[..., :3].mean() > 0.9 and dark[..., :3].mean() < 0.3
