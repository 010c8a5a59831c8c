"""Chat models with random weights, in the shapes of the chat templates in use; :mod:`conftest` offers the fixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_DATED = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}<|start_header_id|>system<|end_header_id|>\n\n"
    'Today Date: {{ strftime_now("%d %b %Y") }}<|eot_id|>{% endif %}'
) + _LLAMA3.removeprefix("{{ bos_token }}")
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}"
    "{% elif m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
_PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


class ChatFamily(NamedTuple):
    """The shape of a family's tokenizer and chat template."""

    template: str | None
    special: tuple[str, ...]
    bos: str | None
    eos: str
    turn_end: str | None
    """The token with which the template closes an assistant's turn."""
    generation_ends: tuple[str, ...]
    """End tokens of the generation config."""
    spaces: str
    """``bytes``, or how a sentencepiece-like tokenizer prepends its mark of a space: ``always`` or ``never``."""


CHAT_FAMILIES = {
    "llama3": ChatFamily(
        _LLAMA3,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        ("<|end_of_text|>", "<|eot_id|>"),
        "bytes",
    ),
    "dated": ChatFamily(
        _DATED,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        ("<|end_of_text|>",),
        "bytes",
    ),
    "gemma": ChatFamily(
        _GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        ("<eos>", "<end_of_turn>"),
        "never",
    ),
    "chatml": ChatFamily(
        _CHATML,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        None,
        "<|endoftext|>",
        "<|im_end|>",
        ("<|im_end|>", "<|endoftext|>"),
        "bytes",
    ),
    "mistral": ChatFamily(_MISTRAL, ("<s>", "</s>"), "<s>", "</s>", "</s>", ("</s>",), "always"),
    "phi": ChatFamily(
        _PHI,
        ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
        None,
        "<|endoftext|>",
        "<|end|>",
        (),
        "bytes",
    ),
    "base": ChatFamily(None, ("<s>", "</s>"), "<s>", "</s>", None, (), "bytes"),
}
"""By name; ``base`` has no chat template."""

_CORPUS = [
    "What should I cook tonight? Please answer in one short sentence, with many details.",
    "The assistant said: I would like to help you. Human: thank you very much! Assistant: You are welcome.",
    "A preference says brevity 30.0% detail 70.0%, and a question asks how to learn the guitar.",
    "Once upon a time there was a little girl named Lily who lived in a small house by the sea.",
]


def chat_tokenizer(family: ChatFamily) -> Any:
    """Return a family's tokenizer, trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=family.spaces != "bytes"))
    if family.spaces == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        steps = [normalizers.Prepend("▁")] if family.spaces == "always" else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*decode, *([decoders.Strip(" ", 1, 0)] if steps else [])])
        alphabet = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    special = list(family.special) + [f"<0x{code:02X}>" for code in range(256) if family.spaces != "bytes"]
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + 150, special_tokens=special, initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if family.bos is not None:
        begin = [(family.bos, tokenizer.token_to_id(family.bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=begin)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.eos,
        additional_special_tokens=list(family.special),
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = family.template
    return made


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny model with random weights and a family's tokenizer and chat template, by name."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    made: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name in made:
            return made[name]
        family = CHAT_FAMILIES[name]
        tokenizer = chat_tokenizer(family)
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.25,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = LlamaForCausalLM(config)
        if family.generation_ends:
            ends = tokenizer.convert_tokens_to_ids(list(family.generation_ends))
            model.generation_config = GenerationConfig(eos_token_id=ends if len(ends) > 1 else ends[0])
        folder = tmp_path_factory.mktemp(f"chat-{name}")
        model.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
        made[name] = folder
        return folder

    return folder_of


@pytest.fixture(scope="session")
def chat_families() -> dict[str, ChatFamily]:
    """The families that ``chat_folder`` makes, by name."""
    return CHAT_FAMILIES
