"""DPO on fixed pairs by trl's DPOTrainer, with margins, shares and soft labels: MODPO and its special cases.

From a task's preference pairs (:func:`objective_pairs`) through tokens (:func:`encode_pairs`) to training
(:func:`train_dpo`); the loss is :func:`moalign.losses.dpo.modpo_losses`, given to the trainer by the public hook
``compute_loss``. Log-probabilities come from :func:`moalign.lm.marked.log_probs`, or with ``share_prompts`` from
:func:`moalign.lm.log_probs.token_outputs`. One private hook is overridden, ``_prepare_dataset``, since the trainer
takes no tokenised pairs. The reference's log-probabilities are computed before (:mod:`.reference`): the trainer holds
no reference model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from moalign.core import processes
from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError
from moalign.core.records import Response
from moalign.core.seeds import derive
from moalign.lm import shared_prompts
from moalign.lm.chat import pair_row
from moalign.lm.log_probs import token_outputs
from moalign.lm.marked import log_probs
from moalign.lm.trainers import on_one_gpu
from moalign.losses.dpo import modpo_losses
from moalign.training.callbacks import order, own_places, train_rows
from moalign.training.diagnostics import at_the_end
from moalign.training.dropout import without_dropout
from moalign.training.reference import Row, distinct_log_probs, pad_around, pad_rows
from moalign.training.settings import DpoConfig, DpoStage

if TYPE_CHECKING:
    from moalign.lm.language_model import LanguageModel
    from moalign.training.job import Job


METRICS = ("loss", "accuracy", "preference", "margin", "margin_ratio", "chosen_log_ratio", "cosine", "share/")
"""Metrics of which a run's diagnostics hold the mean over its last tenth."""


@dataclass(frozen=True)
class Margin:
    """Rewards of the other objectives on pairs that are labelled for objective k."""

    values: Matrix
    """``mu(y_w) - mu(y_l)``, ``[pairs, objectives - 1]``."""
    weights: Sequence[float]
    """w_-k, ``[objectives - 1]``."""
    share: float
    """w_k."""

    def require_rows(self, pairs: int) -> None:
        """Raise RequestError when the margins do not fit the pairs or the weights, or are not finite."""
        shape = (pairs, len(self.weights))
        if self.values.shape != shape:
            raise RequestError(
                f"margins: found a matrix of shape {list(self.values.shape)}; needed {list(shape)}: "
                "one row per pair, one column per other objective"
            )
        if not np.isfinite(self.values).all():
            row, column = np.argwhere(~np.isfinite(self.values))[0].tolist()
            raise RequestError(
                f"margins: the margin of pair {row}, column {column} is {self.values[row, column]}; "
                "every response of a pair needs a score on every objective"
            )


@dataclass(frozen=True)
class PairRows:
    """Pairs as tokens, with the reference's log-probabilities."""

    chosen: list[Row]
    rejected: list[Row]
    reference: NDArray[np.float32]
    """``log pi_ref`` of the chosen and the rejected responses, ``[pairs, 2]``."""
    chance: Matrix
    """Probability that the chosen response is preferred, ``[pairs]``."""
    kept: NDArray[np.intp]
    """Indices of these pairs among the given ones: those that differ in a token after cutting."""
    gaps: Matrix | None = None
    """Normalised scores of the chosen responses less those of the rejected, ``[pairs, objectives]``, if requested."""
    part: NDArray[np.intp] | None = None
    """Which of the :func:`joined` parts each pair is of, ``[pairs]``."""

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.chosen)


def objective_pairs(
    job: Job,
    lm: LanguageModel,
    config: DpoConfig,
    objectives: Sequence[int],
    scores: bool = False,
    counted: bool = False,
) -> dict[int, PairRows]:
    """Return the pairs of some objectives (indices); call it before any stage, so that their cost counts once.

    ``counted``: the scored responses are those that the job's experts learned from, in whose cost they are. With
    ``scores`` both responses of every pair are scored on every objective. ``job.notes["pairs"]`` gets how many
    pairs were built and left out.

    Raises RequestError for no pairs, or pairs that cannot be used (:meth:`moalign.tasks.task.Task.pairs`).
    """
    scored = None
    if config.builds_pairs([job.task.has_pairs(k) for k in objectives]):
        scored = job.task.scored() if counted else job.scored()
    result, counts = {}, {}
    for k in objectives:
        pairs = job.task.pairs(k, config.pairs, config.per_prompt, config.labels, scored)
        texts = [job.task.renderer.plain(prompt) for prompt in pairs.prompts]
        rows = encode_pairs(job, lm, texts, pairs.chosen, pairs.rejected, config.max_tokens, pairs.chance)
        if scores:
            better, worse = pairs.raw or (
                job.score(pairs.prompts, [response.shown for response in responses])
                for responses in (pairs.chosen, pairs.rejected)
            )
            rows = replace(rows, gaps=(job.panel.z(better) - job.panel.z(worse))[rows.kept])
        result[k] = rows
        counts[job.task.names[k]] = {"pairs": len(rows), **pairs.dropped, "alike": len(pairs) - len(rows)}
    job.notes["pairs"] = counts
    return result


def encode_pairs(
    job: Job,
    lm: LanguageModel,
    texts: Sequence[str],
    chosen: Sequence[Response | str],
    rejected: Sequence[Response | str],
    max_tokens: int,
    chance: Matrix | None = None,
    own_reference: bool = False,
) -> PairRows:
    """Tokenise pairs and look up the reference; pairs whose responses are the same tokens are left out.

    Chosen and rejected share one rendered prompt of ``texts``, cut so that the longer of them fits. ``chance``
    ``[pairs]`` is the probability that the chosen response is preferred; None: 1. The reference is the base, or with
    ``own_reference`` the active adapter of ``lm`` as it is now.

    Raises RequestError when no pair is left, or for a response without tokens.
    """
    if not texts:
        raise RequestError(f"{job.task.card.name}: no pairs to train on")
    count = len(texts)
    cut = [
        pair_row(lm.codec, text, [Response.of(better), Response.of(worse)], max_tokens)
        for text, better, worse in zip(texts, chosen, rejected, strict=True)
    ]
    rows = [(head + tail, len(tail)) for which in (0, 1) for head, tail in (pair[which] for pair in cut)]
    empty = next((at for at, (_, length) in enumerate(rows) if not length), None)
    if empty is not None:
        which = "chosen" if empty < count else "rejected"
        raise RequestError(f"pair {empty % count}: the {which} response has no tokens")
    differing = [at for at in range(count) if rows[at][0] != rows[count + at][0]]
    if not differing:
        raise RequestError(
            f"{job.task.card.name}: chosen and rejected are the same text in all {count} pairs (after cutting to "
            f"max_tokens = {max_tokens}); a pair needs two different responses"
        )
    both = [(rows[at], rows[count + at]) for at in differing]
    logps = distinct_log_probs(job, lm, [row for pair in both for row in pair], own_reference)
    return PairRows(
        chosen=[chosen for chosen, _ in both],
        rejected=[rejected for _, rejected in both],
        reference=logps.reshape(-1, 2),
        chance=np.ones(len(differing)) if chance is None else np.asarray(chance, dtype=np.float64)[differing],
        kept=np.array(differing, dtype=np.intp),
    )


def joined(parts: Sequence[PairRows]) -> PairRows:
    """Return the pairs of several objectives one after the other."""
    return PairRows(
        chosen=[row for part in parts for row in part.chosen],
        rejected=[row for part in parts for row in part.rejected],
        reference=np.concatenate([part.reference for part in parts]),
        chance=np.concatenate([part.chance for part in parts]),
        kept=np.concatenate([part.kept for part in parts]),
        part=np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
    )


def even_order(sizes: Sequence[int], steps: int, batch: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Return which row each place of each batch takes when a batch holds equally many rows of every part.

    The parts' rows, ``sizes`` of them, are numbered one after the other. Returns int ``[steps * batch]`` and how many
    places of a batch each part has: the first ones one more where ``batch`` is no multiple of their number.
    """
    parts = [batch // len(sizes) + (number < batch % len(sizes)) for number in range(len(sizes))]
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    columns = [
        (offset + order(size, steps, count, derive(seed, "part", number))).reshape(steps, count)
        for number, (size, count, offset) in enumerate(zip(sizes, parts, offsets, strict=True))
    ]
    return np.concatenate(columns, axis=1).reshape(-1), parts


def train_dpo(
    job: Job,
    lm: LanguageModel,
    pairs: PairRows,
    config: DpoStage,
    phase: str,
    margin: Margin | None = None,
    places: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    trainer: Callable[..., PairTrainer] | None = None,
    batches: Callable[..., Batches] | None = None,
) -> dict[str, float]:
    """Train the active adapter of ``lm`` on pairs, and return means of :data:`METRICS` over the last tenth; resumes.

    Args:
        phase: name of the stage in the run's record, metrics and checkpoints.
        margin: the other objectives' margins; None: plain DPO. RequestError when they do not fit the pairs.
        places: which pair each place of each batch takes, ``[steps * batch]``; None: reshuffled passes.
        weights: of the places' losses, ``[steps * batch]``; None: 1. A step's loss is the mean of weight times loss.
        trainer: makes one, with the arguments of :class:`PairTrainer`; None: that.
        batches: makes its batches, with the arguments of :class:`Batches`; None: that.
    """
    if margin is None:
        margin = Margin(np.zeros((len(pairs), 0)), [], 1.0)
    margin.require_rows(len(pairs))
    if config.steps == 0:
        return {}
    if places is None:
        places = order(len(pairs), config.steps, config.batch, derive(job.seed, phase, "order"))
    if weights is None:
        weights = np.ones(len(places))
    if config.share_prompts:
        shared_prompts.require(lm, bool(job.policy_spec.gradient_checkpointing))
    if config.group_by_length:
        places, weights = by_length(pairs, places, weights, config.batch)
    padded = pad_around if config.share_prompts else pad_rows
    made = (batches or Batches)(pairs, margin, places, weights, lm.pad, padded)
    train_rows(job, lm, config, phase, made.tokens(), partial(trainer or PairTrainer, config, made))
    return at_the_end(job.run.metrics(), phase, config.steps, METRICS)


def by_length(pairs: PairRows, places: np.ndarray, weights: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return places and weights ``[steps * batch]`` with each batch in the order of its pairs' lengths."""
    lengths = np.array([max(len(c), len(r)) for (c, _), (r, _) in zip(pairs.chosen, pairs.rejected, strict=True)])
    order = np.argsort(lengths[places].reshape(-1, batch), axis=1, kind="stable")
    places, weights = (np.take_along_axis(a.reshape(-1, batch), order, axis=1).reshape(-1) for a in (places, weights))
    return places, weights


class Batches:
    """Makes the trainer's batches; its rows are places in the order of training."""

    def __init__(
        self,
        pairs: PairRows,
        margin: Margin,
        places: np.ndarray,
        weights: np.ndarray,
        pad: int,
        padded: Callable[[Sequence[Row], int], dict[str, Tensor]] = pad_rows,
    ) -> None:
        self.pairs, self.margin, self.places, self.pad, self.padded = pairs, margin, places, pad, padded
        self.of_pair = {
            "ref_logps": torch.from_numpy(pairs.reference),
            "margins": torch.as_tensor(margin.values, dtype=torch.float32),
            "chance": torch.as_tensor(pairs.chance, dtype=torch.float32),
        }
        if pairs.part is not None:
            self.of_pair["part"] = torch.as_tensor(pairs.part)
        self.weights = torch.as_tensor(weights, dtype=torch.float32)

    def tokens(self) -> list[int]:
        """Return the tokens of the pair at each place, prompts included."""
        return [len(self.pairs.chosen[pair][0]) + len(self.pairs.rejected[pair][0]) for pair in self.places]

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Tensor]:
        """Return a batch: chosen responses first, then rejected ones, and what the loss needs of each pair."""
        places = [row["place"] for row in rows]
        pairs = self.places[places].tolist()
        return {
            **self.padded([self.pairs.chosen[i] for i in pairs] + [self.pairs.rejected[i] for i in pairs], self.pad),
            **{name: value[pairs] for name, value in self.of_pair.items()},
            "weights": self.weights[places],
        }


class NoReference(torch.nn.Module):
    """Stands where the trainer wants a reference model: the reference's log-probabilities are in the batch."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse."""
        raise AssertionError("the trainer asked for a reference model")


class PairTrainer(DPOTrainer):  # type: ignore[misc,unused-ignore]
    """trl's DPOTrainer on tokenised pairs, with our loss."""

    per_token = False
    """See :func:`moalign.losses.dpo.modpo_losses`."""

    def __init__(
        self, stage: DpoStage, batches: Batches, start: int, settings: dict[str, Any], model: Any, **arguments: Any
    ) -> None:
        """Prepare to train on the places of ``batches`` from ``start`` on, as :func:`train_rows` asks for it."""
        super().__init__(
            model=model,
            ref_model=NoReference(model.config),
            # Dropout would be disabled for good, that is, also for what runs after us; see compute_loss.
            args=on_one_gpu(DPOConfig(beta=stage.beta, disable_dropout=False, **settings)),
            train_dataset=Dataset.from_dict({"place": own_places(np.arange(start, len(batches.places)), stage.batch)}),
            data_collator=batches,
            **arguments,
        )
        self.stage, self.margin = stage, batches.margin
        self.seen: list[dict[str, Tensor]] = []
        """Metrics of the batches since the last line of the log."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the loss of a batch of :class:`Batches`: of several processes, this one's summand."""
        loss = self.losses(model, inputs).mean()
        return loss if processes.count() == 1 else loss / processes.count()

    def losses(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Return the losses of a batch's pairs times their weights, ``[pairs]``."""
        without_dropout(model)  # the trainer has just put the model into training mode
        logps = self._log_probs(model, inputs)
        losses, metrics = modpo_losses(
            logps,
            inputs["ref_logps"],
            inputs["completion_mask"],
            inputs["margins"],
            inputs["chance"],
            inputs["weights"],
            margin_weights=torch.as_tensor(list(self.margin.weights), dtype=torch.float32, device=logps.device),
            share=self.margin.share,
            beta=self.stage.beta,
            kind=self.stage.loss,
            sft_coef=self.stage.sft_coef,
            sft_on=self.stage.sft_on,
            per_token=self.per_token,
        )
        self.seen.append(metrics)
        return losses

    def _log_probs(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Return the tokens' log-probabilities, 0 outside responses, ``[2 * pairs, T]``."""
        ids, mask, response = inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"]
        if self.stage.share_prompts:
            return token_outputs(model, ids, mask, response.bool(), share_prompts=True).logps
        return log_probs(model, ids, mask, response.bool())

    def mean_metrics(self) -> dict[str, float]:
        """Return means of the loss's metrics since the last call.

        ``margin_ratio`` is ``margin`` over ``preference``: far above 1 the margin drowns the preference signal.
        """
        if not self.seen:
            return {}
        own = {name: float(torch.stack([metrics[name] for metrics in self.seen]).mean()) for name in self.seen[0]}
        of_all = processes.gather(own)
        means = {name: sum(part[name] for part in of_all) / len(of_all) for name in own}
        self.seen.clear()
        if means["preference"] > 0:
            means["margin_ratio"] = means["margin"] / means["preference"]
        return means
