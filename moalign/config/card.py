"""The task card: everything that two runs must share to be comparable, typed and hashed.

A card is frozen: :meth:`TaskCard.hash` covers all that changes a score (objectives, data, splits,
model, generation, reference point, normaliser, evaluation); ``compare`` refuses to mix hashes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from moalign.config.objectives import SANDBOX, TASTED, Aggregation, JudgeObjective, ObjectiveSpec
from moalign.config.strict import RECORDED, Strict
from moalign.core.errors import RequestError, did_you_mean, unknown
from moalign.core.preferences import MOST_OBJECTIVES, require_grid

DEFAULTS_VERSION = 1
"""Part of every hash, which leaves out settings at their default: whoever changes a default here or in
:mod:`moalign.config.objectives` raises it, or cards of before and after would count as the same task."""

_NOT_HASHED = {"description", "suite", "quick_suite", "recipes_from", "published"}
"""Keys that change no score; nor do ``called`` of the objectives and of the gold ones, and how a judge is reached."""

COLUMNS = {"prompt", "preference", "response", "ids", "finished", "chosen", "rejected", "nondominated", "kl"}
"""Columns that tables of answers, scores and points, and files of data, have beside those of the objectives."""
DERIVED = ("_normalised", "_low", "_high", "_raw")
"""What ends the names of further columns of an objective in such tables."""

_ANYTHING = {("objectives", "options"), ("gold_objectives", "options"), ("template", "chat_kwargs")}
"""Sections with whatever a scorer or a chat template is given: their ``path`` or ``model`` is none of the card's."""


class SourceSpec(Strict):
    """Where records come from: a local file (JSONL, CSV, Parquet; also .gz) or a hub dataset."""

    path: str
    """A file, or a hub dataset id when no such file exists. Relative paths are relative to the card."""
    split: str = "train"
    revision: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    """Our field name -> the column's name in the source, e.g. {prompt: question}."""
    limit: int | None = Field(default=None, ge=1)


class SplitSpec(Strict):
    """Fixed splits by a hash of the prompt: shares of the prompts, summing to 1."""

    train: float = Field(default=0.8, gt=0, lt=1)
    calibration: float = Field(default=0.1, gt=0, lt=1)
    eval: float = Field(default=0.1, gt=0, lt=1)
    salt: str = "moalign"

    @model_validator(mode="after")
    def _sum_to_one(self) -> SplitSpec:
        total = self.train + self.calibration + self.eval
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + calibration + eval must be 1; found {total:g}")
        return self


class DataSpec(Strict):
    """The records of a task. ``prompts`` may be listed in the card itself, generated or read from a source."""

    prompts: list[str] | SourceSpec | None = None
    prompt_grammar: dict[str, list[str]] | None = None
    """Prompts generated as every combination of the named parts: key ``template`` holds texts with
    ``{part}`` fields, every other key the values of a part."""
    responses: SourceSpec | None = None
    """Logged responses: fields prompt and response; the task's scorers score them, other columns are not read."""
    pairs: SourceSpec | dict[str, SourceSpec] | None = None
    """Preference pairs: fields prompt, chosen, rejected (or whole dialogues). By objective, as a pair is labelled for
    one: ``{harmlessness: {path: safer.jsonl}}``; a single source has no objective and trains no policy."""


class PoolSpec(Strict):
    """Responses sampled from the base: for the calibration split always, for training where data has none."""

    prompts: int = Field(default=256, ge=1)
    per_prompt: int = Field(default=8, ge=1)
    calibration_per_prompt: int = Field(default=4, ge=1)
    temperature: float | None = Field(default=None, gt=0)
    """Null: that of ``generation``, or 1 where that is greedy."""
    seed: int = Field(default=0, ge=0)


class NormaliserSpec(Strict):
    """Frozen numbers for one objective; a card without them has them fitted on the calibration split."""

    mean: float
    sd: float = Field(gt=0)
    lo: float
    hi: float


class PublishedSpec(Strict):
    """What a paper says of one objective's raw scores (direction applied): a check of our own numbers, never used."""

    mean: float
    sd: float = Field(gt=0)


class WordsSpec(Strict):
    """The phrase for one range of an objective's weight, for a model that follows instructions."""

    up_to: float = Field(gt=0, le=1)
    """The phrase is for weights up to this one and above the phrase before; the last of an objective has 1."""
    text: str
    """May be empty: nothing is said of the objective in this range."""


class TemplateSpec(Strict):
    """How texts are put together for the policy. Reward models always see the bare prompt."""

    preference: str = "[{preference}] {prompt}"
    """A prompt with its preference in text; must hold both fields."""
    words: dict[str, list[WordsSpec]] | None = None
    """Preferences in words: objective -> phrases by weight. ``{preference}`` becomes the phrases of all objectives, in
    the order in which they stand here, instead of names and numbers."""
    plain: str = "{prompt}"
    """A prompt without preference."""
    scores: str = "{prompt} {scores}"
    """A prompt with desired rewards (RiC); ``{scores}`` becomes ``<rm1_score> 1.2 <rm2_score> -0.3``."""
    marker: str = ""
    """Response marker, appended to every prompt."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """A response is cut at the first of these (for example the next turn marker); special tokens end it while it is
    sampled, as do the tokenizer's end token, those of the generation config and the chat template's turn end."""
    end: str | None = None
    """What ends a response in supervised training; None: what the chat template writes behind an assistant's turn, or
    the tokenizer's end token. A base that never learnt its end token needs one of ``stop`` here: raising a token that
    it has never seen raises its unused neighbours, too."""
    system: str | None = None
    chat: bool = False
    """Use the tokenizer's chat template: the rendered prompt becomes the user turn."""
    chat_kwargs: dict[str, Any] | None = None
    """What else the chat template is given, such as ``{enable_thinking: false}``."""
    date: str | None = Field(default=None, pattern=r"^\d{4}-\d{2}-\d{2}$")
    """The day that chat templates which print the date take for today; null: 2024-07-26, so that texts never depend on
    the day of the run."""

    @field_validator("preference", "plain", "scores")
    @classmethod
    def _its_fields(cls, value: str, info: ValidationInfo) -> str:
        needed = ["{prompt}"] + [f"{{{name}}}" for name in ("preference", "scores") if name == info.field_name]
        fields = re.findall(r"{\w+}", value)
        wrong = [f"no {name}" for name in needed if name not in fields]
        wrong += [f"{name}, which nothing fills" for name in dict.fromkeys(fields) if name not in needed]
        if wrong:
            raise ValueError(
                f"found {value!r} ({', '.join(wrong)}); needed: {' and '.join(needed)}, and no other field"
            )
        return value


class GenerationSpec(Strict):
    """Limits of a response, the same for every method at evaluation."""

    max_prompt_tokens: int = Field(default=512, ge=4)
    max_new_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    batch_size: int = Field(default=256, ge=1)

    @property
    def max_tokens(self) -> int:
        """Most tokens of a prompt and a response together."""
        return self.max_prompt_tokens + self.max_new_tokens


class EvaluationSpec(Strict):
    """The judge's protocol."""

    prompts: int = Field(default=128, ge=2)
    samples: int = Field(default=1, ge=1)
    seed: int = Field(default=1234, ge=0)
    bootstrap: int = Field(default=1000, ge=100)


class QualitySpec(Strict):
    """What counts as collapsed text: see :mod:`moalign.lm.quality`."""

    short: int | None = Field(default=None, ge=1)
    """A response of fewer tokens is short (1: only an empty one); null: from the lengths of the calibration split's own
    responses, of which 1 % may be short, and never above 5."""


class AnnotatorSpec(Strict):
    """The sandbox's annotators: see :mod:`moalign.tasks.sandbox.annotators`."""

    groups: Literal["specialists", "diverse", "alike"] = "specialists"
    """specialists: one group per objective of the task; diverse: five that disagree; alike: five with one taste."""
    pairs: int = Field(default=3000, ge=10)
    """Labelled pairs of each group, over all splits."""
    users: int | None = Field(default=None, ge=1)
    """How many of each group label its pairs, in equal parts, for methods that learn from users; null: one."""
    sharpness: float = Field(default=1.0, ge=0)
    """How sure the annotators are of what they like; 0 tosses a coin."""
    seed: int = Field(default=0, ge=0)
    flipped: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the labels, of all splits, that are turned round at random. The true probabilities stay those of what
    annotators like: a flipped label is a mistake, and no reward model should learn it."""


class RewardModelSpec(Aggregation):
    """What the sandbox's rewards are learned with; see :mod:`moalign.tasks.sandbox.learned`."""

    members: int = Field(default=1, ge=1)
    """More than 1: an ensemble."""
    seed: int | None = Field(default=None, ge=0)
    """Null: the annotators'."""
    steps: int | None = Field(default=None, ge=1)
    """Null: as many passes over the pairs, however many there are."""

    @model_validator(mode="after")
    def _of_members(self) -> RewardModelSpec:
        if problem := self.aggregation_problem(self.members > 1):
            raise ValueError(problem)
        return self


class SandboxSpec(Strict):
    """The built-in task: see :mod:`moalign.tasks.sandbox`."""

    base: Literal["warm", "cold"] = "warm"
    seed: int = Field(default=0, ge=0)
    annotators: AnnotatorSpec | None = None
    """Who labels the pairs that reward models are trained on; null: the defaults."""
    reward_model: RewardModelSpec = RewardModelSpec()
    """For ``rewards: learned``."""


class TaskCard(Strict):
    """A frozen task card."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)
    kind: Literal["sandbox", "text"]
    description: str
    objectives: list[ObjectiveSpec] = Field(min_length=2, max_length=MOST_OBJECTIVES)
    gold_objectives: list[ObjectiveSpec] | None = None
    """Scorers that only the judge uses, each under the name of an objective; those that it doesn't name are judged by
    their own. Methods are trained on ``objectives`` (believed rewards) and evaluated by these (true ones), on a scale
    of their own that is fitted on the calibration split; reports show both."""
    model: str | None = None
    """Policy: a model folder or hub id. Null: the sandbox's built-in base; needed for text tasks."""
    model_revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    load_in_4bit: bool = False
    """The base's linear layers in 4 bits (NF4 with double quantisation, by bitsandbytes), computed with in ``dtype``;
    embeddings, norms and output layer stay in ``dtype``, adapters in single precision. It is another base: samples,
    scale and KL are its own."""
    sandbox: SandboxSpec | None = None
    rewards: Literal["exact", "learned"] | None = None
    """learned (sandbox only): methods see reward models trained on the annotators' pairs, the judge sees the truth.
    Null and ``exact`` are the same: every objective is scored as it says."""
    data: DataSpec | None = None
    splits: SplitSpec = SplitSpec()
    pool: PoolSpec = PoolSpec()
    normaliser: dict[str, NormaliserSpec] | None = None
    published: dict[str, PublishedSpec] = Field(default_factory=dict)
    """Statistics that a paper reports, by objective; ``moalign check`` tells how far the fitted ones are from them."""
    reference_point: list[float]
    """In normalised units (0 = the 1 % quantile of base and data responses)."""
    sensitivity_point: list[float]
    grid: int = Field(default=11, ge=2)
    """Number of evaluation preferences (a Das-Dennis grid; with four and more objectives any number)."""
    template: TemplateSpec = TemplateSpec()
    overlong: Literal["cut", "drop"] | None = None
    """Prompts that do not fit ``generation.max_prompt_tokens``. cut (null): the text in the place of ``{prompt}`` loses
    its beginning, everything around it stays whole; drop: such prompts are left out of every split."""
    generation: GenerationSpec = GenerationSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    quality: QualitySpec | None = None
    """What counts as collapsed text; null: derived from the task's own responses."""
    suite: list[str] = Field(default_factory=list)
    """Methods that ``moalign compare`` trains when none are named."""
    quick_suite: list[str] = Field(default_factory=list)
    """Those of them, or others, that ``moalign compare --suite quick`` trains: an answer in minutes."""
    recipes_from: str | None = None
    """A task whose recipes serve this one for every method that has none here."""

    @field_validator("rewards", "overlong", "quality", "gold_objectives")
    @classmethod
    def _null_where_it_means_the_same(cls, value: Any) -> Any:
        return None if value in ("exact", "cut", QualitySpec(), []) else value  # one form, so that both have one hash

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> TaskCard:
        newer = () if info.context == RECORDED else self._newer_rules()
        problem = next(itertools.chain(self._wrong_names(), self._wrong_sections(), newer), None)
        if problem is not None:
            raise ValueError(problem)
        return self

    def _wrong_names(self) -> Iterator[str]:
        names = self.objective_names
        listed = ", ".join(names)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            yield f"objective names must differ; found twice: {', '.join(twice)}"
        for name, problem in taken(names).items():
            yield f"objectives.{names.index(name)}.name: {problem}"
        gold = [spec.name for spec in self.gold_objectives or ()]
        for index, name in enumerate(gold):
            if name not in names:
                hint = did_you_mean(name, names)
                yield f"gold_objectives.{index}.name: {name!r} is no objective; allowed: {listed}{hint}"
            if name in gold[:index]:
                yield f"gold_objectives.{index}.name: found {name!r} twice; allowed: each objective once"
        pairs = self.data.pairs if self.data is not None and isinstance(self.data.pairs, dict) else {}
        for section, entries in (("template.words", self.template.words or {}), ("data.pairs", pairs)):
            for name in entries:
                if name not in names:
                    yield f"{section}: {name!r} is no objective; allowed: {listed}{did_you_mean(name, names)}"
        for field in ("reference_point", "sensitivity_point"):
            if len(getattr(self, field)) != len(names):
                yield f"{field} needs one number per objective ({len(names)}); found {len(getattr(self, field))}"
        if self.normaliser is not None and sorted(self.normaliser) != sorted(names):
            yield f"normaliser must name every objective ({listed}); found {', '.join(self.normaliser)}"
        if stray := [name for name in self.published if name not in names]:
            yield f"published names no objective ({listed}): {', '.join(stray)}"

    def _newer_rules(self) -> Iterator[str]:
        """What a new run is refused, and the record of an older one may hold."""
        if self.kind == "sandbox" and self.data is not None:
            yield "data is for kind: text; the sandbox's prompts, responses and pairs are its own"
        if self.kind == "text" and self.sandbox is not None:
            yield "sandbox is for kind: sandbox"
        try:
            require_grid(len(self.objectives), self.grid, "grid")
        except RequestError as error:
            yield str(error)

    def _wrong_sections(self) -> Iterator[str]:
        for name, phrases in (self.template.words or {}).items():
            limits = [phrase.up_to for phrase in phrases]
            if not limits or limits != sorted(set(limits)) or limits[-1] != 1:
                listed = ", ".join(map(str, limits)) or "none"
                yield f"template.words.{name}: up_to must rise and end with 1; found {listed}"
        end = self.template.end
        if end is not None and end not in self.template.stop:
            yield f"template.end must be one of template.stop, or answers would not stop there; found {end!r}"
        if self.kind == "sandbox" and self.sandbox is None:
            yield "kind: sandbox needs a section sandbox"
        if self.built_in_base:  # it is trained on what these say, and its optimum is theirs
            for name in self.objective_names:
                if name not in SANDBOX:
                    yield str(unknown("objective", name, SANDBOX, "kind: sandbox without a model of its own"))
        if self.rewards is None and self.sandbox is not None and self.sandbox.reward_model != RewardModelSpec():
            yield "sandbox.reward_model is for rewards: learned; found rewards: exact"
        if self.rewards is not None:
            if self.sandbox is None:
                yield "rewards: learned is for the sandbox, whose truth is known; name reward models instead"
            elif self.sandbox.annotators is not None and self.sandbox.annotators.groups != "specialists":
                groups = self.sandbox.annotators.groups
                yield f"rewards: learned needs annotators of each objective (specialists); found {groups!r}"
            for spec in self.objectives:
                if spec.kind != "sandbox":
                    yield f"rewards: learned needs objectives of kind sandbox; found {spec.name} of kind {spec.kind}"
                elif spec.name in SANDBOX and spec.name not in TASTED:
                    yield (
                        f"rewards: learned needs objectives that the annotators look at; found {spec.name!r}; allowed: "
                        + ", ".join(TASTED)
                    )
            if self.gold_objectives:
                yield "gold_objectives: rewards: learned is judged by the sandbox's own truth; leave one of the two out"
        given = self.data and (self.data.prompts, self.data.prompt_grammar) != (None, None)
        if self.kind == "text" and not given:
            yield "kind: text needs data.prompts or data.prompt_grammar"

    @property
    def objective_names(self) -> list[str]:
        """The objectives' names in the task's order."""
        return [objective.name for objective in self.objectives]

    @property
    def objective_words(self) -> dict[str, tuple[str, ...]]:
        """By what a text names each objective: its name, and the card's own words."""
        return {objective.name: (objective.name, *objective.called) for objective in self.objectives}

    @property
    def built_in_base(self) -> bool:
        """Whether the task brings its own tiny base, trained on first use."""
        return self.kind == "sandbox" and self.model is None

    def hash(self, **identity: Any) -> str:
        """Return 16 hex digits over everything that changes a score.

        ``identity`` adds what the card only points to (fingerprints of the model folder and of data files), so that
        moving a folder keeps the hash and changing a weight changes it. Settings at their default are left out, so
        that one added in a later version keeps the hashes of cards without it.
        """
        left_out = _NOT_HASHED | ({"model"} if identity else set())
        card = _without_folders(self.model_dump(mode="json", exclude=left_out, exclude_defaults=True))
        if self.template.words:
            card["template"]["words"] = list(card["template"]["words"].items())  # their order is that of the prompts
        for objective in [*card["objectives"], *card.get("gold_objectives", ())]:
            objective.pop("called", None)
            if objective["kind"] == "judge":
                for key in JudgeObjective.NOT_HASHED:
                    objective.pop(key, None)
                objective["template"] = PurePath(objective["template"]).name
        text = json.dumps([DEFAULTS_VERSION, card, identity], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def taken(names: Sequence[str]) -> dict[str, str]:
    """Return what is wrong with those of a task's objective names that tables use for another column.

    >>> list(taken(["humor", "prompt", "humor_raw"]))
    ['prompt', 'humor_raw']
    """
    made = {f"{name}{end}": f", made for {name}" for name in names for end in DERIVED}
    owners = made | dict.fromkeys(COLUMNS, "")
    return {
        name: f"found {name!r}; tables of answers and scores have a column of that name{owners[name]}; choose another"
        for name in names
        if name in owners
    }


def _without_folders(node: Any, place: tuple[str, ...] = ()) -> Any:
    """Return the card with every absolute path cut to its last part: a moved file is the same file."""
    if place in _ANYTHING:
        return node
    if isinstance(node, dict):
        return {
            key: PurePath(value).name
            if key in {"path", "model", "function"} and isinstance(value, str) and PurePath(value).is_absolute()
            else _without_folders(value, (*place, key))
            for key, value in node.items()
        }
    return [_without_folders(item, place) for item in node] if isinstance(node, list) else node
