"""One interface to SentencePiece models and Hugging Face tokenizer folders, including chat templates.

Both kinds run as a fast tokenizer of the `tokenizers` library, which is also what `save_pretrained` exports.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import tokenizers

from gram_engine.data.sentencepiece import fast_tokenizer_of
from gram_engine.errors import ConfigError, GramError, one_line
from gram_engine.files import write_json

PINNED_DATE = "26 Jul 2024"
"""The date in chat templates that print one (LLaMA 3.1 and 3.2 print today's): the default of Meta's templates."""

SAMPLE_MESSAGES = ("plain", " two\n\nlines \n", "{{ braces }} {% x %}", "[INST] \u00fc \U0001f600 [/INST]")
"""Messages that a chat template must write as they are, or stripped."""

_PIN = f'{{%- if not date_string is defined %}}{{%- set date_string = "{PINNED_DATE}" %}}{{%- endif %}}'


@dataclass
class Tokenizer:
    """A tokenizer, and the text that its chat template writes around a user's message.

    `chat_prefix` and `chat_suffix` are that text, with the opening of the assistant's turn at its end (empty without a chat
    template). Every sequence begins with `prefix_ids`: the beginning-of-sequence token, unless the chat template writes it.
    `default_prefix_ids` are what the tokenizer by default begins a text with.
    Worker processes get a copy without `hf`, which is cheap to send but cannot be saved.
    """

    backend: tokenizers.Tokenizer
    tokenizer_type: str
    path: str
    vocab_size: int
    eos_id: int
    bos_id: Optional[int]
    prefix_ids: list[int]
    chat_prefix: str
    chat_suffix: str
    strips_message: bool
    fingerprint: str
    default_prefix_ids: list[int]
    hf: Any = None
    """The transformers tokenizer; None in worker processes."""

    @classmethod
    def load(cls, tokenizer_type: str, path: str | Path, any_chat_template: bool = False) -> Tokenizer:
        """Read a SentencePiece .model file or a Hugging Face tokenizer folder (auto: whichever `path` is).

        Args:
            any_chat_template: also one that changes the user's message; `wrap_user` must then not be used.

        Raises:
            ConfigError: the path does not exist, is not a tokenizer or has no fast version, there is no end-of-sequence token,
                or the chat template changes the user's message.
        """
        path = Path(path)
        if not path.exists():
            raise ConfigError(f"--tokenizer-model {path}: no such file or folder.")
        if tokenizer_type == "auto":
            tokenizer_type = "HuggingFaceTokenizer" if path.is_dir() else "SentencePieceTokenizer"
        if tokenizer_type == "SentencePieceTokenizer":
            if path.is_dir():
                raise ConfigError(f"--tokenizer-model {path}: SentencePieceTokenizer needs the .model file itself.")
            load = fast_tokenizer_of
        elif tokenizer_type == "HuggingFaceTokenizer":
            load = _load_hugging_face
        else:
            raise ConfigError(f"--tokenizer-type {tokenizer_type}: use SentencePieceTokenizer or HuggingFaceTokenizer.")
        try:
            return cls._from_hugging_face(load(path), tokenizer_type, str(path), any_chat_template)
        except GramError:
            raise
        except BaseException as error:
            # For damaged files transformers, tokenizers and jinja raise anything; a panic in Rust is not an Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = one_line(str(error).strip().partition("\n")[0] or type(error).__name__)
            raise ConfigError(f"--tokenizer-model {path}: not a tokenizer that can be used ({reason}). Restore it.") from None

    @classmethod
    def _from_hugging_face(cls, hf, tokenizer_type: str, path: str, any_chat_template: bool) -> Tokenizer:
        backend = hf.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        if hf.eos_token_id is None:
            raise ConfigError(f"{path}: the tokenizer has no end-of-sequence token. Set eos_token in tokenizer_config.json.")
        default_prefix_ids = [hf.bos_token_id] if _adds_bos(hf) else []
        if hf.chat_template is not None:
            hf.chat_template = _pin_date(_one_template(hf.chat_template, path))
            prefix, suffix, strips = ("", "", False) if any_chat_template else _chat_wrapping(hf, path)
            prefix_ids = []
        else:
            prefix, suffix, strips = "", "", False
            prefix_ids = default_prefix_ids
        vocabulary = backend.get_vocab(with_added_tokens=True)
        identity = [backend.to_str(), hf.chat_template, hf.bos_token, hf.eos_token]
        fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        return cls(
            backend, tokenizer_type, path, max(vocabulary.values()) + 1, hf.eos_token_id, hf.bos_token_id, prefix_ids,
            prefix, suffix, strips, fingerprint, default_prefix_ids, hf,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "hf": None}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without added special tokens; a special token that the text spells becomes that token."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encoding(self, text: str) -> tokenizers.Encoding:
        """As `encode`, with the character range of each token (`token_to_chars`)."""
        return self.backend.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, including special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        """A token as the vocabulary spells it."""
        return self.backend.id_to_token(int(token_id)) or f"<{token_id}>"

    def wrap_user(self, text: str) -> str:
        """The text as a user's message in the chat template, with the opening of the assistant's turn.

        Without a chat template it is the text itself. Its tokens go after `prefix_ids`.
        """
        return self.chat_prefix + (text.strip() if self.strips_message else text) + self.chat_suffix

    def label_ids(self, label_a: str, label_b: str, context: str) -> tuple[int, int]:
        """Ids of the two label tokens directly after `context`, a judge prompt.

        Raises:
            ConfigError: a label is not a single token there, is not in the vocabulary, or both are the same token.
        """
        before = self.encode(context)
        found = []
        for label in (label_a, label_b):
            after = self.encode(context + label)
            own = after[len(before) :]
            if after[: len(before)] != before or len(own) != 1:
                split = " ".join(map(repr, map(self.token, after[max(0, len(before) - 1) :])))
                raise ConfigError(
                    f"label '{label}' is not a single token after '{_tail(context)}' with the tokenizer {self.path} "
                    f"(the text ends in {split}). Choose label_a and label_b of the template among whole tokens, "
                    "or use another tokenizer."
                )
            found += own
        unknown = self.backend.token_to_id(self.hf.unk_token) if self.hf is not None and self.hf.unk_token else None
        if found[0] == found[1] or unknown in found:
            raise ConfigError(
                f"labels '{label_a}' and '{label_b}' become the tokens {found[0]} and {found[1]} "
                f"({self.token(found[0])}, {self.token(found[1])}) with the tokenizer {self.path}: they must be two "
                "different, known tokens. Train the tokenizer on text that holds both, or choose other labels."
            )
        return found[0], found[1]

    def padding_id(self, text: str) -> int:
        """A padding token that does not end `text`: transformers reads a classifier's logit at the last token that is not
        padding.

        Raises:
            ConfigError: the tokenizer has no such token.
        """
        last = self.encode(text)[-1:]
        for token in (self.hf.pad_token_id, self.hf.unk_token_id, self.bos_id, self.eos_id):
            if token is not None and [token] != last:
                return token
        raise ConfigError(
            f"{self.path}: no token is left to pad with, as texts end in the padding token. Set pad_token in "
            "tokenizer_config.json to another token than the one that ends a text."
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a Hugging Face tokenizer folder; AutoTokenizer loads it offline and encodes identically.

        Raises:
            OSError: the folder cannot be written.
        """
        assert self.hf is not None, "a tokenizer in a worker process cannot be saved"
        try:
            save_tokenizer(self.hf, folder)
        except Exception as error:  # the tokenizers library has no class of its own for errors of the disk
            raise error if isinstance(error, OSError) else OSError(f"{folder}: {error}") from error


def save_tokenizer(hf, folder: str | Path) -> None:
    """Write a transformers tokenizer so that transformers 4 loads it too, and passes the model no token types.

    transformers 5 writes a class and a form of the extra special tokens that transformers 4 does not have. The class that is
    written here encodes as tokenizer.json says; the input names are those of LLaMA and Qwen3.
    """
    hf.save_pretrained(str(folder))
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(path, config)


def _load_hugging_face(path: Path):
    from transformers import AutoTokenizer

    if not path.is_dir():
        raise ConfigError(f"--tokenizer-model {path}: HuggingFaceTokenizer needs a folder with tokenizer.json.")
    hf = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    if not hf.is_fast:
        raise ConfigError(f"--tokenizer-model {path}: the tokenizer has no fast version (tokenizer.json).")
    for not_the_tokenizers_own in ("is_local", "local_files_only", "trust_remote_code", "auto_map"):
        hf.init_kwargs.pop(not_the_tokenizers_own, None)
    return hf


def _one_template(template: Any, path: str) -> str:
    if isinstance(template, dict):
        if "default" not in template:
            raise ConfigError(f"{path}: several chat templates ({', '.join(template)}) and none is called default.")
        return template["default"]
    return template


def _pin_date(template: str) -> str:
    """The chat template with a fixed date, also in exported folders, so that a reward does not depend on the day."""
    asks = "date_string" in template or "strftime_now" in template
    return _PIN + template if asks and not template.startswith(_PIN) else template


def render_chat(hf, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    """Text of messages {role, content} in the chat template, with the pinned date and without a thinking section."""
    return hf.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=False,
        date_string=PINNED_DATE,
    )


def literal_text(
    render: Callable[..., str], num_messages: int, samples: Sequence[str]
) -> Optional[tuple[list[str], list[bool]]]:
    """What a chat template writes around its messages, checked on samples.

    Args:
        render: makes the template's text from `num_messages` messages.
        samples: texts of messages that must come out as they are, or stripped of white space around them.

    Returns:
        The `num_messages` + 1 texts before, between and after the messages, and whether each message is stripped; or None
        if the template changes messages in another way.
    """
    markers = [f"GRAM?{number}" for number in range(num_messages)]
    rest, texts, stripped = render(*(f" {marker} " for marker in markers)), [], []
    for marker in markers:
        before, found, rest = rest.partition(marker)
        if not found:
            return None
        stripped.append(not (before.endswith(" ") and rest.startswith(" ")))
        if not stripped[-1]:
            before, rest = before[:-1], rest[1:]
        texts.append(before)
    texts.append(rest)
    for sample in samples:
        messages = [sample.strip() if strips else sample for strips in stripped]
        expected = texts[0] + "".join(message + text for message, text in zip(messages, texts[1:]))
        if render(*[sample] * num_messages) != expected:
            return None
    return texts, stripped


def _chat_wrapping(hf, path: str) -> tuple[str, str, bool]:
    """(text before a user's message, text after it, whether the template strips white space around the message)."""

    def render(text: str) -> str:
        return render_chat(hf, [{"role": "user", "content": text}], add_generation_prompt=True)

    found = literal_text(render, 1, (*SAMPLE_MESSAGES, "<think>a</think> b"))
    if found is None:
        raise ConfigError(
            f"{path}: the chat template changes the text of a user's message, so the judge prompt cannot be read "
            "back from it. Remove chat_template from the tokenizer folder, or simplify it."
        )
    (prefix, suffix), (strips,) = found
    return prefix, suffix, strips


def _adds_bos(hf) -> bool:
    """Whether the tokenizer by default begins a text with its beginning-of-sequence token."""
    return hf.bos_token_id is not None and hf("x").input_ids[:1] == [hf.bos_token_id]


def _tail(text: str) -> str:
    return ("..." + text[-24:] if len(text) > 24 else text).replace("\n", "\\n")
