"""The peak memory of one step beyond its inputs. Linux only: it reads /proc."""

import ctypes
import gc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from .cases import Case
from .providers import providers, run


def peak_memory(case: Case, provider: str) -> float:
    """In units of the student's logits. Measured in a fresh process, where no earlier step has left memory behind."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(_peak, case, provider, torch.get_num_threads()).result()


def _peak(case: Case, provider: str, threads: int) -> float:
    # What is freed goes back to the system at once: below, malloc must not serve a step from what it has kept.
    M_MMAP_THRESHOLD = -3
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    torch.set_num_threads(threads)
    inputs, step = case.inputs(), providers(case, reference=True)[provider]
    run(step, inputs)  # compiles, loads, starts threads
    inputs.student.grad = None
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    run(step, inputs)
    return (_status("VmHWM") - before) / inputs.student.nbytes


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
