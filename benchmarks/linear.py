"""The loss from hidden states, `python -m benchmarks.linear --rows 4096 --vocab 49152 --hidden 1024`, beside:

parts       the same chunks' four matrix products, bare, with the dense fused loss between them: what fusing may cost
eakd        fused_linear_ea_kd_loss; and with recompute=True
eakd dense  all logits at once, ea_kd_loss
liger jsd   Liger's chunked JSD loss at beta = 0, which weights nothing, on a GPU where it is installed

One run, interleaved. Memory is the peak beyond inputs and gradients, in a fresh process on a CPU.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from eakd_kernels import ea_kd_loss, fused_linear_ea_kd_loss
from eakd_kernels.projection import chunk_size

from . import timing
from .measure import machine
from .memory import in_a_fresh_process, memory_of
from .report import Row, heading, markdown, save

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RATIOS = {"x_parts": "parts", "x_dense": "eakd dense", "x_liger": "liger jsd"}


class Shape(NamedTuple):
    rows: int
    vocab: int
    hidden: int
    teacher_hidden: int
    dtype: str
    device: str

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Student's hidden states and head, which require grad, and the teacher's."""
        torch.manual_seed(0)
        make = partial(torch.randn, device=self.device, dtype=DTYPES[self.dtype])
        student = make(self.rows, self.hidden), make(self.vocab, self.hidden) / self.hidden**0.5
        teacher = make(self.rows, self.teacher_hidden), make(self.vocab, self.teacher_hidden) / self.teacher_hidden**0.5
        return *(x.requires_grad_() for x in student), *teacher


def fused(recompute: bool, hidden, weight, teacher_hidden, teacher_weight) -> None:
    fused_linear_ea_kd_loss(hidden, weight, teacher_hidden, teacher_weight, recompute=recompute).backward()


def dense(hidden, weight, teacher_hidden, teacher_weight) -> None:
    with torch.no_grad():
        teacher = teacher_hidden @ teacher_weight.T
    ea_kd_loss(hidden @ weight.T, teacher).backward()


def parts(hidden, weight, teacher_hidden, teacher_weight) -> None:
    """In fp32 on a CPU, in the tensors' dtype on a GPU, whose units take no other."""
    x, w, y, head = (tensor.detach() for tensor in (hidden, weight, teacher_hidden, teacher_weight))
    size = chunk_size(len(w) + len(head), torch.float32, x.device)
    g_hidden, g_weight = torch.empty_like(x), torch.zeros_like(w)
    logits = [x.new_empty(size, len(w)) for _ in range(2)]
    for begin in range(0, len(x), size):
        rows = slice(begin, begin + size)
        count = len(x[rows])
        student = torch.mm(x[rows], w.T, out=logits[0][:count]).requires_grad_()
        teacher = torch.mm(y[rows], head.T, out=logits[1][:count])
        (gradient,) = torch.autograd.grad(ea_kd_loss(student, teacher, num_items=len(x)), student)
        torch.mm(gradient, w, out=g_hidden[rows])
        g_weight.addmm_(gradient.T, x[rows])
    hidden.grad, weight.grad = g_hidden, g_weight


def liger() -> Callable:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    criterion = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)

    def step(hidden, weight, teacher_hidden, teacher_weight):
        labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        criterion(hidden, weight, teacher_hidden, teacher_weight, labels).backward()

    return step


def steps(shape: Shape) -> dict[str, Callable]:
    known = {"parts": parts, "eakd": partial(fused, False), "eakd, recompute": partial(fused, True)}
    known["eakd dense"] = dense
    if shape.device == "cuda":
        try:
            known["liger jsd"] = liger()
        except ImportError as error:
            print(f"liger jsd left out: {error}")
    return known


def peak(shape: Shape, name: str, threads: int) -> float:
    torch.set_num_threads(threads)
    inputs, step = shape.inputs(), steps(shape)[name]

    def forget():
        for tensor in inputs[:2]:
            tensor.grad = None

    gradients = sum(tensor.nbytes for tensor in inputs[:2])
    if shape.device == "cpu":
        return memory_of(lambda _: step(*inputs), forget).peak - gradients
    step(*inputs)
    forget()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(*inputs)
    return torch.cuda.max_memory_allocated() - before - gradients


def measure(shape: Shape, rounds: int) -> list[Row]:
    inputs = shape.inputs()
    calls = {name: partial(step, *inputs) for name, step in steps(shape).items()}

    def forget():
        for tensor in inputs[:2]:
            tensor.grad = None

    samples = timing.interleaved(calls, rounds, timing.sampler("wall", shape.device), forget)
    logits = shape.rows * shape.vocab * 4
    rows = []
    for name in calls:
        row = machine(shape.device) | shape._asdict() | {"rounds": rounds, "provider": name}
        row |= {f"ms{q}": f"{x:.4g}" for q, x in zip(("", "_q1", "_q3"), timing.spread(samples[name]), strict=True)}
        for column, baseline in RATIOS.items():
            known = baseline in samples and baseline != name
            spread = timing.ratios(samples[baseline], samples[name]) if known else ("", "", "")
            row |= {
                f"{column}{q}": f"{x:.4g}" if known else "" for q, x in zip(("", "_q1", "_q3"), spread, strict=True)
            }
        of_peak = (shape, name, torch.get_num_threads())
        used = in_a_fresh_process(peak, *of_peak) if shape.device == "cpu" else peak(*of_peak)
        row |= {"mb": f"{used / 1e6:.4g}", "percent_of_fp32_logits": f"{100 * used / logits:.4g}"}
        print(f"{name:16} {row['ms']:>8} ms   x parts {row['x_parts']:>6}   {row['mb']:>7} MB")
        rows.append({column: str(value) for column, value in row.items()})
    return rows


def table(rows: list[Row]) -> str:
    """Markdown: where and when, then a line for every provider."""
    first = rows[0]
    shape = f"{first['rows']} rows, vocabulary {first['vocab']}, hidden size {first['hidden']}, {first['dtype']}"
    lines = {
        "provider": [row["provider"] for row in rows],
        "ms": [f"{row['ms']} [{row['ms_q1']}, {row['ms_q3']}]" for row in rows],
        "x parts": [row["x_parts"] for row in rows],
        "memory, MB": [row["mb"] for row in rows],
        "% of fp32 logits": [row["percent_of_fp32_logits"] for row in rows],
    }
    return f"{heading(rows)} {shape}; medians [quartiles] of {first['rounds']} rounds.\n\n{markdown(lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__.split(",")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--teacher-hidden", type=int, help="default: as the student's")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write a CSV file there, such as benchmarks/results/linear"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    teacher_hidden = given.teacher_hidden or given.hidden
    shape = Shape(given.rows, given.vocab, given.hidden, teacher_hidden, given.dtype, given.device)
    rows = measure(shape, given.rounds)
    if given.out:
        print(f"written to {save(rows, given.out)}")


if __name__ == "__main__":
    main()
