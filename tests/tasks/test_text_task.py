"""Tasks on real text: prompts and responses from files, a pool sampled from the base, hashes by content."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from moalign.config.card import TaskCard
from moalign.core.errors import RequestError
from moalign.core.records import Response
from moalign.lm.chat import training_row
from moalign.preflight import inputs
from moalign.preflight.report import Preflight
from moalign.tasks.load import make_task
from moalign.tasks.responses import shown
from moalign.tasks.sandbox import base, world
from moalign.tasks.text import TextTask

PROMPTS = world.prompts()[::20]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = base.make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text_task(results: Path, model: Path | None, data: dict[str, Any], **more: Any) -> TextTask:
    told = {
        "name": "own", "kind": "text", "description": "a test", "model": None if model is None else str(model),
        "objectives": [
            {"name": "short", "kind": "rule", "rule": "brevity", "options": {"unit": "tokens"}},
            {"name": "varied", "kind": "rule", "rule": "regex-count", "options": {"pattern": "[aeiou]"}},
        ],
        "data": data, "splits": {"train": 0.6, "calibration": 0.2, "eval": 0.2},
        "pool": {"prompts": 6, "per_prompt": 2, "calibration_per_prompt": 8},
        "reference_point": [0, 0], "sensitivity_point": [-0.1, -0.1],
        "generation": {"max_new_tokens": 12}, **more,
    }  # fmt: skip
    task = make_task(TaskCard.model_validate(told), results)
    assert isinstance(task, TextTask)
    return task


def write_lines(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


def test_a_task_without_a_model_says_how_to_give_one(tmp_path: Path) -> None:
    task = text_task(tmp_path, None, {"prompts": PROMPTS})
    with pytest.raises(RequestError, match="task own: it needs a model.*--set task.model=") as caught:
        _ = task.hash
    assert caught.value.exit_code == 2
    with pytest.raises(RequestError, match="it needs a model"):
        _ = task.language_model


def test_calibration_samples_outlive_a_scorer_that_fails(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = text_task(tmp_path, model, {"prompts": PROMPTS})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(type(task.panel), "score", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        _ = task.normaliser
    assert (task.folder / "samples-calibration.parquet").is_file()
    again = text_task(tmp_path, model, {"prompts": PROMPTS})
    again._sample_base = None  # type: ignore[assignment,method-assign]  # not asked for
    assert again.normaliser.mean is not None


def test_training_pool_is_sampled_once_from_the_base_and_kept(tmp_path: Path, model: Path) -> None:
    task = text_task(tmp_path, model, {"prompts": PROMPTS})
    scored = task.scored()
    used = task.prompts["train"][:6]
    assert scored.prompts == [prompt for prompt in used for _ in range(2)]
    assert scored.raw.shape == (12, 2)
    assert [-len(response.text.split()) for response in scored.responses] == scored.raw[:, 0].tolist()
    assert scored.responses[0].text != scored.responses[1].text  # two draws, not one twice
    assert (task.folder / "samples.parquet").is_file()

    again = text_task(tmp_path, model, {"prompts": PROMPTS})
    again._sample_base = None  # type: ignore[assignment,method-assign]  # not asked for
    assert again.scored().responses == scored.responses
    other = text_task(tmp_path / "other", model, {"prompts": PROMPTS})
    assert other.scored().responses == scored.responses  # fixed by the card's seed


def test_normaliser_without_data_is_fitted_on_the_bases_own_responses(tmp_path: Path, model: Path) -> None:
    task = text_task(tmp_path, model, {"prompts": PROMPTS})
    assert task.normaliser.count == 8 * len(task.prompts["calibration"][:6])
    assert task.optimum([(0.5, 0.5)], task.eval_prompts) is None  # nobody knows it


def test_logged_responses_go_to_their_prompts_split(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": prompt, "response": "word " * (i % 5 + 1) + str(i)} for i, prompt in enumerate(PROMPTS)]
    source = write_lines(tmp_path / "responses.jsonl", rows)
    task = text_task(tmp_path, model, {"prompts": PROMPTS, "responses": source})
    scored = task.scored()
    told = {row["prompt"]: row["response"] for row in rows}
    assert scored.prompts == task.prompts["train"]
    assert scored.responses == [Response(told[prompt]) for prompt in scored.prompts]
    assert "language_model" not in vars(task)  # the data was enough
    calibration = task.prompts["calibration"]
    assert task.normaliser.count == 8 * len(calibration[:6]) + len(calibration)


def test_an_empty_reply_is_left_out_of_responses_and_pairs(tmp_path: Path, model: Path) -> None:
    """It has no token to learn from: a method that meets it would end in the middle of a comparison."""
    replies = {prompt: " " if at % 5 == 0 else "bake it" for at, prompt in enumerate(PROMPTS)}
    logged = write_lines(tmp_path / "r.jsonl", [{"prompt": p, "response": reply} for p, reply in replies.items()])
    pairs = write_lines(
        tmp_path / "p.jsonl", [{"prompt": p, "chosen": "fry it", "rejected": reply} for p, reply in replies.items()]
    )
    data = {"prompts": PROMPTS, "responses": logged, "pairs": {"short": pairs}}
    task = text_task(tmp_path, model, data)
    known = {prompt for prompt, reply in replies.items() if reply.strip()}
    given = [task.data_responses(split) for split in ("train", "calibration", "eval")]
    assert {prompt for part in given if part for prompt in part.prompts} == known
    assert {pair.prompt for pair in task.data_pairs(0)} == known & set(task.prompts["train"])
    empty = next(prompt for prompt in PROMPTS if prompt not in known)
    assert task.known_response(empty) == Response("fry it")  # the preferred one of its pair
    report = Preflight(tmp_path / "task.yaml")
    assert inputs._check_data(report, task.card)
    assert f"{len(PROMPTS)} rows, {len(PROMPTS) - len(known)} of them with an empty reply, which are left out" in str(
        vars(report)
    )


def test_hash_follows_model_and_data_by_content(tmp_path: Path, model: Path) -> None:
    source = write_lines(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    first = text_task(tmp_path, model, {"prompts": source})
    assert first.prompts.keys() == {"train", "calibration", "eval"}
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    copy = write_lines(moved / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    assert text_task(tmp_path, model, {"prompts": copy}).hash == first.hash
    longer = write_lines(moved / "prompts.jsonl", [{"prompt": prompt} for prompt in [*PROMPTS, "one more"]])
    assert text_task(tmp_path, model, {"prompts": longer}).hash != first.hash


def test_hash_follows_the_end_tokens_of_the_generation_config(tmp_path: Path, model: Path) -> None:
    """They stand in a file of their own, and decide where an answer is over; what config.json says is known anyway."""
    other = tmp_path / "model"
    shutil.copytree(model, other)
    (other / "generation_config.json").unlink()
    first, known = text_task(tmp_path, other, {"prompts": PROMPTS}), LlamaConfig.from_pretrained(other).eos_token_id
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": known}))
    assert text_task(tmp_path, other, {"prompts": PROMPTS}).hash == first.hash
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [known, 7, 9]}))
    more = text_task(tmp_path, other, {"prompts": PROMPTS})
    assert more.identity["ends"] == "7 9" and more.hash != first.hash
    assert {7, 9} <= set(more.codec.ends.ids)


def test_a_scale_fitted_for_other_scorers_is_refused(tmp_path: Path, model: Path) -> None:
    """As when a reward model on the hub moves: its id in the card, and so the task, stay the same."""
    task = text_task(tmp_path, model, {"prompts": PROMPTS})
    assert task.normaliser.scorer_hash == task.panel.scorer_hash
    kept = task.folder / "normaliser.json"
    kept.write_text(kept.read_text().replace(task.panel.scorer_hash, "0" * 16))
    with pytest.raises(RequestError, match=r"normaliser\.json: the task's scale was fitted for other scorers"):
        _ = text_task(tmp_path, model, {"prompts": PROMPTS}).normaliser


def test_hash_follows_reward_models_by_content(tmp_path: Path, model: Path) -> None:
    """Two folders that are both called model are two tasks; a copy of one elsewhere is the same."""

    def classifier(place: Path, seed: int) -> Path:
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=120, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_labels=1,
                             num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
        LlamaForSequenceClassification(config).save_pretrained(place / "model")
        base.make_tokenizer().save_pretrained(place / "model")
        return place / "model"

    def hash_with(folder: Path, gold: bool) -> str:
        learned = {"name": "short", "kind": "hf-classifier", "model": str(folder)}
        varied = {"name": "varied", "kind": "rule", "rule": "regex-count", "options": {"pattern": "[aeiou]"}}
        short = {"name": "short", "kind": "rule", "rule": "brevity", "options": {"unit": "tokens"}}
        more: dict[str, Any] = {"objectives": [short if gold else learned, varied]}
        return text_task(
            tmp_path, model, {"prompts": PROMPTS}, **more, gold_objectives=[learned] if gold else None
        ).hash

    one, other, again = (classifier(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 1), ("c", 0)))
    for gold in (False, True):
        assert hash_with(one, gold) == hash_with(again, gold) != hash_with(other, gold)


def test_stop_text_and_marker_reach_the_policy(tmp_path: Path, model: Path) -> None:
    plain = text_task(tmp_path, model, {"prompts": PROMPTS}, template={"marker": " ?"})
    assert plain.renderer.plain("make soup") == "make soup ?"
    assert plain.renderer.preference("x", (0.25, 0.75)) == "[short 25.0% varied 75.0%] x ?"
    free = shown(plain.scored().responses)
    word = next(text.split()[0] for text in free if len(text.split()) > 1)
    stopped = text_task(tmp_path, model, {"prompts": PROMPTS}, template={"marker": " ?", "stop": [word]})
    assert stopped.hash != plain.hash
    assert shown(stopped.scored().responses) == [text.split(word)[0].strip() if word in text else text for text in free]


def test_empty_response_file_and_broken_line_are_named(tmp_path: Path, model: Path) -> None:
    source = write_lines(tmp_path / "responses.jsonl", [{"prompt": PROMPTS[0], "response": "x"}])
    with (tmp_path / "responses.jsonl").open("a") as file:
        file.write("{broken\n")
    task = text_task(tmp_path, model, {"prompts": PROMPTS, "responses": source})
    with pytest.raises(RequestError, match=r"responses\.jsonl:2"):
        task.scored()


# -- what is known of a sample: its tokens, and whether the limit cut it off -------------------------------------------


def test_the_pool_keeps_tokens_and_what_the_limit_cut(tmp_path: Path, model: Path) -> None:
    more: dict[str, Any] = {"pool": {"prompts": 20, "per_prompt": 8}, "generation": {"max_new_tokens": 30}}
    task = text_task(tmp_path, model, {"prompts": PROMPTS}, **more)
    scored, codec = task.scored(), task.codec
    assert {response.finished for response in scored.responses} == {True, False}
    for response in scored.responses:
        assert response.ids is not None
        assert codec.decode([response.ids]) == [response.text]
        assert response.finished == (response.ids[-1] in codec.ends.ids)
        assert response.finished or len(response.ids) == 30
    table = pd.read_parquet(task.folder / "samples.parquet")
    assert {"prompt", "response", "ids", "finished"} <= set(table.columns)

    again = text_task(tmp_path, model, {"prompts": PROMPTS}, **more)
    again._sample_base = None  # type: ignore[assignment,method-assign]  # not asked for
    assert again.scored().responses == scored.responses
    assert again.scored().first(2).responses == scored.first(2).responses
    (task.folder / "samples.parquet").unlink()
    fresh = text_task(tmp_path, model, {"prompts": PROMPTS}, **more)
    assert fresh.scored().responses == scored.responses  # the seed gives the same tokens


def test_only_a_response_that_came_to_its_end_is_taught_to_end(tmp_path: Path, model: Path) -> None:
    task = text_task(tmp_path, model, {"prompts": PROMPTS})
    scored, codec = task.scored(), task.codec
    at = next(i for i, response in enumerate(scored.responses) if not response.finished and response.text)
    prompt, cut = scored.prompts[at], scored.responses[at]
    row = training_row(codec, task.renderer.plain(prompt), cut, 512)[1]
    assert row == list(cut.ids or ())
    assert not codec.ends.ids & set(row)

    for flag, end in ((True, [*codec.ends.row]), (None, [*codec.ends.row]), (False, [])):
        told = {"prompt": prompt, "response": cut.text, "finished": flag}
        source = write_lines(tmp_path / "responses.jsonl", [told])
        (read,) = text_task(tmp_path, model, {"prompts": PROMPTS, "responses": source}).scored().responses
        assert (read.ids, read.finished) == (None, flag is not False)
        words = codec.tokenizer(cut.text, add_special_tokens=False)["input_ids"]
        assert training_row(codec, task.renderer.plain(prompt), read, 512)[1] == [*words, *end]


def test_a_space_before_a_response_reaches_the_training_row_but_no_scorer(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": prompt, "response": f" sure {i}"} for i, prompt in enumerate(PROMPTS)]
    source = write_lines(tmp_path / "responses.jsonl", rows)
    scored = text_task(tmp_path, model, {"prompts": PROMPTS, "responses": source}).scored()
    assert all(response.text.startswith(" sure ") for response in scored.responses)
    assert all(response.shown.startswith("sure ") for response in scored.responses)


# -- prompts that are too long ---------------------------------------------------------------------------------------


def data_of(tmp_path: Path) -> dict[str, Any]:
    """Prompts, a response to each, and a pair of each."""
    rows = [{"prompt": p, "response": "sure", "chosen": "sure ,", "rejected": "no"} for p in PROMPTS]
    source = write_lines(tmp_path / "data.jsonl", rows)
    return {"prompts": source, "responses": source, "pairs": {"varied": source}}


def sizes(tmp_path: Path, model: Path) -> dict[str, int]:
    """How many tokens each prompt has with an even preference beside it."""
    task = text_task(tmp_path, model, {"prompts": PROMPTS}, generation={"max_prompt_tokens": 512})
    asked = task.codec.prompt_ids([task.renderer.preference(prompt, (0.5, 0.5)) for prompt in PROMPTS])
    return dict(zip(PROMPTS, map(len, asked), strict=True))


def test_prompts_that_are_too_long_are_cut_or_left_out(tmp_path: Path, model: Path) -> None:
    size, data = sizes(tmp_path, model), data_of(tmp_path)
    limit = sorted(size.values())[len(size) // 2]
    long = {prompt for prompt in PROMPTS if size[prompt] > limit}
    assert 0 < len(long) < len(PROMPTS) / 2 + 1
    limits = {"max_prompt_tokens": limit}

    cut = text_task(tmp_path, model, data, generation=limits)
    tokens = sum(size[prompt] - limit for prompt in long)
    assert cut.overlong_report() == {"prompts": len(PROMPTS), "cut": len(long), "cut_tokens": tokens}
    assert {prompt for part in cut.prompts.values() for prompt in part} == set(PROMPTS)
    same = text_task(tmp_path, model, data, generation=limits, overlong="cut")
    assert same.hash == cut.hash

    drop = text_task(tmp_path, model, data, generation=limits, overlong="drop")
    assert drop.hash != cut.hash
    assert drop.overlong_report() == {"prompts": len(PROMPTS), "dropped": len(long)}
    for name, part in drop.prompts.items():
        assert part == [prompt for prompt in cut.prompts[name] if prompt not in long]
        answered = drop.data_responses(name)
        assert answered is not None
        assert answered[0] == part
    assert drop.scored().prompts == drop.prompts["train"]
    assert drop.pairs(1).prompts == drop.prompts["train"]
    assert set(cut.pairs(1).prompts) & long


def test_prompts_that_are_cut_to_one_text_are_in_one_split(tmp_path: Path, model: Path) -> None:
    """What is judged on would else be trained on. It is that of the shortest; all others stay."""
    size = sizes(tmp_path, model)
    limit, end = max(size.values()), max(size, key=lambda prompt: size[prompt])
    alike = [f"{start} {end}" for start in PROMPTS[:8]]
    prompts = sorted([*PROMPTS, *alike])
    rows = [{"prompt": prompt, "response": "sure ."} for prompt in prompts]
    pairs = [{"prompt": prompt, "chosen": "sure .", "rejected": "no ."} for prompt in prompts]
    data = {
        "prompts": prompts,
        "responses": write_lines(tmp_path / "rows.jsonl", rows),
        "pairs": {"short": write_lines(tmp_path / "pairs.jsonl", pairs)},
    }

    def of(task: TextTask) -> dict[str, str]:
        for name, part in task.prompts.items():
            answered = task.data_responses(name)
            assert answered is not None and answered.prompts == part
        assert [pair.prompt for pair in task.data_pairs(0)] == task.prompts["train"]
        return {prompt: name for name, part in task.prompts.items() for prompt in part}

    whole = of(text_task(tmp_path, model, data, generation={"max_prompt_tokens": 512}))
    assert len({whole[prompt] for prompt in alike}) > 1
    cut = of(text_task(tmp_path, model, data, generation={"max_prompt_tokens": limit}))
    assert {cut[prompt] for prompt in alike} == {whole[end]}
    assert {prompt: cut[prompt] for prompt in PROMPTS} == {prompt: whole[prompt] for prompt in PROMPTS}


def test_dropping_every_prompt_is_refused(tmp_path: Path, model: Path) -> None:
    limit = min(sizes(tmp_path, model).values()) - 1
    more: dict[str, Any] = {"generation": {"max_prompt_tokens": limit}}
    task = text_task(tmp_path, model, {"prompts": PROMPTS}, overlong="drop", **more)
    with pytest.raises(
        RequestError, match=f"overlong: drop leaves no prompt; all are longer than .*max_prompt_tokens = {limit}$"
    ):
        _ = task.prompts
    assert text_task(tmp_path, model, {"prompts": PROMPTS}, **more).prompts  # cutting leaves them all
