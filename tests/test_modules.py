import pickle
import re

import pytest
import torch
from support import make_logits
from torch import nn

from eakd_kernels import EADKDLoss, EAKDLoss, FusedLinearEAKDLoss, TopKEAKDLoss, ea_kd_loss


def test_calls_the_function(backend):
    student, teacher = make_logits(2, 3, 20)
    labels = torch.randint(0, 20, (2, 3))
    options = {"temperature": 2.0, "ce_weight": 0.1, "backend": backend}
    assert torch.equal(EAKDLoss(**options)(student, teacher, labels), ea_kd_loss(student, teacher, labels, **options))


def test_options_of_the_call_win():
    student, teacher = make_logits(2, 3, 20)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    module = EAKDLoss(temperature=2.0, reduction="sum")
    assert torch.equal(
        module(student, teacher, mask=mask, num_items=7),
        ea_kd_loss(student, teacher, temperature=2.0, reduction="sum", mask=mask, num_items=7),
    )
    with pytest.raises(TypeError, match="did you mean 'mask'"):
        module(student, teacher, masks=mask)


@pytest.mark.parametrize("module", [EAKDLoss, EADKDLoss, FusedLinearEAKDLoss, TopKEAKDLoss])
def test_options_are_keywords(module):
    told = re.escape(f"{module.__name__}() takes options as keywords, as {module.__name__}(temperature=4.0), got float")
    with pytest.raises(TypeError, match=told):
        module(3.5)


def test_a_learnable_temperature_is_a_parameter():
    student, teacher = make_logits(2, 20)
    module = EAKDLoss(temperature=nn.Parameter(torch.tensor(2.0)))
    assert [name for name, _ in module.named_parameters()] == ["temperature"]
    module(student, teacher).backward()
    assert module.temperature.grad is not None and student.grad is not None


def test_a_weighting_that_learns_is_a_submodule():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, stats):
            return self.scale * stats.teacher_entropy

    student, teacher = make_logits(2, 20)
    module = EAKDLoss(weighting=Gate(), detach_weights=False)
    assert [name for name, _ in module.named_parameters()] == ["weighting.scale"]
    module(student, teacher).backward()
    assert module.weighting.scale.grad is not None


def test_tensors_move_with_the_module():
    module = EAKDLoss(weighting=torch.ones(3)).to("meta")
    assert module.weighting.device.type == "meta"
    assert not module.state_dict()


def test_pickle_and_repr():
    module = EAKDLoss(temperature=4.0, weighting="teacher")
    student, teacher = make_logits(2, 20)
    copy = pickle.loads(pickle.dumps(module))
    assert torch.equal(copy(student, teacher), module(student, teacher))
    assert repr(module) == "EAKDLoss(temperature=4.0, weighting='teacher')"
