"""Who runs, and what is said about it."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from support import make_logits

from eakd_kernels import available_backends, dispatch, ea_kd_loss, env


def test_available_backends():
    backends = available_backends()
    assert list(backends) == ["reference", "cpu", "triton", "cuda"]
    assert backends["reference"] is None
    assert all(reason is None or len(reason) > 10 for reason in backends.values())


def test_auto_chooses_and_says_so_once(caplog):
    dispatch._announce.cache_clear()
    student, teacher = make_logits(2, 10)
    with caplog.at_level(logging.INFO, "eakd_kernels"):
        ea_kd_loss(student, teacher)
        ea_kd_loss(student, teacher)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and ("cpu" in said[0] or "reference" in said[0])


def test_environment_overrides_auto_only(monkeypatch):
    def resolve(name):
        return dispatch.resolve(name, "cpu", torch.float32, torch.float32)

    monkeypatch.setenv("EAKD_BACKEND", "reference")
    assert resolve("auto") == "reference"
    if available_backends()["cpu"] is None:
        assert resolve("cpu") == "cpu"
    monkeypatch.setenv("EAKD_BACKEND", "cuda")
    if available_backends()["cuda"] is not None:
        with pytest.raises(RuntimeError, match=r"EAKD_BACKEND=cuda cannot run"):
            resolve("auto")
    monkeypatch.setenv("EAKD_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=r"EAKD_BACKEND.*nonsense"):
        resolve("auto")


def test_a_backend_asked_for_by_name_runs_or_raises():
    with pytest.raises(RuntimeError, match=r'backend="cpu" cannot run.*meta'):
        dispatch.resolve("cpu", "meta", torch.float32, torch.float32)


def test_the_report_lists_what_a_bug_report_needs():
    out = subprocess.run([sys.executable, "-m", "eakd_kernels"], capture_output=True, text=True, check=True).stdout
    words = ["eakd_kernels", torch.__version__, "CPU capability", "threads", "backend cpu", "backend cuda", "GPU"]
    assert all(word in out for word in words)


def test_without_the_extension_the_reference_runs():
    code = (
        "import sys; sys.modules['eakd_kernels._C'] = None\n"
        "import torch, eakd_kernels as e\n"
        "z = torch.randn(2, 9, requires_grad=True)\n"
        "e.ea_kd_loss(z, torch.randn(2, 9)).backward()\n"
        "reason = e.available_backends()['cpu']; assert 'EAKD_NO_EXT' in reason, reason\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_imports_no_compiler():
    code = "import sys, torch, eakd_kernels; assert not {'triton', 'torch._dynamo'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_broken_triton_is_a_reason():
    code = (
        "import sys, types\n"
        "class Broken(types.ModuleType):\n"
        "    def __getattr__(self, name):\n"
        "        raise (AttributeError if name.startswith('__') else OSError)('libtriton.so: file too short')\n"
        "sys.modules['triton'] = Broken('triton')\n"
        "import eakd_kernels as e\n"
        "assert e.available_backends()['triton'] and e.available_backends()['reference'] is None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_interpreter_asked_for_too_late_is_a_reason():
    code = (
        "import os, triton, eakd_kernels as e\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        "assert 'before Python starts' in e.available_backends()['triton']"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_environment_variables_are_all_in_one_place():
    names = [variable.name for variable in env.VARIABLES]
    assert len(set(names)) == len(names) and all(name.startswith("EAKD_") for name in names)


@pytest.mark.skipif(os.environ.get("EAKD_NO_EXT") == "1", reason="EAKD_NO_EXT=1: an install without kernels")
def test_the_kernels_are_there():
    """Without them every test of theirs would be skipped, and nobody would notice."""
    assert available_backends()["cpu"] is None
