"""Starts commands as several processes, as torchrun does: forked, so that they need not import what is imported here.

Not from the tests' own process: one that has trained must not be forked. Read from stdin: a line of JSON per command;
written to stdout: its processes' exit codes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

import moalign.training.offline_dpo
import moalign.training.online
import moalign.training.sft  # noqa: F401
from moalign.cli.main import main
from moalign.core.errors import WorkError
from moalign.training.job import Job

LONGEST = 240.0
"""Seconds."""


def ends(step: int, how: str) -> None:
    """Make this process end after a step: killed, or by an error with the message ``how``."""
    plain = Job.advance

    def advance(job: Job, lm: Any, phase: str, done: int, steps: int) -> None:
        plain(job, lm, phase, done, steps)
        if done == step and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if done == step:
            raise WorkError(how)

    Job.advance = advance  # type: ignore[method-assign]


def be(rank: int, request: dict[str, Any]) -> None:
    """Be the process of that rank."""
    os.environ |= {**request["variables"], "RANK": str(rank), "LOCAL_RANK": str(rank)}
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = open(f"{request['where']}/{name}-{rank}", "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        os.dup2(stream.fileno(), number)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if request["ending"] and request["ending"][0] == rank:
        ends(*request["ending"][1:])
    os._exit(main(request["arguments"]))


def run(request: dict[str, Any]) -> list[int]:
    """Run a command; returns the exit codes, negative for signals."""
    codes: dict[int, int] = {}
    started = []
    for rank in range(request["count"]):
        started.append(os.fork())
        if not started[-1]:
            be(rank, request)
    last = time.monotonic() + LONGEST
    while len(codes) < len(started):
        for process in set(started) - set(codes):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes[process] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > last:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[process] for process in started]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
