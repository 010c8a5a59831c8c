"""Reward models through trl's trainer: the loss, the hooks that are used, resume bit for bit, what is saved."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file

from moalign.config.recipe import LoraSpec
from moalign.core.errors import RequestError, WorkError
from moalign.core.progress import silent
from moalign.reward_models import runs, training
from moalign.reward_models.pairs import PairSet, row_order
from moalign.reward_models.runs import RewardRequest
from moalign.reward_models.settings import RewardSettings
from moalign.reward_models.training import RewardJob
from moalign.rewards.hf_classifier import ClassifierScorer
from moalign.runs.meter import Meter
from moalign.runs.run import Run

Ask = Callable[..., RewardRequest]
Trained = Callable[..., tuple[RewardRequest, Run]]


def weights(run: Any) -> dict[str, torch.Tensor]:
    return dict(load_file(run.path / "model" / "model.safetensors"))


class Stop(Exception):
    pass


def stop_at(step: int) -> Callable[[str, int, int], None]:
    def progress(what: str, done: int, total: int) -> None:
        if done == step:
            raise Stop

    return progress


# -- the trainer ---------------------------------------------------------------------------------------------------


def test_the_hooks_of_trl_are_as_they_are_used() -> None:
    """An upgrade that changes one of these must fail here, not train something else."""
    from trl import RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    assert list(inspect.signature(RewardTrainer.compute_loss).parameters) == [
        "self", "model", "inputs", "return_outputs", "num_items_in_batch",
    ]  # fmt: skip
    source = inspect.getsource(RewardTrainer.compute_loss)
    assert "outputs = model(**inputs)" in source
    assert "torch.chunk(outputs.logits.squeeze(-1), chunks=2)" in source
    assert 'getattr(model.config, "num_labels", None) != 1' in inspect.getsource(RewardTrainer.__init__)
    rows = DataCollatorForPreference(pad_token_id=0)([{"chosen_ids": [5, 6], "rejected_ids": [7]}] * 2)
    assert rows["input_ids"].tolist() == [[5, 6], [5, 6], [7, 0], [7, 0]]  # winners first


def trainer_of(request: RewardRequest, rows: int = 6) -> tuple[Any, Any, list[training.PairRow]]:
    """Return a trainer (before training), its model and its first rows."""
    store = runs.RewardStore(request.results)
    run = store.open("x", "toy", {"a": 1}, card_hash="x", seed=0)
    job = RewardJob(run, request, Meter(), silent)
    model, tokenizer = training.load_backbone(request)
    encoded = training.encode_pairs(request.train_sets, training.make_encoder(request.settings, model, tokenizer))
    order = row_order([len(pairs) for pairs in request.train_sets], 1, rows, 1, 0)
    loop = training.TrainingLoop(job, model)
    loop.rows = [encoded[at] for at in order]
    return training.make_trainer(loop, model, tokenizer), model, loop.rows


def logits(model: Any, row: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([row])).logits[0]


def test_a_model_is_gone_when_scoring_loads_its_own(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer is a cycle that would hold it, and what its optimiser remembers, until something collects."""
    load, save, loaded, alive = training.load_backbone, training._save_scales, [], []

    def noted(*given: Any) -> Any:
        model, tokenizer = load(*given)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(training, "load_backbone", noted)
    monkeypatch.setattr(
        training, "_save_scales", lambda *given: (alive.append([ref() is not None for ref in loaded]), save(*given))
    )
    runs.obtain(ask())
    assert alive == [[False]]


@pytest.mark.parametrize("loss", ["multitask", "more"])
def test_the_loss_equals_one_computed_pair_by_pair(ask: Ask, loss: str) -> None:
    trainer, model, rows = trainer_of(ask(3, loss=loss))
    batch = trainer.data_collator(rows)
    group = batch["group"].clone()
    loss_of_batch = trainer.compute_loss(model, batch)
    deltas = torch.stack([logits(model, row["chosen_ids"]) - logits(model, row["rejected_ids"]) for row in rows])[:, 0]
    per_group = torch.stack([-F.logsigmoid(deltas[group == number]).mean() for number in range(3)])
    if loss == "multitask":
        torch.testing.assert_close(loss_of_batch, per_group.mean())
        return
    from moalign.losses.min_norm import min_norm

    gradients = [
        torch.autograd.grad(group_loss, model.score.weight, retain_graph=True)[0][0] for group_loss in per_group
    ]
    unit = F.normalize(torch.stack(gradients), dim=1)
    shares = torch.tensor(min_norm((unit @ unit.T).double().numpy()), dtype=torch.float32)
    torch.testing.assert_close(loss_of_batch, (shares * per_group).sum(), rtol=1e-4, atol=1e-5)
    assert (shares > 0.01).sum() >= 2


def test_each_pair_is_read_off_its_own_head(ask: Ask) -> None:
    trainer, model, rows = trainer_of(ask(3, heads="each"))
    assert model.config.num_labels == 3
    assert model.config.id2label == {0: "eager", 1: "careful", 2: "playful"}
    loss_of_batch = trainer.compute_loss(model, trainer.data_collator(rows))
    losses = []
    for row in rows:
        delta = logits(model, row["chosen_ids"]) - logits(model, row["rejected_ids"])
        losses.append(-F.logsigmoid(delta[row["group"]]))
    torch.testing.assert_close(loss_of_batch, torch.stack(losses).mean())
    only_second = [row for row in rows if row["group"] == 1] * 2
    model.zero_grad()
    trainer.compute_loss(model, trainer.data_collator(only_second)).backward()
    slopes = model.score.weight.grad.abs().sum(dim=1)
    assert slopes[1] > 0
    assert slopes[[0, 2]].tolist() == [0.0, 0.0]


# -- the order of rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2])
def test_every_part_of_a_step_holds_as_many_pairs_of_every_data_set(parts: int) -> None:
    sizes, batch, steps = [7, 20, 4], 12, 9
    order = row_order(sizes, steps, batch, parts, seed=3)
    edges = np.cumsum([0, *sizes])
    group = np.searchsorted(edges, order, side="right") - 1
    for part in group.reshape(steps * parts, batch // parts):
        assert np.bincount(part, minlength=3).tolist() == [batch // parts // 3] * 3
    for number, size in enumerate(sizes):  # every pass over a data set takes each pair once
        mine = order[group == number] - edges[number]
        for first in range(0, len(mine) - size + 1, size):
            assert sorted(mine[first : first + size]) == list(range(size))
    assert order.tolist() == row_order(sizes, steps, batch, parts, seed=3).tolist()
    assert order.tolist() != row_order(sizes, steps, batch, parts, seed=4).tolist()


# -- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "settings"),
    [
        (1, {}),
        (2, {"loss": "more", "momentum": 0.5, "log_every": 3}),
        (2, {"heads": "each", "accumulate": 3}),
        (2, {"lora": LoraSpec(r=2, alpha=4, dropout=0.1)}),
    ],
)
def test_resume_is_bit_for_bit(ask: Ask, groups: int, settings: dict[str, Any]) -> None:
    whole, _ = runs.obtain(ask(groups, "whole", **settings))
    with pytest.raises(Stop):
        runs.obtain(ask(groups, "parts", **settings), stop_at(3))
    broken = runs.RewardStore(ask(groups, "parts", **settings).results).runs()[0]
    assert broken.record.status == "failed"
    assert not (broken.path / "model").exists()
    resumed, trained_before = runs.obtain(ask(groups, "parts", **settings))
    assert (trained_before, resumed.path.name, resumed.record.status) == (False, whole.path.name, "done")
    left, right = weights(whole), weights(resumed)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0)
    strip = ("seconds", "peak_memory_bytes")
    lines = [[{k: v for k, v in line.items() if k not in strip} for line in run.metrics()] for run in (whole, resumed)]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == ([2, 3, 4] if "log_every" in settings else [1, 2, 3, 4])
    assert whole.record.cost.tokens_trained == resumed.record.cost.tokens_trained > 0


def test_a_finished_run_is_found_and_another_request_is_another_run(ask: Ask) -> None:
    first, trained_before = runs.obtain(ask())
    assert not trained_before
    again, trained_before = runs.obtain(ask())
    assert (trained_before, again.path) == (True, first.path)
    others = [ask(lr=2e-2), ask(count=41), ask(loss="more"), ask(3)]
    assert len({first.path, *(runs.RewardStore(r.results).root / str(r.identity()) for r in others)}) == 5


def test_the_seed_decides_and_nothing_else(ask: Ask) -> None:
    torch.manual_seed(1)
    first, _ = runs.obtain(ask(where="one"))
    torch.manual_seed(2)
    torch.rand(5)
    second, _ = runs.obtain(ask(where="two"))
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name])


@pytest.mark.parametrize(
    ("groups", "settings"), [(2, {}), (3, {"heads": "each"}), (2, {"lora": LoraSpec(r=2, alpha=4)})]
)
def test_the_folder_is_an_objective_without_further_work(
    trained: Trained, groups: int, settings: dict[str, Any]
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    request, run = trained(groups, **settings)
    folder = run.path / "model"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert not list(run.path.rglob("*.bin")) + list(run.path.rglob("*.pt"))
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    heads = run.record.notes["heads"]
    assert heads == (["eager", "careful", "playful"] if groups == 3 else ["reward"])
    pair_set = request.parts["eval"][0]
    for index, head in enumerate(heads):
        spec = runs.objective(run, "x", head if len(heads) > 1 else None)
        scores = ClassifierScorer(spec, Path()).score(pair_set.prompts, pair_set.chosen)
        for at in range(len(pair_set)):
            given = tokenizer(f"{pair_set.prompts[at]} {pair_set.chosen[at]}", return_tensors="pt")
            with torch.no_grad():
                expected = model(**given).logits[0, index].item()
            assert scores[at] == pytest.approx(expected, abs=1e-4)


def test_training_on_clear_labels_learns_them(ask: Ask, labelled: Callable[..., list[PairSet]], tmp_path: Path) -> None:
    """Pairs of which one ends well and the other does not: within some steps the model tells them apart."""
    pair_set = PairSet("clear")
    for row, prompt in enumerate(labelled(1, 60)[0].prompts):
        pair_set.add(f"{prompt}", "stay safe .", "and eat cake ." if row % 2 else "good luck .")
    settings = RewardSettings(**{**ask(1).settings.model_dump(), "steps": 30, "batch": 8})
    request = runs.make("clear", settings, ask(1).backbone, [pair_set], results=tmp_path)
    run, _ = runs.obtain(request)
    lines = run.metrics()
    assert lines[-1]["accuracy"] == 1.0
    assert lines[-1]["loss"] < 0.3 < lines[0]["loss"]


def test_the_rows_that_train_are_the_rows_that_score(ask: Ask, labelled: Callable[..., list[PairSet]]) -> None:
    """Long prompts lose their start in training as they do in scoring; the answer stays whole."""
    request = ask(1, max_tokens=24)
    run, _ = runs.obtain(request)
    assert run.record.notes["rows_shortened"] > 0
    assert runs.objective(run).max_length == 24
    rows = trainer_of(ask(1, "b", max_tokens=24))[2]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(request.backbone)
    texts = [text for pair_set in request.train_sets for text in pair_set.chosen]
    answers = {tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts}
    for row in rows:
        assert len(row["chosen_ids"]) <= 24
        assert any(tuple(row["chosen_ids"][-len(answer) :]) == answer for answer in answers)


# -- what is refused -----------------------------------------------------------------------------------------------


def test_one_data_set_makes_more_plain_bradley_terry_and_says_so(ask: Ask) -> None:
    request = ask(1, loss="more")
    assert request.settings.loss == "bt"
    assert request.notice == ("loss more: there is one data set only (eager), so this is plain Bradley-Terry (bt)")
    plain = ask(1)
    assert request.identity() == plain.identity()


def test_more_on_two_data_sets_says_that_it_weighs_nothing(ask: Ask) -> None:
    notice = ask(2, loss="more").notice
    assert notice is not None and "trains as multitask" in notice
    assert ask(2, loss="more", normalise_gradients=False).notice is None
    assert ask(2, loss="multitask").notice is ask(3, loss="more", batch=6).notice is None


@pytest.mark.parametrize(
    ("groups", "settings", "message"),
    [
        (3, {"loss": "bt"}, "loss bt is for one data set; found 3 (eager, careful, playful)"),
        (3, {"batch": 7}, "must be a multiple of data sets x accumulate = 3; nearest: --set batch=6"),
        (2, {"batch": 2, "accumulate": 2}, "= 4; nearest: --set batch=4"),
    ],
)
def test_settings_that_do_not_fit_the_data(ask: Ask, groups: int, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        ask(groups, **settings)
    assert message in str(caught.value)


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="heads: each goes with loss: multitask"):
        RewardSettings(heads="each", loss="more")
    with pytest.raises(ValueError, match="batch must be a multiple of accumulate"):
        RewardSettings(batch=5, accumulate=2)


def copy_with_tokenizer(random_base: Path, folder: Path, *removed: str) -> Path:
    import shutil

    shutil.copytree(random_base, folder)
    path = folder / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in removed}
    path.write_text(json.dumps(kept))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    return folder


def test_a_tokenizer_without_pad_token_is_lent_its_end_token(
    random_base: Path, tmp_path: Path, labelled: Callable[..., list[PairSet]], ask: Ask
) -> None:
    folder = copy_with_tokenizer(random_base, tmp_path / "no-pad", "pad_token")
    request = runs.make("toy", ask(1).settings, str(folder), labelled(1), results=tmp_path)
    run, _ = runs.obtain(request)
    config_json = json.loads((run.path / "model" / "config.json").read_text())
    assert config_json["pad_token_id"] == config_json["eos_token_id"]
    pair_set = request.parts["eval"][0]
    alone = ClassifierScorer(runs.objective(run), Path())
    batched = ClassifierScorer(runs.objective(run), Path()).score(pair_set.prompts, pair_set.chosen)
    assert batched == pytest.approx(
        [alone.score([p], [r])[0] for p, r in zip(pair_set.prompts, pair_set.chosen, strict=True)]
    )


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(
    random_base: Path, tmp_path: Path, labelled: Callable[..., list[PairSet]], ask: Ask
) -> None:
    folder = copy_with_tokenizer(random_base, tmp_path / "bare", "pad_token", "eos_token", "unk_token")
    with pytest.raises(RequestError, match="has no pad, end or unknown token"):
        runs.obtain(runs.make("toy", ask(1).settings, str(folder), labelled(1), results=tmp_path))


@pytest.mark.parametrize(
    ("steps", "told"), [(8, "step 2: the gradient norm is nan"), (1, "step 1: .* tensors of weights")]
)
def test_divergence_is_told_and_told_again(ask: Ask, steps: int, told: str) -> None:
    for _ in range(2):
        with pytest.raises(WorkError, match=f"phase train, {told}.* so training has diverged; try a smaller lr"):
            runs.obtain(ask(1, lr=1e30, schedule="constant", steps=steps))


def test_an_empty_split_is_told(ask: Ask, labelled: Callable[..., list[PairSet]], tmp_path: Path) -> None:
    pair_set = PairSet("few")
    pair_set.add("a", "b", "c")
    with pytest.raises(RequestError, match="the split .* of few is empty"):
        runs.make("toy", ask(1).settings, ask(1).backbone, [pair_set], results=tmp_path)


def test_a_template_with_an_unknown_field_is_refused(ask: Ask) -> None:
    with pytest.raises(RequestError, match="unknown field {reply}"):
        runs.obtain(ask(1, template="{prompt} {reply}"))


ODD = ["", "ja, 好的 🙂 naïve e\u0301", "\n\nHuman: {prompt}"]
"""An empty answer, mixed languages and emoji, template fields inside a text."""


@pytest.mark.parametrize(
    "texts",
    [
        pytest.param(ODD, id="all three"),
        pytest.param(ODD[:1], id="empty", marks=pytest.mark.slow),
        pytest.param(ODD[1:2], id="languages and emoji", marks=pytest.mark.slow),
        pytest.param(ODD[2:], id="template fields", marks=pytest.mark.slow),
    ],
)
def test_odd_answers_train_and_score(
    ask: Ask, labelled: Callable[..., list[PairSet]], tmp_path: Path, texts: list[str]
) -> None:
    pair_set = PairSet("odd")
    for row, prompt in enumerate(labelled(1, 40)[0].prompts):
        pair_set.add(prompt, texts[row % len(texts)], f"use a hot pan {row % 3}")
    run, _ = runs.obtain(runs.make("odd", ask(1).settings, ask(1).backbone, [pair_set], results=tmp_path))
    scorer = ClassifierScorer(runs.objective(run), Path())
    alone = [scorer.score(["how do i make soup ?"], [text])[0] for text in ODD]
    assert np.isfinite(alone).all()
    assert scorer.score(["how do i make soup ?"] * len(ODD), ODD) == pytest.approx(alone, abs=1e-6)


# -- the same on every machine --------------------------------------------------------------------------

TRAIN = """
import json, sys
from pathlib import Path
from moalign.reward_models.runs import make, obtain
from moalign.reward_models.settings import RewardSettings
from moalign.tasks.sandbox import annotators, world

base, results, settings = sys.argv[1], Path(sys.argv[2]), RewardSettings(**json.loads(sys.argv[3]))
pairs = annotators.label(annotators.DIVERSE[:2], world.prompts(), 40, 0)
print(obtain(make("toy", settings, base, pairs, results=results))[0].path / "model" / "model.safetensors")
"""


@pytest.mark.slow
@pytest.mark.parametrize("reproducible", [True, False])
def test_another_processor_trains_the_same_reward_model(
    reproducible: bool, other_processor: dict[str, str], random_base: Path, ask: Ask, tmp_path: Path
) -> None:
    """Without the setting there is a difference, so the other code path really was taken."""
    settings = {**ask(heads="each").settings.model_dump(mode="json"), "reproducible": reproducible}
    sums = set()
    for number, environment in enumerate(({}, other_processor)):
        told = [sys.executable, "-c", TRAIN, str(random_base), str(tmp_path / str(number)), json.dumps(settings)]
        done = subprocess.run(told, check=True, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
        weights = load_file(done.stdout.split()[-1])
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        sums.add(hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest())
    assert len(sums) == (1 if reproducible else 2)


def test_reproducible_is_refused_with_adapters() -> None:
    with pytest.raises(ValidationError, match=r"reproducible: true is for training of all weights"):
        RewardSettings(reproducible=True, lora=LoraSpec())
