"""Every fault of tests/faults.py: what is loaded afterwards is a whole checkpoint, bit for bit; at least 200 faults in all."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.faults import FAULTS, try_fault


@pytest.fixture(scope="module")
def worker():
    """One process, with torch and megatron-core imported, that may fork those which are killed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.mark.parametrize("name", [fault.name for fault in FAULTS])
def test_nothing_is_lost(name, worker, tiny_data, tmp_path):
    outcomes = worker.submit(try_fault, name, tmp_path, tiny_data).result(timeout=280)
    assert outcomes.total() > 0


def test_two_hundred_faults_are_injected():
    assert sum(fault.at_least for fault in FAULTS) >= 200
