"""The memory of one step beyond its inputs, in units of the student's logits: its peak, and what forward leaves behind.

Retained is what is allocated once forward has returned and backward has not begun: what other losses of the same step
find taken. The loss itself, a scalar, counts; the inputs do not.
"""

import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from .cases import Case, Inputs
from .check import Loss, run
from .providers import providers


class Memory(NamedTuple):
    peak: float
    retained: float


def memory_on_gpu(loss: Loss, inputs: Inputs) -> Memory:
    """As PyTorch's allocator counts it, of a step that has run before."""
    inputs.student.grad = None
    torch.cuda.reset_peak_memory_stats()
    before, retained = torch.cuda.memory_allocated(), []
    run(loss, inputs, lambda: retained.append(torch.cuda.memory_allocated()))
    peak = torch.cuda.max_memory_allocated()
    return Memory(*((there - before) / inputs.student.nbytes for there in (peak, *retained)))


def memory_on_cpu(case: Case, provider: str) -> Memory:
    return in_a_fresh_process(_memory, case, provider, torch.get_num_threads())


def in_a_fresh_process(measure, *arguments):
    """Where no earlier step has left memory behind. Forked from a process that has imported torch and done nothing."""
    context = get_context("forkserver")
    context.set_forkserver_preload([providers.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as fresh:
        return fresh.submit(measure, *arguments).result()


def _memory(case: Case, provider: str, threads: int) -> Memory:
    torch.set_num_threads(threads)
    inputs, loss = case.inputs(), providers(case, reference=True)[provider].loss
    used = memory_of(lambda between: run(loss, inputs, between), lambda: setattr(inputs.student, "grad", None))
    return Memory(*(count / inputs.student.nbytes for count in used))


def memory_of(step: Callable[[Callable], object], forget: Callable[[], object]) -> Memory:
    """Bytes beyond what there is before a second step. Linux only: reads /proc. For a fresh process.

    A step may call what it is given, between forward and backward; `forget` frees what the first one made.
    """
    # What is freed goes back to the system at once: below, malloc must not serve a step from what it has kept.
    M_MMAP_THRESHOLD = -3
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    step(lambda: None)  # compiles, loads, starts threads
    forget()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    resident = [_status("VmRSS")]
    step(lambda: resident.append(_status("VmRSS")))
    return Memory(_status("VmHWM") - resident[0], resident[-1] - resident[0])


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
