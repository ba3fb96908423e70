"""The option list is written once, and help() shows it everywhere."""

import dataclasses
import inspect
import pickle

import pytest

import eakd_kernels
from eakd_kernels import (
    EADKDLoss,
    EAKDLoss,
    TopKEAKDLoss,
    distill_stats,
    ea_dkd_loss,
    ea_kd_loss,
    ea_weights,
    teacher_topk,
    topk_ea_kd_loss,
)
from eakd_kernels.functional import Options
from eakd_kernels.options import keyword_names


def keywords(function):
    return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def test_every_signature_comes_from_the_one_list():
    listed = keywords(ea_kd_loss)
    assert keywords(EAKDLoss) == listed
    assert {f.name: f.default for f in dataclasses.fields(Options)} == listed
    absent = {"reduction", "num_items", "return_stats", "inplace_gradient"}
    assert keywords(distill_stats) == {name: value for name, value in listed.items() if name not in absent}
    assert keywords(ea_weights).items() <= listed.items()


def test_public_names():
    """design, section 4: names and defaults that callers rely on."""
    assert set(eakd_kernels.__all__) >= {
        *("ea_kd_loss", "distill_stats", "ea_weights", "EAKDLoss", "divergences", "weighting", "RowStats"),
        *("ea_dkd_loss", "EADKDLoss", "available_backends"),
        *("topk_ea_kd_loss", "teacher_topk", "TopKEAKDLoss"),
    }
    assert keywords(ea_kd_loss) == {
        **{"temperature": 1.0, "entropy_temperature": 3.0, "weighting": "ea", "entropy_bound": None},
        **{"detach_weights": True, "weight_norm": "none", "divergence": "forward_kl"},
        **{"scale_by_temperature_squared": True, "standardize": False, "teacher_class_weights": None},
        **{"student_logit_scale": 1.0, "teacher_logit_scale": 1.0, "student_softcap": None, "teacher_softcap": None},
        **{"kd_weight": 1.0, "ce_weight": 0.0, "mask": None, "ignore_index": -100, "reduction": "mean"},
        **{"num_items": None, "vocab_size": None, "process_group": None, "inplace_gradient": False},
        **{"return_stats": False, "backend": "auto"},
    }
    decoupled = {"alpha": 1.0, "beta": 8.0, **keywords(ea_kd_loss), "temperature": 4.0}
    del decoupled["divergence"]
    assert keywords(ea_dkd_loss) == decoupled
    sparse = {"teacher_entropy": None, "tail": "bucket", "teacher_temperature": 1.0}
    assert keywords(topk_ea_kd_loss) == keywords(TopKEAKDLoss) == sparse | keywords(ea_kd_loss)
    assert keywords(teacher_topk) == {"temperature": 1.0, "entropy_temperature": 3.0, "process_group": None}


DOCUMENTED = [ea_kd_loss, ea_dkd_loss, distill_stats, ea_weights, topk_ea_kd_loss, teacher_topk]


@pytest.mark.parametrize("function", [*DOCUMENTED, EAKDLoss, EADKDLoss, TopKEAKDLoss])
def test_docstrings_are_there(function):
    assert len(inspect.getdoc(function)) > 200


def test_every_option_is_documented():
    documented = inspect.getdoc(ea_kd_loss)
    for name in keyword_names(ea_kd_loss):
        assert f"{name}:" in documented or f"{name}, " in documented or f", {name}:" in documented, name


def test_options_of_functions_are_keywords():
    with pytest.raises(
        TypeError, match=r"^ea_dkd_loss\(\) takes.*as ea_dkd_loss\(\.\.\., temperature=4\.0\), got float 2\.0"
    ):
        ea_dkd_loss(None, None, None, 2.0)


def test_options_are_frozen():
    options = Options(temperature=2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.temperature = 3.0
    assert pickle.loads(pickle.dumps(options)) == options
