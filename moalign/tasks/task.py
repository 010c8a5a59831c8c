"""A task: everything that methods and the judge share, loaded or computed from a task card.

What is computed once (the normaliser, the pool of the base's own scored responses) is stored in
``<results>/tasks/<name>-<hash>/``, under the hash of the card.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from moalign.config.card import TaskCard
from moalign.core import preferences
from moalign.core.amounts import Amount, Amounts, SplitAmount
from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError, placed
from moalign.core.paths import cache_root
from moalign.core.preferences import Preference
from moalign.core.progress import Progress, counted, silent
from moalign.core.records import Labels, Pair, Response
from moalign.data import splits
from moalign.rewards.normaliser import Normaliser
from moalign.rewards.panel import RewardPanel
from moalign.tasks import responses as rows_of
from moalign.tasks.limit import WithLimit
from moalign.tasks.pairs import Pairs, from_scores
from moalign.tasks.responses import Responses, Scored, complete, sampled, shown
from moalign.tasks.users import WithUsers

if TYPE_CHECKING:
    from moalign.config.objectives import ObjectiveSpec
    from moalign.config.recipe import LoraSpec
    from moalign.lm.chat import Codec, Renderer
    from moalign.lm.language_model import LanguageModel
    from moalign.lm.sampler import Sampling
    from moalign.lm.vllm_engine import VllmEngine
    from moalign.reward_models.pairs import PairSet
    from moalign.rewards.store import Store
    from moalign.tasks.frontier import Frontier

WHERE = "task.model"
"""How messages name the place of the policy's model."""

SHORT = "short.json"
"""File of the number of tokens below which a response is short."""


def fingerprint(model: str, revision: str | None, where: str = WHERE) -> str:
    """Return the content fingerprint of a language model that the setting ``where`` names, checked; needs no torch."""
    from moalign.lm import model_folder

    return model_folder.fingerprint(model_folder.resolve(model, revision, where), where)


class Task(WithUsers, WithLimit, abc.ABC):
    """What every kind of task shares; subclasses define where prompts, responses and the base come from."""

    def __init__(self, card: TaskCard, results: Path, progress: Progress = silent) -> None:
        self.card = card
        self.results = results
        self.progress = progress
        self.names = card.objective_names
        self.attention: str | None = None  # a recipe's policy.attention
        self.offload = False  # a recipe's rewards.offload
        self.base_sum: str | None = None  # of the weights, where a machine trains the base for itself
        self.engine: VllmEngine | None = None  # what samples for a recipe's rollout.engine: vllm

    # -- what a kind of task fills in ----------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def identity(self) -> dict[str, str]:
        """Content fingerprints of what the card points to: part of the hash."""

    @abc.abstractmethod
    def base_source(self) -> tuple[str, str | None]:
        """Return the base as (folder or hub id, revision), making it first when it is built in."""

    @abc.abstractmethod
    def all_prompts(self) -> list[str]:
        """Return the bare prompts of all splits, those included that are too long."""

    @abc.abstractmethod
    def data_responses(self, split: str) -> Responses | None:
        """Return the responses that the task's data holds for a split, None when it has none."""

    def known_response(self, prompt: str) -> Response | None:
        """Return a response that the data has for any prompt of it; hub data sets are not looked through."""
        return None

    def data_pairs(self, objective: int) -> list[Pair]:
        """Return the training split's pairs that people labelled for an objective."""
        return []

    def optimum(self, prefs: Sequence[Preference], prompts: Sequence[str], beta: float = 0.0) -> Matrix | None:
        """Return the optimal mean raw rewards ``[preferences, objectives]``, or None when they are not known."""
        return None

    def frontier(self, prefs: Sequence[Preference]) -> list[Frontier] | None:
        """Return the most w.z at every KL to the base, in raw rewards, per preference; None where it is not known.

        The KL of :mod:`moalign.evaluation.divergence`: to the base, bare prompt, at the card's temperature.
        """
        return None

    # -- identity ------------------------------------------------------------------------------------------

    @functools.cached_property
    def hash(self) -> str:
        """16 hex digits: two runs are comparable exactly when this agrees."""
        return self.card.hash(**self.identity)

    @functools.cached_property
    def folder(self) -> Path:
        """Where the task's computed parts are kept."""
        return self.results / "tasks" / f"{self.card.name}-{self.hash}"

    # -- prompts and preferences ---------------------------------------------------------------------------

    @functools.cached_property
    def prompts(self) -> dict[str, list[str]]:
        """Bare prompts of the splits ``train``, ``calibration``, ``eval``."""
        fitting = [prompt for prompt in self.all_prompts() if not self.left_out(prompt)]
        if not fitting:
            raise RequestError(
                f"task {self.card.name}: overlong: drop leaves no prompt; all are longer than "
                f"generation.max_prompt_tokens = {self.card.generation.max_prompt_tokens}"
            )
        parts = splits.split(fitting, self.card.splits, self.home)
        splits.check_leaks(parts)
        return parts

    @property
    def eval_prompts(self) -> list[str]:
        """The prompts that every method is judged on."""
        return self.prompts["eval"][: self.card.evaluation.prompts]

    @property
    def grid(self) -> list[Preference]:
        """The evaluation preferences."""
        return preferences.grid_of(len(self.names), self.card.grid)

    # -- the base ------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of what samples for it in another library; should it be asked again, it is loaded again."""
        if self.engine is not None:
            self.engine.close()

    @functools.cached_property
    def language_model(self) -> LanguageModel:
        """The frozen base, loaded once per process."""
        from moalign.lm import language_model

        card = self.card
        lm = language_model.load(*self.base_source(), card.dtype, None, self.codec, self.attention, card.load_in_4bit)
        language_model.set_threads(lm.model.num_parameters())
        return lm

    @functools.cached_property
    def codec(self) -> Codec:
        """From text to the base's tokens, as the card's template asks; loads no weights."""
        from moalign.lm import language_model

        return language_model.load_codec(*self.base_source(), self.card.template)

    def examine(self, lora: LoraSpec | None, setting: str = "policy.lora") -> str:
        """Return what the base and LoRA (``setting``) on it are, without loading or training any weights.

        Raises RequestError for weights that are not those of the base's config, and targets that name no layer.
        """
        from moalign.lm import architecture, model_folder

        return architecture.examine(model_folder.resolve(*self.base_source(), WHERE), WHERE, lora, setting)

    def untrained_codec(self) -> Codec:
        """Return :attr:`codec`, but do not train a built-in base for it."""
        return self.codec

    @functools.cached_property
    def renderer(self) -> Renderer:
        """Turns bare prompts into what the policy reads, cut to the card's limit."""
        from moalign.lm.chat import Renderer

        return Renderer(self.card.template, tuple(self.names), self.codec, self.card.generation.max_prompt_tokens)

    def tokens(self, responses: Sequence[str]) -> list[list[int]]:
        """Return the policy's tokens of responses, without special ones: what their length is counted in."""
        tokenizer = self.codec.tokenizer
        return [list(ids) for ids in tokenizer(list(responses), add_special_tokens=False)["input_ids"]]

    def sampling(self, seed: int, temperature: float | None = None) -> Sampling:
        """Return the card's generation limits as sampler settings; RequestError for a temperature that is none."""
        if temperature is not None and not 0 <= temperature < math.inf:
            raise RequestError(f"--temperature {temperature:g}: allowed: a finite number, 0 or more")
        from moalign.lm.sampler import Sampling

        limits = self.card.generation
        return Sampling(
            max_new_tokens=limits.max_new_tokens,
            temperature=limits.temperature if temperature is None else temperature,
            top_p=limits.top_p,
            seed=seed,
            batch_size=limits.batch_size,
            max_prompt_tokens=limits.max_prompt_tokens,
            stop=tuple(self.card.template.stop),
        )

    def _to_sample(self, split: str) -> list[str]:
        """Return the prompts of a split on which the base is sampled."""
        return self.prompts[split][: self.card.pool.prompts]

    def _sample_base(self, split: str, per_prompt: int, what: str) -> Responses:
        """Sample the base on bare prompts of a split, ``per_prompt`` responses each."""
        prompts = [prompt for prompt in self._to_sample(split) for _ in range(per_prompt)]
        temperature = self.card.pool.temperature or self.card.generation.temperature or 1.0
        sampling = self.sampling(self.card.pool.seed, temperature)
        texts = [self.renderer.plain(prompt) for prompt in prompts]
        return sampled(self.language_model, prompts, texts, sampling, counted(self.progress, what, len(prompts)))

    # -- scorers and their scale ---------------------------------------------------------------------------

    @functools.cached_property
    def panel(self) -> RewardPanel:
        """The scorers that methods see, without normaliser, with the store that all runs of a results folder share."""
        return self._panel_of(self.card.objectives)

    def _panel_of(self, objectives: Sequence[ObjectiveSpec]) -> RewardPanel:
        return RewardPanel.from_specs(objectives, Path.cwd(), self._store, self.offload)

    @functools.cached_property
    def _store(self) -> Store:
        from moalign.rewards.store import Store

        return Store(self.results / "tasks" / "scores.sqlite")

    @functools.cached_property
    def gold_panel(self) -> RewardPanel | None:
        """The scorers that only the judge uses, in the task's order; None: the judge sees what methods see."""
        if self.card.gold_objectives is None:
            return None
        with placed("gold_objectives"):
            return self._panel_of(sorted(self.card.gold_objectives, key=lambda spec: self.names.index(spec.name)))

    @functools.cached_property
    def judge_panel(self) -> RewardPanel:
        """The scorers that answers are judged by, without normaliser: gold ones, and methods' own for the rest.

        Of a task without gold scorers it is :attr:`panel` itself.
        """
        gold = self.gold_panel
        if gold is None:
            return self.panel
        return gold if gold.names == self.names else self.panel.replaced(gold)

    @functools.cached_property
    def normaliser(self) -> Normaliser:
        """The frozen normaliser: from the card, else fitted once on the calibration split and saved with the task."""
        if self.card.normaliser is not None:
            return Normaliser.from_spec(self.card.normaliser, self.names)
        return self._fitted("normaliser.json", self.panel)

    @functools.cached_property
    def judge_normaliser(self) -> Normaliser:
        """The normaliser of :attr:`judge_panel`'s; gold scores' is fitted even where the card has methods' numbers."""
        gold = self.gold_panel
        if gold is None:
            return self.normaliser
        truth = self._fitted("truth.json", gold)
        return truth if gold.names == self.names else self.normaliser.replaced(truth)

    def _fitted(self, name: str, panel: RewardPanel) -> Normaliser:
        """Return the normaliser of a panel, fitted once and kept with the task."""
        path = self._kept(name)
        with self._once(path) as missing:
            if missing:
                self._fit_normaliser(panel).to_json(path)
        return Normaliser.from_json(path).required_of(panel.scorer_hash, path)

    def _fit_normaliser(self, panel: RewardPanel) -> Normaliser:
        base, data = self._calibration_samples, self.data_responses("calibration")
        of_data = None if data is None else complete(panel.score(data.prompts, shown(data.responses), gaps=True))
        self._keep_short((data or base).responses)  # now that the base was sampled for it
        prompts = base.prompts + (data.prompts if data else [])
        responses = shown(base.responses + (data.responses if data else []))
        raw = complete(panel.score(prompts, responses, gaps=True))
        with placed("gold_objectives" if panel is self.gold_panel else ""):
            return Normaliser.fit(
                raw,
                panel.names,
                data=of_data,
                data_hash=hashlib.sha256("\0".join([*prompts, *responses]).encode()).hexdigest()[:16],
                scorer_hash=panel.scorer_hash,
            )

    @functools.cached_property
    def _calibration_samples(self) -> Responses:
        return self._sampled("calibration", self.card.pool.calibration_per_prompt, "calibrating")

    @functools.cached_property
    def short_below(self) -> int:
        """A response of fewer tokens is short (:func:`moalign.lm.quality.short_below`).

        The card's number, else that of the calibration split's responses, kept with the task.
        """
        if self.card.quality is not None and self.card.quality.short is not None:
            return self.card.quality.short
        from moalign.runs import atomic

        path, remedy = self._kept(SHORT), "delete it to have it made again"
        with self._once(path) as missing:
            if missing:
                self._keep_short((self.data_responses("calibration") or self._calibration_samples).responses)
        content = atomic.read_json(path, remedy)
        limit = content.get("short_below") if isinstance(content, dict) else None
        if not isinstance(limit, int):
            raise RequestError(f"{path}: it does not say below how many tokens a response is short; {remedy}")
        return limit

    def _keep_short(self, responses: Sequence[Response]) -> None:
        from moalign.lm.quality import short_below
        from moalign.runs import atomic

        limit = short_below([len(tokens) for tokens in self.tokens(shown(responses))])
        atomic.write_json(self._kept(SHORT), {"short_below": limit, "responses": len(responses)})

    # -- what methods learn from ---------------------------------------------------------------------------

    def calibration(self) -> Scored:
        """Return the scored responses of the calibration split: the data's own, else samples of the base."""
        return self._score(self.data_responses("calibration") or self._calibration_samples)

    def scored(self) -> Scored:
        """Return the scored responses of the training split: the data's own, else a pool sampled from the base once."""
        return self._score(self.data_responses("train") or self._pool())

    def _score(self, rows: Responses) -> Scored:
        raw = self.panel.score(rows.prompts, shown(rows.responses), gaps=True)
        return Scored(rows.prompts, rows.responses, raw, rows.sampled).complete()

    def _pool(self) -> Responses:
        return self._sampled("train", self.card.pool.per_prompt, "sampling the base")

    def _sampled(self, split: str, per_prompt: int, what: str) -> Responses:
        path = self._kept("samples.parquet" if split == "train" else f"samples-{split}.parquet")
        with self._once(path) as missing:
            if missing:
                rows_of.keep(self._sample_base(split, per_prompt, what), path)
        return rows_of.kept(path, "; delete it to have the base sampled again")

    def amounts(self) -> Amounts | None:
        """Return how many responses the methods above will give; None when the data would have to be downloaded."""
        pool, data = self.card.pool, {split: self.data_responses(split) for split in ("train", "calibration")}

        def of(split: str, per_prompt: int) -> SplitAmount:
            rows = data[split]
            if rows is not None:
                return SplitAmount(tuple(Counter(rows.prompts).values()))
            return SplitAmount((per_prompt,) * len(self._to_sample(split)), by_base=True)

        calibration = of("calibration", pool.calibration_per_prompt)
        base = len(self._to_sample("calibration")) * pool.calibration_per_prompt
        if self.card.normaliser is None:  # the data's are scored twice: by themselves, and together with the base's
            scale = Amount(base + (0 if calibration.by_base else 2 * calibration.first().rows), base)
        else:
            lengths = calibration.by_base and not (self.card.quality and self.card.quality.short)
            scale = Amount(0, base if lengths else 0)
        return Amounts(
            objectives=len(self.names),
            prompts=len(set(self.prompts["train"])),
            train=of("train", pool.per_prompt),
            calibration=calibration,
            labelled=tuple(len(self.data_pairs(k)) if self.has_pairs(k) else 0 for k in range(len(self.names))),
            for_scale=scale,
        )

    reward_settings: ClassVar[Mapping[str, Any]] = {}
    """Settings of a reward model for this kind of task, where they differ from the defaults."""

    def pair_sets(self) -> list[PairSet]:
        """Return the labelled pairs over all splits, for reward models; RequestError where the card names none."""
        from moalign.reward_models import pairs

        given = self.card.data.pairs if self.card.data is not None else None
        if given is None:
            raise RequestError(f"task {self.card.name}: its card has no data.pairs; give files with --pairs instead")
        sources = given if isinstance(given, dict) else {self.card.name: given}
        return pairs.read(list(sources.items()), Path.cwd())

    def has_pairs(self, objective: int) -> bool:
        """Whether the task's data holds preference labels for an objective."""
        pairs = self.card.data.pairs if self.card.data is not None else None
        return isinstance(pairs, dict) and self.names[objective] in pairs

    def pairs(
        self,
        objective: int,
        source: Literal["auto", "data", "scored"] = "auto",
        per_prompt: int = 8,
        labels: Labels = "order",
        scored: Scored | None = None,
    ) -> Pairs:
        """Return the training split's preference pairs of one objective.

        Args:
            source: data: the data's own labels; scored: built by :func:`moalign.tasks.pairs.from_scores` with
                ``per_prompt`` and ``labels``; auto: the data's where it has them.
            scored: the responses to build from; None: :meth:`scored`.

        Raises RequestError when ``source`` is data and there are no labels, or there is nothing to build pairs from.
        """
        name = self.names[objective]
        if source == "data" and not self.has_pairs(objective):
            raise RequestError(
                f"pairs: data: task {self.card.name} has no preference labels for {name} (data.pairs.{name}); "
                "pairs: scored builds them from scored responses"
            )
        if source == "scored" or not self.has_pairs(objective):
            responses = self.scored() if scored is None else scored
            values = self.panel.with_normaliser(self.normaliser).z(responses.raw)
            return from_scores(responses, values, objective, self.names, per_prompt, labels, self.card.pool.seed)
        labelled = self.data_pairs(objective)
        if not labelled:
            raise RequestError(f"data.pairs.{name}: none of its prompts falls into the training split (splits)")
        return Pairs(
            objective=objective,
            prompts=[pair.prompt for pair in labelled],
            chosen=[Response(pair.chosen) for pair in labelled],
            rejected=[Response(pair.rejected) for pair in labelled],
            chance=np.ones(len(labelled)),
        )

    def _kept(self, name: str) -> Path:
        """Return where a computed part is kept: with the results, or in the user's cache where they are read-only."""
        from moalign.runs import atomic

        path = self.folder / name
        if not path.is_file() and atomic.read_only(self.folder):
            return cache_root() / "tasks" / self.folder.name / name
        return path

    @contextmanager
    def _once(self, path: Path) -> Iterator[bool]:
        """Hold the file's lock and yield whether the file is still missing: of several processes one makes it."""
        from filelock import FileLock

        from moalign.runs import atomic

        if path.is_file():
            yield False
            return
        with atomic.refusals(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(str(path) + ".lock")
            lock.acquire()
        try:
            yield not path.is_file()
        finally:
            lock.release()
