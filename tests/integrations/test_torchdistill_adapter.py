"""The loss by its name in torchdistill's registry."""

import importlib
import sys

import pytest
import torch
from support import make_logits

from eakd_kernels import ea_kd_loss

ABSENT = "torchdistill is not installed: pip install --no-deps torchdistill"
registry = pytest.importorskip("torchdistill.losses.registry", reason=ABSENT)
mid_level = pytest.importorskip("torchdistill.losses.mid_level", reason=ABSENT)
ADAPTER = "eakd_kernels.integrations.torchdistill"
PLACES = {
    **{"student_module_path": "fc", "student_module_io": "output"},
    **{"teacher_module_path": "head.fc", "teacher_module_io": "input"},
}


def by_name(key, **options):
    importlib.import_module(ADAPTER)  # as a configuration's dependencies are
    return registry.get_mid_level_loss({"key": key, "kwargs": {**PLACES, **options}})


def io_dicts(student, teacher):
    return {"fc": {"output": student}}, {"head.fc": {"input": teacher}}


def test_by_name():
    student, teacher = make_logits(6, 10)
    targets = torch.randint(10, (6,))
    options = {"temperature": 4.0, "kd_weight": 0.9, "ce_weight": 0.1}
    loss = by_name("EAKDLoss", **options)(*io_dicts(student, teacher), targets)
    assert torch.equal(loss, ea_kd_loss(student, teacher, targets, **options))


def test_equals_torchdistill():
    """Its alpha is ce_weight, and 1 - alpha kd_weight; tau^2 is there where alpha is."""
    student, teacher = make_logits(6, 10, dtype=torch.float64)
    targets = torch.randint(10, (6,))
    places = io_dicts(student, teacher)
    theirs = mid_level.KDLoss(**PLACES, temperature=3.0, alpha=0.2)(*places, targets)
    options = {"weighting": "none", "temperature": 3.0}
    ours = by_name("EAKDLoss", kd_weight=0.8, ce_weight=0.2, **options)(*places, targets)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (ours, theirs)))
    soft = mid_level.KDLoss(**PLACES, temperature=3.0, alpha=0)(*places, targets)
    torch.testing.assert_close(by_name("EAKDLoss", scale_by_temperature_squared=False, **options)(*places), soft)


def test_it_computes_in_the_dtype_of_the_logits():
    student, teacher = make_logits(6, 10, dtype=torch.bfloat16)
    places = io_dicts(student, teacher)
    assert mid_level.KDLoss(**PLACES, temperature=3.0, alpha=0)(*places).dtype == torch.bfloat16
    assert by_name("EAKDLoss")(*places).dtype == torch.float32


def test_classes_are_the_second_dimension():
    student, teacher = make_logits(2, 7, 3, 4)
    targets = torch.randint(7, (2, 3, 4))
    targets[0, 0] = 255
    loss = by_name("EAKDLoss", ignore_index=255)(*io_dicts(student, teacher), targets)
    last = (student.movedim(1, -1), teacher.movedim(1, -1))
    assert torch.equal(loss, ea_kd_loss(*last, targets, ignore_index=255))


def test_targets_that_nobody_asked_for():
    """Such as the mixed ones of mixup, without cross-entropy."""
    student, teacher = make_logits(6, 10)
    loss = by_name("EAKDLoss")(*io_dicts(student, teacher), torch.rand(6, 10))
    assert torch.equal(loss, ea_kd_loss(student, teacher))


def test_another_signature_is_refused(monkeypatch):
    importlib.import_module(ADAPTER)
    monkeypatch.delitem(sys.modules, ADAPTER)
    monkeypatch.setattr(mid_level.KDLoss, "forward", lambda self, student_io_dict, teacher_io_dict: None)
    with pytest.raises(RuntimeError, match=r"KDLoss of torchdistill \S+ has forward\(self, student_io_dict"):
        importlib.import_module(ADAPTER)
