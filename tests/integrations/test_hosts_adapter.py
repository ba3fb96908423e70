"""Hosts that are missing or have changed are refused, and the settings that adapters add."""

import subprocess
import sys
import types

import pytest
import torch

from eakd_kernels import EAKDLoss
from eakd_kernels.integrations import hosts


def theirs(logits, labels=None, *, reduction="mean"):
    pass


def host(function):
    module = types.ModuleType("trl.made_up")
    module.loss = function
    return module


def test_the_same_signature_is_accepted():
    def ours(logits: torch.Tensor, labels: object = None, *, reduction: str = "mean") -> None:
        pass

    hosts.expect(host(theirs), "loss", ours, "trl")


@pytest.mark.parametrize(
    "changed",
    [
        lambda logits, labels=None, reduction="mean": None,
        lambda logits, labels=None, *, reduction="sum": None,
        lambda logits, target=None, *, reduction="mean": None,
        lambda logits, labels=None, *, reduction="mean", count=None: None,
        lambda *args, **kwargs: None,
    ],
)
def test_another_signature_is_refused(changed):
    with pytest.raises(RuntimeError) as raised:
        hosts.expect(host(changed), "loss", theirs, "trl")
    assert "trl.made_up of trl" in str(raised.value)
    assert "needs loss(logits, labels=None, *, reduction='mean')" in str(raised.value)
    assert f"written for trl {hosts.WRITTEN_FOR['trl']}" in str(raised.value)


def test_a_function_that_is_gone():
    with pytest.raises(RuntimeError, match="has no function loss"):
        hosts.expect(types.ModuleType("trl.made_up"), "loss", theirs, "trl")


def test_the_version_found_is_named(monkeypatch):
    monkeypatch.setattr(hosts.metadata, "version", lambda distribution: "9.9.1")
    with pytest.raises(RuntimeError, match=r"of trl 9\.9\.1 has no function"):
        hosts.expect(types.ModuleType("trl.made_up"), "loss", theirs, "trl")


def test_a_version_that_nobody_knows(monkeypatch):
    def absent(distribution):
        raise hosts.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(hosts.metadata, "version", absent)
    with pytest.raises(RuntimeError, match="of an unknown version"):
        hosts.expect(types.ModuleType("trl.made_up"), "loss", theirs, "trl")


@pytest.mark.parametrize(
    "module, distribution",
    [
        ("transformers", "transformers"),
        ("trl.experimental.gkd", "trl"),
        ("modelopt.torch.distill.losses", "nvidia-modelopt"),
        ("torchdistill.losses.registry", "torchdistill"),
    ],
)
def test_a_missing_host_says_what_to_install(module, distribution, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module} cannot be imported.*pip install "{distribution}=='):
        hosts.load(module, distribution)


def test_adapters_import_no_host():
    """In a fresh process: all but torchdistill's, whose import is what registers."""
    names = ("transformers", "trl", "modelopt", "recipes", "mdistiller", "hosts")
    imports = "; ".join(f"import eakd_kernels.integrations.{name}" for name in names)
    check = "print([n for n in sys.modules if n.split('.')[0] in ('transformers', 'trl', 'modelopt', 'torchdistill')])"
    done = subprocess.run([sys.executable, "-c", f"import sys; {imports}; {check}"], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "given, shown",
    [
        ({}, "entropy_temperature=1.0, weight_norm='bound'"),
        ({"weighting": "none"}, "entropy_temperature=1.0, weight_norm='none', weighting='none'"),
        ({"weighting": torch.ones(3)}, "entropy_temperature=1.0, weight_norm='bound', weighting=<(3,)>"),
        ({"entropy_temperature": 3.0}, "entropy_temperature=3.0, weight_norm='bound'"),
    ],
)
def test_settings(given, shown):
    assert repr(hosts.loss_module(EAKDLoss, "made_up()", given)).startswith(f"EAKDLoss({shown}")


def test_settings_that_the_host_decides():
    with pytest.raises(TypeError, match=r"^made_up\(\): mask is for the host to decide, got mask=3; leave it out$"):
        hosts.loss_module(EAKDLoss, "made_up()", {"mask": 3}, ("mask",))
    with pytest.raises(TypeError, match=r"beta is for the host to decide, got beta=3; set Config\(beta=\.\.\.\)$"):
        hosts.loss_module(EAKDLoss, "made_up()", {"beta": 3}, ("mask",), {"beta": "Config(beta=...)"})


def test_a_wrong_name_is_told_of_what_was_called():
    with pytest.raises(
        TypeError, match=r"^made_up\(\) got an unknown keyword 'reductoin'; did you mean 'reduction'\?$"
    ):
        hosts.loss_module(EAKDLoss, "made_up()", {"reductoin": 3}, ("mask",))
    with pytest.raises(TypeError) as raised:  # what the host decides is no suggestion
        hosts.loss_module(EAKDLoss, "made_up()", {"masks": 3}, ("mask",))
    assert "'mask'" not in str(raised.value) and " mask," not in str(raised.value)


@pytest.mark.parametrize("count, divisor", [(7, 7), (0, 1), (torch.tensor(7), 7), (torch.tensor(0), 1)])
def test_a_window_without_labels_divides_by_one(count, divisor):
    assert hosts.items(count) == divisor
    assert hosts.items(None) is None
