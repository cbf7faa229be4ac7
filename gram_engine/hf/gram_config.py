"""gram_config.json, which an exported folder holds beside the weights: how a reward is read from the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from gram_engine.data.conversation import Conversation
from gram_engine.data.template import JudgeTemplate
from gram_engine.errors import ConfigError
from gram_engine.files import read_json

GRAM_CONFIG = "gram_config.json"
PAIR_LOGIT, CAUSAL_LM, SCALAR = "pair-logit", "causal-lm", "scalar"
ORDER_RULE = "reward of y1 against y2 = mean of p(A | y1, y2) and p(B | y2, y1), softmax over the two labels"
_AGAIN = "Convert the checkpoint again."
SCALAR_RULE = "reward of y = the logit at the last token of [x, y]; p(y1 better than y2) = sigmoid(reward of y1 - of y2)"


@dataclass(frozen=True)
class GramConfig:
    """What scoring needs of an exported folder's gram_config.json: template and label tokens, or, of a scalar head, the
    conversation that it reads."""

    seq_length: int
    template: Optional[JudgeTemplate] = None
    label_ids: Optional[tuple[int, int]] = None
    conversation: Optional[Conversation] = None


def read_gram_config(folder: str | Path) -> GramConfig:
    """The folder's gram_config.json.

    Raises:
        ConfigError: it is missing, or not as it was written.
    """
    path = Path(folder) / GRAM_CONFIG
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. --model needs a folder written by `gram convert`.")
    gram = read_json(path, ConfigError, _AGAIN)
    seq_length = gram.get("seq_length")
    if type(seq_length) is not int or seq_length < 1:
        raise ConfigError(f"{path}: not what `gram convert` writes: seq_length is missing or wrong. {_AGAIN}")
    if gram.get("head") == SCALAR:
        return GramConfig(seq_length, conversation=Conversation.from_dict(gram.get("conversation"), str(path)))
    labels = gram.get("label_ids")
    whole = isinstance(labels, list) and len(labels) == 2 and all(type(number) is int for number in labels)
    if not whole or min(labels) < 0 or labels[0] == labels[1]:
        raise ConfigError(f"{path}: not what `gram convert` writes: label_ids are missing or wrong. {_AGAIN}")
    template = JudgeTemplate.from_dict(gram.get("template"), str(path))
    if gram.get("template_sha256", template.sha256) != template.sha256:
        raise ConfigError(f"{path}: the template was changed after it was written. {_AGAIN}")
    return GramConfig(seq_length, template, (labels[0], labels[1]))
