"""How a task card names an objective: one typed section per kind of scorer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from moalign.config.strict import Strict
from moalign.core.preferences import words_in


class _Objective(Strict):
    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")
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


class ClassifierObjective(Aggregation, _Objective):
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
        same = self.model, self.revision, self.dtype
        return *same, self.template, self.pair_template, self.max_length, self.batch_tokens


class LmObjective(_Objective):
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
        return self.model, self.revision, self.dtype


ModelObjective = ClassifierObjective | LmObjective
"""Objectives that a model scores."""


class SandboxObjective(_Objective):
    """An exact scorer of the built-in sandbox; the name is one of its three objectives."""

    kind: Literal["sandbox"]


ObjectiveSpec = Annotated[
    PythonObjective | RuleObjective | ClassifierObjective | LmObjective | SandboxObjective, Field(discriminator="kind")
]
