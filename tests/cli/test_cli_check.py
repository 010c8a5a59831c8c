"""``moalign check`` as typed: every problem of a recipe and of what it points to, at once."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from moalign.tasks.sandbox.base import make_tokenizer

CARD = """\
name: tales
kind: text
description: short stories
model: ../base
objectives:
  - {name: brevity, kind: rule, rule: brevity}
  - {name: dialogue, kind: rule, rule: dialogue-share}
reference_point: [0, 0]
sensitivity_point: [-0.1, -0.1]
data:
  prompts: {path: prompts.jsonl}
splits: {train: 0.5, calibration: 0.25, eval: 0.25}
"""
RECIPE = """\
method: sft
task: ./task.yaml
policy:
  lora: {r: 4}
config:
  steps: 3
needs:
  gpu_memory_gib: 24
"""
CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 100,
}
LAYER = {
    **{f"self_attn.{name}_proj": [16, 16] for name in "qkvo"},
    **{f"mlp.{name}_proj": [48, 16] for name in ("gate", "up")},
    "mlp.down_proj": [16, 48],
    "input_layernorm": [16],
    "post_attention_layernorm": [16],
}
SHAPES = {
    "model.embed_tokens.weight": [100, 16],
    **{f"model.layers.0.{name}.weight": shape for name, shape in LAYER.items()},
    "model.norm.weight": [16],
    "lm_head.weight": [100, 16],
}


def write_model(folder: Path) -> Path:
    """Write a folder that has the form of a model: shapes in a safetensors header, zeros for weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    make_tokenizer().save_pretrained(folder)
    header, at = {}, 0
    for name, shape in SHAPES.items():
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
    return folder


@pytest.fixture
def recipe(moalign: Any, tmp_path: Path) -> Path:
    """A sound recipe ``tales/sft.yaml`` with its card, prompts and model."""
    write_model(tmp_path / "base")
    folder = tmp_path / "tales"
    folder.mkdir()
    (folder / "task.yaml").write_text(CARD)
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "Story {i} is about"}}\n' for i in range(40)))
    path = folder / "sft.yaml"
    path.write_text(RECIPE)
    return path


def test_a_sound_recipe_says_what_was_looked_at(moalign: Any, recipe: Path, tmp_path: Path) -> None:
    ended = moalign("check", "tales/sft.yaml")
    assert (ended.code, ended.errors) == (0, [])
    for text in ("recipe", "card", "model", "data.prompts", "splits", "objective brevity", "memory", "nothing wrong"):
        assert text in ended.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tales"]  # nothing was written


def test_prompts_that_are_too_long_are_counted(moalign: Any, recipe: Path) -> None:
    lines = [f'{{"prompt": "Story {i} is about"}}\n' for i in range(40)] + ['{"prompt": "%s"}\n' % ("how do i " * 60)]
    (recipe.parent / "prompts.jsonl").write_text("".join(lines))
    assert "none of 41 prompts is cut: all fit 512 tokens" in moalign("check", "tales/sft.yaml").out
    short = ("--set", "task.generation.max_prompt_tokens=100")
    for name in ("tales/sft.yaml", "tales"):
        ended = moalign("check", name, *short)
        assert ended.code == 0
        assert "1 of 41 prompts are cut, " in ended.out
        assert "note: overlong: 1 of 41 prompts are cut, " in ended.err
    ended = moalign("check", "tales/sft.yaml", *short, "--set", "task.overlong=drop")
    assert "1 of 41 prompts are dropped: longer than 100 tokens" in ended.out
    ended = moalign("check", "tales/sft.yaml", "--set", "task.generation.max_prompt_tokens=8")
    assert ended.code == 2 and "8 tokens do not hold what the template writes around a prompt" in ended.errors[0]


def test_pairs_without_an_objective_are_told(moalign: Any, recipe: Path) -> None:
    pair = {"prompt": "Story 1 is about", "chosen": " a cat.", "rejected": " a dog, a cow and a cat."}
    (recipe.parent / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    ended = moalign("check", "tales", "--set", "task.data.pairs={path: tales/pairs.jsonl}")
    assert ended.code == 0
    assert "note: data.pairs: they are labelled for no objective; methods that learn from " in ended.err
    ended = moalign("check", "tales", "--set", "task.data.pairs={brevity: {path: tales/pairs.jsonl}}")
    assert ended.code == 0 and "labelled for no objective" not in ended.err


def test_a_policy_whose_weights_or_targets_do_not_fit_is_a_problem(
    moalign: Any, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {
        row["what"]: row["found"] for row in json.loads(moalign("check", "tales/sft.yaml", "--json").out)["checked"]
    }
    assert seen["policy"] == "LlamaForCausalLM, 6,576 parameters, 1,280 in LoRA adapters"
    ended = moalign("check", "tales/sft.yaml", "--set", "policy.lora.targets=[q_projj]")
    assert ended.code == 2 and "policy.lora.targets ['q_projj']: Target modules" in ended.errors[0]
    monkeypatch.delitem(SHAPES, "model.layers.0.mlp.down_proj.weight")
    write_model(tmp_path / "other")
    ended = moalign("check", "tales/sft.yaml", "--set", f"task.model={tmp_path / 'other'}")
    assert ended.code == 2
    assert "task.model: its weights are not those of a LlamaForCausalLM (missing: model.layers.0" in ended.errors[0]


def test_a_config_of_no_known_model_is_a_problem(moalign: Any, recipe: Path, tmp_path: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "model_type"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    ended = moalign("check", "tales/sft.yaml")
    assert ended.code == 2
    assert "its config cannot be used (Unrecognized model" in ended.errors[0]


def test_a_chat_template_that_is_not_there_is_a_problem(moalign: Any, recipe: Path) -> None:
    ended = moalign("check", "tales/sft.yaml", "--set", "task.template.chat=true")
    assert ended.code == 2
    assert any("has no chat template" in text for text in ended.errors)


def test_prompts_to_be_dropped_are_not_counted_without_the_model(
    moalign: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moalign.lm import language_model

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(language_model, "load_codec", lambda *_: pytest.fail("a tokenizer was looked for"))
    ended = moalign("check", "tales/sft.yaml", "--set", "task.model=a/b", "--set", "task.overlong=drop")
    assert (ended.code, ended.errors) == (0, [])
    assert "how many prompts are left out is not known" in ended.err


def test_the_memory_estimate_counts_weights_and_adapters(moalign: Any, recipe: Path) -> None:
    memory = json.loads(moalign("check", "tales/sft.yaml", "--json").out)["memory"]
    assert memory["parameters"] == 100 * 16 + 4 * 16 * 16 + 3 * 48 * 16 + 3 * 16 + 100 * 16
    assert memory["adapter_parameters"] == 4 * 4 * (16 + 16) + 3 * 4 * (48 + 16)  # not embedding or head
    assert memory["weights_gib"] == memory["parameters"] * 4 / 2**30
    assert memory["adapters_gib"] == memory["adapter_parameters"] * 16 / 2**30
    assert memory["stated_gib"] == 24
    named = moalign("check", "tales/sft.yaml", "--json", "--set", "policy.lora.targets=[q_proj]")
    assert json.loads(named.out)["memory"]["adapter_parameters"] == 4 * (16 + 16)


def test_a_model_that_does_not_fit_is_a_problem(moalign: Any, recipe: Path) -> None:
    ended = moalign("check", "tales/sft.yaml", "--set", "needs.gpu_memory_gib=1e-6")
    assert ended.code == 2
    assert "needs.gpu_memory_gib" in ended.errors[0] and "1e-06 GiB are stated" in ended.errors[0]


def test_every_kind_of_problem_is_told_at_once(moalign: Any, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.replace("steps: 3", "step: 3") + "sed: 1\n")
    (recipe.parent / "prompts.jsonl").write_text('{"prompt": "a"}\n' * 16 + "{broken\n")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"\0\0")
    ended = moalign("check", "tales/sft.yaml", "--json")
    assert ended.code == 2
    content = json.loads(ended.out)
    assert content["ok"] is False
    assert content["problems"] == ended.errors
    text = "\n".join(ended.errors)
    assert "tales/sft.yaml:6: config.step: unknown key" in text and "did you mean 'steps'?" in text
    assert "tales/sft.yaml:9: sed: unknown key" in text
    assert "prompts.jsonl:17: broken JSON" in text
    assert "model.safetensors is not a whole safetensors file" in text
    assert [row["what"] for row in content["checked"]][-2:] == ["objective brevity", "objective dialogue"]


def test_a_wrong_option_does_not_hide_the_data(moalign: Any, recipe: Path) -> None:
    (recipe.parent / "prompts.jsonl").write_text("")
    ended = moalign("check", "tales/sft.yaml", "--set", "task.model=./nowhere")
    assert ended.code == 2
    assert any("--set task.model: found './nowhere'; there is no such model folder" in text for text in ended.errors)
    assert any("prompts.jsonl: the file is empty" in text for text in ended.errors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("method: sft", "method: stf"), "tales/sft.yaml:1: unknown method 'stf'"),
        (("method: sft\n", ""), "method: missing"),
        (("task: ./task.yaml", "task: sandbx"), "did you mean 'sandbox'?"),
        (("task: ./task.yaml\n", ""), "task: missing"),
        (("method: sft", "method: [sft"), "tales/sft.yaml:2: broken YAML"),
        (("method: sft", "prefs: [[3, 7]]\nmethod: stf"), "sft.yaml:1: prefs.0: found 3,7: the weights sum to 10"),
        (("steps: 3", "steps: 3\nquick: {lr: high}"), "tales/sft.yaml:7: quick.lr: found 'high'; allowed: a number"),
    ],
)
def test_broken_recipes(moalign: Any, recipe: Path, change: tuple[str, str], message: str) -> None:
    recipe.write_text(RECIPE.replace(*change))
    ended = moalign("check", "tales/sft.yaml")
    assert ended.code == 2
    assert any(message in text for text in ended.errors)
    assert len(ended.errors) == len(set(ended.errors))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rule: brevity", "rule: brevty", "did you mean 'brevity'?"),
        ("model: ../base\n", "", "it needs a model; give a folder or a hub id"),
        ("model: ../base", "model: ../base2", "there is no such model folder"),
        ("grid: 11", "gird: 11", "did you mean 'grid'?"),
    ],
)
def test_broken_cards(moalign: Any, recipe: Path, old: str, new: str, message: str) -> None:
    card = recipe.parent / "task.yaml"
    card.write_text((CARD + "grid: 11\n").replace(old, new))
    ended = moalign("check", "tales/sft.yaml")
    assert ended.code == 2
    assert any(message in text for text in ended.errors)


def test_a_model_folder_without_weights_is_a_problem(moalign: Any, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "pytorch_model.bin")
    ended = moalign("check", "tales/sft.yaml")
    assert ended.code == 2
    assert "only pickled weights (pytorch_model.bin)" in ended.errors[0]


def test_too_few_prompts_for_the_splits_are_a_problem(moalign: Any, recipe: Path) -> None:
    (recipe.parent / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "A "}\n')
    ended = moalign("check", "tales/sft.yaml")
    assert ended.code == 2
    assert len(ended.errors) == 1
    assert "split" in ended.errors[0]


def test_a_hub_id_offline_points_to_a_local_folder(
    moalign: Any, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ended = moalign("check", "tales/sft.yaml", "--set", "task.model=someone/some-model")
    assert ended.code == 2
    assert "HF_HUB_OFFLINE=1 is set; give a local folder instead" in ended.errors[0]
    assert "no revision is pinned" in ended.err
    assert "memory: not known" in ended.err


def test_the_sandbox_needs_no_gpu(moalign: Any) -> None:
    ended = moalign("check", "sandbox/ric")
    assert ended.code == 0
    assert "no GPU needed" in ended.out


def test_an_unknown_recipe_names_the_nearest(moalign: Any) -> None:
    ended = moalign("check", "sandbox/rick")
    assert ended.code == 2
    assert "did you mean 'sandbox/ric'?" in ended.errors[0]


def test_an_unknown_task_names_the_nearest_and_a_path_is_one(moalign: Any) -> None:
    ended = moalign("check", "sandbx")
    assert ended.code == 2
    (text,) = ended.errors
    assert text.startswith("RECIPE|CARD: unknown recipe or task 'sandbx'; allowed: a file, TASK or TASK/METHOD with ")
    assert text.endswith("; did you mean 'sandbox'?") and "sandbox/spo" not in text
    ended = moalign("check", "./nofolder")
    assert (ended.code, ended.errors) == (2, ["RECIPE|CARD: no such file or folder: nofolder"])


# -- a card ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tales", "./tales", "tales/task.yaml"])
def test_a_card_is_checked_with_the_recipes_beside_it(moalign: Any, recipe: Path, tmp_path: Path, name: str) -> None:
    ended = moalign("check", name)
    assert (ended.code, ended.errors) == (0, [])
    for text in (
        "task tales: brevity, dialogue",
        "model",
        "splits",
        "objective dialogue",
        "settings of sft",
        "nothing",
    ):
        assert text in ended.out
    content = json.loads(moalign("check", name, "--json").out)
    assert (content["recipe"], Path(content["card"]), content["ok"]) == (None, Path("tales/task.yaml"), True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tales"]


def test_a_card_under_any_name_is_told_from_a_recipe(moalign: Any, recipe: Path) -> None:
    (recipe.parent / "task.yaml").rename(recipe.parent / "other.yaml")
    ended = moalign("check", "tales/other.yaml")
    assert (ended.code, ended.errors) == (0, [])
    assert "task tales: brevity, dialogue" in ended.out


def test_every_problem_of_a_card_and_its_recipes_is_told_at_once(moalign: Any, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.replace("steps: 3", "step: 3"))
    (recipe.parent / "prompts.jsonl").write_text('{"prompt": "a"}\n' * 16 + "{broken\n")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"\0\0")
    ended = moalign("check", "tales", "--set", "task.grid=3")
    text = "\n".join(ended.errors)
    assert ended.code == 2
    assert "tales/sft.yaml:6: config.step: unknown key" in text
    assert "prompts.jsonl:17: broken JSON" in text
    assert "model.safetensors is not a whole safetensors file" in text


def test_a_broken_card_is_told_once(moalign: Any, recipe: Path) -> None:
    (recipe.parent / "task.yaml").write_text(CARD + "gird: 11\n")
    ended = moalign("check", "tales")
    assert ended.code == 2
    assert len(ended.errors) == 1 and "did you mean 'grid'?" in ended.errors[0]


def test_a_task_is_checked_by_name(moalign: Any) -> None:
    ended = moalign("check", "sandbox")
    assert ended.code == 0
    assert "settings of ric" in ended.out


# -- what training would refuse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("policy.lora.targets=(", "allowed: names of layers, or a regular expression (missing ), unterminated"),
        ("policy.lora.r=70000", "allowed: a whole number >= 1 and <= 65536"),
        (f"seed={2**63}", f"allowed: whole numbers up to {2**63 - 1}"),
        (f"task.pool.seed={2**63}", f"allowed: whole numbers up to {2**63 - 1}"),
        ("task.evaluation.seed=-1", "allowed: a whole number >= 0"),
        ("lr=1e300", "found 1e+300; allowed: numbers up to 3.40282e+38"),
        (f"steps={10**20}", "allowed: a whole number >= 0 and <= 1000000000"),
        ("task.template.preference='{prompt}'", "(no {preference}); needed: {prompt} and {preference}"),
        ("task.template.scores='{prompt}'", "(no {scores}); needed: {prompt} and {scores}"),
        ("task.template.plain=x", "found 'x' (no {prompt}); needed: {prompt}, and no other field"),
        ("task.template.plain='{prompt} {zzz}'", "({zzz}, which nothing fills)"),
    ],
)
def test_settings_that_no_run_can_have_are_refused_by_check_and_train(
    moalign: Any, recipe: Path, setting: str, message: str
) -> None:
    for command in (["check", "tales/sft.yaml"], ["train", "sft", "--recipe", "tales/sft.yaml", "--dry-run"]):
        ended = moalign(*command, "--set", setting)
        assert ended.code == 2
        (problem,) = ended.errors
        assert problem.startswith(f"--set {setting.partition('=')[0]}:") and message in problem


def test_a_large_rate_is_the_users_own_affair(moalign: Any, recipe: Path) -> None:
    assert moalign("check", "tales/sft.yaml", "--set", "lr=1e30").code == 0


def test_a_seed_beyond_64_bits_is_refused_as_an_option_too(moalign: Any, recipe: Path) -> None:
    ended = moalign("train", "sft", "--recipe", "tales/sft.yaml", "--dry-run", "--seed", str(2**63))
    assert ended.code == 2
    assert ended.errors == [f"seed: found {2**63}; allowed: 0 to {2**63 - 1}"]


def test_what_train_refuses_at_once_check_refuses_with_all_else(
    moalign: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moalign.runs import trackers

    monkeypatch.setitem(trackers.PACKAGES, "mlflow", "no_such_package")
    recipe.write_text(RECIPE.replace("sft", "morlhf") + "trackers: [mlflow]\nholdout: [[0.5, 0.5]]\n")
    expected = ["trackers: mlflow: the package no_such_package is not installed", "holdout: morlhf answers only"]
    for name in ("tales/sft.yaml", "tales"):
        ended = moalign("check", name)
        assert ended.code == 2 and len(ended.errors) == 2
        assert all(problem.startswith(text) for problem, text in zip(ended.errors, expected, strict=True))
    recipe.write_text(RECIPE + "holdout: [[0.5, 0.5]]\nprefs: [[0.5, 0.5]]\n")
    assert "it holds every preference to train on" in moalign("check", "tales/sft.yaml").errors[0]


@pytest.mark.parametrize("content", ["{broken", '{"model": 3}', "[]", '{"added_tokens": [], "model": {"type": "x"}}'])
def test_a_broken_tokenizer_is_a_problem_whatever_is_wrong_with_it(
    moalign: Any, recipe: Path, tmp_path: Path, content: str
) -> None:
    (tmp_path / "base" / "tokenizer.json").write_text(content)
    ended = moalign("check", "tales/sft.yaml")
    assert ended.code == 2
    assert any("its tokenizer cannot be loaded" in problem for problem in ended.errors)


def test_a_model_that_brings_code_is_a_problem_and_its_code_is_not_run(
    moalign: Any, recipe: Path, tmp_path: Path
) -> None:
    other = {**CONFIG, "model_type": "mine", "auto_map": {name: "mine.Mine" for name in ("AutoConfig", "AutoModel")}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(other))
    (tmp_path / "base" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    ended = moalign("check", "tales/sft.yaml")
    assert ended.code == 2
    assert any("cannot be loaded" in problem for problem in ended.errors)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("header", ["[1, 2]", "3", '{"a": 3}'])
def test_a_header_that_is_no_mapping_hides_nothing_else(
    moalign: Any, recipe: Path, tmp_path: Path, header: str
) -> None:
    (tmp_path / "base" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    ended = moalign("check", "tales/sft.yaml", "--json")
    assert ended.code == 2
    assert len(ended.errors) == 1 and "model.safetensors is not a whole safetensors file" in ended.errors[0]
    seen = [row["what"] for row in json.loads(ended.out)["checked"]]
    assert "cost" in seen and "objective dialogue" in seen


@pytest.mark.parametrize("vocabulary", ["many", 0, None, True])
def test_sizes_of_another_kind_are_no_crash(moalign: Any, recipe: Path, tmp_path: Path, vocabulary: Any) -> None:
    config = {**CONFIG, "vocab_size": vocabulary, "num_attention_heads": 0, "text_config": [1]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert moalign("check", "tales/sft.yaml").code == 2


def test_a_card_alone_has_its_policy_and_template_looked_at(moalign: Any, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "base" / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 24}))
    ended = moalign("check", "tales", "--set", "task.template.chat=true")
    assert ended.code == 2
    assert any("of another shape: lm_head.weight [100, 16] instead of [100, 24]" in text for text in ended.errors)
    assert any("has no chat template" in text for text in ended.errors)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("policy.lora.targets=[nope]", "policy.lora.targets ['nope']: Target modules"),
        ("task.template.chat=true", "the tokenizer of the sandbox's base has no chat template"),
        ("task.generation.max_prompt_tokens=4", "4 tokens do not hold what the template writes around a prompt"),
    ],
)
def test_the_built_in_base_is_looked_at_too_and_not_trained_for_it(
    moalign: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, message: str
) -> None:
    monkeypatch.setenv("MOALIGN_CACHE", str(tmp_path / "cache"))
    ended = moalign("check", "sandbox/ric", "--set", setting)
    assert ended.code == 2
    assert len(ended.errors) == 1 and message in ended.errors[0]
    assert not (tmp_path / "cache").exists()


def test_check_says_what_the_record_will_count_and_what_is_made_once(moalign: Any) -> None:
    """The logged data (505 prompts of 16 responses), the round's own 2,000, two objectives."""
    ended = moalign("check", "sandbox/ric", "--json")
    cost = json.loads(ended.out)["cost"]
    assert cost["reward_calls"] == 2 * (16 * 505 + 2000) == 20_160
    assert cost["first_use"]["responses_sampled"] > 0
    assert cost["unknown"] == []
    assert "once for all runs of the task, counted by none: at most" in moalign("check", "sandbox/ric").out


def test_a_grid_that_there_is_not_is_told_by_check_and_before_a_run_is_made(moalign: Any) -> None:
    for command in (("check", "sandbox-3/mo-odpo"), ("train", "mo-odpo", "--task", "sandbox-3")):
        ended = moalign(*command, "--set", "task.grid=11")
        assert ended.code == 2 and "no even grid over 3 objectives has 11 points; nearest: 10 or 15" in ended.err
    assert not Path("results").exists()
