"""What an installation is called."""

import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

import eakd_kernels

ROOT = Path(__file__).parent.parent
CUDA = "cpu" if torch.version.cuda is None else "cu" + torch.version.cuda.replace(".", "")


def ask(*command):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_version_is_the_same_everywhere():
    """A version that told of torch would make pip refuse what it built from a source distribution."""
    assert ask("setup.py", "--version").split()[-1] == eakd_kernels.__version__


def files():
    """Of the package, but for what is compiled."""
    made = {".so", ".pyc"}
    return [path for path in (ROOT / "eakd_kernels").rglob("*") if path.is_file() and path.suffix not in made]


def test_every_package_and_its_files_are_installed():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for file in files():
        package = ".".join(file.parent.relative_to(ROOT).parts)
        patterns = ["*.py", *setup["package-data"].get(package, [])]
        assert package in setup["packages"] and any(fnmatch(file.name, pattern) for pattern in patterns), file


def test_a_compiled_wheel_is_named_by_torch_and_cuda():
    script = (
        "import setuptools, sys; setuptools.setup = lambda **given: print(given['options']['bdist_wheel']);"
        "sys.argv = ['setup.py', 'bdist_wheel']; exec(open('setup.py').read())"
    )
    minor = ".".join(torch.__version__.split(".")[:2])
    assert f"'build_number': '1torch{minor}{CUDA}'" in ask("-c", script)
