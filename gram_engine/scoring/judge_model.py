"""Margins Z_A - Z_B of many judge prompts at once, from a Hugging Face folder of LLaMA or Qwen3 weights.

Only what the margins need is computed: sequences are packed without padding, as in training; shared prefixes are computed
once (token_tree.py); the last layer and the final norm run at the last token of each sequence only; and instead of the output
layer there is one vector, the difference of the labels' two rows.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gram_engine.config.schema import ModelConfig
from gram_engine.errors import ConfigError
from gram_engine.hf.folder import HuggingFaceFolder
from gram_engine.hf.mapping import EMBEDDING, LAYER, OUTPUT, SCORE, rules
from gram_engine.kernels.attention import packed_attention
from gram_engine.model.rotary import cos_and_sin, inverse_frequencies, rotate
from gram_engine.model.shapes import shape_from_hf
from gram_engine.scoring.batch import Batch, finite
from gram_engine.scoring.token_tree import TokenTree


class JudgeModel:
    """A judge's weights in the fused layout of the engine, and the forward pass that `margins` runs."""

    def __init__(self, folder: str | Path, label_ids: tuple[int, int] | None, dtype: str = "auto", device: str = "cpu"):
        """Read a folder.

        Args:
            label_ids: tokens of the labels A and B; unused if the folder has a head of one logit (SCORE).
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
                self.weights[rule.engine, layer] = finite(joined, where).to(self.device, self.dtype)
        if has_score:
            direction = source.read(SCORE.engine)[0].float()
        else:
            name = (OUTPUT if self.config.untie_embeddings_and_output_weights else EMBEDDING).hf[0]
            row_a, row_b = (source.read(name, (token, token + 1))[0].to(self.dtype).float() for token in label_ids)
            direction = row_a - row_b
        self.direction = finite(direction, f"{folder}: the labels' output rows").to(self.device)
        self.inverse_frequencies = inverse_frequencies(self.config).to(self.device)

    @torch.inference_mode()
    def margins(self, tree: TokenTree) -> Tensor:
        """Z_A - Z_B, or a scalar head's reward, at the end of each text of the tree: [texts] fp32."""
        batch = Batch.of(tree, self.device)
        turn = cos_and_sin(batch.positions, self.inverse_frequencies, self.dtype)
        hidden = F.embedding(batch.tokens, self.weights[EMBEDDING.engine, None])
        for layer in range(self.config.num_layers):
            hidden = self._layer(hidden, layer, batch, turn)
        hidden = self._norm(hidden, "decoder.final_layernorm.weight", None)
        return hidden.float() @ self.direction

    def _layer(self, hidden: Tensor, layer: int, batch: Batch, turn: tuple[Tensor, Tensor]) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]; the last layer: -> [texts, hidden], the last tokens only."""
        is_last = layer == self.config.num_layers - 1
        normed = self._norm(hidden, LAYER + "self_attention.linear_qkv.layer_norm_weight", layer)
        query, key, value = self._query_key_value(normed, layer, batch.last if is_last else None)
        if self.config.qk_layernorm:
            query = self._norm(query, LAYER + "self_attention.q_layernorm.weight", layer)
            key = self._norm(key, LAYER + "self_attention.k_layernorm.weight", layer)
        key = rotate(key, *turn)
        query = rotate(query, *(part[batch.last] for part in turn) if is_last else turn)
        bounds = batch.last_attention if is_last else batch.attention
        hidden = hidden[batch.last] if is_last else hidden
        attended = packed_attention(query, key, value, bounds).flatten(1)
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

    def _norm(self, hidden: Tensor, name: str, layer: int | None) -> Tensor:
        weight = self.weights[name, layer]
        return F.rms_norm(hidden, weight.shape, weight, self.config.norm_epsilon)
