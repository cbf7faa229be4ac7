"""LoRA (Hu et al., 2021): y = W x + alpha / rank * B A x, with frozen W, for linear layers of attention and MLP.

It extends megatron-core's linear layers, local or Transformer Engine's.  peft's layer for Megatron (tuners/lora/tp_layer.py)
is not used, because it has no sharded_state_dict, does not mark gradients that are partial under sequence parallelism, does
not support Transformer Engine's layers, and wraps the linear layer, which changes its checkpoint keys.

There is one adapter per linear layer of Megatron, so the three projections of linear_qkv share A, and so do gate and up of
linear_fc1; peft has an A and a B for every projection.  The checkpoint keys are Megatron-Bridge's:
`...linear_qkv.adapter.linear_in.weight` (A) and `...linear_qkv.adapter.linear_out.weight` (B).
"""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from gram_engine.config.schema import ModelConfig
from gram_engine.errors import CheckpointError
from gram_engine.platform.stack import mlp_submodules

COLUMN_PARALLEL = ("linear_qkv", "linear_fc1")
GATED = "linear_fc1"
LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_modules")


class LowRankAdapter(torch.nn.Module):
    """scale * B A of one linear layer: maps its input [tokens (/ TP), 1, in] to a summand of its output, in the same dtype.

    For a column-parallel layer A is replicated on all tensor-parallel processes and B is sharded like the layer's rows; for a
    row-parallel layer A is sharded like the layer's columns and B is replicated.  Communication is of [tokens, 1, rank], never
    of hidden rows.

    Args:
        name: of the linear layer.
        linear: the layer; gives the shape [out (/ TP), in (/ TP)], dtype and device of its weight, and its config.
        scale: alpha / rank.
    """

    def __init__(self, name: str, linear: torch.nn.Module, rank: int, scale: float):
        super().__init__()
        self.scale, self.column_parallel, self.gated = scale, name in COLUMN_PARALLEL, name == GATED
        self.group = parallel_state.get_tensor_model_parallel_group()
        weight = linear.weight
        where = dict(bias=False, device=weight.device, dtype=linear.config.params_dtype)
        self.linear_in = torch.nn.Linear(weight.shape[1], rank, **where)
        self.linear_out = torch.nn.Linear(rank, weight.shape[0], **where)
        sharded, self.axis = (self.linear_out, 0) if self.column_parallel else (self.linear_in, 1)
        set_tensor_model_parallel_attributes(sharded.weight, True, self.axis, stride=2 if self.gated else 1)
        self.set_sequence_parallel(linear.config.sequence_parallel)

    def set_sequence_parallel(self, sequence_parallel: bool) -> None:
        """Say whether the hidden rows are slices; the gradients of the replicated matrix are partial then, and summed."""
        self.sequence_parallel = sequence_parallel
        replicated = self.linear_in if self.column_parallel else self.linear_out
        replicated.weight.sequence_parallel = sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear_out(self.scale * self._communicate(self.linear_in(hidden)))

    def _communicate(self, low: Tensor) -> Tensor:
        if self.column_parallel:
            mapping = gather_from_sequence_parallel_region if self.sequence_parallel else copy_to_tensor_model_parallel_region
        elif self.sequence_parallel:
            mapping = reduce_scatter_to_sequence_parallel_region
        else:
            mapping = reduce_from_tensor_model_parallel_region
        return mapping(low, group=self.group)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """A and B with their offsets in the whole model; B of linear_fc1 is split into gate and up, as its weight is."""
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"linear_out.weight" if self.column_parallel else "linear_in.weight": self.axis},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.gated:
            key = f"{prefix}linear_out.weight"
            state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)
        return state


class AdaptedLinear:
    """Mixin for a linear layer of megatron-core that adds a LowRankAdapter; `adapted` combines the classes."""

    adapter_options: dict

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.adapter = LowRankAdapter(linear=self, **self.adapter_options)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(hidden)
        norm = getattr(self, "layer_norm_weight", None)
        if norm is not None:  # Transformer Engine's fused layer does not return its normed input
            hidden = F.rms_norm(hidden, hidden.shape[-1:], norm, self.eps)
        return output + self.adapter(hidden), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state.update(self.adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata))
        return state


@functools.cache
def adapted(linear: type, name: str, rank: int, scale: float) -> type:
    """The class `linear` of megatron-core with an adapter, for the submodule `name` of a layer's specification."""
    options = {"adapter_options": dict(name=name, rank=rank, scale=scale)}
    return type(f"Adapted{linear.__name__}", (AdaptedLinear, linear), options)


def adapted_layer_spec(layer_spec: ModuleSpec, model: ModelConfig) -> ModuleSpec:
    """The specification of a layer, with adapters at --lora-modules."""
    layer_spec = copy.deepcopy(layer_spec)
    for part in (layer_spec.submodules.self_attention.submodules, mlp_submodules(layer_spec)):
        for name in set(model.lora_modules) & vars(part).keys():
            setattr(part, name, adapted(getattr(part, name), name, model.lora_rank, model.lora_alpha / model.lora_rank))
    return layer_spec


def adapter_of(linear: torch.nn.Module) -> LowRankAdapter | None:
    """The adapter of a linear layer, or None."""
    return getattr(linear, "adapter", None)


def is_adapter(name: str) -> bool:
    """Whether a parameter's name, or a checkpoint key, is an adapter's."""
    return ".adapter." in name


def initial_adapter(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Initial values of an unsharded A or B, as in peft: A is Kaiming uniform with a = sqrt(5), B is zero."""
    if name.endswith("linear_out.weight"):
        return torch.zeros(shape)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def freeze_base(chunk: MegatronModule) -> None:
    """Freeze all but the adapters.  Parameters frozen before DDP have neither a gradient buffer nor optimizer state."""
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def enable_input_grads(chunk: MegatronModule) -> None:
    """For recomputation: make the embedding's output require a gradient.

    megatron-core's checkpoint function has a backward pass only if its input requires a gradient.  The output of a frozen
    embedding does not, and the adapters of the first layers would get no gradient.
    """
    chunk.embedding.register_forward_hook(lambda _module, _args, hidden: hidden.requires_grad_())


def check_adapters(saved: ModelConfig, model: ModelConfig, path: Path, resuming: bool) -> None:
    """Check that the adapters in a checkpoint are this run's; a new run may also add adapters to weights without any.

    Raises:
        CheckpointError: names the first flag that differs, and the remedy.
    """
    if saved.lora_rank is None and not resuming:
        return
    for name in LORA_FIELDS:
        before, now = getattr(saved, name), getattr(model, name)
        if before != now:
            flag = "--" + name.replace("_", "-")
            remedy = f"merge the adapters (gram convert --load {path} --save FOLDER) and start with --load-hf FOLDER"
            if resuming:
                remedy = "start a new run with --pretrained-checkpoint" if saved.lora_rank is None else f"{remedy} as a new run"
            before, now = (" ".join(value) if isinstance(value, tuple) else value for value in (before, now))
            raise CheckpointError(f"{path}: saved with {flag} {before}, this run has {now}. Use the same, or {remedy}.")
