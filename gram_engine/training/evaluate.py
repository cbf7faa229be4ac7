"""Validation during training: the loss, and for objectives that judge pairs the same figures as `gram score`."""

from __future__ import annotations

from typing import Callable

import torch

from gram_engine.data.dataset import PairDataset
from gram_engine.data.loader import PackedLoader
from gram_engine.metrics import by_pair, pair_metrics
from gram_engine.objectives import Objective
from gram_engine.training.step import run_schedule, sum_over_processes, summed_stats


@torch.no_grad()
def evaluate(
    model: list,
    loader: PackedLoader,
    dataset: PairDataset,
    objective: Objective,
    device: torch.device,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Metrics over every sample of the validation data, equal on every process.

    Where a verdict depends on the order of the responses, the data holds each pair in both orders, and the figures are those
    of `gram_engine.metrics.pair_metrics`: `accuracy` is that of the reward (Eq. 3).

    Args:
        beat: called before each batch; the watchdog takes it as a sign of life.
    """
    for chunk in model:
        chunk.eval()
    totals = dict.fromkeys(objective.stat_names, 0.0)
    margins = torch.zeros(len(dataset), dtype=torch.float64, device=device)
    for batch in loader.evaluation_batches():
        beat()
        results = run_schedule(model, batch, objective, device, forward_only=True)
        for name, value in summed_stats(results, objective, device).items():
            totals[name] += value
        for result in results:
            if result.output.margins is not None:
                margins[result.sample_ids] = result.output.margins.double()
    for chunk in model:
        chunk.train()
    metrics = objective.metrics(totals)
    if objective.depends_on_order:
        samples = dataset.samples
        margins = sum_over_processes(margins, objective).cpu().numpy()
        metrics.update(pair_metrics(*by_pair(samples["pair"], samples["order"], margins, samples["preference"])))
    return metrics
