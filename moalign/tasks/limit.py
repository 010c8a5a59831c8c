"""What becomes of a task's prompts that are longer than it allows: ``overlong: cut`` or ``drop``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from moalign.data.splits import normalised

if TYPE_CHECKING:
    from moalign.config.card import TaskCard
    from moalign.lm.chat import Renderer


class WithLimit:
    """What a task knows of prompts that are too long."""

    card: TaskCard
    names: list[str]
    measurable = True
    """Whether the model is there, whose tokens the limit counts; without it no prompt is known to be too long."""

    @property
    def renderer(self) -> Renderer:
        """See :attr:`moalign.tasks.task.Task.renderer`."""
        raise NotImplementedError

    def all_prompts(self) -> list[str]:
        """See :meth:`moalign.tasks.task.Task.all_prompts`."""
        raise NotImplementedError

    def left_out(self, prompt: str) -> bool:
        """Whether the card leaves a prompt out because it is too long (``overlong: drop``)."""
        return self.measurable and self.card.overlong == "drop" and self._cut(prompt)[0] > 0

    def home(self, prompt: str) -> str:
        """Return the prompt whose split a prompt is in: the shortest of those that the limit makes equal.

        Else prompts that differ in what is cut off alone would be trained on and judged on.
        """
        return self._homes.get(normalised(self._cut(prompt)[1]), prompt) if self._homes else prompt

    @functools.cached_property
    def _homes(self) -> dict[str, str]:
        """The shortest prompt by what is left of it; empty where no prompt is cut."""
        if not self.measurable or self.card.built_in_base or self.card.overlong == "drop":
            return {}
        longest_first = sorted(self.all_prompts(), key=lambda prompt: (-len(prompt), prompt))
        return {normalised(self._cut(prompt)[1]): prompt for prompt in longest_first}

    @functools.cached_property
    def _cut(self) -> Callable[[str], tuple[int, str]]:
        """Counts the tokens that the limit cuts off a prompt, an even preference beside it, and gives what is left."""
        limit, even = self.card.generation.max_prompt_tokens, (1 / len(self.names),) * len(self.names)
        # Upper bound of the tokens around a prompt: the bytes of the text there, and the few that a tokenizer adds.
        around = len(self.renderer.preference("", even).encode()) + 8

        @functools.cache
        def cut(prompt: str) -> tuple[int, str]:
            if len(prompt.encode(errors="surrogatepass")) + around <= limit:
                return 0, prompt  # a token holds at least one byte
            rendered = self.renderer.preference(prompt, even)
            return rendered.cut, rendered.prompt

        return cut

    def overlong(self) -> dict[str, int]:
        """Return :meth:`overlong_report` if any prompt is cut or dropped, else an empty dict."""
        report = self.overlong_report()
        return report if report.get("cut") or report.get("dropped") else {}

    def overlong_report(self) -> dict[str, int]:
        """Return how many prompts of all splits the limit cuts (and of how many tokens in all) or drops."""
        cuts = [self._cut(prompt)[0] for prompt in self.all_prompts()]
        cut = [count for count in cuts if count]
        if self.card.overlong == "drop":
            return {"prompts": len(cuts), "dropped": len(cut)}
        return {"prompts": len(cuts), "cut": len(cut), "cut_tokens": sum(cut)}
