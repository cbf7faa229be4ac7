"""Metrics of a run: log lines and a progress bar on rank 0, TensorBoard and Weights & Biases."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass

from tqdm import tqdm

from gram_engine.config.schema import Config
from gram_engine.errors import ConfigError
from gram_engine.log import is_main_process, log
from gram_engine.platform.device import Platform
from gram_engine.platform.environment import world_size


@dataclass
class Interval:
    """Totals since the last log line, over all processes."""

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0


class Reporter:
    """Log lines with throughput and ETA, a progress bar if standard error is a terminal, and metric writers."""

    def __init__(self, config: Config, platform: Platform, first_step: int, total_steps: int):
        self.config = config
        self.platform = platform
        self.total_steps = total_steps
        self.num_devices = world_size()
        self.peak_tflops = config.logging.peak_tflops or platform.peak_tflops()
        self.interval = Interval()
        self.started = time.perf_counter()
        self.writers = _writers(config) if is_main_process() else []
        shown = is_main_process() and config.logging.progress and sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=not shown, file=sys.stderr)

    def count(self, samples: int, tokens: int, flops: float) -> None:
        """Add one finished step."""
        interval = self.interval
        self.interval = Interval(
            interval.steps + 1, interval.samples + samples, interval.tokens + tokens, interval.flops + flops
        )
        self.bar.update()

    def train_line(self, step: int, consumed: int, metrics: dict[str, float], lr: float, grad_norm: float) -> None:
        """Log line of a training step; the throughput is that of the steps since the last line."""
        self.platform.synchronize()
        seconds = time.perf_counter() - self.started
        speed = self._throughput(seconds)
        left = (self.total_steps - step) * seconds / self.interval.steps
        figures = {**metrics, "grad_norm": grad_norm, "lr": lr, **speed}
        text = " | ".join(f"{name} {_number(value)}" for name, value in figures.items())
        log(f"step {step}/{self.total_steps} | samples {consumed} | {text} | ETA {_duration(left)}")
        self._write({f"train/{name}": value for name, value in figures.items()}, consumed)
        self.interval = Interval()
        self.started = time.perf_counter()

    def eval_line(self, step: int, consumed: int, metrics: dict[str, float]) -> None:
        """Log line of an evaluation."""
        text = " | ".join(f"{name} {_number(value)}" for name, value in metrics.items())
        log(f"validation at step {step} | {text}")
        self._write({f"valid/{name}": value for name, value in metrics.items()}, consumed)

    def exclude(self, seconds: float) -> None:
        """Do not count `seconds`, spent on an evaluation, as training time of the current interval."""
        self.started += seconds

    def close(self) -> None:
        """Flush writers and remove the bar."""
        self.bar.close()
        for writer in self.writers:
            writer.close()

    def _throughput(self, seconds: float) -> dict[str, float]:
        interval = self.interval
        tflops = interval.flops / seconds / self.num_devices / 1e12
        speed = {
            "step_ms": 1000 * seconds / interval.steps,
            "tokens_per_s": interval.tokens / seconds,
            "samples_per_s": interval.samples / seconds,
            "tflops_per_device": tflops,
        }
        if self.peak_tflops:
            speed["mfu"] = tflops / self.peak_tflops
        speed["memory_gb"] = self.platform.memory_allocated_bytes() / 1e9
        return speed

    def _write(self, figures: dict[str, float], consumed: int) -> None:
        for writer in self.writers:
            writer.write(figures, consumed)


class TensorBoardWriter:
    """Writes metrics to TensorBoard; the x axis is consumed samples."""

    def __init__(self, folder: str):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder)

    def write(self, figures: dict[str, float], consumed: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, consumed)

    def close(self) -> None:
        self.writer.close()


class WandbWriter:
    """Writes the same metrics to Weights & Biases.

    Raises:
        ConfigError: the wandb package is not installed.
    """

    def __init__(self, config: Config):
        try:
            import wandb
        except ImportError:
            raise ConfigError("--wandb-project needs the wandb package: pip install 'gram_engine[wandb]'.") from None
        options = config.logging
        self.run = wandb.init(project=options.wandb_project, name=options.wandb_exp_name, config=asdict(config))

    def write(self, figures: dict[str, float], consumed: int) -> None:
        self.run.log({**figures, "consumed_samples": consumed})

    def close(self) -> None:
        self.run.finish()


def _writers(config: Config) -> list:
    writers = []
    if config.logging.tensorboard_dir:
        writers.append(TensorBoardWriter(config.logging.tensorboard_dir))
    if config.logging.wandb_project:
        writers.append(WandbWriter(config))
    return writers


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
