"""The text of a prompt with one response, for a scalar head: as the tokenizer's chat template writes them.

Without a chat template: prompt, empty line, response, end-of-text token.  The texts around prompt and response are stored with
the data set, the checkpoint and the exported folder, so that scoring builds the same text as training.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

from gram_engine.data.template import Layout
from gram_engine.data.tokenizer import SAMPLE_MESSAGES, Tokenizer, literal_text, render_chat
from gram_engine.errors import ConfigError


@dataclass(frozen=True)
class Conversation:
    """The texts before the prompt, between prompt and response, and after the response.

    `strips_prompt` and `strips_response`: whether white space around them is removed, as the chat template does.
    """

    before: str
    between: str
    after: str
    strips_prompt: bool = False
    strips_response: bool = False

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Conversation:
        """The texts that the tokenizer's chat template writes, checked on samples.

        Raises:
            ConfigError: the chat template changes a message or cannot write a response, or no token is left for padding.
        """
        if tokenizer.hf.chat_template is None:
            found = cls("", "\n\n", tokenizer.token(tokenizer.eos_id))
        else:
            found = cls._of_chat_template(tokenizer)
        found.pad_id(tokenizer)
        return found

    @classmethod
    def _of_chat_template(cls, tokenizer: Tokenizer) -> Conversation:
        found = literal_text(partial(_render, tokenizer.hf), 2, SAMPLE_MESSAGES)
        if found is None:
            raise ConfigError(
                f"{tokenizer.path}: the chat template changes the text of a message, so a response cannot be found in "
                "what it writes. Remove chat_template from the tokenizer folder, or simplify it."
            )
        texts, strips = found
        return cls(*texts, *strips)

    def layout(self, prompt: str, response: str) -> Layout:
        """The text, with the character ranges of prompt and response."""
        prompt = prompt.strip() if self.strips_prompt else prompt
        response = response.strip() if self.strips_response else response
        start = len(self.before)
        end = start + len(prompt)
        first = end + len(self.between)
        text = self.before + prompt + self.between + response + self.after
        return Layout(text, {"prompt": (start, end), "response": (first, first + len(response))})

    def pad_id(self, tokenizer: Tokenizer) -> int:
        """A padding token that does not end a text; raises as `Tokenizer.padding_id`."""
        return tokenizer.padding_id(self.after)

    def chat_template(self) -> str:
        """The conversation as a chat template (Jinja), which writes a user's and an assistant's message as `layout` does.

        A conversation of more turns has `between` after each message but the assistant's last one. White space around
        messages is kept.
        """
        before, between, after = (json.dumps(text, ensure_ascii=False) for text in (self.before, self.between, self.after))
        is_end = "loop.last and message.role == 'assistant'"
        message = f"{{{{ message.content + ({after} if {is_end} else {between}) }}}}"
        return f"{{{{ {before} }}}}{{% for message in messages %}}{message}{{% endfor %}}"

    def to_dict(self) -> dict:
        """Fields by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any, source: str) -> Conversation:
        """The conversation that `to_dict` wrote; `source` is named in errors.

        Raises:
            ConfigError: fields are missing, unknown or of another type.
        """
        kinds = {item.name: bool if item.name.startswith("strips") else str for item in fields(cls)}
        if not isinstance(content, dict) or {name: type(value) for name, value in content.items()} != kinds:
            raise ConfigError(f"{source}: 'conversation' must hold {', '.join(kinds)}, as it was written.")
        return cls(**content)


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation that a chat template writes anew each time, whatever it does to the messages.

    Only for scoring with models of others: it needs the transformers tokenizer `hf`, and cannot be stored.
    """

    hf: Any

    def layout(self, prompt: str, response: str) -> Layout:
        """The text, with the character ranges of prompt and response where they stand in it unchanged."""
        text, slots = _render(self.hf, prompt, response), {}
        end = len(text)
        for name, message in (("response", response.strip()), ("prompt", prompt.strip())):
            start = text.rfind(message, 0, end)
            if start >= 0:
                slots[name] = (start, start + len(message))
                end = start
        return Layout(text, dict(sorted(slots.items())))


def _render(hf: Any, prompt: str, response: str) -> str:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return render_chat(hf, messages, add_generation_prompt=False)
