"""Training on two processes as on one: shared-out rows, replicated, sharded and tensor-parallel models.

The recipes of docs/parallel.md.
"""

import math
from functools import partial

import pytest
import torch
from torch import distributed as dist
from torch import nn

from eakd_kernels import ea_kd_loss, ea_weights, weighting

VOCAB, WIDTH, STEPS = 51, 16, 3
DEMO_VOCAB = 49152
OPTIONS = {"temperature": 2.0, "entropy_temperature": 1.0, "ce_weight": 0.1}


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids):
        return self.head(self.block(self.embedding(ids)))


def make_model(seed=0):
    torch.manual_seed(seed)
    return LanguageModel()


def make_batches():
    """(ids, teacher logits, labels), with uneven numbers of labels in the two halves."""
    generator = torch.Generator().manual_seed(1)
    teacher = make_model(seed=2).eval()
    for _ in range(STEPS):
        ids = torch.randint(0, VOCAB, (4, 6), generator=generator)
        labels = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        labels[0, :4] = -100
        yield ids, 5 * teacher(ids).detach(), labels


def kept_by_all(labels):
    """How many rows the ranks keep together."""
    count = (labels != -100).sum()
    dist.all_reduce(count)
    return count


# ---- models ------------------------------------------------------------------------------------------------------


def train(model, share, loss_of, batches=make_batches, optimizer=None, logits_of=lambda model, ids: model(ids)):
    """The losses of all steps, and the parameters after them."""
    optimizer, losses = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), []
    for batch in batches():
        ids, teacher, labels = (x.chunk(dist.get_world_size())[dist.get_rank()] if share else x for x in batch)
        loss = loss_of(logits_of(model, ids), teacher, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    parameters = dict(model.named_parameters())
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in parameters.items()}
    return torch.stack(losses), {name.removeprefix("module."): p.detach() for name, p in whole.items()}


def averaged_loss(student, teacher, labels):
    """DDP and FSDP average over ranks: a sum over all rows, divided by their number, is `world size` times this."""
    return ea_kd_loss(student, teacher, labels, num_items=kept_by_all(labels), **OPTIONS) * dist.get_world_size()


def train_ddp():
    return train(nn.parallel.DistributedDataParallel(make_model()), True, averaged_loss)


def train_fsdp():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = make_model(), init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model.block, model):
        fully_shard(module, mesh=mesh)
    return train(model, True, averaged_loss)


def train_tensor_parallel():
    """The head's columns are on two ranks, and so are the logits, which nobody gathers."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"head": ColwiseParallel(input_layouts=Replicate(), output_layouts=Shard(-1), use_local_output=False)}
    model = parallelize_module(make_model(), mesh, plan)

    def loss_of(student, teacher, labels):
        return ea_kd_loss(student, distribute_tensor(teacher, mesh, [Shard(-1)]), labels, **OPTIONS)

    return train(model, False, loss_of)


@pytest.mark.parametrize("trained", [train_ddp, train_fsdp, train_tensor_parallel], ids=lambda f: f.__name__)
def test_two_processes_train_as_one(trained, world):
    answers = world(2).run(trained)
    losses, parameters = train(make_model(), False, lambda *batch: ea_kd_loss(*batch, **OPTIONS))
    shares = torch.stack([answer[0] for answer in answers])
    torch.testing.assert_close(shares.mean(0), losses, rtol=2e-6, atol=0)
    if trained is train_tensor_parallel:
        assert torch.equal(shares[0], shares[1])
    for _, got in answers:
        assert got.keys() == parameters.keys()
        for name, parameter in parameters.items():
            torch.testing.assert_close(
                got[name], parameter, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )


# ---- the demo's student ------------------------------------------------------------------------------------------


def demo_student(seed):
    from examples.distill_lm_models import new_student

    return new_student(DEMO_VOCAB, seed)


def demo_batches():
    """(ids, teacher logits, labels) of the demo's vocabulary, with uneven numbers of labels in the two halves."""
    from examples.distill_lm_models import endless_batches, logits_of, next_tokens

    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(0, DEMO_VOCAB, (6, 24), generator=generator)
    teacher = demo_student(seed=2).eval()
    for ids, _ in zip(endless_batches(windows, 2, seed=0), range(STEPS), strict=False):
        labels = next_tokens(ids)
        labels[0, :9] = -100
        yield ids, 3 * logits_of(teacher, ids).detach(), labels


def train_demo(wrapped, share):
    from examples.distill_lm_models import LOSS_OPTIONS, logits_of, new_optimizer

    def loss_of(student, teacher, labels):
        count = kept_by_all(labels) if share else None
        loss = ea_kd_loss(student, teacher, labels, num_items=count, **LOSS_OPTIONS)
        return loss * dist.get_world_size() if share else loss

    model = wrapped(demo_student(seed=0))
    return train(model, share, loss_of, demo_batches, new_optimizer(model), logits_of)


def in_fsdp(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    return model


@pytest.mark.parametrize("wrapped", [nn.parallel.DistributedDataParallel, in_fsdp], ids=["DDP", "FSDP2"])
def test_demo_student_trains_on_two_processes_as_on_one(wrapped, world):
    """Seven million parameters, 49152 tokens, tied embeddings, AdamW."""
    pytest.importorskip("transformers")
    answers = world(2).run(train_demo, wrapped, True)
    losses, parameters = train_demo(lambda model: model, False)
    shares = torch.stack([answer[0] for answer in answers])
    torch.testing.assert_close(shares.mean(0), losses, rtol=1e-6, atol=0)
    start = dict(demo_student(seed=0).named_parameters())
    for _, got in answers:
        assert got.keys() == parameters.keys()
        for name, parameter in parameters.items():
            way = (parameter - start[name]).norm()
            assert (got[name] - parameter).norm() <= 1e-4 * way, name


# ---- rows --------------------------------------------------------------------------------------------------------


def own_half(*tensors):
    return [x.chunk(2)[dist.get_rank()] for x in tensors]


def packed_share(student, teacher, labels):
    """Sequence packing, context parallelism: a row is a row, wherever its sequence is."""
    student, teacher, labels = own_half(student, teacher, labels)
    student.requires_grad_()
    loss = ea_kd_loss(student, teacher, labels, num_items=kept_by_all(labels), **OPTIONS)
    loss.backward()
    return loss.detach(), student.grad


def mean_of_all_ranks(stats, count):
    """EA weights of mean 1 over the `count` rows of all ranks; rows left out have entropies of 0, and so weights."""
    weights = weighting.ea(stats, math.log(VOCAB))
    total = weights.sum()
    dist.all_reduce(total)
    return weights * (count / total)


def mean_weighted_share(student, teacher, labels):
    student, teacher, labels = own_half(student, teacher, labels)
    student.requires_grad_()
    count = kept_by_all(labels)
    loss = ea_kd_loss(
        student, teacher, labels, weighting=partial(mean_of_all_ranks, count=count), num_items=count, **OPTIONS
    )
    loss.backward()
    return loss.detach(), student.grad


def mean_weighted_share_from_weights(student, teacher, labels):
    """The same by `ea_weights`, where the loss is to run in one pass."""
    student, teacher, labels = own_half(student, teacher, labels)
    student.requires_grad_()
    count = kept_by_all(labels)
    weights = ea_weights(student, teacher, entropy_temperature=1.0, mask=labels != -100)
    total = weights.sum()
    dist.all_reduce(total)
    loss = ea_kd_loss(student, teacher, labels, weighting=weights * (count / total), num_items=count, **OPTIONS)
    loss.backward()
    return loss.detach(), student.grad


@pytest.mark.parametrize(
    "share, options",
    [
        (packed_share, {}),
        (mean_weighted_share, {"weight_norm": "mean"}),
        (mean_weighted_share_from_weights, {"weight_norm": "mean"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_shares_of_rows_add_up(share, options, world):
    """Two packed sequences of 9 and 11 rows, cut in the middle of the second."""
    student, teacher = torch.randn(20, VOCAB), 3 * torch.randn(20, VOCAB)
    labels = torch.randint(0, VOCAB, (20,))
    labels[[0, 1, 8, 19]] = -100
    answers = world(2).run(share, student, teacher, labels)
    student.requires_grad_()
    loss = ea_kd_loss(student, teacher, labels, **OPTIONS, **options)
    loss.backward()
    torch.testing.assert_close(sum(answer[0] for answer in answers), loss.detach(), rtol=1e-6, atol=0)
    gradient = torch.cat([answer[1] for answer in answers])
    assert (gradient - student.grad).norm() <= 1e-6 * student.grad.norm()
