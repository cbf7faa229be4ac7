"""Margins Z_A - Z_B of many judge prompts at once, from a Hugging Face folder of LLaMA or Qwen3 weights.

What a general language model computes and a judge does not need is left out: no padding (texts stand behind each other as
in training), common beginnings once (token_tree.py), the last layer and the final norm at the last token of each text only,
and of the vocabulary two rows, as one direction.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from gram_engine.config import ModelConfig
from gram_engine.convert.hf_folder import HuggingFaceFolder
from gram_engine.convert.mapping import EMBEDDING, LAYER, OUTPUT, SCORE, rules
from gram_engine.errors import CheckpointError, ConfigError
from gram_engine.model.presets import ROPE_SCALING, shape_from_hf
from gram_engine.scoring.token_tree import TokenTree


class Batch(NamedTuple):
    """Token trees in one row, on the device."""

    tokens: Tensor
    """[tokens] int64."""
    positions: Tensor
    """[tokens] int64, in their texts."""
    last: Tensor
    """[texts] int64: where each text ends."""
    key_rows: Optional[Tensor]
    """[keys] int64: each segment's path, one behind the other; None where segments are their own paths."""
    queries: list[tuple[int, int]]
    """Rows of each segment."""
    keys: list[tuple[int, int]]
    """Rows of each segment's path among the keys."""
    text_keys: list[tuple[int, int]]
    """Rows of each text's path among the keys."""


class JudgeModel:
    """The weights, fused as the engine fuses them; `margins` runs them."""

    def __init__(self, folder: str | Path, label_ids: tuple[int, int] | None, dtype: str = "auto", device: str = "cpu"):
        """Read a folder.

        Args:
            label_ids: tokens of the labels A and B; not used for a folder with a head of one logit.
            dtype: "auto" (as stored), "float32", "bfloat16" or "float16".

        Raises:
            ConfigError: another architecture, or label ids outside the vocabulary.
            CheckpointError: weights are missing, cut off, of another shape, or not finite.
        """
        self.config = ModelConfig(**shape_from_hf(folder))
        source = HuggingFaceFolder(folder)
        has_score = SCORE.engine in source.files
        stored = source.check(self.config, other_head=SCORE.engine if has_score else None)
        self.dtype = stored if dtype == "auto" else getattr(torch, dtype)
        self.device = torch.device(device)
        if not has_score and max(label_ids) >= self.config.vocab_size:
            raise ConfigError(f"{folder}: label_ids {list(label_ids)} lie outside the vocabulary of {self.config.vocab_size}.")
        self.weights: dict[tuple[str, int | None], Tensor] = {}
        for rule, layer in rules(self.config):
            if rule is not OUTPUT:
                parts = [source.read(name) for name in rule.hf_names(layer)]
                joined = rule.join(parts, self.config)
                where = f"{folder}: {rule.engine}{'' if layer is None else f' of layer {layer}'}"
                self.weights[rule.engine, layer] = _finite(joined, where).to(self.device, self.dtype)
        if has_score:
            direction = source.read(SCORE.engine)[0].float()
        else:
            name = (OUTPUT if self.config.untie_embeddings_and_output_weights else EMBEDDING).hf[0]
            row_a, row_b = (source.read(name, (token, token + 1))[0].to(self.dtype).float() for token in label_ids)
            direction = row_a - row_b
        self.direction = _finite(direction, f"{folder}: the labels' output rows").to(self.device)
        self._mask = torch.empty(0, 0)
        self.inverse_frequencies = _inverse_frequencies(self.config).to(self.device)

    @torch.inference_mode()
    def margins(self, tree: TokenTree) -> Tensor:
        """Z_A - Z_B, or a scalar head's reward, at the end of each text of the tree: [texts] fp32."""
        batch = self._batch(tree)
        angles = batch.positions[:, None].float() * self.inverse_frequencies
        turn = angles.cos().to(self.dtype)[:, None], angles.sin().to(self.dtype)[:, None]
        hidden = F.embedding(batch.tokens, self.weights[EMBEDDING.engine, None])
        for layer in range(self.config.num_layers):
            hidden = self._layer(hidden, layer, batch, turn)
        hidden = self._norm(hidden, "decoder.final_layernorm.weight", None)
        return hidden.float() @ self.direction

    def _layer(self, hidden: Tensor, layer: int, batch: Batch, turn: tuple[Tensor, Tensor]) -> Tensor:
        """[tokens, hidden] -> the same; the last layer: -> [texts, hidden], the ends of the texts."""
        is_last = layer == self.config.num_layers - 1
        normed = self._norm(hidden, LAYER + "self_attention.linear_qkv.layer_norm_weight", layer)
        query, key, value = self._query_key_value(normed, layer, batch.last if is_last else None)
        if self.config.qk_layernorm:
            query = self._norm(query, LAYER + "self_attention.q_layernorm.weight", layer)
            key = self._norm(key, LAYER + "self_attention.k_layernorm.weight", layer)
        key = _rotate(key, *turn)
        query = _rotate(query, *(part[batch.last] for part in turn) if is_last else turn)
        if batch.key_rows is not None:
            key, value = key[batch.key_rows], value[batch.key_rows]
        if is_last:
            hidden, queries, keys = hidden[batch.last], [(row, row + 1) for row in range(len(batch.last))], batch.text_keys
        else:
            queries, keys = batch.queries, batch.keys
        attended = self._attention(query, key, value, queries, keys)
        hidden = hidden + F.linear(attended, self.weights[LAYER + "self_attention.linear_proj.weight", layer])
        normed = self._norm(hidden, LAYER + "mlp.linear_fc1.layer_norm_weight", layer)
        gate, up = F.linear(normed, self.weights[LAYER + "mlp.linear_fc1.weight", layer]).chunk(2, dim=-1)
        return hidden + F.linear(F.silu(gate).mul_(up), self.weights[LAYER + "mlp.linear_fc2.weight", layer])

    def _query_key_value(self, normed: Tensor, layer: int, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """query [rows (None: tokens), heads, dim], key and value [tokens, groups, dim]."""
        groups, dim = self.config.num_query_groups, self.config.kv_channels
        weight = self.weights[LAYER + "self_attention.linear_qkv.weight", layer]
        if rows is None:
            fused = F.linear(normed, weight).unflatten(-1, (groups, -1, dim))
            return fused[:, :, :-2].flatten(1, 2), fused[:, :, -2], fused[:, :, -1]
        weight = weight.view(groups, -1, dim, normed.shape[-1])
        key, value = F.linear(normed, weight[:, -2:].flatten(0, 2)).unflatten(-1, (groups, 2, dim)).unbind(2)
        return F.linear(normed[rows], weight[:, :-2].flatten(0, 2)).unflatten(-1, (-1, dim)), key, value

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, queries: list, keys: list) -> Tensor:
        """Each segment's queries against its path, of which they are the end. -> [rows, heads * dim]."""
        attended = torch.empty_like(query)
        for (start, end), (first, last) in zip(queries, keys, strict=True):
            q = query[start:end].transpose(0, 1)[None]
            k, v = (part[first:last].transpose(0, 1)[None] for part in (key, value))
            new, seen = end - start, last - first
            mask = None if new in (1, seen) else self._lower_right(seen)[seen - new : seen, :seen]
            result = F.scaled_dot_product_attention(q, k, v, mask, is_causal=new == seen > 1, enable_gqa=True)
            attended[start:end] = result[0].transpose(0, 1)
        return attended.flatten(1)

    def _lower_right(self, size: int) -> Tensor:
        """[size or more, the same]: 0 where row i sees column j <= i, else -inf. Kept: segments need corners of it."""
        if len(self._mask) < size:
            self._mask = torch.full((size, size), -math.inf, dtype=self.dtype, device=self.device).triu_(1)
        return self._mask

    def _norm(self, hidden: Tensor, name: str, layer: int | None) -> Tensor:
        weight = self.weights[name, layer]
        return F.rms_norm(hidden, weight.shape, weight, self.config.norm_epsilon)

    def _batch(self, tree: TokenTree) -> Batch:
        bounds = [0]
        for tokens in tree.tokens:
            bounds.append(bounds[-1] + len(tokens))
        queries = list(zip(bounds, bounds[1:]))
        positions = [torch.arange(start, start + len(part)) for start, part in zip(tree.starts, tree.tokens, strict=True)]
        keys, key_rows = queries, None
        if any(parent >= 0 for parent in tree.parents):
            rows = [torch.arange(*bounds) for bounds in queries]
            paths = [torch.cat([rows[part] for part in tree.path(segment)]) for segment in range(len(rows))]
            ends = torch.tensor([len(path) for path in paths]).cumsum(0).tolist()
            keys = [(end - len(path), end) for end, path in zip(ends, paths, strict=True)]
            key_rows = torch.cat(paths).to(self.device)
        return Batch(
            tokens=torch.tensor([token for part in tree.tokens for token in part], device=self.device),
            positions=torch.cat(positions).to(self.device),
            last=torch.tensor([queries[leaf][1] - 1 for leaf in tree.leaves], device=self.device),
            key_rows=key_rows,
            queries=queries,
            keys=keys,
            text_keys=[keys[leaf] for leaf in tree.leaves],
        )


def _finite(tensor: Tensor, what: str) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{what} holds NaN or infinity. Export another checkpoint.")
    return tensor


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding. heads [tokens, heads, dim], cos and sin [tokens, 1, dim / 2]."""
    one, other = heads.chunk(2, dim=-1)
    return torch.cat((one * cos - other * sin, other * cos + one * sin), dim=-1)


def _inverse_frequencies(config: ModelConfig) -> Tensor:
    """[dim / 2] fp32, with LLaMA 3.1's scaling: long waves are stretched, short ones stay, those between are blended."""
    exponents = torch.arange(0, config.kv_channels, 2, dtype=torch.float32) / config.kv_channels
    frequencies = 1.0 / config.rotary_base**exponents
    if config.rope_scaling_factor is None:
        return frequencies
    turns = ROPE_SCALING["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = ROPE_SCALING["low_freq_factor"], ROPE_SCALING["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / config.rope_scaling_factor)
