"""What is asked of kernels on a GPU alone: graphs, no waiting, tensors on whatever device."""

import pytest
import torch
from support import make_logits

from eakd_kernels import available_backends, distill_stats, ea_kd_loss

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    if (reason := available_backends()[request.param]) is not None:
        pytest.skip(reason)
    torch.set_default_device("cuda")
    yield request.param
    torch.set_default_device(None)


def test_no_host_synchronisation(backend):
    student, teacher = make_logits(64, 5000)
    mask, items = torch.rand(64) > 0.1, torch.tensor(7)
    ea_kd_loss(student, teacher, mask=mask, num_items=items, backend=backend).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        ea_kd_loss(student, teacher, mask=mask, num_items=items, backend=backend).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, vocab_size", [(64, 100), (512, 5000), (2, 50_257), (256, 128_256)])
def test_cuda_graphs(rows, vocab_size, dtype, backend):
    student, teacher = make_logits(rows, vocab_size, dtype=dtype)

    def step():
        student.grad = None
        ea_kd_loss(student, teacher, temperature=2.0, backend=backend).backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        student.mul_(0.5)
    graph.replay()
    replayed = student.grad.clone()
    step()
    assert torch.equal(replayed, student.grad)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_gpu(backend):
    student, teacher = make_logits(8, 5000)
    want = distill_stats(student, teacher, backend=backend).loss
    got = distill_stats(student.to("cuda:1"), teacher.to("cuda:1"), backend=backend).loss
    assert torch.equal(got.cpu(), want.cpu())
