"""Bad input: an error before any work, naming the argument, what it got and what would work."""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch
from support import make_logits

from eakd_kernels import (
    EADKDLoss,
    EAKDLoss,
    available_backends,
    distill_stats,
    divergences,
    ea_dkd_loss,
    ea_kd_loss,
    ea_weights,
)

Z, Y = make_logits(2, 3, 10)
ROWS = (2, 3)
SHARED = Z * 1
LABELS = torch.zeros(ROWS, dtype=torch.long)


BAD = [
    # what is given, the error, words of its message
    ({"student_logits": Z[:1]}, ValueError, "same leading shape"),
    ({"student_logits": Z[..., :9]}, ValueError, "vocab_size=9"),
    ({"student_logits": Z.detach().long()}, TypeError, "student_logits.*int64"),
    ({"teacher_logits": Y.to(torch.complex64)}, TypeError, "teacher_logits.*complex64"),
    ({"teacher_logits": Y.numpy()}, TypeError, "teacher_logits.*ndarray"),
    ({"teacher_logits": SimpleNamespace(logits=Y)}, TypeError, r"teacher_logits.*SimpleNamespace; pass \.logits"),
    ({"student_logits": {"logits": Y}}, TypeError, r'student_logits.*dict; pass \["logits"\]'),
    ({"student_logits": torch.tensor(1.0), "teacher_logits": torch.tensor(1.0)}, ValueError, "at least one column"),
    ({"student_logits": Z[..., :0], "teacher_logits": Y[..., :0]}, ValueError, "at least one column"),
    ({"teacher_logits": Y.clone().requires_grad_()}, ValueError, r"teacher_logits\.detach\(\)"),
    ({"teacher_logits": Y.to("meta")}, ValueError, "teacher_logits.*device cpu, got meta"),
    ({"labels": LABELS[0]}, ValueError, r"labels.*\(2, 3\).*\(3,\)"),
    ({"labels": LABELS.float()}, TypeError, "labels.*int64 class indices.*float32"),
    ({"labels": torch.nn.functional.one_hot(LABELS, 10).float()}, ValueError, r"labels.*\(2, 3, 10\).*argmax\(-1\)"),
    ({"labels": LABELS[0].float()}, ValueError, r"labels.*\(2, 3\), got \(3,\)$"),
    ({"labels": LABELS.tolist()}, TypeError, "labels.*list"),
    ({"labels": LABELS + 10, "ce_weight": 1.0}, ValueError, "labels must be in 0..9.*got 10"),
    ({"labels": LABELS - 1, "ce_weight": 1.0}, ValueError, "labels.*got -1"),
    ({"labels": LABELS.to("meta")}, ValueError, "labels.*meta"),
    ({"ce_weight": 1.0}, ValueError, "ce_weight.*needs labels"),
    ({"ce_weight": -1.0, "labels": LABELS}, ValueError, "ce_weight.*>= 0"),
    ({"kd_weight": float("nan")}, ValueError, "kd_weight.*nan"),
    ({"kd_weight": "1"}, TypeError, "kd_weight.*str"),
    ({"mask": LABELS}, TypeError, "mask.*bool.*int64"),
    ({"mask": torch.ones(3, 2, dtype=torch.bool)}, ValueError, r"mask.*\(2, 3\).*\(3, 2\)"),
    ({"temperature": 0.0}, ValueError, "temperature.*> 0"),
    ({"temperature": -1}, ValueError, "temperature.*> 0"),
    ({"temperature": float("nan")}, ValueError, "temperature.*nan"),
    ({"temperature": 1e39}, ValueError, "temperature.*1e.30"),
    ({"entropy_temperature": 10**400}, ValueError, "entropy_temperature.*1e.30"),
    ({"temperature": float("inf")}, ValueError, "temperature.*finite"),
    ({"temperature": True}, TypeError, "temperature.*bool"),
    ({"temperature": torch.tensor(0.0)}, ValueError, "temperature.*> 0"),
    ({"temperature": torch.full(ROWS, float("nan"))}, ValueError, "temperature.*row kept"),
    ({"temperature": torch.ones(3)}, ValueError, r"temperature.*\(2, 3\).*\(3,\)"),
    ({"temperature": torch.tensor(2)}, TypeError, "temperature.*int64"),
    ({"entropy_temperature": 0}, ValueError, "entropy_temperature.*> 0"),
    ({"entropy_temperature": torch.tensor(1.0)}, TypeError, "entropy_temperature"),
    ({"entropy_bound": -1.0}, ValueError, "entropy_bound.*>= 0"),
    ({"weighting": "EA"}, ValueError, '"ea".*EA'),
    ({"weighting": None}, TypeError, "weighting.*None"),
    ({"weighting": torch.ones(3)}, ValueError, r"weighting.*\(2, 3\).*\(3,\)"),
    ({"weighting": torch.ones(ROWS, dtype=torch.long)}, TypeError, "weighting.*int64"),
    ({"weighting": lambda stats: stats.divergence[0]}, ValueError, r"weighting returned \(3,\)"),
    ({"weighting": lambda stats: 1.0}, ValueError, "weighting returned float"),
    ({"weight_norm": "sum"}, ValueError, 'weight_norm.*"bound".*sum'),
    ({"divergence": "kl"}, ValueError, '"forward_kl".*kl'),
    ({"divergence": 3}, TypeError, "divergence.*3"),
    ({"reduction": "batchmean"}, ValueError, 'batchmean.*"mean"'),
    ({"reduction": "average"}, ValueError, "reduction.*average"),
    ({"backend": "numba"}, ValueError, "backend.*cpu.*numba"),
    ({"backend": None}, TypeError, "backend.*None"),
    *(
        ({"backend": name}, RuntimeError, f'backend="{name}".*usable here.*reference')
        for name, reason in available_backends().items()
        if reason is not None
    ),
    ({"vocab_size": 0}, ValueError, "vocab_size.*1..10.*0"),
    ({"vocab_size": 11}, ValueError, "vocab_size.*1..10.*11"),
    ({"vocab_size": 5.0}, TypeError, "vocab_size.*float"),
    ({"num_items": 0}, ValueError, "num_items.*> 0"),
    ({"num_items": torch.tensor(0)}, ValueError, "num_items.*> 0"),
    ({"num_items": torch.tensor([2])}, ValueError, "num_items.*0-d"),
    ({"num_items": 2, "reduction": "none"}, ValueError, "num_items.*mean"),
    ({"inplace_gradient": True}, ValueError, "inplace_gradient.*leaf"),
    (
        {"student_logits": (Z * 1)[:, :1].expand(2, 3, 10), "inplace_gradient": True},
        ValueError,
        "inplace_gradient.*share",
    ),
    (
        {"student_logits": Z.view(3, 2, 10), "teacher_logits": Y.view(3, 2, 10), "inplace_gradient": True},
        ValueError,
        "view",
    ),
    (
        {"student_logits": SHARED, "teacher_logits": SHARED.detach(), "inplace_gradient": True},
        ValueError,
        "share no memory",
    ),
    ({"detach_weights": "no"}, TypeError, "detach_weights.*no"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index.*float"),
    ({"process_group": object()}, TypeError, "process_group must be None or a torch.distributed.ProcessGroup"),
    ({"standardize": "both"}, ValueError, 'standardize.*True or "all".*both'),
    ({"standardize": 1}, ValueError, "standardize.*got 1"),
    ({"teacher_class_weights": torch.ones(9)}, ValueError, r"teacher_class_weights.*\(10,\).*\(9,\)"),
    ({"teacher_class_weights": torch.zeros(10)}, ValueError, "teacher_class_weights.*> 0"),
    ({"teacher_class_weights": torch.ones(10).long()}, TypeError, "teacher_class_weights.*int64"),
    ({"teacher_class_weights": [1.0] * 10}, TypeError, "teacher_class_weights.*list"),
    ({"teacher_class_weights": torch.ones(10, requires_grad=True)}, ValueError, "teacher_class_weights.*detach"),
    ({"temperature": ()}, ValueError, "temperature.*1 to 8.*got 0"),
    ({"temperature": (1.0,) * 9}, ValueError, "temperature.*1 to 8.*got 9"),
    ({"temperature": (1.0, -2.0)}, ValueError, r"temperature\[1\].*-2.0"),
    ({"student_logit_scale": 0.0}, ValueError, "student_logit_scale"),
    ({"teacher_logit_scale": "1"}, TypeError, "teacher_logit_scale"),
    ({"student_softcap": 0.0}, ValueError, "student_softcap.*> 0"),
    ({"teacher_softcap": -1.0}, ValueError, "teacher_softcap"),
    ({"divergence": 0.5}, TypeError, r"divergence.*JSD\(0.5\)"),
    ({"temprature": 2.0}, TypeError, "temprature.*did you mean 'temperature'"),
    ({"xyz": 2.0}, TypeError, "xyz.*it takes"),
    ({"softcap": 30.0}, TypeError, "softcap.*'student_softcap' and 'teacher_softcap'"),
    ({"alpha": 0.5}, TypeError, "alpha: use kd_weight and ce_weight"),
    ({"beta": 0.5}, TypeError, r"beta: use kd_weight and ce_weight.*JSD\(beta\)"),
    ({"label_smoothing": 0.1}, TypeError, "label_smoothing: leave ce_weight at 0"),
    ({"tau": 2.0}, TypeError, "tau.*did you mean 'temperature'"),
    ({"attention_mask": None}, TypeError, "attention_mask.*did you mean 'mask'"),
    ({"divergence": divergences.JSD}, TypeError, r"an instance, got the class: JSD\("),
    ({"divergence": "jsd"}, ValueError, "SkewForwardKL.*got 'jsd'"),
    ({"weighting": "focal"}, ValueError, "eakd_kernels.weighting.focal"),
    ({"temperature": torch.ones(1)}, ValueError, "squeeze"),
    ({"mask": torch.ones(ROWS)}, TypeError, r"\.bool\(\)"),
    ({"kd_weight": torch.ones(3, 4)}, TypeError, r"kd_weight.*a tensor of shape \(3, 4\)"),
]


@pytest.mark.parametrize("given, error, words", BAD, ids=[f"{i}-{next(iter(b[0]))}" for i, b in enumerate(BAD)])
def test_bad_input(given, error, words):
    with pytest.raises(error, match=words):
        ea_kd_loss(**{"student_logits": Z, "teacher_logits": Y, **given})


@pytest.mark.parametrize("given, error, words", [bad for bad in BAD if "student_logits" not in bad[0]])
def test_the_other_functions_check_as_much(given, error, words):
    """What a function takes it checks; what it does not take it refuses, with the nearest name."""
    for function in (distill_stats, ea_weights):
        taken = inspect.signature(function).parameters
        if all(name in taken for name in given):
            with pytest.raises(error, match=words):
                function(**{"student_logits": Z, "teacher_logits": Y, **given})
        else:
            with pytest.raises(TypeError):
                function(**{"student_logits": Z, "teacher_logits": Y, **given})


@pytest.mark.parametrize(
    "given, error, words",
    [bad for bad in BAD if not {"student_logits", "teacher_logits", "labels", "inplace_gradient"} & set(bad[0])],
)
def test_the_module_refuses_bad_options_when_it_is_made_or_called(given, error, words):
    if "temprature" in given or "xyz" in given:
        words = words.split(".*")[0]
    with pytest.raises(error, match=words):
        EAKDLoss(**given)(Z, Y)


@pytest.mark.parametrize(
    "given, error, words",
    [
        ({"labels": None}, ValueError, "ea_dkd_loss needs labels"),
        ({"labels": LABELS + 1000}, ValueError, "labels"),
        ({"alpha": -1.0}, ValueError, "alpha.*>= 0"),
        ({"beta": "8"}, TypeError, "beta"),
        ({"divergence": "reverse_kl"}, TypeError, "divergence"),
        ({"gamma": 1.0}, TypeError, "gamma"),
    ],
)
def test_dkd_checks_what_is_its_own(given, error, words):
    with pytest.raises(error, match=words):
        ea_dkd_loss(**{"student_logits": Z, "teacher_logits": Y, "labels": LABELS, **given})
    if "labels" not in given:
        with pytest.raises(error, match=words):
            EADKDLoss(**given)


def test_labels_are_checked_in_every_row_kept():
    """A padding of -1 is no label, whether or not cross-entropy is computed."""
    labels = LABELS.clone()
    labels[-1, -1] = -1
    last = tuple(size - 1 for size in ROWS)
    with pytest.raises(ValueError, match=re.escape(f"ignore_index=-100 in every row kept, got -1 in row {last}")):
        ea_kd_loss(Z, Y, labels)
    assert ea_kd_loss(Z, Y, labels, ignore_index=-1).isfinite()
    assert ea_kd_loss(Z, Y, torch.full(ROWS, -100), ce_weight=1.0) == 0


def test_a_bad_temperature_is_shown():
    temperature = torch.ones(ROWS)
    temperature[-1, 0] = -2.0
    with pytest.raises(ValueError, match=re.escape(f"got -2.0 in row ({ROWS[0] - 1}, 0)")):
        ea_kd_loss(Z, Y, temperature=temperature)


def test_bad_input_does_no_work(monkeypatch):
    from eakd_kernels import ops

    monkeypatch.setattr(ops, "one_pass", lambda *arguments: pytest.fail("the kernel ran"))
    with pytest.raises(ValueError):
        ea_kd_loss(Z, Y, reduction="median")
