"""A record's page, up to where a browser reads it."""

import base64
import hashlib
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from token_pages import HOSTILE, data_in, json_in
from training_records import cells_of, hostile_record, odd_records, random_batch, random_stats, record_of, stats_of

from eakd_kernels.report import TrainingRecord
from eakd_kernels.report.charts import round_ticks
from eakd_kernels.report.markup import element, inline, to_html, visible
from eakd_kernels.report.training_view import view_of
from eakd_kernels.report.training_words import figure, percent

SVG_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


class Page(HTMLParser):
    """Tags in their order, with attributes; text outside of scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.found, self.text, self._silent = [], [], False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self._silent = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._silent = False

    def handle_data(self, data):
        if not self._silent:
            self.text.append(data)


# Safety


def test_nothing_is_fetched():
    html = hostile_record().render()
    linked = [
        (tag, given[name]) for tag, given in Page(html).found for name in ("src", "href", "srcset") if name in given
    ]
    assert linked == [("link", "data:,")]
    assert not re.search(r"@import|url\(", html)


def test_hostile_text_is_only_text():
    titles = {"title": "</title><script>1</script>", "introduction": "<img src=x onerror=1>"}
    hostile, harmless = hostile_record().render(**titles), hostile_record(str).render()
    assert [found for found in Page(hostile).found if found[0] != "th"] == [
        found for found in Page(harmless).found if found[0] != "th"
    ]
    assert not set("<>&").intersection(json_in(hostile))
    text = "".join(Page(hostile).text)
    for token in (*HOSTILE, *titles.values()):
        assert (visible(token) if token in HOSTILE else token) in text, token
    hostile.encode("utf-8")


def test_only_its_own_script_and_style_may_run():
    html = record_of(range(2)).render()
    found = Page(html).found
    (policy,) = (given["content"] for _, given in found if given.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for source in re.search(r"<style>(.*?)</style>.*<script type=\"module\">(.*?)</script>", html, re.DOTALL).groups():
        assert base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() in policy
    assert not [given for _, given in found if "style" in given or any(name.startswith("on") for name in given)]


def test_markup():
    assert to_html(element("p", {"title": '"<&'}, "a<b", element("i", {}, "&"), "c")) == (
        '<p title="&quot;<&amp;">a&lt;b<i>&amp;</i>c</p>'
    )


@pytest.mark.parametrize(
    "text, alone, among",
    [
        (" a", "␣a", " a"),
        ("\n\t", "↵⇥", "↵⇥"),
        ("", "∅", ""),
        ("\x00\x7f\x85", "␀␡U+0085", "␀␡U+0085"),
        ("\u202e\u200d", "U+202EU+200D", "U+202E\u200d"),
        ("\u2028\ud800", "U+2028U+D800", "U+2028U+D800"),
        ("\u00a0é", "U+00A0é", "\u00a0é"),
    ],
)
def test_signs(text, alone, among):
    assert (visible(text), inline(text)) == (alone, among)


# Numbers


def test_the_table_has_the_quantiles_of_the_last_step():
    record = record_of(range(3))
    head, *rows = cells_of(record.render(), 0)
    assert head == ["", "5 %", "25 %", "median", "75 %", "95 %", "not finite"]
    for i, row in enumerate(rows):
        found = [float(text) for text in row[1:6]]
        assert found == pytest.approx(view_of(record).bands[-1][i], abs=5e-3, rel=5e-3)
        assert row[6] == "0"
    record.add(stats_of([math.nan, 1.0], [math.inf, math.nan], [1.0, 1.0], [1.0, 1.0]), step=2)
    assert [row[6] for row in cells_of(record.render(), 0)[1:]] == ["1", "2", "0", "0"]


def test_the_slider_can_read_every_step():
    record = record_of(range(0, 300, 3))
    data = data_in(record.render())
    assert len(data["readings"]) == len(data["places"]) == len(record.steps.cells()) == 100
    assert data["readings"][7]["label"] == "Step 21" and data["places"] == sorted(data["places"])
    assert data_in(record_of(range(200)).render())["readings"][0]["label"] == "Steps 0 to 1"


def test_the_table_of_tenths():
    """100 rows in bins of their own, whose divergence is their rank."""
    entropies = 0.01 * 1.05 ** torch.arange(100.0)
    record = TrainingRecord()
    record.add(stats_of(entropies, entropies, torch.ones(100), torch.arange(100.0)), step=0)
    html = record.render()
    head, *rows = cells_of(html, 1)
    assert head == ["tenth", "HT, nats", "D", "w D"] and len(rows) == 10
    shares = [percent(sum(range(10 * i, 10 * i + 10)) / 4950) for i in range(10)]
    assert [row[2] for row in rows] == [row[3] for row in rows] == shares
    assert rows[0][1].startswith("0.01 to") and rows[-1][1].endswith(f"{entropies[-1]:.2f}")
    assert f"The tenth with the highest teacher entropy has {shares[-1]} of D" in html


def test_the_gradient_is_shown_where_it_is_known():
    (stats, ids, labels), keywords = random_batch(0)
    record = TrainingRecord()
    record.add(stats, ids, labels, step=0)
    assert "no gradient_norms were passed" in record.render()
    record.add(stats, ids, labels, **keywords)
    assert "no gradient_norms were passed" not in record.render()
    assert cells_of(record.render(), 1)[0] == ["tenth", "HT, nats", "D", "w D", "gradient norm"]


def test_rows_that_are_not_finite_are_named():
    record = record_of(range(4))
    nan = torch.tensor([math.nan, 1.0])
    record.add(stats_of(torch.ones(2), nan, nan, torch.tensor([math.inf, 1.0])), step=2)
    record.add(stats_of([1.0], [1.0], [1.0], [1.0]), step=3, gradient_norms=torch.tensor([math.inf]))
    html = "".join(Page(record.render()).text)
    for said in (
        "Student's entropy HS: NaN in 1 row, first at step 2",
        "Weight w: NaN in 1 row, first at step 2",
        "Divergence D: infinite in 1 row, first at step 2",
        "Gradient norm: NaN or infinite in 1 row",
        "Not finite, earliest first",
    ):
        assert said in html
    assert "not finite, one by one" not in record_of(range(4)).render()


def test_tokens_are_decoded():
    words = [f" word{i}" for i in range(50)]
    html = record_of(range(3), decode=words.__getitem__, keep=2, context=3).render()
    record = record_of(range(3), keep=2, context=3)
    heaviest = record.phases.cells()[-1].samples.found["heaviest"][0]
    shown = re.search(r'<span class="context">(.*?)</span><span class="token w-\d+">(.*?)</span>', html).groups()
    before = "".join(words[i] for i in heaviest.context)
    assert shown == (before.removeprefix(" "), words[heaviest.token].replace(" ", "␣"))
    assert f">#{heaviest.token}<" in record.render().replace("␣", "")


def test_early_and_late():
    """Of 100 steps, phases of 8: the first two have a tenth of the rows, and so has the last but one with the last."""
    html = record_of(range(100)).render()
    assert re.findall(r"<h3>(\w+, steps [\d to]+)</h3>", html)[:2] == ["Early, steps 0 to 15", "Late, steps 88 to 99"]
    assert len(paths(html, "early")[0]) == len(paths(html, "late")[0]) == 4
    alone = record_of([5]).render()
    assert "<h2>In all</h2>" in alone and paths(alone, "early")[0] == []


def test_a_part_has_a_tenth_of_the_rows():
    record = TrainingRecord()
    for step, rows in enumerate((50, 50, 50, 5)):
        record.add(random_stats(rows), step=step)
    found = [(part.name, part.steps) for part in view_of(record).parts]
    assert found == [("Early", "step 0"), ("Late", "steps 2 to 3")]


# Charts, of 1000 x 1000 units, y downwards


def paths(html, kind):
    """For each path of this class, its commands and numbers."""
    drawn = [given["d"] for tag, given in Page(html).found if tag == "path" and given["class"].split()[0] == kind]
    return [re.sub(r"-?[\d.e-]+", "#", path) for path in drawn], [
        [float(number) for number in SVG_NUMBER.findall(path)] for path in drawn
    ]


def test_bands_are_where_the_quantiles_are():
    """w of step 0 is 0.25 up to 0.5; of step 10, 1."""
    record = TrainingRecord(bound=10.0)
    for step, low, high in ((0, 0.25, 0.5), (10, 1.0, 1.0)):
        record.add(stats_of([5.0, 10.0], [2.5, 2.5], [low, high], [-1.0, 4.0]), step=step)
    html = record.render()
    shapes, medians = paths(html, "median")
    assert shapes == ["M#,#L#,#"] * 4
    expected = [0, 500, 1000, 500], [0, 750, 1000, 750], [0, 750, 1000, 0], [0, 1000, 1000, 1000]
    assert medians == [pytest.approx(each, abs=4) for each in expected]  # in the middle of bins; -1 counts as 0
    assert paths(html, "outer")[1][2] == pytest.approx([0, 500, 1000, 0, 1000, 0, 0, 750], abs=4)
    assert paths(html, "bound")[1][:2] == [[0, 0, 1000, 0]] * 2
    record = TrainingRecord(bound=100.0)
    values = torch.arange(1.0, 101)
    record.add(stats_of(values, values, values, values), step=0)
    for kind, (low, high) in {"outer": (5, 95), "inner": (25, 75)}.items():
        top, bottom = 1000 - 10 * high, 1000 - 10 * low
        wanted = [0, top, 1000, top, 1000, bottom, 0, bottom]
        assert paths(record.render(), kind)[1][0] == pytest.approx(wanted, abs=8)


def test_an_axis_begins_below_0_where_values_do():
    record = TrainingRecord()
    record.add(stats_of([1.0], [1.0], [-1.0], [4.0]), step=0)
    record.add(stats_of([1.0], [1.0], [3.0], [-1e-7]), step=1)
    html = record.render()
    axes = re.findall(r'<div class="y at"[^>]*>(.*?)</div>', html)
    assert axes[2].endswith("<span>-1</span>") and axes[3].endswith("<span>0</span>")
    assert paths(html, "median")[1][2] == [0, 1000, 1000, 0]


def test_bars_are_as_high_as_their_shares():
    record = TrainingRecord()
    record.add(stats_of([1.0] * 4, [1.0] * 4, [0.06, 0.06, 0.06, 0.99], [1.0] * 4), step=0)
    shapes, bars = paths(record.render(), "late")
    assert shapes[2] == 2 * "M#,#v#h#V#Z"
    assert bars[2] == pytest.approx([51.5, 1000, -1000, 22, 1000, 976.5, 1000, -1000 / 3, 22, 1000], rel=1e-4)


def test_squares_are_where_the_entropies_are():
    record = TrainingRecord(bound=4.0)
    record.add(stats_of([1.01], [3.01], [0.5], [1.0]), step=0)
    ((left, top, *_),) = paths(record.render(), "square")[1]
    side = 1000 / 64  # H_S is below 4, which 64 cells reach to
    assert (left, top) == pytest.approx((16 * side, 1000 - 49 * side), abs=0.06)


@pytest.mark.parametrize("name", odd_records())
def test_degenerate_records(name):
    html = odd_records()[name].render()
    for tag, given in Page(html).found:
        if tag == "path":
            assert "nan" not in given["d"] and "inf" not in given["d"]
            assert all(math.isfinite(float(number)) for number in SVG_NUMBER.findall(given["d"]))


def test_save(tmp_path):
    record = record_of(range(2), decode=lambda token: "é")
    record.save(tmp_path / "training.html", title="A")
    assert (tmp_path / "training.html").read_text(encoding="utf-8") == record.render(title="A")


# How numbers are written


@pytest.mark.parametrize(
    "low, high, whole, ticks",
    [
        (0, 10.82, False, [0, 2, 4, 6, 8, 10, 12]),
        (0, 0.97, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 0.0, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-1.0, 4.2, False, [-1, 0, 1, 2, 3, 4, 5]),
        (0, 199, True, [0, 50, 100, 150, 200]),
        (7, 7, True, [7, 8]),
        (50_000, 50_099, True, [50_000, 50_020, 50_040, 50_060, 50_080, 50_100]),
        (0, 1, True, [0, 1]),
    ],
)
def test_round_ticks(low, high, whole, ticks):
    assert round_ticks(low, high, most=6, whole=whole) == ticks


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0"),
        (12.345, "12.3"),
        (0.5, "0.500"),
        (0.00123, "0.00123"),
        (0.000123, "1.2e-4"),
        (1234.5, "1,234"),
        (-2.0, "-2.00"),
        (math.nan, "NaN"),
        (-math.inf, "-∞"),
        (1.5e30, "1.5e30"),
    ],
)
def test_figures(value, text):
    assert figure(value) == text


@pytest.mark.parametrize(
    "share, text", [(0.5, "50 %"), (0.0312, "3.1 %"), (0.0001, "<0.1 %"), (0.0, "0.0 %"), (1, "100 %")]
)
def test_percent(share, text):
    assert percent(share) == text


# Strange numbers


@pytest.mark.parametrize(
    "entropies, divergences",
    [
        ((3e-15, 2e-14), (4e-15, 1e-14)),
        ((1.0, 2.0), (1e-8, -1e-8)),
        ((1e30, 2e30), (3e37, 1e37)),
        ((0.0, 0.0), (0.0, 0.0)),
    ],
)
def test_any_size_of_number_has_a_page(entropies, divergences):
    record = TrainingRecord()
    fields = {"teacher_entropy": entropies, "student_entropy": entropies, "divergence": divergences}
    record.add(stats_of(**{name: list(values) for name, values in fields.items()}, weight=[1.0, 1.0]), step=0)
    assert "Infinity" not in record.render()


@pytest.mark.parametrize("decode", [{}.__getitem__, lambda token: 1 / 0], ids=["KeyError", "ZeroDivisionError"])
def test_ids_that_are_not_known_are_numbers(decode):
    record = TrainingRecord(decode=decode)
    record.add(random_stats(1, 4, seed=0), torch.tensor([[5, -200, 6, 7]]), torch.tensor([[-100, 6, 7, 8]]), step=0)
    assert "#-200" in record.render() and "#8" in record.render()
