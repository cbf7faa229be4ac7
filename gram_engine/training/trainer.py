"""Trainer: data -> model -> objective -> schedule -> optimizer -> checkpoint, one step at a time (start here to read)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from gram_engine.checkpoint import save_load as checkpoints
from gram_engine.checkpoint.save_load import CheckpointSaver, TrainState
from gram_engine.config.schema import Config
from gram_engine.data.dataset import PairDataset
from gram_engine.data.loader import GlobalBatch, PackedLoader
from gram_engine.hf.load_weights import load_hf_weights
from gram_engine.log import log
from gram_engine.model.build import build_model
from gram_engine.objectives import build_objective
from gram_engine.planning.flops import step_flops
from gram_engine.platform.device import Platform
from gram_engine.training.evaluate import evaluate
from gram_engine.training.freeze import freeze
from gram_engine.training.initialise import PreparedData
from gram_engine.training.microbatches import Prefetcher
from gram_engine.training.nonfinite import NumericsGuard, is_finite
from gram_engine.training.optimizer import build_optimizer, build_scheduler, connect_schedule, step_unless_nonfinite, wrap_ddp
from gram_engine.training.reporting import Reporter
from gram_engine.training.step import run_schedule, summed_stats
from gram_engine.training.stopping import LEAVING, StopRequests
from gram_engine.training.watchdog import Watchdog


@dataclass(frozen=True)
class StepResult:
    """Figures of one training step over the whole global batch, the same on every process."""

    metrics: dict[str, float]
    """The objective's, computed before the update; `loss` is one of them."""
    grad_norm: float
    """Norm of all gradients before clipping."""
    num_samples: int
    num_tokens: int
    flops: float
    """Floating-point operations of the model, forward and backward."""


class Trainer:
    """All parts of a run. `session` builds it, after process groups and data are ready.

    `train` runs to the end; `advance` does a single step, with the same effect on the trainer's state and counters.
    """

    def __init__(self, config: Config, platform: Platform, prepared: PreparedData):
        self.config, self.platform = config, platform
        self.dataset = prepared.dataset(prepared.train_prefix)
        self.valid_dataset = prepared.dataset(prepared.valid_prefix) if prepared.valid_prefix else None
        self.loader = self._loader(self.dataset)
        self.valid_loader = self._loader(self.valid_dataset) if self.valid_dataset else None
        label_ids = self.dataset.manifest.label_ids
        self.objective = build_objective(config, label_ids, parallel_state.get_tensor_model_parallel_group())
        self.train_samples = self._train_samples()
        self.total_steps = math.ceil(self.train_samples / config.training.global_batch_size)
        self.batches = Prefetcher(self.loader, platform, self.train_samples)

        self.model = self._model()
        self.optimizer = build_optimizer(self.model, config)
        self.scheduler = build_scheduler(self.optimizer, config, self.train_samples)
        connect_schedule(self.model, self.optimizer, self.objective, config)
        self.numerics = NumericsGuard(config.training)
        self.watchdog = Watchdog(60 * config.parallel.distributed_timeout_minutes, dist.get_rank())
        self.saver = CheckpointSaver(config, self.dataset.manifest, prepared.tokenizer)
        self.state = self._resume()
        self.reporter = Reporter(config, platform, self.state.iteration, self.total_steps)

    def train(self) -> dict[str, float]:
        """Train to the end, evaluating and saving on the way; returns the last metrics.

        --exit-interval, --exit-duration-in-mins, SIGTERM and SIGUSR1 end it earlier.

        Raises:
            NumericsError: too many steps in a row had a loss or gradient that is not finite.
            CheckpointError: a checkpoint could not be written.
        """
        config = self.config
        self.stop = StopRequests(config.training.exit_duration_in_mins, self.platform.device)
        self.watchdog.start()
        try:
            metrics = self._train(min(self.total_steps, config.training.exit_interval or self.total_steps))
            self.watchdog.beat("finishing the last checkpoint")
            self.saver.finish()
            return metrics
        except Exception:
            self.saver.drain()
            raise
        finally:
            self.watchdog.close()
            self.stop.close()

    def close(self) -> None:
        """Flush the metric writers and remove the progress bar."""
        self.reporter.close()

    def _train(self, last_step: int) -> dict[str, float]:
        config, state, metrics = self.config, self.state, {}
        while state.iteration < last_step:
            self.watchdog.beat(f"step {state.iteration + 1}")
            result = self.advance()
            self.saver.finish(blocking=False)
            stop = self.stop.reason()
            finished = state.iteration == last_step or stop is not None
            if state.iteration % config.logging.log_interval == 0 or finished:
                metrics = result.metrics
                self.reporter.train_line(
                    state.iteration, state.consumed_samples, metrics, self._learning_rate(), result.grad_norm
                )
            if self._due(config.logging.eval_interval, finished and stop is None) and self.valid_loader:
                metrics = {**metrics, **self.evaluate()}
            if config.checkpoint.save and self._due(config.checkpoint.save_interval, finished):
                self.save()
            if stop is not None and state.iteration < last_step:
                saved = "saved" if config.checkpoint.save else "nothing saved (no --save)"
                log(f"{stop}: {LEAVING} {state.iteration}/{self.total_steps}, {saved}")
                break
        return metrics

    def advance(self) -> StepResult:
        """Train on the next global batch, and advance the position in the data and the counters of the log.

        Raises:
            NumericsError: too many steps in a row had a loss or gradient that is not finite.
        """
        state = self.state
        batch = self.batches.batch(state.consumed_samples)
        result = self.step(batch)
        state.iteration += 1
        state.consumed_samples += batch.num_samples
        self.reporter.count(result.num_samples, result.num_tokens, result.flops)
        self.numerics.record(state.iteration, result.metrics["loss"], result.grad_norm, batch.sample_ids)
        return result

    def step(self, batch: GlobalBatch) -> StepResult:
        """One update from a global batch; none where its loss or gradient norm is not finite."""
        metrics = self.forward_backward(batch)
        grad_norm = step_unless_nonfinite(self.optimizer, lambda norm: is_finite(metrics["loss"], norm))
        self.scheduler.step(increment=batch.num_samples)
        return StepResult(metrics, grad_norm, batch.num_samples, batch.num_tokens, step_flops(self.config, batch))

    def forward_backward(self, batch: GlobalBatch) -> dict[str, float]:
        """Gradients of a global batch, left in the parameters' `main_grad`; returns the objective's metrics."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = run_schedule(self.model, batch, self.objective, self.platform.device)
        return self.objective.metrics(summed_stats(results, self.objective, self.platform.device))

    def evaluate(self) -> dict[str, float]:
        """Metrics on the validation data, also logged."""
        started = time.perf_counter()
        beat = partial(self.watchdog.beat, f"the evaluation after step {self.state.iteration}")
        self._finish_param_gather()
        metrics = evaluate(self.model, self.valid_loader, self.valid_dataset, self.objective, self.platform.device, beat)
        self._resume_param_gather()
        self.reporter.eval_line(self.state.iteration, self.state.consumed_samples, metrics)
        self.reporter.exclude(time.perf_counter() - started)
        return metrics

    def save(self) -> None:
        """Write a checkpoint of this step."""
        self.watchdog.beat(f"saving step {self.state.iteration}")
        self._finish_param_gather()
        self.saver.save(self.state, self.model, self.optimizer, self.scheduler)
        self._resume_param_gather()
        log(f"saved {self.config.checkpoint.save} at step {self.state.iteration}")

    def _loader(self, dataset: PairDataset) -> PackedLoader:
        config, parallel = self.config, self.config.parallel
        virtual = config.virtual_pipeline_size is not None
        return PackedLoader(
            dataset,
            global_batch_size=config.training.global_batch_size,
            pack_tokens=config.pack_tokens,
            pad_multiple=config.pack_multiple,
            sequence_multiple=config.sequence_multiple,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            seed=config.training.seed,
            # The interleaved schedule runs micro-batches in groups of the pipeline's size.
            microbatch_multiple=parallel.pipeline_model_parallel_size if virtual else 1,
            response_loss=config.training.response_loss,
            marker_loss=config.training.marker_loss,
            sft=config.training.sft_loss_weight > 0,
        )

    def _train_samples(self) -> int:
        training = self.config.training
        if training.train_samples is not None:
            return training.train_samples
        if training.train_iters is not None:
            return training.train_iters * training.global_batch_size
        return max(1, round(training.train_epochs * len(self.dataset)))

    def _model(self) -> list[DistributedDataParallel]:
        config = self.config
        chunks = build_model(config, self.platform)
        if config.model.load_hf:
            load_hf_weights(chunks, config.model.load_hf, config)
        elif config.checkpoint.pretrained_checkpoint:
            checkpoints.load_weights(config.checkpoint.pretrained_checkpoint, chunks, config)
        freeze(chunks, config)
        return wrap_ddp(chunks, config)

    def _resume(self) -> TrainState:
        folder = self.config.checkpoint.load
        if folder is None or not checkpoints.candidates(folder):
            if folder is not None:
                log(f"{folder} holds no checkpoint yet: starting afresh")
            return TrainState()
        state = checkpoints.load_checkpoint(folder, self.model, self.optimizer, self.scheduler, self.config)
        log(f"resumed {folder} at step {state.iteration}, {state.consumed_samples} samples")
        return state

    def _due(self, interval: int | None, finished: bool) -> bool:
        return finished or (interval is not None and self.state.iteration % interval == 0)

    def _learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"] if self.optimizer.param_groups else 0.0

    def _finish_param_gather(self) -> None:
        """Finish parameter gathers that would otherwise overlap the next training step."""
        if self.config.parallel.overlap_param_gather:
            for chunk in self.model:
                chunk.disable_forward_pre_hook(param_sync=True)

    def _resume_param_gather(self) -> None:
        if self.config.parallel.overlap_param_gather:
            for chunk in self.model:
                chunk.enable_forward_pre_hook()
