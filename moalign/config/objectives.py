"""How a task card names an objective: one typed section per kind of scorer."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator, model_validator

from moalign.config.strict import RECORDED, Strict
from moalign.core.preferences import words_in


class _Objective(Strict):
    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", max_length=100)
    """Also that of its column in tables: none that they have for other things (:func:`moalign.config.card.taken`)."""
    maximise: bool = True
    """False: smaller scores are better; the reward layer turns the sign, so that larger is better everywhere."""
    called: tuple[str, ...] = ()
    """Words by which a preference in text names it, beside its name (``--prefs-text "helpful and funny"``)."""
    store: bool | None = None
    """Keep scores in the sqlite store. None: yes for models and python scorers, no for rules (a rule is
    faster than a look-up)."""

    @field_validator("called")
    @classmethod
    def _has_words(cls, called: tuple[str, ...]) -> tuple[str, ...]:
        for word in called:
            if not words_in(word):
                raise ValueError(f"found {word!r}; allowed: words with a letter or a digit")
        return called


class PythonObjective(_Objective):
    """A Python callable: ``f(prompts: list[str], responses: list[str]) -> sequence of float``."""

    kind: Literal["python"]
    function: str
    """A file and what it defines (``scorers.py:brevity``, relative to the card), a dotted path
    ``package.module:callable``, or the name of an entry point in ``moalign.rewards``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments given to the callable at each call."""
    revision: str = "1"
    """Change it when something that the function reads changes: it is part of the store's key, as the source is."""


class RuleObjective(_Objective):
    """A rule on the response text; :mod:`moalign.rewards.rules` lists the rules and their options."""

    kind: Literal["rule"]
    rule: str
    options: dict[str, Any] = Field(default_factory=dict)


class Aggregation(Strict):
    """How the members of an ensemble of reward models become one score; see :mod:`moalign.rewards.ensemble`."""

    pessimism: float = Field(default=0.0, ge=0)
    """How much members' disagreement costs: k in mean - k x spread."""
    aggregate: Literal["mean", "worst", "variance"] = "mean"
    """mean: mean - pessimism x sd over members; variance: mean - pessimism x variance; worst: the smallest member."""

    def aggregation_problem(self, several: bool) -> str | None:
        """Return what is wrong with these settings for a model that has members (``several``) or has none."""
        if not several:
            for key in ("pessimism", "aggregate"):
                if (value := getattr(self, key)) != type(self).model_fields[key].default:
                    return f"{key} is for a model with members; found {key}: {value} without them"
        if self.aggregate == "worst" and self.pessimism:
            return f"aggregate: worst takes no pessimism; found {self.pessimism:g}"
        return None


class Quantised(Strict):
    """How few bits the linear layers of a scoring model have, but for a classifier's head; by bitsandbytes, computed
    with in ``dtype``. Scores are another model's, so both are part of what identifies them."""

    load_in_4bit: bool = False
    """NF4 with double quantisation."""
    load_in_8bit: bool = False
    """LLM.int8(): rows of 8-bit numbers, outliers apart; its layers compute in float16 whatever ``dtype``."""

    @model_validator(mode="after")
    def _in_one_of_them(self) -> Quantised:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both true; set one of them")
        return self

    @property
    def bits(self) -> Literal[4, 8] | None:
        """Bits of a number in a linear layer; None: as many as ``dtype`` has."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None


class ClassifierObjective(Quantised, Aggregation, _Objective):
    """Any ``AutoModelForSequenceClassification`` folder or hub id."""

    kind: Literal["hf-classifier"]
    model: str
    revision: str | None = None
    label: int | str | None = None
    """Label index or label name whose logit is the score; None: the single output of a regression head."""
    members: Literal["all"] | list[int | str] | None = None
    """The members of an ensemble (``moalign reward train --members``), or labels of one model that are taken for
    members: their names or numbers, or all. The score is in units of members' sd. Null: one label is the score (of an
    ensemble that of its first member)."""
    output: Literal["logit", "probability"] = "logit"
    template: str = "{prompt}{response}"
    """The text that the model reads; ``{prompt}`` and ``{response}`` are replaced."""
    pair_template: str | None = None
    """Second text for models that read a pair (tokenizer called with two texts)."""
    max_length: int = Field(default=512, ge=8)
    batch_tokens: int = Field(default=16384, ge=64)
    """Upper bound of rows x longest row in one forward pass."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _of_members(self) -> ClassifierObjective:
        problem = self.aggregation_problem(self.members is not None)
        if self.members is not None and self.output == "probability":
            problem = "members are put together by their logits; found output: probability"
        if problem is not None:
            raise ValueError(problem)
        return self

    @property
    def reading(self) -> tuple[object, ...]:
        """All that determines what the model reads and answers: objectives that agree in it are labels of one model."""
        same = self.model, self.revision, self.dtype, self.bits
        return *same, self.template, self.pair_template, self.max_length, self.batch_tokens


class LmObjective(Quantised, _Objective):
    """Mean log-likelihood under a frozen causal language model, in nats per token; see
    :mod:`moalign.rewards.lm_scorer`."""

    kind: Literal["lm"]
    model: str
    """A folder, a hub id, or a built-in name such as ``smollm2-135m-instruct``."""
    revision: str | None = None
    score: Literal["fluency", "relevance"]
    """fluency: of the response's tokens after the prompt. relevance: of the prompt's tokens after the response, less
    the same without the response; 0 where the response says nothing about the prompt."""
    template: Literal["chat", "plain"] | None = None
    """Texts in the model's chat template, or as they are. Null: the chat template where the model has one."""
    max_length: int = Field(default=512, ge=16)
    """Most tokens of a text with what it follows."""
    batch_tokens: int = Field(default=4096, ge=64)
    """Upper bound of rows x longest row in one forward pass."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @property
    def reading(self) -> tuple[object, ...]:
        """What identifies a loaded model: objectives that agree in it share one."""
        return self.model, self.revision, self.dtype, self.bits


ModelObjective = ClassifierObjective | LmObjective
"""Objectives that a model scores."""


class JudgeObjective(_Objective):
    """The verdict of a language model behind an OpenAI-compatible endpoint; see :mod:`moalign.rewards.judge`."""

    NOT_HASHED: ClassVar[tuple[str, ...]] = ("api_key_env", "timeout", "max_retries", "concurrency", "unreadable")
    """Settings that change no verdict."""

    kind: Literal["judge"]
    base_url: str
    """Where the endpoint is, such as ``http://localhost:8000/v1``; ``/chat/completions`` is added to it."""
    model: str = Field(min_length=1)
    """The name by which the endpoint knows its model."""
    api_key_env: str | None = None
    """The environment variable that holds the key; null: no key is sent."""
    template: str = Field(min_length=1)
    """A text file (relative to the card): what the judge is asked, with ``{prompt}`` and ``{response}``."""
    field: str | None = Field(default=None, min_length=1)
    """The key of the JSON object in the verdict that holds the score; ``a.b`` is key b of the section a."""
    pattern: str | None = Field(default=None, min_length=1)
    """A regular expression with one group, which matches the score; of several matches the last one counts."""
    range: tuple[float, float]
    """Smallest and largest score that the template asks for; a verdict beyond them cannot be read."""
    unreadable: Literal["raise", "leave-out"] = "raise"
    """What a verdict without a score does: end the command, or be left out of every mean and counted."""
    temperature: float | None = Field(default=0.0, ge=0)
    """Null: the endpoint's own."""
    max_tokens: int = Field(default=256, ge=1)
    """Of a verdict; the score of one that is cut off inside it is not read."""
    seed: int | None = Field(default=0, ge=0)
    """Null: none is sent."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds without a byte from the endpoint after which a request has failed."""
    max_retries: int = Field(default=5, ge=0, le=100)
    """Further tries, after pauses that double, where the endpoint is busy, fails or cannot be reached."""
    concurrency: int = Field(default=8, ge=1, le=512)
    """Requests on their way at a time, per process."""

    @field_validator("base_url")
    @classmethod
    def _is_endpoint(cls, url: str) -> str:
        example = "an address such as http://localhost:8000/v1"
        if re.search("[@?#]", url):  # not repeated here: a key may be in it
            raise ValueError(f"found more than an address; allowed: {example}; a key comes by api_key_env")
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            raise ValueError(f"found {url!r}; allowed: {example}") from None
        if parts.scheme not in ("http", "https") or not host or re.search(r"\s", url):
            near = re.sub(r"^(https?:?)?/*", "", url)
            hint = f"; did you mean 'http://{near}'?" if near and not re.search(r"\s|:/", near) else ""
            raise ValueError(f"found {url!r}; allowed: {example}{hint}")
        return url.rstrip("/").removesuffix("/chat/completions")

    @field_validator("api_key_env")
    @classmethod
    def _names_a_variable(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):  # not repeated here: it may be the key
            raise ValueError(
                "found something else than a variable's name; allowed: the name (capitals, digits and _) of an "
                "environment variable that holds the key, such as OPENAI_API_KEY; never the key itself"
            )
        return name

    @field_validator("pattern")
    @classmethod
    def _has_one_group(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise ValueError(f"found {pattern!r}, which is no regular expression: {error}") from None
            if groups != 1:
                raise ValueError(f"found {pattern!r} with {groups} groups; needed: one, around the score")
        return pattern

    @model_validator(mode="after")
    def _readable(self) -> JudgeObjective:
        if (self.field is None) == (self.pattern is None):
            raise ValueError("field: one of field and pattern is needed, as either says where the score stands")
        if self.range[0] >= self.range[1]:
            raise ValueError(f"range: found {list(self.range)}; needed: the smallest score, then the largest")
        return self


SANDBOX = ("helpfulness", "harmlessness", "humor", "brevity", "warmth")
"""The objectives of the built-in sandbox."""
TASTED = SANDBOX[:3]
"""Those that its annotators look at."""


class SandboxObjective(_Objective):
    """An exact scorer of the built-in sandbox; the name is one of its five objectives (:data:`SANDBOX`)."""

    kind: Literal["sandbox"]

    @field_validator("maximise")
    @classmethod
    def _upwards(cls, maximise: bool, info: ValidationInfo) -> bool:
        if not maximise and info.context != RECORDED:
            raise ValueError("found false; allowed: true, since the sandbox's optimum is the most of each objective")
        return maximise


ObjectiveSpec = Annotated[
    PythonObjective | RuleObjective | ClassifierObjective | LmObjective | JudgeObjective | SandboxObjective,
    Field(discriminator="kind"),
]
