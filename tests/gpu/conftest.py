"""The GPU suite: everything here runs on one CUDA device (some tests on two), and is skipped, with a reason, elsewhere."""

import importlib.util

import pytest
import torch

TE = importlib.util.find_spec("transformer_engine") is not None


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu" not in str(item.path).replace("\\", "/"):
            continue
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def implementation(request):
    """Layers to use; Transformer Engine's tests are skipped where it is not installed."""
    if request.param != "local" and not TE:
        pytest.skip("transformer-engine is not installed")
    return request.param
