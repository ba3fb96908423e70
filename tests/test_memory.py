"""What a call keeps and what it needs: one gradient buffer, a few numbers a row, and nothing else of [rows, vocab]."""

import subprocess
import sys
import textwrap

import pytest
import torch
from support import make_logits

from eakd_kernels import available_backends, ea_kd_loss

BYTES_PER_ROW = 64
SCALARS = 32  # bytes, whatever the number of rows


def saved_bytes(loss_of):
    """Storage that autograd packs between forward and backward, counted once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of()
    return loss, storages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none"}, {"detach_weights": False}, {"weight_norm": "mean"}, {"ce_weight": 0.5}],
    ids=str,
)
def test_retained_between_forward_and_backward(dtype, options, kernels):
    rows, vocab_size = 8, 5000
    student, teacher = make_logits(rows, vocab_size, dtype=dtype)
    labels = torch.randint(0, vocab_size, (rows,))
    _, storages = saved_bytes(lambda: ea_kd_loss(student, teacher, labels, backend=kernels, **options).sum())
    for mine in (student, teacher, labels):  # the caller's, kept by reference
        storages.pop(mine.untyped_storage().data_ptr(), None)
    gradient = student.numel() * student.element_size()
    assert sum(storages.values()) <= gradient + BYTES_PER_ROW * rows + SCALARS
    if dtype == torch.float16 or options.keys() & {"reduction", "detach_weights"} or "weight_norm" in options:
        assert sum(storages.values()) <= BYTES_PER_ROW * rows + SCALARS


# The profiler of torch does not see inside an operator, so the peak is read off the process. VmHWM is reset first.
MEASURE = textwrap.dedent(
    """
    import sys, torch
    from eakd_kernels import available_backends, ea_kd_loss
    rows, vocab, dtype, options = eval(sys.argv[1])
    torch.set_num_threads(2)

    def status(key):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    def run(rows):
        student = torch.randn(rows, vocab).to(dtype)
        teacher = torch.randn(rows, vocab).to(dtype)
        student.requires_grad_(not options.get("inplace_gradient"))
        leaf = torch.zeros((), dtype=dtype, requires_grad=True)
        before = None
        if options.get("inplace_gradient"):
            student = student.add_(leaf)
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
        before = status("VmRSS")
        loss = ea_kd_loss(student, teacher, **options)
        if options.get("inplace_gradient"):
            torch.autograd.grad(loss.sum(), student)
        else:
            loss.sum().backward()
        return status("VmHWM") - before

    run(2)
    print(run(rows))
    """
)


BUFFERS = pytest.mark.parametrize(
    "options, buffers",
    [({}, 1), ({"reduction": "none"}, 1), ({"weight_norm": "mean"}, 1), ({"inplace_gradient": True}, 0)],
    ids=str,
)


@BUFFERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_of_the_process(options, buffers, dtype):
    if (reason := available_backends()["cpu"]) is not None:
        pytest.skip(reason)
    rows, vocab_size = 256, 100_000
    arguments = repr((rows, vocab_size, dtype, {**options, "backend": "cpu"}))
    done = subprocess.run([sys.executable, "-c", MEASURE, arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tensor = rows * vocab_size * torch.finfo(dtype).bits // 8
    scratch = 16 << 20  # threads' rows of exponentials, allocator and huge-page rounding; none of it grows with rows
    assert int(done.stdout) <= buffers * tensor + scratch


@BUFFERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_on_the_gpu(options, buffers, dtype, kernels):
    if torch.get_default_device().type != "cuda":
        pytest.skip("a backend of the CPU")
    rows, vocab_size = 256, 100_000
    leaf, teacher = make_logits(rows, vocab_size, dtype=dtype)
    student = leaf * 1
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = ea_kd_loss(student, teacher, backend=kernels, **options)
    torch.autograd.grad(loss.sum(), student)
    peak = torch.cuda.max_memory_allocated() - before
    granules = 32 * 512  # of the allocator, for a few small tensors
    assert peak <= buffers * student.nbytes + 2 * BYTES_PER_ROW * rows + granules
