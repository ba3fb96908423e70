"""Measurements as tables, goals and README, of numbers known beforehand and of the files in benchmarks/results."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")  # `make gpu` collects this file on machines that may have none

from benchmarks import measure, plot, report
from benchmarks.cases import Case, Goal, cases

README = Path(__file__).parents[1] / "README.md"
TINY = Case("CIFAR-100", 100, 4, "fp32")
ON_GPU = cases(full=True, device="cuda")
MAIN = next(case for case in ON_GPU if case.operation == "gradient")


def a_row(case, provider, **columns):
    """As `measure` writes it."""
    where = {"machine": "H1", "capability": "sm_90", "threads": "", "driver": "1", "cuda": "13", "triton": "3"}
    where |= {"torch": "2.11.0", "eakd_kernels": "0", "date": "2026-01-01", "rounds": "15"}
    described = {field: str(value) for field, value in vars(case).items()} | {"clock": case.clock}
    return {**where, **described, "provider": provider, **dict.fromkeys(measure.COLUMNS, ""), **columns}


def verdicts(rows):
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.goals(rows).splitlines()[2:]]
    return {line[2]: line[-1] for line in lines}


@pytest.mark.parametrize(("ratio", "verdict"), [(8.0, "goal met"), (6.0, "pass"), (5.9, "MISS")])
def test_goals_are_met_passed_or_missed(ratio, verdict, monkeypatch):
    monkeypatch.setattr(report, "GOALS", [Goal(TINY, "x_eager", at_least=6, goal=8)])
    assert verdicts([a_row(TINY, "eakd cpu", ms="1", x_eager=str(ratio))]) == {"x eager": verdict}


def test_goals_of_a_gpu_name_what_kept_them_from_being_measured():
    ours = {"ms": "3", "x_compile": "3.5", "x_eager": "11", "percent_of_copy": "60", "percent_at_5_streams": "86"}
    rows = [
        a_row(MAIN, "eager", ms="33"),
        a_row(MAIN, "eakd triton", **ours),
        a_row(MAIN, "eakd cuda", left_out="no such kernels"),
        a_row(MAIN, "liger kl", left_out="wrong: loss 2, in fp64 1"),
        a_row(MAIN, "trl", left_out="not importable: No module named 'datasets'"),
    ]
    assert verdicts(rows) == {
        "x compile": "goal met",
        "x eager": "MISS",
        "x liger kl": "not measured (wrong: loss 2, in fp64 1)",
        "x trl": "not measured (not importable: No module named 'datasets')",
        "triton: % of copy at 5 streams": "goal met",
        "cuda: % of copy at 3 streams": "not measured (no such kernels)",
    }
    assert report.goals([a_row(replace(MAIN, rows=64), "eakd triton", **ours)]) == ""  # no goal is for so few rows


def test_the_summary_is_of_this_package_and_says_what_others_compute():
    images = next(case for case in ON_GPU if case.clock == "wall")
    rows = [
        a_row(MAIN, "liger kl", ms="9", formula="KL", version="0.8.5"),
        a_row(MAIN, "liger kl in bf16", ms="6", formula="KL", version="0.8.5", gradient_error="0.023"),
        a_row(MAIN, "eakd triton", ms="2.5", x_liger_kl="3.6", percent_of_copy="51.2", percent_at_5_streams="85.4"),
        a_row(images, "eakd triton", ms="0.05"),
        a_row(MAIN, "eakd cuda", left_out="no such kernels"),
    ]
    text = report.summary(rows)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[0][3:] == ["backend", "ms", "% of copy", "at 5", "x liger kl"]
    assert [line[3:] for line in lines[2:]] == [
        ["triton", "2.50", "51.2 at 3", "85.4", "3.60"],
        ["triton", "0.0500 *", "", "", ""],
    ]
    assert "* What the caller waits for" in text and "\nliger kl (0.8.5): the plain KL" in text
    assert "off by up to 2.3 % of" in text


def test_the_table_goes_between_the_markers():
    begin, end = report.markers("cpu")
    readme = f"above\n{begin}\nold\n{end}\nbelow\n"
    assert report.insert("new", readme) == readme.replace("old", "new")
    with pytest.raises(ValueError, match="benchmark:begin"):
        report.insert("new", "no markers")


def test_a_gpus_table_goes_below_the_cpus(monkeypatch, tmp_path):
    quartiles = {f"{column}_{q}": "2.5" for column in ("ms", "x_eager") for q in ("q1", "q3")}
    rows = [a_row(MAIN, "eakd triton", ms="2.5", x_eager="2.5", percent_of_copy="51.2", **quartiles)]
    readme, results = tmp_path / "README.md", tmp_path / "results"
    begin, end = report.markers("cpu")
    readme.write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    files = [*report.RESULTS.glob("*.csv"), report.save(rows, results)]
    cpu = next(path for path in files if report.device(report.load(path)) == "cpu")
    monkeypatch.setattr("sys.argv", ["report", str(cpu), str(files[-1]), "--readme", str(readme)])
    for _ in range(2):  # the second time between the markers that the first has made
        report.main()
        gpu_begin, gpu_end = report.markers("cuda")
        assert readme.read_text() == (
            f"above\n{begin}\n{report.for_readme(report.load(cpu))}\n{end}\n\n"
            f"{gpu_begin}\n{report.for_readme(rows)}\n{gpu_end}\nbelow\n"
        )
        pictures = re.findall(r"\]\((.*?)\)", readme.read_text())
        assert len(pictures) == 2 and all((tmp_path / path).is_file() for path in pictures)


def test_the_latest_file_of_each_device_is_chosen(tmp_path):
    for machine in ("H1", "H2"):
        for date in ("2026-01-02", "2026-01-01"):
            case = MAIN if machine == "H1" else TINY
            report.save([{**a_row(case, "copy"), "machine": machine, "date": date}], tmp_path)
    names = {path.name for path in report.latest(tmp_path)}
    assert names == {"h1-torch2.11.0-2026-01-02.csv", "h2-torch2.11.0-2026-01-02.csv"}


def shown(readme, device):
    begin, end = report.markers(device)
    return readme.partition(begin)[2].partition(end)[0]


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory):
    """What `make plots` would write: README, and the folder of pictures."""
    folder = tmp_path_factory.mktemp("regenerated")
    (folder / "README.md").write_text(README.read_text())
    report.publish(report.newest(), folder / "README.md")
    return folder / "README.md", folder / "docs" / "plots"


def test_readme_shows_the_newest_results(regenerated):
    """`make plots` makes it so."""
    assert regenerated[0].read_text() == README.read_text()
    assert shown(README.read_text(), "cpu").strip()


def test_the_pictures_are_of_the_newest_results(regenerated):
    """`make plots` makes them so."""
    drawn = {path.name: path for path in regenerated[1].iterdir()}
    assert {path.name for path in report.PLOTS.iterdir()} == set(drawn)
    for name, path in drawn.items():
        assert_same_picture((report.PLOTS / name).read_text(), path.read_text())


def test_another_figure_is_another_picture(tmp_path):
    (path,) = (path for path in report.latest(report.RESULTS) if report.device(report.load(path)) == "cpu")
    rows = report.load(path)
    row = next(row for row in rows if row["provider"] == "eakd cpu" and row["dtype"] == "bf16")
    before = {path.name: path.read_text() for path in plot.draw([rows], tmp_path)}
    assert set(before) == {"overview-cpu.svg", "time-cpu.svg", "ratios-cpu.svg"}
    row["ms"], row["x_eager"] = str(float(row["ms"]) * 1.1), str(float(row["x_eager"]) / 1.1)
    for path in plot.draw([rows], tmp_path):
        with pytest.raises(AssertionError):
            assert_same_picture(before[path.name], path.read_text())


def assert_same_picture(svg, other):
    """Words, and where the marks of measurements are, to a tenth of a pixel.

    Not bytes: between its versions, matplotlib rounds, orders and names what is in a file differently.
    """
    (words, marks), (other_words, other_marks) = contents(svg), contents(other)
    assert words == other_words
    assert marks.keys() == other_marks.keys()
    for name, numbers in marks.items():
        assert numbers == pytest.approx(other_marks[name], abs=0.1), name


def contents(svg):
    """Words in alphabetical order, and the coordinates of what has a measurement's name."""
    elements = list(ElementTree.fromstring(svg).iter())
    words = sorted("".join(element.itertext()) for element in elements if element.tag.endswith("}text"))
    marks = {}
    for element in elements:
        if ": " in (name := element.get("id", "")):
            paths = [path.get("d", "") for path in element.iter() if path.tag.endswith("}path")]
            places = [use.get(axis, "") for use in element.iter() for axis in "xy" if use.tag.endswith("}use")]
            marks[name] = [float(number) for number in re.findall(r"-?[\d.]+", " ".join((*paths, *places)))]
    return words, marks


def test_what_a_file_has_nothing_of_is_not_drawn(tmp_path):
    rows = [a_row(replace(MAIN, operation="statistics"), "eakd triton", ms="1")]
    assert plot.draw([rows], tmp_path) == []
