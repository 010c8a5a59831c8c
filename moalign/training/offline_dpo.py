"""DPO on fixed pairs by trl's DPOTrainer, with margins, shares and soft labels: MODPO's loss and its special cases.

``z = (1 / w_k) * (beta * (D(y_w) - D(y_l)) - w_-k . (mu(y_w) - mu(y_l)))``, ``D(y) = log pi(y|x) - log pi_ref(y|x)``;
the loss of a pair is ``-log sigma(z)`` or the hinge (:func:`moalign.losses.dpo.margin_logits`).

The trainer is given our rows, order, optimizer, schedule and books (:mod:`moalign.training.trainer_books`), a collator
and, by the public hook ``compute_loss``, the loss. One private hook is overridden, ``_prepare_dataset``, since the
trainer takes no tokenised pairs. The reference's log-probabilities are computed before (:mod:`.reference`): the trainer
holds no reference model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moalign.data.records import Response
from moalign.errors import RequestError
from moalign.lm.chat import pair_row
from moalign.training.diagnostics import at_the_end
from moalign.training.reference import Row, pad_rows, reference_log_probs
from moalign.training.seeds import derive
from moalign.training.settings import DpoConfig, DpoStage
from moalign.training.trainer_books import (
    make_books,
    make_optimizer,
    make_scheduler,
    order,
    quiet_libraries,
    resume,
    run_trainer,
    trainable,
    trainer_settings,
)

if TYPE_CHECKING:
    from moalign.methods.base import Job
    from moalign.policies.language_model import LanguageModel

__all__ = ["DpoConfig", "DpoStage", "Margin", "PairRows", "encode_pairs", "even_order", "train_dpo"]

Matrix = NDArray[np.float64]

METRICS = ("loss", "accuracy", "preference", "margin", "margin_ratio", "chosen_log_ratio")
"""What a run's diagnostics hold of its last tenth."""


@dataclass(frozen=True)
class Margin:
    """What the other objectives say of pairs that are labelled for objective k."""

    values: Matrix
    """``mu(y_w) - mu(y_l)``, ``[pairs, objectives - 1]``."""
    weights: Sequence[float]
    """w_-k, ``[objectives - 1]``."""
    share: float
    """w_k."""

    def check(self, pairs: int) -> None:
        """Raise RequestError when the margins do not fit the pairs or the weights, or are not finite."""
        wanted = (pairs, len(self.weights))
        if self.values.shape != wanted:
            raise RequestError(
                f"margins: found a matrix of shape {list(self.values.shape)}; needed {list(wanted)}: "
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
    """Pairs as tokens, with what the reference says of them."""

    chosen: list[Row]
    rejected: list[Row]
    reference: NDArray[np.float32]
    """``log pi_ref`` of the chosen and the rejected responses, ``[pairs, 2]``."""
    chance: Matrix
    """Probability that the chosen response is preferred, ``[pairs]``."""
    kept: NDArray[np.intp]
    """Which of the given pairs these are: those that differ in a token after cutting."""

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.chosen)


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

    Chosen and rejected share one prompt, cut so that the longer of them fits.

    Args:
        texts: rendered prompts, ``[pairs]``.
        chance: probability that the chosen response is preferred, ``[pairs]``; None: 1.
        own_reference: the reference is the active adapter of ``lm`` as it is now; else the base.

    Raises:
        RequestError: no pair is left, or a response without tokens.
    """
    if not texts:
        raise RequestError(f"{job.task.card.name}: no pairs to train on")
    count = len(texts)
    both = [
        pair_row(lm.codec, text, [Response.of(one), Response.of(other)], max_tokens)
        for text, one, other in zip(texts, chosen, rejected, strict=True)
    ]
    rows = [(head + tail, len(tail)) for which in (0, 1) for head, tail in (pair[which] for pair in both)]
    empty = next((at for at, (_, length) in enumerate(rows) if not length), None)
    if empty is not None:
        which = "chosen" if empty < count else "rejected"
        raise RequestError(f"pair {empty % count}: the {which} response has no tokens")
    kept = [at for at in range(count) if rows[at][0] != rows[count + at][0]]
    if not kept:
        raise RequestError(
            f"{job.task.card.name}: chosen and rejected are the same text in all {count} pairs (after cutting to "
            f"max_tokens = {max_tokens}); a pair needs two different responses"
        )
    distinct = {_key(rows[at]): None for pair in kept for at in (pair, count + pair)}
    places = {key: number for number, key in enumerate(distinct)}
    logps = reference_log_probs(job, lm, [(list(ids), length) for ids, length in distinct], own_reference)
    reference = [[logps[places[_key(rows[at])]], logps[places[_key(rows[count + at])]]] for at in kept]
    return PairRows(
        chosen=[rows[at] for at in kept],
        rejected=[rows[count + at] for at in kept],
        reference=np.array(reference, dtype=np.float32),
        chance=np.ones(len(kept)) if chance is None else np.asarray(chance, dtype=np.float64)[kept],
        kept=np.array(kept, dtype=np.intp),
    )


def _key(row: Row) -> tuple[tuple[int, ...], int]:
    return tuple(row[0]), row[1]


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
) -> dict[str, float]:
    """Train the active adapter of ``lm`` on pairs; resumes from the phase's checkpoint.

    Args:
        phase: name of the stage in the run's record, metrics and checkpoints.
        margin: the other objectives' margins; None: plain DPO.
        places: which pair each place of each batch takes, ``[steps * batch]``; None: reshuffled passes.
        weights: of the places' losses, ``[steps * batch]``; None: 1. A step's loss is the mean of weight times loss.

    Returns:
        Means over the last tenth of training of :data:`METRICS`.

    Raises:
        RequestError: margins that do not fit the pairs.
    """
    if margin is not None:
        margin.check(len(pairs))
    if config.steps == 0:
        return {}
    if places is None:
        places = order(len(pairs), config.steps, config.batch, derive(job.seed, phase, "order"))
    optimizer = make_optimizer(lm, config)
    start = resume(job, lm, optimizer, phase)
    if start < config.steps:
        left = slice(start * config.batch, None)
        batches = Batches(pairs, margin, places[left], None if weights is None else weights[left], lm.pad)
        tokens = [len(pairs.chosen[pair][0]) + len(pairs.rejected[pair][0]) for pair in places[left]]
        losses = PairLoss(config, margin)
        books = make_books(job, lm, optimizer, config, phase, start, tokens, losses.told)
        with quiet_libraries(), trainable(lm):
            trainer = make_trainer(job, lm, config, phase, batches, losses, (optimizer, start), books)
            run_trainer(trainer)
    return at_the_end(job.run.metrics(), phase, config.steps, METRICS)


class Batches:
    """Makes the trainer's batches: its rows are places in the order of training."""

    def __init__(
        self, pairs: PairRows, margin: Margin | None, places: np.ndarray, weights: np.ndarray | None, pad: int
    ) -> None:
        import torch

        self.pairs, self.places, self.pad = pairs, places, pad
        values = np.zeros((len(pairs), 0)) if margin is None else margin.values
        self.values = {
            "reference": torch.from_numpy(pairs.reference),
            "margins": torch.as_tensor(values, dtype=torch.float32),
            "chance": torch.as_tensor(pairs.chance, dtype=torch.float32),
        }
        self.weights = torch.as_tensor(np.ones(len(places)) if weights is None else weights, dtype=torch.float32)

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Any]:
        """Return a batch: chosen responses first, then rejected ones; per pair reference, margins, chance, weight."""
        at = [row["place"] for row in rows]
        some = self.places[at].tolist()
        padded = pad_rows([self.pairs.chosen[i] for i in some] + [self.pairs.rejected[i] for i in some], self.pad)
        return {**padded, **{name: value[some] for name, value in self.values.items()}, "weights": self.weights[at]}


class PairLoss:
    """The loss of a batch of pairs, and what is told of it between two lines of the log."""

    def __init__(self, config: DpoStage, margin: Margin | None) -> None:
        import torch

        self.config = config
        self.share = 1.0 if margin is None else margin.share
        self.weights = torch.as_tensor([] if margin is None else list(margin.weights), dtype=torch.float32)
        self.seen: list[dict[str, Any]] = []

    def __call__(self, logps: Any, batch: dict[str, Any]) -> Any:
        """Return the mean loss, from the responses' token log-probabilities ``[2 * pairs, T]``."""
        from moalign.losses.dpo import margin_logits, preference_loss

        ratio = logps.sum(-1) - batch["reference"].T.reshape(-1)
        chosen, rejected = ratio.chunk(2)
        weights = self.weights.to(ratio.device)
        z = margin_logits(chosen, rejected, batch["margins"], weights, self.share, self.config.beta)
        each = preference_loss(z, batch["chance"], self.config.loss)
        if self.config.sft_coef:
            per_token = logps.sum(-1) / batch["completion_mask"].sum(-1).clamp_min(1)
            first, second = per_token.chunk(2)
            each = each - self.config.sft_coef * (first if self.config.sft_on == "chosen" else (first + second) / 2)
        self._note(chosen.detach(), rejected.detach(), batch["margins"] @ weights)
        return (batch["weights"] * each).mean()

    def _note(self, chosen: Any, rejected: Any, margin: Any) -> None:
        preference = self.config.beta * (chosen - rejected)
        self.seen.append(
            {
                "accuracy": (preference > 0).float().mean(),
                "preference": preference.abs().mean(),
                "margin": margin.abs().mean(),
                "chosen_log_ratio": chosen.mean(),
            }
        )

    def told(self) -> dict[str, float]:
        """Return the means since the last call.

        ``preference`` is mean |beta (D(y_w) - D(y_l))|, ``margin`` mean |w_-k . mu|, ``margin_ratio`` the second over
        the first: far above 1 the margin drowns the preference signal. A falling ``chosen_log_ratio`` says that the
        policy leaves what the data shows.
        """
        import torch

        if not self.seen:
            return {}
        told = {name: float(torch.stack([one[name] for one in self.seen]).mean()) for name in self.seen[0]}
        self.seen.clear()
        if told["preference"] > 0:
            told["margin_ratio"] = told["margin"] / told["preference"]
        return told


def trainer_class() -> Any:
    """Return trl's DPOTrainer, made to take tokenised pairs and our loss."""
    from trl import DPOTrainer

    from moalign.training.dropout import without_dropout

    class PairTrainer(DPOTrainer):
        """DPOTrainer on rows that are ready."""

        losses: PairLoss

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            """Return the loss of a batch of :class:`Batches`."""
            without_dropout(model)  # the trainer has just put the model into training mode
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            out = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                labels=labels,
                use_cache=False,
                fused_lm_head=True,
            )
            return self.losses(out.log_probs, inputs)

    return PairTrainer


def no_reference(config: Any) -> Any:
    """Return what stands where the trainer wants a reference model: ours was asked before, and it refuses."""
    import torch

    class NoReference(torch.nn.Module):
        """A module without weights."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            """Refuse: the reference's log-probabilities are in the batch."""
            raise AssertionError("the trainer asked for a reference model")

    module = NoReference()
    module.config = config
    return module


def make_trainer(
    job: Job,
    lm: LanguageModel,
    config: DpoStage,
    phase: str,
    batches: Batches,
    losses: PairLoss,
    state: tuple[Any, int],
    books: Any,
) -> Any:
    """Return the trainer for the batches that are left; ``state`` is the optimizer and the steps done."""
    from datasets import Dataset
    from trl import DPOConfig

    optimizer, start = state
    steps = len(batches.places) // config.batch
    settings = DPOConfig(
        beta=config.beta,
        disable_dropout=False,  # for good, that is, also for what runs after us; see compute_loss
        **trainer_settings(job, lm, config, steps, phase),
    )
    trainer = trainer_class()(
        model=lm.model,
        ref_model=no_reference(lm.model.config),
        args=settings,
        train_dataset=Dataset.from_dict({"place": list(range(len(batches.places)))}),
        data_collator=batches,
        processing_class=lm.tokenizer,
        optimizers=(optimizer, make_scheduler(optimizer, config, start)),
        callbacks=[books],
    )
    trainer.losses = losses
    return trainer
