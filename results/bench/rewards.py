"""How fast reward models score and train, as ratios in one process; called by ``bench.py`` (``--rewards`` alone)."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Work = Callable[[], object]


def reward_ratios(repeats: int) -> dict[str, Any]:
    """Return how fast reward models are scored and trained, against the plainest way, in this process.

    ``scoring``: throughput of an ``hf-classifier`` objective over that of tokenising everything, sorting by length and
    a plain padded forward pass per batch (promised >= 0.95). ``more_step``: forward and backward pass with MORE's
    weights over one with the plain mean of the same batch (promised <= 1.1). A random model of 2.8 million parameters.
    """
    import torch

    torch.set_num_threads(1)
    times = _timed(_works(), repeats)

    def ratio(above: str, below: str) -> float:
        """Return the median of the ratios within a round, which the machine's load touches alike."""
        pairs = zip(times[above][1:], times[below][1:], strict=True)
        return round(statistics.median(numerator / denominator for numerator, denominator in pairs), 3)

    return {
        "seconds": {name: round(statistics.median(seconds[1:]), 4) for name, seconds in times.items()},
        "scoring": ratio("plain", "scorer"),
        "more_step": ratio("more", "multitask"),
    }


def _timed(works: Mapping[str, Work], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each work by round; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():  # in turn, so that all meet the same load of the machine
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    return times


def _works() -> dict[str, Work]:
    """Return what is timed, by name."""
    import numpy as np
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

    from moalign.config.objectives import ClassifierObjective
    from moalign.rewards.hf_classifier import ClassifierScorer
    from moalign.tasks.sandbox import world
    from moalign.tasks.sandbox.base import make_tokenizer

    words = make_tokenizer()
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(words), num_labels=1, pad_token_id=words.pad_token_id, **sizes)
    rng = np.random.default_rng(0)
    prompts = [" ".join(rng.choice(world.prompts(), size=rng.integers(1, 12))) for _ in range(128)]
    answers = world.draw_responses([world.prompts()[0]] * len(prompts), rng)
    with tempfile.TemporaryDirectory() as temporary:
        AutoModelForSequenceClassification.from_config(config).save_pretrained(temporary)
        words.save_pretrained(temporary)
        spec = ClassifierObjective(
            name="x", kind="hf-classifier", model=temporary, template="{prompt} {response}", batch_tokens=4096
        )
        scorer = ClassifierScorer(spec, Path(temporary))
        scorer.prepare()
        plain = AutoModelForSequenceClassification.from_pretrained(temporary).eval()
        tokenizer = AutoTokenizer.from_pretrained(temporary)
    texts = [f"{p} {r}" for p, r in zip(prompts, answers, strict=True)]
    return {
        "plain": lambda: _by_hand(plain, tokenizer, texts, spec.batch_tokens),
        "scorer": lambda: scorer.score(prompts, answers),
        **_steps(plain, rng.integers(4, len(words), size=(20, 64)), int(words.pad_token_id)),
    }


def _by_hand(model: Any, tokenizer: Any, texts: list[str], batch_tokens: int) -> None:
    """Score texts the plainest way: longest first, a padded batch at a time."""
    import torch

    rows = tokenizer(texts)["input_ids"]
    rows.sort(key=len, reverse=True)
    start = 0
    with torch.inference_mode():
        while start < len(rows):
            batch = rows[start : start + max(1, batch_tokens // len(rows[start]))]
            model(**tokenizer.pad({"input_ids": batch}, return_tensors="pt"))
            start += len(batch)


def _steps(model: Any, rows: Any, pad: int) -> dict[str, Work]:
    """Return a training step with each loss; the first half of ``rows`` ``[texts, tokens]`` won."""
    import torch

    from moalign.reward_models.more import Balancer, HeadWatch, weighted

    watch, balancer = HeadWatch(model), Balancer(5, normalise=True, momentum=0.99)
    ids = torch.from_numpy(rows)
    group = torch.arange(len(ids) // 2) % 5

    def step(more: bool) -> None:
        winner, loser = model(input_ids=ids).logits.squeeze(-1).chunk(2)
        delta = winner - loser
        if more:
            chosen, rejected = watch.states(ids, pad).chunk(2)
            loss = weighted(delta, group, balancer.weights(chosen, rejected, delta.detach(), group))
        else:
            loss = -torch.nn.functional.logsigmoid(delta).mean()
        model.zero_grad()
        loss.backward()

    return {"multitask": lambda: step(False), "more": lambda: step(True)}
