"""PCM: experts mixed at every token by a control model; what it trains, answers, resumes and refuses."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moalign.core.errors import RequestError
from moalign.experiment.train import Plan, TrainRequest, context_of, plan, train
from moalign.lm import adapters
from moalign.lm.mixture import Constant, Mixture, Space
from moalign.lm.sampler import NextToken, generate
from moalign.lm.side_by_side import SideBySide
from moalign.methods import pcm, registry
from moalign.methods.pcm import PHASE, base_scores, gains
from moalign.policies.controlled import MixtureActor, mixture_in_training
from moalign.policies.mixed import experts_on_model
from moalign.policies.policy import respond_all
from moalign.runs.meter import Meter
from moalign.runs.run import Run
from moalign.training.job import Job
from moalign.training.online import OnlineTrainer
from moalign.training.preference_draws import independent

FAR = ("experts.lr=0.02", "experts.steps=6")
"""Experts that differ from each other."""
LEARNS = ("lr=0.02", "control.width=16", "control.layers=1", "batch=6", "steps=3", "warmup=0")
ADAPTER = 'control={"form": "adapter", "lora": {"r": 4, "alpha": 8, "dropout": 0.0}}'
Ask = Callable[..., Plan]


@pytest.fixture(scope="module")
def ask(small_task: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """``ask(*overrides)``: a plan of seconds; all share one results folder, so that experts are trained once."""
    folder = tmp_path_factory.mktemp("pcm")

    def planned(*overrides: str, method: str = "pcm", results: Path = folder / "results") -> Plan:
        recipe = folder / f"{method}.yaml"
        recipe.write_text(f"method: {method}\ntask: sandbox\npolicy:\n  lora: {{r: 4, alpha: 8, dropout: 0.0}}\n")
        quick = [f"{key}={json.dumps(value)}" for key, value in registry.get(method).quick.items()]
        sets = (*small_task, *quick, *FAR, *overrides)
        return plan(TrainRequest(method, recipe=recipe, overrides=sets, results=results))

    return planned


@pytest.fixture(scope="module")
def trained(ask: Ask) -> Run:
    """A run whose control model has learnt a little."""
    return train(ask(*LEARNS))[0]


@contextmanager
def in_training(made: Plan) -> Iterator[tuple[Job, MixtureActor]]:
    """The job of a plan with its experts on the base and its control model fresh."""
    from moalign.training.experts import bring_experts

    job = made.job(made.open(), Meter())
    bring_experts(job, "modpo", made.config.experts.model_dump(mode="json"))
    with mixture_in_training(job) as actor:
        yield job, actor


def trainer_of(job: Job, actor: MixtureActor) -> OnlineTrainer:
    draw = independent(None, len(job.task.names), 1.0)
    return OnlineTrainer(job, job.task.language_model, job.config, draw, PHASE, actor=actor)


# -- what is trained -------------------------------------------------------------------------------------------------


def test_the_reward_worked_by_hand() -> None:
    """w = (.25, .75), the base's z = (0, 1): (sigma(1) + 3 sigma(0)) / 4 and (sigma(-2) + 3 sigma(1)) / 4."""
    rollout = SimpleNamespace(
        prompts=["a"], preferences=np.array([[0.25, 0.75]]), per_prompt=2, z=np.array([[1.0, 1.0], [-2.0, 2.0]])
    )
    found = gains(rollout, {"a": np.array([0.0, 1.0])})  # type: ignore[arg-type]
    np.testing.assert_allclose(found, [0.25 * 0.7310586 + 0.75 * 0.5, 0.25 * 0.1192029 + 0.75 * 0.7310586], rtol=1e-6)


@pytest.mark.parametrize("form", [(), (ADAPTER,), ("space=logit",)], ids=["small", "adapter", "logit"])
def test_what_is_trained_is_what_was_sampled_and_gradients_reach_the_control_model_only(
    ask: Ask, tmp_path: Path, form: tuple[str, ...]
) -> None:
    made = ask(
        *LEARNS, *form, "steps=1", f"control.start={'uniform' if ADAPTER in form else 'preference'}", results=tmp_path
    )
    with in_training(made) as (job, actor):
        lm = job.task.language_model
        frozen = {name: value.detach().clone() for name, value in lm.model.named_parameters()}
        control = {key: value.clone() for key, value in actor.control.weights().items()}
        trainer = trainer_of(job, actor)
        for rollout in trainer.rollouts():
            rows = np.arange(len(rollout.responses))
            for part in trainer.parts(rows, tensors={}):
                torch.testing.assert_close(part.logps.detach(), part.old_logps, rtol=0, atol=1e-5)
                if ADAPTER not in form:  # it starts at the preference's own weights, which is its reference
                    torch.testing.assert_close(part.ref_logps, part.old_logps, rtol=0, atol=1e-5)
                assert float(part.old_logps.abs().max()) > 0.1
                trainer.backward(-part.logps.sum())
            trainer.step()
        for name, value in lm.model.named_parameters():
            if ".control." not in name:
                assert torch.equal(value, frozen[name]), name
        moved = [key for key, value in actor.control.weights().items() if not torch.equal(value, control[key])]
        assert "head.weight" in moved


@pytest.mark.parametrize("space", ["probability", "logit"])
def test_checkpointing_of_the_control_adapter_changes_no_gradient(ask: Ask, tmp_path: Path, space: str) -> None:
    """The base's layers run again for the gradient, and what is learnt is the same."""
    found: list[dict[str, torch.Tensor]] = []
    passes: list[int] = []
    for on in ("false", "true"):
        made = ask(
            *LEARNS, ADAPTER, f"space={space}", f"policy.gradient_checkpointing={on}", "steps=1", results=tmp_path
        )
        with in_training(made) as (job, actor):
            torch.manual_seed(0)
            torch.nn.init.normal_(actor.control.head.weight)  # at 0 no gradient gets past it
            layers = [0]
            first = job.task.language_model.model.get_base_model().model.layers[0]
            counted = first.mlp.register_forward_pre_hook(lambda *_, seen=layers: seen.__setitem__(0, seen[0] + 1))
            trainer = trainer_of(job, actor)
            for rollout in trainer.rollouts():
                for part in trainer.parts(np.arange(len(rollout.responses)), tensors={}):
                    layers[0] = 0
                    trainer.backward(-part.logps.sum())
                    passes.append(layers[0])
                found.append({str(i): value.grad.clone() for i, value in enumerate(actor.parameters)})
                trainer.step()
            counted.remove()
            modules = job.task.language_model.model.modules()
            assert not any(getattr(module, "gradient_checkpointing", False) for module in modules)
    assert passes == [0, 1], "with it the layers run again in the backward pass"
    assert sum(bool(value.any()) for value in found[0].values()) > 4
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-6)


def test_the_base_answers_each_prompt_that_is_drawn_once(ask: Ask, tmp_path: Path) -> None:
    with in_training(ask(*LEARNS, results=tmp_path)) as (job, actor):
        before = job.meter.cost()
        scores = base_scores(job)
        once = job.meter.cost()
        again = base_scores(job)
        drawn = {
            prompt
            for rollout in [trainer_of(job, actor).sample(step) for step in range(3)]
            for prompt in rollout.prompts
        }
    assert set(scores) == drawn
    assert all(np.array_equal(scores[prompt], again[prompt]) for prompt in scores)
    assert once["reward_calls"] - before["reward_calls"] == 2 * len(drawn)
    assert len({tuple(row) for row in scores.values()}) > 1


def test_both_trainers_learn_and_count_the_experts_cost(ask: Ask, trained: Run) -> None:
    ppo, _ = train(ask(*LEARNS, "trainer=ppo", "value_lr=0.01"))
    (experts,) = ask().store.runs(method="modpo")
    for run in (trained, ppo):
        assert run.record.notes["experts"] == {"method": "modpo", "run_id": experts.run_id}
        assert run.record.cost.tokens_trained > experts.record.cost.tokens_trained > 0
        lines = [line for line in run.metrics() if line["phase"] == PHASE]
        assert lines and all(np.isfinite(line["loss"]) for line in lines)
    assert not torch.equal(trained.load_tensors("control")["head.weight"], torch.zeros(2, 16))


def test_experts_may_come_from_reinforcement_learning(ask: Ask) -> None:
    run, _ = train(ask(*LEARNS, 'rl_experts={"steps": 2, "batch": 4, "lr": 0.01}'))
    (experts,) = ask().store.runs(method="morlhf")
    assert run.record.notes["experts"] == {"method": "morlhf", "run_id": experts.run_id}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), (ADAPTER,), ("trainer=ppo",)], ids=["rebel", "adapter", "ppo"])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    ask: Ask, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    class Interrupted(Exception):
        pass

    def stop(phase: str, done: int, total: int) -> None:
        if phase == PHASE and done == 2:
            raise Interrupted

    wanted = (*LEARNS, "steps=4", "checkpoint_every=1", *settings)
    whole, _ = train(ask(*wanted, results=tmp_path / "whole"))
    with pytest.raises(Interrupted):
        train(ask(*wanted, results=tmp_path / "apart"), stop)
    resumed, found = train(ask(*wanted, results=tmp_path / "apart"))
    assert not found
    left, right = whole.load_tensors("control"), resumed.load_tensors("control")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert whole.record.cost.tokens_generated == resumed.record.cost.tokens_generated


# -- answers ---------------------------------------------------------------------------------------------------------


def answers(run: Run, wanted: list[tuple[float, ...]], temperature: float = 1.0) -> list[list[str]]:
    method, context = context_of(run, run.path.parents[3])
    policies = [method.policy(context, preference) for preference in wanted]
    sampling = context.task.sampling(1, temperature=temperature)
    return respond_all(policies, context.task.eval_prompts, sampling).responses


@pytest.mark.parametrize(
    ("start", "space"), [("preference", "probability"), ("uniform", "probability"), ("preference", "logit")]
)
def test_untrained_it_is_the_static_mixture(ask: Ask, start: str, space: Space) -> None:
    """Weights equal to the preference, or equal ones: the baselines are the method with no steps."""
    run, _ = train(ask("steps=0", f"control.start={start}", f"space={space}"))
    wanted = [(0.3, 0.7), (1.0, 0.0), (0.6, 0.4)]
    found = answers(run, wanted)
    _, context = context_of(run, run.path.parents[3])
    lm, experts = context.task.language_model, SideBySide(context.task.language_model, experts_on_model(context))
    texts = [context.task.renderer.plain(prompt) for prompt in context.task.eval_prompts]
    for weights, responses in zip(wanted, found, strict=True):
        named = torch.tensor(weights) if start == "preference" else torch.tensor([float(w > 0) for w in weights])
        static = (named / named.sum()).unsqueeze(0)
        made = generate(
            lm, texts, range(len(texts)), context.task.sampling(1),
            lambda places, static=static: Mixture(
                NextToken(experts), 2, Constant(static.expand(len(places), 2)), space
            ),
        )  # fmt: skip
        assert responses == made.responses
    assert (found[0] == found[2]) == (start == "uniform")
    if space == "logit":
        mod, _ = train(ask(f"experts={json.dumps(run.record.recipe['config']['experts'])}", method="mod"))
        assert mod.record.notes["experts"] == run.record.notes["experts"]
        assert found == answers(mod, wanted)


def test_a_preference_for_one_objective_is_its_expert_whatever_was_learnt(trained: Run, ask: Ask) -> None:
    (experts,) = ask().store.runs(method="modpo")
    assert answers(trained, [(1.0, 0.0), (0.0, 1.0)]) == answers(experts, [(1.0, 0.0), (0.0, 1.0)])


def test_a_control_adapter_on_more_layers_than_the_experts_leaves_them_as_they_are(ask: Ask, tmp_path: Path) -> None:
    narrow = 'policy.lora={"r": 4, "alpha": 8, "dropout": 0.0, "targets": ["q_proj"]}'
    wide = 'control={"form": "adapter", "lora": {"r": 4, "alpha": 64, "dropout": 0.0}}'
    run, _ = train(ask(*LEARNS, narrow, wide, "lr=0.1", results=tmp_path))
    (experts,) = ask(results=tmp_path).store.runs(method="modpo")
    assert answers(run, [(1.0, 0.0), (0.0, 1.0)]) == answers(experts, [(1.0, 0.0), (0.0, 1.0)])


def test_rows_of_one_batch_have_preferences_of_their_own(trained: Run) -> None:
    wanted = [(0.3, 0.7), (0.9, 0.1), (0.5, 0.5)]
    for temperature in (1.0, 0.0):
        together = answers(trained, wanted, temperature)
        assert together == [answers(trained, [preference], temperature)[0] for preference in wanted]
    assert len({tuple(rows) for rows in answers(trained, wanted)}) == 3


def test_no_single_model_answers_like_it(trained: Run) -> None:
    method, context = context_of(trained, trained.path.parents[3])
    with pytest.raises(RequestError, match="2 experts and a control model"):
        method.policy(context, (0.5, 0.5)).generator.as_model()  # type: ignore[attr-defined]


def test_combinations_unseen_in_training_are_judged_beside_the_seen(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    from moalign.evaluation.evaluate import evaluate

    drawn: set[tuple[float, ...]] = set()

    def look(rollout: Any, of_base: Any) -> Any:
        drawn.update(map(tuple, rollout.preferences.tolist()))
        return gains(rollout, of_base)

    monkeypatch.setattr(pcm, "gains", look)
    run, _ = train(ask(*LEARNS, "task.grid=5", "holdout=[[0.5, 0.5]]"))
    seen = [(0.0, 1.0), (0.25, 0.75), (0.75, 0.25), (1.0, 0.0)]
    assert drawn <= set(seen) and len(drawn) > 2
    generalisation = evaluate(*context_of(run, run.path.parents[3])).result.generalisation
    assert generalisation is not None
    assert generalisation.trained.prefs == tuple(seen)
    assert generalisation.held_out.prefs == ((0.5, 0.5),)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(trained: Run, tmp_path: Path) -> Run:
    """A copy of the trained run, in a copy of its results folder, for a test to damage."""
    results = trained.path.parents[3]
    shutil.copytree(results, tmp_path / "results")
    return Run.load(tmp_path / "results" / trained.path.relative_to(results))


def test_a_control_model_of_another_number_of_experts_is_refused(damaged: Run) -> None:
    file = damaged.path / "control.safetensors"
    kept = load_file(file)
    save_file({**kept, "head.weight": torch.zeros(3, 16), "head.bias": torch.zeros(3)}, file)
    with pytest.raises(RequestError, match=r"control\.safetensors: not the control model of 2 .*head\.weight is"):
        answers(damaged, [(0.5, 0.5)])
    save_file({key: value for key, value in kept.items() if key != "head.bias"}, file)
    with pytest.raises(RequestError, match=r"head\.bias is nothing, needed: \[2\]"):
        answers(damaged, [(0.5, 0.5)])
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(RequestError, match="control.safetensors"):
        answers(damaged, [(0.5, 0.5)])


def test_a_missing_or_foreign_expert_is_refused(damaged: Run, make_lm: Any) -> None:
    folder = damaged.path / "adapter-expert-1"
    shutil.rmtree(folder)
    with pytest.raises(RequestError, match="adapter-expert-1"):
        answers(damaged, [(0.5, 0.5)])
    lm = make_lm(seed=7)
    adapters.attach(lm, context_of(damaged, damaged.path.parents[3])[1].policy_spec.lora, 0)
    adapters.save(lm, folder)
    with pytest.raises(RequestError, match="fingerprint"):
        answers(damaged, [(0.5, 0.5)])


def test_what_is_in_a_control_folder_is_part_of_a_runs_identity(ask: Ask, random_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_base, tmp_path / "body")
    setting = f'control={{"form": "folder", "model": "{folder}"}}'
    before, again = ask(setting), ask(setting)
    weights = load_file(folder / "model.safetensors")
    save_file({key: 2 * value for key, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert before.folder == again.folder != ask(setting).folder
    assert ask().identity.keys() == {"card", "config", "policy", "seed", "prefs"}


def test_a_control_model_in_a_folder_is_trained_and_answers(ask: Ask, random_base: Path, tmp_path: Path) -> None:
    run, _ = train(ask(*LEARNS, f'control={{"form": "folder", "model": "{random_base}"}}', results=tmp_path))
    assert len(set(map(tuple, answers(run, [(0.3, 0.7), (0.9, 0.1)])))) == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('control={"form": "folder"}', "model names the folder of form: folder"),
        ('control={"model": "somewhere"}', "model names the folder of form: folder"),
        ("temperature=0.7", "temperature"),
        ("samples=1", "samples"),
        ("samples=3", "rebel compares pairs"),
        ("eta=0", "eta"),
        ("reference=start", "reference"),
    ],
)
def test_settings_that_make_no_sense_are_refused(ask: Ask, setting: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ask(setting)


# -- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", ["small", "adapter", "folder", "mod"])
def test_the_exported_script_answers_as_the_run_does(
    ask: Ask, trained: Run, random_base: Path, tmp_path: Path, form: str
) -> None:
    """Greedily, in a process that does not know moalign."""
    from moalign.experiment.export import export

    forms = {"adapter": (ADAPTER,), "folder": (f'control={{"form": "folder", "model": "{random_base}"}}',)}
    run = trained if form == "small" else train(ask(method="mod") if form == "mod" else ask(*LEARNS, *forms[form]))[0]
    method, context = context_of(run, run.path.parents[3])
    exported = export(method, context, (0.3, 0.7), tmp_path / "out")
    assert exported.kind == "mixture" and exported.mixture is not None
    script = tmp_path / "out" / "answer.py"
    assert len(script.read_text().splitlines()) <= 80 and "moalign import" not in script.read_text()
    prompts = context.task.eval_prompts[:3]
    expected = answers(run, [(0.3, 0.7)], temperature=0.0)[0][:3]
    code = "import answer, json, sys\nprint(json.dumps([answer.answer(text, 0) for text in json.loads(sys.argv[1])]))"
    command = [sys.executable, "-c", code, json.dumps(prompts)]
    ended = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert [text.strip() for text in json.loads(ended.stdout.splitlines()[-1])] == [text.strip() for text in expected]
    assert "answer.py" in (script.parent / "README.md").read_text()


def test_a_mixture_cannot_be_merged(trained: Run, tmp_path: Path) -> None:
    from moalign.experiment.export import export

    method, context = context_of(trained, trained.path.parents[3])
    with pytest.raises(RequestError, match="--merged: pcm at 0.5,0.5 mixes 2 experts"):
        export(method, context, (0.5, 0.5), tmp_path / "out", merged=True)
    assert not (tmp_path / "out").exists()


def test_a_control_model_that_lacks_weights_is_refused(ask: Ask, random_base: Path, tmp_path: Path) -> None:
    """The library would fill them with random numbers."""
    folder = tmp_path / "cut"
    shutil.copytree(random_base, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("mlp.down_proj.weight"))
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"control\.model .*missing: .*mlp\.down_proj\.weight"):
        train(ask(f'control={{"form": "folder", "model": "{folder}"}}', results=tmp_path))
    assert not list(tmp_path.rglob("modpo")), "before its experts are trained"


@pytest.mark.slow
def test_the_exported_script_keeps_to_the_card_s_nucleus(ask: Ask, tmp_path: Path) -> None:
    """With a nucleus of nearly nothing every sample is the likeliest token, at any temperature."""
    from moalign.experiment.export import export

    run, _ = train(ask(*LEARNS, "steps=0", "task.generation.top_p=0.0001", results=tmp_path / "results"))
    method, context = context_of(run, run.path.parents[3])
    export(method, context, (0.3, 0.7), tmp_path / "out")
    code = "import answer\nprint([answer.answer('how do i make soup ?', t) for t in (0, 1, 1)])"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    greedy, *sampled = ast.literal_eval(ended.stdout.splitlines()[-1])
    assert greedy and sampled == [greedy, greedy]
