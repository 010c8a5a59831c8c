"""Supervised fine-tuning on rendered (prompt, response) rows, by trl's SFTTrainer (:mod:`moalign.lm.marked`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from trl import SFTConfig

from moalign.core.errors import RequestError
from moalign.core.records import Response
from moalign.core.seeds import derive
from moalign.lm.chat import training_row
from moalign.lm.marked import RowTrainer
from moalign.lm.trainers import on_one_gpu
from moalign.training.callbacks import order, own_places, train_rows
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
    """Train the active adapter of ``lm`` on rendered prompts and their responses, ``[rows]``; resumes.

    Sampled responses keep their tokens; ``phase`` names the stage in the run's record, metrics and checkpoints.

    Raises RequestError for no rows, or a row whose response is empty.
    """
    if not texts:
        raise RequestError(f"{job.task.card.name}: no rows to train on in stage {phase}")
    if config.steps == 0:
        return
    inputs, labels = encode_rows(lm, texts, responses, config.max_tokens)
    places = order(len(inputs), config.steps, config.batch, derive(job.seed, phase, "order"))

    def make(start: int, settings: dict[str, Any], **arguments: Any) -> RowTrainer:
        rows = own_places(places[start:], config.batch)
        data = {"input_ids": [inputs[row] for row in rows], "labels": [labels[row] for row in rows]}
        options = on_one_gpu(SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, **settings))
        return RowTrainer(args=options, train_dataset=Dataset.from_dict(data), **arguments)

    train_rows(job, lm, config, phase, [len(inputs[row]) for row in places], make)
