"""The operators by themselves: schemas, fakes, aliasing, and agreement with one another."""

import pytest
import torch
from support import assert_same_on, make_logits, takes_fp64, widest

from eakd_kernels import divergences, ops, stats


def rule_on_device(rule):
    """RULES are made on the CPU, before a test's device is known."""
    device = torch.get_default_device()
    return ops.LossRule(*(field.to(device) if torch.is_tensor(field) else field for field in rule))


def make_rows(dtype=torch.float32, tensors=True):
    student, teacher = (x.detach() for x in make_logits(2, 3, 50, dtype=dtype))
    if not tensors:
        return ops.Rows(student, teacher, None, None, None, 2.0, 3.0, 50)
    if tensors == "recipe":
        divergence = divergences.JSD(0.3).kernel()
        recipe = ops.Recipe(*divergence, 1, 0.5, 1.0, 0.0, 20.0, (2.0, 3.0), (4.0, 9.0))
        return ops.Rows(student, teacher, None, None, None, 2.0, 3.0, 50, recipe.flat(), -torch.rand(50))
    labels, keep = torch.randint(0, 40, (2, 3)), torch.rand(2, 3) > 0.2
    return ops.Rows(student, teacher, labels, keep, 1 + torch.rand(2, 3), 1.0, 3.0, 40)


RULES = [
    ops.LossRule(None, ops.WEIGHTINGS["ea"], 3.7, 1.0, True, 1.0, 0.3, 0.1, None),
    ops.LossRule(torch.rand(2, 3), ops.WEIGHTINGS["tensor"], 3.7, 0.5, False, 0.9, 0.0, 1.0, torch.tensor(5)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("tensors", [True, False, "recipe"])
def test_opcheck(dtype, tensors, kernels):
    if dtype == torch.float64 and not takes_fp64(kernels):
        pytest.skip("this backend takes no fp64")
    rows = make_rows(dtype, tensors)
    slopes = tensors is True
    statistics = ops.row_statistics(*rows, slopes, kernels)
    upstream = torch.rand(2, 3, dtype=statistics.dtype)
    check = torch.library.opcheck
    check(ops.row_statistics, (*rows, slopes, kernels))
    check(ops.rest_statistics, (*rows, torch.tensor([3, 0, rows.vocab_size]).expand(2, 3, 3), slopes, kernels))
    check(ops.row_gradient, (*rows, statistics, upstream, None, upstream, None, kernels))
    check(ops.row_gradient_, (rows[0].clone(), *rows[1:], statistics, upstream, upstream, None, None, kernels))
    for rule in map(rule_on_device, RULES):
        check(ops.one_pass, (*rows, *rule, kernels))
        check(ops.one_pass_, (rows[0].clone(), *rows[1:], *rule, kernels))
    check(ops.scale_gradient, (rows[0], torch.tensor(2.0), kernels))
    check(ops.scale_gradient_, (rows[0].clone(), torch.tensor(2.0), kernels))


@pytest.mark.parametrize("rule", RULES, ids=["ea", "tensor"])
def test_one_pass_agrees_with_statistics_and_gradient(rule, kernels):
    rows, rule = make_rows(widest(kernels)), rule_on_device(rule)
    loss, fields, gradient = ops.one_pass(*rows, *rule, kernels)
    named = dict(zip(stats.LOSS_STATISTICS, fields, strict=True))
    statistics = ops.row_statistics(*rows, False, kernels)
    for name, field in zip(stats.PUBLIC_FIELDS, statistics, strict=False):
        assert_same_on(kernels, named[name], field)
    scale = rule.scale if rule.denominator is None else rule.scale / rule.denominator.item()
    torch.testing.assert_close(loss, named["loss"].sum() * scale)
    tau_squared = rows.temperatures.to(loss.dtype) ** 2 if rule.tau_squared else 1
    factor = rule.kd_weight * named["weight"] * tau_squared * scale
    hard = torch.full_like(factor, rule.ce_weight) * scale
    want = ops.row_gradient(*rows, statistics, factor, None, None, hard, kernels)
    torch.testing.assert_close(
        gradient, want, **({"rtol": 1e-12, "atol": 1e-15} if takes_fp64(kernels) else {"rtol": 1e-6, "atol": 1e-7})
    )


def test_a_gradient_in_place_needs_two_strides(kernels):
    """A copy would be written, and lost."""
    strided = torch.randn(2, 2, 3, 2, 60).permute(3, 0, 2, 1, 4)
    rows = ops.Rows(strided, strided.clone(), None, None, None, 2.0, 3.0, 60)
    with pytest.raises(RuntimeError, match="at most two leading strides"):
        ops.one_pass_(*rows, *RULES[0], kernels)


def test_field_order_is_that_of_the_kernels():
    extension = pytest.importorskip("eakd_kernels._C")
    info = extension.build_info()
    assert info["num_statistics"] == len(stats.STATISTICS)
    assert info["num_statistics_with_slopes"] == stats.statistics_count(None, True)
    assert info["num_loss_statistics"] == len(stats.LOSS_STATISTICS)


def test_scaling_by_one_is_free(kernels):
    gradient = torch.rand(3, 4, dtype=torch.bfloat16)
    before, version = gradient.clone(), gradient._version
    ops.scale_gradient_(gradient, torch.tensor(1.0), kernels)
    assert torch.equal(gradient, before)
    ops.scale_gradient_(gradient, torch.tensor(3.0), kernels)
    assert torch.equal(gradient, (before.float() * 3).bfloat16()) and gradient._version >= version
