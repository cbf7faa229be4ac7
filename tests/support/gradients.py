"""Comparison of the gradients that tests.support.tiny.float64_gradients returns."""

from __future__ import annotations

import numpy as np
import pytest


def relative_difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference of two arrays, relative to the largest value of `wanted`."""
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-300))


def assert_same_gradients(found: dict, wanted: dict, tolerance: float = 1e-12) -> None:
    """Loss and gradients agree; `wanted` may hold a copy of the embedding (borrowed or tied) that `found` has not."""
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert found["gradients"].keys() <= wanted["gradients"].keys()
    differences = {
        name: relative_difference(gradient, wanted["gradients"][name]) for name, gradient in found["gradients"].items()
    }
    assert max(differences.values()) < tolerance, differences
