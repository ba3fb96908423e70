"""DistributedDataParallel on two processes gives the single process's gradient."""

import time
from datetime import timedelta

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from eakd_kernels import ea_kd_loss

ROWS, WIDTH, VOCAB = 12, 8, 50


def make_model():
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCAB)


def make_data():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    labels[[1, 2, 3, 9]] = -100  # uneven counts on the two halves
    hidden, teacher = (torch.randn(ROWS, n, generator=generator) for n in (WIDTH, VOCAB))
    return hidden, teacher, labels


def worker(rank, folder):
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", meeting, timedelta(seconds=60), rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = nn.parallel.DistributedDataParallel(make_model())
    hidden, teacher, labels = (x.chunk(2)[rank] for x in make_data())
    count = (labels != -100).sum()
    torch.distributed.all_reduce(count)
    # DDP averages over ranks: a sum over all rows, divided by their number, is `world size` times this.
    loss = ea_kd_loss(model(hidden), teacher, labels, temperature=2.0, ce_weight=0.1, num_items=count) * 2
    loss.backward()
    if rank == 0:
        torch.save(model.module.weight.grad, folder / "gradient.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ddp_gives_the_single_process_gradient(tmp_path):
    processes = mp.spawn(worker, (tmp_path,), nprocs=2, join=False)
    deadline = time.monotonic() + 120
    while not processes.join(timeout=5):  # True once all have ended, an exception if one has failed
        assert time.monotonic() < deadline, "the two processes did not finish"
    model = make_model()
    hidden, teacher, labels = make_data()
    ea_kd_loss(model(hidden), teacher, labels, temperature=2.0, ce_weight=0.1).backward()
    torch.testing.assert_close(torch.load(tmp_path / "gradient.pt"), model.weight.grad)
