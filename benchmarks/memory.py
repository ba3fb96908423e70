"""The peak memory of one step beyond its inputs, in units of the student's logits."""

import ctypes
import gc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from .cases import Case, Inputs
from .check import Loss, run
from .providers import providers


def peak_on_gpu(loss: Loss, inputs: Inputs) -> float:
    """As PyTorch's allocator counts it, of a step that has run before."""
    inputs.student.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(loss, inputs)
    return (torch.cuda.max_memory_allocated() - before) / inputs.student.nbytes


def peak_on_cpu(case: Case, provider: str) -> float:
    return in_a_fresh_process(_peak, case, provider, torch.get_num_threads())


def in_a_fresh_process(measure, *arguments) -> float:
    """Where no earlier step has left memory behind."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(measure, *arguments).result()


def _peak(case: Case, provider: str, threads: int) -> float:
    torch.set_num_threads(threads)
    inputs, step = case.inputs(), providers(case, reference=True)[provider].loss
    peak = peak_of(lambda: run(step, inputs), lambda: setattr(inputs.student, "grad", None))
    return peak / inputs.student.nbytes


def peak_of(step, forget) -> int:
    """Bytes beyond what there is before a second step; `forget` frees what the first one made. Linux only: reads /proc.

    For a fresh process.
    """
    # What is freed goes back to the system at once: below, malloc must not serve a step from what it has kept.
    M_MMAP_THRESHOLD = -3
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    step()  # compiles, loads, starts threads
    forget()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
