"""README: its Python runs, its tables are those of the code, its figures are those of a committed measurement."""

import inspect
import re
from pathlib import Path

import pytest

from eakd_kernels import available_backends, ea_kd_loss, env

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def between(name):
    return re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", README, re.DOTALL)[1]


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def test_options_table_has_every_option_and_its_default():
    rows = [line.split("|")[1:3] for line in README.splitlines() if line.startswith("| `")]
    listed = {}
    for names, defaults in rows:
        named = re.findall(r"`(\w+)`", names)
        listed |= dict(zip(named, re.findall(r"`([^`]+)`", defaults), strict=False))
    keywords = inspect.signature(ea_kd_loss).parameters.values()
    options = {p.name: p.default for p in keywords if p.kind is p.KEYWORD_ONLY}
    assert {name: eval(listed[name]) for name in options} == options


def test_backends_table():
    for name in available_backends():
        assert re.search(rf"^\| `.*{name}.*` \|", README, re.MULTILINE)


def test_variables_table():
    rows = [f"| `{v.name}` | {v.read} | {v.meaning} |\n" for v in env.VARIABLES]
    table = "".join(["| variable | read at | |\n", "| --- | --- | --- |\n", *rows])
    assert between("variables") == table, f"paste:\n{table}"
