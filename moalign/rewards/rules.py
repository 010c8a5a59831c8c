"""Rules: objectives that a few lines of code compute from the response text.

Each rule is one function ``(response, **options) -> float``; the prompt is not looked at. Its signature says which
options there are, of what type, and which values are allowed. ``RULES`` holds the rules by name. A *word* is a run of
letters or digits with inner apostrophes (``don't`` is one word); a *token* is anything between white space.

Change ``_VERSION`` when the meaning of a rule changes: it is part of every rule's revision.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, create_model

from moalign.config.objectives import RuleObjective
from moalign.config.strict import Strict
from moalign.core.errors import RequestError, did_you_mean, unknown
from moalign.rewards.scorer import digest

_VERSION = "1"
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"”’']*\s+")
_ENDINGS = [".", "!", "?"]

Unit = Literal["words", "characters", "tokens"]
_Function = TypeVar("_Function", bound=Callable[..., float])


@dataclass(frozen=True)
class Rule:
    """A named rule: ``function(response, **options)`` with ``options`` as validated by the type beside it."""

    options: type[Strict]
    function: Callable[..., float]

    @property
    def summary(self) -> str:
        """The first line of the rule's docstring."""
        return (self.function.__doc__ or "").strip().splitlines()[0]


RULES: dict[str, Rule] = {}


def _rule(name: str) -> Callable[[_Function], _Function]:
    """Enter a function in ``RULES``; its parameters after the response are the rule's options."""

    def register(function: _Function) -> _Function:
        parameters = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        fields: dict[str, Any] = {
            option.name: (option.annotation, ... if option.default is inspect.Parameter.empty else option.default)
            for option in parameters
        }
        RULES[name] = Rule(create_model(name, __base__=Strict, **fields), function)
        return function

    return register


def _keywords(keywords: list[str]) -> list[str]:
    if any(not keyword.strip() for keyword in keywords):
        raise ValueError("a keyword is blank")
    return keywords


def _endings(endings: list[str]) -> list[str]:
    if "" in endings:
        raise ValueError("an ending is empty: every text ends with it")
    return endings


def _pattern(pattern: str) -> str:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    if compiled.search(""):
        raise ValueError("the pattern matches the empty text, so that every position would count")
    return pattern


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


@_rule("length")
def length(response: str, unit: Unit = "words", target: Annotated[float | None, Field(ge=0)] = None) -> float:
    """Length in words, characters or white-space tokens; with a target minus the distance to it."""
    size = _size(response, unit)
    return float(size) if target is None else -abs(size - target)


@_rule("brevity")
def brevity(response: str, unit: Unit = "words") -> float:
    """Minus the length in words (or characters, or white-space tokens)."""
    return -float(_size(response, unit))


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


@_rule("detail")
def detail(response: str, whole_sentences: bool = False) -> float:
    """Detail: log(1 + number of different content words), so that the tenth adds less than the second.

    ``whole_sentences`` counts only up to the last end of a sentence: what a limit cut off says nothing, and running on
    is no detail.

    >>> detail("Boil the fresh egg. Then cool the", whole_sentences=True) == math.log(1 + 3)
    True

    >>> detail("Boil the egg, then peel the egg.") == math.log(1 + 3)
    True
    """
    if whole_sentences:
        response = response[: 1 + max(response.rfind(end) for end in _ENDINGS)]
    return math.log1p(len(content_words(response)))


def _distinct_and_total(response: str, n: int) -> tuple[int, int]:
    folded = [word.casefold() for word in words(response)]
    counts = Counter(tuple(folded[at : at + n]) for at in range(len(folded) - n + 1))
    return len(counts), counts.total()


@_rule("distinct-n")
def distinct_n(response: str, n: Annotated[int, Field(ge=1)] = 2) -> float:
    """Share of distinct n-grams among all n-grams of words, 0 to 1; 0 for fewer than n words."""
    distinct, total = _distinct_and_total(response, n)
    return distinct / total if total else 0.0


@_rule("repetition")
def repetition(response: str, n: Annotated[int, Field(ge=1)] = 2) -> float:
    """Share of n-grams of words that occurred before, 0 to 1 (use with ``maximise: false``)."""
    distinct, total = _distinct_and_total(response, n)
    return 1 - distinct / total if total else 0.0


@_rule("keyword-density")
def keyword_density(
    response: str,
    keywords: Annotated[list[str], Field(min_length=1), AfterValidator(_keywords)],
    ignore_case: bool = True,
) -> float:
    """Occurrences of the keywords per word of the response; 0 for a response without words.

    ``keywords`` are words or phrases; whole words only, so that ``art`` is not found in ``party``.
    """
    # Longest first, so that "ice cream" wins over "ice" where both would match.
    ordered = sorted(set(keywords), key=len, reverse=True)
    pattern = r"(?<!\w)(?:" + "|".join(re.escape(keyword.strip()) for keyword in ordered) + r")(?!\w)"
    return regex_count(response, pattern, ignore_case, per_word=True)


@_rule("dialogue-share")
def dialogue_share(
    response: str,
    unit: Literal["characters", "words"] = "characters",
    unclosed: Literal["ignore", "count"] = "ignore",
) -> float:
    """Share of the text inside double quotes (straight or curly), 0 to 1; quotes pair within a line.

    ``characters`` counts all but white space and the quote marks themselves. ``unclosed`` is what to do with a quote
    that its line never closes.
    """
    lines = [_split_quotes(line, unclosed == "count") for line in response.splitlines()]

    def size(texts: Iterable[str]) -> int:
        text = " ".join(texts)
        return len(words(text)) if unit == "words" else sum(map(len, text.split()))

    quoted, plain = size(inside for inside, _ in lines), size(outside for _, outside in lines)
    return quoted / (quoted + plain) if quoted + plain else 0.0


def _split_quotes(line: str, count_unclosed: bool) -> tuple[str, str]:
    """Return the text inside and outside of double quotes; quote marks belong to neither."""
    quote = r'["“]([^"”]*)(?:["”]|$)' if count_unclosed else r'["“]([^"”]*)["”]'
    inside = " ".join(re.findall(quote, line))
    outside = re.sub(r'["“]', " ", re.sub(quote, " ", line), count=1)  # one quote that is not closed may be left
    return re.sub("[“”]", "", inside), re.sub("[“”]", "", outside)


@_rule("ends-with")
def ends_with(
    response: str,
    endings: Annotated[list[str], Field(min_length=1), AfterValidator(_endings)] = _ENDINGS,
    ignore_quotes: bool = True,
) -> float:
    """1 when the text, without trailing white space, ends with one of the endings, else 0.

    ``ignore_quotes`` looks behind closing quotes and brackets, so that ``He said "yes."`` ends with a full stop.
    """
    text = response.rstrip()
    bare = text.rstrip("\"'”’)]} \t\r\n") if ignore_quotes else text
    return float(text.endswith(tuple(endings)) or bare.endswith(tuple(endings)))


@_rule("regex-count")
def regex_count(
    response: str,
    pattern: Annotated[str, Field(min_length=1), AfterValidator(_pattern)],
    ignore_case: bool = False,
    per_word: bool = False,
) -> float:
    """Number of non-overlapping matches of a pattern (Python syntax), or matches per word."""
    matches = sum(1 for _ in re.finditer(pattern, response, re.IGNORECASE if ignore_case else 0))
    total = len(words(response)) if per_word else 1
    return matches / total if total else 0.0


@_rule("vader")
def vader(response: str, unit: Literal["text", "sentence"] = "text") -> float:
    """Positivity: the compound score of vaderSentiment, -1 to 1 (Hutto and Gilbert, ICWSM 2014).

    ``sentence``: the mean over sentences; the compound of a long text saturates near -1 and 1.
    """
    analyser = _vader_analyser()
    parts = [response] if unit == "text" else [part for part in _SENTENCE_END.split(response) if part.strip()]
    return sum(float(analyser.polarity_scores(part)["compound"]) for part in parts) / max(1, len(parts))


@functools.cache
def _vader_analyser() -> Any:
    """Return the analyser, read once: its lexicon takes a tenth of a second."""
    try:
        library = importlib.import_module("vaderSentiment.vaderSentiment")
    except ImportError as error:
        raise RequestError(
            f"rule 'vader' needs the vaderSentiment library ({error}); install it with: pip install moalign[text]"
        ) from None
    return library.SentimentIntensityAnalyzer()


def _problem(error: Mapping[str, Any], allowed: Sequence[str], where: str) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown option {key!r}; allowed: {', '.join(allowed) or 'none'}{did_you_mean(key, allowed)}"
    if error["type"] == "missing":
        return f"{where}: option {key!r} is needed"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: option {key!r}: found {error['input']!r}; {message}"


class RuleScorer:
    """An objective scored by a rule; cheap, so that it is kept out of the store unless the card asks."""

    def __init__(self, spec: RuleObjective) -> None:
        """Read the rule's options; raises RequestError for an unknown rule or all wrong options at once."""
        self.name = spec.name
        self.maximise = spec.maximise
        self.cheap = not spec.store
        where = f"objective {spec.name!r}"
        if spec.rule not in RULES:
            raise unknown("rule", spec.rule, list(RULES), where)
        self.rule = RULES[spec.rule]
        allowed = sorted(self.rule.options.model_fields)
        try:
            options = self.rule.options.model_validate(spec.options)
        except ValidationError as error:
            where = f"{where}: rule {spec.rule!r}"
            raise RequestError(*(_problem(dict(each), allowed, where) for each in error.errors())) from None
        if spec.rule == "vader":
            _vader_analyser()  # report a missing library now, not after the base has been sampled
        self.options = options.model_dump()
        self.revision = f"rule:{spec.rule}:{digest(_VERSION, options.model_dump(mode='json'))}"

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return the rule's value of each response, ``[samples]``; prompts are not looked at."""
        return [self.rule.function(response, **self.options) for response in responses]
