"""Steps whose loss or gradient is not finite are skipped and counted; too many in a row end the run. Loss spikes are logged."""

from __future__ import annotations

import math

import numpy as np

from gram_engine.config.schema import TrainingConfig
from gram_engine.errors import NumericsError
from gram_engine.log import log

SHOWN_IDS = 64
MEMORY = 0.95
"""Decay of the running mean of the loss, with which spikes are compared."""
FIRST_STEPS = 20
"""Number of losses before spikes are looked for: at the start of training the loss falls fast."""


def is_finite(loss: float, grad_norm: float) -> bool:
    """Whether a step with these figures may change the weights."""
    return math.isfinite(loss) and math.isfinite(grad_norm)


class NumericsGuard:
    """Counts skipped steps and looks for loss spikes, from figures that are the same on every process."""

    def __init__(self, training: TrainingConfig):
        self.most_skipped = 1 if training.check_for_nan else training.max_skipped_steps
        self.spike_factor = training.loss_spike_factor
        self.skipped = self.skipped_in_row = 0
        self.mean_loss, self.seen = 0.0, 0

    def record(self, step: int, loss: float, grad_norm: float, sample_ids: np.ndarray) -> None:
        """Count a finished step, applied or skipped.

        Raises:
            NumericsError: as many steps in a row were skipped as --max-skipped-steps allows.
        """
        if is_finite(loss, grad_norm):
            self.skipped_in_row = 0
            self._look_for_spike(step, loss, sample_ids)
            return
        self.skipped += 1
        self.skipped_in_row += 1
        what = f"step {step}: loss {loss:g}, gradient norm {grad_norm:g} on samples {_listed(sample_ids)}"
        if self.skipped_in_row >= self.most_skipped:
            raise NumericsError(
                f"{what}; {self.skipped_in_row} such step(s) in a row. The weights are unchanged; nothing was saved. "
                "Look at these samples (gram data inspect PREFIX --sample N), lower --lr, or raise --max-skipped-steps."
            )
        log(f"warning: {what}. Step skipped ({self.skipped_in_row} in a row, {self.skipped} in all).")

    def _look_for_spike(self, step: int, loss: float, sample_ids: np.ndarray) -> None:
        if self.spike_factor and self.seen >= FIRST_STEPS and loss > self.spike_factor * self.mean_loss:
            log(
                f"warning: loss {loss:.4g} at step {step} is over {self.spike_factor:g} times its recent mean "
                f"{self.mean_loss:.4g}, on samples {_listed(sample_ids)}"
            )
        keep = min(MEMORY, self.seen / (self.seen + 1))
        self.mean_loss = keep * self.mean_loss + (1 - keep) * loss
        self.seen += 1


def _listed(sample_ids: np.ndarray) -> str:
    shown = ", ".join(map(str, sorted(sample_ids.tolist())[:SHOWN_IDS]))
    return shown + (f" and {len(sample_ids) - SHOWN_IDS} more" if len(sample_ids) > SHOWN_IDS else "")
