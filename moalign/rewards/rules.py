"""Rules: objectives that a few lines of code compute from the response text.

Each rule is one function ``(response, options) -> float`` with its options typed beside it; the prompt is
not looked at. ``RULES`` holds them by name. A *word* is a run of letters or digits with inner apostrophes
(``don't`` is one word); a *token* is anything between white space.

Change ``_VERSION`` when the meaning of a rule changes: it is part of every rule's revision.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from moalign.config.objectives import RuleObjective
from moalign.config.strict import Strict
from moalign.core.errors import RequestError, did_you_mean, unknown

_VERSION = "1"
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"”’']*\s+")

Unit = Literal["words", "characters", "tokens"]


@dataclass(frozen=True)
class Rule:
    """A named rule: ``function(response, options)`` with ``options`` of the type beside it."""

    name: str
    options: type[Strict]
    function: Callable[[str, Any], float]

    @property
    def summary(self) -> str:
        """The first line of the rule's docstring."""
        return (self.function.__doc__ or "").strip().splitlines()[0]


RULES: dict[str, Rule] = {}


def _rule(name: str, options: type[Strict]) -> Callable[[Callable[[str, Any], float]], Callable[[str, Any], float]]:
    def register(function: Callable[[str, Any], float]) -> Callable[[str, Any], float]:
        RULES[name] = Rule(name, options, function)
        return function

    return register


def words(text: str) -> list[str]:
    """Return the words of a text.

    >>> words("Don't stop, 2 more!")
    ["Don't", 'stop', '2', 'more']
    """
    return _WORD.findall(text)


def _size(text: str, unit: Unit) -> int:
    if unit == "characters":
        return len(text)
    return len(text.split()) if unit == "tokens" else len(words(text))


class LengthOptions(Strict):
    """Options of ``length``."""

    unit: Unit = "words"
    target: float | None = Field(default=None, ge=0)
    """Score ``-|length - target|`` instead of the length: best when the target is hit."""


@_rule("length", LengthOptions)
def length(response: str, options: LengthOptions) -> float:
    """Length in words, characters or white-space tokens; with a target minus the distance to it."""
    size = _size(response, options.unit)
    return float(size) if options.target is None else -abs(size - options.target)


class BrevityOptions(Strict):
    """Options of ``brevity``."""

    unit: Unit = "words"


@_rule("brevity", BrevityOptions)
def brevity(response: str, options: BrevityOptions) -> float:
    """Minus the length in words (or characters, or white-space tokens)."""
    return -float(_size(response, options.unit))


_STOP_TEXT = """
about above after again all also always and another any are aren't around because been before being below between
both but can can't cannot could couldn't did didn't does doesn't doing don't done down during each either else etc
even ever every few first for from further get gets getting give gives go goes going had has hasn't have haven't
having he'll he's her here hers him himself his how however i'd i'll i'm i've into isn't it'll it's its itself just
let let's like lot lots made make makes making many may maybe might more most much must myself neither never non nor
not now off often once one one's ones only other others ought our ours out over own perhaps quite rather really same
shall she she's should shouldn't since some someone something sometimes somewhat still such sure than that that's
the their theirs them themselves then there there's therefore these they they'll they're they've thing things this
those though through thus too toward towards under until upon use used uses using usually very was wasn't way ways
we'll we're we've well were weren't what what's whatever when where whether which while who who's whole whom whose
why will with within without won't would wouldn't yet you you'd you'll you're you've your yours yourself
"""
_STOP_WORDS = frozenset(_STOP_TEXT.split())
"""English function words, which carry little content."""


class DetailOptions(Strict):
    """Options of ``detail``."""

    whole_sentences: bool = False
    """Count only up to the last end of a sentence: what a limit cut off says nothing, and running on is no detail."""


def content_words(text: str) -> set[str]:
    """Return the different content words of an English text, case-folded.

    These are words of at least three letters that are no stop words, without a possessive ``'s``. Two forms of a word
    count as two, so that no dictionary is needed.

    >>> sorted(content_words("You should see the cat's 2 cats, and the CAT."))
    ['cat', 'cats', 'see']
    """
    folded = (word.casefold().replace("’", "'") for word in words(text))
    stems = (word.removesuffix("'s") for word in folded if word not in _STOP_WORDS)
    return {word for word in stems if sum(map(str.isalpha, word)) >= 3 and word not in _STOP_WORDS}


@_rule("detail", DetailOptions)
def detail(response: str, options: DetailOptions) -> float:
    """Detail: log(1 + number of different content words), so that the tenth adds less than the second.

    >>> detail("Boil the fresh egg. Then cool the", DetailOptions(whole_sentences=True)) == math.log(1 + 3)
    True

    >>> detail("Boil the egg, then peel the egg.", DetailOptions()) == math.log(1 + 3)
    True
    """
    if options.whole_sentences:
        ends = [match.end() for match in re.finditer(r"[.!?]", response)]
        response = response[: ends[-1]] if ends else ""
    return math.log1p(len(content_words(response)))


class NgramOptions(Strict):
    """Options of ``distinct-n`` and ``repetition``."""

    n: int = Field(default=2, ge=1)


def _distinct_and_total(response: str, n: int) -> tuple[int, int]:
    folded = [word.casefold() for word in words(response)]
    counts = Counter(tuple(folded[at : at + n]) for at in range(len(folded) - n + 1))
    return len(counts), counts.total()


@_rule("distinct-n", NgramOptions)
def distinct_n(response: str, options: NgramOptions) -> float:
    """Share of distinct n-grams among all n-grams of words, 0 to 1; 0 for fewer than n words."""
    distinct, total = _distinct_and_total(response, options.n)
    return distinct / total if total else 0.0


@_rule("repetition", NgramOptions)
def repetition(response: str, options: NgramOptions) -> float:
    """Share of n-grams of words that occurred before, 0 to 1 (use with ``maximise: false``)."""
    distinct, total = _distinct_and_total(response, options.n)
    return 1 - distinct / total if total else 0.0


class KeywordOptions(Strict):
    """Options of ``keyword-density``."""

    keywords: list[str] = Field(min_length=1)
    """Words or phrases; whole words only, so that ``art`` is not found in ``party``."""
    ignore_case: bool = True

    @field_validator("keywords")
    @classmethod
    def _not_blank(cls, keywords: list[str]) -> list[str]:
        if any(not keyword.strip() for keyword in keywords):
            raise ValueError("a keyword is blank")
        return keywords


@_rule("keyword-density", KeywordOptions)
def keyword_density(response: str, options: KeywordOptions) -> float:
    """Occurrences of the keywords per word of the response; 0 for a response without words."""
    # Longest first, so that "ice cream" wins over "ice" where both would match.
    ordered = sorted(set(options.keywords), key=len, reverse=True)
    pattern = r"(?<!\w)(?:" + "|".join(re.escape(keyword.strip()) for keyword in ordered) + r")(?!\w)"
    occurrences = len(re.findall(pattern, response, re.IGNORECASE if options.ignore_case else 0))
    total = len(words(response))
    return occurrences / total if total else 0.0


class DialogueOptions(Strict):
    """Options of ``dialogue-share``."""

    unit: Literal["characters", "words"] = "characters"
    """``characters`` counts all but white space and the quote marks themselves."""
    unclosed: Literal["ignore", "count"] = "ignore"
    """What to do with a quote that its line never closes."""


@_rule("dialogue-share", DialogueOptions)
def dialogue_share(response: str, options: DialogueOptions) -> float:
    """Share of the text inside double quotes (straight or curly), 0 to 1; quotes pair within a line."""
    inside, outside = [], []
    for line in response.splitlines():
        quoted, plain = _split_quotes(line, count_unclosed=options.unclosed == "count")
        inside.append(quoted)
        outside.append(plain)

    def size(parts: list[str]) -> int:
        text = " ".join(parts)
        return len(words(text)) if options.unit == "words" else sum(map(len, text.split()))

    quoted_size, plain_size = size(inside), size(outside)
    return quoted_size / (quoted_size + plain_size) if quoted_size + plain_size else 0.0


def _split_quotes(line: str, count_unclosed: bool) -> tuple[str, str]:
    """Return the text inside and outside of double quotes; quote marks belong to neither."""
    quoted: list[str] = []
    plain: list[str] = []
    current: list[str] = []
    opened = False
    for character in line:
        if character == '"' or character == ("”" if opened else "“"):
            (quoted if opened else plain).append("".join(current))
            current, opened = [], not opened
        elif character not in "“”":
            current.append(character)
    (quoted if opened and count_unclosed else plain).append("".join(current))
    return " ".join(quoted), " ".join(plain)


class EndingOptions(Strict):
    """Options of ``ends-with``."""

    endings: list[str] = Field(default=[".", "!", "?"], min_length=1)
    ignore_quotes: bool = True
    """Look behind closing quotes and brackets, so that ``He said "yes."`` ends with a full stop."""

    @field_validator("endings")
    @classmethod
    def _not_empty(cls, endings: list[str]) -> list[str]:
        if "" in endings:
            raise ValueError("an ending is empty: every text ends with it")
        return endings


@_rule("ends-with", EndingOptions)
def ends_with(response: str, options: EndingOptions) -> float:
    """1 when the text, without trailing white space, ends with one of the endings, else 0."""
    text = response.rstrip()
    bare = text.rstrip("\"'”’)]} \t\r\n") if options.ignore_quotes else text
    return float(text.endswith(tuple(options.endings)) or bare.endswith(tuple(options.endings)))


class RegexOptions(Strict):
    """Options of ``regex-count``."""

    pattern: str = Field(min_length=1)
    ignore_case: bool = False
    per_word: bool = False
    """Divide by the number of words."""

    @field_validator("pattern")
    @classmethod
    def _usable(cls, pattern: str) -> str:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if compiled.search(""):
            raise ValueError("the pattern matches the empty text, so that every position would count")
        return pattern


@_rule("regex-count", RegexOptions)
def regex_count(response: str, options: RegexOptions) -> float:
    """Number of non-overlapping matches of a pattern (Python syntax), or matches per word."""
    flags = re.IGNORECASE if options.ignore_case else 0
    matches = sum(1 for _ in re.finditer(options.pattern, response, flags))
    if not options.per_word:
        return float(matches)
    total = len(words(response))
    return matches / total if total else 0.0


class VaderOptions(Strict):
    """Options of ``vader``."""

    unit: Literal["text", "sentence"] = "text"
    """``sentence``: the mean over sentences; the compound of a long text saturates near -1 and 1."""


@_rule("vader", VaderOptions)
def vader(response: str, options: VaderOptions) -> float:
    """Positivity: the compound score of vaderSentiment, -1 to 1 (Hutto and Gilbert, ICWSM 2014)."""
    analyser = _vader_analyser()
    parts = [response] if options.unit == "text" else [p for p in _SENTENCE_END.split(response) if p.strip()]
    if not parts:
        return 0.0
    return sum(float(analyser.polarity_scores(part)["compound"]) for part in parts) / len(parts)


_analyser: Any = None


def _vader_analyser() -> Any:
    """Return the analyser, read once: its lexicon takes a tenth of a second."""
    global _analyser
    if _analyser is None:
        try:
            library = importlib.import_module("vaderSentiment.vaderSentiment")
        except ImportError as error:
            raise RequestError(
                f"rule 'vader' needs the vaderSentiment library ({error}); install it with: pip install moalign[text]"
            ) from None
        _analyser = library.SentimentIntensityAnalyzer()
    return _analyser


def read_options(rule: str, options: dict[str, Any], where: str) -> Strict:
    """Return the typed options of a rule.

    Args:
        rule: a name in ``RULES``.
        options: as given in the task card.
        where: how messages name the place, e.g. ``objective 'humor'``.

    Raises:
        RequestError: unknown rule, or every unknown or wrong option at once.
    """
    if rule not in RULES:
        raise unknown("rule", rule, list(RULES), where)
    model = RULES[rule].options
    try:
        return model.model_validate(options)
    except ValidationError as error:
        raise RequestError(*(_problem(dict(e), model, f"{where}: rule {rule!r}") for e in error.errors())) from None


def _problem(error: dict[str, Any], model: type[Strict], where: str) -> str:
    key = ".".join(str(part) for part in error["loc"])
    allowed = sorted(model.model_fields)
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown option {key!r}; allowed: {', '.join(allowed) or 'none'}{did_you_mean(key, allowed)}"
    if error["type"] == "missing":
        return f"{where}: option {key!r} is needed"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: option {key!r}: found {error['input']!r}; {message}"


class RuleScorer:
    """An objective scored by a rule; cheap, so that it is kept out of the store unless the card asks."""

    def __init__(self, spec: RuleObjective) -> None:
        """Read the rule's options; raises RequestError naming the objective."""
        self.name = spec.name
        self.maximise = spec.maximise
        self.cheap = not spec.store
        self.options = read_options(spec.rule, spec.options, f"objective {spec.name!r}")
        self.rule = RULES[spec.rule]
        if spec.rule == "vader":
            _vader_analyser()  # report a missing library now, not after the base has been sampled
        settings = json.dumps([_VERSION, self.options.model_dump(mode="json")], sort_keys=True)
        self.revision = f"rule:{spec.rule}:{hashlib.sha256(settings.encode()).hexdigest()[:16]}"

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return the rule's value of each response, ``[samples]``; prompts are not looked at."""
        return [self.rule.function(response, self.options) for response in responses]
