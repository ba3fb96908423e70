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


def _requirements(base):
    if os.environ.get("EAKD_NO_EXT") == "1":
        return base
    if importlib.util.find_spec("torch") is None:
        for path in {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}:
            if os.path.isdir(os.path.join(path, "torch")):
                sys.path.append(path)
                return base
        if requirement := os.environ.get("EAKD_BUILD_TORCH"):
            return [*base, requirement]
        raise SystemExit(_NO_TORCH)
    return base


def get_requires_for_build_wheel(config_settings=None):
    return _requirements(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _requirements(build_meta.get_requires_for_build_editable(config_settings))


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _requirements([])
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _requirements([])
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
