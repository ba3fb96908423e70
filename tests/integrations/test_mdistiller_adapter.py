"""kd_loss and dkd_loss under their published names: the numbers that the published functions returned."""

import pytest
import torch
from golden import CASES, check_loss_and_gradient, inputs, load, of_kind
from support import make_logits

from eakd_kernels import ea_kd_loss
from eakd_kernels.integrations.mdistiller import dkd_loss, kd_loss


@pytest.mark.parametrize("name", of_kind("ea_kd", "kd"))
def test_kd_loss(name, backend):
    data, params = load(name), CASES[name]["params"]
    student, teacher = inputs(data, backend)
    own = {"t": params["t"], "H_ub": params["h_ub"]} if "t" in params else {"EA": False}
    check_loss_and_gradient(name, kd_loss(student, teacher, params["tau"], backend=backend, **own), student, data)


@pytest.mark.parametrize("name", of_kind("ea_dkd", "dkd"))
def test_dkd_loss(name, backend):
    data, params = load(name), CASES[name]["params"]
    student, teacher = inputs(data, backend)
    own = {"t": params["t"], "H_ub": params["h_ub"], "LS": params["standardise"]} if "t" in params else {"EA": False}
    factors = (params["alpha"], params["beta"], params["tau"])
    loss = dkd_loss(student, teacher, data["labels"], *factors, backend=backend, **own)
    check_loss_and_gradient(name, loss, student, data)


def test_standardised_logits_keep_their_own_entropies():
    student, teacher = make_logits(4, 10)
    loss = kd_loss(student, teacher, 2.0, logit_stand=True)
    assert torch.equal(loss, ea_kd_loss(student, teacher, temperature=2.0, standardize=True))


def test_a_bound_as_published_code_has_it():
    student, teacher = make_logits(4, 10)
    losses = [kd_loss(student, teacher, 2.0, H_ub=bound) for bound in (torch.tensor(100.0), 100, None)]
    assert losses[0] == losses[1] != losses[2]


def test_classes_are_the_second_dimension():
    student, teacher = make_logits(2, 10, 3, 4)
    last = (student.movedim(1, -1), teacher.movedim(1, -1))
    assert torch.equal(kd_loss(student, teacher, 2.0), ea_kd_loss(*last, temperature=2.0))


def test_a_wrong_name_is_told_of_what_was_called():
    student, teacher = make_logits(4, 10)
    with pytest.raises(TypeError, match=r"^kd_loss\(\) got an unknown keyword 'ce_wieght'; did you mean 'ce_weight'"):
        kd_loss(student, teacher, 2.0, ce_wieght=0.1)
    with pytest.raises(
        TypeError, match=r"^kd_loss\(\) got an unknown keyword 'logit_stnad'; did you mean 'logit_stand'"
    ):
        kd_loss(student, teacher, 2.0, logit_stnad=True)
    with pytest.raises(TypeError, match=r"^dkd_loss\(\) got an unknown keyword 'reductoin'; did you mean 'reduction'"):
        dkd_loss(student, teacher, torch.arange(4), 1.0, 8.0, 2.0, reductoin="sum")


def test_what_published_functions_disagree_about_goes_by_keyword():
    student, teacher = make_logits(4, 10)
    with pytest.raises(TypeError, match="positional"):
        kd_loss(student, teacher, 2.0, True)
    with pytest.raises(TypeError, match="positional"):
        dkd_loss(student, teacher, torch.zeros(4, dtype=torch.int64), 1.0, 8.0, 4.0, True)
