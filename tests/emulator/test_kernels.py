"""The CUDA kernels' source on the CPU, every kernel by name, against the reference in fp64.

What the other tests cannot reach without a GPU: each kernel on rows that the launch plan would give to another one, all
cluster sizes, threads in any order. `make sanitize` runs this file with address and undefined-behaviour checks.
"""

import ctypes
import random

import pytest
import torch
from support import assert_gradient_within_rounding, assert_within_error_rule

from eakd_kernels import available_backends, distill_stats, ea_kd_loss
from eakd_kernels.backends import cuda

if cuda.EMULATOR is None:
    pytest.skip("EAKD_CUDA_EMULATOR is not set (`make emulator`, then pytest)", allow_module_level=True)
if (reason := available_backends()["cuda"]) is not None:
    pytest.fail(f"the emulator cannot be loaded: {reason}")

LIBRARY = ctypes.CDLL(cuda.EMULATOR)
IN_ORDER, REVERSED = 0, 2**64 - 1

CLUSTERS = {"small": [1], "resident": [1, 2, 4, 8, 16], "ring": [1, 2, 4, 8, 16], "stream": [1, 2, 4, 8, 16]}
PLANS = [f"{kernel}:{cluster}" for kernel, clusters in CLUSTERS.items() for cluster in clusters]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16), (FP32, FP16)]
# Below, at and above: a vector, a warp of them, a block of 32 to 512 threads of them, and odd lengths everywhere.
SHORT = [*range(1, 10), 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 255, 257, 511, 513, 777, 1000, 1023, 1024]
LONG = [1025, 1031, 2047, 2048, 2049, 2561, 4095, 4097, 5003, 8191, 8193, 10007, 10240, 16385, 20479, 20000]
LONGEST = [32003, 40000, 39999]
TEMPERATURES = [(1.0, 3.0), (2.0, 2.0), (1.0, 1.0), (2.0, 3.0), (4.0, 1.0)]
CASES_OF_A_PLAN = 31
# Rows whose largest error in eager fp32 is what the error rule goes by: of a few rows it would be chance.
POOL, POOL_COLUMNS = 24, 150_000


def schedule(seed):
    LIBRARY.eakd_emulator_schedule(ctypes.c_uint64(seed))


@pytest.fixture(autouse=True)
def _alone():
    """One thread: the judge's tensors are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    schedule(IN_ORDER)


def rows_at(values, offset, width, dtype):
    """[N, V] of `values` in rows of `width`, the first of which begins `offset` elements into exactly enough memory."""
    n, v = values.shape
    memory = torch.full((offset + (n - 1) * width + v,), float("nan"), dtype=dtype)
    rows = memory.as_strided((n, v), (width, 1), offset)
    rows.copy_(values)
    return rows


class Case:
    """One random choice of everything that a kernel can meet."""

    def __init__(self, plan, pair, seed):
        self.random = choose = random.Random(f"{plan} {pair} {seed}")
        kernel = plan.split(":")[0]
        # One column is exact in eager, and a rounding off in a kernel that is not for so few.
        lengths = SHORT if kernel == "small" else SHORT[1:] if seed % 3 == 0 else LONG
        longest = kernel != "small" and seed % 10 == 9
        self.vocab_size = choose.choice(LONGEST if longest else lengths)
        self.rows = 1 if longest else choose.choice([1, 3, 5])
        self.pair, self.plan = pair, plan
        self.offset = choose.choice([0, 0, 1, 3, 4, 7])
        self.width = self.vocab_size + choose.choice([0, 0, 1, 8])
        self.teacher_offset, self.teacher_width = self.offset, self.width
        keeps_row = kernel in ("resident", "ring")
        if keeps_row:  # for rows whose gradient begins as they do: fresh ones, or in place
            self.inplace = choose.random() < 0.4
            if not self.inplace:
                self.offset, self.width = choose.choice([0, 8]), self.vocab_size
            self.teacher_offset, self.teacher_width = self.offset, self.width
        else:
            self.inplace = choose.random() < 0.2
        if not keeps_row and choose.random() < 0.2:  # begins elsewhere within a vector than the student
            self.teacher_offset, self.teacher_width = self.offset + 1, self.vocab_size + choose.choice([0, 3])
        self.tau, self.t = choose.choice(TEMPERATURES)
        self.labels, self.mask, self.banned = (choose.random() < 0.4 for _ in range(3))
        self.columns = self.vocab_size - choose.choice([0, 0, 0, 1, 8]) if self.vocab_size > 9 else self.vocab_size
        self.seed = choose.choice([IN_ORDER, REVERSED, choose.getrandbits(32) | 1])
        self.processors = choose.choice([1, 2, 32])
        self.scale = choose.choice([0.1, 3.0, 10.0])

    def __str__(self):
        return ", ".join(f"{name}={value}" for name, value in vars(self).items() if name != "random")

    def tensors(self):
        generator = torch.Generator().manual_seed(self.random.getrandbits(30))
        pool_rows = max(self.rows, min(POOL, POOL_COLUMNS // self.vocab_size))
        values = torch.randn(2, pool_rows, self.vocab_size, generator=generator) * self.scale
        if self.banned:  # the same columns of both, as a masked vocabulary has them
            values[..., torch.rand(self.vocab_size, generator=generator) < 0.3] = -torch.inf
        pool = [x.to(dtype) for x, dtype in zip(values, self.pair, strict=True)]
        student = rows_at(pool[0][: self.rows], self.offset, self.width, self.pair[0])
        teacher = rows_at(pool[1][: self.rows], self.teacher_offset, self.teacher_width, self.pair[1])
        options = {"temperature": self.tau, "entropy_temperature": self.t, "vocab_size": self.columns}
        if self.labels:
            allowed = values[0, 0, : self.columns].isfinite().nonzero().flatten()
            if len(allowed) > 8:  # of fewer, the gradient can be 0 in eager and a rounding of 1 off here
                picked = torch.randint(len(allowed), (len(pool[0]),), generator=generator)
                options |= {"labels": allowed[picked], "ce_weight": 0.5}
        if self.mask:
            options["mask"] = torch.rand(len(pool[0]), generator=generator) < 0.6
        return student, teacher, pool, options


class Judge:
    """The reference on the pool's rows, in fp64 and as eager fp32; `case` has the first of them."""

    def __init__(self, function, pool, options, differentiate):
        self.stats, self.gradients = [], []
        for dtype in (torch.float64, torch.float32):
            z = pool[0].to(dtype).requires_grad_()
            out = function(z, pool[1].to(dtype), backend="reference", **options)
            loss, stats = out if isinstance(out, tuple) and len(out) == 2 else (differentiate(out), out)
            self.gradients.append(torch.autograd.grad(loss, z)[0])
            self.stats.append(stats.detach())

    def check_values(self, stats, case):
        exact, baseline = self.stats
        for name, got in stats.detach()._asdict().items():
            if got is None or name == "loss":
                continue
            want, eager = getattr(exact, name), getattr(baseline, name)
            error = (eager - want).abs()[want.isfinite()].max() if want.isfinite().any() else 0
            want = want[: case.rows]
            finite = want.isfinite()
            assert torch.equal(got[~finite], want[~finite].to(got.dtype)), name
            if finite.any():
                assert_within_error_rule(got[finite], want[finite], want[finite] + error, max(case.columns, 2))
        if stats.loss is not None:
            parts = stats.detach()
            loss = parts.weight.double() * case.tau**2 * parts.divergence
            loss = loss if parts.cross_entropy is None else loss + 0.5 * parts.cross_entropy
            torch.testing.assert_close(parts.loss.double(), loss, rtol=4e-7, atol=1e-7)

    def check_gradient(self, gradient, case):
        exact, baseline = self.gradients
        error = (baseline - exact).abs().max()
        assert_gradient_within_rounding(gradient, exact[: case.rows], exact[: case.rows] + error)


def of_rows(options, rows):
    """`options`, cut to the first rows."""
    cut = {name: value[:rows] for name, value in options.items() if isinstance(value, torch.Tensor)}
    return {**options, **cut}


class Computed(torch.autograd.Function):
    """`rows` where they lie, as if computed: leaves are not overwritten by their gradient."""

    @staticmethod
    def forward(ctx, anchor, rows):
        return rows.detach()

    @staticmethod
    def backward(ctx, gradient):
        return None, None


def check_one_pass(case, student, teacher, pool, options):
    options |= {"reduction": "sum", "return_stats": True}
    student = student.detach().requires_grad_()
    logits = Computed.apply(student.new_ones((), requires_grad=True), student) if case.inplace else student
    own = {**of_rows(options, case.rows), "inplace_gradient": case.inplace}
    loss, stats = ea_kd_loss(logits, teacher, backend="cuda", **own)
    judge = Judge(ea_kd_loss, pool, options, None)
    judge.check_values(stats, case)
    judge.check_gradient(torch.autograd.grad(loss, logits)[0], case)


def check_two_operators(case, student, teacher, pool, options):
    """Statistics, and the gradient of all that are differentiable, from coefficients of their own."""
    names = ["divergence", "student_entropy", "student_lse", *(["cross_entropy"] if "labels" in options else [])]
    generator = torch.Generator().manual_seed(1)
    factors = {name: torch.randn(len(pool[0]), generator=generator) for name in names}

    def total(stats):
        rows = len(stats.divergence)
        return sum((getattr(stats, name) * factors[name][:rows]).sum() for name in names)

    student = student.detach().requires_grad_()
    stats = distill_stats(student, teacher, backend="cuda", **of_rows(options, case.rows))
    judge = Judge(distill_stats, pool, options, total)
    judge.check_values(stats, case)
    judge.check_gradient(torch.autograd.grad(total(stats), student)[0], case)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(str(dtype)[6:] for dtype in pair))
@pytest.mark.parametrize("plan", PLANS)
def test_kernels(plan, pair, monkeypatch):
    taken = 0
    for seed in range(CASES_OF_A_PLAN):
        case = Case(plan, pair, seed)
        student, teacher, pool, options = case.tensors()
        monkeypatch.setenv("EAKD_CUDA_PLAN", plan)
        LIBRARY.eakd_emulator_device(90, case.processors)
        schedule(case.seed)
        try:
            check = check_two_operators if seed % 4 == 3 else check_one_pass
            check(case, student, teacher, pool, options)
            taken += 1
        except RuntimeError as error:  # rows that this kernel does not take
            assert "cannot take rows" in str(error), f"{error}\n{case}"
        except AssertionError as error:
            raise AssertionError(f"{error}\n{case}") from error
        finally:
            LIBRARY.eakd_emulator_device(90, 2)
    least = 0 if plan.startswith("ring") and pair[0] != pair[1] else CASES_OF_A_PLAN // 2
    assert taken >= least
    COUNTED.append(taken)


COUNTED = []


def test_enough_combinations():
    if len(COUNTED) < len(PLANS) * len(PAIRS):
        pytest.skip("a part of test_kernels ran")
    assert sum(COUNTED) >= 2000
