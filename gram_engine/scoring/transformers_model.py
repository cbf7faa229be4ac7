"""Margins of many texts at once by transformers' own modelling code, for every architecture that it loads.

Where it is exact, texts are packed without padding and shared beginnings are computed once, as in judge_model.py: an attention
function that honours the bounds of a `Batch` is registered with transformers. Which models that holds for is decided when a
model is loaded, by what it consists of and by a comparison of a few texts with the model's own results. Other models, and texts
longer than a sliding window, run in padded batches with the model's own attention.

The output layer of a language model is replaced by its two rows of the labels, in fp32 and at the last tokens only; what the
model does to logits after that layer (caps, scales) stays its own.
"""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gram_engine.errors import CheckpointError, ConfigError, one_line
from gram_engine.kernels.attention import AttentionBounds, packed_attention
from gram_engine.log import log
from gram_engine.scoring.batch import Batch, finite
from gram_engine.scoring.token_tree import LEAST_SHARED, TokenTree

PACKED = "gram_packed"
"""Name of our attention function among transformers' attention implementations."""
PROBE_LENGTHS = (9, 14, 5)
"""Tokens that the texts of the comparison have after their shared beginning."""
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2}
"""Largest difference of the comparison as a part of the margins' spread; 0.3 for half precision."""


class CannotPack(Exception):
    """What this model does to a packed batch would not be exact; the text says why."""


@dataclass
class _Pass:
    """One packed forward pass."""

    bounds: AttentionBounds
    calls: int = 0
    """Of the attention function."""


_PASS: ContextVar[_Pass] = ContextVar("packed forward pass")


class TransformersModel:
    """A causal language model as a judge, or a sequence classifier with one label as a scalar reward model."""

    def __init__(
        self,
        model_class: Any,
        folder: str | Path,
        label_ids: Optional[tuple[int, int]],
        dtype: str = "auto",
        device: str | torch.device = "cpu",
        padded_tokens: int = 4096,
    ):
        """Load a folder.

        Args:
            model_class: the class of transformers, "...ForCausalLM" or "...ForSequenceClassification".
            label_ids: tokens of the labels A and B; None: a sequence classifier.
            dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
            padded_tokens: tokens of a padded batch with its padding; a longer text runs alone.

        Raises:
            ConfigError: label ids outside the vocabulary, or a model without an output layer of rows.
            CheckpointError: weights are missing, damaged, of another shape, or not finite.
        """
        self.device, self.padded_tokens = torch.device(device), padded_tokens
        self.model = _load(model_class, Path(folder), dtype).to(self.device).eval()
        self.dtype = self.model.dtype
        self.config = self.model.config.get_text_config()
        self.longest = _longest_alike(self.config)
        self._own_attention = self.model.config._attn_implementation
        self.head = None if label_ids is None else _LabelHead.of(self.model, label_ids, folder)
        probe = self._probe()
        own = self._one_by_one(probe, label_ids) if probe else None
        if self.head is not None:
            self.model.set_output_embeddings(self.head)
        self.padded_because = self._why_not_packed(probe, own)
        """Why texts are padded instead of packed; None: they are packed."""

    @torch.inference_mode()
    def margins(self, tree: TokenTree) -> Tensor:
        """Z_A - Z_B, or the reward of a sequence classifier, at the end of each text of the tree: [texts] fp32."""
        if self.padded_because is None and tree.longest <= self.longest:
            return self._packed(tree)
        texts = tree.texts()
        short = [number for number, text in enumerate(texts) if self.padded_because is None and len(text) <= self.longest]
        rest = sorted(set(range(len(texts))).difference(short), key=lambda number: len(texts[number]))
        found = torch.empty(len(texts), device=self.device)
        if short:
            found[short] = self._packed(TokenTree.of([texts[number] for number in short]))
        for batch in self._padded_batches(rest, texts):
            found[batch] = self._padded([texts[number] for number in batch])
        return found

    def _packed(self, tree: TokenTree) -> Tensor:
        batch = Batch.of(tree, self.device)
        inputs = {"input_ids": batch.tokens[None], "position_ids": batch.positions[None], "use_cache": False}
        self._attend_by(PACKED)
        passed = _Pass(batch.attention)
        token = _PASS.set(passed)
        try:
            if self.head is None:
                hidden = self.model.base_model(**inputs).last_hidden_state
                margins = self.model.score(hidden[0, batch.last])[:, 0]
            else:
                with self.head.at(batch.last[None]):
                    margins = _difference(self.model(**inputs).logits[0])
        finally:
            _PASS.reset(token)
        if passed.calls != self.config.num_hidden_layers:
            raise CannotPack("not every layer is attention")
        return margins.float()

    def _padded(self, texts: Sequence[list[int]]) -> Tensor:
        """Padded on the right, which no causal model sees, and masked for those that would."""
        lengths = torch.tensor([len(text) for text in texts])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long().to(self.device)
        tokens = torch.full(mask.shape, self.config.pad_token_id or 0, device=self.device)
        tokens[mask.bool()] = torch.tensor([token for text in texts for token in text], device=self.device)
        inputs = {"input_ids": tokens, "attention_mask": mask}
        self._attend_by(self._own_attention)
        if self.head is None:
            return self.model(**inputs).logits[:, 0].float()
        with self.head.at((lengths - 1)[:, None].to(self.device)):
            return _difference(self.model(**inputs, use_cache=False).logits[:, 0])

    def _attend_by(self, implementation: str) -> None:
        """Switch the model to an attention implementation of transformers' table."""
        if self.model.config._attn_implementation != implementation:
            self.model.set_attn_implementation(implementation)

    def _padded_batches(self, numbers: Sequence[int], texts: Sequence[list[int]]) -> Iterator[list[int]]:
        """Numbers of texts, which ascend by length; texts that are `longest` at most are not joined with longer ones."""
        alone = self.head is None and self.config.pad_token_id is None  # transformers cannot tell where such a text ends
        batch: list[int] = []
        for number in numbers:
            length = len(texts[number])
            full = (len(batch) + 1) * length > self.padded_tokens or alone
            if batch and (full or len(texts[batch[-1]]) <= self.longest < length):
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch

    def _why_not_packed(self, probe: list[list[int]], own: Optional[Tensor]) -> Optional[str]:
        kinds = set(getattr(self.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if not self.model._supports_attention_backend:
            return "its attention cannot be replaced"
        if self.model._is_stateful or kinds:
            return f"it has other layers than attention over the whole text {sorted(kinds) or ''}".rstrip()
        if self.head is None and not hasattr(self.model, "score"):
            return "its head is not a linear layer at the last token"
        if own is None:
            return f"a text may have {self.longest} tokens at most"
        try:
            with torch.inference_mode():
                difference = (self._packed(TokenTree.of(probe)) - own).abs().max()
        except (CannotPack, TypeError) as reason:
            return one_line(reason)
        if difference > TOLERANCE.get(self.dtype, 0.3) * own.std():
            return f"packed texts give other results, by up to {float(difference):.1g}"
        return None

    def _probe(self) -> list[list[int]]:
        """Random texts with a shared beginning and one without; none if even these are too long to be packed."""
        draw, size = torch.Generator().manual_seed(0), self.config.vocab_size

        def text(length: int) -> list[int]:
            tokens = torch.randint(size // 4, size // 2, (length,), generator=draw).tolist()  # no special ones
            return [token + 1 if token == self.config.pad_token_id else token for token in tokens]

        shared = text(LEAST_SHARED + 1)
        texts = [shared + text(length) for length in PROBE_LENGTHS] + [text(LEAST_SHARED)]
        return texts if max(map(len, texts)) <= self.longest else []

    @torch.inference_mode()
    def _one_by_one(self, texts: list[list[int]], label_ids: Optional[tuple[int, int]]) -> Tensor:
        """What the model as it was loaded gives for each text alone: [texts] fp32."""
        found = []
        for text in texts:
            tokens = torch.tensor([text], device=self.device)
            logits = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
            found.append(logits[0, 0] if label_ids is None else _difference(logits[0, -1:, list(label_ids)])[0])
        return torch.stack(found).float()


class _LabelHead(nn.Module):
    """The output layer's rows of the two labels, applied to chosen rows of each sequence in fp32."""

    def __init__(self, output: nn.Linear, label_ids: tuple[int, int]):
        super().__init__()
        self.weight = output.weight[list(label_ids)].detach().float()
        self.bias = None if output.bias is None else output.bias[list(label_ids)].detach().float()
        self._rows: Optional[Tensor] = None

    @classmethod
    def of(cls, model: Any, label_ids: tuple[int, int], folder: str | Path) -> _LabelHead:
        """The rows of the model's output layer.

        Raises:
            ConfigError: it is no linear layer, or the labels lie outside the vocabulary.
        """
        output = model.get_output_embeddings()
        if not isinstance(output, nn.Linear):
            raise ConfigError(
                f"{folder}: the output layer of {type(model).__name__} is {type(output).__name__}, not a linear layer with a "
                "row for each token. Serve the model with vLLM or SGLang, and give --model the server's address."
            )
        if max(label_ids) >= output.out_features:
            raise ConfigError(
                f"{folder}: the label tokens {list(label_ids)} lie outside the vocabulary of {output.out_features}. Use the "
                "tokenizer that belongs to the model."
            )
        return cls(output, label_ids)

    @contextmanager
    def at(self, rows: Tensor) -> Iterator[None]:
        """Within the block logits are made at `rows`: int64 [sequences, rows of each]."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def forward(self, hidden: Tensor) -> Tensor:
        """[sequences, tokens, hidden] -> [sequences, rows, 2] fp32."""
        chosen = hidden.gather(1, self._rows[..., None].expand(-1, -1, hidden.shape[-1]))
        return F.linear(chosen.float(), self.weight, self.bias)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Optional[Tensor], **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, heads, tokens, dim], [1, groups, tokens, dim] -> [1, tokens, heads, dim].

    Raises:
        CannotPack: it is asked for something that `packed_attention` does not do.
    """
    passed = _PASS.get()
    scaling, window = options.pop("scaling", None), options.pop("sliding_window", None)
    causal = options.pop("is_causal", None)
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise CannotPack("its attention looks ahead")
    if attention_mask is not None:
        raise CannotPack("it makes an attention mask of its own")
    if window is not None and passed.bounds.longest[1] > window:
        raise CannotPack(f"its sliding window of {window} is shorter than a text")
    if value.shape[-1] != query.shape[-1]:
        raise CannotPack("its values have another size than its keys")
    unknown = [name for name, option in options.items() if name not in _HARMLESS and option is not None and option is not False]
    if options.get("dropout") or unknown:
        raise CannotPack(f"its attention takes {', '.join(unknown) or 'dropout'}")
    passed.calls += 1
    factor = 1.0 if scaling is None else scaling * math.sqrt(query.shape[-1])
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    query = query if math.isclose(factor, 1.0) else query * factor
    return packed_attention(query, key, value, passed.bounds)[None], None


_HARMLESS = {"dropout", "position_ids", "cache_position", "position_embeddings", "use_cache", "layer_idx"}
"""Options of an attention function that say what its bounds say already, or that do not concern it."""


def _load(model_class: Any, folder: Path, dtype: str) -> Any:
    """The model, with all its weights from the folder."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(PACKED, _attend)
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    safe = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    try:
        model, report = model_class.from_pretrained(folder, dtype=wanted, output_loading_info=True, **safe)
    except Exception as error:  # for damaged files and unknown quantisations transformers raises anything
        reason = one_line(str(error).strip().partition("\n")[0] or type(error).__name__)
        raise CheckpointError(f"{folder}: transformers cannot load it as {model_class.__name__} ({reason}).") from None
    if lacking := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise CheckpointError(
            f"{folder}: {len(lacking)} weights are missing or have another shape: {', '.join(lacking[:3])}. Download the "
            "folder again."
        )
    if unused := sorted(report["unexpected_keys"]):
        log(f"model: {len(unused)} weights of the folder are not {model_class.__name__}'s: {', '.join(unused[:3])}", sys.stderr)
    for name, parameter in model.named_parameters():
        finite(parameter, f"{folder}: {name}")
    return model


def _longest_alike(config: Any) -> float:
    """Tokens up to which a text's attention spans all of it, and its positions do not depend on other texts of its batch."""
    ropes = getattr(config, "rope_parameters", None) or {}
    ropes = [ropes] if "rope_type" in ropes else [rope for rope in ropes.values() if isinstance(rope, dict)]
    limits = [getattr(config, "sliding_window", None)]
    for rope in ropes:
        if rope.get("rope_type") in ("longrope", "dynamic"):
            limits.append(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    return min((limit for limit in limits if limit), default=math.inf)


def _difference(logits: Tensor) -> Tensor:
    """[..., 2] -> [...] fp32: logit of A - logit of B."""
    logits = logits.float()
    return logits[..., 0] - logits[..., 1]
