"""The plugin contract: what a method says of itself, is given, and gives back.

A method is one file in this package (or an entry point in the group ``moalign.methods``) with a class
that has the attributes of :class:`Method`. It has two halves:

* ``train(job)`` writes what the run needs through ``job.run`` (adapters, small tensors); the job is
  :mod:`moalign.training.job`'s;
* ``policy(run_context, preference)`` returns a :class:`~moalign.policies.policy.Policy` that answers prompts.

Nothing else in moalign knows a method's name: capability flags decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from moalign.config.strict import Strict
from moalign.core.preferences import Preference
from moalign.core.records import Pair
from moalign.tasks.load import require_base
from moalign.training.job import Job, RunContext

if TYPE_CHECKING:
    from moalign.policies.policy import Policy


Family = Literal["prompted", "offline", "online", "merged", "mixed", "other"]
"""What a method's answers come from: the base as it is; training on fixed responses or pairs; training on responses of
its own, scored as they come; experts whose weights are interpolated; experts whose next-token distributions are."""


@dataclass(frozen=True)
class Capabilities:
    """What the rest of moalign may ask of a method."""

    family: Family = "other"
    """How reports of many methods group it."""

    one_policy: bool = True
    """One policy serves every preference; False: one training run per preference."""
    steerable: bool = True
    """Any preference can be asked for; False: only the trained ones (or none at all)."""
    needs_pairs: bool = False
    needs_online_rewards: bool = False
    trains: bool = True
    """False: nothing is trained (the base answers); the run holds only its record and evaluation."""
    snapshots: bool = True
    """Its own stages train the adapters that answer, so that those kept along training answer, too; False: it answers
    by experts, a control model or the base."""
    mixes: bool = False
    """An expert for each objective reads every token of an answer."""
    interpolates: bool = False
    """The adapter that answers is put together of an expert's for each objective; its rank is the sum of theirs."""
    whole: str = ""
    """Why its training cannot be shared by several processes; empty: it can."""
    infers: bool = False
    """It reads a preference off pairs that a user labelled: it has ``infer(context, pairs)``, see :class:`Infers`."""
    objectives: Literal["any", "2"] = "any"


@runtime_checkable
class Method(Protocol):
    """A training plugin. ``name`` is its command-line name; the file is ``methods/<name with _>.py``."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for ``moalign ls methods``."""
    capabilities: ClassVar[Capabilities]
    Config: ClassVar[type[Strict]]
    quick: ClassVar[dict[str, Any]]
    """Settings with which the tests train it in seconds: too short to learn, long enough to go through every stage."""

    def train(self, job: Job) -> None:
        """Train and write through ``job.run``; must resume from ``job.run``'s phases and checkpoints."""
        ...

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the policy that answers for ``preference``; raises RequestError when it cannot serve it."""
        ...


class Infers(Protocol):
    """What a method with ``capabilities.infers`` has besides."""

    def infer(self, context: RunContext, pairs: Sequence[Pair]) -> Preference:
        """Return the preference that a user's labelled pairs show."""
        ...


def policies_of(method: Method, context: RunContext, wanted: Sequence[Preference]) -> list[Policy]:
    """Return a finished run's policy for each preference.

    Raises RequestError for a preference that the method cannot serve, for weights that are not those that training
    wrote, and for a base that is not the one that they were trained on.
    """
    require_as_trained(context)
    return [method.policy(context, preference) for preference in wanted]


def require_as_trained(context: RunContext) -> None:
    """Raise RequestError for weights, or a base, other than those that the run was trained to or on."""
    context.run.require_weights()
    require_base(context.task, context.run.record.notes.get("base"), context.run.path)
