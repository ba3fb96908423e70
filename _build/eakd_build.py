"""PEP 517 backend: setuptools, compiling against the torch that is already installed.

pip builds in an isolated environment that hides the installed torch, and a build requirement on torch would download
another one (several GB) and compile against that. The isolated build runs the same interpreter, so sysconfig still
points at the real site-packages: we append it to sys.path.
"""

import importlib.util
import os
import sys
import sysconfig

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)

_NO_TORCH = """
eakd_kernels compiles against the torch that is already installed, and none was found in this environment.
  - install torch first, e.g.  pip install torch --index-url https://download.pytorch.org/whl/cpu
  - or install without kernels:  EAKD_NO_EXT=1 pip install .
  - or, where the build runs in an environment of its own (uv, python -m build), name the torch that will be used:
    EAKD_BUILD_TORCH="torch==2.13.0"
"""


def _find_torch() -> bool:
    if importlib.util.find_spec("torch") is not None:
        return True
    for path in {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}:
        if os.path.isdir(os.path.join(path, "torch")):
            sys.path.append(path)
            return True
    return False


# When the backend is imported: every hook runs setup.py, which imports torch.
_NEEDED = os.environ.get("EAKD_NO_EXT") != "1"
_FOUND = _NEEDED and _find_torch()


def _torch_requirement() -> list[str]:
    """Called before setup.py runs, so that what is missing is said in our words."""
    if _FOUND or not _NEEDED:
        return []
    if requirement := os.environ.get("EAKD_BUILD_TORCH"):
        return [requirement]
    raise SystemExit(_NO_TORCH)


def get_requires_for_build_sdist(config_settings=None):
    """Nothing: what setuptools would do to find out needs torch."""
    return []


def get_requires_for_build_wheel(config_settings=None):
    torch = _torch_requirement()
    return torch or build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings=None):
    torch = _torch_requirement()
    return torch or build_meta.get_requires_for_build_editable(config_settings)
