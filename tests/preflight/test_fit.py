"""Settings that make a recipe fit a card: the order in which they are tried, and what is said where none do."""

from __future__ import annotations

from pathlib import Path

import pytest

from moalign.config import find, load
from moalign.config.load import ResolvedRequest
from moalign.core.errors import RequestError
from moalign.lm.architecture import Architecture
from moalign.methods import registry
from moalign.methods.base import Capabilities
from moalign.preflight import check, cost, fit, memory
from moalign.preflight.memory import GIB


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub models that are not here are noted, as on a machine that has a network."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def request(method: str, *overrides: str, task: str = "hh-rlhf") -> tuple[ResolvedRequest, Architecture, Capabilities]:
    found, path = registry.get(method), find.find_recipe_file(task, method)
    resolved = load.load_recipe(path, method, task, overrides, found.Config)
    sizes = memory.sizes_of(str(resolved.card.model))
    assert sizes is not None
    return resolved, sizes, found.capabilities


def texts(method: str, gib: float, *overrides: str) -> list[str]:
    return fit.fit(*request(method, *overrides), gib).texts


@pytest.mark.parametrize(
    ("text", "gib"), [("24GB", 24), ("24", 24), ("80 GiB", 80), ("23.5gb", 23.5), ("0GB", None), ("A100", None)]
)
def test_the_size_of_a_card(text: str, gib: float | None) -> None:
    if gib is not None:
        assert fit.gib_of(text) == gib
        return
    with pytest.raises(RequestError, match=f"--gpu: found '{text}'; allowed: the memory of a card, such as 24GB"):
        fit.gib_of(text)


def test_less_memory_takes_more_of_the_settings_in_their_order() -> None:
    """MO-ODPO of 7B: nothing on 80 GB, then sampling in parts, smaller parts, checkpointing, offloading, 4 bits."""
    seen = [texts("mo-odpo", gib) for gib in (80, 48, 30, 26, 24, 20, 16)]
    names = [[text.rpartition(".")[2].split("=")[0] for text in each] for each in seen]
    order = ["sample_batch", "micro_batch", "gradient_checkpointing", "offload", "load_in_4bit"]
    assert names[0] == [] and names[1] == ["sample_batch"]
    most = [max((order.index(name) for name in each if name in order), default=-1) for each in names]
    assert most == sorted(most) and most[-1] == order.index("load_in_4bit")


@pytest.mark.parametrize("method", ["mo-odpo", "modpo", "moc", "ric", "pcm"])
@pytest.mark.parametrize("gib", [24, 48])
def test_what_is_proposed_is_accepted_and_fits(method: str, gib: int) -> None:
    found = fit.fit(*request(method), gib)
    assert found.settings is not None, found
    again = request(method, *found.texts, f"needs.gpu_memory_gib={gib}")
    phases = memory.estimate(*again).phases
    assert max(phase.total for phase in phases) == found.peak.total <= gib * GIB


def test_no_more_than_is_needed() -> None:
    """Each size is the largest that fits, and no switch is on that does nothing."""
    resolved, sizes, able = request("mo-odpo")
    found = fit.fit(resolved, sizes, able, 24)
    assert found.settings is not None
    for name, value in found.settings.items():
        less = {k: v for k, v in found.settings.items() if k != name} | ({} if value is True else {name: 2 * value})
        estimate = memory.estimate(fit.changed(resolved, less), sizes, able)
        assert estimate.peak.total > 24 * GIB * fit.USABLE, name


def test_without_any_that_fit_the_smallest_card_is_named() -> None:
    found = fit.fit(*request("mo-odpo"), 6)
    assert found.settings is None and found.smallest_gib in fit.CARDS
    assert fit.fit(*request("mo-odpo"), float(found.smallest_gib or 0)).settings is not None
    below = [card for card in fit.CARDS if 6 < card < (found.smallest_gib or 0)]
    assert all(fit.fit(*request("mo-odpo"), card).settings is None for card in below)


def test_cards_of_three_sizes_are_reported_with_hours_that_nobody_measured() -> None:
    report = check.check("hh-rlhf/mo-odpo")
    assert [card["card_gib"] for card in report.cards] == [24, 48, 80] and report.problems == []
    assert all(card["measured"] == "not measured on a GPU yet" for card in report.cards)
    assert set(report.cards[0]["hours"]) == {"RTX 3090", "RTX 4090"} and report.cards[2]["hours"]["H100"] > 0
    assert {name for name, _ in report.checked} >= {"24 GB", "48 GB", "80 GB"}
    assert set(cost.CARDS) == set(cost.GPUS)
    (one,) = check.check("hh-rlhf/mo-odpo", gpu="40GB").cards
    assert one["card_gib"] == 40 and one["fits"] is True and one["hours"] == {}


def test_what_was_measured_is_told_of_the_recipe_as_it_is_alone() -> None:
    (as_it_is,) = check.check("assistant/moc", gpu="24GB").cards
    assert as_it_is["settings"] == {} and "GiB on an H200, 3 runs" in as_it_is["measured"]
    for gpu, more in (("4GB", []), ("24GB", ["batch=16"])):
        (other,) = check.check("assistant/moc", more, gpu=gpu).cards
        assert other["measured"] == "not measured on a GPU yet"


def test_a_card_too_small_for_any_setting_is_a_problem() -> None:
    (problem,) = check.check("hh-rlhf/mo-odpo", gpu="6GB").problems
    assert problem.startswith("--gpu 6GB: no settings fit: with all that save memory ")
    assert problem.endswith("; the smallest card that would do has 16 GB")


def test_recipes_that_need_no_gpu_are_asked_of_none_unless_a_card_is_named(tmp_path: Path) -> None:
    assert check.check("assistant/mo-odpo", results=tmp_path).cards == []
    (card,) = check.check("assistant/mo-odpo", results=tmp_path, gpu="8GB").cards
    assert card["settings"] == {}
    with pytest.raises(RequestError, match="--gpu: hh-rlhf is a task card; name a recipe, like hh-rlhf/sft"):
        check.check("hh-rlhf", gpu="24GB")


def test_parts_of_sampling_cost_time_by_the_cost_model() -> None:
    """Decoding waits once for each token of each part."""
    hours = []
    for more in ((), ("sample_batch=32",)):
        resolved, sizes, able = request("mo-odpo", *more)
        hours.append(cost.estimate(resolved, able, sizes).hours)
    whole, parts = hours
    assert whole is not None and parts is not None and parts > whole
