"""`open_judge`: any model as a judge. What it is, is told by its files, and said in one log line.

- A folder with gram_config.json: an export of this engine, which brings its template, or its conversation, and its labels.
- "...ForCausalLM": a zero-shot judge by the probabilities of the two label tokens after the judge prompt.
- "...ForSequenceClassification" with one label: a scalar reward model, which reads the conversation as its own chat template
  writes it.
- An address: a server.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

from gram_engine.data.conversation import RenderedConversation
from gram_engine.data.samples import label_ids
from gram_engine.data.template import DEFAULT_TEMPLATE, JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import ConfigError, one_line
from gram_engine.files import read_json
from gram_engine.hf.folder import HuggingFaceFolder
from gram_engine.hf.gram_config import GRAM_CONFIG, GramConfig
from gram_engine.hf.mapping import SCORE
from gram_engine.log import log
from gram_engine.model.shapes import shape_from_hf
from gram_engine.platform.device import default_device
from gram_engine.scoring.judge_model import JudgeModel
from gram_engine.scoring.scorer import Dtype, Judge, LocalModel, RewardModelScorer, ScalarScorer, default_batch_tokens
from gram_engine.scoring.server.options import ServerOptions, is_address
from gram_engine.scoring.transformers_model import TransformersModel

FAST = {name + head for name in ("Llama", "Qwen3") for head in ("ForCausalLM", "ForSequenceClassification")}
"""Classes of transformers that JudgeModel computes, where it has all features that config.json asks for."""


def open_judge(
    model: str | Path,
    *,
    template: Optional[str] = None,
    dtype: Dtype = "auto",
    device: Optional[str] = None,
    batch_tokens: Optional[int] = None,
    seq_length: Optional[int] = None,
    server: Optional[ServerOptions] = None,
) -> Judge:
    """Open a model as a judge.

    Args:
        model: a folder, or the address of a server.
        template: judge template of a zero-shot judge or a server, by name or path; None: gram-code. Other models have texts
            of their own, and do not use it.
        dtype: of the weights, as torch names it; "auto": as stored.
        device: as torch names it; None: a GPU where there is one.
        batch_tokens: tokens that run at once; None: 4,096 on a CPU, 65,536 on a GPU.
        seq_length: tokens of a text, to which longer ones are shortened; None: gram_config.json's, or else the model's
            max_position_embeddings.
        server: options of a server.

    Raises:
        ConfigError: the model is none of these, or its parts do not fit together; the text names the remedy.
        CheckpointError: its weights are pickles, missing, damaged or not finite.
    """
    if is_address(str(model)):
        from gram_engine.scoring.server.scorer import open_server_judge

        return open_server_judge(str(model), template=template, options=server or ServerOptions(), seq_length=seq_length)
    folder = Path(model)
    wanted = _Wanted(template, dtype, torch.device(device or default_device()), batch_tokens, seq_length)
    if (folder / GRAM_CONFIG).is_file():
        return _open_export(folder, wanted)
    found = _Recognised.of(folder)
    return _open_scalar(found, wanted) if found.scalar else _open_zero_shot(found, wanted)


@dataclass(frozen=True)
class _Wanted:
    """The arguments of `open_judge`."""

    template: Optional[str]
    dtype: Dtype
    device: torch.device
    batch_tokens: Optional[int]
    seq_length: Optional[int]

    def checked_seq_length(self, limit: Optional[int], folder: Path) -> int:
        """`seq_length`, or else the limit of the model; raises ConfigError."""
        if self.seq_length is None and limit is None:
            raise ConfigError(
                f"{folder}: neither config.json (max_position_embeddings) nor the tokenizer (model_max_length) says how long a "
                "text may be. Give --seq-length."
            )
        if self.seq_length is None:
            return limit
        if self.seq_length < 1 or (limit is not None and self.seq_length > limit):
            raise ConfigError(f"--seq-length {self.seq_length}: {folder} takes from 1 to {limit or 'any number of'} tokens.")
        return self.seq_length

    @property
    def unused_template(self) -> str:
        """For the log line of a model that has texts of its own."""
        return f"--template {self.template} is not for it" if self.template else ""


@dataclass(frozen=True)
class _Recognised:
    """A folder that this engine did not write."""

    folder: Path
    model_class: Any
    """A class of transformers."""
    config: Any
    """Its configuration."""
    scalar: bool

    @classmethod
    def of(cls, folder: Path) -> _Recognised:
        """By config.json; raises as `open_judge`."""
        path = folder / "config.json"
        if not path.is_file():
            raise ConfigError(
                f"{path}: no such file. --model takes a folder written by `gram convert`, a Hugging Face folder of a language "
                "model or of a reward model with one label, or the address of a server (http://...)."
            )
        content = read_json(path, ConfigError, "Download it again.")
        named = content.get("architectures")
        name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
        if name is None:
            raise ConfigError(f"{path}: 'architectures' names no class, so nothing tells what the model is. Download it again.")
        scalar = _is_scalar(name, path, remote="auto_map" in content)
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # for a damaged file transformers raises anything
            raise ConfigError(f"{path}: transformers cannot use it ({_first_line(error)}). Download it again.") from None
        if scalar and config.num_labels != 1:
            raise ConfigError(
                f"{path}: {config.num_labels} labels; one is needed. {name} tells classes apart, and gives no reward: choose a "
                "reward model with one label."
            )
        HuggingFaceFolder(folder)  # refuses pickles
        return cls(folder, getattr(transformers, name), config, scalar)

    @property
    def name(self) -> str:
        return self.model_class.__name__

    def model(self, labels: Optional[tuple[int, int]], wanted: _Wanted) -> LocalModel:
        """The engine's own forward pass where it has one for this model, else transformers'."""
        if self.name in FAST and self._fits_the_engine():
            return JudgeModel(self.folder, labels, wanted.dtype, wanted.device)
        padded_tokens = wanted.batch_tokens or default_batch_tokens(wanted.device)
        return TransformersModel(self.model_class, self.folder, labels, wanted.dtype, wanted.device, padded_tokens)

    def _fits_the_engine(self) -> bool:
        try:
            shape_from_hf(self.folder)
        except ConfigError:
            return False
        return not self.scalar or SCORE.engine in HuggingFaceFolder(self.folder).files

    def longest_text(self, tokenizer: Tokenizer) -> Optional[int]:
        """Tokens that the model takes at most, if its files say that."""
        limits = getattr(self.config.get_text_config(), "max_position_embeddings", None), tokenizer.hf.model_max_length
        return next((limit for limit in limits if isinstance(limit, int) and 0 < limit < 1 << 31), None)


def _open_export(folder: Path, wanted: _Wanted) -> RewardModelScorer:
    judge = RewardModelScorer.from_pretrained(folder, wanted.dtype, wanted.device, wanted.batch_tokens)
    judge.max_tokens = wanted.checked_seq_length(judge.gram.seq_length, folder)
    if judge.template is None:
        _say("export with a scalar head", wanted.unused_template)
    else:
        _say(f"export, {_labels(judge.gram)}", f"template {judge.template.name} of its {GRAM_CONFIG}", wanted.unused_template)
    return judge


def _open_zero_shot(found: _Recognised, wanted: _Wanted) -> RewardModelScorer:
    template = JudgeTemplate.load(wanted.template or DEFAULT_TEMPLATE)
    tokenizer = Tokenizer.load("HuggingFaceTokenizer", found.folder)
    labels = label_ids(tokenizer, template)
    gram = GramConfig(wanted.checked_seq_length(found.longest_text(tokenizer), found.folder), template, labels)
    model = found.model(labels, wanted)
    plain = "" if tokenizer.hf.chat_template else "no chat template: the judge prompt as it is"
    _say(f"zero-shot judge, {found.name}, {_labels(gram)}", f"template {template.name}", plain, _way(model))
    return RewardModelScorer(model, tokenizer, gram, wanted.batch_tokens)


def _open_scalar(found: _Recognised, wanted: _Wanted) -> ScalarScorer:
    tokenizer = Tokenizer.load("HuggingFaceTokenizer", found.folder, any_chat_template=True)
    conversation = conversation_of(tokenizer)
    limit = wanted.checked_seq_length(found.longest_text(tokenizer), found.folder)
    gram = GramConfig(limit, conversation=conversation, pad_id=found.config.get_text_config().pad_token_id)
    model = found.model(None, wanted)
    _say(f"scalar reward model, {found.name}", wanted.unused_template, _way(model))
    return ScalarScorer(model, tokenizer, gram, wanted.batch_tokens)


def conversation_of(tokenizer: Tokenizer) -> RenderedConversation:
    """How the model's own chat template writes prompt and response; raises as `open_judge`."""
    if tokenizer.hf.chat_template is None:
        raise ConfigError(
            f"{tokenizer.path}: the tokenizer has no chat template, so it is not known how this reward model wants to read a "
            "prompt and a response. Put the template of its model card into chat_template.jinja."
        )
    rendered = RenderedConversation(tokenizer.hf)
    try:
        rendered.layout("x", "y")
    except Exception as error:  # jinja and the template itself raise anything
        raise ConfigError(
            f"{tokenizer.path}: the chat template cannot write a user's message and an answer ({_first_line(error)}). Put the "
            "template of the model card into chat_template.jinja."
        ) from None
    return rendered


def _is_scalar(name: str, config: Path, remote: bool) -> bool:
    """Whether a class of transformers is a sequence classifier; False: a causal language model. Raises ConfigError: neither."""
    from transformers.models.auto import modeling_auto

    if name in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        return True
    if name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return False
    if remote:
        raise ConfigError(
            f"{config}: {name} is code of the model's own (auto_map), which is not run. Serve the model, and give --model the "
            "server's address."
        )
    raise ConfigError(
        f"{config}: {name} is neither a causal language model nor a sequence classifier of transformers. --model takes "
        "...ForCausalLM, ...ForSequenceClassification with one label, and folders written by `gram convert`."
    )


def _say(*parts: str) -> None:
    """One line on stderr: stdout is for results."""
    log("model: " + ", ".join(filter(None, parts)), sys.stderr)


def _labels(gram: GramConfig) -> str:
    return f"labels {gram.template.label_a}={gram.label_ids[0]} {gram.template.label_b}={gram.label_ids[1]}"


def _way(model: LocalModel) -> str:
    """How TransformersModel makes batches."""
    if not isinstance(model, TransformersModel):
        return ""
    return f"padded batches ({model.padded_because})" if model.padded_because else "packed by transformers"


def _first_line(error: Exception) -> str:
    return one_line(str(error).strip().partition("\n")[0] or type(error).__name__)
