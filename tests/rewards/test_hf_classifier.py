"""Classifier objectives on tiny random models of several architectures, against the plain library call."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, cast

import pytest

from moalign.config.objectives import ClassifierObjective
from moalign.core.errors import RequestError
from moalign.rewards.hf_classifier import ClassifierScorer
from moalign.rewards.panel import RewardPanel

ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"w{n}" for n in range(50)]
SPECIAL = ["[UNK]", "[PAD]", "</s>", "[CLS]", "[SEP]"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
FAMILIES = ["llama", "gpt2", "bert", "deberta", "roberta", "xlnet"]


def tokenizer(family: str, pad: bool = True) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({word: n for n, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = WhitespaceSplit()
    if family in ("bert", "deberta", "roberta"):
        second = "$B:0 [SEP]:0" if family == "roberta" else "$B:1 [SEP]:1"
        inner.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", pair=f"[CLS] $A [SEP] {second}", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
        )
    named = {"unk_token": "[UNK]", "eos_token": "</s>", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if family in ("bert", "deberta") else [])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, **named, **({"pad_token": "[PAD]"} if pad else {}), model_input_names=inputs
    )


def config(family: str, labels: int, **more: Any) -> Any:
    import transformers as t

    vocabulary = len(SPECIAL) + len(WORDS)
    common = {"vocab_size": vocabulary, "num_labels": labels, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    common.update(more)
    if family == "gpt2":
        return t.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **common)
    if family == "xlnet":
        return t.XLNetConfig(d_model=16, n_layer=2, n_head=2, d_inner=32, **common)
    if family == "deberta":
        relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 2}
        return t.DebertaV2Config(**SIZES, **relative, **common)
    kinds = {"llama": t.LlamaConfig, "bert": t.BertConfig, "roberta": t.RobertaConfig}
    return kinds[family](**SIZES, **{"max_position_embeddings": 64, **common})


def save(folder: Path, family: str, labels: int = 3, pad: bool = True, **more: Any) -> Path:
    import torch
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(len(family) + labels)
        model = AutoModelForSequenceClassification.from_config(config(family, labels, **more))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # scores that differ clearly from text to text
    model.save_pretrained(folder)
    tokenizer(family, pad).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save(root / family, family)
    save(root / "reward", "llama", labels=1)
    save(root / "named", "bert", id2label={0: "rude", 1: "polite", 2: "neutral"})
    save(root / "no-pad", "llama", pad=False, pad_token_id=None)
    return root


def scorer(models: Path, model: str, **more: Any) -> ClassifierScorer:
    settings = {"name": "x", "kind": "hf-classifier", "model": model, "template": "{prompt} {response}", **more}
    if "label" not in settings and model != "reward":
        settings["label"] = 1
    return ClassifierScorer(ClassifierObjective.model_validate(settings), models)


def reference(folder: Path, *texts: str) -> Any:
    """Logits ``[labels]`` of one text (or pair) by the plain library call: no batch, no padding."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**AutoTokenizer.from_pretrained(folder)(*texts, return_tensors="pt")).logits[0].double()


def texts(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Random texts of 1 to 20 words; some end in the end-of-text token."""
    import random

    draw = random.Random(seed)
    prompts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(count)]
    responses = [" ".join(draw.choices([*WORDS, "</s>"], k=draw.randint(1, 8))) for _ in range(count)]
    return prompts, responses


@pytest.mark.parametrize("family", [*FAMILIES, "no-pad", "reward"])
def test_batched_equals_one_by_one_and_keeps_the_order(models: Path, family: str) -> None:
    prompts, responses = texts(24)
    responses[5] += " </s>"
    scores = scorer(models, family, batch_tokens=100).score(prompts, responses)
    for at in (0, 5, 11, 23):
        logits = reference(models / family, f"{prompts[at]} {responses[at]}")
        assert scores[at] == pytest.approx(float(logits[0 if family == "reward" else 1]), abs=1e-5)
    alone = scorer(models, family)
    assert scores == pytest.approx(
        [alone.score([p], [r])[0] for p, r in zip(prompts, responses, strict=True)], abs=1e-5
    )
    assert len({round(value, 4) for value in scores}) > 12


def test_padding_is_found_out_where_the_right_side_is_wrong(models: Path) -> None:
    for family, side in (("xlnet", "left"), ("bert", "right"), ("llama", "right")):
        built = scorer(models, family)
        built.score(*texts(6))
        assert built._padding == side


def test_a_model_that_no_padding_suits_gets_rows_of_equal_length(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = scorer(models, "bert")
    prompts, responses = texts(20)
    wanted = built.score(prompts, responses)
    built._padding = "none"
    seen: list[set[int]] = []
    forward = built._logits
    monkeypatch.setattr(
        built, "_logits", lambda rows, side: (seen.append({len(r["input_ids"]) for r in rows}), forward(rows, side))[1]
    )
    assert built.score(prompts, responses) == pytest.approx(wanted, abs=1e-5)
    assert all(len(lengths) == 1 for lengths in seen)
    assert len(seen) == len(set().union(*seen))


def test_batches_are_bounded_and_sorted_by_length(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = scorer(models, "bert", batch_tokens=64)
    prompts, responses = texts(40)
    built.score(prompts[:2], responses[:2])
    shapes: list[list[int]] = []
    forward = built._logits
    monkeypatch.setattr(
        built,
        "_logits",
        lambda rows, side: (shapes.append([len(r["input_ids"]) for r in rows]), forward(rows, side))[1],
    )
    built.score(prompts, responses)
    assert all(len(lengths) * max(lengths) <= 64 for lengths in shapes)
    flat = [length for lengths in shapes for length in lengths]
    assert flat == sorted(flat, reverse=True)
    assert len(shapes) < 30


def test_equal_texts_are_scored_once(models: Path) -> None:
    built = scorer(models, "bert")
    scores = built.score(["w1", "w2", "w1", "w1"], ["w3", "w3", "w3", "w4"])
    assert built.rows_scored == 3
    assert scores[0] == scores[2]
    assert built.score([], []) == []


def shared(models: Path, *changes: dict[str, Any]) -> tuple[RewardPanel, list[ClassifierScorer]]:
    """A panel with an objective for each of ``changes`` to one objective."""
    common = {"kind": "hf-classifier", "model": "named", "template": "{prompt} {response}", "label": 0}
    specs = [ClassifierObjective.model_validate({"name": f"o{i}", **common, **more}) for i, more in enumerate(changes)]
    panel = RewardPanel.from_specs(specs, models)
    return panel, cast("list[ClassifierScorer]", panel.objectives)


def test_labels_of_one_model_are_read_once(models: Path) -> None:
    """Whatever is asked of them: the scores are those of objectives that have the model to themselves."""
    changes: list[dict[str, Any]] = [{"label": "rude"}, {"label": "polite", "output": "probability"}, {"label": 2}]
    panel, scorers = shared(models, *changes)
    prompts, responses = texts(30)
    scores = panel.score(prompts * 2, responses * 2)
    assert [each.rows_scored for each in scorers] == [30, 0, 0]
    assert len({id(each._model) for each in scorers}) == 1
    for column, more in enumerate(changes):
        alone = scorer(models, "named", **more).score(prompts, responses)
        assert scores[:30, column].tolist() == scores[30:, column].tolist() == alone
    assert panel.score(prompts[:3], responses[3:6]).shape == (3, 3)
    assert scorers[0].rows_scored == 33


def test_another_label_may_be_asked_first_and_of_other_texts(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the store knows differs by objective; what is kept is bounded, and what was dropped is read again."""
    monkeypatch.setattr("moalign.rewards.hf_classifier.CACHE_LIMIT", 10)
    _, (first, second) = shared(models, {"label": 1}, {"label": 2})
    prompts, responses = texts(24)
    alone = scorer(models, "named", label=2).score(prompts, responses)
    assert second.score(prompts[:8], responses[:8]) == pytest.approx(alone[:8], abs=1e-6)
    assert second.score(prompts, responses) == pytest.approx(alone, abs=1e-6)
    wanted = scorer(models, "named", label=1).score(prompts, responses)
    assert first.score(prompts[4:20], responses[4:20]) == pytest.approx(wanted[4:20], abs=1e-6)
    assert second.score(prompts[:8], responses[:8]) == pytest.approx(alone[:8], abs=1e-6)
    assert first.rows_scored == 24


@pytest.mark.parametrize("other", [{"template": "{response}"}, {"max_length": 8}, {"dtype": "bfloat16"}])
def test_models_that_read_differently_are_not_shared(models: Path, other: dict[str, Any]) -> None:
    panel, scorers = shared(models, {}, {"label": 1, **other})
    panel.score(*texts(6))
    assert [each.rows_scored for each in scorers] == [6, 6]


def test_label_by_index_by_name_and_as_probability(models: Path) -> None:
    logits = reference(models / "named", "w1 w2 w3")
    shares = logits.softmax(-1)
    for label, index in ((0, 0), (2, 2), ("polite", 1)):
        assert scorer(models, "named", label=label).score(["w1 w2"], ["w3"])[0] == pytest.approx(
            float(logits[index]), abs=1e-5
        )
        score = scorer(models, "named", label=label, output="probability").score(["w1 w2"], ["w3"])[0]
        assert score == pytest.approx(float(shares[index]), abs=1e-5)


def test_regression_head_and_its_probability(models: Path) -> None:
    logit = float(reference(models / "reward", "w1 w2 w3")[0])
    assert scorer(models, "reward").score(["w1 w2"], ["w3"])[0] == pytest.approx(logit, abs=1e-5)
    score = scorer(models, "reward", label=0, output="probability").score(["w1 w2"], ["w3"])[0]
    assert score == pytest.approx(1 / (1 + 2.718281828459045**-logit), abs=1e-5)


def test_labels_that_do_not_exclude_each_other_have_a_sigmoid_each(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "bert", tmp_path / "multi")
    config_json = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config_json, "problem_type": "multi_label_classification"}))
    score = scorer(tmp_path, "multi", label=2, output="probability").score(["w1"], ["w2"])[0]
    assert score == pytest.approx(float(reference(folder, "w1 w2")[2].sigmoid()), abs=1e-5)


def test_smaller_is_better_turns_the_sign_in_the_panel(models: Path) -> None:
    built = scorer(models, "bert", maximise=False)
    raw = built.score(["w1"], ["w2"])[0]
    assert RewardPanel([built]).score(["w1"], ["w2"])[0, 0] == -raw != 0


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_pair_template_gives_the_model_two_texts(models: Path, family: str) -> None:
    built = scorer(models, family, template="{prompt}", pair_template="w9 {response}")
    prompts, responses = texts(9)
    scores = built.score(prompts, responses)
    for at in (0, 4, 8):
        logits = reference(models / family, prompts[at], f"w9 {responses[at]}")
        assert scores[at] == pytest.approx(float(logits[1]), abs=1e-5)


def test_template_fields_inside_a_prompt_stay_text(models: Path) -> None:
    score = scorer(models, "bert").score(["w1 {response} w2"], ["w3"])[0]
    assert score == pytest.approx(float(reference(models / "bert", "w1 {response} w2 w3")[1]), abs=1e-5)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ({"template": "{prompt} {respones}"}, "unknown field {respones}.*did you mean 'response'"),
        ({"template": "{prompt}"}, "has the field {response}"),
    ],
)
def test_wrong_templates_are_named(models: Path, templates: dict[str, str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        scorer(models, "bert", **templates)


@pytest.mark.parametrize("family", ["bert", "llama", "roberta", "gpt2"])
def test_long_text_loses_the_start_of_its_prompt_and_keeps_the_answer(models: Path, family: str) -> None:
    built = scorer(models, family, template="w40 {prompt} w41 {response}", max_length=20)
    prompt = " ".join(WORDS[:30])
    scores = built.score([prompt, "w1"], ["w7 w8 w9", "w2"])
    special = 2 if family in ("bert", "roberta") else 0
    kept = " ".join(WORDS[30 - (20 - special - 5) : 30])
    expected = reference(models / family, f"w40 {kept} w41 w7 w8 w9")
    assert scores[0] == pytest.approx(float(expected[1]), abs=1e-5)
    assert scores[1] == pytest.approx(float(reference(models / family, "w40 w1 w41 w2")[1]), abs=1e-5)
    assert built.rows_shortened == 1


def test_an_answer_that_is_too_long_alone_keeps_its_start(models: Path) -> None:
    built = scorer(models, "llama", template="{prompt} w41 {response}", max_length=10)
    score = built.score(["w1 w2"], [" ".join(WORDS[:30])])[0]
    assert score == pytest.approx(float(reference(models / "llama", "w41 " + " ".join(WORDS[:9]))[1]), abs=1e-5)
    with pytest.raises(RequestError, match="template alone is longer than 10 tokens"):
        scorer(models, "llama", template="w1 " * 12 + "{response}", max_length=10).score(["w1"], ["w2"])


def test_positions_limit_the_length(models: Path) -> None:
    # RoBERTa counts positions from 2: 62 of its 64 can be used; more would fail inside the model.
    for family, limit in (("roberta", 62), ("gpt2", 64), ("bert", 64)):
        built = scorer(models, family, max_length=4096)
        built.score([" ".join(WORDS * 3)], ["w1"])
        assert built._encoder.max_length == limit


@pytest.mark.parametrize("family", ["llama", "bert", "no-pad"])
def test_empty_texts_get_a_finite_score(models: Path, family: str) -> None:
    scores = scorer(models, family).score(["", "w1 w2"], ["", ""])
    assert all(abs(value) < 1e6 for value in scores)


def test_a_pad_token_is_lent_that_ends_no_row(models: Path) -> None:
    built = scorer(models, "no-pad")
    every_word = [*WORDS, *SPECIAL]
    prompts = ["w1 " * (1 + n % 3) for n in range(len(every_word))]
    scores = built.score(prompts, every_word)
    for at in (0, 51, 52):
        assert scores[at] == pytest.approx(
            float(reference(models / "no-pad", f"{prompts[at]} {every_word[at]}")[1]), abs=1e-5
        )


@pytest.mark.parametrize(
    ("model", "label", "parts"),
    [
        ("named", 3, ["has no label 3", "0: rude, 1: polite, 2: neutral"]),
        ("named", -1, ["has no label -1"]),
        ("named", "polit", ["no label 'polit'", "did you mean 'polite'?"]),
        ("named", None, ["has 3 labels", "0: rude", "label: INDEX"]),
        ("reward", 1, ["has no label 1", "0: LABEL_0"]),
    ],
)
def test_labels_that_do_not_exist_are_told_before_loading(
    models: Path, model: str, label: int | str | None, parts: list[str]
) -> None:
    with pytest.raises(RequestError) as caught:
        scorer(models, model, label=label)
    for part in ["objective 'x'", *parts]:
        assert part in str(caught.value)


def broken(models: Path, tmp_path: Path, *removed: str) -> Path:
    folder = shutil.copytree(models / "bert", tmp_path / "broken")
    for name in removed:
        (folder / name).unlink()
    return folder


def test_folders_that_cannot_be_used_are_told_before_loading(models: Path, tmp_path: Path) -> None:
    folder = broken(models, tmp_path, "model.safetensors")
    with pytest.raises(RequestError, match="broken has no weights: model.safetensors is missing"):
        scorer(tmp_path, "broken")
    whole = (models / "bert" / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match="model.safetensors is truncated or damaged"):
        scorer(tmp_path, "broken")
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RequestError, match="has no tokenizer files"):
        scorer(tmp_path, "broken")
    with pytest.raises(RequestError, match="there is no model folder './nope'"):
        scorer(tmp_path, "./nope")


def test_a_language_model_without_a_head_is_refused(models: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(config("llama", 2)).save_pretrained(tmp_path / "base")
    tokenizer("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(RequestError, match=r"not a whole classifier: its weights lack score\.weight"):
        scorer(tmp_path, "base").prepare()


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": 32}, {"model_type": "no-such-type"}, {"auto_map": {"AutoConfig": "x.C"}, "model_type": "y"}],
)
def test_configs_that_do_not_fit_are_told(models: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = broken(models, tmp_path)
    config_json = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config_json, **change}))
    with pytest.raises(RequestError, match="objective 'x': model folder .*broken cannot be loaded: "):
        scorer(tmp_path, "broken").prepare()


def test_a_tokenizer_of_another_model_is_told(models: Path, tmp_path: Path) -> None:
    folder = broken(models, tmp_path)
    tokenizer_json = json.loads((folder / "tokenizer.json").read_text())
    tokenizer_json["model"]["vocab"]["w1"] = 900
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    with pytest.raises(RequestError, match="gives token 900, but the model knows 55"):
        scorer(tmp_path, "broken").score(["w1"], ["w2"])


def test_loading_leaves_the_generator_alone(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoTokenizer

    original = AutoTokenizer.from_pretrained

    def drawing(*given: Any, **more: Any) -> Any:
        torch.rand(3)  # as a library does that initialises weights before it loads them
        return original(*given, **more)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", drawing)
    before = torch.get_rng_state()
    scorer(models, "bert").prepare()
    assert torch.equal(before, torch.get_rng_state())


def test_revision_follows_files_and_settings_but_not_place_or_batches(models: Path, tmp_path: Path) -> None:
    first = scorer(models, "bert").revision
    folder = shutil.copytree(models / "bert", tmp_path / "moved")
    assert scorer(tmp_path, "moved", batch_tokens=64, maximise=False).revision == first
    assert scorer(models, "named", label="polite").revision == scorer(models, "named", label=1).revision
    seen = {first, scorer(models, "bert", label=2).revision, scorer(models, "bert", max_length=64).revision}
    seen |= {scorer(models, "bert", output="probability").revision, scorer(models, "llama").revision}
    whole = bytearray((folder / "model.safetensors").read_bytes())
    whole[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(whole))
    seen.add(scorer(tmp_path, "moved").revision)
    assert len(seen) == 6


def test_half_precision_stays_near(models: Path) -> None:
    prompts, responses = texts(12)
    exact = scorer(models, "llama").score(prompts, responses)
    half = scorer(models, "llama", dtype="bfloat16").score(prompts, responses)
    assert half == pytest.approx(exact, abs=0.3)
    assert half != exact


@pytest.mark.slow
def test_hub_id_while_offline_and_no_torch_at_construction(models: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from moalign.config.objectives import ClassifierObjective
        from moalign.core.errors import RequestError
        from moalign.rewards.scorer import build_scorer

        local = ClassifierObjective(name="x", kind="hf-classifier", model="bert", label=1)
        print(build_scorer(local, Path(sys.argv[1])).revision)
        assert "torch" not in sys.modules and "transformers" not in sys.modules
        try:
            build_scorer(local.model_copy(update={"model": "owner/reward-model"}), Path(sys.argv[1]))
        except RequestError as error:
            print(error)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), str(models)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    revision, message = done.stdout.splitlines()
    assert revision.startswith("hf-classifier:")
    for part in ("objective 'x'", "'owner/reward-model'", "HF_HUB_OFFLINE is set", "model: path/to/folder"):
        assert part in message


def test_hub_models_are_fetched_checked_and_known_by_their_commit(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot = tmp_path / "c0ffee"
    requested: list[tuple[Any, ...]] = []

    def download(model: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        requested.append((model, revision, allow_patterns == ["config.json"]))
        snapshot.mkdir(exist_ok=True)
        for path in (models / "bert").iterdir():
            if path.name in allow_patterns or allow_patterns != ["config.json"]:
                shutil.copy(path, snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    built = scorer(tmp_path, "owner/polite", revision="main")
    assert requested == [("owner/polite", "main", True)]
    assert built.score(["w1"], ["w2"]) == scorer(models, "bert").score(["w1"], ["w2"])
    first = built.revision
    snapshot.rename(tmp_path / "decaf")
    snapshot = tmp_path / "decaf"
    assert scorer(tmp_path, "owner/polite").revision != first
