"""What every task shares, on a sandbox task with a stand-in base: splits, pool, normaliser, hash, the files kept."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moalign.config.card import TaskCard
from moalign.config.load import load_card
from moalign.core.errors import RequestError
from moalign.core.records import Response
from moalign.data import splits
from moalign.lm import language_model
from moalign.lm.quality import short_below
from moalign.tasks.load import make_task
from moalign.tasks.responses import Responses, shown
from moalign.tasks.sandbox import base, world
from moalign.tasks.sandbox.scorer import parse, rewards
from moalign.tasks.sandbox.task import PER_PROMPT, SandboxTask
from moalign.tasks.text import TextTask

SETTINGS = (
    "task.pool.prompts=12",
    "task.pool.calibration_per_prompt=2",
    "task.evaluation.prompts=16",
    "task.evaluation.samples=1",
)


def tiny_lm() -> language_model.LanguageModel:
    tokenizer = base.make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3)  # fmt: skip
    return language_model.wrap(LlamaForCausalLM(config), tokenizer, "tiny", "0" * 16, device="cpu")


@pytest.fixture
def task(tmp_path: Path) -> SandboxTask:
    return stand_in(tmp_path)


def stand_in(results: Path, *settings: str, name: str = "sandbox") -> SandboxTask:
    """A sandbox task whose base is an untrained model, so that nothing trains."""
    made = make_task(load_card(name, [*SETTINGS, *settings]), results)
    assert isinstance(made, SandboxTask)
    made.language_model = tiny_lm()
    return made


def test_kinds_of_task(tmp_path: Path) -> None:
    assert type(make_task(load_card("sandbox"), tmp_path)) is SandboxTask
    assert type(make_task(load_card("stories"), tmp_path)) is TextTask
    assert list(tmp_path.iterdir()) == []  # nothing is computed before it is asked for


def test_prompts_are_split_by_hash_and_the_judge_takes_the_first(task: SandboxTask) -> None:
    assert sorted(itertools.chain(*task.prompts.values())) == sorted(world.prompts())
    for name, prompts in task.prompts.items():
        assert all(splits.split_of(prompt, task.card.splits) == name for prompt in prompts)
    assert task.eval_prompts == task.prompts["eval"][:16]
    assert len(task.grid) == 11 and task.grid[0] == (0.0, 1.0)


def test_a_prompt_in_two_splits_is_refused(task: SandboxTask, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = {name: ["make soup", name] for name in splits.SPLITS}
    monkeypatch.setattr(splits, "split", lambda *_: twice)
    with pytest.raises(RequestError, match="make soup"):
        _ = task.prompts


def test_data_responses_follow_the_prior(tmp_path: Path) -> None:
    task = stand_in(tmp_path)
    prompts, responses, sampled = task.data_responses("train")
    assert sampled == 0
    assert len(prompts) == len(responses) == PER_PROMPT * len(task.prompts["train"])
    assert prompts[:PER_PROMPT] == [prompts[0]] * PER_PROMPT
    assert (prompts, responses, 0) == stand_in(tmp_path).data_responses("train")  # fixed by the seed
    assert set(prompts) == set(task.prompts["train"])
    found, expected = np.zeros((6, 5)), np.zeros((6, 5))
    for prompt, response in zip(prompts, responses, strict=True):
        filled, strays = parse(response.text)
        assert min(filled) >= 0 and strays == 0
        found[np.arange(6), filled] += 1
        expected += world.prior(world.context_of(prompt))
    # 5 standard errors of a count; expected sums chances of independent draws
    assert (np.abs(found - expected) < 5 * np.sqrt(expected)).all()


def test_scored_gives_the_data_with_exact_scores(task: SandboxTask) -> None:
    scored = task.scored()
    assert scored.raw.shape == (len(scored.prompts), 2)
    for i in range(0, len(scored.prompts), 401):
        assert scored.raw[i] == pytest.approx(rewards(scored.prompts[i], scored.responses[i].text)[:2])


def test_normaliser_is_fitted_once_on_the_calibration_split_and_kept(task: SandboxTask, tmp_path: Path) -> None:
    asked: list[str] = []
    draw = task._sample_base

    def noted(split: str, per_prompt: int, what: str) -> Responses:
        asked.append(split)
        return draw(split, per_prompt, what)

    task._sample_base = noted  # type: ignore[method-assign]
    fitted = task.normaliser
    assert asked == ["calibration"]
    prompts, responses, _ = draw("calibration", 2, "x")
    assert set(prompts) == set(task.prompts["calibration"][:12]) and len(prompts) == 24
    data = task.data_responses("calibration")
    raw = np.concatenate(
        [task.panel.score(rows, shown(texts)) for rows, texts in ((prompts, responses), (data.prompts, data.responses))]
    )
    assert fitted.count == len(raw)
    np.testing.assert_allclose(fitted.mean, raw.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(fitted.sd, raw.std(axis=0), rtol=1e-12)
    np.testing.assert_allclose(fitted.lo, np.quantile(raw, 0.01, axis=0), rtol=1e-12)
    assert (task.folder / "normaliser.json").is_file()

    again = stand_in(tmp_path)
    again._sample_base = None  # type: ignore[assignment,method-assign]  # not asked for
    assert again.normaliser == fitted


def test_normaliser_of_the_card_needs_no_model(tmp_path: Path) -> None:
    card = load_card("sandbox")
    numbers = {"mean": 1.0, "sd": 2.0, "lo": 0.0, "hi": 4.0}
    told = {**card.model_dump(), "normaliser": dict.fromkeys(card.objective_names, numbers)}
    task = make_task(TaskCard.model_validate(told), tmp_path)
    assert task.normaliser.sd == (2.0, 2.0)
    assert "language_model" not in vars(task)


def test_optimum_is_in_the_tasks_own_units_and_order(tmp_path: Path) -> None:
    task = stand_in(tmp_path)
    best = task.optimum(task.grid, task.eval_prompts)
    assert best.shape == (11, 2)
    z = task.normaliser.z
    for weights, point in zip(task.grid, best, strict=True):
        utilities = z(best) @ np.array(weights)
        assert float(z(point[None])[0] @ np.array(weights)) == pytest.approx(utilities.max())
    soft = task.optimum(task.grid, task.eval_prompts, beta=1.0)
    assert (np.diag(z(soft) @ np.array(task.grid).T) < np.diag(z(best) @ np.array(task.grid).T)).all()


def test_hash_covers_what_changes_a_score_and_nothing_else(tmp_path: Path) -> None:
    def of(*settings: str) -> str:
        return make_task(load_card("sandbox", settings), tmp_path).hash

    plain = of()
    assert len(plain) == 16 and plain == of()
    changed = [
        "task.sandbox.base=cold", "task.sandbox.seed=1", "task.generation.temperature=0.7", "task.evaluation.seed=1",
        "task.splits.salt=x", "task.reference_point=[0,0.1]", "task.grid=5", "task.template.marker=x",
    ]  # fmt: skip
    assert len({plain, *map(of, changed)}) == len(changed) + 1
    assert of("task.description=other words") == plain
    assert of("task.suite=[sft]") == plain


def test_hash_follows_the_content_of_a_users_own_base(tmp_path: Path) -> None:
    lm = tiny_lm()
    hashes = []
    for place in ("a", "b"):
        lm.model.save_pretrained(tmp_path / place)
        lm.tokenizer.save_pretrained(tmp_path / place)
        hashes.append(make_task(load_card("sandbox", [f"task.model={tmp_path / place}"]), tmp_path).hash)
    assert hashes[0] == hashes[1]  # moved, not changed
    with torch.no_grad():
        lm.model.lm_head.weight[0, 0] += 1
    lm.model.save_pretrained(tmp_path / "b")
    task = make_task(load_card("sandbox", [f"task.model={tmp_path / 'b'}"]), tmp_path)
    assert task.hash != hashes[0] != make_task(load_card("sandbox"), tmp_path).hash
    assert task.language_model.source == str(tmp_path / "b")


def test_sampling_takes_the_cards_limits(task: SandboxTask) -> None:
    told = task.sampling(seed=9)
    limits = task.card.generation
    assert (told.max_new_tokens, told.temperature, told.top_p, told.seed) == (26, 1.0, 1.0, 9)
    assert (told.batch_size, told.max_prompt_tokens, told.stop) == (limits.batch_size, limits.max_prompt_tokens, ())
    assert task.sampling(9, temperature=0.0).temperature == 0.0  # greedy is not "not given"
    assert stand_in(task.results, "task.template.stop=[x]").sampling(0).stop == ("x",)


def test_work_is_reported(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    task = stand_in(tmp_path)
    task.progress = lambda *what: told.append(what)
    _ = task.normaliser
    assert told and told[-1] == ("calibrating", 24, 24)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_a_part_is_made_by_one_of_several_threads(task: SandboxTask) -> None:
    """Two users of one results folder that ask at once: the second waits and finds the part made."""
    path, made = task.folder / "part", []
    inside = threading.Event()

    def make() -> None:
        with task._once(path) as missing:
            inside.set()
            if missing:
                threading.Event().wait(0.2)
                made.append(1)
                path.write_text("x")

    workers = [threading.Thread(target=make) for _ in range(2)]
    workers[0].start()
    inside.wait(5)
    workers[1].start()
    for worker in workers:
        worker.join(10)
    assert made == [1]


def test_failure_while_making_a_part_frees_the_lock(task: SandboxTask) -> None:
    with pytest.raises(RuntimeError), task._once(task.folder / "part"):
        raise RuntimeError
    with task._once(task.folder / "part") as missing:
        assert missing


def test_unwritable_results_folder_is_named(task: SandboxTask, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RequestError, match="--results") as caught, task._once(task.folder / "part"):
        raise AssertionError("it must not get here")
    assert caught.value.exit_code == 2


def test_damaged_normaliser_names_its_file(task: SandboxTask) -> None:
    task.folder.mkdir(parents=True)
    (task.folder / "normaliser.json").write_text(json.dumps({"mean": [1]}))
    with pytest.raises(RequestError, match="normaliser.json.*delete it"):
        _ = task.normaliser


@pytest.mark.parametrize("content", [b"", b"null", b"{}", b"[" * 100_000])
def test_damaged_parts_name_their_file(task: SandboxTask, content: bytes) -> None:
    task.folder.mkdir(parents=True)
    for name in ("short.json", "samples.parquet"):
        (task.folder / name).write_bytes(content)
    with pytest.raises(RequestError, match=r"short\.json.*delete it"):
        _ = task.short_below
    with pytest.raises(RequestError, match=r"samples\.parquet.*delete it"):
        task._pool()


# -- what short means -------------------------------------------------------------------------------------------------


def test_short_comes_from_the_calibration_data_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = stand_in(tmp_path)
    texts = [Response("well ,"), Response("sure thing , use a")]
    monkeypatch.setattr(task, "data_responses", lambda split: Responses([], {"calibration": texts}[split]))
    assert task.tokens(["well ,", ""]) == [task.language_model.tokenizer.convert_tokens_to_ids(["well", ","]), []]
    assert task.short_below == 2
    again = make_task(task.card, tmp_path)
    again.data_responses = None  # type: ignore[assignment,method-assign]  # not asked for
    assert again.short_below == 2
    assert "language_model" not in vars(again)


def test_without_data_it_comes_from_the_samples_that_the_normaliser_was_fitted_on(
    task: SandboxTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(task), "data_responses", lambda self, split: None)
    asked: list[str] = []
    draw = task._sample_base

    def noted(split: str, per_prompt: int, what: str) -> Responses:
        asked.append(split)
        return draw(split, per_prompt, what)

    monkeypatch.setattr(task, "_sample_base", noted)
    assert task.normaliser.count == 24
    responses = draw("calibration", 2, "x").responses
    assert task.short_below == short_below([len(ids) for ids in task.tokens(shown(responses))])
    assert asked == ["calibration"]  # sampled once for both
    (task.folder / "short.json").unlink()
    fresh = stand_in(task.results)
    assert fresh.short_below == task.short_below  # the same by itself


def test_or_from_the_card(tmp_path: Path) -> None:
    told = load_card("sandbox").model_dump()
    assert TaskCard.model_validate({**told, "quality": {}}).hash() == TaskCard.model_validate(told).hash()
    card = TaskCard.model_validate({**told, "quality": {"short": 3}})
    assert card.hash() != TaskCard.model_validate(told).hash()
    task = make_task(card, tmp_path)
    assert task.short_below == 3
    assert "language_model" not in vars(task)
    with pytest.raises(ValueError, match="quality.short"):
        TaskCard.model_validate({**told, "quality": {"short": 0}})


def test_hash_follows_the_content_of_what_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, a function of a module, and the folder of a reward model, which is called ``model`` in every run."""
    import importlib
    import linecache
    import sys

    from transformers import LlamaForSequenceClassification

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def hashed(objective: str, key: str = "objectives.0") -> str:
        sets = [f"task.gold_objectives=[{objective}]"] if key == "gold" else [f"task.{key}={objective}"]
        return make_task(load_card("sandbox", sets), tmp_path).hash

    seen = []
    for sign in ("", "-", ""):
        for name in ("scorers.py", "my_rewards.py"):
            (tmp_path / name).write_text(f"def f(prompts, responses):\n    return [{sign}1.0 for _ in responses]\n")
        sys.modules.pop("my_rewards", None)
        importlib.invalidate_caches()
        linecache.clearcache()
        functions = (str(tmp_path / "scorers.py") + ":f", "my_rewards:f")
        objectives = [f"{{name: helpfulness, kind: python, function: '{name}'}}" for name in functions]
        seen.append([hashed(text, key) for text in objectives for key in ("objectives.0", "gold")])
    assert seen[0] == seen[2] and not set(seen[0]) & set(seen[1]) and len(set(seen[0])) == 4
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=len(base.make_tokenizer()), num_labels=1, pad_token_id=0, **sizes)
        folder = tmp_path / str(seed) / "model"
        LlamaForSequenceClassification(config).save_pretrained(folder, safe_serialization=True)
        base.make_tokenizer().save_pretrained(folder)
        folders.append(hashed(f"{{name: helpfulness, kind: hf-classifier, model: {folder}}}"))
    assert folders[0] != folders[1]
    assert hashed("{name: helpfulness, kind: sandbox}") == make_task(load_card("sandbox"), tmp_path).hash


def test_labels_of_an_objective_that_is_none_of_the_worlds_are_refused(tmp_path: Path) -> None:
    task = stand_in(tmp_path, "task.model=somewhere", "task.objectives.1={name: brevity, kind: rule, rule: brevity}")
    with pytest.raises(RequestError, match="sandbox.annotators.groups: specialists: unknown objective 'brevity'"):
        task.pair_sets()
