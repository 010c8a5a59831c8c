"""``export``: what is written loads with peft and transformers alone, and answers as the run does."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from moalign.core.errors import RequestError
from moalign.experiment import export as module
from moalign.experiment.export import Exported, export
from moalign.experiment.train import TrainRequest, context_of, plan, train
from moalign.lm import backends
from moalign.methods import registry
from moalign.training.job import RunContext

LORA = "policy.lora={r: 4, alpha: 6, dropout: 0.0}"
PROMPT = "how do i make soup ?"
QUICK = {
    "mo-odpo": ("steps=3", "batch=4", "warmup=0", "lr=0.05"),
    "picky": (),
    "picky-soup": (),
    "picky-soup by logits": ("by=logits",),
    "best-of-n": ("n=2",),
    "prompting": (),
    "ric": (
        "offline={steps: 3, batch: 4, lr: 0.05, max_tokens: 128}",
        "online_rounds=0",
    ),
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("picky")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of all tests: each run is trained once."""
    return tmp_path_factory.mktemp("export") / "results"


@pytest.fixture
def finished(small_task: tuple[str, ...], results: Path) -> Any:
    """``finished(name)``: the context of a finished run of a method."""

    def made(name: str) -> tuple[Any, RunContext]:
        overrides = (*small_task, LORA, *QUICK[name])
        run, _ = train(plan(TrainRequest(name.split(" ")[0], overrides=overrides, results=results)))
        return context_of(run, results)

    return made


def expected_logits(method: Any, context: RunContext, preference: tuple[float, ...]) -> torch.Tensor:
    """What moalign's own policy says of the prompt's next tokens."""
    policy = method.policy(context, preference)
    model = policy.generator.as_model()
    model.lm.model.set_adapter(model.adapter)
    ids = torch.tensor(model.lm.encode([policy.render(PROMPT)]))
    with torch.no_grad():
        found: torch.Tensor = model.lm.model(ids).logits
    return found


def plain_logits(told: Exported, folder: Path) -> torch.Tensor:
    """The same by peft and transformers, from the folder and its facts."""
    source = folder if told.kind == "model" else told.base
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    if told.kind == "adapter":
        model = PeftModel.from_pretrained(model, folder)
    text = told.prompt.replace("{prompt}", PROMPT)
    ids = torch.tensor([tokenizer(text, add_special_tokens=told.special_tokens)["input_ids"]])
    with torch.no_grad():
        found: torch.Tensor = model.eval()(ids).logits
    return found


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize(("name", "preference"), [("mo-odpo", (0.3, 0.7)), ("picky", (0.5, 0.5)),
                                                  ("picky-soup", (0.3, 0.7)), ("ric", (0.3, 0.7))])  # fmt: skip
def test_it_answers_as_the_run_without_moalign(
    finished: Any, tmp_path: Path, name: str, preference: tuple[float, ...], merged: bool
) -> None:
    method, context = finished(name)
    wanted = expected_logits(method, context, preference)
    base = context.task.language_model
    told = export(method, context, preference, tmp_path / "out", merged)
    torch.testing.assert_close(plain_logits(told, tmp_path / "out"), wanted, rtol=1e-5, atol=1e-5)
    bare = AutoModelForCausalLM.from_pretrained(base.source)
    ids = torch.tensor(base.encode([told.prompt.replace("{prompt}", PROMPT)]))
    assert (bare(ids).logits - wanted).abs().max() > 0.05  # training did change something
    # What was exported is written beside it, and the run answers as before.
    assert json.loads((tmp_path / "out" / "moalign.json").read_text())["preference"] == list(preference)
    torch.testing.assert_close(expected_logits(method, context, preference), wanted)
    assert told.preference_in_prompt == (name in {"mo-odpo", "ric"})


def program(folder: Path) -> dict[str, Any]:
    """Run the README's code, and return what it defines."""
    text = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "moalign" not in code
    space: dict[str, Any] = {}
    exec(code, space)
    return space


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_the_code_of_the_readme_runs(finished: Any, tmp_path: Path, merged: bool) -> None:
    method, context = finished("mo-odpo")
    export(method, context, (0.3, 0.7), tmp_path / "out", merged)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "mo-odpo at helpfulness 0.3, harmlessness 0.7" in text
    assert "helpfulness 30.0% harmlessness 70.0%" in text
    space = program(tmp_path / "out")
    torch.manual_seed(0)
    answer = space["ask"](PROMPT)
    assert isinstance(answer, str) and len(answer.split()) > 1
    assert len(answer.split()) <= context.task.card.generation.max_new_tokens


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_nothing_is_inherited_from_the_base_s_generation_config(
    random_base: Path, small_task: tuple[str, ...], tmp_path: Path, merged: bool
) -> None:
    base = tmp_path / "picky-base"
    shutil.copytree(random_base, base)
    file = base / "generation_config.json"
    habits = {"do_sample": True, "top_k": 1, "temperature": 0.1, "repetition_penalty": 3.0, "no_repeat_ngram_size": 1}
    file.write_text(json.dumps({**json.loads(file.read_text()), **habits, "min_new_tokens": 40}))
    sets = (*small_task, f"task.model={base}", "task.generation.max_new_tokens=48", LORA, "steps=1", "batch=2")
    run, _ = train(plan(TrainRequest("mo-odpo", overrides=sets, results=tmp_path / "results")))
    export(*context_of(run, tmp_path / "results"), (0.3, 0.7), tmp_path / "out", merged)
    ask = program(tmp_path / "out")["ask"]
    torch.manual_seed(0)
    answers = [ask(PROMPT).split() for _ in range(12)]
    assert len({tuple(answer) for answer in answers}) == 12  # greedy would say the same again
    assert any(len(set(answer)) < len(answer) for answer in answers)  # words may come twice
    told = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    wanted = {"do_sample": True, "temperature": 1.0, "top_k": 0, "repetition_penalty": 1.0, "max_new_tokens": 48}
    assert {name: told[name] for name in wanted} == wanted
    assert told.get("no_repeat_ngram_size") is None and told.get("min_new_tokens") is None


LONG = " ".join(f"Question {number}: what should I cook?" for number in range(60))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "chat"),
    [("llama3", True), ("gemma", True), ("chatml", True), ("mistral", True), ("llama3", False), ("mistral", False)],
)
def test_the_code_reads_the_tokens_that_moalign_reads(
    chat_folder: Callable[[str], Path], small_task: tuple[str, ...], tmp_path: Path, family: str, chat: bool
) -> None:
    template = {"chat": chat, "stop": ["\nHuman:"], "marker": "" if chat else "\nAnswer:"}
    if chat and family != "gemma":
        template["system"] = "You are terse."
    sets = (*small_task, f"task.model={chat_folder(family)}", f"task.template={json.dumps(template)}",
            "task.generation.max_prompt_tokens=160", "steps=1", "batch=2", "warmup=0", LORA)  # fmt: skip
    run, _ = train(plan(TrainRequest("mo-odpo", overrides=sets, results=tmp_path / "results")))
    method, context = context_of(run, tmp_path / "results")
    policy, lm = method.policy(context, (0.3, 0.7)), context.task.language_model
    told = export(method, context, (0.3, 0.7), tmp_path / "out")
    read = program(tmp_path / "out")["fit"]
    for prompt in (PROMPT, "", "  white space around \n", "{prompt} naïve 猫", LONG, f"{LONG} "):
        wanted = lm.encode([policy.render(prompt)], 160)[0]
        assert read(prompt) == wanted
        assert len(wanted) <= 160
    assert told.end_ids == sorted(context.task.codec.ends.ids) and told.stop == ["\nHuman:"]
    config = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert config["eos_token_id"] == told.end_ids
    assert isinstance(program(tmp_path / "out")["ask"](LONG), str)


@pytest.mark.parametrize(
    ("name", "preference", "told"),
    [
        ("picky", (0.3, 0.7), "trained on"),
        ("best-of-n", (0.3, 0.7), "best-of-n at 0.3,0.7 cannot be exported: its answer is chosen among 2 samples"),
        ("prompting", (0.3, 0.7), "prompting at 0.3,0.7 cannot be exported: nothing was trained"),
    ],
    ids=["untrained preference", "best of n", "base"],
)  # fmt: skip
def test_what_is_no_single_trained_model_is_refused_with_the_reason(
    finished: Any, tmp_path: Path, name: str, preference: tuple[float, ...], told: str
) -> None:
    method, context = finished(name)
    with pytest.raises(RequestError) as caught:
        export(method, context, preference, tmp_path / "out")
    assert told in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_mixed_logits_are_exported_as_a_mixture(finished: Any, tmp_path: Path) -> None:
    method, context = finished("picky-soup by logits")
    exported = export(method, context, (0.3, 0.7), tmp_path / "out")
    assert exported.kind == "mixture" and exported.mixture is not None
    assert (exported.mixture["experts"], exported.mixture["space"]) == (2, "logit")
    assert exported.mixture["weights"] == [0.3, 0.7] and exported.mixture["control"] is None
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"expert-0", "expert-1", "answer.py", "moalign.json", "README.md"}


def test_a_corner_of_mixed_logits_is_one_expert_and_is_exported(finished: Any, tmp_path: Path) -> None:
    method, context = finished("picky-soup by logits")
    wanted = expected_logits(method, context, (0.0, 1.0))
    told = export(method, context, (0.0, 1.0), tmp_path / "out")
    assert torch.equal(plain_logits(told, tmp_path / "out"), wanted)


def test_a_plugin_s_own_source_of_text_is_refused(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moalign.policies.policy import Policy

    class Speaker:
        def generate(self, texts: list[str], rows: list[int], sampling: object) -> tuple[list[str], int]:
            return ["well"] * len(texts), len(texts)

    _, context = finished("prompting")
    method = registry.get("prompting")
    monkeypatch.setattr(type(method), "policy", lambda *_: Policy(Speaker(), str))
    with pytest.raises(RequestError, match="do not come from one language model"):
        export(method, context, (0.3, 0.7), tmp_path / "out")


def test_the_readme_loads_the_precision_that_was_judged(finished: Any, tmp_path: Path) -> None:
    """transformers would else take that of the base's files, which the card's need not be."""
    method, context = finished("picky")
    told = export(method, context, (1.0, 0.0), tmp_path / "out")
    assert (told.dtype, told.quantization) == ("float32", None)
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(told.base).to(torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(told.base).save_pretrained(half)
    readme = tmp_path / "out" / "README.md"
    readme.write_text(readme.read_text().replace(repr(told.base), repr(str(half))))
    assert program(tmp_path / "out")["base"].dtype == torch.float32


def test_the_readme_of_a_base_in_4_bits_loads_it_so(finished: Any, tmp_path: Path) -> None:
    """As transformers reads the dictionary; without bitsandbytes nothing is loaded here."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    method, context = finished("picky")
    told = export(method, context, (1.0, 0.0), tmp_path / "out")
    page = module._readme(
        replace(told, quantization=backends.four_bits("bfloat16")), tmp_path, context.task.language_model
    )
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (call,) = [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.keyword) and node.arg == "quantization_config"
    ]
    config = AutoQuantizationConfig.from_dict(ast.literal_eval(call.value))
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16


def test_an_empty_folder_stays_the_folder_it_is(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may stand in it, or it is mounted; the README runs from there, too."""
    method, context = finished("picky")
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    before = out.stat().st_ino
    export(method, context, (1.0, 0.0), Path())
    assert out.stat().st_ino == before
    assert "moalign.json" in os.listdir() and not [name for name in os.listdir() if name.startswith(".")]
    assert isinstance(program(out)["ask"](PROMPT), str)


def test_a_folder_that_holds_something_is_left_alone(finished: Any, tmp_path: Path) -> None:
    method, context = finished("picky")
    out = tmp_path / "out"
    out.mkdir()
    told = export(method, context, (1.0, 0.0), out)  # an empty one is as good as none
    assert (out / "adapter_model.safetensors").is_file() and told.kind == "adapter"
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(RequestError, match="the folder is not empty"):
        export(method, context, (0.0, 1.0), out)
    assert sorted(path.name for path in out.iterdir()) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match="not a folder"):
        export(method, context, (0.0, 1.0), tmp_path / "file")
