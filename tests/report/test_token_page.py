"""eakd_kernels.report: values out of logits, and the page that is made of them, up to where a browser reads it."""

import base64
import hashlib
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from token_pages import HOSTILE, data_in, hostile_passage, json_in, page, passage, prediction, row

from eakd_kernels import distill_stats
from eakd_kernels.report import Passage, View, rows_from_logits

T, V = 6, 40
OPTIONS = {"entropy_temperature": 1.0, "weight_norm": "bound"}


def logits(seed):
    return 3 * torch.randn(T, V, generator=torch.Generator().manual_seed(seed))


IDS = torch.tensor([3, 1, 4, 1, 5, 9])


def rows(student, teacher, **more):
    return rows_from_logits(student, teacher, IDS, str, **OPTIONS | more)


class Elements(HTMLParser):
    """Tags in their order, with attributes."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


# Values


def test_a_token_has_the_row_that_predicts_it():
    student, teacher = logits(0), logits(1)
    found = rows(student, teacher)
    stats = distill_stats(student, teacher, **OPTIONS)
    assert found[0] is None and len(found) == T
    for i, made in enumerate(found[1:]):
        assert made.weight == pytest.approx(stats.weight[i].item())
        assert made.teacher.entropy == pytest.approx(stats.teacher_entropy[i].item())
        assert made.student.entropy == pytest.approx(stats.student_entropy[i].item())
        for model, given in ((made.teacher, teacher), (made.student, student)):
            p = given[i].softmax(-1)
            assert model.probability == pytest.approx(p[IDS[i + 1]].item())
            assert [candidate.text for candidate in model.candidates] == [str(j.item()) for j in p.topk(5).indices]
            assert [c.probability for c in model.candidates] == pytest.approx(p.topk(5).values.tolist())


def test_no_more_candidates_than_columns():
    found = rows_from_logits(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1]), str)
    assert len(found[1].teacher.candidates) == 3


def test_predictions_are_of_the_logits_that_the_weights_see():
    student, teacher = logits(0), logits(1)
    student[:, 12:] += 50
    wide = torch.cat([teacher, torch.full((T, 7), 100.0)], -1)
    found = rows(
        student, wide, vocab_size=12, student_logit_scale=0.5, student_softcap=2.0, teacher_softcap=3.0, candidates=40
    )
    for i, made in enumerate(found[1:]):
        for model, given in (
            (made.student, 2 * (student[i, :12] * 0.5 / 2).tanh()),
            (made.teacher, 3 * (teacher[i, :12] / 3).tanh()),
        ):
            p = given.softmax(-1)
            assert {c.text: c.probability for c in model.candidates} == pytest.approx(
                {str(j): value for j, value in enumerate(p.tolist())}
            )
            assert model.probability == pytest.approx(p[IDS[i + 1]].item())


def test_a_token_beyond_the_vocabulary():
    with pytest.raises(ValueError, match=r"ids must be in 0\.\.8, the columns in use, got 9"):
        rows(logits(0), logits(1), vocab_size=9)


def test_no_gradient_is_kept():
    assert rows(logits(0).requires_grad_(), logits(1)) == rows(logits(0), logits(1))


@pytest.mark.parametrize("length", [0, 1])
def test_too_short_for_predictions(length):
    given = torch.randn(length, V)
    assert rows_from_logits(given, given, torch.zeros(length, dtype=torch.int64), str) == (None,) * length


def test_columns_of_minus_infinity():
    student, teacher = logits(0), logits(1)
    student[:, 5:] = teacher[:, 5:] = -math.inf
    made = rows(student, teacher)[-1]  # of the token 9
    assert made.teacher.probability == made.student.probability == 0
    assert math.isfinite(made.weight)
    assert '"NaN"' not in page(Passage(tuple("abcdef"), (View("", rows(student, teacher)),)))


def test_rows_without_sense_stay_visible():
    student, teacher = logits(0), logits(1)
    student[2] = math.nan
    drawn = data_in(page(Passage(tuple("abcdef"), (View("", rows(student, teacher)),))))["views"][0]
    assert [r and r["weight"] == "NaN" for r in drawn["rows"]] == [None, False, False, True, False, False]
    assert sum(drawn["histogram"]) == T - 2
    assert drawn["summary"].endswith("; 1 not finite")


def test_logits_of_another_length_are_refused():
    with pytest.raises(ValueError, match="5, 6 and 6 rows"):
        rows(logits(0)[:-1], logits(1))


def test_views_have_a_row_a_token():
    with pytest.raises(ValueError, match="view 'after' has 1 rows for 2 tokens"):
        Passage(("a", "b"), (View("after", (None,)),))


# The page


def test_nothing_is_fetched():
    html = page(hostile_passage())
    linked = [
        (tag, given[name]) for tag, given in Elements(html).found for name in ("src", "href", "srcset") if name in given
    ]
    assert linked == [("link", "data:,")]
    assert not re.search(r"@import|url\(", html)


def test_hostile_text_is_only_data():
    """The same elements as in a page of harmless text, and every token comes back as it was."""
    hostile, harmless = page(hostile_passage(), *2 * ["</title><script>1</script>"]), page(passage("ab", [0.5], [0.5]))
    assert [tag for tag, _ in Elements(hostile).found] == [tag for tag, _ in Elements(harmless).found]
    assert not set("<>&").intersection(json_in(hostile))
    data = data_in(hostile)
    assert tuple(data["tokens"]) == HOSTILE
    assert [r["teacher"]["candidates"][0]["text"] for r in data["views"][0]["rows"][1:]] == list(HOSTILE[1:])
    hostile.encode("utf-8")


def test_only_its_own_script_and_style_may_run():
    html = page(passage("ab", [0.5]))
    (policy,) = (a["content"] for _, a in Elements(html).found if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for source in re.search(r"<style>(.*?)</style>.*<script type=\"module\">(.*?)</script>", html, re.DOTALL).groups():
        assert base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() in policy


def test_histogram_scale_and_summary():
    data = data_in(page(passage("abcde", [0.0, 0.1, 0.3, 0.6], [0.1, 0.1, 0.1, 0.1])))
    before, after = data["views"]
    assert data["scale"] == 0.6  # of both
    assert [i for i, n in enumerate(before["histogram"]) for _ in range(n)] == [0, 4, 12, 23]
    assert after["histogram"] == [0] * 4 + [4] + [0] * 19
    assert before["summary"] == "Mean of w 0.250, coefficient of variation 1.06"
    assert after["summary"] == "Mean of w 0.100, coefficient of variation 0.00"


@pytest.mark.parametrize(
    "largest, scale", [(0.0, 1.0), (0.03, 0.03), (0.031, 0.04), (0.7, 0.8), (1.0, 1.0), (8.01, 10.0), (11.0, 15.0)]
)
def test_the_scale_ends_at_a_round_number(largest, scale):
    assert data_in(page(passage("ab", [largest])))["scale"] == scale


def test_weights_off_the_scale():
    """A weighting of the user's own may be negative."""
    data = data_in(page(passage("abcd", [-1.0, 0.5, math.inf])))
    (view,) = data["views"]
    assert data["scale"] == 0.5 and view["histogram"] == [1] + [0] * 22 + [1]
    assert [r["weight"] for r in view["rows"][1:]] == [-1.0, 0.5, "Infinity"]


def test_figures_that_json_does_not_know():
    odd = prediction(math.nan, -math.inf, (("a", math.nan), ("b", 0.0)))
    made = Passage(("a", "b"), (View("", (None, row(math.nan, teacher=odd))),))
    teacher = data_in(page(made))["views"][0]["rows"][1]["teacher"]
    assert (teacher["entropy"], teacher["probability"]) == ("NaN", "-Infinity")
    assert [c["probability"] for c in teacher["candidates"]] == ["NaN", 0.0]


@pytest.mark.parametrize("tokens", ["", "a"])
def test_passages_without_weights(tokens):
    (view,) = data_in(page(passage(tokens, [])))["views"]
    assert view["histogram"] == [0] * 24 and view["summary"] == "No token here has a weight."


def test_a_page_of_no_view():
    assert data_in(page(Passage(("a",), ())))["views"] == []
