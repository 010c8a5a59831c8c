"""Supervised fine-tuning on rendered (prompt, response) rows, by trl's SFTTrainer.

Only public hooks of the trainer are used: the order of the rows, the optimizer, the schedule and the checkpoints
are given to it. A resumed run is a trainer over the remaining rows, with the optimizer as it was; checkpoints are
safetensors, and the result equals the uninterrupted run's bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from moalign.core.errors import RequestError
from moalign.core.records import Response
from moalign.core.seeds import derive
from moalign.lm.chat import training_row
from moalign.lm.trainers import quiet_libraries, run_trainer
from moalign.training.callbacks import (
    RunCallback,
    make_optimizer,
    make_scheduler,
    order,
    resume,
    trainable,
    trainer_settings,
)
from moalign.training.settings import SftConfig

if TYPE_CHECKING:
    from moalign.lm.language_model import LanguageModel
    from moalign.training.job import Job


def encode_rows(
    lm: LanguageModel, texts: Sequence[str], responses: Sequence[Response | str], max_tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Tokenise rows; returns (input_ids, labels), where labels are -100 outside the response and what ends it.

    A response that a limit cut off has no ending: training one in would teach to stop there.

    Raises RequestError when a row would train on nothing: an empty response mask is silent otherwise.
    """
    inputs, labels = [], []
    for number, (text, answer) in enumerate(zip(texts, responses, strict=True)):
        response = Response.of(answer)
        head, tail = training_row(lm.codec, text, response, max_tokens)
        if not tail:
            raise RequestError(f"training row {number}: the response has no tokens ({response.text!r})")
        inputs.append(head + tail)
        labels.append([-100] * len(head) + tail)
    return inputs, labels


def train_sft(
    job: Job,
    lm: LanguageModel,
    texts: Sequence[str],
    responses: Sequence[Response | str],
    config: SftConfig,
    phase: str,
) -> None:
    """Train the active adapter of ``lm`` on rows; resumes from the phase's checkpoint.

    Args:
        texts: rendered prompts, ``[rows]``.
        responses: their responses, ``[rows]``; sampled ones keep their tokens.
        phase: name of the stage in the run's record, metrics and checkpoints.

    Raises:
        RequestError: no rows, or a row whose response is empty.
    """
    if not texts:
        raise RequestError(f"{job.task.card.name}: no rows to train on in stage {phase}")
    if config.steps == 0:
        return
    inputs, labels = encode_rows(lm, texts, responses, config.max_tokens)
    places = order(len(inputs), config.steps, config.batch, derive(job.seed, phase, "order"))
    optimizer = make_optimizer(lm, config)
    start = resume(job, lm, optimizer, phase)
    if start >= config.steps:
        return
    rows = places[start * config.batch :]
    tokens = [len(inputs[row]) for row in rows]
    with quiet_libraries(), trainable(lm):
        data = Dataset.from_dict({"input_ids": [inputs[row] for row in rows], "labels": [labels[row] for row in rows]})
        settings = SFTConfig(
            dataset_kwargs={"skip_prepare_dataset": True},
            **trainer_settings(job, lm, config, len(rows) // config.batch, phase),
        )
        trainer = SFTTrainer(
            model=lm.model,
            args=settings,
            train_dataset=data,
            processing_class=lm.tokenizer,
            optimizers=(optimizer, make_scheduler(optimizer, config, start)),
            callbacks=[RunCallback(job, lm, optimizer, config, phase, start, tokens)],
        )
        run_trainer(trainer)
