"""gram_config.json of an exported folder: how a reward is computed from the model's output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from gram_engine.data.conversation import Conversation, RenderedConversation
from gram_engine.data.template import JudgeTemplate
from gram_engine.errors import ConfigError
from gram_engine.files import read_json

GRAM_CONFIG = "gram_config.json"
PAIR_LOGIT, CAUSAL_LM, SCALAR = "pair-logit", "causal-lm", "scalar"
ORDER_RULE = "reward of y1 against y2 = mean of p(A | y1, y2) and p(B | y2, y1), softmax over the two labels"
SCALAR_RULE = "reward of y = the logit at the last token of [x, y]; p(y1 better than y2) = sigmoid(reward of y1 - of y2)"
_REMEDY = "Convert the checkpoint again."


@dataclass(frozen=True)
class GramConfig:
    """The fields of gram_config.json that scoring needs; for folders of others judges.py fills them in.

    A generative model has a template and label ids (A, B), a scalar head has a conversation.
    """

    seq_length: int
    template: Optional[JudgeTemplate] = None
    label_ids: Optional[tuple[int, int]] = None
    conversation: Optional[Conversation | RenderedConversation] = None
    pad_id: Optional[int] = None
    """Padding that the text of another's scalar model may end in; an export's never does."""


def read_gram_config(folder: str | Path) -> GramConfig:
    """Read and check the folder's gram_config.json.

    Raises:
        ConfigError: it is missing, invalid, or was changed after it was written.
    """
    path = Path(folder) / GRAM_CONFIG
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. --model needs a folder written by `gram convert`.")
    gram = read_json(path, ConfigError, _REMEDY)
    seq_length = gram.get("seq_length")
    if type(seq_length) is not int or seq_length < 1:
        raise ConfigError(f"{path}: not what `gram convert` writes: seq_length is missing or wrong. {_REMEDY}")
    if gram.get("head") == SCALAR:
        return GramConfig(seq_length, conversation=Conversation.from_dict(gram.get("conversation"), str(path)))
    labels = gram.get("label_ids")
    valid = isinstance(labels, list) and len(labels) == 2 and all(type(number) is int for number in labels)
    if not valid or min(labels) < 0 or labels[0] == labels[1]:
        raise ConfigError(f"{path}: not what `gram convert` writes: label_ids are missing or wrong. {_REMEDY}")
    template = JudgeTemplate.from_dict(gram.get("template"), str(path))
    if gram.get("template_sha256", template.sha256) != template.sha256:
        raise ConfigError(f"{path}: the template was changed after it was written. {_REMEDY}")
    return GramConfig(seq_length, template, (labels[0], labels[1]))
