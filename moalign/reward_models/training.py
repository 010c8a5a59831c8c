"""Reward models trained on preference pairs by trl's RewardTrainer, saved as plain sequence classifiers.

Of the trainer only ``compute_loss`` is overridden: the model it calls is wrapped, so that each pair is scored by its
own head, and with ``more`` the groups' losses are weighted (:mod:`moalign.reward_models.more`). Rows are tokenised by
the same code as for scoring (:mod:`moalign.rewards.rows`). A resumed run is a trainer over the remaining rows with
weights and optimizer as they were: the result equals the uninterrupted run's bit for bit.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from moalign.core.errors import RequestError, WorkError
from moalign.core.progress import Progress
from moalign.core.schedule import factor
from moalign.core.seeds import derive
from moalign.lm import model_folder
from moalign.reward_models.pairs import PairSet, row_order
from moalign.reward_models.settings import RewardSettings
from moalign.rewards.rows import RowEncoder, check_templates, longest

if TYPE_CHECKING:
    from moalign.reward_models.more import Balancer
    from moalign.runs.meter import Meter
    from moalign.runs.run import Run

PHASE = "train"
MODEL = "model"
"""The model's folder inside its run."""


class PairRow(TypedDict):
    """A tokenised pair."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    group: int
    """Number of its data set."""
    tokens: int
    """Tokens of both."""


@dataclass
class RewardJob:
    """A reward model being trained."""

    run: Run
    settings: RewardSettings
    backbone: str
    """A causal language model or a classifier: folder or hub id."""
    revision: str | None
    sets: Sequence[PairSet]
    """The training pairs of every data set."""
    seed: int
    meter: Meter
    progress: Progress
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def heads(self) -> list[str]:
        """The names of the model's outputs."""
        return [pair_set.name for pair_set in self.sets] if self.settings.heads == "each" else ["reward"]

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        total = sum(map(len, self.sets))
        return self.settings.steps or math.ceil(self.settings.epochs * total / self.settings.batch)


def check_loss(settings: RewardSettings, names: Sequence[str]) -> tuple[RewardSettings, str | None]:
    """Return the settings that fit these data sets, and a notice for the user, if any.

    Raises RequestError for several data sets with ``bt`` and for a batch that cannot hold all groups alike.
    """
    notice = None
    if len(names) == 1 and settings.loss != "bt" and settings.heads == "shared":
        notice = f"loss {settings.loss}: there is one data set only ({names[0]}), so this is plain Bradley-Terry (bt)"
        settings = settings.model_copy(update={"loss": "bt"})
    if len(names) > 1 and settings.loss == "bt":
        raise RequestError(
            f"loss bt is for one data set; found {len(names)} ({', '.join(names[:5])}); "
            "take --loss multitask or --loss more"
        )
    parts = len(names) * settings.accumulate
    if settings.batch % parts:
        near = max(parts, round(settings.batch / parts) * parts)
        raise RequestError(
            f"batch {settings.batch}: every batch holds as many pairs of each of the {len(names)} data sets, so it "
            f"must be a multiple of data sets x accumulate = {parts}; nearest: --set batch={near}"
        )
    return settings, notice


def train(job: RewardJob) -> Path:
    """Train the model and return its folder; resumes from the run's checkpoint and skips a phase that is done.

    Raises:
        RequestError: a backbone or tokenizer that cannot be used.
        WorkError: training diverged.
    """
    folder = job.run.path / MODEL
    if job.run.phase_done(PHASE):
        finished = job.run.phase_info(PHASE)
        job.meter.load(finished["meter"])
        job.notes.update(finished["notes"])
        return folder
    from moalign.lm.trainers import quiet_libraries
    from moalign.runs import atomic

    with quiet_libraries():
        model, tokenizer = load_backbone(job)
        encoder = make_encoder(job.settings, model, tokenizer)
        model = _fit(job, model, tokenizer, encoder)
    job.notes["rows_shortened"] = encoder.shortened
    with atomic.directory(folder) as place:
        model.save_pretrained(place, safe_serialization=True)
        tokenizer.save_pretrained(place)
    job.run.finish_phase(PHASE, meter=job.meter.state(), notes=job.notes)
    return folder


def load_backbone(job: RewardJob) -> tuple[Any, Any]:
    """Return (classifier with fresh heads, tokenizer); the heads depend on the seed alone."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # moalign shows its own
    folder = model_folder.resolve(job.backbone, job.revision, "--model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        torch.manual_seed(derive(job.seed, "heads"))
        model = AutoModelForSequenceClassification.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            num_labels=len(job.heads),
            ignore_mismatched_sizes=True,  # a backbone that is a classifier already: its head is replaced
        )
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise RequestError(f"--model {folder}: it cannot be loaded as a classifier ({first})") from error
    model.config.id2label = dict(enumerate(job.heads))
    model.config.label2id = {name: index for index, name in enumerate(job.heads)}
    if len(job.heads) > 1:
        model.config.problem_type = "multi_label_classification"  # heads do not exclude each other
    _settle_padding(tokenizer, folder)
    return model, tokenizer


def _settle_padding(tokenizer: Any, folder: Path) -> None:
    """Give the tokenizer a padding token: the head reads the last token that is not it."""
    if tokenizer.pad_token_id is not None:
        return
    token = tokenizer.eos_token or tokenizer.unk_token
    if token is None:
        raise RequestError(
            f"--model {folder}: its tokenizer has no pad, end or unknown token, so that rows cannot be padded; "
            'add one: tokenizer.add_special_tokens({"pad_token": "<pad>"}), resize the embeddings, save both'
        )
    tokenizer.pad_token = token


def make_encoder(settings: RewardSettings, model: Any, tokenizer: Any) -> RowEncoder:
    """Return what turns (prompt, response) into rows, as scoring will."""
    check_templates(settings.template, None, "template")
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    most = longest(model, tokenizer, settings.max_tokens)
    return RowEncoder(tokenizer, settings.template, None, most, vocabulary, "--model")


def _fit(job: RewardJob, model: Any, tokenizer: Any, encoder: RowEncoder) -> Any:
    """Train and return the model, adapters folded in."""
    import torch

    from moalign.lm.language_model import set_threads
    from moalign.lm.trainers import run_trainer

    settings = job.settings
    set_threads(model.num_parameters())
    if settings.lora is not None:
        model = _with_adapters(model, settings)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = _rows(job, encoder)
    sizes = [len(pair_set) for pair_set in job.sets]
    order = row_order(sizes, job.steps, settings.batch, settings.accumulate, job.seed)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=settings.lr, weight_decay=settings.weight_decay)
    balancer = None
    if settings.loss == "more":
        from moalign.reward_models.more import Balancer

        balancer = Balancer(len(job.sets), settings.normalise_gradients, settings.momentum)
    start = _resume(job, trained, optimizer, balancer)
    if start < job.steps:
        here = [rows[at] for at in order[start * settings.batch :].tolist()]
        callback = _make_callback(job, trained, optimizer, balancer, start, [row["tokens"] for row in here])
        run_trainer(make_trainer(job, model, tokenizer, here, (optimizer, start), callback, balancer))
    return model.merge_and_unload() if settings.lora is not None else model


def _with_adapters(model: Any, settings: RewardSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    spec = settings.lora
    assert spec is not None
    targets: Any = spec.targets
    config = LoraConfig(
        r=spec.r, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=targets, task_type="SEQ_CLS"
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise RequestError(f"lora.targets {spec.targets!r}: {str(error).splitlines()[0]}") from None


def _rows(job: RewardJob, encoder: RowEncoder) -> list[PairRow]:
    """Return one row per pair, data set after data set."""
    rows = []
    for number, pair_set in enumerate(job.sets):
        chosen = encoder.rows(list(zip(pair_set.prompts, pair_set.chosen, strict=True)))
        rejected = encoder.rows(list(zip(pair_set.prompts, pair_set.rejected, strict=True)))
        for better, worse in zip(chosen, rejected, strict=True):
            winner, loser = better["input_ids"], worse["input_ids"]
            tokens = len(winner) + len(loser)
            rows.append(PairRow(chosen_ids=winner, rejected_ids=loser, group=number, tokens=tokens))
    return rows


def make_trainer(
    job: RewardJob,
    model: Any,
    tokenizer: Any,
    rows: Sequence[PairRow],
    optimizer: tuple[Any, int],
    callback: Any,
    balancer: Balancer | None,
) -> Any:
    """Return trl's trainer over ``rows`` in the order given; ``optimizer`` comes with the steps already done."""
    import torch
    from datasets import Dataset
    from trl import RewardConfig

    from moalign.lm.trainers import checkpointing_option

    settings, on_cpu = job.settings, not torch.cuda.is_available()
    arguments = RewardConfig(
        output_dir=str(job.run.path / "checkpoints"),
        per_device_train_batch_size=settings.batch // settings.accumulate,
        gradient_accumulation_steps=settings.accumulate,
        max_steps=len(rows) // settings.batch,
        max_grad_norm=settings.clip,
        train_sampling_strategy="sequential",
        max_length=None,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        logging_nan_inf_filter=False,  # the default shows an average instead of a NaN: divergence would stay hidden
        disable_tqdm=True,
        use_cpu=on_cpu,
        bf16=not on_cpu,
        seed=derive(job.seed, PHASE) % 2**32,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        **{checkpointing_option(): not on_cpu},
    )
    inner, start = optimizer
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        inner, lambda step: factor(settings.schedule, start + step, job.steps, settings.warmup)
    )
    columns = {
        "chosen_ids": [row["chosen_ids"] for row in rows],
        "rejected_ids": [row["rejected_ids"] for row in rows],
        "group": [row["group"] for row in rows],
    }
    with one_label(model.config):
        trainer = _trainer_class()(
            model=model,
            args=arguments,
            data_collator=_collator(tokenizer.pad_token_id),
            train_dataset=Dataset.from_dict(columns),
            processing_class=tokenizer,
            optimizers=(inner, scheduler),
            callbacks=[callback],
        )
    trainer.prepare(job.settings, balancer)
    return trainer


@contextmanager
def one_label(config: Any) -> Iterator[None]:
    """Within the block the config names one label, as trl requires when a trainer is made; the loss is our own."""
    labels = config.id2label, config.label2id
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}
    try:
        yield
    finally:
        config.id2label, config.label2id = labels


def _collator(pad: int) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return trl's collator, which also passes on every pair's group."""
    import torch
    from trl.trainer.reward_trainer import DataCollatorForPreference

    inner = DataCollatorForPreference(pad_token_id=pad)

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**inner(examples), "group": torch.tensor([example["group"] for example in examples])}

    return collate


def _trainer_class() -> Any:
    from trl import RewardTrainer

    class Trainer(RewardTrainer):  # type: ignore[misc]
        """trl's trainer with a head per pair and, for ``more``, weighted groups."""

        def prepare(self, settings: RewardSettings, balancer: Balancer | None) -> None:
            """Set how the heads are read; ``balancer`` weighs the groups."""
            from moalign.reward_models.more import HeadWatch

            self.each = settings.heads == "each"
            self.balancer: Any = balancer
            self.watch: Any = None if balancer is None else HeadWatch(self.model)
            self.accepts_cache = "use_cache" in inspect.signature(_unwrapped(self.model).forward).parameters

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            group = inputs.pop("group")

            def read(**arguments: Any) -> Any:
                """Call the model; each row's logit is that of its pair's head."""
                if not self.accepts_cache:
                    arguments.pop("use_cache", None)
                outputs = model(**arguments)
                if self.each:
                    outputs.logits = outputs.logits.gather(1, group.repeat(2).unsqueeze(1))
                return outputs

            if self.balancer is None:
                return super().compute_loss(read, inputs, return_outputs, num_items_in_batch)
            with self.watch.watching():
                _, outputs = super().compute_loss(read, inputs, True, num_items_in_batch)
            loss = self.balance(outputs, inputs["input_ids"], group)
            return (loss, outputs) if return_outputs else loss

        def balance(self, outputs: Any, input_ids: Any, group: Any) -> Any:
            """Return MORE's loss of a batch whose first half won."""
            from moalign.reward_models.more import weighted

            winner, loser = outputs.logits.squeeze(-1).chunk(2)
            chosen, rejected = self.watch.states(input_ids, self.processing_class.pad_token_id).chunk(2)
            delta = winner - loser
            weights = self.balancer.weights(chosen, rejected, delta.detach(), group)
            for number, weight in enumerate(weights.tolist()):
                self._metrics["train"][f"weight_{number}"].append(weight)
            return weighted(delta, group, weights)

    return Trainer


def _unwrapped(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _resume(job: RewardJob, trained: dict[str, Any], optimizer: Any, balancer: Balancer | None) -> int:
    """Restore weights, optimizer, momentum and meter from the checkpoint; returns the steps already done."""
    import torch

    from moalign.lm.optimizer_state import unpack_optimizer

    checkpoint = job.run.load_checkpoint(PHASE)
    job.run.truncate_metrics(PHASE, 0 if checkpoint is None else checkpoint.step)
    if checkpoint is None:
        return 0
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(checkpoint.tensors[f"model.{name}"])
    if balancer is not None:
        balancer.memory = checkpoint.tensors.get("more.memory")
    unpack_optimizer(optimizer, checkpoint.tensors, checkpoint.state["optimizer"])
    job.meter.load(checkpoint.state["meter"])
    return checkpoint.step


_LOGGED = ("loss", "grad_norm", "learning_rate", "accuracy", "margin", "mean_reward")


def _make_callback(
    job: RewardJob,
    trained: dict[str, Any],
    optimizer: Any,
    balancer: Balancer | None,
    start: int,
    lengths: list[int],
) -> Any:
    """Return the callback that seeds every step, counts tokens, logs, reports and saves checkpoints."""
    import torch
    from transformers import TrainerCallback

    from moalign.lm.optimizer_state import pack_optimizer

    settings = job.settings

    class RunCallback(TrainerCallback):  # type: ignore[misc]
        """What happens around every optimiser step; see :func:`_make_callback`."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            torch.manual_seed(derive(job.seed, PHASE, start + state.global_step))

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            done = start + state.global_step
            job.meter.add_tokens_trained(
                sum(lengths[(state.global_step - 1) * settings.batch : state.global_step * settings.batch])
            )
            # At checkpoints, too: a line holds means since the last one, and a resumed run starts at its checkpoint.
            control.should_log = done == job.steps or 0 in (done % settings.log_every, done % settings.checkpoint_every)
            job.progress(f"training on {sum(map(len, job.sets))} pairs", done, job.steps)
            if not control.should_log:
                self.save(done)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if not logs or "loss" not in logs:
                return
            step = start + state.global_step
            metrics = {name: float(logs[name]) for name in _LOGGED if name in logs}
            metrics |= {name: float(value) for name, value in logs.items() if name.startswith("weight_")}
            if not math.isfinite(metrics["loss"]):
                raise WorkError(
                    f"step {step}: the loss is {metrics['loss']}; training diverged: lower lr ({settings.lr:g})"
                )
            job.run.log(step, PHASE, **metrics, **job.meter.cost())
            self.save(step)  # after its line: a kill between the two must not lose the line

        def save(self, step: int) -> None:
            if step % settings.checkpoint_every or step >= job.steps:
                return
            tensors, plain = pack_optimizer(optimizer)
            tensors.update({f"model.{name}": value for name, value in trained.items()})
            if balancer is not None and balancer.memory is not None:
                tensors["more.memory"] = balancer.memory
            job.run.save_checkpoint(PHASE, step, tensors, {"optimizer": plain, "meter": job.meter.state()})

    return RunCallback()
