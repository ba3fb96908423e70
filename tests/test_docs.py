"""README, CONTRIBUTING and docs/: their Python runs, their links lead somewhere, their tables are those of the code.

A block of ```python runs by itself; one of ```py needs names that it does not define.
"""

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

from eakd_kernels import available_backends, env

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
# test_methods_recipes.py runs the one on every backend, cache/test_cache_command.py the other on a teacher's cache.
RUN_ELSEWHERE = ("docs/methods.md", "docs/cache.md")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(*languages):
    return [
        pytest.param(page, block, id=f"{page} {i}")
        for page, text in PAGES.items()
        for i, (language, block) in enumerate(FENCED.findall(text))
        if language in languages
    ]


@pytest.mark.parametrize("page, block", blocks("python", "py"))
def test_python_compiles(page, block):
    ast.parse(block, page)


@pytest.mark.parametrize("page, block", [b for b in blocks("python") if b.values[0] not in RUN_ELSEWHERE])
def test_python_runs(page, block):
    exec(compile(block, page, "exec"), {})


def prose(text):
    """Without blocks and code."""
    return re.sub(r"`[^`\n]+`", "", FENCED.sub("", text))


def anchors(text):
    """Of headings, as GitHub and Python-Markdown name them, and of mkdocstrings' entries."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page]))
    for target in targets:
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
        assert there.is_file(), target
        assert not anchor or anchor in anchors(there.read_text()), target


@pytest.mark.parametrize("page", PAGES)
def test_blank_lines_before_lists_tables_and_formulas(page):
    """Python-Markdown takes them for a part of the paragraph above, where GitHub does not."""
    lines = FENCED.sub("```", PAGES[page]).splitlines()
    for above, line in pairwise(lines):
        for begins, continues in ((r"- |\d+\. ", r"- |\d+\. | "), (r"\|", r"\|"), (r"\$\$", r"#")):
            if re.match(begins, line) and above.strip() and not re.match(rf"{continues}|#|```|<!--", above):
                pytest.fail(f"no blank line between {above!r} and {line!r}")


def test_backends_table():
    for name in available_backends():
        assert re.search(rf"^\| `{name}` \|", PAGES["docs/install.md"], re.MULTILINE)


def test_variables_table():
    rows = [f"| `{v.name}` | {v.read} | {v.meaning} |\n" for v in env.VARIABLES]
    table = "".join(["| variable | read at | |\n", "| --- | --- | --- |\n", *rows])
    assert f"<!-- variables:begin -->\n{table}<!-- variables:end -->" in PAGES["docs/install.md"], f"paste:\n{table}"
