"""What mkdocs builds beside Markdown files: text out of the code and its measurements, and formulas as MathML."""

import html
import inspect
import re
import sys
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks are no part of the installed package

import eakd_kernels  # noqa: E402
from benchmarks import linear, report  # noqa: E402
from benchmarks.rivals import table as beside  # noqa: E402
from benchmarks.rivals import training_table  # noqa: E402

TAKE_OPTIONS = ("ea_dkd_loss", "distill_stats", "ea_weights", "fused_linear_ea_kd_loss", "topk_ea_kd_loss")


def on_files(files, config):
    contributing = (ROOT / "CONTRIBUTING.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "contributing.md", content=contributing))
    return files


def on_page_markdown(markdown, **_):
    """Lines such as <!-- generated: options --> become what the function of that name returns."""
    return re.sub(r"<!-- generated: (\w+) -->", lambda comment: GENERATED[comment[1]](), markdown)


def on_page_content(content, **_):
    """What pymdownx.arithmatex has found becomes MathML, which browsers show without a script."""
    content = re.sub(r'(?s)(?<=class="arithmatex">)\\\((.*?)\\\)(?=<)', _mathml("inline"), content)
    return re.sub(r'(?s)(?<=class="arithmatex">)\\\[(.*?)\\\](?=<)', _mathml("block"), content)


def _mathml(display):
    def render(tex):
        spaced = re.sub(r"\\(log|ln)(?![a-z_^])\s*", r"\\\1\\,", html.unescape(tex[1]))  # the converter sets none
        return convert(spaced, display=display)

    return render


def options() -> str:
    """Every keyword of ea_kd_loss: type and default from its signature, meaning from its docstring."""
    keywords, sections = _keywords(eakd_kernels.ea_kd_loss), []
    for names, meaning in _documented(eakd_kernels.ea_kd_loss):
        if keywords.keys() >= set(names):
            declared = re.sub(r"([a-z]\w*\.)+(?=[A-Z])", "", "\n".join(str(keywords.pop(name)) for name in names))
            sections.append(f"### {', '.join(names)}\n\n```py\n{declared}\n```\n\n{meaning}\n")
    if keywords:
        raise ValueError(f"the docstring of ea_kd_loss does not document {', '.join(keywords)}")
    return "\n".join(sections)


def functions() -> str:
    """How the other functions' keywords differ from those of ea_kd_loss."""
    common = _keywords(eakd_kernels.ea_kd_loss)
    lines = ["| function | takes | its own |", "| --- | --- | --- |"]
    for name in TAKE_OPTIONS:
        keywords = _keywords(getattr(eakd_kernels, name))
        shared, missing = common.keys() & keywords.keys(), common.keys() - keywords.keys()
        few = shared if len(shared) < len(missing) else missing
        taken = _listed(option for option in common if option in few)
        taken = f"only {taken}" if few is shared else f"all but {taken}" if few else "all"
        changed = [f"{option}={keywords[option].default}" for option in shared if common[option] != keywords[option]]
        own = [f"{option}={p.default!r}" for option, p in keywords.items() if option not in common]
        lines.append(f"| `{name}` | {taken}{f'; {_listed(changed)}' if changed else ''} | {_listed(own)} |")
    return "\n".join(lines)


def _keywords(function) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def _documented(function) -> list[tuple[list[str], str]]:
    """(names, meaning) of every entry below Args."""
    arguments = re.search(r"\nArgs:\n(.*?)\n\n", inspect.getdoc(function), re.DOTALL)[1]
    entries = re.split(r"(?m)^    (?=\w)", arguments)[1:]
    parts = (entry.partition(": ") for entry in entries)
    return [(names.split(", "), _linked(" ".join(meaning.split()))) for names, _, meaning in parts]


def _linked(text: str) -> str:
    return re.sub(r"docs/(\w+)\.md", r"[\1](\1.md)", text)


def _listed(names) -> str:
    return ", ".join(f"`{name}`" for name in names)


def measured() -> str:
    return _tables(report.RESULTS)


def methods_measured() -> str:
    return _tables(report.RESULTS / "methods")


def linear_measured() -> str:
    return _tables(report.RESULTS / "linear", linear.table)


def rivals_called() -> str:
    """What of which package is called."""
    return beside.described()


def rivals_measured() -> str:
    return _tables(report.RESULTS / "rivals", beside.for_docs)


def rivals_trained() -> str:
    return _tables(report.RESULTS / "training", training_table.for_docs)


def _tables(folder: Path, table=report.for_docs) -> str:
    tables = "\n\n".join(table(report.load(path)) for path in report.latest(folder))
    return f'<div class="measured" markdown>\n{tables}\n</div>'


GENERATED = {
    f.__name__: f
    for f in (
        options,
        functions,
        measured,
        methods_measured,
        linear_measured,
        rivals_called,
        rivals_measured,
        rivals_trained,
    )
}
