"""Objectives of kind ``lm`` on tiny random models, against sums done one row and one token at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moalign.config.objectives import LmObjective
from moalign.core.errors import RequestError
from moalign.rewards import lm_scorer
from moalign.rewards.lm_scorer import LmScorer
from moalign.rewards.panel import RewardPanel
from moalign.rewards.scorer import build_scorers

WORDS = [f"w{n}" for n in range(40)]
SPECIAL = ["[UNK]", "<s>", "</s>", "<user>", "<bot>", "<end>", "What", "question", "or", "request", "is", "this", "a"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<bot> ' }}{{ m['content'] }}"
    "{{ ' <end> ' }}{% endfor %}{% if add_generation_prompt %}{{ '<bot>' }}{% endif %}"
)


def save(folder: Path, family: str = "llama", chat: bool = False, **more: Any) -> Path:
    """Write a tiny random model; its tokenizer has a token a word and begins plain texts with ``<s>``."""
    import torch
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = [*SPECIAL, *WORDS]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=["<user>", "<bot>", "<end>"], **named
    )
    tokenizer.chat_template = CHAT if chat else None
    common = {"vocab_size": len(vocabulary), "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.4, **more}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(3)
    model: Any
    if family == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **common))
    elif family == "bert":
        model = t.BertForMaskedLM(t.BertConfig(**sizes, max_position_embeddings=64, **common))
    else:
        model = t.LlamaForCausalLM(t.LlamaConfig(**sizes, max_position_embeddings=64, **common))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scorer(folder: Path, score: str, **more: Any) -> LmScorer:
    return LmScorer(LmObjective(name="x", kind="lm", model=str(folder), score=score, **more), folder)  # type: ignore[arg-type]


class ByHand:
    """A second implementation: one row, one token at a time, softmax in double precision."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder).double()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids(word) for word in text.split()]

    def mean(self, prefix: str, scored: str) -> float:
        import torch

        row, total = self.ids(prefix), 0.0
        for token in self.ids(scored):
            with torch.no_grad():
                probs = torch.softmax(self.model(torch.tensor([row])).logits[0, -1], dim=-1)
            total += math.log(float(probs[token]))
            row.append(token)
        return total / len(self.ids(scored))


PAIRS = [
    ("w1 w2 w3", "w4 w5"),
    ("w7", "w8 w9 w10 w11 w12 w13 w14"),
    ("w1 w2 w3 w4 w5 w6 w20 w21 w22", "w30"),
    ("w39 w39", "w39 w39 w39"),
]
ASKED = "What question or request is this a [UNK] [UNK]"


@pytest.fixture(scope="module", params=[("llama", False), ("llama", True), ("gpt2", False), ("gpt2", True)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    family, chat = request.param
    return save(tmp_path_factory.mktemp("lm"), family, chat), chat


def test_fluency_is_the_mean_over_the_responses_tokens(folder: tuple[Path, bool]) -> None:
    path, chat = folder
    by_hand = ByHand(path)
    wanted = [by_hand.mean(f"<s> <user> {p} <end> <bot>" if chat else f"<s> {p}", r) for p, r in PAIRS]
    scores = scorer(path, "fluency").score(*zip(*PAIRS, strict=True))
    assert scores == pytest.approx(wanted, abs=1e-5)
    assert min(scores) < max(scores) - 0.1


def test_relevance_is_what_the_response_adds_to_the_prompts_likelihood(folder: tuple[Path, bool]) -> None:
    path, chat = folder
    by_hand = ByHand(path)
    wanted = []
    for prompt, response in PAIRS:
        with_it = f"<s> <user> {response} {ASKED} <end> <bot>" if chat else f"<s> {response}"
        without = f"<s> <user> {ASKED} <end> <bot>" if chat else "<s>"
        wanted.append(by_hand.mean(with_it, prompt) - by_hand.mean(without, prompt))
    assert scorer(path, "relevance").score(*zip(*PAIRS, strict=True)) == pytest.approx(wanted, abs=1e-5)
    assert max(map(abs, wanted)) > 0.05


@pytest.mark.parametrize("score", ["fluency", "relevance"])
def test_a_text_scores_the_same_whatever_stands_beside_it(
    folder: tuple[Path, bool], score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = folder
    alone = [scorer(path, score).score([p], [r])[0] for p, r in PAIRS]
    for budget, most, parts in ((4096, 2**26, 1), (64, 2**26, 1), (4096, 1, len(PAIRS))):
        monkeypatch.setattr(lm_scorer, "_MOST_LOGITS", most)
        made = scorer(path, score, batch_tokens=budget)
        batches = list(made._batches([made._line(r, p, "", "start") for p, r in PAIRS]))
        assert len(batches) == parts
        assert made.score(*zip(*[*PAIRS, *PAIRS[:2]], strict=True)) == pytest.approx([*alone, *alone[:2]], abs=1e-5)


def test_an_empty_response_is_a_guess_at_random_and_says_nothing(folder: tuple[Path, bool]) -> None:
    path, _ = folder
    size = len(SPECIAL) + len(WORDS)
    assert scorer(path, "fluency").score(["w1 w2"], [""]) == [-math.log(size)]
    assert scorer(path, "relevance").score(["w1 w2", ""], ["", "w1"]) == [0.0, 0.0]


def test_overlong_texts_lose_what_matters_least(tmp_path: Path) -> None:
    path = save(tmp_path / "m", chat=True)
    by_hand = ByHand(path)
    long = " ".join(WORDS[:30])
    fluency = scorer(path, "fluency", max_length=16)
    # 4 tokens are the template's: the prompt keeps its last 10 words beside a response of 2.
    assert fluency.score([long], ["w1 w2"]) == pytest.approx(
        [by_hand.mean(f"<s> <user> {' '.join(WORDS[20:30])} <end> <bot>", "w1 w2")], abs=1e-5
    )
    assert fluency.rows_shortened == 1
    # A response too long by itself loses its end, and the prompt all its words.
    assert fluency.score(["w1"], [long]) == pytest.approx(
        [by_hand.mean("<s> <user> <end> <bot>", " ".join(WORDS[:12]))], abs=1e-5
    )
    # Relevance: 13 tokens are the template's; the prompt keeps its last half, the response its beginning.
    relevance = scorer(path, "relevance", max_length=40)
    kept = " ".join(WORDS[10:30])
    wanted = by_hand.mean(f"<s> <user> {' '.join(WORDS[:7])} {ASKED} <end> <bot>", kept) - by_hand.mean(
        f"<s> <user> {ASKED} <end> <bot>", kept
    )
    assert relevance.score([long], [long]) == pytest.approx([wanted], abs=1e-5)
    with pytest.raises(RequestError, match=r"the template alone takes 13 tokens; raise max_length"):
        scorer(path, "relevance", max_length=16).score(["w1"], ["w2"])


def test_the_model_may_lack_a_chat_template_only_where_none_is_asked_for(tmp_path: Path) -> None:
    plain = save(tmp_path / "plain")
    with pytest.raises(RequestError, match="objective 'x': template: chat, but the model .* has no chat template"):
        scorer(plain, "fluency", template="chat").score(["w1"], ["w2"])
    chat = save(tmp_path / "chat", chat=True)
    as_plain = scorer(chat, "fluency", template="plain").score(["w1"], ["w2 w3"])
    assert as_plain == pytest.approx(scorer(plain, "fluency").score(["w1"], ["w2 w3"]), abs=1e-6)


def test_a_template_that_prints_the_date_reads_the_same_on_every_day(tmp_path: Path) -> None:
    path = save(tmp_path / "m", chat=True)
    (path / "chat_template.jinja").write_text("{{ strftime_now('w%y') }} " + CHAT)
    wanted = ByHand(path).mean("w24 <s> <user> w1 <end> <bot>", "w2 w3")
    assert scorer(path, "fluency").score(["w1"], ["w2 w3"]) == pytest.approx([wanted], abs=1e-5)


def test_models_of_no_use_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="objective 'x': the model .* reads ahead"):
        scorer(save(tmp_path / "bert", "bert"), "fluency").prepare()
    with pytest.raises(RequestError, match="there is no model folder"):
        LmScorer(LmObjective(name="x", kind="lm", model="./no", score="fluency"), tmp_path)
    small = save(tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForSequenceClassification"]}))
    _drop_head(small)
    with pytest.raises(RequestError, match=r"not a whole causal language model: its weights lack lm_head\.weight"):
        scorer(small, "fluency").prepare()


def _drop_head(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if name != "lm_head.weight"}
    save_file(weights, path, metadata={"format": "pt"})


def test_a_card_is_told_what_is_wrong_with_it() -> None:
    from pydantic import ValidationError

    for wrong in ({"score": "relevence"}, {"score": "fluency", "template": "llama"}, {"score": "fluency", "label": 1}):
        with pytest.raises(ValidationError):
            LmObjective(name="x", kind="lm", model="m", **wrong)  # type: ignore[arg-type]


def test_revision_follows_model_and_settings_and_scores_are_kept(tmp_path: Path) -> None:
    from moalign.rewards.store import Store

    path = save(tmp_path / "m")
    first = scorer(path, "fluency")
    assert first.revision == scorer(path, "fluency", batch_tokens=64).revision
    others = [
        scorer(path, "relevance"),
        scorer(path, "fluency", max_length=32),
        scorer(save(tmp_path / "c", chat=True), "fluency"),
    ]
    assert len({first.revision, *(other.revision for other in others)}) == 4
    scores = RewardPanel([first], store=Store(tmp_path / "s.sqlite")).score(["w1"], ["w2"])
    again = scorer(path, "fluency")
    again.score = None  # type: ignore[method-assign, assignment]  # must not be called
    assert RewardPanel([again], store=Store(tmp_path / "s.sqlite")).score(["w1"], ["w2"]).tolist() == scores.tolist()


def test_two_objectives_of_one_model_load_it_once(tmp_path: Path) -> None:
    path = save(tmp_path / "m")
    specs = [LmObjective(name=name, kind="lm", model=str(path), score=name) for name in ("fluency", "relevance")]  # type: ignore[arg-type]
    fluency, relevance = build_scorers(specs, tmp_path)
    assert isinstance(fluency, LmScorer) and isinstance(relevance, LmScorer)
    assert fluency._model is relevance._model


ANSWERS = [
    ("How do I keep bread fresh?", "Wrap it in a cloth and keep it in a dry, cool place."),
    ("What should I wear to a wedding?", "A neat suit or an elegant dress is a safe choice."),
    ("Why do cats purr?", "They mostly purr when they feel calm and content."),
    ("How can I save electricity?", "Switch off lamps and devices that nobody needs."),
    ("What is a good exercise for my back?", "Swimming is gentle and makes your muscles stronger."),
    ("How do I learn to play the piano?", "Practise scales and simple pieces for a while every day."),
    ("What should I pack for the beach?", "Take a towel, sun cream, a hat and plenty of water."),
    ("How do I remove a red wine stain?", "Put salt on it at once and rinse it with cold water."),
    ("How can I make new friends in a new city?", "Join a club or a class where people share your interests."),
    ("Why does it rain?", "Water vapour cools in the clouds and falls down as drops."),
]


@pytest.mark.slow
def test_a_real_model_knows_which_answer_belongs_to_which_question(smollm2: Path) -> None:
    made = scorer(smollm2, "relevance")
    questions, answers = zip(*ANSWERS, strict=True)
    right = made.score(questions, answers)
    wrong = made.score(questions, [*answers[3:], *answers[:3]])
    assert sum(a > b for a, b in zip(right, wrong, strict=True)) >= 9
    assert sum(right) / 10 > 0.3
