"""Objectives that a language model judges, behind any OpenAI-compatible endpoint: an API, vLLM, llama.cpp, Ollama.

What is sent is one user's turn: the card's template file with the prompt and the response in it. The score is read from
the verdict: a key of a JSON object in it (``field``), or the group of a regular expression (``pattern``); of several
objects or matches the last counts, as reasons come first. It must be a number within ``range``. A verdict without one
cannot be read: it ends the command or is left out and counted (``unreadable``), and is never taken for a 0.

Several requests are on their way at a time, and every score is kept as it comes, under a revision that holds all that
can change it: address, model, template's text, how the score is read, temperature, ``max_tokens`` and seed. The address
is part of it, as two servers that give a model one name need not serve the same weights. An interruption loses only
what was on its way.

The key is read from an environment variable, goes into the request's header and nowhere else: messages repeat what an
endpoint says without it. What the library reads from variables of its own (organisation, project, further headers) goes
with the library's own key alone.
"""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

from moalign.config.objectives import JudgeObjective
from moalign.core.errors import RequestError, placed
from moalign.rewards.rows import check_templates, render
from moalign.rewards.scorer import ScorerFault, digest

LIBRARY = "openai"
LIBRARYS_KEY = "OPENAI_API_KEY"
PROBE_SECONDS = 10.0
"""How long :meth:`JudgeScorer.probe` waits at most."""
EXAMPLE = ("What is the capital of France?", "The capital of France is Paris.")
"""What is judged by :meth:`JudgeScorer.probe`: a prompt and a response."""

LONGEST_PAUSE = 60.0
"""Seconds that an endpoint may have a request wait before it is tried again, as the library has it."""

REFUSED = {"content_filter", "content_policy_violation", "context_length_exceeded", "string_above_max_length"}
"""Codes of an endpoint's error that are of the one text that it was asked about; 413 too."""

COUNTS = ("verdicts", "unreadable", "prompt_tokens", "completion_tokens")
"""What is counted of a judge's work."""

_VERSION = 1
"""Raise it when a verdict is read otherwise: it is part of the revision."""
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_CUT = "; max_tokens cut it off"
_SHOWN = 160
"""Characters of a verdict or of an endpoint's words that messages repeat."""


class Verdict(NamedTuple):
    """What the judge answered, and what that took."""

    text: str
    cut: bool = False
    """``max_tokens`` ended it."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    refused: str = ""
    """Why the endpoint judges every text but this one: its content filter, its length."""


class JudgeScorer:
    """A ``judge`` objective. Scores come one by one (:meth:`stream`); NaN stands for one that is left out."""

    def __init__(self, spec: JudgeObjective, base_dir: Path) -> None:
        """Read template and key; ``base_dir`` is the task card's folder. Nothing is sent.

        Raises RequestError for a template that cannot be used, a variable that holds no key, and without the library.
        """
        self.spec = spec
        self.name = spec.name
        self.maximise = spec.maximise
        self.cheap = spec.store is False
        self.where = f"objective {spec.name!r}"
        self.template = read_template(spec, base_dir)
        self.revision = revision(spec, self.template)
        self._key = _key(spec, self.where)
        if importlib.util.find_spec(LIBRARY) is None:
            raise RequestError(
                f"{self.where}: kind judge needs the library {LIBRARY}; install it with: pip install moalign[judge]"
            )
        self._counts = dict.fromkeys(COUNTS, 0)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return the judge's score of each response, ``[samples]``; ScorerFault for the first that cannot be read."""
        scores = dict(self.stream(prompts, responses))
        for score in scores.values():
            if isinstance(score, ScorerFault):
                raise score
        return [float(scores[at]) for at in range(len(prompts))]  # type: ignore[arg-type]

    def stream(self, prompts: Sequence[str], responses: Sequence[str]) -> Iterator[tuple[int, float | ScorerFault]]:
        """Yield (sample, score) in the order in which verdicts come; NaN: left out; a fault: cannot be read.

        At most ``concurrency`` requests are on their way. Raises RequestError, at once, when the endpoint gives none.
        """
        pairs = list(enumerate(zip(prompts, responses, strict=True)))
        if not pairs:
            return
        client = self._client  # made here, in one thread
        # Its threads are daemons, and leaving the block waits for no request: an interruption ends the command at once.
        with ThreadPool(min(self.spec.concurrency, len(pairs))) as pool:
            asked = pool.imap_unordered(lambda numbered: (numbered[0], self._ask(client, *numbered[1])), pairs)
            for at, verdict in self._arriving(asked):
                self._counts["verdicts"] += 1
                self._counts["prompt_tokens"] += verdict.prompt_tokens
                self._counts["completion_tokens"] += verdict.completion_tokens
                try:
                    yield at, read(verdict, self.spec)
                except ValueError as error:
                    self._counts["unreadable"] += 1
                    yield at, math.nan if self.spec.unreadable == "leave-out" else _unreadable(verdict, error)

    def _arriving(self, asked: Any) -> Iterator[tuple[int, Verdict]]:
        """Yield verdicts as they come; RequestError when none does for longer than all tries of a request may take.

        The library's limit is of the time between two bytes: a connection that is kept alive never meets it.
        """
        longest = (self.spec.max_retries + 1) * (self.spec.timeout + LONGEST_PAUSE)
        while True:
            try:
                yield asked.next(longest)
            except StopIteration:
                return
            except multiprocessing.TimeoutError:
                raise RequestError(
                    f"{self.where}: the judge at {self.spec.base_url} keeps its connections open and has given no "
                    f"verdict for {longest:g} s; is it stuck? lower timeout or max_retries to wait for less long"
                ) from None

    def take_usage(self) -> dict[str, Any]:
        """Return what was asked and what it took since the last call; see :func:`total`."""
        spec, counts = self.spec, self._counts
        self._counts = dict.fromkeys(COUNTS, 0)
        about = {"base_url": spec.base_url, "model": spec.model, "template": digest(self.template)}
        return total({**about, **counts}, {})

    def probe(self) -> tuple[str, bool]:
        """Judge one example by one request; return how that went, and whether a score could be read."""
        started = time.monotonic()
        client = self._client.with_options(max_retries=0, timeout=min(self.spec.timeout, PROBE_SECONDS))
        verdict = self._ask(client, *EXAMPLE, tries=1)
        answered = f"{self.spec.base_url} answers within {time.monotonic() - started:.1f} s"
        try:
            return f"{answered}; an example's score is {read(verdict, self.spec):g}", True
        except ValueError as error:
            return f"{answered}, but its verdict on an example cannot be read ({error}){_shown(verdict)}", False

    # --- the endpoint

    @cached_property
    def _client(self) -> Any:
        import openai

        # Without a key one is sent that is none: the library would else take OPENAI_API_KEY, whatever the address.
        key = self._key or "none"
        others = None
        if self.spec.api_key_env != LIBRARYS_KEY:
            others = {**dict.fromkeys(_others(), openai.Omit()), "Authorization": f"Bearer {key}"}
        return openai.OpenAI(
            base_url=self.spec.base_url,
            api_key=key,
            timeout=self.spec.timeout,
            max_retries=self.spec.max_retries,
            default_headers=others,
        )

    def _ask(self, client: Any, prompt: str, response: str, tries: int | None = None) -> Verdict:
        """Return the verdict on one response; RequestError when the endpoint gives none."""
        import openai

        spec, tries = self.spec, tries or self.spec.max_retries + 1
        text = render(self.template, prompt, response)
        settings = {"temperature": spec.temperature, "seed": spec.seed, "max_tokens": spec.max_tokens}
        try:
            answer = client.chat.completions.create(
                model=spec.model,
                # Sampled text may hold half a character, which no request can carry.
                messages=[{"role": "user", "content": text.encode(errors="replace").decode()}],
                **{key: value for key, value in settings.items() if value is not None},
            )
        except openai.APITimeoutError:
            problem = f"gives no answer within {spec.timeout:g} s ({_times(tries)}); raise timeout or lower concurrency"
        except openai.APIStatusError as error:
            words = self._quoted(_words(error.body))
            if error.status_code == 413 or error.code in REFUSED:
                return Verdict("", refused=f"HTTP {error.status_code}{': ' if words else ''}{words}")
            problem = self._refusal(error.status_code, words, tries)
        except openai.APIConnectionError as error:
            why = f"{type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else str(error)
            problem = f"cannot be reached ({_times(tries)}; {self._quoted(why)}); is it running, and is base_url right?"
        except (openai.OpenAIError, ValueError) as error:  # a body that is not JSON, though it says so
            problem = f"answers with what is no chat completion ({self._quoted(str(error))}); is base_url right?"
        else:
            verdict = _verdict(answer)
            if verdict is not None:
                return verdict._replace(text=self._without_key(verdict.text))
            said = answer.model_dump_json(warnings=False) if hasattr(answer, "model_dump_json") else str(answer)
            problem = f"answers with {self._quoted(said) or 'nothing'}, which is no chat completion; " + (
                "is base_url right? most end with /v1"
            )
        raise RequestError(f"{self.where}: the judge at {spec.base_url} {problem}")

    def _refusal(self, status: int, words: str, tries: int) -> str:
        said = f"HTTP {status}{': ' if words else ''}{words}"
        if status in (401, 403):
            given = f"the key in {self.spec.api_key_env}" if self.spec.api_key_env else "a request without a key"
            remedy = (
                "look at that variable" if self.spec.api_key_env else "name the variable that holds one: api_key_env"
            )
            return f"refuses {given} ({said}); {remedy}"
        if status == 404:
            return f"knows no model {self.spec.model!r} or no such path ({said}); most addresses end with /v1"
        if status == 429:
            return f"lets no more requests through ({said}; {_times(tries)}); lower concurrency or raise max_retries"
        if status >= 500:
            return f"fails ({said}; {_times(tries)})"
        return f"refuses the request ({said})"

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

    def _quoted(self, text: str) -> str:
        """Return an endpoint's words without the key, then shortened: of a long key a cut would leave the most."""
        return _short(self._without_key(text)) if text.strip() else ""


def total(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return the usage of one judge in two parts of the work: counts added, ``failure_rate`` of both (unreadable
    verdicts over all; None without any)."""
    counts = {name: int(one.get(name, 0)) + int(other.get(name, 0)) for name in COUNTS}
    rate = counts["unreadable"] / counts["verdicts"] if counts["verdicts"] else None
    return {**other, **one, **counts, "failure_rate": rate}


def read_template(spec: JudgeObjective, base_dir: Path) -> str:
    """Return the template's text; RequestError naming the file for one that cannot be used."""
    path = base_dir / spec.template
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RequestError(f"objective {spec.name!r}: template {path}: {why}") from None
    with placed(f"objective {spec.name!r}"):
        check_templates(text, None, str(path))
    return text


def revision(spec: JudgeObjective, template: str) -> str:
    """Return the score store's key of a judge: a hash of all that can change a verdict or its score."""
    included = {"base_url", "model", "field", "pattern", "range", "temperature", "max_tokens", "seed"}
    return f"judge:{digest(_VERSION, template, spec.model_dump(mode='json', include=included))}"


def read(verdict: Verdict, spec: JudgeObjective) -> float:
    """Return the score in a verdict; ValueError says why there is none."""
    if verdict.refused:
        raise ValueError(f"the endpoint refuses this text ({verdict.refused})")
    found = _in_json(verdict, spec.field) if spec.field is not None else _in_text(verdict, str(spec.pattern))
    text = found.strip() if isinstance(found, str) else found
    if isinstance(text, str) and _NUMBER.fullmatch(text):
        text = float(text)
    if isinstance(text, bool) or not isinstance(text, int | float):
        raise ValueError(f"{_short(str(found))} is no number")
    low, high = spec.range
    if not low <= text <= high:  # NaN, too
        beyond = isinstance(text, int) and abs(text) > sys.float_info.max  # no float, so that no :g
        shown = f"{str(text)[:20]}..." if beyond else f"{text:g}"
        raise ValueError(f"{shown} is outside the range {low:g} to {high:g}")
    return float(text)


def _in_json(verdict: Verdict, field: str) -> Any:
    """Return the value at a key of the last JSON object in a verdict that has it."""
    found: list[Any] = []
    at = verdict.text.find("{")
    while at >= 0:
        try:
            value, end = json.JSONDecoder().raw_decode(verdict.text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            for key in field.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            found += [] if value is None else [value]
        at = verdict.text.find("{", end)
    if not found:
        raise ValueError(f"no JSON object with the key {field!r}{_CUT if verdict.cut else ''}")
    return found[-1]


def _in_text(verdict: Verdict, pattern: str) -> str:
    """Return what the group of the pattern's last match holds."""
    last = next(reversed(list(re.finditer(pattern, verdict.text))), None)
    if last is None or last[1] is None:
        raise ValueError(f"no match of {pattern!r}{_CUT if verdict.cut else ''}")
    if verdict.cut and last.end(1) == len(verdict.text):
        raise ValueError(f"{last[1]!r} may be half a number{_CUT}")  # 1 of 10
    return str(last[1])


def _verdict(answer: Any) -> Verdict | None:
    """Return what a chat completion holds, None when it is none: the library checks no types."""
    try:
        choice, usage = answer.choices[0], answer.usage
        text, cut = choice.message.content, choice.finish_reason == "length"
    except (AttributeError, IndexError, KeyError, TypeError):
        return None
    counts = [getattr(usage, name, 0) for name in ("prompt_tokens", "completion_tokens")]
    counts = [count if isinstance(count, int) and count >= 0 else 0 for count in counts]
    return Verdict(text or "", cut, counts[0], counts[1]) if text is None or isinstance(text, str) else None


def _unreadable(verdict: Verdict, why: ValueError) -> ScorerFault:
    return ScorerFault(
        f"gave a verdict that cannot be read ({why}){_shown(verdict)} (unreadable: leave-out goes on without)"
    )


def _key(spec: JudgeObjective, where: str) -> str | None:
    """Return the key; RequestError, which never repeats it, for one that no header can carry."""
    if spec.api_key_env is None:
        return None
    key = os.environ.get(spec.api_key_env, "").strip()
    if not key:
        raise RequestError(f"{where}: api_key_env: the environment variable {spec.api_key_env} is not set, or empty")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise RequestError(f"{where}: api_key_env: {spec.api_key_env} holds white space or characters that no key has")
    return key


def _times(tries: int) -> str:
    return "asked once" if tries == 1 else f"asked {tries} times"


def _others() -> list[str]:
    """Return the headers that the library makes of the environment beside the key."""
    further = (line.partition(":")[0].strip() for line in os.environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines())
    return ["OpenAI-Organization", "OpenAI-Project", *(name for name in further if name.lower() != "authorization")]


def _words(body: Any) -> str:
    """Return the endpoint's own words on an error."""
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and body.get(key):
            body = body[key]
    return str(body) if body else ""


def _shown(verdict: Verdict) -> str:
    return "" if verdict.refused else f": {_short(verdict.text)}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= _SHOWN else f"{line[:_SHOWN]}...")
