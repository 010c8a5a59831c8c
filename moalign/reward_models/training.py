"""Reward models trained on preference pairs by trl's RewardTrainer, saved as plain sequence classifiers.

Of the trainer only ``compute_loss`` is overridden: the model it calls is wrapped, so that each pair is scored by its
own head, and with ``more`` the groups' losses are weighted (:mod:`moalign.reward_models.more`). Rows are tokenised by
the same code as for scoring (:mod:`moalign.rewards.rows`). A resumed run is a trainer over the remaining rows with
weights and optimizer as they were: the result equals the uninterrupted run's, on a CPU bit for bit.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from moalign.core.errors import RequestError
from moalign.core.memory import release
from moalign.core.progress import Progress
from moalign.core.schedule import factor
from moalign.core.seeds import derive
from moalign.lm import model_folder, reproducible
from moalign.lm.adapters import with_adapter
from moalign.lm.finite import FiniteCheck
from moalign.lm.language_model import set_threads
from moalign.lm.loading import first_line
from moalign.lm.optimizer_state import pack_optimizer, unpack_optimizer
from moalign.lm.trainers import checkpointing_option, on_one_gpu, run_trainer
from moalign.reward_models.more import Balancer, HeadWatch, weighted
from moalign.reward_models.pairs import PairSet, row_order
from moalign.reward_models.runs import MODEL, RewardRequest, reading
from moalign.reward_models.settings import RewardSettings
from moalign.rewards.ensemble import write_scales
from moalign.rewards.rows import RowEncoder, check_templates
from moalign.runs import atomic
from moalign.runs.meter import Meter
from moalign.runs.run import Run

PHASE = "train"
MEMBERS = "members"
"""Folder, in its run, of an ensemble's finished members until all are there."""
_LOGGED = ("loss", "grad_norm", "learning_rate", "accuracy", "margin", "mean_reward")


class PairRow(TypedDict):
    """A tokenised pair."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    group: int
    """Number of its data set."""


@dataclass(frozen=True)
class RewardJob:
    """A reward model being trained, or one member of an ensemble."""

    run: Run
    request: RewardRequest
    meter: Meter
    progress: Progress
    member: int | None = None

    @property
    def phase(self) -> str:
        """The phase's name in the run."""
        return PHASE if self.member is None else f"member-{self.member}"

    @property
    def folder(self) -> Path:
        """Where the model is saved."""
        return self.run.path / MODEL if self.member is None else self.run.path / MEMBERS / self.phase

    @property
    def seed(self) -> int:
        """Seed of heads, of the order of pairs and of dropout."""
        return self.request.seed if self.member is None else derive(self.request.seed, self.phase)

    @property
    def sets(self) -> list[PairSet]:
        """What is trained on: the pairs, or a member's own bootstrap sample of every data set."""
        sets = self.request.train_sets
        if self.member is None:
            return sets
        return [pairs.bag(derive(self.seed, "bag", number)) for number, pairs in enumerate(sets)]

    def show(self, what: str, done: int, total: int) -> None:
        """Report progress."""
        members = self.request.settings.members
        self.progress(what if self.member is None else f"member {self.member + 1} of {members}: {what}", done, total)


def train(job: RewardJob) -> dict[str, Any]:
    """Train the model, save it as ``model`` in its run and return notes for the record.

    Of an ensemble it trains one member after the other. Resumes from the run's checkpoint and skips a phase that is
    done. Raises RequestError for a backbone or tokenizer that cannot be used, WorkError when training diverged.
    """
    alone = job.request.settings.members == 1 or job.run.phase_done(PHASE)
    notes = _train_one(job) if alone else _train_members(job)
    atomic.remove_directory(job.run.path / MEMBERS)  # also after a kill between the two
    return notes


def _train_members(job: RewardJob) -> dict[str, Any]:
    """Train one member after the other, and put them together."""
    members = [replace(job, member=number) for number in range(job.request.settings.members)]
    notes = [_train_one(member) for member in members]
    with atomic.directory(job.run.path / MODEL) as folder:  # the first member's, with the others inside
        for member in members:
            shutil.copytree(member.folder, folder / member.phase if member.member else folder, dirs_exist_ok=True)
    together = {"rows_shortened": sum(note["rows_shortened"] for note in notes)}
    job.run.finish_phase(PHASE, meter=job.meter.state(), notes=together)
    return together


def _train_one(job: RewardJob) -> dict[str, Any]:
    if job.run.phase_done(job.phase):
        finished = job.run.phase_info(job.phase)
        job.meter.load(finished["meter"])
        return dict(finished["notes"])
    model, tokenizer = load_backbone(job.request, job.seed)
    encoder = make_encoder(job.request.settings, model, tokenizer)
    model = _fit(job, model, tokenizer, encoder).float()
    notes = {"rows_shortened": encoder.shortened}
    with atomic.directory(job.folder) as folder:
        model.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
        del model  # scoring loads its own
        release()
        _save_scales(folder, job.request)
    job.run.finish_phase(job.phase, meter=job.meter.state(), notes=notes)
    return notes


def _save_scales(folder: Path, request: RewardRequest) -> None:
    """Write every head's mean and sd beside a model whose heads may be members of an ensemble."""
    sets = request.parts["calibration"]
    if any(map(len, sets)) and (request.settings.members > 1 or len(request.heads) > 1):
        prompts = [prompt for pairs in sets for prompt in pairs.prompts * 2]
        responses = [text for pairs in sets for text in pairs.chosen + pairs.rejected]
        write_scales(folder, reading(folder, request.settings), prompts, responses)


def load_backbone(request: RewardRequest, seed: int | None = None) -> tuple[Any, Any]:
    """Return (classifier with fresh heads, tokenizer); the heads depend on ``seed`` alone (None: the request's)."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # moalign shows its own
    heads = request.heads
    folder = model_folder.resolve(request.backbone, request.revision, "--model")
    heads_seed = derive(request.seed if seed is None else seed, "heads")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        torch.manual_seed(heads_seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            num_labels=len(heads),
            ignore_mismatched_sizes=True,  # a backbone that is a classifier already: its head is replaced
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise RequestError(f"--model {folder}: it cannot be loaded as a classifier ({first_line(error)})") from error
    model.config.id2label = dict(enumerate(heads))
    model.config.label2id = {name: index for index, name in enumerate(heads)}
    if len(heads) > 1:
        model.config.problem_type = "multi_label_classification"  # heads do not exclude each other
    if request.settings.reproducible:
        reproducible.in_double(model)
        reproducible.draw([model.score.weight], model.config.initializer_range, heads_seed)
    if tokenizer.pad_token_id is None:  # the head reads the last token that is not padding
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise RequestError(
            f"--model {folder}: its tokenizer has no pad, end or unknown token, so that rows cannot be padded; "
            'add one: tokenizer.add_special_tokens({"pad_token": "<pad>"}), resize the embeddings, save both'
        )
    return model, tokenizer


def make_encoder(settings: RewardSettings, model: Any, tokenizer: Any) -> RowEncoder:
    """Return what turns (prompt, response) into rows, as scoring will."""
    check_templates(settings.template, None, "template")
    return RowEncoder(model, tokenizer, settings.template, None, settings.max_tokens, "--model")


def encode_pairs(sets: Sequence[PairSet], encoder: RowEncoder) -> list[PairRow]:
    """Return one row per pair, data set after data set."""
    rows: list[PairRow] = []
    for number, pairs in enumerate(sets):
        chosen = encoder.rows(list(zip(pairs.prompts, pairs.chosen, strict=True)))
        rejected = encoder.rows(list(zip(pairs.prompts, pairs.rejected, strict=True)))
        rows += [
            PairRow(chosen_ids=better["input_ids"], rejected_ids=worse["input_ids"], group=number)
            for better, worse in zip(chosen, rejected, strict=True)
        ]
    return rows


def _fit(job: RewardJob, model: Any, tokenizer: Any, encoder: RowEncoder) -> Any:
    """Train and return the model, adapters folded in."""
    request, settings = job.request, job.request.settings
    set_threads(model.num_parameters())
    if settings.lora is not None:
        model = with_adapter(model, settings.lora, "default", "lora", "SEQ_CLS")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    sets = job.sets
    rows = encode_pairs(sets, encoder)
    order = row_order([len(pairs) for pairs in sets], request.steps, settings.batch, settings.accumulate, job.seed)
    loop = TrainingLoop(job, model)
    loop.restore()
    loop.rows = [rows[at] for at in order[loop.start * settings.batch :].tolist()]
    if loop.rows:
        run_trainer(make_trainer(loop, model, tokenizer), loop.check.number)
        loop.check.weights({"model": loop.trained})
    return model.merge_and_unload() if settings.lora is not None else model


def make_trainer(loop: TrainingLoop, model: Any, tokenizer: Any) -> PairTrainer:
    """Return the trainer over the loop's rows in the order given."""
    request, settings, on_cpu = loop.job.request, loop.job.request.settings, not torch.cuda.is_available()
    arguments = RewardConfig(
        output_dir=str(loop.job.run.path / "checkpoints"),
        per_device_train_batch_size=settings.batch // settings.accumulate,
        gradient_accumulation_steps=settings.accumulate,
        max_steps=len(loop.rows) // settings.batch,
        max_grad_norm=settings.clip,
        train_sampling_strategy="sequential",
        max_length=None,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        logging_nan_inf_filter=False,  # the default shows an average instead of a NaN: divergence would stay hidden
        disable_tqdm=True,
        use_cpu=on_cpu,
        bf16=not (on_cpu or settings.reproducible),
        seed=derive(loop.job.seed, PHASE) % 2**32,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        **{checkpointing_option(): not on_cpu},
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        loop.optimizer, lambda step: factor(settings.schedule, loop.start + step, request.steps, settings.warmup)
    )
    pad_pairs = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
    return PairTrainer(
        settings.heads == "each",
        loop.balancer,
        model=model,
        args=on_one_gpu(arguments),
        data_collator=lambda pairs: {**pad_pairs(pairs), "group": torch.tensor([pair["group"] for pair in pairs])},
        train_dataset=Dataset.from_list(loop.rows),
        processing_class=tokenizer,
        optimizers=(loop.optimizer, scheduler),
        callbacks=[loop],
    )


class PairTrainer(RewardTrainer):  # type: ignore[misc]
    """trl's trainer with a head per pair (``each``) and, where there is a balancer, weighted groups."""

    def __init__(self, each: bool, balancer: Balancer | None, model: Any, **arguments: Any) -> None:
        config = model.config
        labels = config.id2label, config.label2id
        config.id2label, config.label2id = {0: "reward"}, {"reward": 0}  # trl demands one label; the loss is our own
        super().__init__(model=model, **arguments)
        config.id2label, config.label2id = labels
        self.each = each
        self.balancer = balancer
        self.watch = None if balancer is None else HeadWatch(self.model)
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self.accepts_cache = "use_cache" in inspect.signature(base.forward).parameters

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return trl's loss of a batch whose first half won, or MORE's."""
        group = inputs.pop("group")

        def read(**arguments: Any) -> Any:
            """Call the model; each row's logit is that of its pair's head."""
            if not self.accepts_cache:
                arguments.pop("use_cache", None)
            outputs = model(**arguments)
            if self.each:
                outputs.logits = outputs.logits.gather(1, group.repeat(2).unsqueeze(1))
            return outputs

        if self.balancer is None or self.watch is None:
            return super().compute_loss(read, inputs, return_outputs, num_items_in_batch)
        _, outputs = super().compute_loss(read, inputs, True, num_items_in_batch)
        winner, loser = outputs.logits.squeeze(-1).chunk(2)
        delta = winner - loser
        chosen, rejected = self.watch.states(inputs["input_ids"], self.processing_class.pad_token_id).chunk(2)
        weights = self.balancer.weights(chosen, rejected, delta.detach(), group)
        for number, weight in enumerate(weights.tolist()):
            self._metrics["train"][f"weight_{number}"].append(weight)
        loss = weighted(delta, group, weights)
        return (loss, outputs) if return_outputs else loss


class TrainingLoop(TrainerCallback):  # type: ignore[misc]
    """What is trained, and what happens around every step: seeds, counted tokens, log, progress, checkpoints."""

    def __init__(self, job: RewardJob, model: Any) -> None:
        """Begin at the first step; :meth:`restore` goes on from a checkpoint."""
        settings, groups = job.request.settings, len(job.request.train_sets)
        self.job = job
        self.rows: list[PairRow] = []
        """The rows of the steps that are left, in order."""
        self.start = 0
        """Steps done before this process began."""
        self.trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=settings.lr, weight_decay=settings.weight_decay)
        self.check = FiniteCheck(job.run.record.method, job.phase, settings.lr, settings.clip)
        more = settings.loss == "more"
        self.balancer = Balancer(groups, settings.normalise_gradients, settings.momentum) if more else None

    def restore(self) -> None:
        """Go on from the run's checkpoint, if there is one."""
        run = self.job.run
        checkpoint = run.load_checkpoint(self.job.phase)
        run.truncate_metrics(self.job.phase, 0 if checkpoint is None else checkpoint.step)
        if checkpoint is None:
            return
        with torch.no_grad():
            for name, value in self.trained.items():
                value.copy_(checkpoint.tensors[f"model.{name}"])
        if self.balancer is not None:
            self.balancer.memory = checkpoint.tensors.get("more.memory")
        unpack_optimizer(self.optimizer, checkpoint.tensors, checkpoint.state["optimizer"])
        self.job.meter.load(checkpoint.state["meter"])
        self.start = checkpoint.step

    def save(self, step: int) -> None:
        """Write a checkpoint; raises WorkError for weights that are not finite."""
        self.check.weights({"model": self.trained})
        tensors, plain = pack_optimizer(self.optimizer)
        tensors |= {f"model.{name}": value for name, value in self.trained.items()}
        if self.balancer is not None and self.balancer.memory is not None:
            tensors["more.memory"] = self.balancer.memory
        state = {"optimizer": plain, "meter": self.job.meter.state()}
        self.job.run.save_checkpoint(self.job.phase, step, tensors, state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.check.step = self.start + state.global_step + 1
        torch.manual_seed(derive(self.job.seed, PHASE, self.start + state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        request, settings = self.job.request, self.job.request.settings
        if settings.reproducible:
            reproducible.to_grid(self.trained.values())
        rows = self.rows[(state.global_step - 1) * settings.batch : state.global_step * settings.batch]
        self.job.meter.add_tokens_trained(sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows))
        done = self.start + state.global_step
        # At checkpoints, too: a line holds means since the last one, and a resumed run starts at its checkpoint.
        due = 0 in (done % settings.log_every, done % settings.checkpoint_every)
        control.should_log = due or done == request.steps
        self.job.show(f"training on {sum(map(len, request.train_sets))} pairs", done, request.steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        if not logs or "loss" not in logs:
            return
        settings, step = self.job.request.settings, self.start + state.global_step
        metrics = {name: float(x) for name, x in logs.items() if name in _LOGGED or name.startswith("weight_")}
        self.check.number("loss", metrics["loss"])
        self.job.run.log(step, self.job.phase, **metrics, **self.job.meter.cost())
        # After its line: a kill between the two must not lose the line.
        if step % settings.checkpoint_every == 0 and step < self.job.request.steps:
            self.save(step)
