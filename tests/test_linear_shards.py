"""fused_linear_ea_kd_loss over heads whose rows, the vocabulary, are sharded, against the same call on whole heads."""

import pytest
import torch
from processes import Collectives
from shards import LAYOUTS, ROWS, VOCAB, assert_close, own_columns, positions
from torch import distributed as dist

from eakd_kernels import divergences as D
from eakd_kernels import fused_linear_ea_kd_loss
from eakd_kernels.stats import RowStats

WIDTHS = 12, 20
CASES = {
    "plain": {},
    "cross-entropy": {"ce_weight": 0.5, "temperature": 2.0},
    "mean weights": {"weight_norm": "mean"},
    "live weights": {"detach_weights": False, "reduction": "sum"},
    "rows": {"reduction": "none", "mask": torch.arange(ROWS) != 3},
    "nothing kept": {"mask": torch.zeros(ROWS, dtype=torch.bool)},
    "temperatures of rows": {"temperature": torch.linspace(0.5, 4, ROWS), "num_items": 5},
    "jeffreys": {"divergence": D.Jeffreys(0.9), "ce_weight": 0.3},
    "temperatures": {"temperature": (1.0, 2.0, 5.0)},
    "caps and class weights": {
        **{"student_softcap": 5.0, "teacher_logit_scale": 1.2},
        **{"teacher_class_weights": torch.linspace(0.2, 3, VOCAB)},
    },
    "cut": {"vocab_size": 40, "ce_weight": 0.5},
}


def make(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    student = [random(ROWS, WIDTHS[0]), random(VOCAB, WIDTHS[0]), random(VOCAB)]
    return student, [random(ROWS, WIDTHS[1]), random(VOCAB, WIDTHS[1])]


def call(student, teacher, labels, options):
    hidden, weight, bias = (x.clone().requires_grad_() for x in student)
    with Collectives() as forward:
        loss, stats = fused_linear_ea_kd_loss(
            hidden, weight, *teacher, labels, student_bias=bias, chunk_rows=3, return_stats=True, **options
        )
    with Collectives() as backward:
        loss.sum().backward()
    counts = [sum(dtype == torch.int64 for _, dtype in forward.calls), len(forward.calls), len(backward.calls)]
    return loss.detach(), stats, [hidden.grad, weight.grad, bias.grad], counts


def sharded(widths, student, teacher, labels, options):
    columns, (hidden, weight, bias), (other, head) = own_columns(widths), student, teacher
    options = {**options, "process_group": dist.group.WORLD}
    return call([hidden, weight[columns], bias[columns]], [other, head[columns]], labels, options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_equals_whole_heads(case, layout, world):
    student, teacher = make()
    labels, options, widths = positions(ROWS), CASES[case], LAYOUTS[layout]
    loss, stats, gradients, _ = call(student, teacher, labels, options)
    answers = world(len(widths)).run(sharded, widths, student, teacher, labels, options)
    for got, its_stats, _, counts in answers:
        assert torch.equal(got, answers[0][0])
        assert_close(got, loss)
        for name, field, want in zip(RowStats._fields, its_stats, stats, strict=True):
            assert (field is None) == (want is None), name
            if want is not None:
                assert_close(field, want, name=name)
        assert counts == [1, 1 + (case != "nothing kept"), 0]
    # The hidden states' gradient comes in summands, the heads' in parts.
    hidden = sum(answer[2][0] for answer in answers)
    weight, bias = (torch.cat([answer[2][i] for answer in answers]) for i in (1, 2))
    for got, want in zip((hidden, weight, bias), gradients, strict=True):
        assert (got - want).norm() <= 3e-6 * want.norm()


@pytest.mark.parametrize(
    "options", [{"divergence": D.JSD(0.5)}, {"standardize": True}, {"backend": "reference"}], ids=str
)
def test_what_it_does_not_take_raises(options, world):
    student, teacher = make()
    with pytest.raises(AssertionError, match=r"NotImplementedError.*ea_kd_loss takes the others"):
        world(2).run(sharded, LAYOUTS["2 even"], student, teacher, positions(ROWS), options)
