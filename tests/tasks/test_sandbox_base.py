"""The sandbox's bases: cached by content, trained once, and with the properties that the task promises."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from moalign.config.load import load_card
from moalign.core.errors import RequestError
from moalign.core.paths import cache_root
from moalign.lm import language_model
from moalign.lm.sampler import sample, uniforms
from moalign.pareto.hypervolume import hypervolume
from moalign.pareto.indicators import controllability
from moalign.tasks.load import make_task
from moalign.tasks.sandbox import base, world
from moalign.tasks.sandbox.optimum import all_rewards, corpus_log_probs
from moalign.tasks.sandbox.scorer import parse
from moalign.tasks.sandbox.task import SandboxTask

NAMES = ["helpfulness", "harmlessness"]
Get = Callable[[str], SandboxTask]
Scores = Callable[[str], tuple[np.ndarray, np.ndarray]]


def cached(names: list[str], kind: str) -> bool:
    folder = cache_root() / "sandbox" / f"{kind}-{len(names)}-{base.identity(names, kind, 0)}-{base.TOKENIZER}"
    return (folder / "model.safetensors").is_file()


def unless_cached(name: str, names: list[str], kind: str) -> Any:
    """A base that has to be trained first makes the test slow."""
    return pytest.param(name, marks=() if cached(names, kind) else pytest.mark.slow)


ALL = ["sandbox", unless_cached("sandbox-cold", NAMES, "cold"), unless_cached("sandbox-3", [*NAMES, "humor"], "warm")]
WARM, COLD = [ALL[0], ALL[2]], [ALL[1]]


# -- found by content ----------------------------------------------------------------------------------


def test_identity_is_stable_and_tells_requests_apart() -> None:
    told = base.identity(NAMES, "warm", 0)
    assert told == base.identity(tuple(NAMES), "warm", 0)
    assert len(told) == 12 and int(told, 16) >= 0
    others = [(NAMES, "cold", 0), (NAMES, "warm", 1), (NAMES[::-1], "warm", 0), ([*NAMES, "humor"], "warm", 0)]
    assert len({told, *(base.identity(*other) for other in others)}) == 5


SETTINGS = ["TILT", "FIRST_TILT", "HOLD", "FALL", "PREFERENCE_SHARE", "WIDTH", "LAYERS", "HEADS", "INNER", "STEPS"]


@pytest.mark.parametrize("name", [*SETTINGS, "BATCH", "RATE", "VERSION"])
def test_identity_changes_with_every_setting_of_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = base.identity(NAMES, "warm", 0)
    monkeypatch.setattr(base, name, getattr(base, name) * 2)
    assert base.identity(NAMES, "warm", 0) != before


CHANGES: dict[str, Any] = {
    "TOPICS": {**world.TOPICS, "fly a kite": (3, 1)},
    "QUESTIONS": (*world.QUESTIONS, "{topic} {tail} ?"),
    "TAILS": {**world.TAILS, "at night": 1},
    "SLOTS": world.SLOTS[::-1],
    "RISK": (0.4, 0.8, 1.3, 2.0),
    "HUMOR": (1.0, 0.9, 0.7, 0.4),
    "ON_TOPIC": 1.0,
    "CAUTION": 0.0,
    "TOOL_RIGHT": 2.0,
    "TOOL_WRONG": -0.5,
}
"""All of the world that the corpus is made of."""


@pytest.mark.parametrize("name", CHANGES)
def test_identity_changes_with_the_world(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = base.identity(NAMES, "warm", 0)
    monkeypatch.setattr(world, name, CHANGES[name])
    assert base.identity(NAMES, "warm", 0) != before


@pytest.mark.parametrize("name", ["SHORT", "PER_CHARACTER", "WARMTH"])
def test_the_further_objectives_are_in_the_identity_of_bases_that_have_them_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [base.identity(names, "warm", 0) for names in (world.OBJECTIVES[:3], world.OBJECTIVES)]
    monkeypatch.setattr(world, name, world.WARMTH[::-1] if name == "WARMTH" else getattr(world, name) * 2)
    after = [base.identity(names, "warm", 0) for names in (world.OBJECTIVES[:3], world.OBJECTIVES)]
    assert after[0] == before[0] and after[1] != before[1]


# -- the same on every machine --------------------------------------------------------------------------

TRAIN = """
import sys, torch
from safetensors.torch import save_file
from moalign.lm import reproducible
from moalign.tasks.sandbox import base

torch.set_num_threads(1)
tokenizer = base.make_tokenizer()
model = reproducible.in_double(base.untrained(tokenizer))
reproducible.draw([weight for weight in model.parameters() if weight.dim() > 1], 0.02, 0)
corpus = base.Corpus(["helpfulness", "harmlessness"], "warm", 0, tokenizer)
if sys.argv[2] == "unrounded":
    reproducible.to_grid = lambda weights: None
base._steps(model, corpus, torch.optim.AdamW(model.parameters(), lr=base.RATE), range(12), lambda *told: None)
save_file({name: weight.detach() for name, weight in model.named_parameters()}, sys.argv[1])
"""


@pytest.mark.parametrize("rounded", [True, False], ids=["rounded", "unrounded"])
def test_another_processor_trains_the_same_base(rounded: bool, other_processor: dict[str, str], tmp_path: Path) -> None:
    """Without the rounding there is a difference, so the other code path really was taken."""
    weights = []
    for number, environment in enumerate(({}, other_processor)):
        place = tmp_path / f"{number}.safetensors"
        told = [sys.executable, "-c", TRAIN, str(place), "rounded" if rounded else "unrounded"]
        subprocess.run(told, check=True, env={**os.environ, **environment})
        weights.append(load_file(place))
    apart = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    assert (apart == 0) if rounded else (0 < apart < 1e-12)


PUBLISHED = {"sandbox": "716c33496cdfd54f"}
"""Of whose weights the tables in results/ were made: the first digits of the file's SHA-256."""


@pytest.mark.parametrize("name", [unless_cached("sandbox", NAMES, "warm")])
def test_this_machine_has_the_base_of_the_published_tables(name: str, sandbox: Get) -> None:
    task = sandbox(name)
    task.base_source()
    assert task.base_sum == PUBLISHED[name]


# -- trained once --------------------------------------------------------------------------------------


def untrained(objectives: Any, kind: str, seed: int, progress: Any = None) -> tuple[Any, Any, dict[str, Any]]:
    """Stands in for training: a model of one layer, at once."""
    tokenizer = base.make_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1)  # fmt: skip
    return LlamaForCausalLM(config), tokenizer, {"kind": kind, "seed": seed}


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_ensure_trains_once_and_finds_the_folder_again(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(base, "train", lambda *told: calls.append(told[:3]) or untrained(*told))
    folder = base.ensure(NAMES, "warm", 3)
    assert folder == base.ensure(NAMES, "warm", 3)
    assert calls == [(NAMES, "warm", 3)]
    assert folder.is_relative_to(own_cache) and base.identity(NAMES, "warm", 3) in folder.name
    assert json.loads((folder / "base.json").read_text()) == {"kind": "warm", "seed": 3}
    lm = language_model.load(str(folder), device="cpu")
    assert lm.encode(["make soup"]) == [lm.tokenizer.convert_tokens_to_ids(["<bos>", "make", "soup"])]
    base.ensure(NAMES, "cold", 3)
    assert len(calls) == 2


def test_a_task_knows_which_base_its_machine_has(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines could train different weights from one seed; a base that the card names is in the card's hash."""
    sums = []
    monkeypatch.setattr(base, "train", untrained)  # other weights at every call
    for number in (0, 1):
        monkeypatch.setenv("MOALIGN_CACHE", str(own_cache / str(number)))
        task = make_task(load_card("sandbox"), own_cache)
        assert task.base_sum is None  # nothing is trained to know it
        task.base_source()
        sums.append(task.base_sum)
    assert None not in sums and len(set(sums)) == 2
    named = make_task(load_card("sandbox", [f"task.model={task.base_source()[0]}"]), own_cache)
    assert named.base_source() and named.base_sum is None


def test_failed_training_leaves_nothing_behind(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("the power went")

    monkeypatch.setattr(base, "train", fail)
    with pytest.raises(RuntimeError, match="the power went"):
        base.ensure(NAMES, "warm", 0)
    assert [path for path in (own_cache / "sandbox").iterdir() if path.is_dir()] == []
    monkeypatch.setattr(base, "train", untrained)
    assert (base.ensure(NAMES, "warm", 0) / "model.safetensors").is_file()


def test_a_cache_that_cannot_be_written_is_told_with_its_variable(own_cache: Path) -> None:
    own_cache.write_text("no folder")
    with pytest.raises(RequestError, match="cannot write here: .* name another folder with MOALIGN_CACHE=DIR"):
        base.ensure(NAMES, "warm", 0)


def _ask(start: Any, log: str, out: Any) -> None:
    """One process: note every training, hold it until the other process has had time to ask as well."""

    def slowly(*told: Any) -> Any:
        with open(log, "a") as file:
            file.write("trained\n")
        threading.Event().wait(0.5)
        return untrained(*told)

    base.train = slowly  # type: ignore[assignment]
    start.wait()
    out.put(str(base.ensure(NAMES, "warm", 0)))


def test_two_processes_that_ask_at_once_train_once(own_cache: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # inherits the imports; nothing here has started threads
    start, out, log = context.Barrier(2), context.Queue(), tmp_path / "log"
    workers = [context.Process(target=_ask, args=(start, str(log), out)) for _ in range(2)]
    for worker in workers:
        worker.start()
    folders = {out.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(folders) == 1
    assert log.read_text() == "trained\n"


# -- the corpus ----------------------------------------------------------------------------------------


def test_z_scale_against_drawn_responses() -> None:
    mean, sd = base.z_scale()
    rng = np.random.default_rng(0)
    prompts = world.prompts()[::7]
    drawn = []
    for prompt in prompts:
        context = world.context_of(prompt)
        drawn.append(all_rewards(context)[rng.choice(15625, size=100, p=np.exp(corpus_log_probs(context)))])
    scores = np.concatenate(drawn)
    np.testing.assert_allclose(scores.mean(axis=0), mean, atol=0.06)
    np.testing.assert_allclose(scores.std(axis=0), sd, atol=0.06)


def test_corpus_draws_the_prior_and_tilts_only_what_is_stated() -> None:
    corpus = base.Corpus(NAMES, "warm", 0, base.make_tokenizer())
    which, weights, stated, probs = corpus.draw(400, tilt=0.3)
    assert stated.mean() == pytest.approx(base.PREFERENCE_SHARE, abs=0.07)
    assert weights.sum(axis=1) == pytest.approx(np.ones(400)) and (weights >= 0).all()
    assert (weights.max(axis=1) == 1).mean() > 0.1  # corners are asked for
    sd = base.z_scale()[1][:2]
    for i in range(400):
        context = world.context_of(corpus.prompts[which[i]])
        z = world.slot_rewards(context)[..., :2] / sd
        expected = world.prior(context) * np.exp(0.3 * stated[i] * (z @ weights[i]))
        np.testing.assert_allclose(probs[i], expected / expected.sum(axis=1, keepdims=True), atol=1e-9)


def test_tilt_falls_for_the_warm_base_and_is_never_there_for_the_cold_one() -> None:
    tokenizer = base.make_tokenizer()
    warm, cold = (base.Corpus(NAMES, kind, 0, tokenizer) for kind in ("warm", "cold"))
    assert warm.tilt(0) == base.FIRST_TILT and warm.tilt(base.STEPS) == pytest.approx(base.TILT)
    tilts = [warm.tilt(step) for step in range(0, base.MOST_STEPS, 10)]
    assert tilts == sorted(tilts, reverse=True)
    assert {cold.tilt(step) for step in range(0, base.MOST_STEPS, 10)} == {0.0}


def test_corpus_loss_is_the_distance_from_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is a mean KL divergence: a uniform model pays log of the vocabulary less the corpus's entropy.

    The weight on impossible words adds to it for a model that gives them mass.
    """
    tokenizer = base.make_tokenizer()

    class Uniform:
        def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            logits = torch.zeros(*input_ids.shape, len(tokenizer))
            return dataclasses.make_dataclass("Output", ["logits"])(logits)

    weighted = float(base.Corpus(NAMES, "cold", 0, tokenizer).loss(Uniform(), 0))
    monkeypatch.setattr(base, "GRAMMAR", 0.0)
    loss = float(base.Corpus(NAMES, "cold", 0, tokenizer).loss(Uniform(), 0))
    # Of 185 words between 1 and 5 can follow, and a uniform model gives each of them 1/185.
    fewest, most = np.log(len(tokenizer) / 5), np.log(len(tokenizer))
    assert 4.0 * fewest <= weighted - loss <= 4.0 * most
    # At most log(vocabulary); the entropy of 6 slots of at most log(5) is spread over about 20 tokens.
    assert np.log(len(tokenizer)) - 6 * np.log(5) / 16 < loss < np.log(len(tokenizer))


# -- what the trained bases promise --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_base_stays_below_45_percent_of_the_optimal_hypervolume(name: str, sandbox: Get, answers: Scores) -> None:
    task = sandbox(name)
    prompted, plain = answers(name)
    unit = task.normaliser.unit
    optimal = hypervolume(unit(task.optimum(task.grid, task.eval_prompts)), task.card.reference_point)
    shares = {
        "prompting": hypervolume(unit(prompted.mean(axis=1)), task.card.reference_point) / optimal,
        "plain": hypervolume(unit(plain.mean(axis=0)[None]), task.card.reference_point) / optimal,
    }
    assert optimal > 0
    assert all(0 < share < 0.45 for share in shares.values()), shares


@pytest.mark.parametrize("name", WARM)
def test_warm_base_follows_a_stated_preference(name: str, sandbox: Get, answers: Scores) -> None:
    grid = np.array(sandbox(name).grid)
    prompted, _ = answers(name)
    tau = controllability(grid, prompted.mean(axis=1))["tau"]
    assert tau >= 0.6
    assert tau > np.quantile(shuffled_taus(grid, prompted), 0.999)


def shuffled_taus(grid: np.ndarray, scores: np.ndarray, draws: int = 1000) -> np.ndarray:
    """Tau when a preference means nothing: each prompt's answers dealt out to the preferences anew; ``[draws]``."""
    rng = np.random.default_rng(0)
    count, prompts, _ = scores.shape
    dealt = rng.permuted(np.tile(np.arange(count)[:, None], (draws, 1, prompts)).reshape(draws, count, prompts), axis=1)
    means = scores[dealt, np.arange(prompts)].mean(axis=2)
    return np.array([controllability(grid, row)["tau"] for row in means])


@pytest.mark.parametrize("name", COLD)
def test_cold_base_does_not_follow_a_stated_preference(name: str, sandbox: Get, answers: Scores) -> None:
    """Noise: were the preference ignored, a prompt's answers could be dealt to the preferences in any order.

    Tau of the base must be one that such dealing gives (two-sided, 1 %); over 11 preferences its spread is about
    0.2, so that 0 within noise is a statement about tau, not about a tiny slope that endless sampling would find.
    """
    grid = np.array(sandbox(name).grid)
    prompted, _ = answers(name)
    tau = controllability(grid, prompted.mean(axis=1))["tau"]
    null = shuffled_taus(grid, prompted)
    assert abs(float(null.mean())) < 0.05
    low, high = np.quantile(null, [0.005, 0.995])
    assert low <= tau <= high, (tau, low, high)


@pytest.mark.parametrize("name", ALL)
def test_base_writes_whole_responses_of_at_most_24_tokens(name: str, sandbox: Get) -> None:
    task = sandbox(name)
    lm = task.language_model
    prompts = task.eval_prompts
    drawn = sample(lm, lm.encode(prompts), uniforms(5, range(len(prompts)), 40))
    lengths = drawn.response_mask.sum(dim=1)
    tokens = drawn.input_ids[:, -drawn.response_mask.shape[1] :]
    texts = lm.decode([row[: int(n)].tolist() for row, n in zip(tokens, lengths, strict=True)])
    whole = [min(parse(text)[0]) >= 0 and parse(text)[1] == 0 for text in texts]
    assert np.mean(whole) >= 0.9  # sampled at temperature 1 from a small model
    assert all(2 <= int(n) <= 24 for n, fine in zip(lengths, whole, strict=True) if fine)
    assert len(set(texts)) > len(texts) // 2  # it is no parrot


@pytest.mark.parametrize("name", ALL)
def test_base_reads_the_question(name: str, sandbox: Get) -> None:
    """The right tool is ON_TOPIC = 1.5 in log odds likelier: 53 %; ignoring the question would give 20 %."""
    task = sandbox(name)
    lm = task.language_model
    prompts = task.eval_prompts
    drawn = sample(lm, lm.encode(prompts), uniforms(6, range(len(prompts)), 26))
    tokens = drawn.input_ids[:, -drawn.response_mask.shape[1] :]
    rows = zip(tokens.tolist(), drawn.response_mask.sum(dim=1).tolist(), strict=True)
    tools = [parse(text)[0][world.TOOL_SLOT] for text in lm.decode([row[:n] for row, n in rows])]
    right = np.mean([tool == world.context_of(prompt).domain for tool, prompt in zip(tools, prompts, strict=True)])
    assert 0.35 < right < 0.75


@pytest.mark.parametrize("name", ALL)
def test_base_is_small_and_as_told(name: str, sandbox: Get) -> None:
    task = sandbox(name)
    lm = task.language_model
    assert 90_000 < lm.model.num_parameters() < 120_000
    told = json.loads((Path(lm.source) / "base.json").read_text())
    assert told["objectives"] == task.names and told["kind"] == task.card.sandbox.base
    if told["kind"] == "warm":
        assert told["tau"] >= base.WARM_TAU
