"""MRPO: multi-reference preference optimisation, DPO against several reference models at once.

Source: arXiv 2405.16388 (AAAI 2025); facts of the public code thaihungle/MRPO are marked "code". DPO's loss with a
virtual reference made of K models (:mod:`moalign.losses.references`):

    log pi~ = log pi_1 + log pi_2 - log(a_2 pi_1 + a_1 pi_2)      (K = 2; in general  pi~ = (sum_k a_k / pi_k)^-1)
    a_k     = |log pi_k(y_w) - log pi_k(y_l)| / sum_j |log pi_j(y_w) - log pi_j(y_l)|        for each pair
    log pi_k clipped into log pi_1 (1 +- e),  e(y_w) = trust_region |log p(y_w)| / (|log p(y_w)| + |log p(y_l)|)

with log p the references' mean log-probability and pi_1 the reference that training starts from, here the base. With
references that agree it is DPO, as with ``trust_region: 0``; the optimum is ``pi~ exp(r / beta) / Z`` when a is fixed.

The paper aligns to one objective. Here each preference has a policy of its own, on DPO-LW's batches and weights
(:mod:`moalign.methods.dpo_lw`); ``references: []`` is DPO-LW, bit for bit. The further references are

* ``experts``, by default: one DPO expert of each objective (``modpo`` at the corners of the simplex, the runs that
  dpo-soups has). A response that one of them finds unlikely is unlikely to the virtual reference;
* the folder of a LoRA adapter of the same base: a run of ``sft``, a run's ``adapter-pref-3``, any other. The paper's
  references are other language models: here they share base and tokenizer, as nothing else is in memory.

Deviations: ``trust: confident`` gives a_k to reference k, as the weights are motivated (the more a model tells the two
responses apart, the more it counts). Code has the two exchanged, so that a model that tells everything apart leaves the
other alone to be the reference: ``trust: code``. All references are fixed, so pi~ is looked up once, before training
(code computes it at every step).
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from moalign.core.amounts import Amount, Amounts
from moalign.core.errors import RequestError
from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.methods.dpo_lw import AllPairs, train_on_all_pairs
from moalign.training.job import Job, RunContext
from moalign.training.settings import DpoConfig, NamesFiles

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moalign.policies.policy import Policy
    from moalign.training.offline_dpo import PairRows

EXPERTS = "experts"
WEIGHTS = "adapter_model.safetensors"
STAGE = "references"
"""Name of the stage, and of the note, that say which references a run has."""


class Config(AllPairs, NamesFiles):
    """Settings of MRPO; those of DPO on pairs are inherited."""

    references: tuple[str, ...] = (EXPERTS,)
    """Beside the base: ``experts``, or folders of adapters (or of runs that have one); empty: dpo-lw."""
    trust: Literal["confident", "even", "code"] = "confident"
    """How the references' weights are found for each pair."""
    trust_region: float | None = Field(default=0.1, ge=0, lt=1)
    """How far a further reference's log-probability may be from the base's, as a part of that; null: any (code: .1)."""
    experts: DpoConfig = DpoConfig()
    """How each expert is trained: the settings of ``modpo``, of which every corner of the simplex is one run."""

    @model_validator(mode="after")
    def _one_reference(self) -> Config:
        if self.trust == "code" and (len(self.references) != 1 or EXPERTS in self.references):
            raise ValueError(
                "trust: code is of the base and one further reference; found references "
                f"{', '.join(self.references) or 'none'}; allowed: confident or even, or the folder of one adapter"
            )
        return self

    def expert_runs(self) -> tuple[str, dict[str, Any]] | None:
        """See :class:`CostHints`."""
        return ("modpo", self.experts.model_dump(mode="json")) if EXPERTS in self.references else None

    def learns_from(self, task: Amounts) -> Amount:
        """See :class:`CostHints`. Scored responses that the experts learned from are in their cost."""
        known = EXPERTS in self.references and self.experts.learns_from(task).rows
        return Amount() if known else super().learns_from(task)

    def contents(self) -> dict[str, str]:
        """See :class:`~moalign.training.settings.NamesFiles`."""
        from moalign.runs.checkpoint import file_sum

        return {text: file_sum(adapter_in(text) / WEIGHTS) for text in self.references if text != EXPERTS}

    @property
    def switched_off(self) -> set[str]:
        """See :class:`CostHints`."""
        return set() if EXPERTS in self.references else {EXPERTS}

    @classmethod
    def borrows(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """The experts are those of ``dpo-soups`` on the task."""
        named = given.get("references", [EXPERTS])
        return {EXPERTS: "dpo-soups"} if isinstance(named, list) and EXPERTS in named else {}


class Mrpo:
    """One adapter per preference, trained on all objectives' pairs against several references."""

    name: ClassVar[str] = "mrpo"
    summary: ClassVar[str] = "DPO per preference against the base and further references (MRPO, arXiv 2405.16388)"
    capabilities: ClassVar[Capabilities] = Capabilities(
        family="offline", one_policy=False, steerable=False, needs_pairs=True
    )
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {
        "steps": 2, "batch": 4, "max_tokens": 128, "per_prompt": 1,
        "experts": {"steps": 2, "batch": 4, "max_tokens": 128, "per_prompt": 1},
    }  # fmt: skip

    def train(self, job: Job) -> None:
        """Obtain the references, then train an adapter for every preference; resumes where it was interrupted."""
        folders = reference_folders(job)
        labelled = [job.task.has_pairs(k) for k in range(len(job.task.names))]
        counted = EXPERTS in job.config.references and job.config.experts.builds_pairs(labelled)
        train_on_all_pairs(job, prepare=partial(with_references, job, folders), counted=counted)

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the policy trained for a preference; raises RequestError for one that was not trained."""
        from moalign.policies.per_preference import trained_for

        return trained_for(context, preference)


def reference_folders(job: Job) -> list[Path]:
    """Return the folders of the further references' adapters, and note their content.

    Raises RequestError for a folder without an adapter, and when a run is resumed with a reference that has changed.
    """
    from moalign.lm.adapters import read
    from moalign.runs.checkpoint import file_sum

    config: Config = job.config
    folders = [adapter_in(text) for text in config.references if text != EXPERTS]
    for folder in folders:
        read(job.task.language_model, folder)  # refused before any expert is trained
    if (experts := config.expert_runs()) is not None:
        folders += job.find_experts(*experts)[1]
    found = [file_sum(folder / WEIGHTS) for folder in folders]
    if job.stage_done(STAGE):
        before = job.notes[STAGE]
        if before != found:
            raise RequestError(
                f"references: {job.run.path} was begun with other adapters in these folders; put them back, or move "
                "the run away to train it again"
            )
    else:
        job.notes[STAGE] = found
        job.finish_stage(STAGE)
    return folders


def adapter_in(text: str) -> Path:
    """Return the folder of an adapter: the one named, or ``adapter`` in the run that is named; else RequestError."""
    folder = Path(os.path.expanduser(text))
    for place in (folder, folder / "adapter"):
        if (place / "adapter_config.json").is_file() and (place / WEIGHTS).is_file():
            return place
    there = sorted(path.name for path in folder.glob("adapter-*") if path.is_dir())
    hint = f"; it has {', '.join(there[:4])}: name one of them" if there else ""
    raise RequestError(
        f"references: {text}: found no adapter there (adapter_config.json and {WEIGHTS}); allowed: "
        f"{EXPERTS}, or the folder of an adapter{hint}"
    )


def with_references(job: Job, folders: list[Path], pairs: dict[int, PairRows]) -> dict[int, PairRows]:
    """Return the pairs with the virtual reference's log-probabilities in place of the base's."""
    import numpy as np

    from moalign.lm import adapters
    from moalign.losses.references import virtual_reference
    from moalign.training.pair_references import own_log_probs

    if not folders:
        return pairs
    lm, config = job.task.language_model, job.config
    of: dict[int, list[np.ndarray]] = {k: [rows.reference] for k, rows in pairs.items()}
    for folder in folders:
        adapters.load(lm, folder)
        for k, rows in pairs.items():
            of[k].append(own_log_probs(job, lm, rows))
        adapters.drop(lm)
    return {
        k: replace(
            rows,
            reference=virtual_reference(np.stack(of[k]).astype(np.float64), config.trust, config.trust_region).astype(
                np.float32
            ),
        )
        for k, rows in pairs.items()
    }
