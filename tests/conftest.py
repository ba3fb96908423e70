import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # processes take the place of threads
    torch.set_num_threads(1)
if not torch.cuda.is_available():  # both are read when the kernels are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("EAKD_CUDA_EMULATOR", next(map(str, Path(__file__).parent.glob("emulator/*.so")), ""))

from processes import World

from eakd_kernels import available_backends

ON_GPU = {"triton", "cuda"} if torch.cuda.is_available() else set()
USABLE = [
    pytest.param(name, marks=pytest.mark.gpu) if name in ON_GPU else name
    for name, reason in available_backends().items()
    if reason is None
]


def pytest_report_header():
    """A backend that is not tested is not silently so."""
    reasons = available_backends()
    if reasons["cuda"] is not None:
        reasons["cuda"] += "; `make emulator` lets its source be tested without a GPU"
    return [f"backend {name}: {reason or 'tested'}" for name, reason in reasons.items()]


@pytest.fixture(autouse=True)
def _device_and_seed(request):
    """A test of a GPU backend makes its tensors there."""
    parameters = getattr(request.node, "callspec", None)
    if parameters is not None and ON_GPU.intersection(map(str, parameters.params.values())):
        torch.set_default_device("cuda")
    torch.manual_seed(0)
    yield
    torch.set_default_device(None)


@pytest.fixture(params=USABLE)
def backend(request):
    """Every backend that can run here."""
    return request.param


@pytest.fixture(params=[name for name in USABLE if name != "reference"])
def kernels(request):
    """Every backend with operators of its own."""
    return request.param


@pytest.fixture(params=[name for name in USABLE if name in ("reference", "cpu")])
def fp64_backend(request):
    """Every backend that computes in fp64."""
    return request.param


@pytest.fixture(scope="session")
def world():
    """world(size): a process group of so many processes, kept for the session."""
    worlds = {}
    yield lambda size: worlds.setdefault(size, World(size))
    for started in worlds.values():
        started.stop()


@pytest.fixture(autouse=True)
def _fresh_compiler(request):
    """torch.compile counts recompilations per function, across tests."""
    yield
    if "compile" in request.node.name:
        torch._dynamo.reset()
