import os

import pytest
import torch

from eakd_kernels import available_backends

os.environ.setdefault("HF_HUB_OFFLINE", "1")
USABLE = [name for name, reason in available_backends().items() if reason is None]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=USABLE)
def backend(request):
    """Every backend that can run here."""
    return request.param


@pytest.fixture(params=[name for name in USABLE if name != "reference"])
def kernels(request):
    """Every backend with operators of its own."""
    return request.param


@pytest.fixture(autouse=True)
def _fresh_compiler(request):
    """torch.compile counts recompilations per function, across tests."""
    yield
    if "compile" in request.node.name:
        torch._dynamo.reset()
