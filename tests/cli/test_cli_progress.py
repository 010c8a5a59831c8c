"""Progress: sparse lines where there is no terminal, a bar where there is one."""

from __future__ import annotations

import io
import json
import subprocess
import sys

from moalign.cli import jobs
from moalign.cli.progress import progress_display


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_a_line_every_few_seconds_with_rate_and_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    with progress_display(stream, terminal=False, clock=clock) as progress:
        for done in range(1, 101):
            clock.now = done / 10  # ten steps a second for ten seconds
            progress("training", done, 100)
    shown = lines(stream)
    assert len(shown) == 4
    assert shown[0] == "training 30/100, 10/s, 7.0 s left"
    assert shown[-1].startswith("training 100/100, 10/s, 9.9 s")


def test_quick_stages_say_nothing() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = progress_display(stream, terminal=False, clock=clock)
    for done in range(1, 6):
        clock.now += 0.1
        progress("scoring", done, 5)
    assert lines(stream) == []


LOST = """
import sys
from moalign.cli.progress import progress_display
sys.stdin.read()  # until nobody reads stderr any more
times = iter(range(0, 100, 5))
with progress_display(sys.stderr, clock=lambda: next(times)) as progress:
    for done in range(5):
        progress("training", done, 5)
print("trained")
"""


def test_work_goes_on_when_nobody_reads_its_progress() -> None:
    """As in ``moalign train METHOD 2> >(head -n 1)``, and when the disk of a log is full."""
    child = [sys.executable, "-c", LOST]
    with subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stderr.close()
        process.stdin.close()
        assert process.stdout.read() == b"trained\n"
    assert process.returncode == 0


def test_a_resumed_stage_does_not_count_what_was_there() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = progress_display(stream, terminal=False, clock=clock)
    progress("training", 900, 1000)
    clock.now = 5
    progress("training", 910, 1000)
    assert lines(stream) == ["training 910/1000, 2.0/s, 45 s left"]


def test_the_end_is_told_once_and_a_second_round_counts_anew() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = progress_display(stream, terminal=False, clock=clock)
    progress("scoring", 0, 10)
    clock.now = 4
    progress("scoring", 5, 10)
    clock.now = 5
    progress("scoring", 10, 10)
    progress("scoring", 10, 10)
    assert lines(stream) == ["scoring 5/10, 1.2/s, 4.0 s left", "scoring 10/10, 2.0/s, 5.0 s"]
    clock.now = 6
    progress("scoring", 0, 10)
    clock.now = 10
    progress("scoring", 8, 10)
    assert lines(stream)[-1] == "scoring 8/10, 2.0/s, 1.0 s left"


def test_stages_side_by_side_have_rates_of_their_own() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = progress_display(stream, terminal=False, clock=clock)
    for second in range(1, 8):
        clock.now = second
        progress("a: online", 10 * second, 100)
        progress("b: online", 5 * second, 100)
    assert lines(stream) == ["a: online 30/100, 10/s, 7.0 s left", "a: online 60/100, 10/s, 4.0 s left"]
    clock.now = 10
    progress("b: online", 50, 100)
    assert lines(stream)[-1] == "b: online 50/100, 5.0/s, 10 s left"


def test_a_job_tells_its_progress_now_and_then_and_every_end() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = jobs.listener(stream, clock)
    for step in range(1, 11):
        clock.now = step / 10
        progress("online", step, 10)
    progress("scoring", 3, 3)
    assert [json.loads(line) for line in lines(stream)] == [
        ["online", 1, 10],
        ["online", 6, 10],
        ["online", 10, 10],
        ["scoring", 3, 3],
    ]


def test_more_than_all_is_all() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = progress_display(stream, terminal=False, clock=clock)
    clock.now = 4
    progress("answering", 12, 10)
    assert lines(stream) == ["answering 10/10"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_counts() -> None:
    stream = Terminal()
    with progress_display(stream, terminal=True) as progress:
        progress("training [all]", 3, 10)
        progress("training [all]", 10, 10)
        progress("training [all]", 2, 10)
    text = stream.getvalue()
    assert "training [all]" in text
    assert "10/10" in text or "2/10" in text


def test_an_untouched_bar_leaves_nothing() -> None:
    stream = Terminal()
    with progress_display(stream, terminal=True):
        pass
    assert stream.getvalue() == ""


def test_a_long_grid_does_not_fill_the_terminal() -> None:
    from moalign.cli.progress import SHOWN, Bars

    bars = Bars(Terminal())
    for number in range(66):
        for done in range(3):
            bars(f"preference {number}", done, 2)
    kept = list(bars.tasks)
    bars.__exit__()
    assert kept == [f"preference {number}" for number in range(66 - SHOWN, 66)]


def test_unfinished_stages_are_never_taken_away() -> None:
    from moalign.cli.progress import Bars

    bars = Bars(Terminal())
    bars("the whole", 1, 100)
    for number in range(40):
        bars(f"part {number}", 2, 2)
    kept = list(bars.tasks)
    bars.__exit__()
    assert kept[0] == "the whole"
    assert kept[-1] == "part 39"
