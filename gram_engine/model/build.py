"""Builds the model chunks from the configuration: TransformerConfig, layer specification, RewardModel, initial weights."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import math
from functools import partial
from typing import Iterator

import torch
import torch.nn.functional as F
import yaml
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from gram_engine.config.schema import Config
from gram_engine.errors import ConfigError
from gram_engine.model.attention import transformer_engine_attention
from gram_engine.model.label_rows import DeferredRMSNorm, label_row_layer_spec
from gram_engine.model.layers import RMSNorm, local_layer_spec
from gram_engine.model.lora import adapted_layer_spec, enable_input_grads, freeze_base, initial_adapter, is_adapter
from gram_engine.model.reward_model import RewardModel
from gram_engine.model.rotary import inverse_frequencies
from gram_engine.model.scalar_head import SCALAR_HEAD
from gram_engine.model.te_layers import fp8_fields, uses_transformer_engine, without_fp8
from gram_engine.platform.device import Platform


def transformer_config(config: Config, platform: Platform) -> TransformerConfig:
    """megatron-core's configuration of the layers.

    Raises:
        ConfigError: a --transformer-config entry is not a field of TransformerConfig, or megatron-core refuses a value.
    """
    model, parallel, training = config.model, config.parallel, config.training
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    fields = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        qk_layernorm=model.qk_layernorm,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=_keep_values,
        output_layer_init_method=_keep_values,
        embedding_init_method=_keep_values,
        use_cpu_initialization=not platform.is_cuda,
        bf16=training.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_size,
        num_layers_in_first_pipeline_stage=parallel.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=parallel.decoder_last_pipeline_num_layers,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        # With interleaved stages at PP 2 both neighbours are the same process, so batched messages could be mixed up.
        overlap_p2p_comm=config.virtual_pipeline_size is not None,
        batch_p2p_comm=config.virtual_pipeline_size is None,
        batch_p2p_sync=False,  # it synchronises the device after each message, which only older releases of torch need
        calculate_per_token_loss=True,
        **_recompute_fields(config),
        **fp8_fields(config),
        apply_rope_fusion=False,  # the attention modules rotate queries and keys (model/attention.py)
        bias_activation_fusion=platform.is_cuda,  # SwiGLU, and adding the residual, as one compiled kernel each
        bias_dropout_fusion=platform.is_cuda,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=platform.is_cuda and _installed("fused_weight_gradient_mlp_cuda"),  # apex
        tp_comm_overlap=parallel.tp_comm_overlap,
        deterministic_mode=training.deterministic_mode,
    )
    fields.update(_native_fields(model.transformer_config))
    try:
        return TransformerConfig(**fields)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"megatron-core refuses this configuration: {error}") from error


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _recompute_fields(config: Config) -> dict:
    training = config.training
    if training.recompute_granularity == "full":
        how = dict(recompute_method=training.recompute_method, recompute_num_layers=training.recompute_num_layers)
    else:
        how = dict(recompute_modules=list(training.recompute_modules))
    return dict(recompute_granularity=training.recompute_granularity, **how)


def _keep_values(weight: torch.Tensor) -> torch.Tensor:
    """megatron-core's initialisation must run, because it marks the shards; `initialise_weights` sets the values later."""
    return weight


def _native_fields(pairs: tuple[str, ...]) -> dict:
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    fields = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key not in known:
            raise ConfigError(f"--transformer-config {pair}: not KEY=VALUE with a field of TransformerConfig.")
        fields[key] = yaml.safe_load(value)
    return fields


def build_model(config: Config, platform: Platform) -> list[RewardModel]:
    """This process's model chunks (one, or one per virtual pipeline stage) with initial weights, before DDP.

    The initial weights depend on the seed alone: a run with another TP or PP size starts from the same model.
    """
    core = transformer_config(config, platform)
    layer_spec, norm = _layers_and_norm(config, platform)
    borrows = config.label_rows_only and core.pipeline_model_parallel_size > 1
    tied = not config.model.untie_embeddings_and_output_weights
    chunks = []
    virtual_size = config.virtual_pipeline_size
    for stage in range(virtual_size or 1):
        vp_stage = stage if virtual_size else None
        is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        specs = [layer_spec] * get_num_layers_to_build(core, vp_stage=vp_stage)
        if is_last and config.prunes_last_layer:
            specs[-1] = label_row_layer_spec(layer_spec, partial(without_fp8, config))
        # With gradients, Transformer Engine would keep a high-precision copy of the FP8 weights from before initialise_weights.
        with torch.set_grad_enabled(not config.training.fp8_param_gather):
            chunk = RewardModel(
                config=core,
                transformer_layer_spec=TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm),
                vocab_size=config.padded_vocab_size,
                max_sequence_length=config.data.seq_length,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=is_last,
                share_embeddings_and_output_weights=tied,
                borrows_label_rows=tied and borrows,
                vocabulary_head=config.has_vocabulary_head,
                scalar_head=config.has_scalar_head,
                inverse_frequencies=inverse_frequencies(config.model).to(platform.device),
                vp_stage=vp_stage,
            )
        if is_last and config.prunes_last_layer:
            # Label rows are replicated on the tensor-parallel processes, so the gradient of their norm is complete.
            chunk.decoder.final_layernorm.weight.sequence_parallel = False
        initialise_weights(chunk, config)
        if config.model.lora_rank is not None:
            freeze_base(chunk)
            if chunk.pre_process and core.recompute_granularity is not None:
                enable_input_grads(chunk)
        chunks.append(chunk.to(platform.device))
    return chunks


def _layers_and_norm(config: Config, platform: Platform) -> tuple[ModuleSpec, type]:
    """(specification of a layer, class of the final norm)."""
    if uses_transformer_engine(config, platform):
        from megatron.core.extensions.transformer_engine import TENorm as norm
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec as layer_spec
    else:
        norm, layer_spec = RMSNorm, local_layer_spec
    layer = layer_spec(qk_layernorm=config.model.qk_layernorm)
    if norm is not RMSNorm:
        layer.submodules.self_attention.submodules.core_attention = transformer_engine_attention()
    if config.model.lora_rank is not None:
        layer = adapted_layer_spec(layer, config.model)
    return layer, DeferredRMSNorm if config.label_rows_only else norm


@torch.no_grad()
def initialise_weights(chunk: RewardModel, config: Config) -> None:
    """Initialise all weights; each tensor has a random generator of its own, seeded by its name and layer.

    Norms are 1, all others normal with standard deviation --init-method-std, scaled by 1 / sqrt(2 layers) for the output
    projections of attention and MLP, as in Megatron.  Padding rows of the vocabulary are 0.  Adapters: `initial_adapter`.
    Weights that the run will load are set to NaN instead, because drawing a large model on the CPU takes minutes.
    """
    std = config.model.init_method_std
    loaded = bool(config.model.load_hf or config.checkpoint.pretrained_checkpoint)
    loaded = loaded and not config.training.fp8_param_gather  # NaN would remain in the scales of FP8 weights
    for tensor in sharded_tensors(chunk):
        name, stacked = tensor.key, tensor.prepend_axis_num
        if loaded and not is_adapter(name) and name != SCALAR_HEAD:
            tensor.data.fill_(math.nan)
            continue
        shape, offset = tensor.global_shape[stacked:], tensor.global_offset[stacked:]
        if len(shape) == 1:
            tensor.data.fill_(1.0)
            continue
        scaled = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        digest = hashlib.sha256(f"{config.training.seed}/{name}/{tensor.global_offset[:stacked]}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        is_vocabulary = name.endswith(("word_embeddings.weight", "output_layer.weight"))
        rows = config.model.vocab_size if is_vocabulary else shape[0]
        if is_adapter(name):
            full = initial_adapter(name, shape, generator)
        else:
            full = torch.randn(rows, *shape[1:], generator=generator)
            full *= std / math.sqrt(2 * config.model.num_layers) if scaled else std
            full = F.pad(full, (0, 0, 0, shape[0] - rows))
        tensor.data.copy_(full[tuple(slice(start, start + size) for start, size in zip(offset, tensor.local_shape))])


def sharded_tensors(chunk: RewardModel) -> Iterator[ShardedTensor]:
    """The chunk's parameters with their offsets in the whole model; gate and up of linear_fc1 are two tensors."""
    for entry in nested_values(chunk.sharded_state_dict()):
        parts = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
        yield from (part for part in parts if isinstance(part, ShardedTensor) and part.data is not None)
