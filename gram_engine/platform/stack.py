"""Everything that depends on the installed release of megatron-core, with the reason for each difference.

A difference is detected by a signature or a name in megatron-core if possible, otherwise by its version.  megatron.core is
imported inside the functions only, because on a CPU the proxy for torch (cpu.py) must be installed first.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import io
import logging
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import Tensor

from gram_engine.errors import ConfigError


@dataclass(frozen=True)
class Stack:
    """A release line (major.minor) of megatron-core."""

    megatron_core: str
    """The release that the engine is tested with; other patch releases of the line are accepted."""
    transformer_engine: SpecifierSet
    """The versions of Transformer Engine that belong to it."""


# 0.16.1 declares the range of Transformer Engine.  0.19.2 declares none; NVIDIA builds and tests that line with 2.17.1.
STACKS = (
    Stack("0.16.1", SpecifierSet(">=2.9,<2.12")),
    Stack("0.19.2", SpecifierSet(">=2.17,<3")),  # megatron-core 0.17 and later need Python 3.12
)


def installed_stack() -> Stack:
    """The release line of the installed megatron-core, from its package metadata.

    Raises:
        ConfigError: megatron-core is not installed, or of an unsupported release line.
    """
    found = _version("megatron-core")
    for stack in STACKS:
        if found and Version(found).release[:2] == Version(stack.megatron_core).release[:2]:
            return stack
    first, second = (stack.megatron_core for stack in STACKS)
    raise ConfigError(
        f"megatron-core {found or '(not installed)'} with Python {platform.python_version()} and torch {torch.__version__}: "
        f"the engine needs megatron-core {first} or {second}. Run: pip install megatron-core=="
        f"{second if sys.version_info >= (3, 12) else first}"
    )


def check_transformer_engine() -> None:
    """Refuse a Transformer Engine that does not belong to the installed megatron-core.

    Raises:
        ConfigError: names both versions, and the command that installs the right one.
    """
    found, wanted = _version("transformer-engine"), installed_stack().transformer_engine
    if found is None or not wanted.contains(found, prereleases=True):
        raise ConfigError(
            f"transformer-engine {found or '(of unknown version)'} does not belong to megatron-core "
            f"{_version('megatron-core')}, which needs {wanted}. Run: pip install --no-build-isolation "
            f'"transformer-engine[core_cu13,pytorch]{wanted}", or give --transformer-impl local.'
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def adapt_megatron() -> None:
    """Apply the engine's patches to megatron-core.  Call it once per process, after the device is chosen."""
    from gram_engine.platform.adamw import register_as_megatron_adam

    register_as_megatron_adam()
    _match_groups_by_multipliers()
    _use_foreach_functions()
    # 0.19 logs a deprecation of GPTModel for every model; a user cannot act on it (CONTRIBUTING.md has the plan).
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)


def _match_groups_by_multipliers() -> None:
    """Match the parameter groups of a checkpoint and of the run by their multipliers, as 0.16 does.

    0.19 also compares learning rates and weight decays, and therefore refuses to resume with another --lr.
    """
    from megatron.core.optimizer import distrib_optimizer, optimizer

    for module in (optimizer, distrib_optimizer):
        module.param_group_identifier_keys = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")


def _use_foreach_functions() -> None:
    """Replace megatron-core's fallbacks for Transformer Engine's and apex's functions: they synchronise for every tensor."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = l2_norm, scale_in_place


def l2_norm(_chunk_size: int, flag: Tensor, tensor_lists: list[list[Tensor]], *_) -> tuple[Tensor, None]:
    """(norm of all tensors together, fp32 [1] on their device; None), without waiting for the device.

    The arguments are those of megatron-core's local_multi_tensor_l2_norm; `flag` gives the device if there are no tensors.
    """
    tensors = [tensor for tensors in tensor_lists for tensor in tensors]
    if not tensors:
        return torch.zeros(1, device=flag.device), None
    if tensors[0].device.type == "cpu":  # its kernel sums in fp32, sequentially: an error of 1e-3 for an embedding
        tensors = [piece for tensor in tensors for piece in tensor.flatten().split(1 << 16)]
    norms = torch.stack(torch._foreach_norm(tensors))
    return torch.linalg.vector_norm(norms.double()).float().reshape(1), None


def scale_in_place(_chunk_size: int, _flag: Tensor, tensor_lists: list[list[Tensor]], factor: float) -> None:
    """megatron-core's local_multi_tensor_scale for clipping, where source and target are the same tensors."""
    source, target = tensor_lists
    assert source is target
    if target:
        torch._foreach_mul_(target, factor)


def plan_checkpoint(sharded: dict, folder: Path) -> tuple[Any, Any]:
    """Decide which process writes which shards of `sharded`; nothing is written.  Every process must call it.

    Returns:
        (megatron-core's FileSystemWriterAsync; on rank 0 the content of .metadata).
    """
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    # Otherwise planning starts a server process for megatron-core's own writers.  0.19 has the name without an underscore.
    filesystem_async._get_write_results_queue = filesystem_async.get_write_results_queue = lambda *_: None
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=2)  # two files per process; 0.19 has one by default
    # megatron-core calls this after planning to start writing.  0.19 also passes the name of the planner.
    strategy._get_save_and_finalize_callbacks = lambda writer, planned, *_: (writer, planned[1])
    parallel = FullyParallelSaveStrategyWrapper(strategy, parallel_state.get_data_parallel_group(with_context_parallel=True))
    # 0.19 has two planners; the default one needs the package nvidia-resiliency-ext.
    planner = ["mcore"] if "async_strategy" in inspect.signature(parallel.async_save).parameters else []
    return parallel.async_save(sharded, str(folder), *planner)


class StoredObject(io.BytesIO):
    """A pickled object of a checkpoint whose `getbuffer` returns a copy instead of a view.

    CPython 3.12.1 crashes when it collects a view that a failed write left in a reference cycle; 3.11.7 and 3.13.0 do not.
    """

    def getbuffer(self) -> bytes:
        return self.getvalue()


def load_strategy() -> Any:
    """megatron-core's TorchDistLoadShardedStrategy, extended to checkpoints written by torch 2.15.

    torch 2.15 stores `strides` among the properties of a tensor; megatron-core passes all properties to torch.empty, which
    does not accept strides.
    """
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    strategy = TorchDistLoadShardedStrategy()
    load = strategy.load_tensors_metadata

    def load_without_strides(folder: Path, metadata):
        for entry in metadata.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                vars(entry.properties).pop("strides", None)
        return load(folder, metadata)

    strategy.load_tensors_metadata = load_without_strides
    return strategy


def mlp_submodules(layer_spec) -> Any:
    """The submodules of the MLP in a layer's specification, which is a ModuleSpec in 0.16, a functools.partial in 0.19."""
    mlp = layer_spec.submodules.mlp
    return mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
