"""The memory of one step beyond its inputs, in units of the student's logits: its peak, and what forward leaves behind.

Retained is what is allocated once forward has returned and backward has not begun: what other losses of the same step
find taken. The loss itself, a scalar, counts; the inputs do not.
"""

import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from .cases import Case, Inputs
from .check import Loss, forget, run
from .providers import providers


class Memory(NamedTuple):
    peak: float
    retained: float


def memory_on_gpu(loss: Loss, inputs: Inputs) -> Memory:
    return Memory(*(count / inputs.student.nbytes for count in bytes_on_gpu(loss, inputs)))


def bytes_on_gpu(loss: Loss, inputs: tuple) -> Memory:
    """As PyTorch's allocator counts them, of a step that has run before."""
    forget(inputs)
    torch.cuda.reset_peak_memory_stats()
    before, retained = torch.cuda.memory_allocated(), []
    run(loss, inputs, lambda: retained.append(torch.cuda.memory_allocated()))
    peak = torch.cuda.max_memory_allocated()
    return Memory(*(there - before for there in (peak, *retained)))


def memory_on_cpu(case: Case, provider: str) -> Memory:
    return in_a_fresh_process(_memory, case, provider, torch.get_num_threads())


def in_a_fresh_process(measure, *arguments):
    """Where no earlier step has left memory behind. Forked from a process that has done nothing but importing."""
    context = get_context("forkserver")
    context.set_forkserver_preload([providers.__module__, measure.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as fresh:
        return fresh.submit(measure, *arguments).result()


def _memory(case: Case, provider: str, threads: int) -> Memory:
    torch.set_num_threads(threads)
    inputs, loss = case.inputs(), providers(case, reference=True)[provider].loss
    used = memory_of(lambda between: run(loss, inputs, between), partial(forget, inputs))
    return Memory(*(count / inputs.student.nbytes for count in used))


def memory_of(step: Callable[[Callable], object], forget: Callable[[], object]) -> Memory:
    """Bytes beyond what there is before a second step. Linux only: reads /proc. For a fresh process.

    A step may call what it is given, between forward and backward; `forget` frees what the first one made.
    """
    # What is freed goes back to the system at once: below, malloc must not serve a step from what it has kept. It does
    # so from holes that are large enough, whatever the threshold: their pages go back, too, and are counted once used.
    M_MMAP_THRESHOLD = -3
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)

    def resident() -> int:
        libc.malloc_trim(0)
        return resident_bytes()

    step(lambda: None)  # compiles, loads, starts threads
    forget()
    gc.collect()
    counts = [resident()]
    restart_peak()
    step(lambda: counts.append(resident()))
    return Memory(peak_bytes() - counts[0], counts[-1] - counts[0])


def restart_peak() -> None:
    """Of this process, as what is resident now. Linux only, like the next two."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_bytes() -> int:
    return _status("VmRSS")


def peak_bytes() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
