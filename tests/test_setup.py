"""What an installation is called."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eakd_kernels

ROOT = Path(__file__).parent.parent
CUDA = "cpu" if torch.version.cuda is None else "cu" + torch.version.cuda.replace(".", "")


@pytest.mark.parametrize(
    "environment, suffix",
    [({"EAKD_NO_EXT": "1"}, ""), ({}, rf"\+torch{'.'.join(torch.__version__.split('.')[:2])}\.{CUDA}")],
    ids=["pure", "compiled"],
)
def test_a_wheel_is_named_by_what_it_was_compiled_against(environment, suffix):
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert re.fullmatch(re.escape(eakd_kernels.__version__) + suffix, done.stdout.splitlines()[-1]), done.stderr
