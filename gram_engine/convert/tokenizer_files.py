"""The tokenizer of an exported folder, ready for programs that know transformers only: padding token and chat template."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gram_engine.data.conversation import Conversation
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import SAMPLE_MESSAGES, Tokenizer
from gram_engine.errors import CheckpointError
from gram_engine.files import read_json, write_json
from gram_engine.log import log


def prepare_for_judge_prompts(tokenizer: Tokenizer, template: JudgeTemplate) -> None:
    """Give the tokenizer a padding token that does not end a judge prompt.

    Raises:
        ConfigError: no token is left to pad with.
    """
    text = tokenizer.wrap_user(template.judge("x", "y", "z"))
    tokenizer.hf.pad_token = tokenizer.token(tokenizer.padding_id(text))


def prepare_for_conversations(tokenizer: Tokenizer, conversation: Conversation) -> Conversation:
    """Give the tokenizer a padding token that does not end a text and, if it has none, a chat template of the conversation.

    That chat template writes the beginning-of-sequence token as well, and the tokens of a text stay the same. A tokenizer
    that cannot keep them gets no chat template, and a line is logged.

    Returns:
        The conversation that goes with the tokenizer: with the beginning-of-sequence token if the chat template writes it.

    Raises:
        ConfigError: no token is left to pad with.
    """
    tokenizer.hf.pad_token = tokenizer.token(conversation.pad_id(tokenizer))
    if tokenizer.hf.chat_template is not None:
        return conversation
    whole = replace(conversation, before="".join(map(tokenizer.token, tokenizer.prefix_ids)) + conversation.before)
    for message in SAMPLE_MESSAGES:
        wanted, found = (tokenizer.encode(one.layout(message, message).text) for one in (conversation, whole))
        if found != tokenizer.prefix_ids + wanted:
            log(
                f"The export gets no chat template: this tokenizer splits a text in another way after {whole.before!r}. Other "
                f"programs have to begin each text with the token {tokenizer.bos_id}."
            )
            return conversation
    tokenizer.hf.chat_template = whole.chat_template()
    return whole


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, classifier: bool) -> Tokenizer:
    """Write a tokenizer to an exported folder; returns it as read from there.

    A classifier's tokenizer with a chat template adds no special tokens: the chat template writes them all, and programs that
    encode its text would otherwise begin with two beginning-of-sequence tokens.
    """
    tokenizer.save_pretrained(folder)
    if classifier and tokenizer.hf.chat_template is not None:
        path = folder / "tokenizer.json"
        content = read_json(path, CheckpointError, "Convert the checkpoint again.")
        step = content["post_processor"] or {"type": "Sequence", "processors": []}
        steps = step["processors"] if step["type"] == "Sequence" else [step]
        content["post_processor"] = next((step for step in steps if step["type"] == "ByteLevel"), None)  # adds no tokens
        write_json(path, content)
    return Tokenizer.load("HuggingFaceTokenizer", folder)
