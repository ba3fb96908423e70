"""What a sparse teacher gets wrong, by its tail and k: `python -m benchmarks.sparse_bias`, minutes on a CPU.

Teacher: SmolLM2-135M-Instruct of examples/distill_lm.py on its held-out text, in windows of 128 tokens. Student: the
same model that sees no more than the last 16, hence one that knows less and is as sharp. Everything is compared with
the whole teacher: its entropy, the divergence KL(p || q), and the gradient of that in the student's logits. Results go
into a CSV file, and from there into the table of docs/sparse.md.
"""

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from eakd_kernels import ea_kd_loss, teacher_topk, topk_ea_kd_loss

from .report import Row, markdown

ROOT = Path(__file__).parents[1]
CSV, PAGE = ROOT / "benchmarks" / "results" / "sparse" / "smollm2-135m.csv", ROOT / "docs" / "sparse.md"
MARKERS = "<!-- bias:begin -->", "<!-- bias:end -->"
WINDOWS, LENGTH, SEEN = 16, 128, 16
TAILS, SIZES, ENTROPY_TEMPERATURES = ("bucket", "renormalize", "zero"), (8, 32, 64, 128), (1, 3)
# tau of the loss, and that of the log-probabilities
TEMPERATURES = ((1, 1), (2, 1), (2, 2))
PLAIN = {"weighting": "none", "reduction": "sum", "return_stats": True}
COLUMNS = {
    "tail": "tail",
    "k": "k",
    "mass outside": "outside",
    **{f"H_T, t = {t}": f"entropy_t{t}" for t in ENTROPY_TEMPERATURES},
    **{
        f"{what}, τ = {tau}, τ_T = {generated}": f"{name}_tau{tau}_of_tau{generated}"
        for tau, generated in TEMPERATURES
        for what, name in (("KL", "divergence"), ("gradient off", "gradient_error"))
    },
}


def measured(student: Tensor, teacher: Tensor) -> Iterator[tuple[tuple[str, int], dict[str, float]]]:
    """Sums over the rows of [rows, vocab] logits: for the whole teacher under ("whole", V), for every tail and k."""
    numbers, exact = {"outside": 0.0}, {}
    for tau, generated in TEMPERATURES:
        of_loss = loss_and_gradient(lambda z, tau=tau: ea_kd_loss(z, teacher, temperature=tau, **PLAIN), student)
        exact[tau] = of_loss[1]
        numbers |= named(tau, generated, *of_loss, exact[tau])
    for t in ENTROPY_TEMPERATURES:
        _, stats = ea_kd_loss(student, teacher, entropy_temperature=t, **PLAIN)
        numbers[f"entropy_t{t}"] = stats.teacher_entropy.sum().item()
    yield ("whole", teacher.shape[-1]), numbers
    for k, tail in product(SIZES, TAILS):
        sparse = {generated: teacher_topk(teacher, k, temperature=generated)[:2] for _, generated in TEMPERATURES}
        numbers = {"outside": -sparse[1][1].double().logsumexp(-1).expm1().sum().item()}
        for tau, generated in TEMPERATURES:
            options = {"tail": tail, "temperature": tau, "teacher_temperature": generated, **PLAIN}
            of_loss = loss_and_gradient(partial(topk_ea_kd_loss, **options), student, *sparse[generated])
            numbers |= named(tau, generated, *of_loss, exact[tau])
        for t in ENTROPY_TEMPERATURES:
            _, stats = topk_ea_kd_loss(student, *sparse[1], tail=tail, entropy_temperature=t, **PLAIN)
            numbers[f"entropy_t{t}"] = stats.teacher_entropy.sum().item()
        yield (tail, k), numbers


def loss_and_gradient(function: Callable, student: Tensor, *teacher: Tensor) -> tuple[float, Tensor]:
    with torch.enable_grad():
        student = student.detach().requires_grad_()
        loss, _ = function(student, *teacher)
    return loss.item(), torch.autograd.grad(loss, student)[0]


def named(tau: int, generated: int, total: float, gradient: Tensor, exact: Tensor) -> dict[str, float]:
    """Of the loss without tau^2, and squares of the gradient and its error, of which rows_of makes a ratio of norms."""
    setting = f"tau{tau}_of_tau{generated}"
    return {
        f"divergence_{setting}": total / tau**2,
        f"gradient_error_{setting}": (gradient - exact).square().sum().item(),
        f"gradient_{setting}": exact.square().sum().item(),
    }


def rows_of(batches: Iterator[tuple[Tensor, Tensor]]) -> list[Row]:
    """A line for the whole teacher, and one for every tail and k: means over tokens, ratios of norms."""
    totals, tokens = defaultdict(lambda: defaultdict(float)), 0
    for student, teacher in batches:
        tokens += len(student)
        for key, numbers in measured(student, teacher):
            for name, value in numbers.items():
                totals[key][name] += value
    rows = []
    for (tail, k), sums in totals.items():
        row = {"tail": tail, "k": str(k), "tokens": str(tokens)}
        for name, total in sums.items():
            if name.startswith("gradient_error"):
                norm = sums[name.replace("_error", "")]
                row[name] = f"{math.sqrt(total / norm):.3g}"
            elif not name.startswith("gradient"):
                row[name] = f"{total / tokens:.4g}"
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """Markdown, with the whole teacher first and the rest by tail."""
    order = sorted(rows, key=lambda row: ("whole", *TAILS).index(row["tail"]))
    return markdown({header: [row[name] for row in order] for header, name in COLUMNS.items()})


def insert(text: str, page: str) -> str:
    (before, rest), end = page.split(MARKERS[0]), MARKERS[1]
    return f"{before}{MARKERS[0]}\n{text}\n{end}{rest.split(end)[1]}"


def load(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def save(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@torch.no_grad()
def logits_of_windows(windows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(student, teacher) [LENGTH, vocab] of one window after the other."""
    from examples.distill_lm_models import load_teacher, logits_of, split_text

    model, tokenizer = load_teacher(torch.float32)
    _, held_out = split_text(tokenizer, LENGTH)
    for ids in held_out[:: max(1, len(held_out) // windows)][:windows]:
        yield logits_of(model, ids.view(-1, SEEN)).flatten(0, 1), logits_of(model, ids[None])[0]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse_bias", description=__doc__.split(": ")[0])
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"of {LENGTH} tokens; default: %(default)s")
    parser.add_argument("--out", type=Path, default=CSV, help="default: %(default)s")
    parser.add_argument("--page", type=Path, default=PAGE, help="whose table is replaced; default: %(default)s")
    arguments = parser.parse_args()
    rows = rows_of(logits_of_windows(arguments.windows))
    save(rows, arguments.out)
    arguments.page.write_text(insert(table(rows), arguments.page.read_text()))
    print(table(rows))


if __name__ == "__main__":
    main()
