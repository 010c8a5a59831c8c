"""A reward that says nothing for many steps is a warning in the run's notes, also after an interruption."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moalign.methods import mo_odpo
from moalign.training.constant_rewards import STEPS_ON_END, ConstantRewards
from moalign.training.job import Job

MakeJob = Callable[..., Job]
LONG = STEPS_ON_END
VARIES, ALIKE = np.array([[1.0, 0.0], [2.0, 1.0]]), np.array([[1.0, 5.0], [2.0, 5.0]])


def seen(*rewards: Any) -> list[str]:
    constant = ConstantRewards(["kind", "brief"])
    for step, z in enumerate(rewards, start=1):
        constant.add(step, z)
    return constant.warnings("online")


def test_many_steps_on_end_without_a_difference_are_told() -> None:
    assert seen(*[ALIKE] * (LONG - 1), VARIES, *[ALIKE] * (LONG - 1)) == []
    (text,) = seen(VARIES, *[ALIKE] * (LONG + 2), VARIES, *[ALIKE] * LONG)
    assert text.startswith(
        f"phase online: brief scored all responses of a step alike in {LONG + 2} steps on end (up to step {LONG + 3})"
    )


def test_a_single_response_is_no_sign() -> None:
    assert seen(*[ALIKE[:1]] * 50) == []


@pytest.mark.slow
def test_it_is_in_the_notes_also_of_a_run_that_was_interrupted(
    make_job: MakeJob, stop: Any, interrupted: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(where: str, **more: Any) -> Any:
        settings = ("batch=2", f"steps={LONG + 2}", "checkpoint_every=3", "log_every=5")
        job = make_job("mo-odpo", *settings, where=where, **more)
        z = job.panel.z
        monkeypatch.setattr(type(job.panel), "z", lambda self, raw, cap: z(raw, cap) * [1, 0])
        try:
            mo_odpo.learn_from_pairs(job, job.task.language_model, job.config)
        finally:
            monkeypatch.undo()
        return job.notes["warnings"]

    with pytest.raises(interrupted):
        train("a", progress=stop("online", 8))
    (text,) = train("a")
    assert f" in {LONG + 2} steps on end (up to step {LONG + 2})" in text
    assert [text] == train("b")
