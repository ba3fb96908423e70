"""What is particular to the C++ kernels: instruction sets, threads, rounding, and the objects themselves."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import make_logits

from eakd_kernels import available_backends, ea_kd_loss, ops

if (reason := available_backends()["cpu"]) is not None:
    pytest.skip(reason, allow_module_level=True)

from eakd_kernels import _C

TESTS = Path(__file__).parent.parent
CAPABILITIES = {"default": "default", "avx2": "avx2", "avx512": "avx512"}
SUITE = [f"test_{name}.py" for name in ("functional", "edges", "conformance", "divergences", "recipe_edges", "methods")]


def rows_of(*shape, tau=2.0, t=3.0, **options):
    student, teacher = (x.detach() for x in make_logits(*shape, **options))
    return ops.Rows(student, teacher, None, None, None, tau, t, shape[-1])


def supported(capability):
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return capability == "default" or {"avx2": " avx2", "avx512": " avx512bw"}[capability] in flags


def run_with(capability, *command):
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=TESTS)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_torch_chooses_the_instruction_set(capability):
    if not supported(capability):
        pytest.skip(f"this processor has no {capability}")
    done = run_with(capability, "-c", "from eakd_kernels import _C; print(_C.cpu_isa())")
    assert done.stdout.strip() == CAPABILITIES[capability], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_passes(capability):
    if not supported(capability):
        pytest.skip(f"this processor has no {capability}")
    if capability == _C.cpu_isa():
        pytest.skip("this is the instruction set that all the other tests run")
    others = "not triton and not reference and not cuda"  # which have no instruction sets
    done = run_with(capability, "-m", "pytest", "-q", "-k", others, "-p", "no:cacheprovider", *SUITE)
    assert done.returncode == 0, done.stdout[-3000:]


def digest(*tensors):
    return hashlib.sha256(b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors)).hexdigest()


@pytest.mark.parametrize("shape", [(3, 40_000), (64, 5000), (4096, 100)], ids=str)
def test_a_hundred_runs_are_bit_identical(shape):
    student, teacher = make_logits(*shape)
    labels = torch.randint(0, shape[1], shape[:1])

    def run():
        loss, stats = ea_kd_loss(student, teacher, labels, ce_weight=0.1, return_stats=True, backend="cpu")
        return digest(loss.detach(), *stats, torch.autograd.grad(loss, student)[0])

    assert len({run() for _ in range(100)}) == 1


@pytest.mark.parametrize("shape", [(1, 100_000), (3, 40_000), (64, 5000)], ids=str)
def test_statistics_do_not_depend_on_the_threads(shape):
    rows, threads = rows_of(*shape), torch.get_num_threads()
    digests = set()
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            digests.add(digest(ops.row_statistics(*rows, True, "cpu")))
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


def test_few_rows_are_shared_by_segments():
    """One row on two threads: every column is written once, by whichever thread."""
    rows = rows_of(1, 16384 * 5 + 13)
    statistics = ops.row_statistics(*rows, False, "cpu")
    gradient = torch.full_like(rows.student_logits, torch.nan)
    torch.ops.eakd_cpu.row_gradient(*rows, statistics, torch.ones(1), None, None, None, gradient)
    q, p = ((x.double() / 2).softmax(-1) for x in (rows.student_logits, rows.teacher_logits))
    torch.testing.assert_close(gradient.double(), (q - p) / 2, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stores_round_to_nearest_even(dtype):
    """The gradient of z with a teacher of one column pair: its values sweep through every exponent."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype)
    every = every[every.isfinite()]
    # Loads: all finite values of the dtype, exactly; fp32 subnormals count as 0.
    rows = ops.Rows(
        every[:, None].expand(-1, 2).contiguous(), torch.zeros(len(every), 2), None, None, None, 1.0, 1.0, 2
    )
    saved = ops.row_statistics(*rows, False, "cpu")[7]  # the student's maximum
    exact = every.float()
    assert torch.equal(saved, exact.where(exact.abs() >= torch.finfo(torch.float32).smallest_normal, 0.0))
    # Stores: c (q - p) with q = 1 - p = 1 is c, an upstream gradient at and around every rounding boundary.
    wide = every.double()
    halfway = torch.cat([wide[:-1] / 2 + wide[1:] / 2, wide])
    for nudge in (0.0, 2.0**-20, -(2.0**-20)):
        upstream = (halfway * (1 + nudge)).float()
        z = torch.tensor([[0.0, -torch.inf]], dtype=dtype).expand(len(upstream), 2).contiguous()
        y = torch.tensor([[-torch.inf, 0.0]], dtype=dtype).expand(len(upstream), 2).contiguous()
        pair = ops.Rows(z, y, None, None, None, 1.0, 1.0, 2)
        statistics = ops.row_statistics(*pair, False, "cpu")
        gradient = ops.row_gradient(*pair, statistics, upstream, None, None, None, "cpu")
        want = torch.stack([upstream, -upstream], -1)
        # exponentials below 2^-126 do not exist here; the rest must be the nearest
        normal = want.abs() >= torch.finfo(torch.float32).smallest_normal
        assert torch.equal(gradient[normal], want.to(dtype)[normal])


def test_nothing_is_written_outside_the_gradient():
    """Canaries around strided and odd-sized buffers."""
    for columns in (1, 15, 16, 17, 100, 2047, 2049, 16385):
        rows = rows_of(3, columns)
        statistics = ops.row_statistics(*rows, False, "cpu")
        buffer = torch.full((5, columns + 40), 7.0)
        view = buffer[1:4, 20 : 20 + columns]
        torch.ops.eakd_cpu.row_gradient(*rows, statistics, torch.ones(3), None, None, None, view)
        outside = torch.ones_like(buffer, dtype=torch.bool)
        outside[1:4, 20 : 20 + columns] = False
        assert (buffer[outside] == 7).all() and (view != 7).all()


def test_large_gradients_go_past_the_caches_and_are_the_same():
    student, teacher = make_logits(160, 16384)  # 10 MB: streamed; a slice of it is not
    gradients = []
    for part in (slice(None), slice(0, 16)):
        z = student.detach()[part].clone().requires_grad_()
        loss = ea_kd_loss(z, teacher[part], reduction="sum", backend="cpu")
        gradients.append(torch.autograd.grad(loss, z)[0])
    assert torch.equal(gradients[0][:16], gradients[1])


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_instruction_sets_share_no_inline_functions(isa, tmp_path):
    """A weak symbol compiled for AVX-512 could be the copy that the linker keeps for every machine."""
    compiler, source = shutil.which("c++"), TESTS.parent / f"csrc/cpu/row_kernels_{isa}.cpp"
    if compiler is None or not source.exists():
        pytest.skip("needs a C++ compiler and the sources")
    built = tmp_path / "kernels.o"
    subprocess.run([compiler, "-std=c++17", "-O3", "-fPIC", "-Wno-psabi", "-w", "-c", source, "-o", built], check=True)
    symbols = subprocess.run(["nm", str(built)], capture_output=True, text=True, check=True).stdout
    kinds = {line.split()[-1]: line.split()[-2] for line in symbols.splitlines()}
    assert any(name.endswith(f"kernels_{isa}Ev") for name in kinds)
    assert [name for name, kind in kinds.items() if kind in "WVu" and "gxx_personality" not in name] == []
