"""The kernel for recipes (csrc/cuda/recipe_rows.cuh) on the CPU, against the reference in fp64: rows kept in shared
memory and rows read again, alone and in clusters, however they lie, with threads in any order.

What every backend makes of a recipe is in tests/test_divergences.py and tests/test_methods.py.
"""

import pytest
import torch
from support import assert_gradient_within_rounding, assert_within_error_rule
from test_kernels import LIBRARY, PAIRS, Case, Computed, of_rows, schedule
from test_kernels import _alone as _alone  # the fixture

from eakd_kernels import divergences, ea_dkd_loss, ea_kd_loss

# For a recipe these say whether rows are kept in shared memory, and by how many blocks; "": what would run.
PLANS = ["", "resident:1", "resident:4", "stream:1", "stream:2", "stream:16"]
KINDS = [
    *("forward_kl", "reverse_kl", divergences.Jeffreys(0.3), divergences.JSD(0.3), divergences.SkewForwardKL(0.1)),
    *(divergences.SkewReverseKL(0.1), divergences.TotalVariation(), divergences.AlphaBeta(0.2, 0.7)),
]
CASES_OF_A_PLAN = 12
FIELDS = ("divergence", "teacher_entropy", "student_entropy", "teacher_lse", "student_lse", "cross_entropy")


class RecipeCase(Case):
    """Rows as the kernels that read them again take them, and one random recipe."""

    def __init__(self, plan, pair, seed):
        super().__init__("stream", pair, 100 * PLANS.index(plan) + seed)
        choose, self.plan = self.random, plan
        several, self.decoupled = choose.random() < 0.3, choose.random() < 0.25
        self.recipe = {"alpha": 1.5, "beta": 2.0} if self.decoupled else {"divergence": choose.choice(KINDS)}
        self.recipe["temperature"] = choose.choice([(1.0, 2.0), (2.0, 3.0, 4.0, 5.0, 6.0)]) if several else self.tau
        # What the divergence has as factors: its error has them too.
        self.factor = sum(tau**2 for tau in self.recipe["temperature"]) if several else 1.0
        self.factor *= 3.5 if self.decoupled else 1
        if self.columns > 100 and choose.random() < 0.3:  # of fewer, what is left where nearly all of it cancels
            self.recipe["standardize"] = choose.choice([True, "all"])
        if choose.random() < 0.3:
            self.recipe["teacher_class_weights"] = torch.linspace(0.1, 1, self.columns)
        if choose.random() < 0.3:
            self.recipe |= {"student_softcap": 20.0, "teacher_logit_scale": 0.7}
        self.two_operators = seed % 3 == 2
        self.inplace = self.inplace and not self.two_operators

    def tensors(self):
        student, teacher, pool, options = super().tensors()
        if self.decoupled and "labels" not in options:
            allowed = pool[0][0, : self.columns].isfinite().nonzero().flatten()
            options["labels"] = allowed[torch.arange(len(pool[0])) % len(allowed)]
        return student, teacher, pool, options | self.recipe

    def run(self, logits, teacher, backend, options):
        """(statistics, gradient) by one pass, or by the two operators with live weights."""
        function = ea_dkd_loss if self.decoupled else ea_kd_loss
        how = {"detach_weights": False, "reduction": "none"} if self.two_operators else {"reduction": "sum"}
        loss, stats = function(logits, teacher, backend=backend, return_stats=True, **how, **options)
        return stats, torch.autograd.grad(loss.sum(), logits)[0]


def check(case):
    student, teacher, pool, options = case.tensors()
    (exact, exact_gradient), (eager, eager_gradient) = (
        case.run(pool[0].to(dtype).requires_grad_(), pool[1].to(dtype), "reference", options)
        for dtype in (torch.float64, torch.float32)
    )
    student = student.requires_grad_()
    logits = Computed.apply(student.new_ones((), requires_grad=True), student) if case.inplace else student
    own = {**of_rows(options, case.rows), "inplace_gradient": case.inplace}
    if "teacher_class_weights" in own:
        own["teacher_class_weights"] = options["teacher_class_weights"]
    stats, gradient = case.run(logits, teacher, "cuda", own)
    for name in FIELDS:
        got, want, baseline = (getattr(each, name) for each in (stats, exact, eager))
        if got is not None:
            error, want = (baseline - want).abs().max(), want[: case.rows]
            factor = torch.full_like(want, case.factor) if name == "divergence" else None
            assert_within_error_rule(got, want, want + error, max(case.columns, 2), factor)
    error, want = (eager_gradient - exact_gradient).abs().max(), exact_gradient[: case.rows]
    assert_gradient_within_rounding(gradient, want, want + error)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(str(dtype)[6:] for dtype in pair))
@pytest.mark.parametrize("plan", PLANS)
def test_recipes(plan, pair, monkeypatch):
    for seed in range(CASES_OF_A_PLAN):
        case = RecipeCase(plan, pair, seed)
        monkeypatch.setenv("EAKD_CUDA_PLAN", plan)
        LIBRARY.eakd_emulator_device(90, case.processors)
        schedule(case.seed)
        try:
            check(case)
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(f"{error}\n{case}") from error
        finally:
            LIBRARY.eakd_emulator_device(90, 2)
