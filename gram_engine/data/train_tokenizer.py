"""Trains a SentencePiece tokenizer on preference data, for models that are trained from scratch.

The text is what the model will read: prompts and responses inside the judge template. Line breaks are pieces of their
own, unknown characters become bytes, and nothing is normalised, so decoding restores every text exactly.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Iterator, Optional

import sentencepiece
import tyro

from gram_engine.config.parse import fail
from gram_engine.config.schema import DataConfig
from gram_engine.data.readers import read_rows
from gram_engine.data.schema import Pair
from gram_engine.data.template import JudgeTemplate
from gram_engine.errors import ConfigError, GramError
from gram_engine.files import write_atomically

LONGEST_LINE = 4192  # bytes; SentencePiece would skip longer lines


@dataclass
class TokenizerConfig:
    """Data for the tokenizer, and the size of its vocabulary."""

    data: tuple[str, ...]
    """Preference files, as for training."""
    output: str
    """The SentencePiece .model file to write."""
    vocab_size: int = 8192
    """Number of pieces, 256 of which are bytes."""
    template: str = "gram-code"
    """Judge template whose text is part of the training text."""
    max_rows: Optional[int] = 50_000
    """Maximum number of rows to read."""


def train_tokenizer(config: TokenizerConfig) -> None:
    """Write the SentencePiece model (BPE).

    Raises:
        DataError: a bad row in the data.
        ConfigError: the vocabulary is too large or too small for the text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(config),
            model_writer=model,
            model_type="bpe",
            vocab_size=config.vocab_size,
            character_coverage=1.0 if config.vocab_size < 2048 else 0.9995,
            byte_fallback=True,
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=False,
            max_sentence_length=LONGEST_LINE,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("]", 1)[-1].split(" Increase")[0].strip()
        raise ConfigError(f"--vocab-size {config.vocab_size} does not fit this text: {reason}") from None
    with write_atomically(config.output, "wb") as handle:
        handle.write(model.getvalue())


def _lines(config: TokenizerConfig) -> Iterator[str]:
    template = JudgeTemplate.load(config.template)
    for number, row in enumerate(read_rows(config.data, DataConfig())):
        if number == config.max_rows:
            return
        if isinstance(row, Pair):
            text = template.judge(row.prompt, row.response_a, row.response_b) + template.label_a
        else:
            text = row.instruction + row.output
        yield from (line[:LONGEST_LINE // 4] for line in text.split("\n") if line)


def main(argv: list[str] | None = None) -> None:
    """Command line: see `--help`."""
    config = tyro.cli(TokenizerConfig, args=argv, prog="gram train-tokenizer", description=__doc__)
    try:
        train_tokenizer(config)
    except GramError as error:
        fail(error)
    print(f"{config.output}: {config.vocab_size} pieces")


if __name__ == "__main__":
    main()
