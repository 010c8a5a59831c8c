"""The sandbox's base: a tiny Llama (about 107,000 parameters) trained on first use and cached by content.

Its corpus is the world's: prompts, three quarters of them with a stated preference, and responses drawn slot by
slot from :func:`world.prior`, which reads the question. For the *warm* base the responses to a stated preference are
tilted by ``exp(TILT * w . z)``, so that the base weakly understands what a preference means, as a pretrained language
model would; for the *cold* base the stated preference says nothing about the response.

The corpus is a known distribution, so training minimises the expected loss over all responses that could follow
(the exact next-token distribution as target) instead of the loss of one drawn response: same optimum, far less noise.

Every machine trains the same weights, bit for bit (:mod:`moalign.lm.reproducible`), so that a run made on one machine
can be compared with a run made on another.
"""

from __future__ import annotations

import collections
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moalign.config.objectives import TASTED
from moalign.core import preferences
from moalign.core.arrays import Matrix
from moalign.core.errors import WorkError
from moalign.core.paths import CACHE_REMEDY, cache_root
from moalign.core.progress import Progress, silent
from moalign.lm import reproducible
from moalign.pareto.indicators import controllability
from moalign.tasks.sandbox import world
from moalign.tasks.sandbox.optimum import all_rewards, corpus_log_probs
from moalign.tasks.sandbox.scorer import rewards

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from moalign.lm.language_model import LanguageModel

TILT = 0.3
"""Strength of the warm corpus's tilt, in units of z."""

FIRST_TILT, HOLD, FALL = 3.0, 0.65, 0.1
"""Tilt of the first part of warm training, held for ``HOLD`` of the steps; then it falls to :data:`TILT` within
``FALL`` of the steps. The signal of a weak tilt alone takes thousands of steps to find; what the base ends up knowing
is the weak tilt."""

PREFERENCE_SHARE = 0.75
WIDTH, LAYERS, HEADS, INNER = 64, 2, 4, 160
STEPS, EXTRA_STEPS, MOST_STEPS, BATCH, RATE = 600, 80, 920, 20, 8e-3
MORE_STEPS = 600
"""Steps more for every objective beyond two: its stated preferences are longer and say more. With 300 the base of three
objectives and seed 0 does not find the tilt (tau .10), with 600 it does (.87)."""
FLOOR, GRAMMAR = 0.01, 4.0
"""Last learning rate as a share of the first; extra weight of the probability given to words that cannot follow."""
WARM_TAU = 0.6
"""A warm base is trained until Kendall's tau between stated weights and mean rewards is at least this."""

VERSION = 3
"""Raise it when anything above or in the training loop changes: it is part of the cache key."""

TOKENIZER = "t2"
"""Raise it when the tokenizer's files change and its tokens do not: the base is another folder, the task the same."""


def identity(objectives: Sequence[str], kind: str, seed: int) -> str:
    """Return the content address of a base: 12 hex digits over all that determines it."""
    tables = [
        world.TOPICS, world.QUESTIONS, world.TAILS, world.SLOTS, world.RISK, world.HUMOR, world.TOOL_SLOT,
        world.TOOL_RIGHT, world.TOOL_WRONG, world.ON_TOPIC, world.CAUTION, world.MISSING, world.STRAY,
    ]  # fmt: skip
    training = [
        TILT, FIRST_TILT, HOLD, FALL, PREFERENCE_SHARE, WIDTH, LAYERS, HEADS, INNER, STEPS, EXTRA_STEPS, MOST_STEPS,
        BATCH, RATE, FLOOR, GRAMMAR, WARM_TAU, reproducible.GRID,
    ]  # fmt: skip
    content: dict[str, Any] = {
        "objectives": list(objectives),
        "kind": kind,
        "seed": seed,
        "version": VERSION,
        "world": repr(tables),
        "training": training,
    }
    if len(objectives) > 2:
        content["more"] = MORE_STEPS * (len(objectives) - 2)
    if needs_more_words(objectives):
        content["world of five"] = repr([world.SHORT, world.PER_CHARACTER, world.WARMTH])
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def ensure(objectives: Sequence[str], kind: str, seed: int, progress: Progress = silent) -> Path:
    """Return the folder of the trained base, training it when it is not cached yet.

    Of two processes that call this at once, one trains it and the other waits. Raises RequestError when the cache
    cannot be written.
    """
    from filelock import FileLock

    from moalign.runs import atomic

    folder = cache_root() / "sandbox" / f"{kind}-{len(objectives)}-{identity(objectives, kind, seed)}-{TOKENIZER}"
    if (folder / "model.safetensors").is_file():
        return folder
    with atomic.refusals(folder.parent, CACHE_REMEDY):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder) + ".lock"):
            if not (folder / "model.safetensors").is_file():
                model, tokenizer, facts = train(objectives, kind, seed, progress)
                with atomic.directory(folder, remedy=CACHE_REMEDY) as place:
                    model.save_pretrained(place, safe_serialization=True)
                    tokenizer.save_pretrained(place)
                    (place / "base.json").write_text(json.dumps(facts, indent=2) + "\n")
    return folder


def needs_more_words(objectives: Sequence[str]) -> bool:
    """Whether a base has an objective beyond the first three, whose names every base can read."""
    return not set(objectives) <= set(TASTED)


def make_tokenizer(objectives: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer: words of the world, punctuation, single digits, RiC's tags.

    What the further objectives need comes behind the words of every base, whose numbers stay as they are.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names, tags = world.OBJECTIVES, [f"<rm{i}_score>" for i in range(1, len(world.OBJECTIVES) + 1)]
    known = [*TASTED, *tags[: len(TASTED)]]
    vocabulary = ["<pad>", "<bos>", "<eos>", "<unk>", *sorted({*world.words(), *"[]%.,?-+:()0123456789", *known})]
    if needs_more_words(objectives):
        vocabulary += [word for word in (*names, *tags) if word not in known]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    pieces = Regex(r"<rm\d_score>|[0-9]|[^\s\w]|[A-Za-z_]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "removed", invert=True)
    begin = ("<bos>", vocabulary.index("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def z_scale() -> tuple[Matrix, Matrix]:
    """Return mean and standard deviation of the rewards of the corpus without preference, ``[objectives]`` each."""
    contexts = collections.Counter(world.context_of(prompt) for prompt in world.prompts())
    total = sum(contexts.values())
    first, second = np.zeros(len(world.OBJECTIVES)), np.zeros(len(world.OBJECTIVES))
    # In two products: one of all columns rounds otherwise, and bases trained with such numbers are others.
    for part in (slice(len(TASTED)), slice(len(TASTED), None)):
        for context, count in contexts.items():
            share = count / total * np.exp(corpus_log_probs(context))
            values = np.ascontiguousarray(all_rewards(context)[:, part])
            first[part] += share @ values
            second[part] += share @ values**2
    return first, np.sqrt(second - first**2)


def untrained(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return the model before training; its weights depend on torch's generator."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(
    objectives: Sequence[str], kind: str, seed: int, progress: Progress = silent
) -> tuple[Any, PreTrainedTokenizerFast, dict[str, Any]]:
    """Train a base; returns (model, tokenizer, facts). Raises WorkError when a warm base does not learn to steer."""
    import torch

    from moalign.lm.language_model import set_threads, wrap

    tokenizer = make_tokenizer(objectives)
    model, exact = untrained(tokenizer), reproducible.in_double(untrained(tokenizer))
    matrices = [weight for weight in exact.parameters() if weight.dim() > 1]
    reproducible.draw(matrices, model.config.initializer_range, seed)
    set_threads(model.num_parameters())
    corpus = Corpus(objectives, kind, seed, tokenizer)
    optimizer = torch.optim.AdamW(exact.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    done, until = 0, corpus.steps
    while True:
        _steps(exact, corpus, optimizer, range(done, until), progress)
        done = until
        model.load_state_dict(exact.state_dict())  # multiples of 1 / GRID are the same numbers in single precision
        tau = steering(wrap(model.eval(), tokenizer, "sandbox", "untracked", device="cpu"), objectives)
        if kind == "cold" or tau >= WARM_TAU:
            return (
                model,
                tokenizer,
                {"kind": kind, "objectives": list(objectives), "seed": seed, "steps": done, "tau": tau},
            )
        if done >= MOST_STEPS + corpus.steps - STEPS:
            raise WorkError(
                f"the sandbox's warm base reached only tau {tau:.2f} after {done} steps; needed: {WARM_TAU}"
            )
        until += EXTRA_STEPS


def _steps(model: Any, corpus: Corpus, optimizer: torch.optim.Optimizer, steps: range, progress: Progress) -> None:
    """Train for some steps of the schedule: short warm-up, then half a cosine down to a floor; rounded after each."""
    import torch

    model.requires_grad_(True)
    model.train()
    for step in steps:
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / corpus.steps))
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20) * (FLOOR + (1 - FLOOR) * cosine)
        torch.autograd.backward(corpus.loss(model, step))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        reproducible.to_grid(model.parameters())
        progress(f"training the {corpus.kind} base (first use only)", step + 1, steps.stop)
    model.eval()


def steering(lm: LanguageModel, objectives: Sequence[str], questions: int = 60) -> float:
    """Return Kendall's tau between stated weight and mean reward on an even grid, averaged over objectives."""
    from moalign.lm.sampler import Sampling, generate

    grid = preferences.grid(len(objectives), 10 if len(objectives) == 2 else 3)
    prompts = world.prompts()[:: len(world.prompts()) // questions]
    texts = [f"[{preferences.to_text(w, objectives)}] {prompt}" for w in grid for prompt in prompts]
    rows = [*range(len(prompts))] * len(grid)
    answers = generate(lm, texts, rows, Sampling(max_new_tokens=26, batch_size=512)).responses
    columns = [world.OBJECTIVES.index(name) for name in objectives]
    scores = np.array([rewards(prompts[row], answer) for row, answer in zip(rows, answers, strict=True)])
    means = scores[:, columns].reshape(len(grid), len(prompts), len(columns)).mean(axis=1)
    return float(controllability(np.array(grid), means)["tau"])


class Corpus:
    """Draws training batches whose targets are the corpus's exact next-token distributions."""

    def __init__(self, objectives: Sequence[str], kind: str, seed: int, tokenizer: PreTrainedTokenizerFast) -> None:
        self.objectives = list(objectives)
        self.steps = STEPS + MORE_STEPS * (len(objectives) - 2)
        self.kind = kind
        self.rng = np.random.default_rng([seed, 7])
        self.tokenizer = tokenizer
        columns = [world.OBJECTIVES.index(name) for name in objectives]
        self.prompts = world.prompts()
        contexts = [world.context_of(prompt) for prompt in self.prompts]
        self.log_prior = np.log(np.stack([world.prior(context) for context in contexts]))
        tables = np.stack([world.slot_rewards(context) for context in contexts])
        self.z = tables[..., columns] / z_scale()[1][columns]  # constant shifts cancel within a slot
        self.prompt_ids = self._ids(self.prompts)
        self.phrase_ids = [self._ids([text for text, _ in slot]) for slot in world.SLOTS]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return list(self.tokenizer(texts, add_special_tokens=False)["input_ids"])

    def tilt(self, step: int) -> float:
        """Return the corpus's tilt at a training step."""
        if self.kind == "cold":
            return 0.0
        fallen = min(1.0, max(0.0, (step / self.steps - HOLD) / FALL))
        return FIRST_TILT + (TILT - FIRST_TILT) * fallen

    def draw(self, count: int, tilt: float) -> tuple[NDArray[np.int64], Matrix, NDArray[np.bool_], Matrix]:
        """Return prompt numbers, stated weights, whether they are stated, and slot probabilities ``[count, 6, 5]``."""
        which = self.rng.integers(len(self.prompts), size=count)
        weights = self.rng.dirichlet([1.0] * len(self.objectives), size=count)
        # Corners and round numbers are what people ask for, and Dirichlet draws never hit them.
        rounded = np.round(weights, 1)
        corners = np.eye(len(self.objectives))[self.rng.integers(len(self.objectives), size=count)]
        pick = self.rng.random(count)
        exact = np.isclose(rounded.sum(axis=1), 1.0) & (pick < 0.3)
        weights = np.where(exact[:, None], rounded, weights)
        weights = np.where((pick > 0.85)[:, None], corners, weights)
        stated = self.rng.random(count) < PREFERENCE_SHARE
        tilted = tilt * np.einsum("nspm,nm->nsp", self.z[which], weights) * stated[:, None, None]
        logits = self.log_prior[which] + tilted
        probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return which, weights, stated, probs / probs.sum(axis=-1, keepdims=True)

    def loss(self, model: Any, step: int) -> torch.Tensor:
        """Return the mean cross entropy over response tokens, less the corpus's own entropy (0 = learnt exactly)."""
        import torch

        which, weights, stated, probs = self.draw(BATCH, self.tilt(step))
        choice = (probs.cumsum(axis=-1) < self.rng.random((BATCH, len(world.SLOTS), 1))).sum(axis=-1).clip(0, 4)
        rows: list[list[int]] = []
        targets: list[tuple[int, int, int, float]] = []  # row, place, token that may follow, its probability
        for i in range(BATCH):
            text = f"[{preferences.to_text(weights[i], self.objectives)}]" if stated[i] else ""
            row = [self.tokenizer.bos_token_id, *(self._ids([text])[0] if text else ()), *self.prompt_ids[which[i]]]
            for slot, phrase in enumerate(choice[i]):
                follow = self._followers(slot, phrase, probs[i, slot])
                targets.extend((i, len(row) - 1 + place, token, mass) for place, token, mass in follow)
                row += self.phrase_ids[slot][phrase]
            targets.append((i, len(row) - 1, self.tokenizer.eos_token_id, 1.0))
            rows.append([*row, self.tokenizer.eos_token_id])
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        *where, mass = zip(*targets, strict=True)
        place = tuple(torch.tensor(values) for values in where)
        goal = torch.zeros(BATCH, longest, len(self.tokenizer), dtype=torch.float64)
        goal.index_put_(place, torch.tensor(mass, dtype=torch.float64), accumulate=True)
        log_probs = torch.log_softmax(model(input_ids=ids, attention_mask=(ids != pad).long()).logits, dim=-1)
        places = goal.sum(-1) > 0
        entropy = -(goal * goal.clamp_min(1e-12).log()).sum()
        # The mass on words that cannot follow is weighted up: a response that leaves the grammar never returns to
        # it, and the minimum stays where it was.
        possible = torch.where(goal > 0, log_probs, -torch.inf).logsumexp(-1)
        stray = -possible[places].sum()
        return (-(goal * log_probs).sum() - entropy + GRAMMAR * stray) / places.sum()

    def _followers(self, slot: int, phrase: int, probs: Matrix) -> Iterator[tuple[int, int, float]]:
        """Yield what may stand at each place of a phrase, with its probability: phrases that begin alike share it."""
        words = self.phrase_ids[slot]
        for place in range(len(words[phrase])):
            alike = [k for k, other in enumerate(words) if other[:place] == words[phrase][:place]]
            total = sum(probs[k] for k in alike)
            yield from ((place, words[k][place], float(probs[k] / total)) for k in alike)
