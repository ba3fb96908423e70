"""What `pytest benchmarks` takes beyond pytest-benchmark's options, and what is saved of where it ran."""

from .measure import machine


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="every vocabulary, dtype and operation, as python -m benchmarks"
    )
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu")


def pytest_benchmark_update_machine_info(config, machine_info):
    """What pytest-benchmark warns of when it compares with a run that was made elsewhere."""
    where = machine(config.getoption("device"))
    del where["date"]
    machine_info["eakd_kernels"] = where
