"""The reward models of the papers' task cards, built small and random: loading, templating and scoring on real text.

Each is saved in its own architecture, put in place of the hub id in the card's objective, and scores real HH dialogues;
the expected numbers come from the bare library, with texts put together here as the models' pages and RiC's code say.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moalign.config.load import load_card
from moalign.config.objectives import ClassifierObjective
from moalign.core.errors import RequestError
from moalign.data.dialogue import ASSISTANT, HUMAN, split_pair
from moalign.rewards.hf_classifier import ClassifierScorer
from moalign.rewards.panel import RewardPanel

Pair = tuple[str, str]
INSTRUCTION = "### Instruction: Generate a one-sentence summary of this post. ### Input: {} ### Response: "


@pytest.fixture(scope="module")
def dialogues(shared: Path) -> list[dict[str, str]]:
    """The first real preference pairs of HH harmless-base."""
    path = shared / "data" / "hh-harmless-base-test.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"the HH pairs are not there: {path}")
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        return [json.loads(line) for line, _ in zip(handle, range(40), strict=False)]


@pytest.fixture(scope="module")
def pairs(dialogues: list[dict[str, str]]) -> list[Pair]:
    """(prompt, reply) of 12 dialogues, some long."""
    turns = [dialogue["chosen"].rpartition(ASSISTANT) for dialogue in dialogues[:12]]
    return [(before + marker, reply) for before, marker, reply in turns]


def tokenizer(texts: list[str], family: str) -> Any:
    """A byte-level tokenizer as the family has it: special tokens, and how two texts are put together."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {
        "gpt2": ["<|endoftext|>"],
        "bart": ["<s>", "<pad>", "</s>", "<unk>"],
        "llama": ["<unk>", "<s>", "</s>", "<pad>"],
    }.get(family, ["[PAD]", "[CLS]", "[SEP]", "[UNK]"])
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator(texts, trainer)
    ids = {token: inner.token_to_id(token) for token in special}
    if family in ("bert", "deberta"):
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=list(ids.items())[1:3]
        )
        named = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    elif family == "bart":
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    elif family == "llama":
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        named = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if family == "deberta" else [])
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=inputs, model_max_length=2048, **named)


def config(family: str, size: int, labels: int) -> Any:
    import transformers as t

    common: dict[str, Any] = {"vocab_size": size, "num_labels": labels}
    wide = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if family == "gpt2":
        return t.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, n_positions=1024, bos_token_id=0, eos_token_id=0, pad_token_id=0, **common
        )
    if family == "bart":
        sides = {f"{side}_{key}": 2 for side in ("encoder", "decoder") for key in ("layers", "attention_heads")}
        widths = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 1024}
        return t.BartConfig(pad_token_id=1, bos_token_id=0, eos_token_id=2, **widths, **sides, **common)
    if family == "deberta":
        relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
        return t.DebertaV2Config(pad_token_id=0, max_position_embeddings=512, **wide, **relative, **common)
    if family == "bert":
        config_json = {"id2label": {0: "NO_HUMOR", 1: "HUMOR"}}
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 512}
        return t.DistilBertConfig(vocab_size=size, pad_token_id=0, **sizes, **config_json)
    kind = t.Qwen2Config if family == "qwen2" else t.LlamaConfig
    heads = {"num_key_value_heads": 2, "max_position_embeddings": 2048}
    return kind(bos_token_id=1, eos_token_id=2, pad_token_id=3, **heads, **wide, **common)


Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(dialogues: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Build:
    """``build(family, labels, score)``: the folder of a small random classifier; ``score``: saved as Beaver is."""
    made: dict[tuple[str, int, bool], Path] = {}
    texts = [dialogue["chosen"] for dialogue in dialogues]

    def get(family: str, labels: int = 1, score: bool = False) -> Path:
        key = (family, labels, score)
        if key not in made:
            made[key] = save(tmp_path_factory.mktemp("model") / family, texts, family, labels, score)
        return made[key]

    return get


def save(folder: Path, texts: list[str], family: str, labels: int, score: bool) -> Path:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForSequenceClassification

    words = tokenizer(texts, "llama" if family == "qwen2" else family)
    torch.manual_seed(len(family) + labels)
    model = AutoModelForSequenceClassification.from_config(config(family, len(words), labels))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    if score:
        weights = load_file(folder / "model.safetensors")
        weights["score_head.weight"] = weights.pop("score.weight")
        weights["score_head.bias"] = torch.tensor([-7.25])
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config_json = json.loads((folder / "config.json").read_text())
        for name in ("id2label", "label2id", "num_labels"):
            config_json.pop(name, None)
        config_json |= {"architectures": ["LlamaForScore"], "score_dim": 1, "score_bias": True, "do_normalize": False}
        (folder / "config.json").write_text(json.dumps(config_json))
    return folder


def objective(task: str, name: str, folder: Path) -> ClassifierObjective:
    """An objective of a shipped card, with a small model in place of the paper's."""
    spec = next(objective for objective in load_card(task).objectives if objective.name == name)
    assert isinstance(spec, ClassifierObjective)
    # Half precision is the card's choice for large models; here it would only blur the comparison.
    return spec.model_copy(update={"model": str(folder), "revision": None, "dtype": "float32"})


def plain(folder: Path, *texts: str, label: int = 0) -> float:
    """One logit by the bare library: no batch, no padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    config_json = json.loads((folder / "config.json").read_text())
    # The library does not save two labels, and a BART without them is read as having three.
    more = {} if "id2label" in config_json else {"num_labels": 2}
    model = AutoModelForSequenceClassification.from_pretrained(folder, **more).eval()
    with torch.no_grad():
        return float(model(**AutoTokenizer.from_pretrained(folder)(*texts, return_tensors="pt")).logits[0, label])


def post_of(prompt: str) -> str:
    """A text that stands for a Reddit post: the last human turn."""
    return prompt.rpartition(HUMAN)[2].removesuffix(ASSISTANT).strip()


CASES: list[tuple[str, str, str, int, int, Callable[[str, str], tuple[str, ...]]]] = [
    # task, objective, family, labels, which label, the texts as the model's page or RiC's code put them together
    ("hh-rlhf", "harmless", "gpt2", 1, 0, lambda q, r: (q, r)),
    ("hh-rlhf", "helpful", "gpt2", 1, 0, lambda q, r: (q, r)),
    ("hh-rlhf", "humor", "bert", 2, 1, lambda q, r: (r,)),
    ("reddit-summary", "summary", "gpt2", 1, 0, lambda q, r: (f"{r} <|endoftext|> {q}",)),
    ("reddit-summary", "faithful", "bart", 2, 1, lambda q, r: (r, q)),
    ("reddit-summary", "deberta", "deberta", 1, 0, lambda q, r: (INSTRUCTION.format(q), r)),
    ("helpsteer2", "helpful", "deberta", 1, 0, lambda q, r: (q, r)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "name", "family", "labels", "label", "texts"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES]
)
def test_a_papers_reward_model_scores_real_text_as_its_page_says(
    build: Build,
    pairs: list[Pair],
    task: str,
    name: str,
    family: str,
    labels: int,
    label: int,
    texts: Callable[[str, str], tuple[str, ...]],
) -> None:
    folder = build(family, labels)
    spec = objective(task, name, folder)
    given = [(post_of(q), r.strip()) if task == "reddit-summary" else (q, r.strip()) for q, r in pairs]
    scorer = ClassifierScorer(spec, Path())
    scores = scorer.score([q for q, _ in given], [r for _, r in given])
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder)
    compared = 0
    for (q, r), score in zip(given, scores, strict=True):
        if len(words(*texts(q, r))["input_ids"]) <= spec.max_length:
            assert score == pytest.approx(plain(folder, *texts(q, r), label=label), abs=2e-5)
            compared += 1
    assert compared >= 6
    assert len({round(score, 4) for score in scores}) > 6


@pytest.mark.parametrize("name", ["helpful", "harmless"])
def test_beaver_models_load_with_their_own_head_and_a_cost_turns_its_sign(
    build: Build, pairs: list[Pair], name: str
) -> None:
    folder, twin = build("llama", 1, score=True), build("llama", 1)
    spec = objective("safe-rlhf", name, folder)
    assert spec.maximise == (name == "helpful")
    prompts, replies = [post_of(q) for q, _ in pairs], [r for _, r in pairs]
    scores = RewardPanel([ClassifierScorer(spec, Path())]).score(prompts, replies)[:, 0]
    sign = 1 if name == "helpful" else -1
    for at in (0, 3, 5):
        text = f"BEGINNING OF CONVERSATION: USER: {prompts[at]} ASSISTANT:{replies[at]}"
        assert scores[at] == pytest.approx(sign * (plain(twin, text) - 7.25), abs=1e-3)


def test_a_score_model_that_normalises_is_refused(build: Build, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(build("llama", 1, score=True), tmp_path / "normalised")
    config_json = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config_json, "do_normalize": True}))
    with pytest.raises(RequestError, match="objective 'helpful': its config says do_normalize: true"):
        ClassifierScorer(objective("safe-rlhf", "helpful", folder), Path())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_policies_architectures_do_as_reward_models_too(build: Build, pairs: list[Pair], family: str) -> None:
    folder = build(family)
    spec = ClassifierObjective(name="x", kind="hf-classifier", model=str(folder), max_length=2048)
    scores = ClassifierScorer(spec, Path()).score([q for q, _ in pairs], [r for _, r in pairs])
    for (q, r), score in zip(pairs[:4], scores, strict=False):
        assert score == pytest.approx(plain(folder, q + r), abs=1e-3)


def test_long_dialogues_keep_the_answer(build: Build, pairs: list[Pair]) -> None:
    """Cut to 64 tokens, the row still ends with the whole reply, and is as long as it may be."""
    spec = objective("hh-rlhf", "harmless", build("gpt2")).model_copy(update={"max_length": 64})
    scorer = ClassifierScorer(spec, Path())
    short = [(q, " ".join(r.split()[:8])) for q, r in pairs]
    rows = scorer._encoder.rows(short)
    words = scorer._tokenizer
    for (q, r), row in zip(short, rows, strict=True):
        assert len(row["input_ids"]) <= 64
        tail = words(r)["input_ids"]
        assert row["input_ids"][-len(tail) :] == tail
        kept = words.decode(row["input_ids"][: -len(tail)])
        assert q.endswith(kept.lstrip("\ufffd"))
    assert scorer.rows_shortened >= 8
    assert sum(len(row["input_ids"]) >= 62 for row in rows) >= scorer.rows_shortened - 2


def test_real_dialogues_come_apart_and_go_together_again(dialogues: list[dict[str, str]]) -> None:
    for dialogue in dialogues:
        prompt, chosen, rejected = split_pair(dialogue["chosen"], dialogue["rejected"])
        assert prompt + chosen == dialogue["chosen"] and prompt + rejected == dialogue["rejected"]
        assert prompt.startswith(HUMAN) and prompt.endswith(ASSISTANT)
        assert dialogue["chosen"].rpartition(ASSISTANT)[2] in chosen


def test_real_pairs_serve_as_responses(shared: Path, dialogues: list[dict[str, str]]) -> None:
    """``data.responses`` with ``columns: {chosen: .., rejected: ..}``: both replies of every pair, as RiC uses them."""
    from moalign.config.card import DataSpec, SourceSpec
    from moalign.data import load

    path = shared / "data" / "hh-harmless-base-test.jsonl.gz"
    source = SourceSpec(path=str(path), limit=40, columns={"chosen": "chosen", "rejected": "rejected"})
    responses = list(load.load_responses(DataSpec(responses=source)))
    assert len(responses) == 80
    for number, dialogue in enumerate(dialogues):
        prompt, chosen, rejected = split_pair(dialogue["chosen"], dialogue["rejected"])
        rows = responses[2 * number : 2 * number + 2]
        assert [row.prompt for row in rows] == [prompt] * 2
        assert [row.response for row in rows] == [
            chosen,
            rejected,
        ]  # the space behind "Assistant:" is the first token's
