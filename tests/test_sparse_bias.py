"""What a sparse teacher gets wrong: the command's sums on made-up logits, and the page that shows its file."""

import pytest
import torch
from support import make_logits

from benchmarks import sparse_bias


def test_bias_of_sparse_teachers(monkeypatch, tmp_path):
    """Two batches of made-up logits, and a k of all columns, which has none."""
    monkeypatch.setattr(sparse_bias, "SIZES", (5, 40))
    pairs = [tuple(x.detach() for x in make_logits(rows, 40, seed=rows)) for rows in (3, 5)]
    rows = sparse_bias.rows_of(iter(pairs))
    assert [(row["tail"], row["k"]) for row in rows[:2]] == [("whole", "40"), ("bucket", "5")] and len(rows) == 7
    teacher = torch.cat([teacher for _, teacher in pairs]).double()
    p = teacher.softmax(-1)
    whole, few, *_ = rows
    assert float(whole["entropy_t1"]) == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-3)
    assert float(few["outside"]) == pytest.approx(1 - p.topk(5).values.sum(-1).mean().item(), rel=1e-3)
    assert float(few["divergence_tau2_of_tau2"]) < float(whole["divergence_tau2_of_tau2"])
    assert float(few["gradient_error_tau1_of_tau1"]) > 0.01
    for row in rows[4:]:
        assert float(row["gradient_error_tau2_of_tau1"]) < 1e-5
        assert float(row["divergence_tau2_of_tau1"]) == pytest.approx(float(whole["divergence_tau2_of_tau2"]), rel=1e-3)
    sparse_bias.save(rows, tmp_path / "folder" / "bias.csv")
    assert sparse_bias.load(tmp_path / "folder" / "bias.csv") == rows
    begin, end = sparse_bias.MARKERS
    assert sparse_bias.insert("new", f"a\n{begin}\nold\n{end}\nb") == f"a\n{begin}\nnew\n{end}\nb"


def test_page_of_sparse_teachers_shows_the_file():
    assert sparse_bias.table(sparse_bias.load(sparse_bias.CSV)) in sparse_bias.PAGE.read_text()
