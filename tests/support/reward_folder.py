"""Folders as `gram convert` and chat models come with them: a random reward model, and a tokenizer with a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from transformers import PreTrainedTokenizerFast

from gram_engine.data.samples import label_ids
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.hf.gram_config import GRAM_CONFIG
from tests.support.hf_models import write_hf_model

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{% if loop.first %}[{{ strftime_now('%d %b %Y') if "
    "not date_string is defined else date_string }}]{% endif %}{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PAIRS = [
    (f"{number} " + "what colour " * number, "red stone " * (1 + 3 * number), "quiet river cloud " * (7 - number))
    for number in range(7)
]
"""Prompts with two responses each."""


def write_reward_model(folder: Path, tokenizer_model: str, template_file: str, seq_length: int) -> Path:
    """A random LLaMA with its tokenizer and gram_config.json."""
    tokenizer, template = Tokenizer.load("auto", tokenizer_model), JudgeTemplate.load(template_file)
    write_hf_model(folder, tokenizer.vocab_size, True, "plain")
    tokenizer.save_pretrained(folder)
    gram = {"template": template.to_dict(), "template_sha256": template.sha256, "seq_length": seq_length}
    gram["label_ids"] = list(label_ids(tokenizer, template))
    (folder / GRAM_CONFIG).write_text(json.dumps(gram))
    return folder


def write_chat_tokenizer(folder: Path) -> Path:
    """A small byte-level BPE tokenizer with a chat template that prints a date, as LLaMA 3's does."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = ["<bos>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    text = JudgeTemplate.load("gram-code").judge("hello", "yes", "no")
    backend.train_from_iterator([text] * 5, trainer)
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<|end|>")
    hf.chat_template = CHAT_TEMPLATE
    hf.save_pretrained(folder)
    return folder
