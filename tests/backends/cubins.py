"""Compile the Triton kernels for a GPU that is not there, through the launchers that a GPU would see.

`python cubins.py table 90` prints, as JSON, what every launch compiles to for sm_90: registers, stack, spills, wide
loads and stores. The other tasks are the functions at the end.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from eakd_kernels import divergences, ops
from eakd_kernels.backends import triton as kernels
from eakd_kernels.backends.triton import launch
from eakd_kernels.stats import statistics_count

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ENOUGH_ROWS = 4096  # that no row is shared by programs
BF16, FP32 = torch.bfloat16, torch.float32


class NoDriver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int):
        self.capability = capability
        self.utils = types.SimpleNamespace(get_device_properties=lambda device: {"multiprocessor_count": 132})

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def pretend(capability: int) -> list[dict]:
    """Launches compile for that capability and do not launch; the list is filled with what they compile to."""
    triton.runtime.driver.set_active(NoDriver(capability))
    compiled = []

    def compile_only(kernel, programs, warps, device, *arguments):
        made = kernel.warmup(*arguments, grid=(programs,), num_warps=warps, enable_fp_fusion=True)
        tile = next((argument for argument in arguments if isinstance(argument, launch.Tile)), None)
        entry = {"kernel": kernel.__name__.strip("_"), "warps": warps, "cubin": made.asm["cubin"]}
        if tile is not None:
            entry |= {"rows": tile.ROWS, "columns": tile.BLOCK, "width": tile.WIDTH}
        if entry not in compiled:
            compiled.append(entry)

    launch.run = compile_only
    return compiled


def facts(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    counts = {"loads_128": r"\bLDG\S*\.128", "stores_128": r"\bSTG\S*\.128", "spills": r"\b(STL|LDL)\b"}
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        **{name: len(re.findall(pattern, code)) for name, pattern in counts.items()},
    }


def logits(rows: int, vocab_size: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """Nothing is read from it, so it may be larger than the memory."""
    storage = torch.empty(0, dtype=dtype, device="cpu").new_empty(offset + rows * vocab_size)
    return storage[offset:].view(rows, vocab_size)


def problem(rows, vocab_size, student=BF16, teacher=None, tau=1.0, t=3.0, labels=False):
    pair = logits(rows, vocab_size, student), logits(rows, vocab_size, teacher or student)
    labels = torch.zeros(rows, dtype=torch.int64) if labels else None
    return ops.Rows(*pair, labels, None, None, tau, t, vocab_size, [], None)


def recipe(kernel, standardize=0, caps=(0.0, 0.0), taus=(2.0,)) -> list[float]:
    return ops.Recipe(*kernel, standardize, 1.0, 1.0, *caps, taus, tuple(tau * tau for tau in taus)).flat()


def with_every_tensor(rows: ops.Rows) -> ops.Rows:
    n = len(rows.student_logits)
    labels, keep = torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool)
    return rows._replace(labels=labels, keep=keep, temperatures=torch.ones(n))


def apart(rows: ops.Rows) -> ops.Rows:
    """The student one column further from a vector's start than the teacher."""
    n, vocab_size = rows.student_logits.shape
    return rows._replace(student_logits=logits(n, vocab_size, rows.student_logits.dtype, offset=1))


def classes_first(rows: ops.Rows) -> ops.Rows:
    pair = (x.view(len(x) // 64, rows.vocab_size, 64).movedim(1, -1) for x in rows[:2])
    return rows._replace(**dict(zip(rows._fields, pair, strict=False)))


def run(rows: ops.Rows, operations=("statistics", "gradient", "one pass"), everything=False) -> None:
    """everything: slopes, all upstream gradients, a weight tensor and a count."""
    gradient = torch.empty(rows.student_logits.shape, dtype=rows.student_logits.dtype)
    leading, n = gradient.shape[:-1], gradient.shape[:-1].numel()
    if "statistics" in operations:
        kernels.row_statistics(rows, everything)
    if "gradient" in operations:
        upstream = [torch.empty(leading) if i == 0 or everything else None for i in range(4)]
        temperatures = len(ops.Recipe.of(rows.recipe).factors) if rows.recipe else None
        statistics = torch.empty(statistics_count(temperatures, False), *leading)
        kernels.row_gradient(rows, statistics, upstream, gradient)
    if "one pass" in operations:
        weighting = ops.WEIGHTINGS["tensor" if everything else "ea"]
        given, count = (torch.empty(leading), torch.ones((), dtype=torch.int64)) if everything else (None, None)
        rule = ops.LossRule(given, weighting, math.log(rows.vocab_size), 1.0, True, 1.0, 0.5, 1 / n, count)
        kernels.one_pass(rows, rule, gradient)


def compile_table() -> None:
    """Every entry of the launch table, for the paper's temperatures."""
    for dtype in (BF16, FP32):
        run(problem(ENOUGH_ROWS, 128256, dtype))
        run(problem(2, 128256, dtype))  # rows that programs share
    block = launch.LEAST_COLUMNS
    while block <= launch.MOST_COLUMNS:
        run(problem(ENOUGH_ROWS, block - 8, BF16 if block % 128 else FP32))
        block *= 2
    kernels.scale_gradient(torch.empty(64, dtype=BF16), torch.ones(()), torch.empty(64, dtype=BF16))


def compile_variants() -> None:
    """Other dtypes, alignments, temperatures and terms."""
    variants = {
        "odd vocabulary": {"vocab_size": 50257},
        "odd vocabulary, fp32": {"vocab_size": 50257, "student": FP32},
        "two dtypes": {"teacher": FP32},
        "one temperature": {"tau": 2.0, "t": 2.0},
        "temperatures without a ratio": {"t": 2.7},
        "labels": {"labels": True, "tau": 2.0},
        "fp16": {"student": torch.float16},
    }
    for options in variants.values():
        run(problem(ENOUGH_ROWS, **{"vocab_size": 128256, **options}))
    for vocab_size in (128256, 1000):
        for rows in (ENOUGH_ROWS, 2):
            run(with_every_tensor(problem(rows, vocab_size)), everything=True)
        run(problem(ENOUGH_ROWS, vocab_size)._replace(vocab_size=vocab_size - 8))
        run(apart(problem(ENOUGH_ROWS, vocab_size)))
        run(classes_first(problem(ENOUGH_ROWS, vocab_size)))


def compile_recipes() -> None:
    """A mixture, KL at several temperatures, and a decoupled divergence of all else that a recipe may ask for."""
    aligned, mixture = problem(ENOUGH_ROWS, 128256), recipe(divergences.JSD(0.3).kernel())
    run(aligned._replace(recipe=mixture), ("gradient", "one pass"))
    run(aligned._replace(recipe=recipe(divergences.Jeffreys().kernel(), taus=(2.0, 3.0, 4.0, 5.0, 6.0))), ("one pass",))
    everything = recipe((divergences.DECOUPLED, 1.0, 8.0), standardize=2, caps=(30.0, 30.0))
    weighted = problem(ENOUGH_ROWS, 128256, labels=True)._replace(recipe=everything, class_bias=torch.zeros(128256))
    run(weighted, ("gradient", "one pass"))
    run(problem(ENOUGH_ROWS, 1000)._replace(recipe=mixture), ("one pass",))


def compile_bad_choices() -> None:
    """What the table must never say: a tile that does not fit the registers, and rows that are read unaligned."""
    launch.WALKING = {2: (16384, 4)}
    run(problem(ENOUGH_ROWS, 128256), ("one pass",))
    launch.WALKING = {2: (2048, 4)}
    run(apart(problem(ENOUGH_ROWS, 128256)), ("one pass",))


def compile_kernels() -> None:
    """Each kernel once."""
    run(problem(ENOUGH_ROWS, 128256))
    run(problem(2, 128256))
    run(problem(ENOUGH_ROWS, 1000))


def with_labels_off(rows: ops.Rows) -> ops.Rows:
    """8 bytes behind a multiple of 16."""
    labels = torch.zeros(len(rows.labels) + 1, dtype=torch.int64)[1:]
    return rows._replace(labels=labels)


def recompilations() -> dict[str, int]:
    """By shape: how many kernels were compiled that an earlier shape had not needed."""
    total, counts = 0, {}

    def count(**_):
        nonlocal total
        total += 1

    triton.knobs.runtime.jit_post_compile_hook = count
    for name, rows in {
        "first": problem(4096, 128256),
        "other rows": problem(5001, 128256),
        "other aligned vocabulary": problem(4096, 128264),
        "padded vocabulary": problem(4096, 151936),
        "first small": problem(512, 1000),
        "other small rows": problem(1, 1000),
        "other small vocabulary": problem(77, 1008),
        "first odd": problem(4096, 50257),
        "other odd": problem(4097, 50259),
        "first with labels": problem(4096, 128256, labels=True),
        "labels of odd alignment": with_labels_off(problem(4097, 128256, labels=True)),
        "first shared": problem(2, 128256),
        "other shared": problem(5, 129280),
    }.items():
        before = total
        run(rows)
        counts[name] = total - before
    return counts


if __name__ == "__main__":
    task, capability = sys.argv[1], int(sys.argv[2])
    compiled = pretend(capability)
    if task == "recompilations":
        print(json.dumps(recompilations()))
    else:
        {
            "table": compile_table,
            "variants": compile_variants,
            "recipes": compile_recipes,
            "kernels": compile_kernels,
            "bad": compile_bad_choices,
        }[task]()
        for made in compiled:
            made |= facts(made.pop("cubin"))
        print(json.dumps(compiled))
