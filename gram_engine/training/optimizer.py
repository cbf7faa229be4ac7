"""megatron-core's DDP, optimizer and learning-rate schedule, set up from the configuration."""

from __future__ import annotations

from functools import partial
from typing import Callable

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from torch import Tensor
from torch.nn import Module

from gram_engine.config.schema import Config
from gram_engine.objectives import Objective


def wrap_ddp(chunks: list[Module], config: Config) -> list[DistributedDataParallel]:
    """Wrap each model chunk for data parallelism; gradients are summed in fp32."""
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_param_gather=config.training.fp8_param_gather,
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
        core = chunk.config
        module = Float16Module(core, chunk) if config.training.bf16 else chunk
        # Later virtual stages wait for the pipeline anyway: they have one bucket each, as in Megatron-LM.
        wrapped.append(DistributedDataParallel(core, ddp_config, module, disable_bucketing=index > 0))
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def build_optimizer(model: list[DistributedDataParallel], config: Config) -> ChainedOptimizer:
    """AdamW with gradient clipping; no weight decay on norms. With --use-distributed-optimizer its state is sharded over DP."""
    training = config.training
    options = OptimizerConfig(
        optimizer="adam",
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        clip_grad=training.clip_grad,
        bf16=training.bf16,
        fp8_recipe=training.fp8_recipe if training.fp8_format else None,
        params_dtype=model[0].config.params_dtype,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    return get_megatron_optimizer(options, model, config_overrides=get_standard_config_overrides(options))


def step_unless_nonfinite(optimizer: ChainedOptimizer, is_finite: Callable[[float], bool]) -> float:
    """`ChainedOptimizer.step`, skipped where `is_finite(gradient norm)` is false: weights and optimizer state stay unchanged.

    Returns the gradient norm before clipping.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if is_finite(norm):
        for part in optimizer.chained_optimizers:
            if part.config.clip_grad > 0.0 and not part.is_stub_optimizer:
                clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=part.config.clip_grad, total_norm=norm)
        optimizer.step_with_ready_grads()
    return norm


def build_scheduler(optimizer: ChainedOptimizer, config: Config, train_samples: int) -> OptimizerParamScheduler:
    """Learning-rate warm-up and decay, counted in samples."""
    training = config.training
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=min(training.min_lr, training.lr),
        lr_warmup_steps=int(training.lr_warmup_fraction * train_samples),
        lr_decay_steps=train_samples,
        lr_decay_style=training.lr_decay_style,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=train_samples,
        wd_incr_style="constant",
    )


def connect_schedule(
    model: list[DistributedDataParallel], optimizer: ChainedOptimizer, objective: Objective, config: Config
) -> None:
    """Tell megatron-core's schedule how to synchronise gradients and parameters, by fields of the model's config."""
    core = model[0].config
    core.grad_scale_func = optimizer.scale_loss
    core.finalize_model_grads_func = partial(_finalize_gradients, objective)
    if config.parallel.overlap_grad_reduce:
        core.no_sync_func = _each_or_one([chunk.no_sync for chunk in model])
        core.grad_sync_func = _each_or_one([chunk.start_grad_sync for chunk in model]) if len(model) > 1 else None
    if config.parallel.overlap_param_gather and len(model) > 1:
        core.param_sync_func = [chunk.start_param_sync for chunk in model]


def _finalize_gradients(objective: Objective, model: list, num_labels: Tensor, **groups) -> None:
    """megatron-core's finalize_model_grads, which also sums num_labels over all processes, then the objective's."""
    finalize_model_grads(model, num_labels, **groups)
    objective.finish_gradients(num_labels)


def _each_or_one(functions: list):
    return functions if len(functions) > 1 else functions[0]
